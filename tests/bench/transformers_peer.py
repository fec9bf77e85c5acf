"""Beside transformers' own generation on one GPU: the same Mixtral, the same weights in the same memory.

transformers makes a random model on the device; the engine takes its tensors as they are. Each way of
computing experts that transformers has generates greedily, and so does the engine's step; what is compared is
the time of a decode step, and how many of the first tokens agree (in bf16 two rounding orders part at the
first near tie).

Run: python tests/bench/transformers_peer.py --batches 1,64
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))

from published import MIXTRAL_8X7B
from toptwo.models.checkpoint import Weights, WeightSpec
from toptwo.models.registry import read_config
from toptwo.runtime.device import resolve
from toptwo.runtime.formats import format_of
from toptwo.runtime.graphs import Step, prepare_step
from toptwo.runtime.kv_cache import allocate_kv_cache
from toptwo.runtime.loader import load_weights
from toptwo.settings import Settings
from toptwo_kernels.ops import Matrix, StepBatch
from toptwo_kernels.registry import load_backend

IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
PROMPT, SHORT, LONG = 16, 8, 24


class ModelInMemory:
    """A transformers model as the loader sees a checkpoint; see `checkpoints.protocol.Checkpoint`."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.directory = Path("transformers")
        self.paths: list[Path] = []
        self._tensors = model.state_dict()

    @property
    def names(self) -> Set[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def release(self, name: str) -> None:
        pass

    def __enter__(self) -> ModelInMemory:
        return self

    def __exit__(self, *of: object) -> None:
        pass


def make_theirs(raw: dict[str, Any]) -> Any:
    """Random, and already where it runs."""
    import transformers

    config = transformers.MixtralConfig(**raw)
    with torch.device("cuda"):
        model = transformers.MixtralForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval()


def make_ours(raw: dict[str, Any], theirs: torch.nn.Module, rows: int) -> Step:
    """The engine's step over the same tensors."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        architecture, config = read_config(Path(folder))
    specs = architecture.weight_map(config)
    kv_gib = rows * 128 * 2**17 / 2**30 * config.num_layers / 32
    settings = Settings(device="cuda", max_model_len=128, max_num_seqs=rows, kv_cache_gib=kv_gib)
    # Of the weights nothing is copied, so what they take must not be counted twice.
    plan = resolve(settings, config, specs, memory=1 << 40)
    ops = load_backend("cuda")
    matrices: dict[str, Matrix] = {}
    vectors: dict[str, Tensor] = {}

    def keep(spec: WeightSpec, tensor: Tensor) -> None:
        if spec.role == "vector":
            vectors[spec.name] = tensor.float().cuda()
        else:
            weight_format = format_of(spec.role, "none", "bfloat16")
            matrices[spec.name] = ops.pack(tensor, weight_format, paired=spec.role == "paired")

    load_weights(ModelInMemory(theirs), specs, architecture.ignored_tensors(config), keep)
    with torch.device("cuda"):
        model = architecture.build(config, Weights(matrices, vectors), plan.max_model_len, ops)
    cache = allocate_kv_cache(config, plan.num_blocks, torch.bfloat16, ops)
    with torch.inference_mode():
        return prepare_step(model, cache, ops, 8192)


def batch_of(ids: Tensor, start: int) -> StepBatch:
    """The tokens [R, Q] of R sequences from position `start` on; sequence r has blocks 8 r to 8 r + 7."""
    rows, queries = ids.shape
    table = torch.arange(rows * 8).view(rows, 8)
    positions = torch.arange(start, start + queries).repeat(rows)
    row_of = torch.arange(rows).repeat_interleave(queries)
    return StepBatch(
        ids_T=ids.flatten().cpu(),
        positions_T=positions,
        slots_T=table[row_of, positions // 16] * 16 + positions % 16,
        query_starts_R1=torch.arange(rows + 1) * queries,
        context_lens_R=torch.full((rows,), start + queries),
        block_tables_RB=table,
        block_size=16,
        selected_S=torch.arange(1, rows + 1) * queries - 1,
    )


@torch.inference_mode()
def run_ours(step: Step, prompt: Tensor) -> tuple[Tensor, float]:
    """Tokens [R, LONG] and seconds of a decode step; the second time round, when graphs are there."""
    seconds = 0.0
    for _ in range(2):
        ids = [step(batch_of(prompt, 0)).argmax(-1)]
        torch.cuda.synchronize()
        began = time.perf_counter()
        for at in range(PROMPT, PROMPT + LONG - 1):
            ids.append(step(batch_of(ids[-1][:, None], at)).argmax(-1))
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / (LONG - 1)
    return torch.stack(ids, 1), seconds


@torch.inference_mode()
def run_theirs(model: Any, prompt: Tensor, implementation: str) -> tuple[Tensor, float]:
    """Tokens [R, LONG], and seconds of a decode step: what a longer answer takes beyond a short one."""
    model.set_experts_implementation(implementation)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(prompt, max_new_tokens=2, **options)
    times, tokens = [], prompt
    for length in (SHORT, LONG):
        torch.cuda.synchronize()
        began = time.perf_counter()
        tokens = model.generate(prompt, max_new_tokens=length, **options)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return tokens[:, PROMPT:], (times[1] - times[0]) / (LONG - SHORT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    batches = [int(part) for part in arguments.batches.split(",")]
    raw = {**MIXTRAL_8X7B, "num_hidden_layers": arguments.layers}
    torch.manual_seed(0)
    theirs = make_theirs(raw)
    step = make_ours(raw, theirs, max(batches))
    for rows in batches:
        prompt = torch.randint(raw["vocab_size"], (rows, PROMPT), device="cuda")
        tokens, ours = run_ours(step, prompt)
        print(f"batch {rows}: toptwo {ours * 1e3:.2f} ms a step, {rows / ours:,.0f} tokens/s", flush=True)
        for implementation in IMPLEMENTATIONS:
            try:
                others, seconds = run_theirs(theirs, prompt, implementation)
            except torch.cuda.OutOfMemoryError:
                print(f"  transformers, {implementation}: needs more memory than the card has", flush=True)
                continue
            same = (others == tokens).long().cumprod(1).sum(1).float().mean()
            print(
                f"  transformers, {implementation}: {seconds * 1e3:.2f} ms, {rows / seconds:,.0f} tokens/s; "
                f"{seconds / ours:.1f} times as long; the first {same:.0f} of {LONG} tokens agree",
                flush=True,
            )


if __name__ == "__main__":
    main()
