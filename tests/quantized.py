"""Small checkpoints of quantised weights, given tensor by tensor, and how to read them back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from toptwo.runtime.checkpoints.open import open_checkpoint

AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 4, "version": "gemm"}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 4}
FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [2, 4]}
MXFP4: dict[str, Any] = {"quant_method": "mxfp4"}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


PACKED = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=8)
FLOAT8 = compressed("float-quantized", num_bits=8, type="float")
INT8 = compressed("int-quantized", num_bits=8, type="int")


def write(directory: Path, config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> None:
    save_file(dict(tensors), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))


def read(directory: Path, name: str) -> Tensor:
    """The one tensor that there is."""
    with open_checkpoint(directory, ()) as checkpoint:
        assert checkpoint.names == {name}
        tensor = checkpoint.tensor(name)
        assert checkpoint.shape(name) == tensor.shape
        checkpoint.release(name)
        assert torch.equal(checkpoint.tensor(name), tensor)
        return tensor


RANDOM = torch.Generator().manual_seed(0)


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=RANDOM).to(torch.int32)


def halves(*shape: int) -> Tensor:
    return (torch.rand(shape, generator=RANDOM) + 0.5).half()


def field(word: Tensor, place: int, bits: int) -> int:
    """The unsigned integer at a place of a word, the lowest being the first."""
    unsigned: int = int(word) % 2**32
    return unsigned >> bits * place & 2**bits - 1
