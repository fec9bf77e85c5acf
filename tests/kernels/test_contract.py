"""What layers hand to a backend is what the contract of `ops` lets a backend rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiny import load_runner, write_mixtral
from toptwo.messages import NewSequence, Row, SamplingParams, StepPlan
from toptwo_kernels import registry
from toptwo_kernels.ops import AttentionBatch, Routing

MAY_BE_VIEWS = {"apply_rope": 1, "write_kv": 2}  # how many leading tensors may have a longer token stride
seen: set[str] = set()


def check(op: str, position: int, value: Any) -> None:
    if isinstance(value, AttentionBatch):
        for part in (value.query_starts_R1, value.context_lens_R, value.block_tables_RB):
            check("plan_attention", 0, part)
    elif isinstance(value, Routing):
        for part in (value.ids_TK, value.weights_TK):
            check("experts", 1, part)
    elif isinstance(value, torch.Tensor):
        if position < MAY_BE_VIEWS.get(op, 0):
            assert value[0].is_contiguous(), f"{op}: argument {position} is strided within a token"
        else:
            assert value.is_contiguous(), f"{op}: argument {position} is strided"
        assert value.dtype in (torch.int64, torch.float32, torch.float64), f"{op}: {value.dtype}"


class CheckingOps:
    """The reference backend behind a look at every argument."""

    def __init__(self) -> None:
        self._reference = registry.load_backend("reference")

    def __getattr__(self, op: str) -> Any:
        compute = getattr(self._reference, op)

        def checked(*arguments: Any) -> Any:
            seen.add(op)
            for position, value in enumerate(arguments):
                check(op, position, value)
            return compute(*arguments)

        return checked


def test_every_argument_keeps_the_contract(tmp_path: Path, monkeypatch: Any) -> None:
    write_mixtral(tmp_path)
    monkeypatch.setattr("toptwo.runtime.build.load_backend", lambda name: CheckingOps())
    runner = load_runner(tmp_path)
    params = SamplingParams(seed=1, presence_penalty=0.5, top_p=0.9)
    prompts = {0: list(range(45)), 1: list(range(7))}
    admitted = [NewSequence(slot, prompt, len(prompt), params, []) for slot, prompt in prompts.items()]
    rows = [Row(0, 0, 45, [5, 3, 8], True), Row(1, 0, 7, [1], True)]
    runner.execute(StepPlan(1, admitted, rows))
    runner.execute(StepPlan(2, [], [Row(0, 45, 1, [], True), Row(1, 7, 1, [], True)]))
    # A slot that is used again keeps nothing of its last sequence that matters.
    again = NewSequence(0, [4, 5, 6], 3, params, [])
    runner.execute(StepPlan(3, [again], [Row(0, 0, 3, [9], True)]))
    assert seen == {op for op in vars(registry.Ops) if not op.startswith("_")}
