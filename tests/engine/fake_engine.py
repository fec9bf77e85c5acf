"""A real engine process around the fake runner: `python fake_engine.py [mode] SOCKET`.

Modes: serve; slow (50 ms per step); crash-on-start; cannot-load (status 1); bad-model (status 2); silent-2
(that status without a word); crash-in-step; sleep-in-step and spin-in-step (for ever); slow-step (3 s);
nonsense (no valid tokens for prompts that begin with 13); sleep-in-load and spin-in-load (for ever, after
some progress); slow-load (3 s, with progress all the time); sleep-in-reload (not in the first engine).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from fake_runner import VOCAB, CheckingRunner
from toptwo.engine import process
from toptwo.engine.blocks import BlockPool
from toptwo.engine.engine import Engine
from toptwo.engine.scheduler import Scheduler, SchedulerLimits
from toptwo.engine.transport import EngineSocket
from toptwo.messages import EngineInfo, StepPlan, StepResult

INFO = EngineInfo(
    architecture="fake",
    device="cpu",
    dtype="float32",
    kv_dtype="float32",
    quantization="none",
    backend="fake",
    num_threads=1,
    vocab_size=VOCAB,
    max_model_len=1024,
    max_num_seqs=8,
    max_step_tokens=64,
    block_size=4,
    num_blocks=512,
    prefix_caching=True,
    num_parameters=0,
    weight_bytes=0,
    kv_cache_bytes=0,
    load_seconds=0.0,
)


def load(path: Path, mode: str) -> None:
    """Load nothing, in the manner of the mode."""
    if mode == "sleep-in-reload" and path.name == "engine-1.sock":
        return
    for done in range(30):
        process.report_progress(path, done, 30)
        time.sleep(0.1 if mode == "slow-load" else 0.02)
    while mode != "slow-load":
        time.sleep(0 if mode == "spin-in-load" else 0.1)


class ModalRunner(CheckingRunner):
    """A checking runner that can be slow, or fail in its fifth step."""

    mode = "serve"
    began = 0.0  # the last step

    def execute(self, plan: StepPlan) -> StepResult:
        if self.mode == "slow":
            time.sleep(0.05)
        if self.mode == "crash-in-step" and self.steps == 5:
            raise RuntimeError("the fifth step")
        while self.mode in ("sleep-in-step", "spin-in-step") and self.steps == 5:
            time.sleep(0.01 if self.mode == "sleep-in-step" else 0)
        if self.mode == "slow-step" and self.steps == 5:
            while time.monotonic() < self.began + 3:
                pass
        self.began = time.monotonic()
        result = super().execute(plan)
        if self.mode != "nonsense":
            return result
        tokens = [
            -1 if self.tokens[row.slot][0] == 13 else token
            for row, token in zip(plan.rows, result.token_ids, strict=True)
        ]
        return StepResult(result.step, tokens)


def create_engine(path: Path, mode: str = "serve") -> Engine:
    """An engine bound to `path`, with a fake model behind it."""
    scheduler = Scheduler(
        SchedulerLimits(VOCAB, INFO.max_model_len, INFO.max_num_seqs, INFO.max_step_tokens),
        BlockPool(INFO.num_blocks, INFO.block_size),
    )
    runner = ModalRunner(INFO.max_num_seqs, INFO.num_blocks, INFO.block_size, INFO.max_step_tokens)
    runner.mode = mode
    return Engine(scheduler, runner, EngineSocket(path), INFO)


if __name__ == "__main__":
    mode, path = sys.argv[1:]
    if mode == "crash-on-start":
        sys.exit("cannot start")
    process.bind_to_parent()
    assert process.read_config().startswith(b"the configuration")
    if mode in ("cannot-load", "bad-model"):
        process.explain_failure(Path(path), "there is no such tensor")
        sys.exit(1 if mode == "cannot-load" else 2)
    if mode == "silent-2":
        sys.exit(2)
    if mode.endswith("load"):
        load(Path(path), mode)
    create_engine(Path(path), mode).run()
