"""A step's integers on the device, and the lists of attention's work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from toptwo_kernels.ops import StepBatch

if TYPE_CHECKING:
    from toptwo_kernels.cuda.device import Device


def batch_of(rows: list[tuple[int, int]], blocks: int = 100) -> StepBatch:
    """Rows of (context length, queries)."""
    counts = torch.tensor([queries for _, queries in rows])
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    positions = torch.cat([torch.arange(context - queries, context) for context, queries in rows])
    return StepBatch(
        ids_T=torch.arange(len(positions)) + 11,
        positions_T=positions,
        slots_T=positions + 1000,
        query_starts_R1=starts,
        context_lens_R=torch.tensor([context for context, _ in rows]),
        block_tables_RB=torch.arange(len(rows) * blocks).view(len(rows), blocks),
        block_size=16,
        selected_S=starts[1:] - 1,
    )


FIELDS = (
    *("ids_T", "positions_T", "slots_T", "query_starts_R1"),
    *("context_lens_R", "block_tables_RB", "selected_S"),
)


@pytest.mark.parametrize("rows", [[(600, 1), (1, 1), (256, 1), (257, 1)], [(40, 40), (300, 17), (9, 1)]])
def test_a_batch_arrives(device: Device, rows: list[tuple[int, int]]) -> None:
    from toptwo_kernels.cuda.plan import plan_step

    batch = batch_of(rows)
    plan = plan_step(device, batch)
    for name in FIELDS:
        given, got = getattr(batch, name), getattr(plan, name)
        assert got.dtype == torch.int32
        assert got.data_ptr() % 16 == 0  # or kernels are compiled again
        assert torch.equal(got.cpu().long(), given)
    assert plan.num_live.tolist() == [len(batch.ids_T)]


def test_items_are_the_splits_of_rows_in_order(device: Device) -> None:
    from toptwo_kernels.cuda.plan import plan_step

    plan = plan_step(device, batch_of([(600, 1), (1, 1), (256, 1), (257, 1)]))
    assert plan.item_rows_I.tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert plan.item_splits_I.tolist() == [0, 1, 2, 0, 0, 0, 1]
    assert plan.item_starts_R1.tolist() == [0, 3, 4, 5, 7]
    assert plan.shape.is_decoding


def test_tiles_are_the_queries_of_rows_last_ones_first(device: Device) -> None:
    from toptwo_kernels.cuda.plan import plan_step

    plan = plan_step(device, batch_of([(40, 40), (300, 17), (9, 1)]))
    assert plan.tile_rows_Y.tolist() == [2, 1, 1, 0, 0, 0]
    assert plan.tile_queries_Y.tolist() == [0, 16, 0, 32, 16, 0]
    assert not plan.shape.is_decoding


def test_a_static_plan_is_filled_up_with_padding(device: Device) -> None:
    from toptwo_kernels.cuda.plan import StaticPlan, plan_step

    static = StaticPlan(device, rows=6, blocks=128, block_size=16)
    place = static.plan.ids_T.data_ptr()
    static.fill(batch_of([(2000, 1)] * 6, blocks=128))
    batch = batch_of([(600, 1), (257, 1)])
    static.fill(batch)  # nothing of the step before is left
    got, exact = static.plan, plan_step(device, batch)
    for name in FIELDS:
        given = getattr(batch, name)
        assert torch.equal(getattr(got, name)[tuple(map(slice, given.shape))].cpu().long(), given)
    assert got.ids_T.data_ptr() == place
    assert (
        got.ids_T[2:].tolist() == got.positions_T[2:].tolist() == got.context_lens_R[2:].tolist() == [0] * 4
    )
    assert got.slots_T[2:].tolist() == [-1] * 4
    assert got.selected_S.tolist() == [0, 1, 2, 3, 4, 5]
    assert got.query_starts_R1.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert got.item_starts_R1.tolist() == [0, 3, 5, 5, 5, 5, 5]
    assert got.item_rows_I[:5].tolist() == exact.item_rows_I.tolist() == [0, 0, 0, 1, 1]
    assert got.item_splits_I[:5].tolist() == exact.item_splits_I.tolist() == [0, 1, 2, 0, 1]
    assert static.num_live.tolist() == [2]


@pytest.mark.parametrize(
    ("rows", "blocks"),
    [([(20, 1)] * 3, 4), ([(20, 2)], 4), ([(20, 1)], 9)],
    ids=["rows", "queries", "blocks"],
)
def test_a_step_that_does_not_fit_is_refused(
    device: Device, rows: list[tuple[int, int]], blocks: int
) -> None:
    from toptwo_kernels.cuda.plan import StaticPlan

    static = StaticPlan(device, rows=2, blocks=8, block_size=16)
    with pytest.raises(ValueError, match="does not fit"):
        static.fill(batch_of(rows, blocks))
