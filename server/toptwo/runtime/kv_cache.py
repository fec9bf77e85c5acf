"""The memory of the paged KV cache. Who owns which block is the engine's business."""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo.models.checkpoint import ModelConfig

BLOCK_SIZE = 16  # tokens per block: small enough to share prefixes, large enough to keep tables short


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token needs in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def allocate_kv_cache(
    config: ModelConfig, num_blocks: int, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Per layer (keys, values), each [num_blocks, BLOCK_SIZE, M, D].

    Left uninitialised, so that the system hands out pages as blocks are first used.
    """
    shape = (num_blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    return [
        (torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)) for _ in range(config.num_layers)
    ]
