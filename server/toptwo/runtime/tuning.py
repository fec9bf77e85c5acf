"""Kernel configurations that are measured for a model, where a backend has any to choose from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from toptwo.layers.feed_forward import FeedForward
from toptwo.models.checkpoint import CausalLM, Weights
from toptwo.moe.layer import MoELayer
from toptwo.runtime.device import RuntimeConfig
from toptwo_kernels.ops import ExpertWeights, Ops


def tune(
    model: CausalLM,
    weights: Weights,
    config: RuntimeConfig,
    ops: Ops,
    on_progress: Callable[[int, int], None],
) -> None:
    """Find and keep what is fastest for steps of every size."""
    from toptwo_kernels.cuda.trials import Products  # needs Triton, which others do not

    networks = [network for layer in model.layers for network in _networks(layer)]
    in_networks = {id(matrix) for each, _ in networks for matrix in (each.gate_up, each.down)}
    products = Products(
        matrices=[matrix for matrix in weights.matrices.values() if id(matrix) not in in_networks],
        experts=networks,
        dtype=torch.float32 if config.dtype == "float32" else torch.bfloat16,
    )
    sizes = [1 << power for power in range(12) if 1 << power <= config.max_step_tokens]
    backend: Any = ops
    backend.tune_products(products, sizes, on_progress)


def _networks(part: object) -> Iterator[tuple[ExpertWeights, int]]:
    """Experts of a layer, and how many of them a token gets. All that a layer consists of is dataclasses."""
    if isinstance(part, MoELayer):
        yield part.experts.weights, part.router.spec.top_k
    elif isinstance(part, FeedForward):
        yield part.weights, 1
    elif is_dataclass(part):
        for each in fields(part):
            yield from _networks(getattr(part, each.name))
