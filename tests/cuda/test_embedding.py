"""Rows of a table, in every format, and of a step's selected tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from toptwo_kernels import reference
from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.embedding import embed, select
from toptwo_kernels.cuda.linear import linear
from toptwo_kernels.cuda.packing import BLOCK_INPUTS, pack
from toptwo_kernels.cuda.plan import plan_step
from toptwo_kernels.ops import StepBatch, WeightFormat

FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)


def step(ids: list[int], selected: list[int]) -> StepBatch:
    """One sequence of these tokens."""
    positions = torch.arange(len(ids))
    return StepBatch(
        ids_T=torch.tensor(ids),
        positions_T=positions,
        slots_T=positions,
        query_starts_R1=torch.tensor([0, len(ids)]),
        context_lens_R=torch.tensor([len(ids)]),
        block_tables_RB=torch.zeros(1, 1, dtype=torch.int64),
        block_size=16,
        selected_S=torch.tensor(selected, dtype=torch.int64),
    )


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 32), (130, 61), (300, 288), (7, 1032)], ids=str)
def test_the_tables_rows(
    device: Device, normal: Callable[..., Tensor], weight_format: WeightFormat, shape: tuple[int, int]
) -> None:
    weight_VH = normal(*shape)
    ids = [0, shape[0] - 1, shape[0] // 2, 0]
    plan = plan_step(device, step(ids, []))
    table = pack(device, weight_VH, weight_format)
    got_TH = embed(device, table, plan)
    if weight_format in BLOCK_INPUTS:
        inputs_II = torch.eye(shape[1], device=device.torch_device)
        expected_TH = linear(device, inputs_II, table).T[ids].bfloat16()  # as a product sees the weights
    else:
        expected_TH = reference.pack(weight_VH.cpu(), weight_format).data[0][ids].to(got_TH.device)
    assert torch.equal(got_TH, expected_TH)


@pytest.mark.parametrize("width", [1, 61, 1024, 2049])
def test_the_selected_rows(device: Device, normal: Callable[..., Tensor], width: int) -> None:
    x_TH = normal(5, width, dtype=torch.bfloat16)
    for selected in ([], [4], [0, 2, 4]):
        got = select(device, x_TH, plan_step(device, step([0] * 5, selected)))
        assert torch.equal(got, x_TH[selected])
