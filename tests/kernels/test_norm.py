"""Norms, and what is done to single numbers, against torch's own functions."""

from __future__ import annotations

import pytest
import torch

from native import normal
from toptwo_kernels.ops import Ops

SIZES = [1, 7, 16, 20, 61, 203]


@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(ops: Ops, size: int) -> None:
    x, weight = normal(4, size), normal(size, seed=1)
    expected = torch.nn.functional.rms_norm(x, (size,), weight, 1e-5)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm(ops: Ops, size: int, biased: bool) -> None:
    x, weight = normal(4, size) + 3, normal(size, seed=1)
    bias = normal(size, seed=2) if biased else None
    given = x.double(), (size,), weight.double(), bias.double() if biased else None
    expected = torch.nn.functional.layer_norm(*given, eps=1e-5)
    got = ops.layer_norm(x, weight, 1e-5, bias)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("columns", "width", "first", "count"), [(16, 8, 0, 2), (61, 7, 3, 5), (40, 16, 8, 1), (24, 5, 4, 4)]
)
def test_norm_slices(ops: Ops, columns: int, width: int, first: int, count: int) -> None:
    x, weight = normal(9, columns), normal(width, seed=1)
    slices = x[:, first : first + count * width].unflatten(1, (count, width))
    normed = torch.nn.functional.rms_norm(slices, (width,), weight, 1e-5)
    expected = torch.cat((x[:, :first], normed.flatten(1), x[:, first + count * width :]), 1)
    got = ops.norm_slices(x.clone(), weight, 1e-5, first, count)
    torch.testing.assert_close(got, expected)
    beside = [*range(first), *range(first + count * width, columns)]
    assert torch.equal(got[:, beside], x[:, beside])


@pytest.mark.parametrize("size", SIZES)
def test_add_scale_and_clamp(ops: Ops, size: int) -> None:
    x, y = normal(13, size), normal(13, size, seed=1)
    assert torch.equal(ops.add(x.clone(), y.clone()), x + y)
    assert torch.equal(ops.scale(x.clone(), -0.3), x * -0.3)
    assert torch.equal(ops.clamp(x.clone(), 0.7), x.clamp(-0.7, 0.7))


def test_clamp_keeps_what_is_no_number(ops: Ops) -> None:
    """A row of nonsense must stay one, so that the sampler can refuse it."""
    x = torch.zeros(2, 19)
    x[0, [3, 17]], x[1, [3, 17]] = torch.nan, torch.inf
    got = ops.clamp(x, 5.0)
    assert got[0].isnan().nonzero().flatten().tolist() == [3, 17]
    assert got[1, [3, 17]].tolist() == [5.0, 5.0]
