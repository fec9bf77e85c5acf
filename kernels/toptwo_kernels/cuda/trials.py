"""Which configurations are fastest for the products of a model: each is tried on its own weights."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.experts import keys, multiply_down, multiply_gate_up, order_pairs
from toptwo_kernels.cuda.linear import key, multiply_heads
from toptwo_kernels.cuda.tuning import Config, Key
from toptwo_kernels.ops import ExpertWeights, Matrix, Routing

_REPEATS = 9
_FLUSHED = 512 << 20  # bytes written between repeats: more than any L2 cache, and longer than a launch takes


@dataclass(frozen=True)
class Products:
    """What a model multiplies with. One matrix of each shape is enough; more cost nothing.

    matrices: of `linear` and `linear_per_head`. experts: stacks of them, and how many of each a token gets.
    dtype: of the activations.
    """

    matrices: list[Matrix]
    experts: list[tuple[ExpertWeights, int]]
    dtype: torch.dtype


def tune_products(
    device: Device,
    products: Products,
    tokens: Sequence[int],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Try all candidates for steps of so many tokens, and keep the fastest.

    Seconds for each shape and number of tokens, most of them for compiling. Under the interpreter nothing is
    tried. on_progress is told how many of how many are done.
    """
    if device.interpreted:
        return
    trials = _Trials(device, products.dtype)
    total = len(tokens) * (len(products.matrices) + len(products.experts))
    done = itertools.count(1)
    for num_tokens in tokens:
        for matrix in products.matrices:
            trials.try_matrix(matrix, num_tokens)
            on_progress(next(done), total)
        for weights, top_k in products.experts:
            trials.try_experts(weights, num_tokens, top_k)
            on_progress(next(done), total)
    device.tuner.save()


class _Trials:
    """tried: keys that need no more trials."""

    def __init__(self, device: Device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._tried: set[Key] = set()
        self._flushed = torch.empty(_FLUSHED, dtype=torch.uint8, device=device.torch_device)

    def try_matrix(self, matrix: Matrix, num_tokens: int) -> None:
        x_TX = self._normal(num_tokens, matrix.num_matrices * matrix.cols)
        self._try(
            key(matrix, num_tokens), lambda config: multiply_heads(self._device, x_TX, matrix, None, config)
        )

    def try_experts(self, weights: ExpertWeights, num_tokens: int, top_k: int) -> None:
        """With the tokens spread evenly, as far as chance does that."""
        device, where = self._device, self._device.torch_device
        order = torch.rand(num_tokens, weights.gate_up.num_matrices, device=where).argsort(1)
        ids_TK = order[:, :top_k].to(torch.int32).contiguous()
        routing = Routing(ids_TK, torch.full(ids_TK.shape, 1 / top_k, device=where))
        pairs = order_pairs(device, routing, weights)
        x_TH = self._normal(num_tokens, weights.gate_up.cols)
        hidden_PF = self._normal(ids_TK.numel(), weights.down.cols)
        first, second = keys(weights, routing)
        self._try(first, lambda config: multiply_gate_up(device, x_TH, pairs, weights, config))
        self._try(second, lambda config: multiply_down(device, hidden_PF, pairs, weights, config))

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self._dtype, device=self._device.torch_device)

    def _try(self, tried: Key, run: Callable[[Config], Tensor]) -> None:
        if tried not in self._tried:
            self._tried.add(tried)
            self._device.tuner.tune(tried, lambda config: self._measure(config, run))

    def _measure(self, config: Config, run: Callable[[Config], Tensor]) -> float | None:
        """The median of a few runs with an empty cache, in milliseconds."""
        try:
            run(config)
        except (CompilationError, OutOfResources, PTXASError):
            return None
        event: Any = torch.cuda.Event
        pairs = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(_REPEATS)]
        for start, end in pairs:
            self._flushed.zero_()
            start.record()
            run(config)
            end.record()
        torch.cuda.synchronize()
        return float(statistics.median(start.elapsed_time(end) for start, end in pairs))
