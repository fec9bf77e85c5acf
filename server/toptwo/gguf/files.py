"""How GGUF files are named, those of one model that is split among them.

Knows names; must not know contents.
"""

from __future__ import annotations

import re
from pathlib import Path

from toptwo.errors import StartupError

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
LINK_STEM = "model"


def parts_of(path: Path) -> list[Path]:
    """All files of the model that `path` belongs to, in order. Raises StartupError where one is not there."""
    shard = SHARD.fullmatch(path.name)
    if not shard:
        return [path]
    count = int(shard["count"])
    parts = [path.with_name(_shard_name(shard["stem"], number, count)) for number in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise StartupError(f"{part}: not there; {path.name} is one of {count} parts")
    if path not in parts:
        raise StartupError(f"{path}: no part has that number")
    return parts


def stem_of(path: Path) -> str:
    """The model's name: its file's, without what tells parts apart."""
    shard = SHARD.fullmatch(path.name)
    return shard["stem"] if shard else path.name.removesuffix(".gguf")


def link_name(number: int, count: int) -> str:
    """The name of a part, counted from 1, in a directory that stands for the model."""
    return f"{LINK_STEM}.gguf" if count == 1 else _shard_name(LINK_STEM, number, count)


def linked_parts(directory: Path) -> list[Path]:
    """The model's files in a directory where they have such names; empty where there are none."""
    if (directory / f"{LINK_STEM}.gguf").exists():
        return [directory / f"{LINK_STEM}.gguf"]
    shards = sorted(directory.glob(f"{LINK_STEM}-00001-of-*.gguf"))
    return parts_of(shards[0]) if shards else []


def _shard_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05}-of-{count:05}.gguf"
