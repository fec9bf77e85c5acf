"""DeepSeek-V3, R1, V3.1 and Moonlight (arXiv 2412.19437).

Reference implementation: transformers' DeepseekV3ForCausalLM. Built like DeepSeek-V2 but for the router:
scores are sigmoids; a bias, which balances the load, is added to them for the choice alone; a group is as
good as its best two experts; the chosen weights are renormalised, then scaled. The layers that predict
further tokens, which checkpoints hold behind the last one, are not loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toptwo.models import deepseek_v2
from toptwo.models.checkpoint import Weights, WeightSpec
from toptwo.models.decoder import Decoder
from toptwo.models.deepseek_v2 import DeepseekConfig, read_routing, read_shape
from toptwo.models.fields import ConfigFields
from toptwo.models.weight_specs import whole
from toptwo_kernels.ops import Ops


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(DeepseekConfig):
    """The shape of a DeepSeek-V3. num_further_layers: those behind the last one that are not loaded."""

    num_further_layers: int


def read_config(raw: Mapping[str, object]) -> DeepseekV3Config:
    """See `registry.Architecture.read_config`. Reads files of transformers 4 and 5."""
    fields = ConfigFields(raw)
    fields.require("scoring_func", "sigmoid")
    fields.require("topk_method", "noaux_tc")
    routing = read_routing(
        fields,
        score="sigmoid",
        renormalize=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 2.5),
        num_groups=fields.integer("n_group", 1),
        top_groups=fields.integer("topk_group", 1),
        group_score="best_two",
    )
    shape = read_shape(
        fields, "deepseek_v3", max_position=4096, interleaved=fields.flag("rope_interleave", True)
    )
    further = "num_mtp_layers" if fields.has("num_mtp_layers") else "num_nextn_predict_layers"
    return DeepseekV3Config(**shape, routing=routing, num_further_layers=fields.integer(further, 1, low=0))


def weight_map(config: DeepseekV3Config) -> Sequence[WeightSpec]:
    """See `registry.Architecture.weight_map`."""
    return [*deepseek_v2.weight_map(config), *(_bias_spec(config, i) for i in sorted(config.sparse_layers))]


def _bias_spec(config: DeepseekV3Config, layer: int) -> WeightSpec:
    source = f"model.layers.{layer}.mlp.gate.e_score_correction"
    names = f"{source}_bias", f"{source}.bias"  # the second one is GGUF's
    return whole(f"layers.{layer}.selection_bias", (config.routing.num_experts,), "vector", *names)


def ignored_tensors(config: DeepseekV3Config) -> Sequence[str]:
    """See `registry.Architecture.ignored_tensors`."""
    first = config.num_layers
    further = [f"model.layers.{i}." for i in range(first, first + config.num_further_layers)]
    return [*deepseek_v2.ignored_tensors(config), *further]


def build(config: DeepseekV3Config, weights: Weights, max_len: int, ops: Ops) -> Decoder:
    """See `registry.Architecture.build`."""
    return deepseek_v2.build(config, weights, max_len, ops)
