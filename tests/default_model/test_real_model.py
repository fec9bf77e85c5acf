"""The default model itself: shapes, tokenizer, and what its committed files promise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from toptwo.default_model.checkpoint import ROUTER_NAME
from toptwo.default_model.recipe import DEFAULT_MODEL_NAME, SMOL_MOE


@pytest.fixture(scope="module")
def tokenizer(real_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(real_model / "tokenizer.json"))


def test_the_router_file_covers_every_layer() -> None:
    router = load_file(SMOL_MOE.upcycling.experts)
    assert set(router) == {ROUTER_NAME.format(i) for i in range(30)}
    for rows in router.values():
        assert rows.shape == (8, 576)
        assert rows.dtype == np.float16
        assert np.isfinite(rows).all()


def test_the_directory_is_named_and_sized_by_the_recipe(real_model: Path) -> None:
    assert real_model.name == f"{DEFAULT_MODEL_NAME}-{SMOL_MOE.version}"
    index = json.loads((real_model / "model.safetensors.index.json").read_text())
    # The disk check and the progress bar go by this number.
    assert index["metadata"]["total_size"] == SMOL_MOE.checkpoint_bytes


def test_config(real_model: Path) -> None:
    config = json.loads((real_model / "config.json").read_text())
    expected = {
        "model_type": "mixtral",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 8192,
        "rope_theta": 100_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected


def test_shapes(real_model: Path) -> None:
    weight_map = json.loads((real_model / "model.safetensors.index.json").read_text())["weight_map"]
    layer = {
        "input_layernorm.weight": [576],
        "post_attention_layernorm.weight": [576],
        "self_attn.q_proj.weight": [576, 576],
        "self_attn.k_proj.weight": [192, 576],
        "self_attn.v_proj.weight": [192, 576],
        "self_attn.o_proj.weight": [576, 576],
        "mlp.gate.weight": [8, 576],
        "mlp.experts.gate_up_proj": [8, 3072, 576],
        "mlp.experts.down_proj": [8, 576, 1536],
    }
    expected = {f"model.layers.{i}.{name}": shape for i in range(30) for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": [49152, 576], "model.norm.weight": [576]}
    shapes = {}
    for shard in set(weight_map.values()):
        with safe_open(real_model / shard, "np") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                assert part.get_dtype() == "F32"
                shapes[name] = part.get_shape()
    assert shapes == expected


def test_experts_are_identical_in_this_version(real_model: Path) -> None:
    weight_map = json.loads((real_model / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.17.mlp.experts.down_proj"
    with safe_open(real_model / weight_map[name], "np") as file:
        experts = file.get_tensor(name)
    assert all(np.array_equal(experts[0], expert) for expert in experts)


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "  leading and trailing  ",
        "tabs\tand\r\nline\n\n\nbreaks",
        "Où est l'été à Besançon ? Größe, Straße, ¿señor?",
        "日本語とкириллица and العربية 🎉👩‍👩‍👧",
        "def f(x):\n    return x ** 2  # 3.14159e-10\n",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "naïve café, composed or e\u0301 decomposed",
        "it's we'll I'd THEY'RE",
        "{\"json\": [1, 2.5, null], 'q': `code`}",
        "",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    encoding = tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("In 2024, 12345.678 of v2").tokens
    assert "|".join(tokens) == "In|Ġ|2|0|2|4|,|Ġ|1|2|3|4|5|.|6|7|8|Ġof|Ġv|2"


def test_chat_markers_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert tokenizer.encode("<|im_start|>").ids == [1]
    assert tokenizer.encode("<|im_end|>").ids == [2]
    assert tokenizer.encode("<|im_start|>system\nBe brief.<|im_end|>").ids[0] == 1
    assert tokenizer.decode([1, 9690, 2]) == "system"
    assert tokenizer.get_vocab_size() == 49152


def test_chat_template_is_chatml(real_model: Path) -> None:
    config = json.loads((real_model / "tokenizer_config.json").read_text())
    assert "'<|im_start|>' + message['role']" in config["chat_template"]
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
