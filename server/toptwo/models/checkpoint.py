"""How an architecture tells the loader where its weights are in a checkpoint.

An architecture lists `WeightSpec`s under its own names. Each can be assembled in one of several
ways (per-expert tensors, one fused tensor, another naming); the loader takes the first way whose
tensors are all present. Which files hold them, and in which number format, is the loader's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from torch import Tensor

from toptwo.layers.context import StepContext
from toptwo_kernels.ops import KVShape, Matrix

T = TypeVar("T")
Index = tuple[int | slice, ...]
Source = tuple["Piece", ...]
"""Tensors that together make up a weight."""


@dataclass(frozen=True)
class Piece:
    """A checkpoint tensor and the part of the weight that it fills; () is all of it.

    view: applied to the tensor first, where the checkpoint orders its numbers in another way. It must only
    index, reshape and permute, so that shapes can be checked without reading anything.
    """

    name: str
    into: Index = ()
    view: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)


Role = Literal["matrix", "paired", "head", "router", "vector"]
"""What a weight is used for, which decides its format: "matrix" and "paired" (gates, then ups) take the
model's weight format; "head" (embeddings and the output projection) keeps 8 bits where others have 4;
"router" is a float32 matrix; "vector" is a plain float32 tensor: norms, biases."""


@dataclass(frozen=True)
class WeightSpec:
    """One weight of a model: its name there, shape and use, and the ways to assemble it, preferred first."""

    name: str
    shape: tuple[int, ...]
    role: Role
    sources: tuple[Source, ...]


class ModelConfig(Protocol):
    """What the runtime must know of any architecture's config."""

    @property
    def architecture(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def kv_shape(self) -> KVShape: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position(self) -> int: ...
    @property
    def experts_per_token(self) -> int:
        """Of those that a layer chooses from; 1 where there is no choice."""


class CausalLM(Protocol):
    """A loaded model. It calls nothing but ops on activations, so that a backend can record it."""

    @property
    def layers(self) -> Sequence[object]:
        """Its decoder layers: dataclasses of their parts."""

    def forward(self, step: StepContext) -> Tensor:
        """Final hidden states [T, H] of the step's tokens; writes their KV."""

    def logits(self, x_SH: Tensor) -> Tensor:
        """Next-token logits [S, V] of the given hidden states."""


@dataclass(frozen=True)
class Weights:
    """A model's weights by the names of its `WeightSpec`s."""

    matrices: Mapping[str, Matrix]
    vectors: Mapping[str, Tensor]

    def under(self, prefix: str) -> Weights:
        """Those whose names begin with `prefix` and a dot, by the rest of their names."""
        start = f"{prefix}."
        return Weights(_under(self.matrices, start), _under(self.vectors, start))


def _under(named: Mapping[str, T], start: str) -> dict[str, T]:
    return {name.removeprefix(start): value for name, value in named.items() if name.startswith(start)}
