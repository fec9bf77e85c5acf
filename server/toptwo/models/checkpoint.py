"""How an architecture tells the loader where its weights are in a checkpoint.

An architecture lists `WeightSpec`s under its own names. Each can be assembled in one of several
ways (per-expert tensors, one fused tensor, another naming); the loader takes the first way whose
tensors are all present. Which files hold them is the loader's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from toptwo.layers.context import StepContext
from toptwo_kernels.ops import HeadShape, Matrix

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Piece:
    """A checkpoint tensor and the part of the weight that it fills; () is all of it."""

    name: str
    into: Index = ()


Role = Literal["matrix", "paired", "head", "router", "vector"]
"""What a weight is used for, which decides its format: "matrix" and "paired" (gates, then ups) take the
model's weight format; "head" (embeddings and the output projection) keeps 8 bits where others have 4;
"router" is a float32 matrix; "vector" is a plain float32 tensor."""


@dataclass(frozen=True)
class WeightSpec:
    """One weight of a model: its name there, shape and use, and the ways to assemble it, preferred first."""

    name: str
    shape: tuple[int, ...]
    role: Role
    sources: tuple[tuple[Piece, ...], ...]


def whole(name: str, shape: tuple[int, ...], role: Role, *checkpoint_names: str) -> WeightSpec:
    """A weight that is one checkpoint tensor, under the first of the given names that exists."""
    return WeightSpec(name, shape, role, tuple((Piece(source),) for source in checkpoint_names or (name,)))


class ModelConfig(Protocol):
    """What the runtime must know of any architecture's config."""

    @property
    def architecture(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def heads(self) -> HeadShape: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position(self) -> int: ...


class CausalLM(Protocol):
    """A loaded model. It calls nothing but ops on activations, so that a backend can record it."""

    def forward(self, step: StepContext) -> Tensor:
        """Final hidden states [T, H] of the step's tokens; writes their KV."""

    def logits(self, x_SH: Tensor) -> Tensor:
        """Next-token logits [S, V] of the given hidden states."""


@dataclass(frozen=True)
class Weights:
    """A model's weights by the names of its `WeightSpec`s."""

    matrices: Mapping[str, Matrix]
    vectors: Mapping[str, Tensor]
