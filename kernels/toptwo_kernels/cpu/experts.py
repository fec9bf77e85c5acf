"""The experts of a layer as one fused operation."""

from __future__ import annotations

from torch import Tensor

from toptwo_kernels.cpu.native import FORMATS
from toptwo_kernels.cpu.tape import Tape
from toptwo_kernels.ops import Activation, Matrix, Routing


def experts(
    tape: Tape, x_TH: Tensor, routing: Routing, gate_up: Matrix, down: Matrix, activation: Activation
) -> Tensor:
    """See `ops.Ops.experts`."""
    if activation != "silu":
        raise ValueError(f"unknown activation {activation!r}")
    if gate_up.format != down.format or not gate_up.paired:
        raise ValueError("gate_up must be paired, and of down's format")
    out = tape.empty(x_TH, down.rows)
    sizes = FORMATS[down.format], down.rows, down.cols
    tape.emit(
        "experts",
        x_TH,
        routing.ids_TK,
        routing.weights_TK,
        *sizes,
        gate_up.data,
        down.data,
        gate_up.num_matrices,
        routing.ids_TK.shape[1],
        out,
        step=len(x_TH),
    )
    return out
