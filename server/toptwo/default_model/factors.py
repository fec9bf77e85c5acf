"""How the experts differ from the dense MLP, as it is shipped: low-rank factors in int8.

An expert's matrix is the dense one plus `b @ diag(scale) @ a`. Knows their names in a safetensors file and
the rounding. Must not import torch, or know how the factors were trained.

Letters in names: E experts, R rank, O rows and I columns of the matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MATRICES = ("gate", "up", "down")

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Factors:
    """The differences of one matrix in all experts. One scale serves a column of b and its row of a."""

    b_EOR: NDArray[np.int8]
    a_ERI: NDArray[np.int8]
    scale_ER: NDArray[np.float32]

    @classmethod
    def rounded(cls, b_EOR: NDArray[np.float32], a_ERI: NDArray[np.float32]) -> Factors:
        """The nearest that 255 levels can do for each column and row."""
        (b, b_scale_E1R), (a, a_scale_ER1) = _rounded(b_EOR, 1), _rounded(a_ERI, 2)
        return cls(b, a, b_scale_E1R[:, 0] * a_scale_ER1[..., 0])

    @classmethod
    def of_layer(cls, tensors: Tensors, layer: int) -> dict[str, Factors]:
        """By MATRICES; empty where the file has none, which makes all experts copies of the dense MLP.

        Raises KeyError where it has some of a layer and not all.
        """
        if name_of(layer, MATRICES[0], "scale") not in tensors:
            return {}
        return {
            matrix: cls(*(tensors[name_of(layer, matrix, part)] for part in ("b", "a", "scale")))
            for matrix in MATRICES
        }

    def named(self, layer: int, matrix: str) -> dict[str, NDArray[Any]]:
        """What `of_layer` reads."""
        parts: dict[str, NDArray[Any]] = {"b": self.b_EOR, "a": self.a_ERI, "scale": self.scale_ER}
        return {name_of(layer, matrix, part): array for part, array in parts.items()}

    def product(self) -> NDArray[np.float32]:
        """What is added to the dense matrix, [E, O, I]."""
        return (self.b_EOR * self.scale_ER[:, None]) @ self.a_ERI.astype(np.float32)


def name_of(layer: int, matrix: str, part: str) -> str:
    """Of the tensor that is one part (b, a, scale) of a matrix's factors."""
    return f"model.layers.{layer}.mlp.experts.{matrix}.{part}"


def _rounded(values: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    scale = np.abs(values).max(axis, keepdims=True) / 127
    levels = np.rint(values / np.where(scale == 0, 1, scale))
    return levels.astype(np.int8), scale.astype(np.float32)
