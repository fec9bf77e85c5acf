"""Normalisation against its definition in float64, and bit by bit against itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cuda_harness import assert_close
from toptwo_kernels import reference
from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.norm import layer_norm, norm_slices, rms_norm

Normal = Callable[..., Tensor]

WIDTHS = [1, 7, 64, 300, 4096, 6144, 16384]
# What was normalised, the weight and their product are each rounded to the nearest in these dtypes.
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 3 * 2**-8, torch.float16: 3 * 2**-11}

every_width = pytest.mark.parametrize("width", WIDTHS)
every_dtype = pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)


def define_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@every_width
@every_dtype
def test_rms_norm(device: Device, normal: Normal, width: int, dtype: torch.dtype) -> None:
    x, weight = normal(3, width, dtype=dtype), normal(width)
    out = rms_norm(device, x, weight, 1e-5)
    assert out.dtype == dtype
    assert_close(out, define_rms_norm(x, weight, 1e-5), ROUNDING[dtype])
    if dtype != torch.float32:
        # What is rounded when is the reference's: all but a few numbers, rounded elsewhere, agree to the bit.
        assert (out != reference.rms_norm(x, weight, 1e-5)).sum() <= 1 + out.numel() // 50


@every_width
@every_dtype
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm(device: Device, normal: Normal, width: int, dtype: torch.dtype, biased: bool) -> None:
    x, weight, bias = 3 + normal(3, width, dtype=dtype), normal(width), normal(width) if biased else None
    out = layer_norm(device, x, weight, 1e-5, bias)
    assert out.dtype == dtype
    expected = torch.nn.functional.layer_norm(
        x.double(), (width,), weight.double(), None if bias is None else bias.double(), 1e-5
    )
    # A row of one number is its own mean: nothing is left but the bias.
    assert_close(out, expected, ROUNDING[dtype])


@every_dtype
@pytest.mark.parametrize(
    ("width", "first", "count", "behind"), [(16, 0, 3, 0), (24, 8, 2, 5), (128, 1, 1, 0)]
)
def test_norm_slices(
    device: Device, normal: Normal, dtype: torch.dtype, width: int, first: int, count: int, behind: int
) -> None:
    x, weight = normal(4, first + count * width + behind, dtype=dtype), normal(width)
    expected = x.double()
    for start in range(first, first + count * width, width):
        expected[:, start : start + width] = define_rms_norm(x[:, start : start + width], weight, 1e-6)
    out = norm_slices(device, x.clone(), weight, 1e-6, first, count)
    assert_close(out, expected, ROUNDING[dtype])
    outside = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    outside[first : first + count * width] = False
    assert torch.equal(out[:, outside], x[:, outside])


@every_width
def test_a_row_does_not_know_the_others(device: Device, normal: Normal, width: int) -> None:
    x, weight = normal(5, width, dtype=torch.bfloat16), normal(width)
    for norm in (rms_norm, layer_norm):
        whole = norm(device, x, weight, 1e-5)
        for row in range(5):
            assert torch.equal(whole[row : row + 1], norm(device, x[row : row + 1].clone(), weight, 1e-5))
