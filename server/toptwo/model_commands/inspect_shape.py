"""How large a model is, and how much of it a token needs: arithmetic on an architecture's `weight_map`.

Knows what roles and the shared names of weight specs mean, and no architecture; must not know files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from toptwo.models.checkpoint import ModelConfig, WeightSpec

EXPERT_PARTS = ("gate_up", "gate_up_bias", "down", "down_bias")


@dataclass(frozen=True)
class Shape:
    """A model's sizes. Widths of its networks are None where it has no such.

    expert_layers: those with a choice of experts. experts, experts_per_token: in one of them; 1 and 1 in a
    dense model. shared_expert_ffn_size: of all experts together that every token visits besides.
    active_parameters: all but those of experts that a token does not choose. Some publish them with the input
    embedding, of which a token needs a row, and some without; where it is also the head, it counts in both.
    """

    architecture: str
    layers: int
    expert_layers: int
    hidden_size: int
    vocab_size: int
    experts: int
    experts_per_token: int
    expert_ffn_size: int | None
    shared_expert_ffn_size: int | None
    dense_ffn_size: int | None
    context_tokens: int
    parameters: int
    active_parameters: int
    active_parameters_without_input_embedding: int


def measure_shape(config: ModelConfig, specs: Sequence[WeightSpec]) -> Shape:
    """Everything about `config` that its weights tell."""
    stacks = _stacks(specs)
    experts = max((spec.shape[0] for spec in stacks.values()), default=1)
    networks = [spec for spec in specs if spec.role == "paired" and len(spec.shape) == 2]
    shared = [spec for spec in networks if any(spec.name.startswith(f"{prefix}.") for prefix in stacks)]
    dense = [spec for spec in networks if spec not in shared]
    active = active_specs(config, specs)
    return Shape(
        architecture=config.architecture,
        layers=config.num_layers,
        expert_layers=len(stacks),
        hidden_size=next(spec.shape[1] for spec in specs if spec.name == "embed"),
        vocab_size=config.vocab_size,
        experts=experts,
        experts_per_token=config.experts_per_token if stacks else 1,
        expert_ffn_size=_ffn_size(stacks.values()),
        shared_expert_ffn_size=_ffn_size(shared),
        dense_ffn_size=_ffn_size(dense),
        context_tokens=config.max_position,
        parameters=_count(specs),
        active_parameters=_count(active),
        active_parameters_without_input_embedding=_count(read_specs(active)),
    )


def active_specs(config: ModelConfig, specs: Sequence[WeightSpec]) -> list[WeightSpec]:
    """The weights as if each layer had no more experts than a token chooses."""
    stacks = _stacks(specs)

    def cut(spec: WeightSpec) -> WeightSpec:
        prefix, _, part = spec.name.rpartition(".")
        if prefix not in stacks or part not in EXPERT_PARTS:
            return spec
        return replace(spec, shape=(config.experts_per_token, *spec.shape[1:]))

    return [cut(spec) for spec in specs]


def read_specs(active: Sequence[WeightSpec]) -> list[WeightSpec]:
    """Those of the active weights that are read whole: not an embedding that is no head as well."""
    tied = sum(spec.role == "head" for spec in active) == 1
    return [spec for spec in active if tied or spec.name != "embed"]


def _stacks(specs: Sequence[WeightSpec]) -> dict[str, WeightSpec]:
    """The gates and ups of all experts, [E, 2F, H], by the layer's prefix."""
    stacked = [spec for spec in specs if spec.role == "paired" and len(spec.shape) == 3]
    return {spec.name.rpartition(".")[0]: spec for spec in stacked}


def _ffn_size(paired: Iterable[WeightSpec]) -> int | None:
    return max((spec.shape[-2] // 2 for spec in paired), default=None)


def _count(specs: Sequence[WeightSpec]) -> int:
    return sum(prod(spec.shape) for spec in specs)
