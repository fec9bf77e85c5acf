"""Tiny random checkpoints of every architecture, written by transformers: real files, no download."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grok_reference import Grok1Family

torch.set_num_threads(1)  # for tensors this small, a second thread only waits for the first


Reference = Callable[[torch.Tensor], torch.Tensor]
"""From token ids [T] to the float32 logits [T, V] that an independent implementation computes."""

COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # large enough that logits and routing are decisive
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """An architecture as transformers has it: the classes `name`Config and `name`ForCausalLM, and a shape."""

    name: str
    shape: dict[str, Any]

    def write(self, directory: Path, seed: int = 0, **overrides: Any) -> Reference:
        """Save a random checkpoint, none of whose tensors is what it would be by default."""
        import transformers

        torch.manual_seed(seed)
        config = getattr(transformers, f"{self.name}Config")(**{**COMMON, **self.shape, **overrides})
        model = getattr(transformers, f"{self.name}ForCausalLM")(config).eval()
        randomize(model)
        model.save_pretrained(directory)
        return lambda ids_T: model(ids_T[None]).logits[0].detach()


def randomize(model: torch.nn.Module) -> None:
    """Give norms, biases and all else that starts as ones or zeros numbers that a test would miss."""
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(
            ("norm.weight", "norm_1.weight", "norm_2.weight", "norm_f.weight", "layernorm.weight")
        ):
            parameter.data.normal_(1.0, 0.2)
        elif (parameter.dim() == 1 and "inv_freq" not in name) or name.endswith("_bias"):
            parameter.data.normal_(0.0, 0.2)


YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 8,
    "q_lora_rank": 40,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "rope_parameters": {**YARN, "rope_theta": 10_000.0, "mscale": 0.9, "mscale_all_dim": 0.7},
}

FAMILIES: dict[str, Any] = {
    "dbrx": Family(
        "Dbrx",
        {
            "d_model": 64,  # COMMON's hidden_size comes too late for one that DbrxConfig copies
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 50_000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 6, "moe_top_k": 3},
            "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
        },
    ),
    "deepseek_v2": Family("DeepseekV2", DEEPSEEK | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": Family("DeepseekV3", DEEPSEEK | {"routed_scaling_factor": 2.5, "n_shared_experts": 1}),
    "gpt_oss": Family(
        "GptOss",
        {
            "intermediate_size": 48,
            "head_dim": 16,  # 8 heads of it are not the hidden size
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": 24,
            "swiglu_limit": 1.0,  # so that much is cut off
            "rope_parameters": {**YARN, "rope_theta": 150_000.0, "truncate": False},
        },
    ),
    "granitemoe": Family(
        "GraniteMoe",
        {
            "intermediate_size": 48,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,  # not what heads of 8 have by default
            "residual_multiplier": 0.22,
            "logits_scaling": 6.0,
        },
    ),
    "grok1": Grok1Family(),
    "llama": Family("Llama", {"intermediate_size": 96}),
    "mixtral": Family("Mixtral", {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": Family(
        "Olmoe", {"intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 1.0}
    ),
    "phimoe": Family(
        "Phimoe",
        {
            "intermediate_size": 48,
            "num_local_experts": 6,
            "router_jitter_noise": 0.3,  # so that several logits are near the largest
            "attention_bias": True,
            "lm_head_bias": True,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "original_max_position_embeddings": 512,
                "short_factor": [1.0, 1.1, 1.3, 1.7],
                "long_factor": [1.0, 4.0, 8.0, 16.0],
                "short_mscale": 1.1,
                "long_mscale": 1.3,
            },
        },
    ),
    "qwen2_moe": Family(
        "Qwen2Moe",
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3": Family(
        "Qwen3",
        {
            "intermediate_size": 96,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "qwen3_moe": Family(
        "Qwen3Moe",
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
}
"""By model_type. Each has `write`, as `Family` has it."""


def write_mixtral(directory: Path, seed: int = 0, **overrides: Any) -> Any:
    """Save a random MixtralForCausalLM to `directory` and return it (float32, eval mode)."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.1,  # large enough that logits and routing are decisive
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = MixtralForCausalLM(MixtralConfig(**{**shape, **overrides})).eval()
    model.save_pretrained(directory)
    return model


