"""The backend as a whole: its functions, bound to a device. Imports every kernel, and so Triton."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from toptwo_kernels.cuda.attention import attention
from toptwo_kernels.cuda.device import open_device
from toptwo_kernels.cuda.elementwise import add, clamp, scale
from toptwo_kernels.cuda.embedding import embed, select
from toptwo_kernels.cuda.experts import experts
from toptwo_kernels.cuda.graphs import record
from toptwo_kernels.cuda.kv_cache import allocate_kv
from toptwo_kernels.cuda.latent_attention import latent_attention
from toptwo_kernels.cuda.linear import linear, linear_per_head
from toptwo_kernels.cuda.norm import layer_norm, norm_slices, rms_norm
from toptwo_kernels.cuda.packing import pack
from toptwo_kernels.cuda.plan import plan_step
from toptwo_kernels.cuda.route import route
from toptwo_kernels.cuda.sampling import sample
from toptwo_kernels.cuda.trials import tune_products
from toptwo_kernels.ops import Ops

__all__ = ["create"]

_FUNCTIONS = (
    add,
    allocate_kv,
    attention,
    clamp,
    embed,
    experts,
    latent_attention,
    layer_norm,
    linear,
    linear_per_head,
    norm_slices,
    pack,
    plan_step,
    record,
    rms_norm,
    route,
    sample,
    scale,
    select,
    tune_products,
)


def create(tuning_directory: Path | None = None) -> Ops:
    """The backend on the first CUDA device.

    tuning_directory: where measured launch configurations are kept; None to keep none.
    Raises ValueError when there is no such device.
    """
    device = open_device(tuning_directory)
    functions = {function.__name__: partial(function, device) for function in _FUNCTIONS}
    return cast(Ops, SimpleNamespace(device=device, **functions))
