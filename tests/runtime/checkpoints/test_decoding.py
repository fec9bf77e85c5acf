"""Decoders of quantised weights, element by element."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantized import (
    AWQ,
    FLOAT8,
    FP8,
    GPTQ,
    INT8,
    MXFP4,
    RANDOM,
    compressed,
    field,
    halves,
    read,
    words,
    write,
)
from toptwo.models.checkpoint import Piece, WeightSpec
from toptwo.runtime.checkpoints.open import open_checkpoint
from toptwo.runtime.loader import load_weights


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("groups", ["ordered", "reordered", "zeros", "none"])
def test_gptq(tmp_path: Path, bits: int, form: str, groups: str) -> None:
    per_word, rows, columns = 32 // bits, 16, 24
    order = torch.arange(columns) // 4
    g_idx = order[torch.randperm(columns, generator=RANDOM)] if groups == "reordered" else order
    qweight, qzeros = words(columns // per_word, rows), words(6, rows // per_word)
    scales = halves(6, rows)
    parts = {"m.qweight": qweight, "m.qzeros": qzeros, "m.scales": scales}
    if groups != "none":
        parts["m.g_idx"] = (g_idx if groups != "zeros" else torch.zeros(columns)).to(torch.int32)
    write(tmp_path, {**GPTQ, "bits": bits, "checkpoint_format": form}, parts)
    ones = sum(1 << bits * place for place in range(per_word)) if form == "gptq" else 0
    expected = torch.empty(rows, columns)
    for o in range(rows):
        for i in range(columns):
            q = field(qweight[i // per_word, o], i % per_word, bits)
            zero = field(qzeros[g_idx[i], o // per_word] + ones, o % per_word, bits)
            expected[o, i] = (q - zero) * float(scales[g_idx[i], o])
    assert torch.equal(read(tmp_path, "m.weight"), expected)


def test_awq(tmp_path: Path) -> None:
    qweight, qzeros, scales = words(12, 2), words(3, 2), halves(3, 16)
    write(tmp_path, AWQ, {"m.qweight": qweight, "m.qzeros": qzeros, "m.scales": scales})
    expected = torch.empty(16, 12)
    for o in range(16):
        place = (o % 8) // 2 + 4 * (o % 2)  # the even outputs first
        for i in range(12):
            q, zero = field(qweight[i, o // 8], place, 4), field(qzeros[i // 4, o // 8], place, 4)
            expected[o, i] = (q - zero) * float(scales[i // 4, o])
    assert torch.equal(read(tmp_path, "m.weight"), expected)


@pytest.mark.parametrize("outer", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_in_blocks_with_edges(tmp_path: Path, outer: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = (torch.randn(*outer, 5, 10, generator=RANDOM) * 100).to(torch.float8_e4m3fn)
    scale = (torch.rand(*outer, 3, 3, generator=RANDOM) + 0.1).to(dtype)
    write(tmp_path, FP8, {"m.weight": weight, "m.weight_scale_inv": scale})
    expected = torch.empty(*outer, 5, 10)
    for r in range(5):
        for c in range(10):
            expected[..., r, c] = weight[..., r, c].float() * scale[..., r // 2, c // 4].float()
    assert torch.equal(read(tmp_path, "m.weight"), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_with_one_scale(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, scale = torch.randn(5, 10, generator=RANDOM).to(dtype), torch.full(shape, 0.3)
    write(tmp_path, FP8, {"m.weight": weight, "m.weight_scale": scale})
    assert torch.equal(read(tmp_path, "m.weight"), weight.float() * torch.tensor(0.3))


def test_fp8_stacks_with_a_scale_for_each_expert(tmp_path: Path) -> None:
    weight = torch.randn(3, 5, 10, generator=RANDOM).to(torch.float8_e4m3fn)
    scale = torch.tensor([0.5, 1.5, 3.0])
    write(tmp_path, FP8, {"experts.gate_up_proj": weight, "experts.gate_up_proj_scale": scale})
    expected = torch.stack([weight[e].float() * scale[e] for e in range(3)])
    assert torch.equal(read(tmp_path, "experts.gate_up_proj"), expected)


def test_scales_of_activations_and_caches_are_no_tensors_of_the_model(tmp_path: Path) -> None:
    weight = torch.ones(2, 4).to(torch.float8_e4m3fn)
    extra = {name: torch.ones(1) for name in ("m.input_scale", "attn.k_scale", "attn.v_scale")}
    for config in (FP8, FLOAT8):
        write(tmp_path, config, {"m.weight": weight, "m.weight_scale": torch.ones(1), **extra})
        assert torch.equal(read(tmp_path, "m.weight"), torch.ones(2, 4))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_without_a_scale_are_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = every[every.float().isfinite()]
    for config in (None, FP8):
        write(tmp_path, config, {"m.weight": finite})
        assert torch.equal(read(tmp_path, "m.weight").float(), finite.float())


def test_mxfp4(tmp_path: Path) -> None:
    blocks = torch.randint(0, 256, (2, 3, 4, 16), dtype=torch.uint8, generator=RANDOM)
    scales = torch.randint(0, 253, (2, 3, 4), dtype=torch.uint8, generator=RANDOM)
    scales[0, 0] = torch.tensor([0, 1, 127, 252])
    write(tmp_path, MXFP4, {"m_blocks": blocks, "m_scales": scales})
    got = read(tmp_path, "m_blocks")
    assert got.shape == (2, 3, 128)
    for e, r, c in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(128)).tolist():
        code = field(blocks[e, r, c // 32, c % 32 // 2], c % 2, 4)
        magnitude = [0, 0.5, 1, 1.5, 2, 3, 4, 6][code % 8] * (-1 if code > 7 else 1)
        assert float(got[e, r, c]) == math.ldexp(magnitude, int(scales[e, r, c // 32]) - 127)


def test_mxfp4_of_more_rows_than_are_decoded_at_once(tmp_path: Path) -> None:
    blocks = torch.randint(0, 256, (9001, 1, 16), dtype=torch.uint8, generator=RANDOM)
    scales = torch.full((9001, 1), 128, dtype=torch.uint8)
    write(tmp_path, MXFP4, {"m_blocks": blocks, "m_scales": scales})
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]) * 2
    codes = torch.stack((blocks % 16, blocks // 16), -1).view(9001, 32)
    assert torch.equal(read(tmp_path, "m_blocks").float(), values[codes.long()])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("extras", ["symmetric", "zeros", "zeros, reordered"])
@pytest.mark.parametrize("outer", [(), (2,)])
def test_packed(tmp_path: Path, bits: int, groups: int, extras: str, outer: tuple[int, ...]) -> None:
    per_word, rows, columns = 32 // bits, 16, 24
    packed, zeros = words(*outer, rows, columns // per_word), words(*outer, rows // per_word, groups)
    scale = halves(*outer, rows, groups).bfloat16()
    g_idx = torch.arange(columns) // (columns // groups)
    parts = {"packed": packed, "scale": scale, "shape": torch.tensor([*outer, rows, columns])}
    if "zeros" in extras:
        parts["zero_point"] = zeros
    if "reordered" in extras:
        g_idx = g_idx[torch.randperm(columns, generator=RANDOM)]
        parts["g_idx"] = g_idx.to(torch.int32)
    config = compressed("pack-quantized", num_bits=bits, type="int")
    write(tmp_path, config, {f"m.weight_{key}": value for key, value in parts.items()})
    got = read(tmp_path, "m.weight").view(-1, rows, columns)
    packed, zeros, scale = (each.view(-1, *each.shape[-2:]) for each in (packed, zeros, scale))
    for e, o, i in torch.cartesian_prod(*(torch.arange(size) for size in got.shape)).tolist():
        g = int(g_idx[i])
        zero = field(zeros[e, o // per_word, g], o % per_word, bits) if "zeros" in extras else 2 ** (bits - 1)
        q = field(packed[e, o, i // per_word], i % per_word, bits)
        assert float(got[e, o, i]) == (q - zero) * float(scale[e, o, g])


@pytest.mark.parametrize(
    ("scale_shape", "block"),
    [((1,), (4, 6)), ((4, 1), (1, 6)), ((4,), (1, 6)), ((4, 2), (1, 3)), ((1, 1), (4, 6))],
)
@pytest.mark.parametrize("with_zeros", [False, True])
def test_int8(tmp_path: Path, scale_shape: tuple[int, ...], block: tuple[int, int], with_zeros: bool) -> None:
    weight = torch.randint(-128, 128, (4, 6), dtype=torch.int8, generator=RANDOM)
    scale = torch.rand(scale_shape, generator=RANDOM)
    zeros = torch.randint(-128, 128, scale_shape, dtype=torch.int8, generator=RANDOM)
    parts = {"m.weight": weight, "m.weight_scale": scale}
    write(tmp_path, INT8, parts | ({"m.weight_zero_point": zeros} if with_zeros else {}))
    got = read(tmp_path, "m.weight")
    grid = scale.view(4 // block[0], 6 // block[1])
    zero_grid = zeros.view(grid.shape)
    for r in range(4):
        for c in range(6):
            at = r // block[0], c // block[1]
            zero = int(zero_grid[at]) if with_zeros else 0
            assert got[r, c] == (int(weight[r, c]) - zero) * grid[at]


def test_parts_of_several_dtypes_lose_no_bit(tmp_path: Path) -> None:
    weight = torch.tensor([[1.25, 3.5]]).to(torch.float8_e4m3fn)
    plain = torch.tensor([[0.5, 2.0]]).bfloat16()
    write(tmp_path, FP8, {"a": plain, "b": weight, "b_scale": torch.tensor(1 / 3)})
    spec = WeightSpec("w", (2, 2), "matrix", ((Piece("a", (slice(0, 1),)), Piece("b", (slice(1, 2),))),))
    kept: list[Tensor] = []
    with open_checkpoint(tmp_path, [spec]) as checkpoint:
        load_weights(checkpoint, [spec], [], lambda _, tensor: kept.append(tensor))
    assert torch.equal(kept[0], torch.cat([plain.float(), weight.float() * torch.tensor(1 / 3)]))


def test_what_a_config_leaves_plain_is_plain(tmp_path: Path) -> None:
    parts = {"m.qweight": words(3, 16), "m.qzeros": words(6, 2), "m.scales": halves(6, 16)}
    write(tmp_path, GPTQ, {**parts, "gate.weight": torch.ones(4, 24).bfloat16()})
    with open_checkpoint(tmp_path, ()) as checkpoint:
        assert checkpoint.names == {"m.weight", "gate.weight"}
        assert checkpoint.tensor("gate.weight").dtype == torch.bfloat16
        checkpoint.release("gate.weight")
        assert checkpoint.tensor("gate.weight").sum() == 96
