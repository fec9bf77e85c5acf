"""`toptwo model export`: the file holds the checkpoint's weights, words and shape, or is not there at all."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Format
from numpy.typing import NDArray
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fakes
from tiny import write_chat_mixtral
from toptwo.cli import cli
from toptwo.errors import StartupError
from toptwo.gguf.numbers import split_halves
from toptwo.model_commands import export as export_module
from toptwo.model_commands import gguf_file
from toptwo.model_commands.export import EXPORT_TYPES, export
from toptwo.models.registry import read_config
from toptwo.runtime.checkpoints.open import open_checkpoint
from toptwo.runtime.loader import load_weights

LAYERS, HIDDEN, FFN, EXPERTS, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 96, 3, 4, 2, 32
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,  # not hidden / heads, which a reader may take for granted
    "num_local_experts": EXPERTS,
    "rope_theta": 12_345.0,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "tiny-moe"
    write_chat_mixtral(directory, **SHAPE)
    return directory


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    directory = tmp_path / "tiny-moe"
    directory.mkdir()
    for file in original.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def stack_experts(weights: dict[str, torch.Tensor]) -> None:
    """From Mixtral's own names to those of transformers 5."""
    for layer in range(LAYERS):
        old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        each = [
            {w: weights.pop(f"{old}.experts.{e}.{w}.weight") for w in ("w1", "w2", "w3")}
            for e in range(EXPERTS)
        ]
        weights[f"{new}.experts.gate_up_proj"] = torch.stack([torch.cat([e["w1"], e["w3"]]) for e in each])
        weights[f"{new}.experts.down_proj"] = torch.stack([e["w2"] for e in each])
        weights[f"{new}.gate.weight"] = weights.pop(f"{old}.gate.weight")


def tie_head(directory: Path) -> None:
    change_weights(directory, lambda weights: weights.pop("lm_head.weight"))
    change_json(directory / "config.json", tie_word_embeddings=True)


@dataclass(frozen=True)
class Written:
    """A file that was read back: weights in float32 and q/k in Hugging Face's order, formats, metadata."""

    weights: dict[str, NDArray[np.float32]]
    formats: dict[str, Format]
    fields: dict[str, Any]


def read_back(path: Path) -> Written:
    reader = gguf.GGUFReader(path)
    weights = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}
        split = next((heads[name] for name in heads if name in tensor.name), None)
        weights[tensor.name] = weight if split is None else split_halves(weight, split)
    formats = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    return Written(weights, formats, {name: f.contents() for name, f in reader.fields.items()})


def expected_weights(directory: Path) -> dict[str, NDArray[np.float32]]:
    """The weights as the server loads them, under llama.cpp's names."""
    architecture, config = read_config(directory)
    specs, ignored = architecture.weight_map(config), architecture.ignored_tensors(config)
    ours: dict[str, NDArray[np.float32]] = {}
    with open_checkpoint(directory, specs) as files:
        load_weights(
            files, specs, ignored, lambda spec, w: ours.update({spec.name: w.float().clone().numpy()})
        )
    named = {"token_embd": ours["embed"], "output_norm": ours["norm"]}
    if "lm_head" in ours:
        named["output"] = ours["lm_head"]
    q_rows, k_rows = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    for layer in range(LAYERS):
        weights = {key.split(".", 2)[2]: w for key, w in ours.items() if key.startswith(f"layers.{layer}.")}
        q, k, v = np.split(weights["qkv"], [q_rows, q_rows + k_rows])
        gate, up = np.split(weights["gate_up"], 2, axis=1)
        block = {
            "attn_norm": weights["attention_norm"],
            **{"attn_q": q, "attn_k": k, "attn_v": v, "attn_output": weights["out"]},
            **{"ffn_norm": weights["moe_norm"], "ffn_gate_inp": weights["router"]},
            **{"ffn_gate_exps": gate, "ffn_up_exps": up, "ffn_down_exps": weights["down"]},
        }
        named |= {f"blk.{layer}.{name}": weight for name, weight in block.items()}
    return {f"{name}.weight": weight for name, weight in named.items()}


