"""Normalisation, and the sum that follows it in every residual stream."""

from __future__ import annotations

from torch import Tensor

from toptwo_kernels.cpu.tape import Tape


def rms_norm(tape: Tape, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """See `ops.Ops.rms_norm`."""
    return _norm(tape, x_TH, weight_H, eps, centered=False)


def layer_norm(tape: Tape, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """See `ops.Ops.layer_norm`."""
    return _norm(tape, x_TH, weight_H, eps, centered=True)


def _norm(tape: Tape, x_TH: Tensor, weight_H: Tensor, eps: float, *, centered: bool) -> Tensor:
    size = x_TH.shape[1]
    out = tape.empty(x_TH, size)
    tape.emit("norm", centered, x_TH, weight_H, eps, size, out, tape.extent_of(x_TH), step=len(x_TH))
    return out


def add(tape: Tape, x_TH: Tensor, y_TH: Tensor) -> Tensor:
    """See `ops.Ops.add`; the sum is written over y."""
    tape.emit("add", x_TH, y_TH, x_TH.shape[1], step=len(x_TH))
    return y_TH
