"""What every layer needs to know about the step that runs. Passed explicitly, never a global."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepContext:
    """One step, seen from a layer.

    positions_T: each token's position in its own sequence.
    slots_T: where its KV is stored (block * block_size + offset).
    attention_plan: what the backend prepared for `ops.attention`.
    kv_cache: per layer (keys, values), each [num_blocks, block_size, M, D].
    """

    positions_T: Tensor
    slots_T: Tensor
    attention_plan: object
    kv_cache: list[tuple[Tensor, Tensor]]
