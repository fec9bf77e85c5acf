"""Small text files of a checkpoint directory, read with errors that name the file.

Knows paths and JSON; must not know what the files mean.
"""

from __future__ import annotations

import json
from pathlib import Path

from toptwo.errors import CheckpointError


def read_text(path: Path) -> str:
    """The file as UTF-8 text. Raises CheckpointError when it is missing or unreadable."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def read_json(path: Path) -> dict[str, object]:
    """The file as a JSON object. Raises CheckpointError when it is missing, unreadable or no object."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was expected")
    return value


def read_json_if_present(path: Path) -> dict[str, object]:
    """The file as a JSON object, or an empty one where there is no such file."""
    return read_json(path) if path.exists() else {}
