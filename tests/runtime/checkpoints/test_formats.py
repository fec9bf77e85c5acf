"""Every format of quantised weights as a whole model, beside the model that its numbers stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import encoders
from encoders import Encoder
from quantized import compressed
from tiny import FAMILIES, forward_all, write_mixtral
from toptwo.errors import CheckpointError

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
FORMATS: dict[str, tuple[dict[str, Any], Encoder]] = {
    "gptq": (GPTQ, encoders.gptq(4, 32)),
    "gptq-8": ({**GPTQ, "bits": 8}, encoders.gptq(8, 32)),
    "gptq-v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, encoders.gptq(4, 32, version=2)),
    "gptq-act-order": ({**GPTQ, "desc_act": True}, encoders.gptq(4, 32, reordered=True)),
    "gptq-no-g-idx": (GPTQ, encoders.gptq(4, 32, g_idx=False)),
    "gptq-edge-group": ({**GPTQ, "group_size": 40}, encoders.gptq(4, 40)),
    "awq": (AWQ, encoders.awq(32)),
    "packed-4": (compressed("pack-quantized", num_bits=4, type="int"), encoders.packed(4, 32)),
    "packed-8-rows": (compressed("pack-quantized", num_bits=8, type="int"), encoders.packed(8, None)),
    "packed-4-zeros": (
        compressed("pack-quantized", num_bits=4, type="int"),
        encoders.packed(4, 16, symmetric=False),
    ),
    "packed-4-act-order": (
        compressed("pack-quantized", num_bits=4, type="int"),
        encoders.packed(4, 32, symmetric=False, reordered=True),
    ),
    "int8": (compressed("int-quantized", num_bits=8, type="int"), encoders.int8()),
    "int8-zeros": (compressed("int-quantized", num_bits=8, type="int"), encoders.int8(symmetric=False)),
    "float8": (
        compressed("float-quantized", num_bits=8, type="float"),
        encoders.fp8((1, 1 << 20), "weight_scale", torch.bfloat16),
    ),
    "float8-whole": (
        compressed("naive-quantized", num_bits=8, type="float"),
        encoders.fp8(None, "weight_scale", dims=1),
    ),
    "float8-blocks": (
        compressed("float-quantized", num_bits=8, type="float", block_structure=[48, 24]),
        encoders.fp8((48, 24), "weight_scale"),
    ),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [48, 40]},
        encoders.fp8((48, 40), "weight_scale_inv"),
    ),
    "fp8-default-block": ({"quant_method": "fp8"}, encoders.fp8((128, 128), "weight_scale_inv")),
    "fp8-whole": ({"quant_method": "fp8"}, encoders.fp8(None, "weight_scale", dims=0)),
}


def write_quantized(source: Path, target: Path, config: dict[str, Any], encode: Encoder) -> Path:
    """Write the checkpoint of `source` with its matrices quantised; return the one that these stand for."""
    dense = target.with_name(f"{target.name}-dense")
    for directory in (target, dense):
        shutil.copytree(source, directory)
    stored: dict[str, torch.Tensor] = {}
    plain = load_file(source / "model.safetensors")
    for name, tensor in list(plain.items()):
        module = name.removesuffix(".weight")
        if module.endswith(("_proj", "w1", "w2", "w3", "lm_head")):
            parts, plain[name] = encode(tensor)
            stored |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        else:
            stored[name] = tensor
    save_file(stored, target / "model.safetensors", {"format": "pt"})
    save_file(plain, dense / "model.safetensors", {"format": "pt"})
    change_config(target, quantization_config=config)
    return dense


def change_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixtral")
    write_mixtral(directory, num_hidden_layers=2)
    return directory


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_model_computes_what_its_dense_twin_does(
    mixtral: Path, tmp_path: Path, name: str
) -> None:
    from transformers import MixtralForCausalLM

    dense = write_quantized(mixtral, tmp_path / "model", *FORMATS[name])
    tokens = list(range(7, 19))
    got = forward_all(tmp_path / "model", tokens, backend="reference")
    with torch.inference_mode():
        twin = MixtralForCausalLM.from_pretrained(dense, dtype=torch.float32)
        expected = twin(torch.tensor([tokens])).logits[0]
        original = MixtralForCausalLM.from_pretrained(mixtral)(torch.tensor([tokens])).logits[0]
    assert (got - expected).abs().max() < 1e-4
    assert (original - expected).abs().max() > 1e-3  # it was quantised at all


def test_gpt_oss_with_mxfp4_experts_computes_what_its_dense_twin_does(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    FAMILIES["gpt_oss"].write(source, intermediate_size=64)
    dense, weights = tmp_path / "dense", load_file(source / "model.safetensors")
    for directory in (target, dense):
        shutil.copytree(source, directory)
    stored, plain = dict(weights), dict(weights)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        parts, means = encoders.mxfp4(stored.pop(name).mT.contiguous())
        stored |= {f"{name}_{part}": value for part, value in parts.items()}
        plain[name] = means.mT.contiguous()
    assert len(stored) > len(plain)
    save_file(stored, target / "model.safetensors", {"format": "pt"})
    save_file(plain, dense / "model.safetensors", {"format": "pt"})
    change_config(target, quantization_config={"quant_method": "mxfp4"})
    tokens = list(range(7, 19))
    got = forward_all(target, tokens, backend="reference")
    assert (got - forward_all(dense, tokens, backend="reference")).abs().max() < 1e-4


def test_biases_of_zeros_that_gptq_exporters_add_are_no_surplus(mixtral: Path, tmp_path: Path) -> None:
    write_quantized(mixtral, tmp_path / "model", *FORMATS["gptq"])
    expected = forward_all(tmp_path / "model", [1, 2], backend="reference")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    bias = "model.layers.1.self_attn.q_proj.bias"
    save_file({**stored, bias: torch.zeros(64)}, tmp_path / "model" / "model.safetensors")
    got = forward_all(tmp_path / "model", [1, 2], backend="reference")
    assert torch.allclose(got, expected, atol=1e-5)
    save_file({**stored, bias: torch.ones(64)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"has unknown {bias}"):
        forward_all(tmp_path / "model", [1, 2], backend="reference")


def test_packed_weights_are_made_anew_when_the_config_decodes_otherwise(
    mixtral: Path, tmp_path: Path
) -> None:
    config, encode = FORMATS["gptq"]
    write_quantized(mixtral, tmp_path / "model", config, encode)
    first = forward_all(tmp_path / "model", [1, 2], quantization="int8")
    assert torch.equal(forward_all(tmp_path / "model", [1, 2], quantization="int8"), first)
    change_config(tmp_path / "model", quantization_config={**config, "checkpoint_format": "gptq_v2"})
    assert not torch.equal(forward_all(tmp_path / "model", [1, 2], quantization="int8"), first)
