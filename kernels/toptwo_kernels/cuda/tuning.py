"""How products are cut into pieces, by shape: what was measured, on this machine or by us, or else a guess.

Every configuration computes the same bits: pieces differ in how many outputs and tokens they cover and how
far ahead they fetch, never in the order of a sum. Knows no kernels.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

from toptwo_kernels.ops import WeightFormat

Kind = Literal["linear", "gate_up", "down"]
SMALLEST_TOKENS, LARGEST_TOKENS = 16, 1024
LARGEST_BLOCK = 128  # tokens of an expert that a program computes
_DENSE_BYTES: dict[WeightFormat, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_SHARED_BYTES = 227 << 10  # that a program may have, from compute capability 9.0 on
_SHARED_BESIDES = 7 << 10  # what kernels need of it for other things
_SHIPPED = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Config:
    """One program computes block_rows outputs (of gates and ups half as many each) of block_tokens tokens,
    from block_cols inputs at a time in dense formats, fetched num_stages - 1 blocks ahead. Programs of
    `group` blocks of tokens run beside each other, sharing weights.

    Triton chooses matrix instructions by these numbers. On the cards that there are, up to compute capability
    9.0, those of one warp and those of four together give the same bits (tests/cuda/test_experts.py).
    """

    block_rows: int
    block_tokens: int
    block_cols: int
    num_warps: int
    num_stages: int
    group: int = 8

    def launch(self) -> dict[str, int]:
        """As keyword arguments of a kernel."""
        return {
            "BLOCK_O": self.block_rows,
            "BLOCK_T": self.block_tokens,
            "BLOCK_K": self.block_cols,
            "GROUP_T": self.group,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class Key(NamedTuple):
    """What a configuration is chosen by. rows and cols: of one matrix, of either half of a paired one.
    tokens: a `bucket`, of a step or of an expert."""

    kind: Kind
    format: WeightFormat
    rows: int
    cols: int
    tokens: int

    def __str__(self) -> str:
        return "/".join(str(part) for part in self)


def bucket(tokens: int, largest: int = LARGEST_TOKENS) -> int:
    """The power of two, of those that are told apart, for a number of tokens."""
    return min(max(1 << (tokens - 1).bit_length(), SMALLEST_TOKENS), largest)


def expert_bucket(weight_format: WeightFormat, num_pairs: int, num_experts: int) -> int:
    """The same for an expert's tokens: room for twice the average, so that few need one block more."""
    largest = SMALLEST_TOKENS if weight_format == "float32" else LARGEST_TOKENS
    return bucket(-(-2 * num_pairs // num_experts), largest)


def candidates(key: Key, shared_bytes: int = _SHARED_BYTES) -> list[Config]:
    """At most eight that may be fastest, the guess first. An expert's blocks have key.tokens tokens or the
    most that a block has, as both of its products share them."""
    if key.format == "float32":
        return [Config(64, 16, 32, 4, 3)]
    found = _for_few(key) if key.tokens <= 64 else _for_many(key)
    most = shared_bytes - _SHARED_BESIDES
    return [config for config in found if _shared_bytes(key, config) <= most][:8]


def _for_few(key: Key) -> list[Config]:
    """Reading weights is what takes time: as many bytes on the way as fit, and of weights that are to be
    widened as many warps as fit."""
    if key.format not in _DENSE_BYTES:
        shapes = [
            (32, 2, 4),
            (32, 2, 6),
            (64, 2, 3),
            (64, 2, 4),
            (64, 4, 4),
            (64, 4, 5),
            (64, 4, 3),
            (128, 8, 4),
        ]
        return [Config(rows, key.tokens, 128, warps, stages) for rows, warps, stages in shapes]
    shapes = [
        (64, 128, 6),
        (64, 128, 4),
        (64, 64, 10),
        (64, 256, 3),
        (128, 64, 6),
        (128, 128, 4),
        (64, 64, 6),
    ]
    if key.kind == "gate_up":
        shapes = [(128, 128, 5), (128, 64, 10), (128, 64, 6), (64, 128, 6), (64, 64, 10), (256, 64, 3)]
    return [Config(rows, key.tokens, cols, 4, stages) for rows, cols, stages in shapes]


def _for_many(key: Key) -> list[Config]:
    """Arithmetic takes time, or both: tiles as large as registers bear."""
    if key.format not in _DENSE_BYTES:
        tiles = [(64, 128, 128, 4), (128, 128, 128, 8), (32, 128, 128, 2)]
        return [Config(*tile, stages) for stages in (3, 2) for tile in tiles]
    tiles = [(128, 128, 64, 8), (64, 128, 64, 4)]
    if key.kind == "gate_up":
        tiles = [(256, 128, 64, 8), (128, 128, 64, 8), (128, 128, 64, 4)]
    elif key.kind == "down":
        tiles = [*tiles, (256, 128, 64, 8)]
    elif key.tokens > 128:
        tiles = [(128, 256, 64, 8), *tiles, (256, 128, 64, 8)]
    return [Config(*tile, stages) for stages in (4, 3, 2) for tile in tiles]


def _shared_bytes(key: Key, config: Config) -> int:
    weights = config.block_rows
    if key.format in _DENSE_BYTES:
        columns = config.block_cols * _DENSE_BYTES[key.format]
        return config.num_stages * columns * (weights + config.block_tokens)
    inputs = 256 if key.format == "int4" else 128
    return config.num_stages * (weights * 128 + config.block_tokens * inputs * 2)


class Tuner:
    """The configurations of a card.

    directory: where measured ones are kept, in a file for each card and version of Triton; None to keep none.
    shared_bytes: memory that a program may share among its threads.
    """

    def __init__(self, card: str, directory: Path | None, shared_bytes: int = _SHARED_BYTES) -> None:
        self.card = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
        self._directory = directory
        self._shared_bytes = shared_bytes
        self._chosen: dict[Key, Config] = {}

    @cached_property
    def _measured(self) -> dict[str, Config]:
        """Ours below this machine's own. A file that cannot be read is as good as none."""
        found: dict[str, Config] = {}
        for path in (_SHIPPED / f"{self.card}.json", self._path):
            if path is not None and path.exists():
                with suppress(OSError, ValueError, TypeError, AttributeError):
                    found |= {key: Config(**fields) for key, fields in json.loads(path.read_text()).items()}
        return found

    @property
    def _path(self) -> Path | None:
        if self._directory is None:
            return None
        return self._directory / f"{self.card}_triton-{version('triton')}.json"

    def choose(self, key: Key) -> Config:
        """The configuration to launch with."""
        config = self._chosen.get(key)
        if config is None:
            config = self._measured.get(str(key)) or candidates(key, self._shared_bytes)[0]
            self._chosen[key] = config
        return config

    def tune(self, key: Key, measure: Callable[[Config], float | None]) -> Config:
        """The fastest candidate from now on.

        measure: milliseconds of a configuration, None if it cannot run.
        """
        times = {
            config: time
            for config in candidates(key, self._shared_bytes)
            if (time := measure(config)) is not None
        }
        if times:
            fastest = min(times, key=lambda config: times[config])
            self._measured[str(key)] = self._chosen[key] = fastest
        return self.choose(key)

    def save(self) -> None:
        """Keep what was measured. A directory that cannot be written costs a measurement next time."""
        path = self._path
        if path is None:
            return
        table = {key: asdict(config) for key, config in sorted(self._measured.items())}
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(table, indent=1))
            temporary.replace(path)
