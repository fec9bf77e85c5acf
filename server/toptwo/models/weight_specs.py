"""Weight specs that many architectures share: one tensor, rows of several, attention, experts.

Knows the shapes that weights have in checkpoints; names that only one architecture uses stay with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from toptwo.models.checkpoint import Piece, Role, Source, WeightSpec
from toptwo_kernels.ops import HeadShape


def whole(
    name: str,
    shape: tuple[int, ...],
    role: Role,
    *checkpoint_names: str,
    view: Callable[[Tensor], Tensor] | None = None,
) -> WeightSpec:
    """A weight that is one checkpoint tensor, under the first of the given names that exists."""
    sources = tuple((Piece(source, view=view),) for source in checkpoint_names or (name,))
    return WeightSpec(name, shape, role, sources)


def joined_rows(parts: Sequence[tuple[str, int]], ends_with: str = "") -> Source:
    """Tensors one behind the other: pairs of a name, to which `ends_with` is added, and its rows."""
    ends = accumulate(rows for _, rows in parts)
    return tuple(
        Piece(name + ends_with, (slice(end - rows, end),))
        for (name, rows), end in zip(parts, ends, strict=True)
    )


def attention_specs(
    ours: str, prefix: str, heads: HeadShape, hidden: int, *, qkv_bias: bool = False, out_bias: bool = False
) -> list[WeightSpec]:
    """`qkv`, `out` and their biases under `ours`, from {q,k,v,o}_proj under `prefix`."""
    q_rows, kv_rows = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    rows = q_rows + 2 * kv_rows
    parts = [(f"{prefix}.q_proj", q_rows), (f"{prefix}.k_proj", kv_rows), (f"{prefix}.v_proj", kv_rows)]
    specs = [
        WeightSpec(f"{ours}.qkv", (rows, hidden), "matrix", (joined_rows(parts, ".weight"),)),
        whole(f"{ours}.out", (hidden, q_rows), "matrix", f"{prefix}.o_proj.weight"),
    ]
    if qkv_bias:
        specs.append(WeightSpec(f"{ours}.qkv_bias", (rows,), "vector", (joined_rows(parts, ".bias"),)))
    if out_bias:
        specs.append(whole(f"{ours}.out_bias", (hidden,), "vector", f"{prefix}.o_proj.bias"))
    return specs


def qk_norm_specs(ours: str, prefix: str, q_width: int, k_width: int) -> list[WeightSpec]:
    """`q_norm` and `k_norm` under `ours`, from the same under `prefix`."""
    return [
        whole(f"{ours}.q_norm", (q_width,), "vector", f"{prefix}.q_norm.weight"),
        whole(f"{ours}.k_norm", (k_width,), "vector", f"{prefix}.k_norm.weight"),
    ]


@dataclass(frozen=True)
class ExpertSize:
    """E experts [F, H] and [H, F]."""

    num_experts: int
    ffn_size: int
    hidden_size: int


@dataclass(frozen=True)
class ExpertNames:
    """How a checkpoint names a layer's experts: `prefix`.{e}.`gate`.weight and so on, or, where all experts
    of a layer are in one tensor, `prefix`.`gate`.weight."""

    prefix: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def gate_up_sources(self, size: ExpertSize) -> tuple[Source, ...]:
        experts, ffn = range(size.num_experts), size.ffn_size
        gates, ups = slice(0, ffn), slice(ffn, None)
        one_by_one = [Piece(f"{self.prefix}.{e}.{self.gate}.weight", (e, gates)) for e in experts]
        one_by_one += [Piece(f"{self.prefix}.{e}.{self.up}.weight", (e, ups)) for e in experts]
        stacked = (
            Piece(f"{self.prefix}.{self.gate}.weight", (slice(None), gates)),
            Piece(f"{self.prefix}.{self.up}.weight", (slice(None), ups)),
        )
        return tuple(one_by_one), stacked

    def down_sources(self, size: ExpertSize) -> tuple[Source, ...]:
        one_by_one = [Piece(f"{self.prefix}.{e}.{self.down}.weight", (e,)) for e in range(size.num_experts)]
        return tuple(one_by_one), (Piece(f"{self.prefix}.{self.down}.weight"),)


def expert_specs(
    ours: str, size: ExpertSize, *names: ExpertNames, fused: tuple[str, str] | None = None
) -> list[WeightSpec]:
    """`gate_up` and `down` under `ours`, under the first of the namings that is there.

    fused: names of tensors that hold all gates and ups [E, 2F, H], and all downs [E, H, F].
    """
    gate_up = tuple(source for each in names for source in each.gate_up_sources(size))
    down = tuple(source for each in names for source in each.down_sources(size))
    if fused:
        gate_up, down = (*gate_up, (Piece(fused[0]),)), (*down, (Piece(fused[1]),))
    return [
        WeightSpec(
            f"{ours}.gate_up", (size.num_experts, 2 * size.ffn_size, size.hidden_size), "paired", gate_up
        ),
        WeightSpec(f"{ours}.down", (size.num_experts, size.hidden_size, size.ffn_size), "matrix", down),
    ]


def mlp_specs(ours: str, prefix: str, ffn: int, hidden: int) -> list[WeightSpec]:
    """`gate_up` and `down` of one gated network, from {gate,up,down}_proj under `prefix`."""
    parts = [(f"{prefix}.gate_proj", ffn), (f"{prefix}.up_proj", ffn)]
    return [
        WeightSpec(f"{ours}.gate_up", (2 * ffn, hidden), "paired", (joined_rows(parts, ".weight"),)),
        whole(f"{ours}.down", (hidden, ffn), "matrix", f"{prefix}.down_proj.weight"),
    ]
