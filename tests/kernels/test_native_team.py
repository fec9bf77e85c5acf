"""The threads of a backend: work gets done however few processors there are, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from native import INSTRUCTION_SETS, normal
from toptwo_kernels import cpu

ISA = INSTRUCTION_SETS[-1]
MORE_THAN_CORES = len(os.sched_getaffinity(0)) + 2


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def settled_threads(expected: int) -> int:
    """How many threads there are, once those that have ended are gone from the system's list."""
    deadline = time.monotonic() + 5
    while num_threads() != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return num_threads()


def work(ops: Any, matrix: Any, rounds: int) -> None:
    """Small steps, nearly all barrier, of every size."""
    x = normal(9, 64)
    expected = ops.linear(x, matrix)
    for index in range(rounds):
        size = 1 + index % 9
        assert torch.equal(ops.linear(x[:size], matrix), expected[:size])


@pytest.mark.parametrize("threads", [1, 2, 3, 4, MORE_THAN_CORES])
def test_many_small_steps(threads: int) -> None:
    ops = cpu.create(threads, ISA)
    assert ops.tape.workers.threads == threads
    work(ops, ops.pack(normal(300, 64), "int8"), 200)


def test_several_backends_at_once() -> None:
    """Three times as many threads as members can run: whoever waits must let the others work."""
    matrix = cpu.create(1, ISA).pack(normal(300, 64), "int4")
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            work(cpu.create(MORE_THAN_CORES, ISA), matrix, 30)
        except BaseException as error:
            errors.append(error)

    callers = [threading.Thread(target=serve) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not any(caller.is_alive() for caller in callers)
    assert errors == []


def test_one_recording_after_the_other() -> None:
    """Programs of one team take turns, and keep what they need when the backend's name is gone."""
    ops = cpu.create(2, ISA)
    x = normal(4, 64)
    matrices = [ops.pack(normal(40, 64, seed=seed), "int8") for seed in range(20)]
    expected = [ops.linear(x, matrix) for matrix in matrices]
    replays = []
    for matrix in matrices:
        program = ops.tape.native.Program(ops.tape.workers, 4)
        out = torch.empty(4, 40)
        program.linear(x.data_ptr(), 3, 40, 64, matrix.data.data_ptr(), 1, 0, 0, out.data_ptr(), 0)
        assert len(program) == 1
        replays.append((program, out))
    del ops
    gc.collect()
    for _ in range(20):
        for (program, out), wanted in zip(replays, expected, strict=True):
            out.fill_(torch.nan)
            program.run(4, 0, 0, 0, *[0] * 7)
            assert torch.equal(out, wanted)


def test_a_backend_ends_with_its_threads() -> None:
    before = num_threads()
    affinity = os.sched_getaffinity(0)
    for used in (True, False):
        for _ in range(20):
            ops = cpu.create(4, ISA)
            if used:
                ops.linear(normal(2, 64), ops.pack(normal(40, 64), "int8"))
            assert num_threads() == before + 3
            del ops
            assert settled_threads(before) == before
    # Whoever calls keeps its own freedom, which processes that it starts inherit.
    assert os.sched_getaffinity(0) == affinity


def test_a_team_at_rest_takes_no_time() -> None:
    ops = cpu.create(4, ISA)
    ops.linear(normal(2, 64), ops.pack(normal(40, 64), "int8"))
    time.sleep(0.05)
    started = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - started < 0.1


def test_an_interpreter_ends_in_silence() -> None:
    """Whether or not a backend still lives: no hanging thread, no leak that the bindings complain of."""
    code = f"""
import torch
from toptwo_kernels import cpu
ops = cpu.create(3, {ISA!r})
matrix = ops.pack(torch.randn(40, 64), "int8")
replay = ops.record(lambda plan: ops.linear(torch.zeros(4, 64), matrix), 4)
print(ops.linear(torch.ones(1, 64), matrix).shape[1])
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "40\n", "")


@pytest.mark.parametrize("name", ["sse9", "", "AVX2"])
def test_an_unknown_instruction_set_is_named(name: str) -> None:
    if name:
        with pytest.raises(ValueError, match=f"no kernels for the instruction set {name}"):
            cpu.create(1, name)
    else:
        assert cpu.create(1, None).tape.workers.instruction_set == cpu.instruction_sets()[-1]
