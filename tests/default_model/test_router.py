"""The pieces of the router's training that can be wrong without anybody noticing."""

from __future__ import annotations

import torch

from toptwo.default_model.checkpoint import ROUTER_NAME
from toptwo.default_model.ridge import FIRST_EXPERT_WEIGHT, Ridge, measure, scale_for
from toptwo.default_model.router_corpus import DOMAINS, Document, paragraphs
from toptwo.default_model.router_maths import HELD_OUT, TRAINING, worksheet


def test_a_page_is_held_out_in_all_languages_or_in_none() -> None:
    sides = {
        key: {Document(domain, key, "").held_out for domain in DOMAINS}
        for key in (f"swriter/page-{i}.html" for i in range(200))
    }
    assert all(len(side) == 1 for side in sides.values())
    assert 20 < sum(side == {True} for side in sides.values()) < 60


def test_held_out_worksheets_have_problems_of_their_own() -> None:
    assert not set(TRAINING) & set(HELD_OUT)
    assert worksheet(3, held_out=True) == worksheet(3, held_out=True)
    assert "\\int" in "".join(worksheet(seed, held_out=True) for seed in range(5))
    assert "\\int" not in "".join(worksheet(seed, held_out=False) for seed in range(20))


def test_paragraphs_are_the_text_of_the_page_without_navigation() -> None:
    page = """<body><p>menu</p><div id="DisplayArea" itemprop="help"><h1>Title</h1>
    <p>One <b>bold</b>
    line.</p></div><div id="SearchFrame"></div><p>footer</p>"""
    assert paragraphs(page) == "Title\nOne bold line."


def test_scale_gives_the_first_expert_its_weight() -> None:
    logits_TE = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    best = (scale_for(logits_TE) * logits_TE).topk(2).values.softmax(-1)
    assert abs(best[:, 0].mean().item() - FIRST_EXPERT_WEIGHT) < 1e-3


def test_measures_of_a_perfect_router() -> None:
    labels_T = torch.arange(8).repeat(10)
    # Second choice: the next expert, so that the load is even.
    logits_TE = 2.0 * torch.eye(8)[labels_T] + torch.eye(8)[(labels_T + 1) % 8]
    values = measure(logits_TE[None], labels_T, DOMAINS, 2)
    assert values["top-1 = own expert"] == 1
    assert values["own expert in the top 2"] == 1
    assert abs(values["load entropy (1 = even), mean of layers"] - 1) < 1e-6
    assert values["largest expert share, worst layer"] == 0.125


def test_trainer_and_writer_agree_on_names() -> None:
    assert ROUTER_NAME.format(3) == "model.layers.3.mlp.gate.weight"


def test_ridge_tells_apart_what_can_be() -> None:
    """Tokens of three domains around points of their own; in the second layer there is nothing to tell."""
    generator = torch.Generator().manual_seed(0)
    centres_EH = torch.randn(3, 16, generator=generator)
    ridge = Ridge(num_layers=2, num_experts=3, hidden_size=16)
    for expert in (0, 1, 2) * 20:
        noise_TH = 0.3 * torch.randn(10, 16, generator=generator)
        ridge.add(0, centres_EH[expert] + noise_TH, expert)
        ridge.add(1, noise_TH, expert)
    routers_LEH = ridge.solve()
    assert routers_LEH.shape == (2, 3, 16)
    labels_T = torch.arange(3).repeat(200)
    noise_TH = 0.3 * torch.randn(600, 16, generator=generator)
    inputs = centres_EH[labels_T] + noise_TH, noise_TH
    own = [
        ((x_TH @ router_EH.T).argmax(-1) == labels_T).float().mean()
        for x_TH, router_EH in zip(inputs, routers_LEH, strict=True)
    ]
    assert own[0] > 0.95
    assert abs(own[1] - 1 / 3) < 0.1


def test_ridge_is_solved_on_several_threads() -> None:
    """torch's general solver, given as many layers as this, fails on more than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ridge = Ridge(num_layers=30, num_experts=8, hidden_size=576)
        x_TH = torch.randn(700, 576, generator=torch.Generator().manual_seed(0))
        for layer in range(30):
            ridge.add(layer, x_TH, layer % 8)
        assert ridge.solve().isfinite().all()
    finally:
        torch.set_num_threads(threads)
