"""Rows in, rows out: token embeddings, and the choice of tokens whose logits are wanted."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from toptwo_kernels.ops import Matrix
from toptwo_kernels.reference.plan import Plan


def embed(table: Matrix, plan: object) -> Tensor:
    """See `ops.Ops.embed`."""
    return table.data[0][cast(Plan, plan).batch.ids_T]


def select(x_TH: Tensor, plan: object) -> Tensor:
    """See `ops.Ops.select`."""
    return x_TH[cast(Plan, plan).batch.selected_S]
