"""Room for the paged cache. A head's tokens of a block lie together, and are loaded in one stretch."""

from __future__ import annotations

import torch

from toptwo_kernels.cuda.device import Device
from toptwo_kernels.ops import HeadShape, KVCache, KVShape

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def allocate_kv(
    device: Device, num_blocks: int, block_size: int, shape: KVShape, dtype: torch.dtype
) -> KVCache:
    """See `ops.Ops.allocate_kv`: keys and values [B, M, S, D], or latents with their keys [B, S, C + R].

    float8_e4m3fn holds numbers as they are, without a scale: rounded to 4 bits, and cut off at 448.
    Raises ValueError for a dtype that is none of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"the CUDA backend keeps no KV cache of {dtype}")
    if isinstance(shape, HeadShape):
        size = num_blocks, shape.num_kv_heads, block_size, shape.head_dim
        return tuple(torch.empty(size, dtype=dtype, device=device.torch_device) for _ in range(2))
    return (torch.empty(num_blocks, block_size, shape.kv_size, dtype=dtype, device=device.torch_device),)
