"""Operations on single numbers of the residual stream, projections and logits; in place."""

from __future__ import annotations

from torch import Tensor

from toptwo_kernels.cpu.tape import Tape


def add(tape: Tape, x_TH: Tensor, y_TH: Tensor) -> Tensor:
    """See `ops.Ops.add`; the sum is written over y."""
    tape.emit("add", x_TH, y_TH, x_TH.shape[1], tape.extent_of(y_TH), step=len(x_TH))
    return y_TH


def scale(tape: Tape, x_TH: Tensor, factor: float) -> Tensor:
    """See `ops.Ops.scale`."""
    tape.emit("scale", x_TH, factor, x_TH.shape[1], tape.extent_of(x_TH), step=len(x_TH))
    return x_TH


def clamp(tape: Tape, x_TH: Tensor, limit: float) -> Tensor:
    """See `ops.Ops.clamp`."""
    tape.emit("clamp", x_TH, limit, x_TH.shape[1], tape.extent_of(x_TH), step=len(x_TH))
    return x_TH
