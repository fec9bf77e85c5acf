"""How close the runtime comes to an independent implementation of a family, and to itself.

    make parity            one table: every family, on both backends

`measure` is what `tests/models/test_families.py` asserts on.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import schedules
from tiny import FAMILIES, Reference, load_runner
from toptwo.messages import GenerateRequest, NewSequence, Row, SamplingParams, StepPlan

PROMPT = torch.randint(0, schedules.VOCAB, (70,), generator=torch.Generator().manual_seed(1))
GREEDY_TOKENS = 64
IDENTITIES = "chunked = whole", "cached = whole", "batched = alone"


@dataclass(frozen=True)
class Parity:
    """max_error: of a logit, over prefill, chunks and decoding. typical_error: median over tokens of their
    largest error; rounding that sends a token to another expert shows in the first, not in this one.
    greedy: of GREEDY_TOKENS, how many agree with the reference from the first one on. The others say
    whether logits are the same, bit by bit."""

    max_error: float
    typical_error: float
    greedy: int
    chunked_is_whole: bool
    cached_is_whole: bool
    batched_is_alone: bool


def measure(directory: Path, reference: Reference, **options: Any) -> Parity:
    """options: those of `tiny.load_runner`."""
    with torch.inference_mode():
        expected = reference(PROMPT).float()
        whole = prompt_logits(directory, [len(PROMPT)], **options)
        chunked = prompt_logits(directory, [1, 15, 17, 1, 31, 5], **options)
        one_by_one = prompt_logits(directory, [1] * len(PROMPT), **options)
        errors_T = torch.stack([(got - expected).abs().amax(-1) for got in (whole, chunked, one_by_one)])
        wanted = GenerateRequest(
            "it", PROMPT.tolist(), SamplingParams(seed=0, temperature=0.0), GREEDY_TOKENS
        )
        alone = schedules.run(directory, [wanted], **options)
        again = GenerateRequest("first", PROMPT.tolist(), wanted.sampling, 3)
        cached = schedules.run(directory, [again], [wanted], **options)
        assert cached.cached["it"] > 0
        batched = schedules.run(directory, [*schedules.strangers(), wanted], max_step_tokens=64, **options)
        greedy = _agreement(reference, PROMPT.tolist(), alone.tokens["it"])
    return Parity(
        max_error=float(errors_T.max()),
        typical_error=float(errors_T.median()),
        greedy=greedy,
        chunked_is_whole=torch.equal(chunked, whole) and torch.equal(one_by_one, whole),
        cached_is_whole=_same(cached, alone),
        batched_is_alone=_same(batched, alone),
    )


def prompt_logits(directory: Path, chunks: list[int], **options: Any) -> torch.Tensor:
    """Logits [T, V] behind every token of the prompt, computed in steps of so many tokens."""
    runner = load_runner(directory, **options)
    ids = PROMPT.tolist()
    blocks = list(range(0, 2 * (1 + len(ids) // 16), 2))[::-1]  # scattered, not in order
    admitted = [NewSequence(3, ids, len(ids), SamplingParams(seed=0), blocks)]
    logits, start = [], 0
    for step, count in enumerate(chunks):
        row = Row(3, start, count, [], sample=False, score=True)
        logits.append(runner.compute_logits(StepPlan(step, admitted, [row]))[0].clone())
        admitted, start = [], start + count
    assert start == len(ids)
    return torch.cat(logits)


def assert_agreement(directory: Path, reference: Reference, backend: str) -> None:
    """The prompt's logits, in three chunks, are those of the reference in float32."""
    with torch.inference_mode():
        expected = reference(PROMPT)
    got = prompt_logits(directory, [40, 1, 29], backend=backend, quantization="none")
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def bits(directory: Path) -> torch.Tensor:
    """Logits that are the same bit by bit when the weights are: only the native backend promises that."""
    return prompt_logits(directory, [len(PROMPT)], backend="cpu", quantization="none")


def _agreement(reference: Reference, prompt: list[int], tokens: list[int]) -> int:
    """How many tokens from the first on are the reference's own greedy choice."""
    logits_TV = reference(torch.tensor(prompt + tokens[:-1]))[len(prompt) - 1 :]
    wrong = (logits_TV.argmax(-1) != torch.tensor(tokens)).nonzero()
    return int(wrong[0]) if len(wrong) else len(tokens)


def _same(one: schedules.Run, other: schedules.Run) -> bool:
    return one.tokens["it"] == other.tokens["it"] and torch.equal(
        torch.stack(one.logits["it"]), torch.stack(other.logits["it"])
    )


def print_table(families: list[str]) -> None:
    """One line per family; the error of the native backend, and of the reference kernels."""
    columns = "family", "max logit error", "reference kernels", "greedy", *IDENTITIES
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for name in families:
        with tempfile.TemporaryDirectory() as folder:
            reference = FAMILIES[name].write(Path(folder))
            plain = measure(Path(folder), reference, backend="reference")
            native = measure(Path(folder), reference, backend="cpu", quantization="none")
        bits = native.chunked_is_whole, native.cached_is_whole, native.batched_is_alone
        words = " | ".join("bitwise" if same else "no" for same in bits)
        greedy = min(native.greedy, plain.greedy)
        errors = f"{native.max_error:.1e} | {plain.max_error:.1e}"
        print(f"| `{name}` | {errors} | {greedy} of {GREEDY_TOKENS} | {words} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="by default all")
    print_table(parser.parse_args().families or sorted(FAMILIES))
