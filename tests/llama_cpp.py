"""Writes tiny checkpoints of every family as GGUF files, by the conventions of llama.cpp's converter.

Knows nothing of ours: names come from gguf-py's map of them, shapes and metadata from the converter's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Format
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers.pre_tokenizers import ByteLevel

Weights = dict[str, NDArray[np.float32]]

ARCHITECTURES = {
    "dbrx": "dbrx",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
    "granitemoe": "granitemoe",
    "grok-1": "grok",
    "llama": "llama",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "phimoe": "phimoe",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Options:
    """kind: the number format of a tensor, by its name in the file and its weights. pre: how text is cut.
    extra: names of further tensors. metadata: replaces what would be written."""

    kind: Callable[[str, NDArray[np.float32]], Format] = lambda name, weight: Format.F32
    pre: str | None = "gpt-2"
    split_max_tensors: int = 0
    merged_experts: bool = True
    merged_latent: bool = False
    extra: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


def write_gguf(directory: Path, path: Path, options: Options | None = None) -> None:
    """The checkpoint of a model directory as `path`; split, if so it says, into files named after it."""
    options = options or Options()
    raw = json.loads((directory / "config.json").read_text())
    architecture = ARCHITECTURES[raw["model_type"]]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=options.split_max_tensors)
    add_parameters(writer, raw, options)
    add_vocabulary(writer, options.pre, raw["vocab_size"])
    for key, value in options.metadata.items():
        kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.kv_data[0][key] = gguf.GGUFValue(value, kind)
    writer.data_alignment = options.metadata.get("general.alignment", writer.data_alignment)
    for name, weight in renamed(raw, load_file(directory / "model.safetensors"), options):
        kind = Format.F32 if weight.ndim == 1 or "ffn_gate_inp" in name else options.kind(name, weight)
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)
    for name in options.extra:
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter, pre: str | None, size: int) -> None:
    """Bytes, three merges, three control tokens, a token that is not special, and padding."""
    tokens = [
        *CONTROL,
        *sorted(ByteLevel.alphabet()),
        *(merge.replace(" ", "") for merge in MERGES),
        "<think>",
    ]
    kinds = [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL) - 1) + [4]
    padding = range(len(tokens), size)
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *(f"[PAD{index}]" for index in padding)])
    writer.add_token_types([*kinds, *(5 for _ in padding)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


def add_parameters(writer: gguf.GGUFWriter, raw: dict[str, Any], options: Options) -> None:
    if raw["model_type"] == "dbrx":
        return add_dbrx(writer, raw)
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    latent = "kv_lora_rank" in raw
    writer.add_head_count_kv(1 if latent and not options.merged_latent else raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    add_rope(writer, raw)
    experts = raw.get("num_local_experts", raw.get("num_experts", raw.get("n_routed_experts")))
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(raw["num_experts_per_tok"])
    if raw.get("head_dim") and not latent:
        writer.add_key_length(raw["head_dim"])
        writer.add_value_length(raw["head_dim"])
    {
        "deepseek_v2": add_deepseek,
        "deepseek_v3": add_deepseek,
        "gpt_oss": add_gpt_oss,
        "granitemoe": add_granite,
        "grok-1": add_grok,
        "llama": add_llama,
        "mixtral": add_llama,
        "olmoe": add_olmoe,
        "qwen2_moe": add_qwen,
        "qwen3_moe": add_qwen,
    }.get(raw["model_type"], lambda *_: None)(writer, raw, options)
    return None


def add_rope(writer: gguf.GGUFWriter, raw: dict[str, Any]) -> None:
    rope = raw.get("rope_parameters") or {"rope_theta": 10_000.0}
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope.get("rope_type") == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        stretch = raw["max_position_embeddings"] / rope["original_max_position_embeddings"]
        factor = (1 + np.log(stretch) / np.log(rope["original_max_position_embeddings"])) ** 0.5
        writer.add_rope_scaling_attn_factors(float(factor))
        writer.add_sliding_window(raw["max_position_embeddings"])


def add_llama(writer: gguf.GGUFWriter, raw: dict[str, Any], _: Options) -> None:
    writer.add_vocab_size(raw["vocab_size"])
    writer.add_rope_dimension_count(raw["head_dim"] or raw["hidden_size"] // raw["num_attention_heads"])


def add_granite(writer: gguf.GGUFWriter, raw: dict[str, Any], options: Options) -> None:
    add_llama(writer, {"head_dim": None, **raw}, options)
    writer.add_attention_scale(raw["attention_multiplier"])
    writer.add_embedding_scale(raw["embedding_multiplier"])
    writer.add_residual_scale(raw["residual_multiplier"])
    writer.add_logit_scale(raw["logits_scaling"])


def add_olmoe(writer: gguf.GGUFWriter, raw: dict[str, Any], _: Options) -> None:
    writer.add_clamp_kqv(raw["clip_qkv"])


def add_qwen(writer: gguf.GGUFWriter, raw: dict[str, Any], _: Options) -> None:
    writer.add_expert_feed_forward_length(raw["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in raw:
        writer.add_expert_shared_feed_forward_length(raw["shared_expert_intermediate_size"])


def add_gpt_oss(writer: gguf.GGUFWriter, raw: dict[str, Any], _: Options) -> None:
    writer.add_sliding_window(raw["sliding_window"])
    writer.add_expert_feed_forward_length(raw["intermediate_size"])


def add_grok(writer: gguf.GGUFWriter, raw: dict[str, Any], _: Options) -> None:
    writer.add_attn_logit_softcapping(raw["max_attn_value"])
    writer.add_router_logit_softcapping(30.0)
    writer.add_attn_output_scale(raw["attn_output_multiplier"])
    writer.add_embedding_scale(raw["embedding_multiplier_scale"])
    writer.add_logit_scale(raw["output_multiplier_scale"])


def add_deepseek(writer: gguf.GGUFWriter, raw: dict[str, Any], options: Options) -> None:
    key_dim = raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"]
    writer.add_leading_dense_block_count(raw["first_k_dense_replace"])
    writer.add_vocab_size(raw["vocab_size"])
    if raw["q_lora_rank"]:
        writer.add_q_lora_rank(raw["q_lora_rank"])
    writer.add_kv_lora_rank(raw["kv_lora_rank"])
    if options.merged_latent:  # files of before 2025
        writer.add_key_length(key_dim)
        writer.add_value_length(raw["v_head_dim"])
    else:
        writer.add_key_length(raw["kv_lora_rank"] + raw["qk_rope_head_dim"])
        writer.add_value_length(raw["kv_lora_rank"])
        writer.add_key_length_mla(key_dim)
        writer.add_value_length_mla(raw["v_head_dim"])
    writer.add_expert_feed_forward_length(raw["moe_intermediate_size"])
    writer.add_expert_shared_count(raw["n_shared_experts"])
    writer.add_expert_weights_scale(raw["routed_scaling_factor"])
    if raw["norm_topk_prob"]:
        writer.add_expert_weights_norm(True)
    writer.add_expert_group_count(raw["n_group"])
    writer.add_expert_group_used_count(raw["topk_group"])
    if raw["model_type"] == "deepseek_v3":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_rope_dimension_count(raw["qk_rope_head_dim"])
    writer.add_rope_scaling_yarn_log_mul(0.1 * raw["rope_parameters"]["mscale_all_dim"])


def add_dbrx(writer: gguf.GGUFWriter, raw: dict[str, Any]) -> None:
    attention, ffn = raw["attn_config"], raw["ffn_config"]
    writer.add_block_count(raw["n_layers"])
    writer.add_context_length(raw["max_seq_len"])
    writer.add_embedding_length(raw["d_model"])
    writer.add_feed_forward_length(ffn["ffn_hidden_size"])
    writer.add_head_count(raw["n_heads"])
    writer.add_head_count_kv(attention["kv_n_heads"])
    writer.add_rope_freq_base(attention["rope_theta"])
    writer.add_clamp_kqv(attention["clip_qkv"])
    writer.add_expert_count(ffn["moe_num_experts"])
    writer.add_expert_used_count(ffn["moe_top_k"])
    writer.add_layer_norm_eps(1e-5)


def renamed(
    raw: dict[str, Any], weights: Weights, options: Options
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every tensor by its name in the file, in the layout in which it is there."""
    architecture = ARCHITECTURES[raw["model_type"]]
    layers = raw.get("num_hidden_layers") or raw["n_layers"]
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, layers)
    for name, weight in modified(raw, weights, options):
        yield name if name.startswith(("blk.", "rope_")) else found(names, name), weight
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", np.array(rope["long_factor"], np.float32)
        yield "rope_factors_short.weight", np.array(rope["short_factor"], np.float32)
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", llama3_factors(raw, rope)


