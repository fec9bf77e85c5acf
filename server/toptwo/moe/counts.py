"""Which experts the tokens went to: every layer's own counts, found in a model of any architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass

from torch import Tensor

from toptwo.moe.layer import MoELayer


def expert_counts(layers: Sequence[object]) -> dict[int, Tensor]:
    """The counts [E] of each layer that has experts to choose from, by its place in the model.

    They are the ones that every step adds to. Dense and shared networks count nothing.
    """
    found = {at: _find(layer) for at, layer in enumerate(layers)}
    return {at: moe.counts_E for at, moe in found.items() if moe is not None}


def _find(part: object) -> MoELayer | None:
    """Architectures differ in what a layer is made of; all of it is dataclasses."""
    if isinstance(part, MoELayer):
        return part
    if not is_dataclass(part):
        return None
    return next((moe for each in fields(part) if (moe := _find(getattr(part, each.name)))), None)
