"""Packed numbers: what a checkpoint decodes is what they mean, whatever the format and the size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Format
from numpy.typing import NDArray

from gguf_files.loading import load, stand_for
from llama_cpp import Options, write_gguf
from tiny import FAMILIES
from toptwo.errors import CheckpointError
from toptwo.gguf.numbers import DECODED, split_halves
from toptwo.runtime.checkpoints import gguf as checkpoint_module
from toptwo.runtime.checkpoints.gguf import GgufCheckpoint

PACKED = sorted(DECODED - {Format.F32, Format.F16, Format.BF16})


def write_header(path: Path) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(1)
    return writer


def write(path: Path, tensors: dict[str, tuple[NDArray[Any], Format]]) -> Path:
    writer = write_header(path)
    for name, (packed, kind) in tensors.items():
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind: Format, *shape: int) -> NDArray[np.uint8]:
    """Rows of any bytes but for scales, which are small and finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    values = gguf.dequantize(blocks.reshape(*shape[:-1], -1), kind).reshape(*shape[:-1], -1, block)
    bad = ~(np.abs(values) < 1000).all(-1)
    blocks[bad] = 0
    assert not bad.all()
    return blocks.reshape(*shape[:-1], -1)


@pytest.mark.filterwarnings("ignore:.*(overflow|invalid value).*:RuntimeWarning")
@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name)
def test_every_format_is_decoded(kind: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "ELEMENTS_AT_ONCE", 600)  # so that rows are decoded in turns
    matrix, experts = random_blocks(kind, 5, 512), random_blocks(kind, 3, 4, 256)
    tensors = {"a.weight": (matrix, kind), "b.weight": (experts, kind)}
    path = write(tmp_path / "a.gguf", tensors)
    with GgufCheckpoint(path, [path], []) as checkpoint:
        assert checkpoint.shape("a.weight") == (5, 512)
        assert checkpoint.shape("b.weight") == (3, 4, 256)
        exact = torch.from_numpy(gguf.dequantize(matrix, kind))
        assert torch.equal(checkpoint.tensor("a.weight").float(), exact)
        stack = torch.from_numpy(gguf.dequantize(experts, kind))
        found = checkpoint.tensor("b.weight")
        assert found.dtype == (torch.bfloat16 if kind is Format.MXFP4 else torch.float16)
        assert torch.equal(found, stack.to(found.dtype))
        if kind is Format.MXFP4:
            assert torch.equal(found.float(), stack)


@pytest.mark.parametrize("kind", [Format.F32, Format.F16, Format.BF16], ids=lambda kind: kind.name)
def test_numbers_that_are_not_packed_are_not_copied(kind: Format, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((2, 3, 32), np.float32)
    path = write(tmp_path / "a.gguf", {"a.weight": (gguf.quantize(values, kind), kind)})
    with GgufCheckpoint(path, [path], []) as checkpoint:
        one, two = checkpoint.tensor("a.weight"), checkpoint.tensor("a.weight")
        assert one.data_ptr() == two.data_ptr()
        assert torch.equal(one.float(), torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind)))
        checkpoint.release("a.weight")
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", [Format.I32, Format.Q8_K, Format.NVFP4], ids=lambda kind: kind.name)
def test_other_formats_are_refused_by_name(kind: Format, tmp_path: Path) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    packed = np.zeros((2, 256 // block * size), np.uint8)
    path = write(tmp_path / "a.gguf", {"a.weight": (packed, kind)})
    with (
        GgufCheckpoint(path, [path], []) as checkpoint,
        pytest.raises(CheckpointError, match=rf"a\.gguf: a\.weight is {kind.name}, which cannot be decoded"),
    ):
        checkpoint.shape("a.weight")


def test_numbers_beyond_all_bounds_are_damage(tmp_path: Path) -> None:
    packed = gguf.quantize(np.ones((2, 64), np.float32), Format.Q8_0)
    packed[1, :2] = 0xFF  # the scale of a block
    path = write(tmp_path / "a.gguf", {"a.weight": (packed, Format.Q8_0)})
    with (
        GgufCheckpoint(path, [path], []) as checkpoint,
        pytest.raises(CheckpointError, match=r"a\.gguf: a\.weight holds numbers that are not finite"),
    ):
        checkpoint.tensor("a.weight")


@pytest.mark.parametrize("kind", [Format.Q8_0, Format.Q4_0, Format.Q4_1, Format.Q5_0, Format.Q5_1])
def test_a_quantised_model_is_the_dense_one_that_it_means(kind: Format, tmp_path: Path) -> None:
    """Names, the order of rows and decoding together; written by llama.cpp's conventions."""
    (original := tmp_path / "original").mkdir()
    FAMILIES["mixtral"].write(original)
    write_gguf(original, tmp_path / "a.gguf", Options(kind=lambda *_: kind))
    (_, dense), (_, found) = load(original), load(stand_for(tmp_path / "a.gguf"))
    assert found.keys() == dense.keys()
    for name, weight in dense.items():
        if weight.dim() > 1 and not name.endswith("router"):
            packed = gguf.quantize(weight.float().numpy(), kind)
            weight = torch.from_numpy(gguf.dequantize(packed, kind)).to(found[name].dtype)
        assert torch.equal(found[name], weight), name


def test_split_halves_sends_even_rows_first() -> None:
    rows = np.arange(8, dtype=np.float32)
    for weight in (rows, rows[:, None], torch.from_numpy(rows), torch.from_numpy(rows)[:, None]):
        assert split_halves(weight, num_heads=2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_queries_that_are_no_heads_are_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(1)
    writer.add_head_count(5)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = tmp_path / "a.gguf"
    with (
        GgufCheckpoint(path, [path], []) as checkpoint,
        pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight has 8 rows, which are not 5 heads"),
    ):
        checkpoint.tensor("blk.0.attn_q.weight")
