"""Attention over the paged cache: against its definition, and bit by bit against itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from cuda_harness import assert_close
from cuda_paged import Paged, lengths, short_splits, steps
from toptwo_kernels.ops import AttentionSpec, HeadShape

if TYPE_CHECKING:
    from toptwo_kernels.cuda.device import Device

__all__ = ["short_splits"]

Normal = Callable[..., Tensor]

SHAPE = HeadShape(6, 2, 32)
SPEC = AttentionSpec(SHAPE, 0.3)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def attended(device: Device, normal: Normal, spec: AttentionSpec, **options: Any) -> Paged:
    got = Paged(device, normal, spec, lengths(device), **options)
    for step in steps(device):
        got.step(step)
    return got


def check(got: Paged, relative: float) -> None:
    for index, sequence in enumerate(got.sequences):
        assert_close(sequence.result(), got.expected(index), relative)


pytestmark = pytest.mark.usefixtures("short_splits")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape",
    [HeadShape(2, 2, 32), HeadShape(3, 1, 64), HeadShape(4, 1, 80), HeadShape(8, 1, 128), HeadShape(6, 2, 8)],
    ids=str,
)
def test_the_definition(device: Device, normal: Normal, shape: HeadShape, dtype: torch.dtype) -> None:
    spec = AttentionSpec(shape, shape.head_dim**-0.5)
    check(attended(device, normal, spec, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), [(130, 1, 16), (3, 1, 256)])
def test_shapes_beyond_a_tile(
    device: Device, normal: Normal, num_heads: int, num_kv_heads: int, dim: int
) -> None:
    got = Paged(device, normal, AttentionSpec(HeadShape(num_heads, num_kv_heads, dim), 0.2), [50])
    for count in (9, 1, 6):
        got.step([(0, count)])
    check(got, 1e-5)


@pytest.mark.parametrize("window", [1, 16, 33, 64, 65, 257, 1000])
def test_a_window(device: Device, normal: Normal, window: int) -> None:
    check(attended(device, normal, replace(SPEC, window=window)), 1e-5)


@pytest.mark.parametrize("soft_cap", [0.1, 2.0, 50.0])
def test_a_soft_cap(device: Device, normal: Normal, soft_cap: float) -> None:
    check(attended(device, normal, replace(SPEC, scale=2.0, soft_cap=soft_cap)), 1e-5)


@pytest.mark.parametrize("window", [None, 70])
def test_sinks(device: Device, normal: Normal, window: int | None) -> None:
    sinks_N = torch.tensor([0.5, -3.0, 40.0, 0.0, -torch.inf, 1.5], device=device.torch_device)
    spec = AttentionSpec(SHAPE, 1.0, window, soft_cap=1.5, sinks_N=sinks_N)
    check(attended(device, normal, spec), 1e-5)
    check(attended(device, normal, replace(SPEC, sinks_N=sinks_N)), 1e-5)


@pytest.mark.parametrize(("dim", "turned"), [(32, 8), (40, 20), (64, 2)])
def test_the_first_dimensions_turn_alone(device: Device, normal: Normal, dim: int, turned: int) -> None:
    check(attended(device, normal, AttentionSpec(HeadShape(2, 1, dim), 0.3), turned=turned), 1e-5)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_of_fewer_bits(
    device: Device, normal: Normal, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    got = attended(device, normal, SPEC, dtype=dtype, kv_dtype=kv_dtype)
    check(got, 0.1 if kv_dtype == torch.float8_e4m3fn else 2e-2)


def bits(paged: Paged) -> list[Tensor]:
    return [sequence.result().view(torch.uint8) for sequence in paged.sequences]


def same(one: Paged, other: Paged) -> None:
    for index, (a, b) in enumerate(zip(bits(one), bits(other), strict=True)):
        off = (one.sequences[index].result() != other.sequences[index].result()).any(1)
        assert torch.equal(a, b), f"tokens {off.nonzero().flatten().tolist()[:20]} of sequence {index}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 70])
def test_company_and_chunks_change_no_bit(
    device: Device, normal: Normal, dtype: torch.dtype, window: int | None
) -> None:
    """A token's result is the same in a prompt, in a chunk of it, decoded alone, and among others."""
    spec = replace(SPEC, shape=HeadShape(4, 1, 64), window=window)
    mixed = attended(device, normal, spec, dtype=dtype)
    whole = Paged(device, normal, spec, lengths(device), dtype=dtype, inputs=mixed.inputs)
    for index, sequence in enumerate(mixed.sequences):
        whole.step([(index, sequence.num_done)])
    same(mixed, whole)
    decoded = Paged(device, normal, spec, lengths(device), dtype=dtype, inputs=mixed.inputs)
    for index, sequence in enumerate(mixed.sequences):
        decoded.step([(index, sequence.num_done - 5)])
        for _ in range(5):
            decoded.step([(index, 1)])
    same(mixed, decoded)


def test_padding_rows(device: Device, normal: Normal) -> None:
    """They change nothing in the cache or in other rows, and get zeros."""
    plain = Paged(device, normal, SPEC, lengths(device))
    padded = Paged(device, normal, SPEC, lengths(device), inputs=plain.inputs)
    for paged in (plain, padded):
        paged.step([(0, 70), (1, 15), (2, 64)])
    for rows in ([(2, 1), (0, 1), (1, 1)], [(0, 1)]):
        plain.step(rows)
        assert not padded.step(rows, room=8).any()
    same(plain, padded)
    check(padded, 1e-5)
