"""What a decode step costs outside native code: planning, batching, sampling parameters, bookkeeping.

Runs the engine's scheduler and runner in this process, as the engine does, and takes the time of the
two native calls of a step (the recorded model, the sampler) out of the time of the whole step.

Run: make bench-step            or: python tests/bench/step_overhead.py MODEL --streams 1,16
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from toptwo.engine.blocks import BlockPool
from toptwo.engine.scheduler import Scheduler, SchedulerLimits
from toptwo.messages import GenerateRequest, SamplingParams
from toptwo.runtime.build import Runtime, build_runtime
from toptwo.settings import load_settings
from toptwo.source import find_model

STEPS = 100
PROMPT = 64


class Stopwatch:
    """Adds up the time spent in the calls that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = call(*arguments)
            self.seconds += time.perf_counter() - began
            return result

        return timed


def watch_native(runtime: Runtime) -> Stopwatch:
    """A stopwatch on every native call of a step. Reaches into the runtime, as only a benchmark may."""
    watch = Stopwatch()
    step: Any = runtime.step
    step._program = NativeCalls(step._program, watch.wrap(step._program.run))
    tape: Any = runtime.runner._ops.tape  # type: ignore[attr-defined]
    tape.workers = NativeCalls(tape.workers, watch.wrap(tape.workers.sample), "sample")
    return watch


class NativeCalls:
    """A native object with one of its functions under a stopwatch."""

    def __init__(self, native: Any, timed: Callable[..., Any], name: str = "run") -> None:
        self._native = native
        setattr(self, name, timed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)


def measure(runtime: Runtime, watch: Stopwatch, streams: int) -> tuple[float, float]:
    """Medians of a decode step's seconds, and of its share outside native code."""
    info = runtime.info
    limits = SchedulerLimits(
        info.vocab_size, info.max_model_len, info.max_num_seqs, info.max_step_tokens, True
    )
    scheduler = Scheduler(limits, BlockPool(info.num_blocks, info.block_size))
    for index in range(streams):
        prompt = [(index * 7919 + position * 31) % info.vocab_size for position in range(PROMPT)]
        sampling = SamplingParams(seed=index, temperature=0.8, top_p=0.9)
        scheduler.add(GenerateRequest(str(index), prompt, sampling, STEPS + 10))
    totals, outside = [], []
    for _ in range(STEPS):
        watch.seconds, began = 0.0, time.perf_counter()
        plan = scheduler.plan()
        assert plan is not None
        scheduler.apply(runtime.runner.execute(plan))
        elapsed = time.perf_counter() - began
        if all(row.num_tokens == 1 for row in plan.rows) and len(plan.rows) == streams:
            totals.append(elapsed)
            outside.append(1 - watch.seconds / elapsed)
    return statistics.median(totals), statistics.median(outside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "model", nargs="?", type=Path, help="checkpoint directory; default: the default model"
    )
    parser.add_argument("--streams", default="1,16")
    parser.add_argument("--quantization", default="int8")
    arguments = parser.parse_args()
    flags: dict[str, object] = {"quantization": arguments.quantization, "max_model_len": 512}
    if arguments.model:
        flags["model"] = str(arguments.model)
    settings, _ = load_settings(flags)
    source = find_model(settings, Console(stderr=True))
    runtime = build_runtime(settings, source.directory, own_process=True)
    if runtime.info.backend != "cpu":
        sys.exit("the native backend was not built on this machine")
    watch = watch_native(runtime)
    for streams in (int(n) for n in arguments.streams.split(",")):
        total, outside = measure(runtime, watch, streams)
        print(
            f"{streams:3d} streams: decode step {total * 1e3:.2f} ms, {outside:.1%} of it outside "
            f"native code (medians of {STEPS} steps, {arguments.quantization})"
        )


if __name__ == "__main__":
    main()
