"""The reference backend: plain torch, readable before fast, on any device and in any dtype.

It batches (an expert runs once for all of its tokens) but leaves the matrix products to torch, whose
reduction order changes with the batch: rows agree to rounding, not bit by bit.
"""

from toptwo_kernels.reference.attention import attention, plan_attention, write_kv
from toptwo_kernels.reference.experts import experts
from toptwo_kernels.reference.linear import linear
from toptwo_kernels.reference.norm import rms_norm
from toptwo_kernels.reference.rope import apply_rope
from toptwo_kernels.reference.route import route
from toptwo_kernels.reference.sampling import sample

__all__ = [
    "apply_rope",
    "attention",
    "experts",
    "linear",
    "plan_attention",
    "rms_norm",
    "route",
    "sample",
    "write_kv",
]
