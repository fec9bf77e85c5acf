"""Layouts, told by products with the identity: out comes the very weight that a format stands for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cuda_harness  # noqa: F401  before anything that imports Triton
from toptwo_kernels import reference
from toptwo_kernels.cuda import packing
from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.linear import linear, linear_per_head
from toptwo_kernels.ops import Matrix, WeightFormat

Normal = Callable[..., Tensor]

BLOCKED: tuple[WeightFormat, ...] = ("int8", "int4", "fp8")


def dense(device: Device, matrix: Matrix) -> Tensor:
    """The weights [E, O, I] as a product in float32 sees them: a head for each matrix, tokens for inputs."""
    eye_II = torch.eye(matrix.cols, device=device.torch_device)
    repeated = eye_II.repeat(1, matrix.num_matrices)
    heads = linear_per_head(device, repeated, matrix).view(matrix.cols, matrix.num_matrices, matrix.rows)
    return heads.permute(1, 2, 0)


@pytest.mark.parametrize("weight_format", BLOCKED)
@pytest.mark.parametrize("cols", [64, 256, 300])
def test_a_block_unfolds_into_what_it_was_made_of(
    device: Device, normal: Normal, weight_format: WeightFormat, cols: int
) -> None:
    weight = normal(2, 70, cols)
    weight[0, 3] *= 1e-3
    weight[1, :, 32:64] = 0
    expected = reference.pack(weight.cpu(), weight_format).data
    got = dense(device, packing.pack(device, weight, weight_format)).cpu()
    # Scales are bfloat16 here, and what int4 adds is one, of up to 15 scales.
    step = weight.abs().amax(-1, keepdim=True).cpu() / 15 if weight_format == "int4" else torch.zeros(1)
    assert ((got - expected).abs() <= 2**-8 * (expected.abs() + 15 * step)).all()


def test_what_was_quantised_before_comes_back(device: Device) -> None:
    """Numbers that a format holds exactly, with scales that bfloat16 holds."""
    steps = torch.arange(-127, 128).repeat(4)[:1016].view(4, -1)
    for weight_format, grid in (("int8", steps), ("int4", steps % 16 - 8)):
        groups = torch.nn.functional.pad(grid, (0, 2)).view(4, -1, 32).clone()
        groups[..., 0] = -8 if weight_format == "int4" else 127
        groups[..., 1] = 7 if weight_format == "int4" else -127
        weight = (groups * torch.tensor([0.5, 2.0**-9, 1.0, 3.0])[:, None, None]).flatten(1)
        got = dense(device, packing.pack(device, weight, weight_format))[0].cpu()
        assert torch.equal(got, weight), weight_format


def test_small_numbers_of_e4m3_come_back(device: Device, normal: Normal) -> None:
    """All 8-bit numbers that are one, subnormal ones among them, at several scales of their blocks."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers.nan_to_num(0.0).view(2, 128)
    weight = torch.cat([numbers * scale for scale in (1.0, 2.0**-20, 2.0**6)], dim=1)
    got = dense(device, packing.pack(device, weight, "fp8"))[0].cpu()
    assert torch.equal(got, weight)


@pytest.mark.parametrize("weight_format", BLOCKED)
def test_a_stack_in_pieces_is_the_same(
    device: Device, normal: Normal, weight_format: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = normal(2, 300, 64)
    whole = packing.pack(device, weight, weight_format)
    monkeypatch.setattr(packing, "_AT_ONCE", 1)
    assert torch.equal(packing.pack(device, weight, weight_format).data, whole.data)


@pytest.mark.parametrize("weight_format", BLOCKED)
def test_pairs_are_stacks_of_halves(device: Device, normal: Normal, weight_format: WeightFormat) -> None:
    weight = normal(3, 140, 96)
    paired = packing.pack(device, weight, weight_format, paired=True)
    halves = packing.pack(device, weight.reshape(6, 70, 96), weight_format)
    assert torch.equal(paired.data, halves.data)
    assert (paired.num_matrices, paired.rows, paired.cols, paired.paired) == (3, 140, 96, True)


def test_weights_beyond_fp8_are_refused(device: Device) -> None:
    with pytest.raises(ValueError, match="a weight of 60000 is too large for fp8"):
        packing.pack(device, torch.full((2, 3), 60_000.0), "fp8")


def test_paired_rows_are_even(device: Device) -> None:
    with pytest.raises(ValueError, match="even number of rows, not 3"):
        packing.pack(device, torch.zeros(3, 32), "int8", paired=True)


def test_dense_formats_lie_as_they_come(device: Device, normal: Normal) -> None:
    weight = normal(2, 5, 7)
    matrix = packing.pack(device, weight, "bfloat16")
    assert torch.equal(matrix.data, weight.bfloat16())
    x = torch.eye(7, device=device.torch_device)
    got = linear(device, x, packing.pack(device, weight[0], "float32"))
    assert torch.equal(got, weight[0].T)


@pytest.mark.parametrize("weight_format", BLOCKED)
def test_a_matrix_is_as_small_as_its_format(device: Device, weight_format: WeightFormat) -> None:
    matrix = packing.pack(device, torch.zeros(1, 256, 512), weight_format)
    bits = {"int8": 8 + 16 / 32, "int4": 4 + 32 / 32, "fp8": 8 + 32 / 128**2}[weight_format]
    assert matrix.data.nbytes * 8 == bits * 256 * 512
