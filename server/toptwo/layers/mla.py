"""Multi-head latent attention (arXiv 2405.04434): a token's cache is one latent vector and one turned key.

The paper makes keys and values of every head out of the latent vector. Here the matrices that would make
them move to the other side of the products: queries are brought into the latent space, and what attention
sums up there is made into values afterwards. The results are the same, and the cache is never unfolded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from toptwo.layers.context import StepContext
from toptwo_kernels.ops import LatentSpec, Matrix, Ops, Rope


@dataclass(frozen=True)
class LatentAttention:
    """Queries, latent vectors, attention between them, values, output projection.

    query: [T, H] to N heads of a part that does not turn and one of R that does.
    latent: [T, H] to [T, C + R]; only the latent vector is normalised, by latent_norm [C] and eps.
    key_up: [N, C, D], from the D dimensions that do not turn to latent ones; value_up: [N, V, C].
    """

    layer: int
    spec: LatentSpec
    query: Callable[[Tensor], Tensor]
    latent: Callable[[Tensor], Tensor]
    latent_norm: Tensor
    eps: float
    key_up: Matrix
    value_up: Matrix
    out: Callable[[Tensor], Tensor]
    rope: Rope
    ops: Ops

    def __call__(self, x_TH: Tensor, step: StepContext) -> Tensor:
        q_TX = self.ops.linear_per_head(self.query(x_TH), self.key_up)
        kv_TX = self.ops.norm_slices(self.latent(x_TH), self.latent_norm, self.eps, 0, 1)
        kv = step.kv_cache[self.layer]
        summed_TX = self.ops.latent_attention(q_TX, kv_TX, self.rope, kv, step.plan, self.spec)
        return self.out(self.ops.linear_per_head(summed_TX, self.value_up))


@dataclass(frozen=True)
class LowRankQuery:
    """A query projection in two steps, with a norm between them."""

    down: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], Tensor]
    up: Callable[[Tensor], Tensor]

    def __call__(self, x_TH: Tensor) -> Tensor:
        return self.up(self.norm(self.down(x_TH)))
