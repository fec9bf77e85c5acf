"""The experts of a layer as one fused operation."""

from __future__ import annotations

from torch import Tensor

from toptwo_kernels.cpu.native import ACTIVATIONS, FORMATS
from toptwo_kernels.cpu.tape import Tape
from toptwo_kernels.ops import ExpertWeights, Routing


def experts(tape: Tape, x_TH: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """See `ops.Ops.experts`."""
    gate_up, down = weights.gate_up, weights.down
    if weights.activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {weights.activation!r}")
    if gate_up.format != down.format or not gate_up.paired:
        raise ValueError("gate_up must be paired, and of down's format")
    out = tape.empty(x_TH, down.rows)
    chosen = routing.ids_TK, routing.weights_TK, routing.ids_TK.shape[1], routing.counts_E
    stack = FORMATS[down.format], down.rows, down.cols, gate_up.data, down.data, gate_up.num_matrices
    rule = ACTIVATIONS[weights.activation], weights.gate_up_bias_EF, weights.down_bias_EH, weights.limit
    tape.emit("experts", x_TH, *chosen, *stack, *rule, out, step=len(x_TH))
    return out
