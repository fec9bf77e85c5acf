"""The reference backend: plain torch, readable before fast, on any device and in any dtype.

It batches (an expert runs once for all of its tokens) but leaves the matrix products to torch, whose
reduction order changes with the batch: rows agree to rounding, not bit by bit.
"""

from toptwo_kernels.reference.attention import attention
from toptwo_kernels.reference.elementwise import add, clamp, scale
from toptwo_kernels.reference.embedding import embed, select
from toptwo_kernels.reference.experts import experts
from toptwo_kernels.reference.kv_cache import allocate_kv
from toptwo_kernels.reference.latent_attention import latent_attention
from toptwo_kernels.reference.linear import linear, linear_per_head, pack
from toptwo_kernels.reference.norm import layer_norm, norm_slices, rms_norm
from toptwo_kernels.reference.plan import plan_step
from toptwo_kernels.reference.route import route
from toptwo_kernels.reference.sampling import sample

__all__ = [
    "add",
    "allocate_kv",
    "attention",
    "clamp",
    "embed",
    "experts",
    "latent_attention",
    "layer_norm",
    "linear",
    "linear_per_head",
    "norm_slices",
    "pack",
    "plan_step",
    "rms_norm",
    "route",
    "sample",
    "scale",
    "select",
]
