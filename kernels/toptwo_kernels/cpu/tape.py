"""Where operations go: straight to the processor, or onto a program that is replayed for every step.

While a forward pass is recorded, operations compute nothing. They take their outputs from an arena
and append themselves to a native program, which afterwards runs a step of any size in one call: as a
CUDA graph does, but for prompts, decoding and mixtures alike, since the sizes belong to the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toptwo_kernels.cpu.native import allocate, require_native
from toptwo_kernels.ops import StepBatch

TOKENS, SELECTED = 0, 1  # which dimension of a step an operation runs over, as in csrc/program.h


@dataclass(frozen=True)
class Arena:
    """Buffers of a recording. One is used again as soon as nobody holds it, as the order of the program
    is the order in which they were held."""

    max_tokens: int
    blocks: list[Tensor] = field(default_factory=list)
    free: list[Tensor] = field(default_factory=list)
    selected: set[int] = field(default_factory=set)

    def take(self, width: int, dtype: torch.dtype, extent: int) -> Tensor:
        """A buffer [max_tokens, width] with room for the largest step."""
        size = self.max_tokens * width * dtype.itemsize
        fitting = [index for index, block in enumerate(self.free) if block.numel() == size]
        block = self.free.pop(fitting[-1]) if fitting else allocate(size)
        if not fitting:
            self.blocks.append(block)
        # A view is what the model holds; when it lets go, the block is free.
        tensor = block.view(dtype).view(self.max_tokens, width)
        weakref.finalize(tensor, self.free.append, block)
        (self.selected.add if extent == SELECTED else self.selected.discard)(tensor.data_ptr())
        return tensor


class Tape:
    """The threads and kernels of a backend, and the program being recorded, if any."""

    def __init__(self, num_threads: int, instruction_set: str, *, pinned: bool) -> None:
        self.native = require_native()
        self.workers = self.native.Workers(num_threads, instruction_set, pinned)
        self._program: Any = None
        self._arena: Arena | None = None
        self._kept: list[object] = []

    def extent_of(self, x: Tensor) -> int:
        """Whether the rows of x are the step's tokens or its selected ones."""
        return SELECTED if self._arena and x.data_ptr() in self._arena.selected else TOKENS

    def empty(self, like: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An output with as many rows as `like`."""
        return self.rows(len(like), width, self.extent_of(like), dtype)

    def rows(
        self, count: int, width: int, extent: int = TOKENS, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """An output of `count` rows; while recording, of as many as a step can have."""
        if self._arena:
            return self._arena.take(width, dtype, extent)
        return torch.empty(count, width, dtype=dtype)

    def emit(self, name: str, *arguments: object, step: object) -> None:
        """Append the operation `name` of csrc/program.h, or run it now on `step`.

        Tensors among the arguments are passed as addresses, None as no address. While recording, tensors are
        kept alive as long as the program unless they are the arena's. step: what `plan_step` made, or a
        number of tokens.
        """
        addresses = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in arguments]
        if self._program is not None:
            getattr(self._program, name)(*addresses)
            own = {block.data_ptr() for block in self._arena.blocks} if self._arena else set()
            self._kept += [a for a in arguments if isinstance(a, Tensor) and a.data_ptr() not in own]
            return
        arrays = step if isinstance(step, StepArrays) else StepArrays(step)  # type: ignore[arg-type]
        program = self.native.Program(self.workers, max(1, arrays.num_tokens))
        getattr(program, name)(*addresses)
        program.run(*arrays.arguments)

    @contextmanager
    def recording(self, program: object, arena: Arena, kept: list[object]) -> Iterator[None]:
        self._program, self._arena, self._kept = program, arena, kept
        try:
            yield
        finally:
            self._program, self._arena, self._kept = None, None, []


class StepArrays:
    """A step as the native side takes it: sizes, then addresses of arrays that this object keeps."""

    def __init__(self, batch: StepBatch | int) -> None:
        if isinstance(batch, int):
            starts = torch.tensor([0, 0])
            self.kept: object = starts
            self.num_tokens = batch
            self.arguments = (batch, 1, batch, 1, 0, 0, 0, starts.data_ptr(), 0, 0, 0)
            return
        self.kept = batch
        self.num_tokens = len(batch.ids_T)
        self.arguments = (
            self.num_tokens,
            len(batch.context_lens_R),
            len(batch.selected_S),
            batch.block_tables_RB.shape[1],
            batch.ids_T.data_ptr(),
            batch.positions_T.data_ptr(),
            batch.slots_T.data_ptr(),
            batch.query_starts_R1.data_ptr(),
            batch.context_lens_R.data_ptr(),
            batch.block_tables_RB.data_ptr(),
            batch.selected_S.data_ptr(),
        )


class Recording:
    """A recorded forward pass: call it with a step. Keeps every buffer that the program reads or writes."""

    def __init__(self, tape: Tape, forward: Callable[[object], Tensor], max_tokens: int) -> None:
        self._program = tape.native.Program(tape.workers, max_tokens)
        self._arena = Arena(max_tokens)
        self._kept: list[object] = []
        with tape.recording(self._program, self._arena, self._kept):
            self._out = forward(None)

    def __call__(self, batch: StepBatch) -> Tensor:
        """The result rows of the step's selected tokens; valid until the next step."""
        self._program.run(*StepArrays(batch).arguments)
        return self._out[: len(batch.selected_S)]


def record(tape: Tape, forward: Callable[[object], Tensor], max_tokens: int) -> Recording:
    """Record `forward`, which is given a plan, for steps of at most `max_tokens` tokens."""
    return Recording(tape, forward, max_tokens)
