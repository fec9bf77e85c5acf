"""Training the experts: its model against transformers, its losses against torch's, a run that is stopped."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.nn import functional
from transformers import MixtralForCausalLM

from default_model.tiny_gguf import EXPERTS, TOKENS, Kitchen
from toptwo.default_model import train as commands
from toptwo.default_model.checkpoint import ROUTER_NAME
from toptwo.default_model.factors import MATRICES, Factors
from toptwo.default_model.gguf_weights import DenseGguf
from toptwo.default_model.router_corpus import DOMAINS, Document
from toptwo.default_model.training.austen import books, chapters
from toptwo.default_model.training.chat import Turn, questions
from toptwo.default_model.training.losses import SLICE, cross_entropy, divergence, load_balance
from toptwo.default_model.training.low_rank import Experts, Mixture, Plan, Trunk
from toptwo.default_model.training.run import IGNORED, Batches, Material, Schedule, read_log, train
from toptwo.default_model.training.text import digest, unrepeated

SHIPPED = Path(commands.__file__).parent
EXPERTS_SHA256 = "9218a69f05fa9c258423aec567cde2edb2778249f44d1b1182fcbc9fba21aaa1"


def trunk_of(kitchen: Kitchen) -> Trunk:
    return Trunk(DenseGguf(kitchen.wheel.with_name("tiny.gguf")), torch.float32, torch.device("cpu"))


def mixture_of(kitchen: Kitchen) -> Mixture:
    """Four experts that differ much, and a decided router."""
    torch.manual_seed(1)
    mixture = Mixture(trunk_of(kitchen), Plan(EXPERTS, 2, 3))
    with torch.no_grad():
        for name, weight in mixture.named_parameters():
            weight.copy_(torch.randn_like(weight) * (1.0 if "router" in name else 0.2))
    return mixture


def material() -> Material:
    rng = np.random.default_rng(0)
    text = {name: rng.integers(3, len(TOKENS), 200).astype(np.int32) for name in DOMAINS}
    return Material(text, [Turn("?", list(range(5, 5 + size)), 2) for size in (7, 12, 30)])


def test_without_experts_it_is_the_dense_model(kitchen: Kitchen) -> None:
    mixture = mixture_of(kitchen)
    ids = torch.randint(0, len(TOKENS), (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        got = mixture(ids, None)[0] @ mixture.trunk.embedding_VH.T
        torch.testing.assert_close(got, kitchen.dense(ids).logits, atol=1e-4, rtol=1e-4)


def test_what_is_packed_and_converted_is_what_was_trained(kitchen: Kitchen) -> None:
    """Rounded once, transformers' Mixtral of the written checkpoint says what the training's model says."""
    mixture = mixture_of(kitchen)
    packed = commands.packed_experts({name: w.numpy() for name, w in mixture.state_dict().items()})
    save_file(packed, kitchen.recipe.upcycling.experts)
    model = MixtralForCausalLM.from_pretrained(kitchen.prepare(kitchen.wheel))
    ids = torch.randint(0, len(TOKENS), (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for layer, experts in enumerate(mixture.experts):
            experts.router_EH.copy_(torch.tensor(packed[ROUTER_NAME.format(layer)]))
            for matrix, factors in Factors.of_layer(packed, layer).items():
                part = getattr(experts, matrix)
                part.b_EOR.copy_(torch.tensor(factors.b_EOR * factors.scale_ER[:, None]))
                part.a_ERI.copy_(torch.tensor(factors.a_ERI, dtype=torch.float32))
        got = mixture(ids, Experts.route)[0] @ mixture.trunk.embedding_VH.T
        torch.testing.assert_close(got, model(ids).logits, atol=1e-3, rtol=1e-3)
        assert (got - kitchen.dense(ids).logits).abs().max() > 0.1


def test_rounding_of_factors_is_near() -> None:
    rng = np.random.default_rng(0)
    b, a = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 50, 4), (2, 4, 60)))
    a[1, 2] = 0  # a row that was never trained
    got, exact = Factors.rounded(b, a).product(), b @ a
    assert np.linalg.norm(got - exact) < 0.01 * np.linalg.norm(exact)


def test_factors_of_a_part_of_a_layer_are_refused() -> None:
    whole = Factors.rounded(np.ones((2, 5, 1), np.float32), np.ones((2, 1, 6), np.float32))
    assert Factors.of_layer({}, 0) == {}
    with pytest.raises(KeyError, match=r"layers\.0\.mlp\.experts\.up\.b"):
        Factors.of_layer(whole.named(0, "gate"), 0)


def test_losses_and_their_gradients_are_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    size = SLICE + 44  # two slices
    hidden, teacher = (torch.randn(size, 16, generator=generator) for _ in range(2))
    output, labels = torch.randn(30, 16, generator=generator), torch.arange(size) % 30
    hidden.requires_grad_()
    target = (teacher @ output.T).log_softmax(1)
    pairs = (
        (
            cross_entropy(hidden, output, labels),
            functional.cross_entropy(hidden @ output.T, labels, reduction="none"),
        ),
        (
            divergence(hidden, teacher, output),
            functional.kl_div(
                (hidden @ output.T).log_softmax(1), target, log_target=True, reduction="none"
            ).sum(1),
        ),
    )
    weights = torch.rand(size, generator=generator)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected)
        slopes = [torch.autograd.grad((losses * weights).sum(), hidden)[0] for losses in (got, expected)]
        torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-4)


def test_load_balance_is_one_where_even_and_e_where_one_has_all() -> None:
    even = 20 * torch.eye(4).repeat(8, 1)
    assert load_balance(even, 1).item() == pytest.approx(1, abs=1e-3)
    assert load_balance(20 * torch.eye(4)[:1].repeat(8, 1), 1).item() == pytest.approx(4, abs=1e-3)


def test_training_learns_and_a_stopped_run_goes_on_the_same(kitchen: Kitchen, tmp_path: Path) -> None:
    schedule = Schedule(steps=12, length=24, warmup=2, save_every=6)

    def fit(folder: str, stop_after: int | None = None) -> Mixture:
        torch.manual_seed(0)
        mixture = Mixture(trunk_of(kitchen), Plan(EXPERTS, 2, 3))

        def report(line: dict[str, float]) -> None:
            if line["step"] == stop_after:
                raise KeyboardInterrupt

        train(mixture, material(), schedule, tmp_path / folder, report)
        return mixture

    whole = fit("whole")
    with pytest.raises(KeyboardInterrupt):
        fit("stopped", stop_after=8)  # the state is of step 6: two are done again
    again = fit("stopped")
    for weight, same in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, same)
    logs = [list(read_log(tmp_path / name)) for name in ("whole", "stopped")]
    one, other = ([line["cross_entropy"] for line in log] for log in logs)
    assert one == other
    assert [line["step"] for line in logs[1]] == list(range(12))
    assert logs[0][-1]["cross_entropy"] < logs[0][0]["cross_entropy"]
    schedule = replace(schedule, rate=1e-3)
    with pytest.raises(ValueError, match="other settings"):
        fit("whole")


def test_batches_see_every_piece_once_a_round_and_ignore_what_is_behind_an_answer() -> None:
    batches = Batches(material(), Schedule(steps=8, length=25, chats=1), torch.device("cpu"))
    steps = [batches.at(step) for step in range(8)]
    seen = torch.stack([text[0] for text, _ in steps])
    assert sorted(map(tuple, seen.tolist())) == sorted(
        map(tuple, material().domains["en"].reshape(8, 25).tolist())
    )
    lengths = {int((chat != IGNORED).sum()) for _, chat in steps}
    assert lengths == {7, 12, 25}


def test_a_text_on_both_sides_is_only_held_out() -> None:
    keys = [f"page-{i}" for i in range(40)]
    held_out = next(key for key in keys if Document("en", key, "").held_out)
    training = [key for key in keys if not Document("en", key, "").held_out]
    kept = unrepeated(
        [
            Document("en", training[0], "one  text"),
            Document("en", held_out, "one text"),
            Document("en", training[1], "another"),
            Document("en", training[2], "another"),
        ]
    )
    assert [(d.key, d.text) for d in kept] == [(held_out, "one text"), (training[1], "another")]


def test_nothing_trained_on_is_in_a_held_out_set() -> None:
    """Of what is shipped: every document, every excerpt and every question."""
    manifest = json.loads((SHIPPED / "documents.json").read_text())
    training = {name for each in manifest["training"].values() for name in each}
    held_out = {name for each in manifest["held out"].values() for name in each}
    excerpts = json.loads((SHIPPED / "held_out.json").read_text())
    assert len(training) > 3000
    assert set(excerpts) == set(manifest["training"]) == set(DOMAINS)
    assert {e["document"] for each in excerpts.values() for e in each} == held_out
    assert not training & held_out
    asked = {turn["question"] for turn in json.loads((SHIPPED / "held_out_chat.json").read_text())}
    assert asked <= set(questions(held_out=True, count=10_000))
    assert not asked & set(questions(held_out=False, count=10_000))


def test_digest_is_of_the_words() -> None:
    assert digest("a  b\n") == digest("a b") != digest("ab")


def test_shipped_experts_are_the_pinned_ones_and_differ() -> None:
    content = (SHIPPED / "experts.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == EXPERTS_SHA256
    assert len(content) < 16e6
    tensors = load_file(SHIPPED / "experts.safetensors")
    for layer in range(30):
        assert tensors[ROUTER_NAME.format(layer)].shape == (8, 576)
        factors = Factors.of_layer(tensors, layer)
        assert set(factors) == set(MATRICES)
        down = factors["down"].product()
        assert down.shape == (8, 576, 1536)
        assert np.isfinite(down).all()
        assert all(not np.array_equal(down[0], other) for other in down[1:])
    assert len(tensors) == 30 * (1 + 3 * len(MATRICES))


def test_books_come_out_of_an_r_database() -> None:
    lines = [
        "Title",
        *("line" for _ in range(1200)),
        "CHAPTER 1",
        "One",
        "two.",
        "",
        "New.",
        "CHAPTER 2",
        "End.",
    ]
    strings = b"".join(struct.pack(">II", 9, len(line)) + line.encode() for line in lines)
    content = b"X\n" + struct.pack(">II", 16, len(lines)) + strings
    packed = zlib.compress(content)
    database = b"junk" + struct.pack(">I", len(content)) + packed + b"\x00\x00\x00\x05x\x9cbroken"
    assert list(books(database)) == [lines]
    assert chapters([*lines, ""]) == ["One two.\nNew.", "End."]
