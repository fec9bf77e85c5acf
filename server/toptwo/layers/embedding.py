"""Token embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Embedding:
    """Row lookup in the [V, H] table."""

    weight_VH: Tensor

    def __call__(self, ids_T: Tensor) -> Tensor:
        return self.weight_VH[ids_T]
