"""A model's config.json, in Hugging Face's words, out of a GGUF file's metadata.

Knows llama.cpp's keys and which of its architectures is which `model_type`. Must not know how the config is
read. What a file does not say follows from the architecture: llama.cpp, too, knows it by the name alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gguf import ExpertGatingFuncType, GGMLQuantizationType

from toptwo.errors import CheckpointError
from toptwo.gguf.header import Gguf
from toptwo.gguf.metadata import Metadata
from toptwo.gguf.numbers import read_numbers

Config = dict[str, Any]

PHI_MAGNITUDE = 1.243163121016122  # short_mscale and long_mscale of every Phi MoE that was released


def config_of(gguf: Gguf) -> Config:
    """The whole of config.json. Raises CheckpointError that names the file and the key."""
    architecture = architecture_of(gguf)
    return ARCHITECTURES[architecture](gguf.metadata.below(architecture), gguf)


def architecture_of(gguf: Gguf) -> str:
    """llama.cpp's name of it. Raises CheckpointError for one that is not supported."""
    architecture = gguf.metadata.text("general.architecture")
    if architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        problem = f"{architecture!r} is not supported; there is: {supported}"
        raise gguf.metadata.error("general.architecture", problem)
    return architecture


def count_layers(gguf: Gguf) -> int:
    """Of the model proper: blocks behind the last one predict further tokens."""
    keys = gguf.metadata.below(architecture_of(gguf))
    num_layers = keys.integer("block_count") - keys.integer("nextn_predict_layers", 0)
    if not 0 < num_layers <= len(gguf.tensors):
        problem = f"gives {num_layers} layers, and {len(gguf.tensors)} tensors are there"
        raise keys.error("block_count", problem)
    return num_layers


def _decoder(keys: Metadata, gguf: Gguf, model_type: str) -> Config:
    """What nearly every architecture's config says."""
    hidden, num_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    config = {
        "model_type": model_type,
        "vocab_size": _vocab_size(gguf),
        "hidden_size": hidden,
        "num_hidden_layers": count_layers(gguf),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": keys.integer("attention.key_length", hidden // max(num_heads, 1)),
        "max_position_embeddings": keys.integer("context_length"),
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
    }
    if keys.has("feed_forward_length"):
        config["intermediate_size"] = keys.integer("feed_forward_length")
    if scaling := _rope_scaling(keys, gguf):
        config["rope_scaling"] = scaling
    return config


def _turned_wholly(keys: Metadata, config: Config) -> Config:
    """The config, refused where only a part of each head turns."""
    turned, head_dim = keys.integer("rope.dimension_count", config["head_dim"]), config["head_dim"]
    if turned != head_dim:
        raise keys.error("rope.dimension_count", f"is {turned}: only whole heads, of {head_dim}, can turn")
    return config


def _vocab_size(gguf: Gguf) -> int:
    return _stored_shape(gguf, "token_embd.weight")[0]


def _stored_shape(gguf: Gguf, name: str) -> tuple[int, ...]:
    if name not in gguf.tensors:
        raise CheckpointError(f"{gguf.path}: tensor {name} is missing")
    return gguf.tensors[name].shape


def _optional(keys: Metadata, **names: str) -> Config:
    """Numbers, by the config's names for the given keys, that are there."""
    return {ours: keys.number(theirs) for ours, theirs in names.items() if keys.has(theirs)}


def _rope_scaling(keys: Metadata, gguf: Gguf) -> Config | None:
    scaling, context = keys.below("rope.scaling"), keys.integer("context_length")
    kind = scaling.text("type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": scaling.number("factor")}
    if kind == "yarn":
        numbers = _optional(
            scaling,
            attention_factor="yarn_attn_factor",
            beta_fast="yarn_beta_fast",
            beta_slow="yarn_beta_slow",
        )
        original = scaling.integer("original_context_length", context)
        return {
            "rope_type": "yarn",
            "factor": scaling.number("factor"),
            "original_max_position_embeddings": original,
            **numbers,
        }
    if kind == "longrope" or "rope_factors_long.weight" in gguf.tensors:
        return {
            "rope_type": "longrope",
            "short_factor": _factors(gguf, "rope_factors_short.weight"),
            "long_factor": _factors(gguf, "rope_factors_long.weight"),
            "original_max_position_embeddings": scaling.integer("original_context_length"),
            **_optional(scaling, attention_factor="attn_factor"),
        }
    if kind != "none":
        raise scaling.error("type", f"{kind!r} is not supported")
    if "rope_freqs.weight" in gguf.tensors:
        # Llama 3.1's scaling, of which the file holds the outcome: a divisor per frequency, for any length.
        factors = _factors(gguf, "rope_freqs.weight")
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": context,
            "attention_factor": 1.0,
        }
    return None


