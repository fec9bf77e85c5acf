"""How a step's integers reach the device: packed into one buffer, copied at once, read by every layer.

Attention's work is listed here as well. A context is cut into splits of SPLIT tokens, counted from its
beginning; a decode step is a list of items, each a row and one of its splits, and any other step a list of
tiles, each a row and QUERY_TILE of its queries. Which kernels take which is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from toptwo_kernels.cuda.device import Device
from toptwo_kernels.ops import StepBatch

SPLIT = 256  # context tokens that are added up by themselves before splits are joined, always in order
QUERY_TILE = 16

_ALIGNMENT = 32  # int32s: every array begins at 128 bytes, whatever the sizes of those before it

Integers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PlanShape:
    """How many of everything a plan holds; blocks: of a row."""

    tokens: int
    rows: int
    selected: int
    blocks: int
    items: int
    tiles: int

    @property
    def is_decoding(self) -> bool:
        """Whether every row has one query."""
        return self.tokens == self.rows


@dataclass(frozen=True)
class Plan:
    """A step on the device: int32 arrays, views of one buffer. The first eight are as in `StepBatch`.

    item_rows_I, item_splits_I: of a decode step; the items of row r are those from item_starts_R1[r] to
        item_starts_R1[r + 1], in the order of the context.
    tile_rows_Y, tile_queries_Y: of any other step; the row, and which of its queries comes first.
    num_live: [1], how many tokens are real; those behind are padding, with slot -1 in rows of no context.
    """

    shape: PlanShape
    block_size: int
    ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    query_starts_R1: Tensor
    context_lens_R: Tensor
    block_tables_RB: Tensor
    selected_S: Tensor
    item_rows_I: Tensor
    item_splits_I: Tensor
    item_starts_R1: Tensor
    tile_rows_Y: Tensor
    tile_queries_Y: Tensor
    num_live: Tensor


def plan_step(device: Device, batch: StepBatch) -> object:
    """See `ops.Ops.plan_step`."""
    shape = _measure(batch)
    buffer = torch.empty(_size(shape), dtype=torch.int32, device=device.torch_device)
    _copy(device, batch, shape, buffer)
    return _view(buffer, shape, batch.block_size)


class StaticPlan:
    """A plan whose arrays stay where they are, for decode steps of at most `rows` rows and `blocks` blocks a
    row. Between the step's rows and `rows` lie padding rows."""

    def __init__(self, device: Device, rows: int, blocks: int, block_size: int) -> None:
        splits = -(-blocks * block_size // SPLIT)
        self._device = device
        self._shape = PlanShape(rows, rows, rows, blocks, rows * splits, 0)
        self._buffer = torch.zeros(_size(self._shape), dtype=torch.int32, device=device.torch_device)
        self.plan = _view(self._buffer, self._shape, block_size)

    @property
    def num_live(self) -> Tensor:
        """int32 [1]: how many of the rows are the step's."""
        return self.plan.num_live

    def fill(self, batch: StepBatch) -> None:
        """Make it the plan of `batch`. Raises ValueError if that is no decode step that fits."""
        given, room = _measure(batch), self._shape
        fits = given.rows <= room.rows and given.blocks <= room.blocks and given.items <= room.items
        if not (given.is_decoding and fits and batch.block_size == self.plan.block_size):
            raise ValueError(f"a step of {given} does not fit a plan of {room}")
        _copy(self._device, batch, room, self._buffer)


def _measure(batch: StepBatch) -> PlanShape:
    tokens, (rows, blocks) = len(batch.ids_T), batch.block_tables_RB.shape
    decoding = tokens == rows
    return PlanShape(
        tokens=tokens,
        rows=rows,
        selected=len(batch.selected_S),
        blocks=blocks,
        items=int(_num_splits(batch).sum()) if decoding else 0,
        tiles=0 if decoding else int(_num_tiles(batch).sum()),
    )


def _num_splits(batch: StepBatch) -> npt.NDArray[np.int64]:
    return -(-batch.context_lens_R.numpy() // SPLIT)


def _num_tiles(batch: StepBatch) -> npt.NDArray[np.int64]:
    return -(-np.diff(batch.query_starts_R1.numpy()) // QUERY_TILE)


def _lengths(shape: PlanShape) -> dict[str, int]:
    """How long each array of a plan is, in their order."""
    return {
        "ids_T": shape.tokens,
        "positions_T": shape.tokens,
        "slots_T": shape.tokens,
        "query_starts_R1": shape.rows + 1,
        "context_lens_R": shape.rows,
        "block_tables_RB": shape.rows * shape.blocks,
        "selected_S": shape.selected,
        "item_rows_I": shape.items,
        "item_splits_I": shape.items,
        "item_starts_R1": shape.rows + 1,
        "tile_rows_Y": shape.tiles,
        "tile_queries_Y": shape.tiles,
        "num_live": 1,
    }


def _offsets(shape: PlanShape) -> dict[str, slice]:
    """Where each array lies in the buffer."""
    places, start = {}, 0
    for name, length in _lengths(shape).items():
        places[name] = slice(start, start + length)
        start += _aligned(length)
    return places


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _size(shape: PlanShape) -> int:
    return sum(_aligned(length) for length in _lengths(shape).values())


def _view(buffer: Tensor, shape: PlanShape, block_size: int) -> Plan:
    arrays = {name: buffer[place] for name, place in _offsets(shape).items()}
    arrays["block_tables_RB"] = arrays["block_tables_RB"].view(shape.rows, shape.blocks)
    return Plan(shape, block_size, **arrays)


def _copy(device: Device, batch: StepBatch, shape: PlanShape, buffer: Tensor) -> None:
    """Pack `batch`, padded to `shape`, and send it off."""
    # Another buffer each time: the last one may still be on its way. torch keeps both until they are done.
    host = torch.zeros(len(buffer), dtype=torch.int32, pin_memory=not device.interpreted)
    packed = host.numpy()
    _pack(batch, shape, {name: packed[place] for name, place in _offsets(shape).items()})
    buffer.copy_(host, non_blocking=True)


def _pack(batch: StepBatch, shape: PlanShape, arrays: dict[str, Integers]) -> None:
    rows, tokens, selected = len(batch.context_lens_R), len(batch.ids_T), len(batch.selected_S)
    arrays["ids_T"][:tokens] = batch.ids_T.numpy()
    arrays["positions_T"][:tokens] = batch.positions_T.numpy()
    arrays["slots_T"][:tokens] = batch.slots_T.numpy()
    arrays["slots_T"][tokens:] = -1
    arrays["query_starts_R1"][: rows + 1] = batch.query_starts_R1.numpy()
    arrays["query_starts_R1"][rows + 1 :] = np.arange(tokens + 1, shape.tokens + 1)
    arrays["context_lens_R"][:rows] = batch.context_lens_R.numpy()
    tables = arrays["block_tables_RB"].reshape(shape.rows, shape.blocks)
    tables[:rows, : batch.block_tables_RB.shape[1]] = batch.block_tables_RB.numpy()
    arrays["selected_S"][:selected] = batch.selected_S.numpy()
    arrays["selected_S"][selected:] = np.arange(selected, shape.selected)
    arrays["num_live"][:] = tokens
    if shape.is_decoding:
        counts = _num_splits(batch)
        starts = np.cumsum(counts)
        arrays["item_starts_R1"][1 : rows + 1] = starts
        arrays["item_starts_R1"][rows + 1 :] = starts[-1:]
        arrays["item_rows_I"][: counts.sum()], arrays["item_splits_I"][: counts.sum()] = _list_parts(counts)
    else:
        owners, parts = _list_parts(_num_tiles(batch))
        # The last tiles of a prompt see the most and take the longest, so they are begun first.
        arrays["tile_rows_Y"][:] = owners[::-1]
        arrays["tile_queries_Y"][:] = parts[::-1] * QUERY_TILE


def _list_parts(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of counts[r] parts of each r, one after the other: whose each is, and which of them."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners, np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
