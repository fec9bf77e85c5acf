"""Compiles the CUDA backend's kernels as a step of Mixtral-8x7B launches them, on a machine without a card.

Nothing runs: a stand-in for Triton's driver names the card, and launches stop at the compiled program. Prints
a line of JSON for each: its name, the shared memory of a program, and which matrix instructions it has.

Run (without TRITON_INTERPRET): python tests/cuda_without_card.py 90
"""

from __future__ import annotations

import json
import sys
from typing import Any, get_args

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from toptwo_kernels.cuda import attention, experts, linear, norm, packing, route
from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.plan import plan_step
from toptwo_kernels.cuda.tuning import Tuner
from toptwo_kernels.ops import (
    AttentionSpec,
    ExpertWeights,
    HeadShape,
    Matrix,
    Rope,
    RouterSpec,
    RouterWeights,
    Routing,
    StepBatch,
    WeightFormat,
)

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # of a program, by compute capability
HIDDEN, FFN, EXPERTS, HEADS = 4096, 14336, 8, HeadShape(32, 8, 128)


class AbsentCard:
    """What Triton asks its driver for before a launch."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only() -> None:
    """Let every launch from now on end when its kernel is compiled, and be told once."""
    run, told = JITFunction.run, set()

    def compile_and_tell(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        if kernel.hash not in told:
            told.add(kernel.hash)
            units = [unit for unit in ("mma.sync", "wgmma.mma_async") if unit in kernel.asm["ptx"]]
            print(json.dumps({"name": self.__name__, "shared": kernel.metadata.shared, "units": units}))
        return kernel

    JITFunction.run = compile_and_tell


def matrix(weight_format: WeightFormat, *shape: int, paired: bool = False) -> Matrix:
    """Room for a packed weight, of any content."""
    if weight_format in packing.BLOCK_INPUTS:
        parts = packing._part_bytes(weight_format, packing._stack_shape(*shape, paired))
        return Matrix(torch.empty(sum(parts), dtype=torch.uint8), weight_format, *shape, paired)
    return Matrix(torch.empty(shape, dtype=getattr(torch, weight_format)), weight_format, *shape, paired)


def launch_products(device: Device, weight_format: WeightFormat, tokens: int) -> None:
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(weight_format, torch.bfloat16)
    x_TH = torch.empty(tokens, HIDDEN, dtype=dtype)
    linear.linear(device, x_TH, matrix(weight_format, 1, HIDDEN, HIDDEN))
    gate_up = matrix(weight_format, EXPERTS, 2 * FFN, HIDDEN, paired=True)
    weights = ExpertWeights(gate_up, matrix(weight_format, EXPERTS, HIDDEN, FFN))
    routing = Routing(torch.zeros(tokens, 2, dtype=torch.int32), torch.zeros(tokens, 2))
    experts.experts(device, x_TH, routing, weights)


def launch_the_rest(device: Device, contexts: int, queries: int) -> None:
    """For rows of one length. contexts: of each, with its queries."""
    rows = 4
    positions = torch.arange(contexts - queries, contexts).repeat(rows)
    batch = StepBatch(
        ids_T=positions,
        positions_T=positions,
        slots_T=positions,
        query_starts_R1=torch.arange(rows + 1) * queries,
        context_lens_R=torch.full((rows,), contexts),
        block_tables_RB=torch.zeros(rows, -(-contexts // 16), dtype=torch.int64),
        block_size=16,
        selected_S=torch.arange(1, rows + 1) * queries - 1,
    )
    x_TH = torch.empty(len(positions), HIDDEN, dtype=torch.bfloat16)
    norm.rms_norm(device, x_TH, torch.ones(HIDDEN), 1e-5)
    router = RouterWeights(matrix("float32", 1, EXPERTS, HIDDEN))
    route.route(device, x_TH, router, RouterSpec(EXPERTS, 2))
    cache = [torch.empty(8, HEADS.num_kv_heads, 16, HEADS.head_dim, dtype=torch.bfloat16) for _ in range(2)]
    qkv_TX = torch.empty(len(positions), 6144, dtype=torch.bfloat16)
    rope = Rope(torch.empty(contexts, 64), torch.empty(contexts, 64))
    spec = AttentionSpec(HEADS, HEADS.head_dim**-0.5)
    attention.attention(device, qkv_TX, rope, (cache[0], cache[1]), plan_step(device, batch), spec)


def main() -> None:
    capability = int(sys.argv[1])
    assert not triton.knobs.runtime.interpret
    driver.set_active(AbsentCard(capability))  # type: ignore[arg-type]
    compile_only()
    zeros = torch.zeros
    torch.zeros = lambda *shape, pin_memory=False, **options: zeros(*shape, **options)
    tuner = Tuner("no card", None, SHARED_BYTES[capability])
    device = Device(torch.device("cpu"), False, 132, capability >= 90, tuner)
    for weight_format in get_args(WeightFormat):
        for tokens in (1, 40, 600):
            launch_products(device, weight_format, tokens)
    launch_the_rest(device, 300, 1)
    launch_the_rest(device, 300, 100)


if __name__ == "__main__":
    main()
