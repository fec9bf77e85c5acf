"""What every layer needs to know about the step that runs. Passed explicitly, never a global."""

from __future__ import annotations

from dataclasses import dataclass

from toptwo_kernels.ops import KVCache


@dataclass(frozen=True)
class StepContext:
    """One step, seen from a layer.

    plan: what the backend prepared by `ops.plan_step`; which tokens run, and where their KV is.
    kv_cache: per layer, in the backend's own layout.
    """

    plan: object
    kv_cache: list[KVCache]
