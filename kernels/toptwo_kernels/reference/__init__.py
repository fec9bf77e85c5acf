"""The reference backend: plain torch, readable before fast, on any device and in any dtype.

It batches (an expert runs once for all of its tokens) but leaves the matrix products to torch, whose
reduction order changes with the batch: rows agree to rounding, not bit by bit.
"""

from toptwo_kernels.reference.attention import allocate_kv, attention, plan_step
from toptwo_kernels.reference.embedding import embed, select
from toptwo_kernels.reference.experts import experts
from toptwo_kernels.reference.linear import linear, pack
from toptwo_kernels.reference.norm import add, layer_norm, rms_norm
from toptwo_kernels.reference.route import route
from toptwo_kernels.reference.sampling import sample

__all__ = [
    "add",
    "allocate_kv",
    "attention",
    "embed",
    "experts",
    "layer_norm",
    "linear",
    "pack",
    "plan_step",
    "rms_norm",
    "route",
    "sample",
    "select",
]
