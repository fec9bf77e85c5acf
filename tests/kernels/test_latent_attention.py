"""Attention over latent vectors against attention over the keys and values that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from native import PagedAttention, normal, rope_tables
from toptwo_kernels.ops import AttentionSpec, HeadShape, LatentShape, LatentSpec, Ops

SHAPES = [LatentShape(1, 8, 8), LatentShape(3, 24, 16), LatentShape(16, 64, 8), LatentShape(20, 32, 32)]
LENGTHS = [40, 21, 70]
# Rows of (sequence, tokens): prompts, chunks, decoding, all in company.
STEPS = [
    [(0, 17)],
    [(2, 33), (0, 1), (1, 20)],
    [(1, 1), (0, 1), (2, 1)],
    [(0, 20), (2, 16)],
    [(2, 20), (0, 1)],
]


def paged(ops: Ops, spec: LatentSpec, turned: int, dtype: torch.dtype = torch.float32) -> PagedAttention:
    return PagedAttention(ops, spec, LENGTHS, rope_tables(max(LENGTHS), turned), dtype=dtype)


def turn_end(x_LND: Tensor, start: int, turned: int) -> Tensor:
    """Of the dimensions from `start` on, the first ones turned by their definition, in float64."""
    first, second = x_LND[..., start : start + turned].double().chunk(2, -1)
    angles = torch.outer(
        torch.arange(len(x_LND)), 10_000.0 ** -(torch.arange(0, turned, 2).double() / turned)
    )
    pairs = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    rest = x_LND[..., start + turned :].double()
    return torch.cat((x_LND[..., :start].double(), pairs.real, pairs.imag, rest), -1)


def define(inputs_LX: Tensor, spec: LatentSpec, turned: int, dtype: torch.dtype) -> Tensor:
    """Every token of a sequence: plain causal attention with one key and one value for all heads."""
    shape, length = spec.shape, len(inputs_LX)
    heads = turn_end(inputs_LX.unflatten(1, (shape.num_heads + 1, shape.kv_size)), shape.latent_dim, turned)
    q, k = heads[:, :-1].transpose(0, 1), heads[:, -1].to(dtype).double()
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    scores = (q @ k.T * spec.scale).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ k[:, : shape.latent_dim]).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_definition(ops: Ops, shape: LatentShape, dtype: torch.dtype) -> None:
    spec = LatentSpec(shape, 0.3)
    got = paged(ops, spec, shape.rope_dim, dtype)
    for step in STEPS:
        got.step(step)
    # A key that lies between two numbers may be rounded either way.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for index, sequence in enumerate(got.sequences):
        expected = define(sequence.inputs_LX, spec, shape.rope_dim, dtype)
        torch.testing.assert_close(got.result(index).double(), expected, atol=tolerance, rtol=0)


def test_a_part_of_the_key_may_turn_alone(ops: Ops) -> None:
    spec = LatentSpec(LatentShape(2, 16, 24), 0.3)
    got = paged(ops, spec, 10)
    got.step([(0, 40)])
    expected = define(got.sequences[0].inputs_LX, spec, 10, torch.float32)
    torch.testing.assert_close(got.result().double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_heads", [1, 5, 16])
def test_it_is_attention_over_the_keys_and_values_that_latents_stand_for(ops: Ops, num_heads: int) -> None:
    """A head's own keys and values are products with the latent vector; taken into its query and behind its
    result, those products need not be made (arXiv 2405.04434, 2.1.2)."""
    latent, turned, nope = 24, 8, 16
    dim, length = nope + turned, max(LENGTHS)
    up_k, up_v = normal(num_heads, nope, latent, seed=1) / 5, normal(num_heads, dim, latent, seed=2) / 5
    q_LND, kv_L = normal(length, num_heads, dim, seed=3), normal(length, latent + turned, seed=4)

    absorbed = torch.einsum("lnd,ndc->lnc", q_LND[..., :nope], up_k)
    inputs = torch.cat((torch.cat((absorbed, q_LND[..., nope:]), -1).flatten(1), kv_L), 1)
    spec = LatentSpec(LatentShape(num_heads, latent, turned), dim**-0.5)
    latents = paged(ops, spec, turned)
    latents.sequences[2].inputs_LX.copy_(inputs)

    # What turns comes first in a head; the other dimensions do not.
    k = torch.einsum("lc,ndc->lnd", kv_L[:, :latent], up_k)
    k = torch.cat((kv_L[:, None, latent:].expand(-1, num_heads, -1), k), -1)
    v = torch.einsum("lc,ndc->lnd", kv_L[:, :latent], up_v)
    q = torch.cat((q_LND[..., nope:], q_LND[..., :nope]), -1)
    heads = AttentionSpec(HeadShape(num_heads, num_heads, dim), dim**-0.5)
    plain = PagedAttention(ops, heads, LENGTHS, rope_tables(length, turned))
    plain.sequences[2].inputs_LX.copy_(torch.cat((q, k, v), 1).flatten(1))

    for each in (latents, plain):
        for step in ([(2, 33)], [(2, 1), (0, 5)], [(2, 36)]):
            each.step(step)
    got = torch.einsum("lnc,ndc->lnd", latents.result(2).unflatten(1, (num_heads, latent)), up_v)
    torch.testing.assert_close(got.flatten(1), plain.result(2), atol=1e-5, rtol=1e-5)
