"""Dense products against float64, and bit by bit against themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cuda_harness import assert_close
from toptwo_kernels import reference
from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.linear import FEW_TOKENS, key, linear, linear_per_head, multiply_heads
from toptwo_kernels.cuda.packing import BLOCK_INPUTS, pack
from toptwo_kernels.cuda.product import slice_inputs
from toptwo_kernels.cuda.tuning import candidates
from toptwo_kernels.ops import WeightFormat

Normal = Callable[..., Tensor]

FORMATS: tuple[WeightFormat, ...] = ("bfloat16", "float16", "float32", "int8", "int4", "fp8")
DTYPES: dict[WeightFormat, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
every_format = pytest.mark.parametrize("weight_format", FORMATS)


def stands_for(weight: Tensor, weight_format: WeightFormat) -> Tensor:
    """The float64 weight that is multiplied with."""
    return reference.pack(weight.cpu(), weight_format).data.double()


@every_format
@pytest.mark.parametrize(
    ("tokens", "rows", "cols"), [(1, 64, 64), (3, 100, 200), (17, 130, 256), (70, 65, 90)]
)
def test_a_product(
    device: Device, normal: Normal, weight_format: WeightFormat, tokens: int, rows: int, cols: int
) -> None:
    dtype = DTYPES.get(weight_format, torch.bfloat16)
    x, weight, bias = normal(tokens, cols, dtype=dtype), normal(rows, cols), normal(rows)
    matrix = pack(device, weight, weight_format)
    expected = x.cpu().double() @ stands_for(weight, weight_format)[0].T
    assert_close(linear(device, x, matrix), expected, LIMITS[dtype])
    with_bias = linear(device, x, matrix, bias)
    assert with_bias.dtype == dtype
    assert_close(with_bias, expected + bias.cpu().double(), LIMITS[dtype])


@every_format
def test_large_products(device: Device, normal: Normal, weight_format: WeightFormat) -> None:
    if device.interpreted:
        tokens, rows, cols = 33, 192, 320
    else:
        tokens, rows, cols = 1000, 1500, 2880
    dtype = DTYPES.get(weight_format, torch.bfloat16)
    x, weight = normal(tokens, cols, dtype=dtype), normal(rows, cols)
    expected = x.cpu().double() @ stands_for(weight, weight_format)[0].T
    assert_close(linear(device, x, pack(device, weight, weight_format)), expected, LIMITS[dtype])


@every_format
def test_a_row_is_the_same_among_any_others(
    device: Device, normal: Normal, weight_format: WeightFormat
) -> None:
    dtype = DTYPES.get(weight_format, torch.bfloat16)
    counts = (33,) if device.interpreted else (2, 17, 33, 100, 300, 1100)
    matrix = pack(device, normal(130, 320), weight_format)
    x = normal(max(counts), 320, dtype=dtype)
    alone = linear(device, x[:1], matrix)
    for count in counts:
        together = linear(device, x[:count], matrix)
        assert torch.equal(together[:1], alone), count
        assert torch.equal(linear(device, x[count - 1 : count], matrix), together[-1:]), count


@pytest.mark.parametrize("weight_format", BLOCK_INPUTS)
@pytest.mark.parametrize("cols", [2048, 3100])
def test_slices_are_added_in_order(
    device: Device, normal: Normal, weight_format: WeightFormat, cols: int
) -> None:
    """A program for each slice, or one for all of them."""
    weight, bias = normal(70, cols), normal(70)
    matrix = pack(device, weight, weight_format)
    assert 1 < -(-cols // slice_inputs(matrix)) <= 4
    x = normal(FEW_TOKENS + 1, cols, dtype=torch.bfloat16)
    together = linear(device, x, matrix, bias)
    for chosen in (slice(0, 1), slice(3, 20)):
        assert torch.equal(linear(device, x[chosen], matrix, bias), together[chosen])
    expected = x.cpu().double() @ stands_for(weight, weight_format)[0].T + bias.cpu().double()
    assert_close(together, expected, 2e-2)


@every_format
def test_every_configuration_has_the_same_bits(
    device: Device, normal: Normal, weight_format: WeightFormat
) -> None:
    tokens = (16,) if device.interpreted else (16, 64, 128, 1024)
    dtype = DTYPES.get(weight_format, torch.bfloat16)
    matrix = pack(device, normal(200, 640), weight_format)
    x = normal(40, 640, dtype=dtype)
    usual = device.tuner.choose(key(matrix, len(x)))
    expected = multiply_heads(device, x, matrix, None, usual)
    for count in tokens:
        for config in candidates(key(matrix, count)):
            if device.interpreted:  # which adds up a block of inputs by itself
                config = replace(config, block_cols=usual.block_cols)
            assert torch.equal(multiply_heads(device, x, matrix, None, config), expected), config


@pytest.mark.parametrize("weight_format", ["bfloat16", "int8", "fp8"])
@pytest.mark.parametrize("rest", [0, 24])
def test_heads_have_matrices_of_their_own(
    device: Device, normal: Normal, weight_format: WeightFormat, rest: int
) -> None:
    heads, rows, cols, tokens = 3, 72, 64, 19
    x = normal(tokens, heads * (cols + rest), dtype=torch.bfloat16)
    weight = normal(heads, rows, cols)
    got = linear_per_head(device, x, pack(device, weight, weight_format)).view(tokens, heads, rows + rest)
    inputs = x.view(tokens, heads, cols + rest)
    products = torch.einsum(
        "tni,noi->tno", inputs[..., :cols].cpu().double(), stands_for(weight, weight_format)
    )
    assert_close(got[..., :rows], products, 2e-2)
    assert torch.equal(got[..., rows:], inputs[..., cols:])
