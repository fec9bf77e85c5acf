"""A model of random weights that uses every operation of a backend, in the order of a model's layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from native import heads_spec, normal, rope_tables
from toptwo_kernels.ops import (
    ExpertWeights,
    HeadShape,
    LatentShape,
    LatentSpec,
    RouterSpec,
    RouterWeights,
    WeightFormat,
)


class EveryOperation:
    """A plain layer, one of windows, groups and biases, and one over latent vectors."""

    hidden, ffn, vocab = 36, 20, 50
    heads, latents = HeadShape(4, 2, 8), LatentShape(3, 16, 8)

    def __init__(self, ops: Any, weight_format: WeightFormat) -> None:
        seeds = iter(range(1, 100))

        def pack(*shape: int, paired: bool = False) -> Any:
            return ops.pack(normal(*shape, seed=next(seeds)), weight_format, paired=paired)

        self.ops, hidden, ffn = ops, self.hidden, self.ffn
        self.table, self.head = pack(self.vocab, hidden), pack(self.vocab, hidden)
        self.qkv, self.out = pack(64, hidden), pack(hidden, 32)
        self.q, self.kv = pack(3 * (12 + 8), hidden), pack(16 + 8, hidden)
        self.to_latent, self.from_latent = pack(3, 16, 12), pack(3, 5, 16)
        self.latent_out = pack(hidden, 15)
        self.router = ops.pack(normal(6, hidden, seed=next(seeds)), "float32")
        self.gate_up, self.down = pack(6, 2 * ffn, hidden, paired=True), pack(6, hidden, ffn)
        self.rope = rope_tables(64, 8)
        self.norms = [normal(size, seed=next(seeds)) for size in (hidden, 8, 16)]
        self.biases = {
            name: normal(width, seed=next(seeds)) for name, width in (("qkv", 64), ("hidden", hidden))
        }
        self.router_biases = normal(2, 6, seed=next(seeds))
        self.expert_biases = normal(6, 2 * ffn, seed=next(seeds)), normal(6, hidden, seed=next(seeds))
        self.plain = heads_spec(self.heads)
        self.featured = heads_spec(self.heads, window=20, soft_cap=5.0, sinks_N=normal(4, seed=next(seeds)))

    def allocate(self) -> list[Any]:
        return [
            self.ops.allocate_kv(4, 16, shape, torch.float32)
            for shape in (self.heads, self.heads, self.latents)
        ]

    def __call__(self, plan: object, kv: list[Any]) -> Tensor:
        x = self.ops.scale(self.ops.embed(self.table, plan), 2.5)
        for layer in (self._plain, self._featured, self._latent):  # buffers are used again
            x = layer(x, plan, kv)
        selected = self.ops.rms_norm(self.ops.select(x, plan), self.norms[0], 1e-5)
        logits = self.ops.linear(self.ops.norm_slices(selected, self.norms[1], 1e-5, 4, 2), self.head)
        result: Tensor = self.ops.clamp(self.ops.scale(self.ops.add(logits, logits), 0.3), 4.0)
        return result

    def _plain(self, x: Tensor, plan: object, kv: list[Any]) -> Tensor:
        ops, (weight, _, _) = self.ops, self.norms
        qkv = ops.linear(ops.rms_norm(x, weight, 1e-5), self.qkv)
        x = ops.add(x, ops.linear(ops.attention(qkv, self.rope, kv[0], plan, self.plain), self.out))
        normed = ops.layer_norm(x, weight, 1e-5)
        routing = ops.route(normed, RouterWeights(self.router), RouterSpec(6, 2))
        added: Tensor = ops.add(x, ops.experts(normed, routing, ExpertWeights(self.gate_up, self.down)))
        return added

    def _featured(self, x: Tensor, plan: object, kv: list[Any]) -> Tensor:
        ops, bias = self.ops, self.biases["hidden"].clone()  # kept by the recording alone
        qkv = ops.linear(ops.layer_norm(x, self.norms[0], 1e-5, bias), self.qkv, self.biases["qkv"])
        qkv = ops.clamp(ops.norm_slices(qkv, self.norms[1], 1e-5, 0, 6), 1.5)
        attended = ops.attention(qkv, self.rope, kv[1], plan, self.featured)
        x = ops.add(x, ops.linear(attended, self.out, bias))
        spec = RouterSpec(6, 3, "sigmoid", num_groups=3, top_groups=2, group_score="best_two")
        routing = ops.route(x, RouterWeights(self.router, *self.router_biases), spec)
        weights = ExpertWeights(self.gate_up, self.down, "clamped_swiglu", *self.expert_biases, limit=3.0)
        added: Tensor = ops.add(x, ops.experts(x, routing, weights))
        return added

    def _latent(self, x: Tensor, plan: object, kv: list[Any]) -> Tensor:
        ops = self.ops
        q = ops.linear_per_head(ops.linear(x, self.q), self.to_latent)
        latents = ops.norm_slices(ops.linear(x, self.kv), self.norms[2], 1e-5, 0, 1)
        attended = ops.latent_attention(q, latents, self.rope, kv[2], plan, LatentSpec(self.latents, 0.4))
        x = ops.add(x, ops.linear(ops.linear_per_head(attended, self.from_latent), self.latent_out))
        routing = ops.route(x, RouterWeights(self.router), RouterSpec(6, 2, "sparsemixer", jitter=0.2))
        weights = ExpertWeights(self.gate_up, self.down, "gelu_tanh")
        added: Tensor = ops.add(x, ops.experts(x, routing, weights))
        return added