def load_runner(
    directory: Path,
    *,
    max_model_len: int | None = None,
    num_blocks: int = 64,
    dtype: str = "float32",
    backend: str = "auto",
    device: str = "auto",
    quantization: str = "auto",
    threads: int = 1,
    cache_dir: Path | None = None,
    routers: Sequence[torch.Tensor] = (),
) -> Any:
    """The checkpoint as the server loads it, with a KV pool of `num_blocks` blocks and 32 slots.

    dtype "auto" is the server's own choice; with the default one, quantised weights have a float32 KV cache.

    routers: matrices [E, H] to put in place of the loaded ones, one per layer.
    """
    from toptwo.models.registry import read_config
    from toptwo.runtime.build import build_runtime
    from toptwo.runtime.kv_cache import BLOCK_SIZE, kv_bytes_per_token
    from toptwo.settings import Settings

    kv_dtype = torch.float16 if dtype == "auto" else getattr(torch, dtype)
    block_bytes = BLOCK_SIZE * kv_bytes_per_token(read_config(directory)[1], kv_dtype)
    settings = Settings(
        max_model_len=max_model_len,
        max_num_seqs=32,
        kv_cache_gib=num_blocks * block_bytes / 2**30,
        dtype=dtype,  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
        device=device,  # type: ignore[arg-type]
        quantization=quantization,  # type: ignore[arg-type]
        threads=threads,
        **({"cache_dir": cache_dir} if cache_dir else {}),  # type: ignore[arg-type]
    )
    runtime = build_runtime(settings, directory)
    assert runtime.info.num_blocks == num_blocks
    for layer, weight in zip(runtime.model.layers, routers, strict=bool(routers)):  # type: ignore[attr-defined]
        # In place: a recorded step reads the weights where they are.
        layer.feed_forward.router.weights.matrix.data.copy_(layer.ops.pack(weight, "float32").data)
    return runtime.runner


def forward_all(directory: Path, token_ids: list[int], **options: Any) -> torch.Tensor:
    """Logits [T, V] after every token of one sequence, computed one token per step."""
    from toptwo.messages import NewSequence, Row, SamplingParams, StepPlan

    runner = load_runner(directory, **options)
    blocks = list(range(0, 2 * (1 + len(token_ids) // 16), 2))[::-1]  # scattered, not in order
    admitted = [NewSequence(3, token_ids, len(token_ids), SamplingParams(seed=0), blocks)]
    logits = []
    for position in range(len(token_ids)):
        plan = StepPlan(position, admitted, [Row(3, position, 1, [], True)])
        admitted = []
        logits.append(runner.compute_logits(plan)[0][0].clone())  # the next step writes over it
    return torch.stack(logits)


def write_chat_mixtral(directory: Path, **overrides: Any) -> None:
    """A tiny Mixtral that can be served: with a byte-level tokenizer and the ChatML template.

    Its answers are noise that never ends by itself: one channel of the residual stream is the same for every
    text, and by it the end token's logit is far below all others. A bias of 100 makes up for that.
    """
    from safetensors.torch import load_file, save_file

    import fakes

    tokenizer = fakes.byte_level_vocabulary()
    start, end = (tokenizer.token_to_id(token) for token in fakes.CONTROL_TOKENS)
    shape = {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": start, "eos_token_id": end}
    # Of the first seeds the one whose greedy answers repeat themselves least.
    write_mixtral(directory, seed=3, max_position_embeddings=8192, **{**shape, **overrides})
    tokenizer.save(str(directory / "tokenizer.json"))
    words = {"chat_template": fakes.CHATML, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(words))
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 0.1
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "w2.weight")):
            weight[0] = 0.0
    weights["lm_head.weight"][end] = 0.0
    weights["lm_head.weight"][end, 0] = -250.0
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
