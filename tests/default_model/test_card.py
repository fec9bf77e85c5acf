"""The table of the model card: what it counts, and that a missed bar is said to be missed."""

from __future__ import annotations

import pytest
import torch

from default_model.test_training import mixture_of
from default_model.tiny_gguf import EXPERTS, Kitchen
from toptwo.default_model.card import Routed, choosers, geo_mean, verdicts
from toptwo.default_model.router_corpus import DOMAINS


def test_routing_is_counted_by_domain_and_expert() -> None:
    routed = Routed()
    for domain in range(len(DOMAINS)):
        routed.add(domain, [torch.eye(8)[[domain] * 5] * 2 + torch.eye(8)[[(domain + 1) % 8] * 5]] * 3, 2)
    assert routed.slots.shape == (3, 8, 8)
    assert routed.share[2].tolist() == [0, 0, 0.5, 0.5, 0, 0, 0, 0]
    assert routed.load_entropy == pytest.approx(1)
    lopsided = Routed()
    lopsided.add(0, [torch.tensor([[9.0, 8, 0, 0, 0, 0, 0, 0]])], 2)
    assert lopsided.load_entropy == pytest.approx(1 / 3)  # two of eight


def test_the_ways_to_route_differ_as_their_names_say(kitchen: Kitchen) -> None:
    experts = mixture_of(kitchen).experts[0]
    x_NH = torch.randn(50, experts.router_EH.shape[1], generator=torch.Generator().manual_seed(0))
    chosen = {title: chooser(experts, x_NH)[1] for title, chooser in choosers().items() if chooser}
    assert torch.equal(chosen["permuted"], (chosen["MoE"] + 1) % EXPERTS)
    assert not torch.equal(chosen["random"], chosen["MoE"])
    assert torch.bincount(chosen["random"].flatten(), minlength=EXPERTS).min() > 0


def test_each_bar_can_be_missed() -> None:
    def column(domains: float, chat: float) -> dict[str, float]:
        return {**dict.fromkeys(DOMAINS, domains), "chat": chat}

    even = Routed(torch.ones(1, 8, 8, dtype=torch.long))
    good = {"dense": column(10, 8), "MoE": column(6, 8), "random": column(7, 8)}
    assert geo_mean(good["MoE"]) == pytest.approx(6)
    assert [line.rpartition(" ")[2] for line in verdicts(good, even)] == ["reached"] * 4
    one = Routed(torch.zeros(1, 8, 8, dtype=torch.long))
    one.slots[..., 0] = 1
    bad = {"dense": column(8, 8), "MoE": column(6, 8.2), "random": column(6, 8)}
    assert [line.rpartition(" ")[2] for line in verdicts(bad, one)] == ["MISSED"] * 4
