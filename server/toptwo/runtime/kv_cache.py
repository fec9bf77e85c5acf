"""The memory of the paged KV cache. The engine says who owns a block, the backend how it is laid out."""

from __future__ import annotations

import torch

from toptwo.models.checkpoint import ModelConfig
from toptwo_kernels.ops import KVCache, Ops

BLOCK_SIZE = 16  # tokens per block: small enough to share prefixes, large enough to keep tables short


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one token needs in all layers."""
    return config.num_layers * config.kv_shape.kv_size * dtype.itemsize


def allocate_kv_cache(config: ModelConfig, num_blocks: int, dtype: torch.dtype, ops: Ops) -> list[KVCache]:
    """Room for `num_blocks` blocks in every layer."""
    return [ops.allocate_kv(num_blocks, BLOCK_SIZE, config.kv_shape, dtype) for _ in range(config.num_layers)]
