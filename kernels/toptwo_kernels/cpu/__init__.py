"""The native CPU backend: fused C++ kernels for the instruction sets that the processor has.

A result does not depend on the step's other rows, on the chunks of a prompt or on the number of threads,
bit by bit: every output is added up in one fixed order. Activations are float32 throughout.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import cast

from toptwo_kernels.cpu.attention import attention, plan_step
from toptwo_kernels.cpu.elementwise import add, clamp, scale
from toptwo_kernels.cpu.embedding import embed, select
from toptwo_kernels.cpu.experts import experts
from toptwo_kernels.cpu.kv_cache import allocate_kv
from toptwo_kernels.cpu.latent_attention import latent_attention
from toptwo_kernels.cpu.linear import linear, linear_per_head, pack
from toptwo_kernels.cpu.native import checksum, instruction_sets
from toptwo_kernels.cpu.norm import layer_norm, norm_slices, rms_norm
from toptwo_kernels.cpu.route import route
from toptwo_kernels.cpu.sampling import sample
from toptwo_kernels.cpu.selection import choose_instruction_set
from toptwo_kernels.cpu.tape import Tape, record
from toptwo_kernels.ops import Ops

__all__ = ["checksum", "create", "instruction_sets"]

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
)


def create(num_threads: int = 1, instruction_set: str | None = None, *, pinned: bool = False) -> Ops:
    """The backend with a thread team of its own.

    instruction_set: one of `instruction_sets()`; by default the best that works.
    pinned: this process is the backend's alone; bind the team, the calling thread included, to the
        processors if it fills them all.
    Raises ValueError if the extension was not built, or has no such instruction set.
    """
    tape = Tape(num_threads, instruction_set or choose_instruction_set(), pinned=pinned)
    functions = {function.__name__: partial(function, tape) for function in _FUNCTIONS}
    return cast(Ops, SimpleNamespace(tape=tape, **functions))