def _factors(gguf: Gguf, name: str) -> list[float]:
    """A vector of float32 numbers, each as the shortest decimal, which is meant."""
    shape, tensor = _stored_shape(gguf, name), gguf.tensors[name]
    if tensor.kind != GGMLQuantizationType.F32 or len(shape) != 1:
        raise CheckpointError(
            f"{tensor.path}: {name} is {tensor.kind.name} of shape {list(shape)}, not a list"
        )
    return [float(str(factor)) for factor in read_numbers(tensor)]


def _experts(keys: Metadata, count: str = "num_experts") -> Config:
    return {count: keys.integer("expert_count"), "num_experts_per_tok": keys.integer("expert_used_count")}


def _llama(keys: Metadata, gguf: Gguf) -> Config:
    """llama.cpp's Mixtral is a Llama with experts."""
    if not keys.integer("expert_count", 0):
        return _turned_wholly(keys, _decoder(keys, gguf, "llama"))
    return _turned_wholly(keys, {**_decoder(keys, gguf, "mixtral"), **_experts(keys, "num_local_experts")})


def _dbrx(keys: Metadata, gguf: Gguf) -> Config:
    return {
        "model_type": "dbrx",
        "vocab_size": _vocab_size(gguf),
        "d_model": keys.integer("embedding_length"),
        "n_layers": count_layers(gguf),
        "n_heads": keys.integer("attention.head_count"),
        "max_seq_len": keys.integer("context_length"),
        "attn_config": {
            "kv_n_heads": keys.integer("attention.head_count_kv"),
            "rope_theta": keys.number("rope.freq_base"),
            **_optional(keys, clip_qkv="attention.clamp_kqv"),
        },
        "ffn_config": {
            "ffn_hidden_size": keys.integer("feed_forward_length"),
            "moe_num_experts": keys.integer("expert_count"),
            "moe_top_k": keys.integer("expert_used_count"),
        },
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }


def _grok(keys: Metadata, gguf: Gguf) -> Config:
    """Older files leave out numbers that the only model of that time had."""
    config = {**_decoder(keys, gguf, "grok1"), **_experts(keys)}
    config |= {
        "intermediate_size": keys.integer("expert_feed_forward_length", config["intermediate_size"]),
        "max_attn_value": keys.number("attn_logit_softcapping", 30.0),
        "embedding_multiplier_scale": keys.number("embedding_scale", 78.38367176906169),
        "attn_output_multiplier": keys.number("attention.output_scale", 0.08838834764831845),
        "output_multiplier_scale": keys.number("logit_scale", 0.5773502691896257),
        **_optional(
            keys,
            final_logit_softcapping="final_logit_softcapping",
            attn_temperature_len="attention.temperature_length",
        ),
    }
    return _turned_wholly(keys, config)


