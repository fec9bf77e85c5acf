"""How an architecture tells the loader where its weights are in a checkpoint.

An architecture lists `WeightSpec`s under its own names. Each can be assembled in one of several
ways (per-expert tensors, one fused tensor, another naming); the loader takes the first way whose
tensors are all present. Which files hold them is the loader's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from toptwo.layers.context import StepContext

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Piece:
    """A checkpoint tensor and the part of the weight that it fills; () is all of it."""

    name: str
    into: Index = ()


@dataclass(frozen=True)
class WeightSpec:
    """One weight of a model: its name there, its shape, and the ways to assemble it, preferred first."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[tuple[Piece, ...], ...]


def whole(name: str, shape: tuple[int, ...], *checkpoint_names: str) -> WeightSpec:
    """A weight that is one checkpoint tensor, under the first of the given names that exists."""
    return WeightSpec(name, shape, tuple((Piece(source),) for source in checkpoint_names or (name,)))


class ModelConfig(Protocol):
    """What the runtime must know of any architecture's config."""

    @property
    def architecture(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position(self) -> int: ...


class CausalLM(Protocol):
    """A loaded model."""

    def forward(self, ids_T: Tensor, step: StepContext) -> Tensor:
        """Final hidden states [T, H] of the step's tokens; writes their KV."""

    def logits(self, x_RH: Tensor) -> Tensor:
        """Next-token logits [R, V] of the given hidden states, in float32."""


Weights = Mapping[str, Tensor]
