"""Quantised weights that lack a part, whose parts do not fit together, or that are not supported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantized import AWQ, FP8, GPTQ, INT8, MXFP4, PACKED, compressed, halves, read, words, write
from toptwo.errors import CheckpointError
from toptwo.runtime.checkpoints.open import open_checkpoint

GOOD_GPTQ = {"m.qweight": words(3, 16), "m.qzeros": words(6, 2), "m.scales": halves(6, 16)}
GOOD_AWQ = {"m.qweight": words(12, 2), "m.qzeros": words(3, 2), "m.scales": halves(3, 16)}
GOOD_PACKED = {
    "m.weight_packed": words(16, 3),
    "m.weight_scale": halves(16, 3),
    "m.weight_shape": torch.tensor([16, 24]),
}
GOOD_FP8 = {"m.weight": torch.ones(5, 10).to(torch.float8_e4m3fn), "m.weight_scale_inv": torch.ones(3, 3)}
GOOD_INT8 = {"m.weight": torch.ones(5, 10, dtype=torch.int8), "m.weight_scale": torch.ones(5, 1)}
GOOD_MXFP4 = {
    "m_blocks": torch.zeros(2, 3, 16, dtype=torch.uint8),
    "m_scales": torch.zeros(2, 3, dtype=torch.uint8),
}


@pytest.mark.parametrize(
    ("config", "parts", "change", "words_of_error"),
    [
        (GPTQ, GOOD_GPTQ, {"m.scales": None}, "misses m.scales"),
        (GPTQ, GOOD_GPTQ, {"m.qzeros": None}, "misses m.qzeros"),
        (GPTQ, GOOD_GPTQ, {"m.qweight": torch.ones(3, 16)}, "m.qweight is F32, expected I32"),
        (GPTQ, GOOD_GPTQ, {"m.qweight": words(3, 8)}, r"m.qweight has shape \[3, 8\], expected \[any, 16\]"),
        (GPTQ, GOOD_GPTQ, {"m.qweight": words(48)}, r"m.qweight has shape \[48\], expected \[any, 16\]"),
        (GPTQ, GOOD_GPTQ, {"m.qweight": words(0, 16)}, r"m.qweight has shape \[0, 16\]"),
        (GPTQ, GOOD_GPTQ, {"m.qzeros": words(6, 3)}, r"m.qzeros has shape \[6, 3\], not 4 or 8 bits of 16"),
        (GPTQ, GOOD_GPTQ, {"m.qzeros": words(5, 2)}, r"m.qzeros has shape \[5, 2\], expected \[6, any\]"),
        (GPTQ, GOOD_GPTQ, {"m.qweight": words(5, 16)}, "m.scales has 6 groups, into which 40 inputs do not"),
        (GPTQ, GOOD_GPTQ, {"m.g_idx": words(3)}, r"m.g_idx has shape \[3\], expected \[24\]"),
        (
            GPTQ,
            GOOD_GPTQ,
            {"m.g_idx": torch.arange(24, dtype=torch.int32)},
            "m.weight cannot be decoded: g_idx names groups 0 to 23, and there are 6",
        ),
        (
            GPTQ,
            GOOD_GPTQ,
            {"m.g_idx": torch.arange(24, dtype=torch.int32) - 1},
            "m.weight cannot be decoded: g_idx names groups -1 to 22",
        ),
        (GPTQ, GOOD_GPTQ, {"m.weight": torch.ones(16, 24)}, "m.weight is also there as m.qweight, m.qzeros"),
        (AWQ, GOOD_AWQ, {"m.qzeros": None}, "misses m.qzeros"),
        (AWQ, GOOD_AWQ, {"m.scales": halves(3, 8)}, r"m.scales has shape \[3, 8\], expected \[3, 16\]"),
        (AWQ, GOOD_AWQ, {"m.qweight": words(13, 2)}, "m.qweight has 13 inputs, which are not 3 groups"),
        (PACKED, GOOD_PACKED, {"m.weight_shape": None}, "misses m.weight_shape"),
        (PACKED, GOOD_PACKED, {"m.weight_scale": None}, "misses m.weight_scale"),
        (
            PACKED,
            GOOD_PACKED,
            {"m.weight_scale": halves(16, 5)},
            "m.weight_scale has 5 groups, into which 24",
        ),
        (
            PACKED,
            GOOD_PACKED,
            {"m.weight_shape": torch.tensor([16, 20])},
            r"m.weight cannot be decoded: weight_shape is \[16, 20\], and \[16, 24\] are packed",
        ),
        (
            PACKED,
            GOOD_PACKED,
            {"m.weight_zero_point": words(16, 3)},
            r"m.weight_zero_point has shape \[16, 3\]",
        ),
        (
            FP8,
            GOOD_FP8,
            {"m.weight_scale_inv": torch.ones(3, 2)},
            r"scale_inv has shape \[3, 2\], which cannot",
        ),
        (FP8, GOOD_FP8, {"m.weight": torch.ones(5, 10)}, "m.weight is F32, expected F8_E4M3 or F8_E5M2"),
        (FP8, GOOD_FP8, {"m.weight_scale_inv": words(3, 3)}, "m.weight_scale_inv is I32, expected F32"),
        (
            INT8,
            GOOD_INT8,
            {"m.weight_scale": torch.ones(3)},
            r"\[3\], which cannot",
        ),
        (MXFP4, GOOD_MXFP4, {"m_scales": None}, "misses m_scales"),
        (MXFP4, GOOD_MXFP4, {"m_blocks": torch.zeros(2, 3, 8, dtype=torch.uint8)}, r"m_blocks has shape"),
        (MXFP4, GOOD_MXFP4, {"m_scales": torch.zeros(3, 2, dtype=torch.uint8)}, r"expected \[2, 3\]"),
    ],
)
def test_parts_that_lack_or_do_not_fit_are_named(
    tmp_path: Path,
    config: Mapping[str, Any],
    parts: Mapping[str, Tensor],
    change: Mapping[str, Tensor | None],
    words_of_error: str,
) -> None:
    name = "m_blocks" if config is MXFP4 else "m.weight"
    write(tmp_path, config, parts)
    read(tmp_path, name)
    write(tmp_path, config, {k: v for k, v in {**parts, **change}.items() if v is not None})
    with pytest.raises(CheckpointError, match=words_of_error) as caught:
        read(tmp_path, name)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words_of_error"),
    [
        ({}, "quant_method must be a text, not null"),
        ([], "quantization_config must be an object"),
        (
            {"quant_method": "bitsandbytes"},
            "'bitsandbytes' is not supported; there is awq, compressed-tensors",
        ),
        ({"quant_method": "hqq"}, "'hqq' is not supported"),
        ({**AWQ, "bits": 8}, "bits 8 is not supported, only 4"),
        ({**AWQ, "version": "gemv"}, "version 'gemv' is not supported"),
        ({**AWQ, "zero_point": False}, "zero_point False is not supported"),
        ({**GPTQ, "bits": 3}, "bits 3 is not supported, only 4 or 8"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        ({**GPTQ, "group_size": "many"}, "group_size must be an integer"),
        ({**FP8, "weight_block_size": [128]}, r"weight_block_size must be two sizes, not \[128\]"),
        ({**FP8, "weight_block_size": [128, 0]}, r"weight_block_size must be two sizes, not \[128, 0\]"),
        ({**FP8, "weight_block_size": "128"}, "weight_block_size must be a list of integers"),
        (compressed("nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not supported"),
        ({**PACKED, "config_groups": {"W4A16": ["Linear"]}}, "W4A16 must be an object"),
        (
            {**PACKED, "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse-24-bitmask' is not supported",
        ),
        ({**PACKED, "transform_config": {"config_groups": {"u": {}}}}, "transform_config is not supported"),
        (compressed("pack-quantized", num_bits=3), r"num_bits must be 4 or 8 for all, not \[3\]"),
        (
            {
                **PACKED,
                "config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}},
            },
            r"num_bits must be 4 or 8 for all, not \[4, 8\]",
        ),
        (compressed("pack-quantized", num_bits=4, block_structure=[1]), "block_structure must be two sizes"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, config: Any, words_of_error: str) -> None:
    write(tmp_path, config, GOOD_PACKED)
    with pytest.raises(CheckpointError, match=words_of_error) as caught:
        open_checkpoint(tmp_path, ())
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: quantization_config")
