"""Rows in, rows out: token embeddings, and the choice of tokens whose logits are wanted."""

from __future__ import annotations

from torch import Tensor

from toptwo_kernels.cpu.native import FORMATS
from toptwo_kernels.cpu.tape import SELECTED, StepArrays, Tape
from toptwo_kernels.ops import Matrix


def embed(tape: Tape, table: Matrix, plan: object) -> Tensor:
    """See `ops.Ops.embed`."""
    out = tape.rows(plan.num_tokens if isinstance(plan, StepArrays) else 0, table.cols)
    tape.emit("embed", FORMATS[table.format], table.rows, table.cols, table.data, out, step=plan)
    return out


def select(tape: Tape, x_TH: Tensor, plan: object) -> Tensor:
    """See `ops.Ops.select`."""
    count = plan.arguments[2] if isinstance(plan, StepArrays) else 0
    out = tape.rows(count, x_TH.shape[1], SELECTED)
    tape.emit("select", x_TH, x_TH.shape[1], out, step=plan)
    return out