def largest_of_block(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest magnitude in the 32 elements that an element shares its scale with."""
    blocks = np.abs(weight).reshape(*weight.shape[:-1], -1, 32)
    return np.broadcast_to(blocks.max(-1, keepdims=True), blocks.shape).reshape(weight.shape)


# Largest error as a part of the block's largest element: half a step, for Q4_0 a whole one at the end that
# has no code for it; and the rounding of the scale to half precision.
TOLERANCES = {Format.Q8_0: 0.5 / 127 + 2**-11, Format.Q4_0: 1 / 8 + 2**-11}


@pytest.mark.parametrize("layout", ["per expert", "fused", "tied", "bfloat16"])
@pytest.mark.parametrize("kind", EXPORT_TYPES)
def test_the_file_holds_the_weights(
    checkpoint: Path, tmp_path: Path, kind: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "CHUNK_ELEMENTS", 1000)  # so that tensors are written in several pieces
    if layout == "fused":
        change_weights(checkpoint, stack_experts)
    elif layout == "tied":
        tie_head(checkpoint)
    elif layout == "bfloat16":
        change_weights(checkpoint, lambda w: w.update({name: t.bfloat16() for name, t in w.items()}))
    expected = expected_weights(checkpoint)
    export(str(checkpoint), tmp_path / "out.gguf", kind, False, quiet())
    written = read_back(tmp_path / "out.gguf")
    assert written.weights.keys() == expected.keys()
    for name, weight in expected.items():
        got, form = written.weights[name], written.formats[name]
        assert got.shape == weight.shape, name
        if "norm" in name or "gate_inp" in name:
            assert form is Format.F32, name
            np.testing.assert_array_equal(got, weight)
        elif kind == "bf16":
            assert form is Format.BF16, name
            np.testing.assert_array_equal(got, torch.tensor(weight).bfloat16().float().numpy())
        else:
            is_table = name in ("token_embd.weight", "output.weight")
            assert form is (Format.Q8_0 if is_table or kind == "q8_0" else Format.Q4_0), name
            assert (np.abs(got - weight) <= TOLERANCES[form] * largest_of_block(weight)).all(), name


def quiet() -> Console:
    return Console(file=io.StringIO(), width=1000)


def test_the_file_says_what_llama_cpp_must_know(original: Path, tmp_path: Path) -> None:
    export(str(original), tmp_path / "out.gguf", "q4_0", False, quiet())
    fields = read_back(tmp_path / "out.gguf").fields
    vocabulary = fakes.byte_level_vocabulary()
    start, end = (vocabulary.token_to_id(token) for token in fakes.CONTROL_TOKENS)
    expected = {
        "general.architecture": "llama",
        "general.name": "tiny-moe",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "llama.vocab_size": vocabulary.get_vocab_size(),
        "llama.context_length": 8192,
        "llama.embedding_length": HIDDEN,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": HEAD_DIM,
        "llama.attention.value_length": HEAD_DIM,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": 12_345.0,
        "llama.expert_count": EXPERTS,
        "llama.expert_used_count": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": start,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": fakes.CHATML,
    }
    assert {key: fields.get(key) for key in expected} == expected
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens == [vocabulary.id_to_token(index) for index in range(len(tokens))]
    assert [i for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL] == [start, end]
    assert fields["tokenizer.ggml.merges"][0] == "h e"


def test_digits_are_cut_as_smollm_cuts_them(checkpoint: Path, tmp_path: Path) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps = [{"type": "Digits", "individual_digits": True}, byte_level]
    change_json(checkpoint / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    export(str(checkpoint), tmp_path / "out.gguf", "bf16", False, console := quiet())
    assert read_back(tmp_path / "out.gguf").fields["tokenizer.ggml.pre"] == "smollm"
    assert "warning" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_unknown_way_to_cut_text_is_told(checkpoint: Path, tmp_path: Path) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    change_json(checkpoint / "tokenizer.json", pre_tokenizer=byte_level)
    export(str(checkpoint), tmp_path / "out.gguf", "bf16", False, console := quiet())
    assert read_back(tmp_path / "out.gguf").fields["tokenizer.ggml.pre"] == "default"
    assert "warning: " in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_vocabulary_shorter_than_the_embedding_is_padded(checkpoint: Path, tmp_path: Path) -> None:
    real = fakes.byte_level_vocabulary().get_vocab_size()
    change_json(checkpoint / "config.json", vocab_size=real + 2)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    change_weights(
        checkpoint, lambda w: w.update({n: torch.cat([w[n], torch.zeros(2, HIDDEN)]) for n in names})
    )
    export(str(checkpoint), tmp_path / "out.gguf", "q8_0", False, quiet())
    fields = read_back(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.tokens"][real:] == [f"[PAD{real}]", f"[PAD{real + 1}]"]
    assert fields["tokenizer.ggml.token_type"][real:] == [gguf.TokenType.UNUSED] * 2


def remove_k(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.self_attn.k_proj.weight"]


def add_bias(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(HEADS * HEAD_DIM)


def cut_norm(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.ones(HIDDEN - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_k, "misses model.layers.1.self_attn.k_proj.weight"),
        (add_bias, "has model.layers.0.self_attn.q_proj.bias, which is unknown"),
        (cut_norm, r"model.norm.weight has shape \[63\], expected \[64\]"),
    ],
)
def test_a_wrong_tensor_is_named(checkpoint: Path, tmp_path: Path, change: Any, message: str) -> None:
    change_weights(checkpoint, change)
    assert_refused(checkpoint, tmp_path / "out.gguf", message)


def assert_refused(model: Path, out: Path, message: str, kind: str = "bf16") -> None:
    before = sorted(path.name for path in out.parent.iterdir()) if out.parent.exists() else []
    with pytest.raises(StartupError, match=message):
        export(str(model), out, kind, False, quiet())
    assert (sorted(path.name for path in out.parent.iterdir()) if before else []) == before


def test_a_tokenizer_of_another_family_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    fakes.byte_fallback_vocabulary().save(str(checkpoint / "tokenizer.json"))
    assert_refused(checkpoint, tmp_path / "out.gguf", r"tokenizer\.json: only byte-level BPE")


def test_rows_that_blocks_do_not_divide_are_refused(tmp_path: Path) -> None:
    write_chat_mixtral(tmp_path / "odd", **{**SHAPE, "intermediate_size": 80, "num_hidden_layers": 1})
    message = "--type: Q4_0 needs rows in multiples of 32, and those of blk.0.ffn_down_exps.weight have 80"
    assert_refused(tmp_path / "odd", tmp_path / "out.gguf", message, "q4_0")


def test_a_place_that_cannot_be_written_is_named(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    assert_refused(original, out, "--type q5_0: there is bf16, q8_0, q4_0", "q5_0")
    assert_refused(original, tmp_path, "is a directory")
    assert_refused(original, tmp_path / "nowhere" / "out.gguf", "nowhere: no such directory")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        assert_refused(original, out, r"out\.gguf: needs 0\.0 GB of free disk")
    out.write_text("old")
    assert_refused(original, out, r"out\.gguf: exists; --force overwrites it")
    assert out.read_text() == "old"
    export(str(original), out, "bf16", True, quiet())
    assert read_back(out).fields["general.name"] == "tiny-moe"


def test_a_full_disk_leaves_the_old_file(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_disk(content: object, files: object, path: Path, advance: object) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_gguf", fill_disk)
    out = tmp_path / "out.gguf"
    out.write_text("old")
    with pytest.raises(StartupError, match=r"out\.gguf: could not be written: No space left on device"):
        export(str(original), out, "bf16", True, quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert out.read_text() == "old"


def test_the_command_takes_one_model_or_none(original: Path, tmp_path: Path) -> None:
    out = tmp_path / "given.gguf"
    done = CliRunner().invoke(cli, ["model", "export", str(original), str(out), "--type", "q8_0"])
    assert done.exit_code == 0, done.output
    assert read_back(out).formats["blk.0.attn_q.weight"] is Format.Q8_0
    # Without one it is what the settings say, as for `serve`; without those, the default model.
    out, environment = tmp_path / "set.gguf", {"TOPTWO_MODEL": str(original)}
    done = CliRunner().invoke(cli, ["model", "export", str(out), "--type", "bf16"], env=environment)
    assert done.exit_code == 0, done.output
    assert out.exists()
    done = CliRunner().invoke(cli, ["model", "export", "one", "two", str(out)])
    assert done.exit_code == 2
