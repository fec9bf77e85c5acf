"""Attention over latent vectors: against its definition, and bit by bit against itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from cuda_harness import assert_close
from cuda_paged import Paged, lengths, short_splits, steps
from toptwo_kernels.ops import LatentShape, LatentSpec

if TYPE_CHECKING:
    from toptwo_kernels.cuda.device import Device

__all__ = ["short_splits"]

Normal = Callable[..., Tensor]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
pytestmark = pytest.mark.usefixtures("short_splits")


def attended(device: Device, normal: Normal, spec: LatentSpec, **options: Any) -> Paged:
    got = Paged(device, normal, spec, lengths(device), **options)
    for step in steps(device):
        got.step(step)
    return got


def check(got: Paged, relative: float) -> None:
    for index, sequence in enumerate(got.sequences):
        assert_close(sequence.result(), got.expected(index), relative)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape", [LatentShape(1, 8, 8), LatentShape(3, 24, 16), LatentShape(16, 128, 32)], ids=str
)
def test_the_definition(device: Device, normal: Normal, shape: LatentShape, dtype: torch.dtype) -> None:
    spec = LatentSpec(shape, shape.kv_size**-0.5)
    check(attended(device, normal, spec, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_heads", [16, 128])
def test_the_shape_of_deepseek(device: Device, normal: Normal, num_heads: int, dtype: torch.dtype) -> None:
    """More heads and more columns than a tile has."""
    got = Paged(device, normal, LatentSpec(LatentShape(num_heads, 512, 64), 0.05), [40], dtype=dtype)
    for count in (18, 1, 2):
        got.step([(0, count)])
    check(got, TOLERANCE[dtype])


def test_a_part_of_the_key_may_turn_alone(device: Device, normal: Normal) -> None:
    got = Paged(device, normal, LatentSpec(LatentShape(2, 16, 24), 0.3), [40], turned=10)
    got.step([(0, 39)])
    got.step([(0, 1)])
    check(got, 1e-5)


def test_a_cache_of_eight_bits(device: Device, normal: Normal) -> None:
    spec = LatentSpec(LatentShape(4, 32, 16), 0.15)
    got = attended(device, normal, spec, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn)
    check(got, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("latent", [32, 256])
def test_company_and_chunks_change_no_bit(
    device: Device, normal: Normal, dtype: torch.dtype, latent: int
) -> None:
    spec = LatentSpec(LatentShape(4, latent, 16), 0.1)
    mixed = attended(device, normal, spec, dtype=dtype)
    whole = Paged(device, normal, spec, lengths(device), dtype=dtype, inputs=mixed.inputs)
    for index, sequence in enumerate(mixed.sequences):
        whole.step([(index, sequence.num_done)])
        assert torch.equal(sequence.result(), whole.sequences[index].result())


def test_padding_rows(device: Device, normal: Normal) -> None:
    spec = LatentSpec(LatentShape(4, 32, 16), 0.15)
    plain = Paged(device, normal, spec, [70, 20])
    padded = Paged(device, normal, spec, [70, 20], inputs=plain.inputs)
    for paged in (plain, padded):
        paged.step([(0, 65), (1, 18)])
    plain.step([(1, 1), (0, 1)])
    assert not padded.step([(1, 1), (0, 1)], room=4).any()
    for one, other in zip(plain.sequences, padded.sequences, strict=True):
        assert torch.equal(one.result(), other.result())
