"""How many tokens came to each expert: counted in every layer that chooses, whatever the model is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import FAMILIES, load_runner
from toptwo.messages import NewSequence, Row, SamplingParams, StepPlan

PROMPT = [(7 * position) % 300 + 3 for position in range(40)]
CHUNKS = (1, 32, 7)
# Layers that choose, and how many experts each token gets.
EXPECTED = {
    "mixtral": ({0, 1, 2}, 2),
    "deepseek_v2": ({1, 2}, 3),  # the first is dense, the others have shared experts too
    "qwen2_moe": ({0, 2}, 2),  # with a shared expert behind a gate of its own, which is none of theirs
    "grok1": ({0, 1, 2}, 2),  # a layer of its own kind
    "llama": (set(), 0),
}


def count(directory: Path, backend: str) -> dict[int, list[int]]:
    """The prompt in chunks."""
    runner = load_runner(directory, backend=backend, max_model_len=64, num_blocks=8)
    start = 0
    for step, size in enumerate(CHUNKS):
        admitted = [NewSequence(0, PROMPT, len(PROMPT), SamplingParams(0), [])] if step == 0 else []
        blocks = [0, 1, 2] if step == 0 else []
        runner.execute(StepPlan(step, admitted, [Row(0, start, size, blocks, start + size == len(PROMPT))]))
        start += size
    counts: dict[int, list[int]] = runner.expert_tokens()
    return counts


@pytest.mark.parametrize("name", EXPECTED)
def test_every_token_is_counted_in_every_layer(name: str, tmp_path: Path) -> None:
    FAMILIES[name].write(tmp_path)
    layers, top_k = EXPECTED[name]
    counts = count(tmp_path, "reference")
    assert set(counts) == layers
    for of_layer in counts.values():
        assert sum(of_layer) == len(PROMPT) * top_k
        assert max(of_layer) <= len(PROMPT)
        assert len(of_layer) > top_k
    assert count(tmp_path, "cpu") == counts  # recorded once and replayed