def found(names: gguf.TensorNameMap, name: str) -> str:
    stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert stored, name
    return str(stored)


def modified(
    raw: dict[str, Any], weights: Weights, options: Options
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    kind, heads = raw["model_type"], {"q_proj": raw.get("num_attention_heads", 0)}
    heads["k_proj"] = raw.get("num_key_value_heads", 0)
    if kind == "grok-1":
        weights = {grok_name(name): weight for name, weight in weights.items()}
    for name, weight in stacked(weights) if options.merged_experts else per_expert(weights):
        projection = name.split(".")[-2] if "." in name else ""
        if kind in ("llama", "mixtral", "granitemoe") and projection in heads:
            yield name, neighbours(weight, heads[projection])
        elif "ffn.experts.mlp" in name:
            ffn = raw["ffn_config"]
            experts = weight.reshape(ffn["moe_num_experts"], ffn["ffn_hidden_size"], raw["d_model"])
            yield f"{name}.weight", experts.transpose(0, 2, 1) if name.endswith("w2") else experts
        elif name.endswith("input_linear.weight"):
            block = f"blk.{name.split('.')[2]}"
            gate, up = np.split(weight, 2, axis=1)
            yield from [(f"{block}.ffn_gate_exps.weight", gate), (f"{block}.ffn_up_exps.weight", up)]
        elif name.endswith("kv_b_proj.weight") and not options.merged_latent:
            yield from split_latent(raw, name, weight)
        elif ".mlp.experts.gate_up_proj" in name or (".mlp.experts.down_proj" in name and kind == "gpt_oss"):
            yield from gpt_oss_experts(name, weight)
        elif name.endswith("sinks"):
            yield f"{name}.weight", weight
        else:
            yield name.replace("e_score_correction_bias", "e_score_correction.bias"), weight


def stacked(weights: Weights) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Experts that have a tensor each, one behind the other in one."""
    groups: dict[str, list[NDArray[np.float32]]] = {}
    for name, weight in sorted(weights.items(), key=lambda item: natural(item[0])):
        groups.setdefault(re.sub(r"experts\.\d+\.", "experts.", name), []).append(weight)
    for name, parts in groups.items():
        yield name, np.stack(parts) if f"{name}" not in weights else parts[0]


def per_expert(weights: Weights) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """As Mixtrals were until April 2024."""
    short = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}
    for name, weight in weights.items():
        expert = re.fullmatch(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w\d)\.weight", name)
        yield f"blk.{expert[1]}.{short[expert[3]]}.{expert[2]}.weight" if expert else name, weight


def natural(name: str) -> list[Any]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def neighbours(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Row i of a head's first half becomes its row 2i, row i of its second half row 2i + 1."""
    size = len(weight) // num_heads
    order = [head * size + i % 2 * (size // 2) + i // 2 for head in range(num_heads) for i in range(size)]
    return weight[order]


def split_latent(
    raw: dict[str, Any], name: str, weight: NDArray[np.float32]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    nope = raw["qk_nope_head_dim"]
    heads = weight.reshape(raw["num_attention_heads"], nope + raw["v_head_dim"], -1)
    yield name.replace("kv_b_proj", "k_b_proj"), heads[:, :nope].transpose(0, 2, 1)
    yield name.replace("kv_b_proj", "v_b_proj"), heads[:, nope:]


def gpt_oss_experts(name: str, weight: NDArray[np.float32]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    bias = name.endswith("_bias")
    name, suffix = name.removesuffix("_bias"), ".bias" if bias else ".weight"
    if not bias:
        weight = weight.transpose(0, 2, 1)
    if name.endswith("down_proj"):
        yield name + suffix, weight
    else:
        yield name.replace("gate_up_proj", "gate_proj") + suffix, weight[:, ::2]
        yield name.replace("gate_up_proj", "up_proj") + suffix, weight[:, 1::2]


def grok_name(name: str) -> str:
    """From hpcai-tech's names to SGLang's, which the converter reads."""
    for old, new in {
        ".scale": ".weight",
        ".attn.": ".self_attn.",
        "moe_block": "block_sparse_moe",
        ".linear_v.": ".w3.",
        ".linear_1.": ".w2.",
        ".linear.": ".w1.",
    }.items():
        name = name.replace(old, new)
    return name


def llama3_factors(raw: dict[str, Any], rope: dict[str, Any]) -> NDArray[np.float32]:
    """What the frequencies are divided by."""
    dim = raw["head_dim"]
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)
