"""Dense products of both backends: biases, and a matrix for every head."""

from __future__ import annotations

import pytest
import torch

from native import normal
from toptwo_kernels.ops import Ops


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (16, 32), (67, 100)], ids=str)
def test_a_bias_is_added(ops: Ops, shape: tuple[int, int]) -> None:
    weight, bias = normal(*shape), normal(shape[0], seed=1)
    for num_tokens in (1, 2, 5, 40):
        x = normal(num_tokens, shape[1], seed=2)
        expected = x.double() @ weight.double().T + bias
        got = ops.linear(x, ops.pack(weight, "float32"), bias)
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rest", [0, 1, 8, 13])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 13, 33), (4, 70, 16)], ids=str)
def test_every_head_has_its_matrix(ops: Ops, shape: tuple[int, int, int], rest: int) -> None:
    """And what a head has behind that matrix's inputs is passed on, to the last bit."""
    heads, rows, cols = shape
    weight = normal(*shape)
    matrix = ops.pack(weight, "float32")
    for num_tokens in (1, 2, 5, 40):
        x = normal(num_tokens, heads * (cols + rest), seed=1)
        got = ops.linear_per_head(x, matrix).unflatten(1, (heads, rows + rest))
        heads_TNX = x.unflatten(1, (heads, cols + rest))
        for head in range(heads):
            expected = heads_TNX[:, head, :cols].double() @ weight[head].double().T
            torch.testing.assert_close(got[:, head, :rows].double(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(got[..., rows:], heads_TNX[..., cols:])
