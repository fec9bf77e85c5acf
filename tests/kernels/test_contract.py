"""What layers hand to a backend is what the contract of `ops` lets a backend rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import FAMILIES, load_runner
from toptwo.messages import NewSequence, Row, SamplingParams, StepPlan
from toptwo_kernels import registry
from toptwo_kernels.ops import Matrix, Ops, StepBatch

FLOATS = {torch.float32, torch.float64}


def check(op: str, value: Any) -> None:
    """Tensors, and those inside of what ops are given."""
    if isinstance(value, Matrix):
        assert value.data.is_contiguous(), f"{op}: a matrix is strided"  # bytes or floats: the backend's own
    elif isinstance(value, torch.Tensor):
        assert value.is_contiguous(), f"{op}: a tensor of shape {list(value.shape)} is strided"
        assert value.dtype in {torch.int64, *FLOATS}, f"{op}: {value.dtype}"
    elif type(value).__module__ == "toptwo_kernels.ops":  # a plan is the backend's own
        for name, part in vars(value).items():
            check(f"{op}: {name}", part)
    elif isinstance(value, list | tuple):
        for part in value:
            check(op, part)


def check_step(step: StepBatch) -> None:
    """Ids are int64, and the rows cover the step's tokens."""
    check("a step", step)
    numbers = {name: value for name, value in vars(step).items() if isinstance(value, torch.Tensor)}
    assert {value.dtype for value in numbers.values()} == {torch.int64}
    num_tokens, num_rows = len(step.ids_T), len(step.context_lens_R)
    assert len(step.positions_T) == len(step.slots_T) == num_tokens
    assert (int(step.query_starts_R1[0]), int(step.query_starts_R1[-1])) == (0, num_tokens)
    assert (len(step.query_starts_R1), len(step.block_tables_RB)) == (num_rows + 1, num_rows)


class CheckingOps:
    """A backend behind a look at every argument."""

    def __init__(self, backend: Ops) -> None:
        self._backend = backend
        self.seen: set[str] = set()
        self.num_steps = 0

    def __getattr__(self, op: str) -> Any:
        compute = getattr(self._backend, op)

        def checked(*arguments: Any, **options: Any) -> Any:
            self.seen.add(op)
            for value in arguments:
                if isinstance(value, StepBatch):
                    self.num_steps += 1
                    check_step(value)
                check(op, value)
            result = compute(*arguments, **options)
            return self._check_steps(result) if op == "record" else result

        return checked

    def _check_steps(self, replay: Any) -> Any:
        """A recorded forward pass is given its steps later."""

        def checked(step: StepBatch) -> Any:
            self.num_steps += 1
            check_step(step)
            return replay(step)

        return checked


def run_a_model(name: str, directory: Path, backend: str, checking: CheckingOps) -> None:
    """Three steps of a family: a chunk and a whole prompt, two decoded tokens, and a slot used again."""
    FAMILIES[name].write(directory)
    runner = load_runner(directory, backend=backend)
    params = SamplingParams(seed=1, presence_penalty=0.5, top_p=0.9)
    prompts = {0: list(range(45)), 1: list(range(7))}
    admitted = [NewSequence(slot, prompt, len(prompt), params, []) for slot, prompt in prompts.items()]
    rows = [Row(0, 0, 45, [5, 3, 8], True), Row(1, 0, 7, [1], True)]
    runner.execute(StepPlan(1, admitted, rows))
    runner.execute(StepPlan(2, [], [Row(0, 45, 1, [], True), Row(1, 7, 1, [], True)]))
    again = NewSequence(0, [4, 5, 6], 3, params, [])
    runner.execute(StepPlan(3, [again], [Row(0, 0, 3, [9], True)]))
    assert checking.num_steps == 3


def test_every_argument_keeps_the_contract(
    tmp_path: Path, backend: str, ops: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    for name in FAMILIES:
        checking = CheckingOps(ops)
        monkeypatch.setattr("toptwo.runtime.build.load_backend", lambda *_, ops=checking, **__: ops)
        run_a_model(name, tmp_path / name, backend, checking)
        seen |= checking.seen
    every_op = {op for op in vars(registry.Ops) if not op.startswith("_")}
    # A backend that records plans its steps itself.
    assert seen == (every_op - {"plan_step"} | {"record"} if backend == "cpu" else every_op)
