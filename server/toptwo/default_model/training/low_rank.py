"""A dense Llama whose MLPs are experts: frozen base matrices plus a low-rank difference for each expert.

The base is applied once per token, also on the way down, where it is linear in the weighted sum of the
experts' activations; only the low-rank parts are per expert. That makes training cheap. With one expert the
same code is a LoRA on every MLP, the control that a mixture is compared with. Must not know text or files.

Letters in names: N tokens (B sequences of T), H hidden, F FFN, E experts, R rank, K chosen experts.
Sources: LoRA, arXiv 2106.09685; sparse upcycling, arXiv 2212.05055.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from toptwo.default_model.gguf_weights import DenseGguf, Geometry


@dataclass(frozen=True)
class Plan:
    """What is trained: experts, how many a token visits, and the rank of each difference."""

    num_experts: int
    top_k: int
    rank: int


class LowRank(nn.Module):
    """The differences of one matrix [out, in] in all experts: `b_EOR @ a_ERI`, zero at first."""

    def __init__(self, plan: Plan, size_in: int, size_out: int) -> None:
        super().__init__()
        self.a_ERI = nn.Parameter(torch.randn(plan.num_experts, plan.rank, size_in) * size_in**-0.5)
        self.b_EOR = nn.Parameter(torch.zeros(plan.num_experts, size_out, plan.rank))

    def forward(self, x_NI: Tensor, share_NE: Tensor) -> Tensor:
        """What the experts add to the product, [N, out], each times its share of the token."""
        num_experts, rank, _ = self.a_ERI.shape
        inner_NER = (x_NI @ self.a_ERI.to(x_NI.dtype).flatten(0, 1).T).view(-1, num_experts, rank)
        chosen = (inner_NER * share_NE.to(x_NI.dtype)[..., None]).flatten(1)
        added: Tensor = chosen @ self.b_EOR.to(x_NI.dtype).transpose(1, 2).flatten(0, 1)
        return added


class Experts(nn.Module):
    """Router and expert differences of one layer: all that is trained."""

    def __init__(self, plan: Plan, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.top_k = plan.top_k
        self.router_EH = nn.Parameter(torch.zeros(plan.num_experts, hidden_size))
        self.gate = LowRank(plan, hidden_size, ffn_size)
        self.up = LowRank(plan, hidden_size, ffn_size)
        self.down = LowRank(plan, ffn_size, hidden_size)

    def route(self, x_NH: Tensor) -> tuple[Tensor, Tensor]:
        """(router logits [N, E], chosen experts [N, K]), as Mixtral routes."""
        logits_NE = x_NH.float() @ self.router_EH.T
        return logits_NE, logits_NE.topk(self.top_k).indices


# (experts, x [N, H]) -> (router logits [N, E], chosen experts [N, K])
Chooser = Callable[[Experts, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Layer:
    """The frozen matrices of one layer."""

    attention_norm: Tensor
    qkv: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class Trunk:
    """The frozen dense model. dtype: of its products; norms and the residual stream are float32."""

    def __init__(self, dense: DenseGguf, dtype: torch.dtype, device: torch.device) -> None:
        self.geometry: Geometry = dense.geometry
        self.dtype, self.device = dtype, device
        self.embedding_VH = torch.tensor(dense.embedding()).to(device, dtype)
        self.final_norm = torch.tensor(dense.final_norm()).to(device)
        self.layers = [self._layer(dense, index) for index in range(dense.geometry.num_layers)]

    def _layer(self, dense: DenseGguf, index: int) -> Layer:
        arrays = dense.attention_and_norms(index) | dense.mlp(index)
        parts = {name: torch.tensor(array).to(self.device) for name, array in arrays.items()}
        qkv = torch.cat([parts[f"self_attn.{name}_proj.weight"] for name in "qkv"])
        return Layer(
            parts["input_layernorm.weight"],
            qkv.to(self.dtype),
            parts["self_attn.o_proj.weight"].to(self.dtype),
            parts["post_attention_layernorm.weight"],
            *(parts[f"mlp.{name}_proj.weight"].to(self.dtype) for name in ("gate", "up", "down")),
        )

    def rotations(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [T, head_dim] of RoPE, halves repeated."""
        shape = self.geometry
        steps = torch.arange(0, shape.head_dim, 2, device=self.device) / shape.head_dim
        angles = torch.arange(length, device=self.device)[:, None] / shape.rope_theta**steps
        both = torch.cat([angles, angles], 1)
        return both.cos(), both.sin()


