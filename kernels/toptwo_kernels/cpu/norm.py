"""Normalisation."""

from __future__ import annotations

from torch import Tensor

from toptwo_kernels.cpu.tape import Tape


def rms_norm(tape: Tape, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """See `ops.Ops.rms_norm`."""
    size = x_TH.shape[1]
    out, slices = tape.empty(x_TH, size), (size, 0, 1)
    extent = tape.extent_of(x_TH)
    tape.emit("norm", False, x_TH, weight_H, None, eps, size, *slices, out, extent, step=len(x_TH))
    return out


def layer_norm(
    tape: Tape, x_TH: Tensor, weight_H: Tensor, eps: float, bias_H: Tensor | None = None
) -> Tensor:
    """See `ops.Ops.layer_norm`."""
    size = x_TH.shape[1]
    out, slices = tape.empty(x_TH, size), (size, 0, 1)
    extent = tape.extent_of(x_TH)
    tape.emit("norm", True, x_TH, weight_H, bias_H, eps, size, *slices, out, extent, step=len(x_TH))
    return out


def norm_slices(tape: Tape, x_TX: Tensor, weight_W: Tensor, eps: float, first: int, count: int) -> Tensor:
    """See `ops.Ops.norm_slices`; in place."""
    slices = x_TX.shape[1], first, count
    extent = tape.extent_of(x_TX)
    tape.emit("norm", False, x_TX, weight_W, None, eps, len(weight_W), *slices, x_TX, extent, step=len(x_TX))
    return x_TX
