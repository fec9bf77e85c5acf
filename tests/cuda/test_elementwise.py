"""add, scale and clamp are torch's own, to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from toptwo_kernels import reference
from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.elementwise import add, clamp, scale

SHAPES = [(1, 1), (3, 341), (2, 1024), (5, 1025)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_shape
@every_dtype
def test_the_references_numbers(
    device: Device, normal: Callable[..., Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, y = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    sums, products, cut = reference.add(x, y), reference.scale(x, 0.37), reference.clamp(x, 0.51)
    assert torch.equal(add(device, x, y.clone()), sums)
    assert torch.equal(scale(device, x.clone(), 0.37), products)
    assert torch.equal(clamp(device, x.clone(), 0.51), cut)


def test_what_is_no_number_stays(device: Device) -> None:
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, -0.0]], device=device.torch_device)
    torch.testing.assert_close(clamp(device, x.clone(), 2.0), x.clamp(-2, 2), rtol=0, atol=0, equal_nan=True)
