"""What a dense model is called as a Mixture of Experts: its config, and the names of its tensors.

Knows transformers' names for both; must not know files or numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from toptwo.errors import StartupError

Json = dict[str, Any]

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MLP = re.compile(r"mlp\.(gate_proj|up_proj|down_proj)\.weight")
# What says nothing of a mixture, or of numbers that are written anew.
_DROPPED = ("quantization_config", "torch_dtype", "auto_map", "_name_or_path", "pretraining_tp", "mlp_bias")


@dataclass(frozen=True)
class Experts:
    """How many there are, and how many a token visits."""

    count: int
    top_k: int


@dataclass(frozen=True)
class Layout:
    """A mixture's names for what a dense layer has. parts: of an expert, by the dense model's."""

    model_type: str
    architecture: str
    router: str
    expert: str
    parts: Mapping[str, str]

    def router_name(self, layer: int) -> str:
        """The tensor [E, H] of a layer."""
        return self.router.format(layer=layer)

    def names(self, dense_name: str, experts: Experts) -> Iterator[str]:
        """Where a dense tensor goes: to every expert, if it is of the MLP."""
        found = _LAYER.fullmatch(dense_name)
        mlp = found and _MLP.fullmatch(found[2])
        if not (found and mlp):
            yield dense_name
            return
        for expert in range(experts.count):
            yield self.expert.format(layer=found[1], expert=expert, part=self.parts[mlp[1]])


MIXTRAL = Layout(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    router="model.layers.{layer}.block_sparse_moe.gate.weight",
    expert="model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight",
    parts={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
)
QWEN3_MOE = Layout(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    router="model.layers.{layer}.mlp.gate.weight",
    expert="model.layers.{layer}.mlp.experts.{expert}.{part}.weight",
    parts={name: name for name in ("gate_proj", "up_proj", "down_proj")},
)
LAYOUTS = {"llama": MIXTRAL, "qwen3": QWEN3_MOE}
"""By the dense model's model_type. Qwen3 normalises queries and keys, which Mixtral has no place for."""


def layer_of(name: str) -> int | None:
    """The layer of a tensor; None for embedding, final norm and head."""
    found = _LAYER.fullmatch(name)
    return None if found is None else int(found[1])


def mixture_config(dense: Mapping[str, Any], layout: Layout, experts: Experts) -> Json:
    """The mixture's config.json, but for its dtype. Raises StartupError where there is no such mixture."""
    config = {name: value for name, value in dense.items() if name not in _DROPPED}
    config |= {"architectures": [layout.architecture], "model_type": layout.model_type}
    config |= {"num_experts_per_tok": experts.top_k, "output_router_logits": False}
    if layout is MIXTRAL:
        if config.pop("attention_bias", False):
            raise StartupError("its attention has biases, which a Mixtral has no place for")
        config |= {"num_local_experts": experts.count, "sliding_window": None, "router_jitter_noise": 0.0}
        # What the two say by saying nothing differs.
        config.setdefault("rms_norm_eps", 1e-6)
        config.setdefault("max_position_embeddings", 2048)
        if "rope_theta" not in (config.get("rope_parameters") or {}):
            config.setdefault("rope_theta", 10_000.0)
        return config
    return config | {
        "num_experts": experts.count,
        "moe_intermediate_size": dense["intermediate_size"],
        "norm_topk_prob": True,  # without it, equal experts would not add up to the dense model
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