def _qwen2moe(keys: Metadata, gguf: Gguf) -> Config:
    config = {**_decoder(keys, gguf, "qwen2_moe"), **_experts(keys), "norm_topk_prob": False}
    ffn, top_k = keys.integer("feed_forward_length"), config["num_experts_per_tok"]
    config |= {
        "moe_intermediate_size": keys.integer("expert_feed_forward_length", ffn // max(top_k, 1)),
        "shared_expert_intermediate_size": keys.integer("expert_shared_feed_forward_length", ffn),
    }
    return _turned_wholly(keys, config)


def _qwen3moe(keys: Metadata, gguf: Gguf) -> Config:
    config = {**_decoder(keys, gguf, "qwen3_moe"), **_experts(keys), "norm_topk_prob": True}
    config["moe_intermediate_size"] = keys.integer("expert_feed_forward_length")
    return _turned_wholly(keys, config)


def _qwen3(keys: Metadata, gguf: Gguf) -> Config:
    return _turned_wholly(keys, _decoder(keys, gguf, "qwen3"))


def _olmoe(keys: Metadata, gguf: Gguf) -> Config:
    config = {**_decoder(keys, gguf, "olmoe"), **_experts(keys), "norm_topk_prob": False}
    return _turned_wholly(keys, config | _optional(keys, clip_qkv="attention.clamp_kqv"))


def _gpt_oss(keys: Metadata, gguf: Gguf) -> Config:
    config = {**_decoder(keys, gguf, "gpt_oss"), **_experts(keys, "num_local_experts")}
    config["intermediate_size"] = keys.integer("expert_feed_forward_length")
    config["sliding_window"] = keys.integer("attention.sliding_window")
    # No key says whether the ends of the ramp are rounded; the model was trained without.
    config["rope_scaling"] = {**config.get("rope_scaling", {"rope_type": "default"}), "truncate": False}
    return _turned_wholly(keys, config)


def _deepseek2(keys: Metadata, gguf: Gguf) -> Config:
    """V2 and V3, told apart by how experts are scored. Older files give a head's sizes by the keys by which
    newer ones give those of the latent vectors."""
    rope_dim, length = keys.integer("rope.dimension_count"), "attention.{}_length"
    key_dim, value_dim = (
        keys.integer(length.format(part) + ("_mla" if keys.has(length.format(part) + "_mla") else ""))
        for part in ("key", "value")
    )
    version_3 = keys.integer("expert_gating_func", 0) == ExpertGatingFuncType.SIGMOID
    num_groups = keys.integer("expert_group_count", 1)
    config = {
        **_decoder(keys, gguf, "deepseek_v3" if version_3 else "deepseek_v2"),
        **_experts(keys, "n_routed_experts"),
        "num_key_value_heads": keys.integer("attention.head_count"),
        "head_dim": rope_dim,
        "q_lora_rank": keys.integer("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": keys.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_dim - rope_dim,
        "v_head_dim": value_dim,
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "n_shared_experts": keys.integer("expert_shared_count"),
        "first_k_dense_replace": keys.integer("leading_dense_block_count", 0),
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0),
        "norm_topk_prob": keys.flag("expert_weights_norm", False),
        "n_group": num_groups,
        "topk_group": keys.integer("expert_group_used_count", 1),
        "topk_method": "group_limited_greedy" if num_groups > 1 else "greedy",
    }
    if version_3:
        config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    if "rope_scaling" in config and keys.has("rope.scaling.yarn_log_multiplier"):
        # A tenth of mscale_all_dim, to which mscale is equal in every model.
        mscale = round(10 * keys.number("rope.scaling.yarn_log_multiplier"), 6)
        config["rope_scaling"] |= {"mscale": mscale, "mscale_all_dim": mscale}
    return config


def _phimoe(keys: Metadata, gguf: Gguf) -> Config:
    config = {
        **_decoder(keys, gguf, "phimoe"),
        **_experts(keys, "num_local_experts"),
        "sliding_window": keys.integer("attention.sliding_window", 0) or None,
        "lm_head_bias": "output.bias" in gguf.tensors,
    }
    if "rope_scaling" in config:
        # The converter leaves out the factors on attention, and puts in what other models would have.
        config["rope_scaling"] |= {"short_mscale": PHI_MAGNITUDE, "long_mscale": PHI_MAGNITUDE}
    return _turned_wholly(keys, config)


def _granitemoe(keys: Metadata, gguf: Gguf) -> Config:
    if keys.integer("expert_shared_feed_forward_length", 0):
        raise keys.error("expert_shared_feed_forward_length", "is not supported: experts for all tokens")
    if not keys.flag("rope.scaling.finetuned", True):
        raise keys.error("rope.scaling.finetuned", "is false, which means no positions: not supported")
    config = {
        **_decoder(keys, gguf, "granitemoe"),
        **_experts(keys, "num_local_experts"),
        **_optional(
            keys,
            embedding_multiplier="embedding_scale",
            attention_multiplier="attention.scale",
            residual_multiplier="residual_scale",
            logits_scaling="logit_scale",
        ),
    }
    return _turned_wholly(keys, config)


ARCHITECTURES: dict[str, Callable[[Metadata, Gguf], Config]] = {
    "dbrx": _dbrx,
    "deepseek2": _deepseek2,
    "gpt-oss": _gpt_oss,
    "granitemoe": _granitemoe,
    "grok": _grok,
    "llama": _llama,
    "olmoe": _olmoe,
    "phimoe": _phimoe,
    "qwen2moe": _qwen2moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
}