class Mixture(nn.Module):
    """Trunk and experts. Without experts, the dense model."""

    def __init__(self, trunk: Trunk, plan: Plan) -> None:
        super().__init__()
        self.trunk, self.plan = trunk, plan
        shape = trunk.geometry
        layers = (Experts(plan, shape.hidden_size, shape.ffn_size) for _ in range(shape.num_layers))
        modules = nn.ModuleList(layers).to(trunk.device)
        self.experts: Sequence[Experts] = modules  # type: ignore[assignment]

    def start_routers(self, router_LEH: Tensor) -> None:
        """Begin with these instead of zeros."""
        for experts, router_EH in zip(self.experts, router_LEH, strict=True):
            experts.router_EH.data.copy_(router_EH)

    def forward(self, tokens_BT: Tensor, chooser: Chooser | None) -> tuple[Tensor, list[Tensor]]:
        """(what the output matrix sees [B, T, H], router logits [N, E] per layer).

        chooser: None for the dense model; `Experts.route` for the trained routing.
        """
        trunk = self.trunk
        cos, sin = trunk.rotations(tokens_BT.shape[1])
        x_BTH = functional.embedding(tokens_BT, trunk.embedding_VH).float()
        logits = []
        for layer, experts in zip(trunk.layers, self.experts, strict=True):
            x_BTH = x_BTH + attention(trunk, layer, norm(trunk, x_BTH, layer.attention_norm), cos, sin)
            y_NH = norm(trunk, x_BTH, layer.mlp_norm).flatten(0, 1)
            if chooser is None:
                out_NH = functional.silu(y_NH @ layer.gate.T) * (y_NH @ layer.up.T) @ layer.down.T
            else:
                logits_NE, chosen_NK = chooser(experts, y_NH)
                out_NH = mix(layer, experts, y_NH, logits_NE, chosen_NK)
                logits.append(logits_NE)
            x_BTH = x_BTH + out_NH.view_as(x_BTH)
        return norm(trunk, x_BTH, trunk.final_norm), logits


def norm(trunk: Trunk, x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in float32, returned in the dtype of products."""
    return functional.rms_norm(x, weight.shape, weight, trunk.geometry.rms_norm_eps).to(trunk.dtype)


def attention(trunk: Trunk, layer: Layer, x_BTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Causal grouped-query attention with RoPE on halves, as transformers' Llama has it."""
    shape = trunk.geometry
    heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    qkv = (x_BTH @ layer.qkv.T).view(*x_BTH.shape[:2], -1, shape.head_dim).transpose(1, 2)
    query, key, value = torch.split(qkv, heads, 1)
    query, key = (rotate(part, cos, sin) for part in (query, key))
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return mixed.transpose(1, 2).flatten(2) @ layer.output.T


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on [..., T, head_dim]."""
    first, second = x.float().chunk(2, -1)
    return (torch.cat([first, second], -1) * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def mix(layer: Layer, experts: Experts, x_NH: Tensor, logits_NE: Tensor, chosen_NK: Tensor) -> Tensor:
    """The weighted sum of the chosen experts, [N, H]."""
    weight_NK = logits_NE.gather(1, chosen_NK).softmax(-1)
    gate_NF, up_NF = x_NH @ layer.gate.T, x_NH @ layer.up.T
    sum_NF, low_rank_NH = torch.zeros_like(gate_NF), torch.zeros_like(x_NH)
    for expert_N, weight_N in zip(chosen_NK.T, weight_NK.T, strict=True):
        one_NE = functional.one_hot(expert_N, logits_NE.shape[1])
        gate = gate_NF + experts.gate(x_NH, one_NE)
        act_NF = functional.silu(gate) * (up_NF + experts.up(x_NH, one_NE)) * weight_N[:, None].to(x_NH.dtype)
        low_rank_NH = low_rank_NH + experts.down(act_NF, one_NE)
        sum_NF = sum_NF + act_NF
    return sum_NF @ layer.down.T + low_rank_NH
