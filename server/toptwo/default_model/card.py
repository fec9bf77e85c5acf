"""Prints what the trained experts are worth, from the shipped files: held-out perplexities and routing.

    python -m toptwo.default_model.card            all held-out text, twenty minutes on two cores
    python -m toptwo.default_model.card --quick    a sixteenth of it

A bar that is missed is printed with its figure, and the exit status is 1. A developer's tool, as `train`; the
server never imports it.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from torch import Tensor

from toptwo.default_model.checkpoint import ROUTER_NAME
from toptwo.default_model.factors import Factors
from toptwo.default_model.gguf_weights import DenseGguf
from toptwo.default_model.router_corpus import DOMAINS
from toptwo.default_model.train import MIXTURE, base_model, device_of, product_dtype
from toptwo.default_model.training.losses import cross_entropy
from toptwo.default_model.training.low_rank import Chooser, Experts, Mixture, Trunk
from toptwo.gguf.tokenizer import build_tokenizer

HERE = Path(__file__).parent
EXPERTS_FILE = HERE / "experts.safetensors"
QUICK = 16  # a quick run takes one text in so many

Texts = dict[str, list[list[int]]]


@dataclass
class Routed:
    """Where the tokens of each domain went: chosen slots [L, domains, E]."""

    slots: Tensor = field(
        default_factory=lambda: torch.zeros(0, len(DOMAINS), MIXTURE.num_experts, dtype=torch.long)
    )

    def add(self, domain: int, logits: list[Tensor], top_k: int) -> None:
        chosen = torch.stack([each.topk(top_k).indices.flatten() for each in logits])
        if not len(self.slots):
            self.slots = self.slots.new_zeros(len(logits), *self.slots.shape[1:])
        for layer, row in enumerate(chosen):
            self.slots[layer, domain] += torch.bincount(row, minlength=self.slots.shape[2])

    @property
    def share(self) -> Tensor:
        """[domains, E], mean of layers."""
        return (self.slots / self.slots.sum(2, keepdim=True)).mean(0)

    @property
    def load_entropy(self) -> float:
        """1 where all experts of a layer get as many tokens; mean of layers."""
        loads = self.slots.sum(1) / self.slots.sum((1, 2))[:, None]
        return float((torch.special.entr(loads).sum(1) / math.log(loads.shape[1])).mean())


def main(
    work: Annotated[Path | None, typer.Argument(help="Where the base model is or is downloaded to.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A sixteenth of the text.")] = False,
) -> None:
    """Print the table of the model card."""
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        dense = base_model(work or Path(name))
        mixture = shipped_mixture(dense)
        texts = held_out(build_tokenizer(dense.words, dense.vocabulary, "llama"), QUICK if quick else 1)
        routed = Routed()
        columns = {
            title: dict(
                perplexities(mixture, texts, chooser, console, title, routed if title == "MoE" else None)
            )
            for title, chooser in choosers().items()
        }
    console.print(table(columns))
    console.print(share_table(routed))
    lines = list(verdicts(columns, routed))
    console.print("\n".join(lines))
    raise typer.Exit(any(line.endswith("MISSED") for line in lines))


def shipped_mixture(dense: DenseGguf) -> Mixture:
    """The training's model with the weights that are shipped."""
    where = device_of("auto")
    mixture = Mixture(Trunk(dense, product_dtype(where), where), MIXTURE)
    tensors = load_file(EXPERTS_FILE)
    for layer, experts in enumerate(mixture.experts):
        experts.router_EH.copy_(torch.from_numpy(tensors[ROUTER_NAME.format(layer)]))
        for matrix, factors in Factors.of_layer(tensors, layer).items():
            part = getattr(experts, matrix)
            part.b_EOR.copy_(torch.from_numpy(factors.b_EOR * factors.scale_ER[:, None]))
            part.a_ERI.copy_(torch.from_numpy(factors.a_ERI.astype(np.float32)))
    return mixture


def held_out(tokenizer: Tokenizer, one_in: int) -> Texts:
    """Tokens of the held-out excerpts of each domain, and of the held-out chats."""
    excerpts = json.loads((HERE / "held_out.json").read_text("utf-8"))
    texts = {
        name: [tokenizer.encode(each["text"]).ids for each in excerpts[name][::one_in]] for name in DOMAINS
    }
    chats = json.loads((HERE / "held_out_chat.json").read_text("utf-8"))
    return texts | {"chat": [turn["tokens"] for turn in chats[::one_in]]}


def choosers() -> dict[str, Chooser | None]:
    """How each column of the table routes. Permuted: every expert does the work of the next one."""

    def permuted(experts: Experts, x_NH: Tensor) -> tuple[Tensor, Tensor]:
        logits_NE = experts.route(x_NH)[0].roll(1, 1)
        return logits_NE, logits_NE.topk(experts.top_k).indices

    generator = torch.Generator().manual_seed(0)

    def random(experts: Experts, x_NH: Tensor) -> tuple[Tensor, Tensor]:
        logits_NE = torch.rand(len(x_NH), len(experts.router_EH), generator=generator).to(x_NH.device)
        return logits_NE, logits_NE.topk(experts.top_k).indices

    return {"dense": None, "MoE": Experts.route, "permuted": permuted, "random": random}


def perplexities(
    mixture: Mixture,
    texts: Texts,
    chooser: Chooser | None,
    console: Console,
    title: str,
    routed: Routed | None,
) -> Iterator[tuple[str, float]]:
    """Of each domain, over the tokens of all its texts. routed: hears where they went."""
    for name, documents in texts.items():
        losses = []
        for ids in track(documents, f"{title}: {name}", console=console, transient=True):
            tokens = torch.tensor([ids], device=mixture.trunk.device)
            hidden, logits = mixture(tokens, chooser)
            losses.append(cross_entropy(hidden[0, :-1], mixture.trunk.embedding_VH, tokens[0, 1:]))
            if routed is not None and name in DOMAINS:
                routed.add(DOMAINS.index(name), logits, mixture.plan.top_k)
        yield name, torch.cat(losses).mean().exp().item()


def geo_mean(column: dict[str, float]) -> float:
    """Of the domains, chat left out."""
    return math.exp(sum(math.log(column[name]) for name in DOMAINS) / len(DOMAINS))


def table(columns: dict[str, dict[str, float]]) -> Table:
    result = Table("held-out perplexity", *columns)
    for name in (*DOMAINS, "chat"):
        result.add_row(name, *(f"{column[name]:.2f}" for column in columns.values()))
    result.add_row("geo-mean of domains", *(f"{geo_mean(column):.2f}" for column in columns.values()))
    return result


def share_table(routed: Routed) -> Table:
    result = Table("share of slots", *(f"expert {number}" for number in range(MIXTURE.num_experts)))
    for name, row in zip(DOMAINS, routed.share, strict=True):
        result.add_row(name, *(f"{value:.2f}" for value in row.tolist()))
    return result


def verdicts(columns: dict[str, dict[str, float]], routed: Routed) -> Iterator[str]:
    """Each bar, what was reached, and whether that is enough."""
    trained = geo_mean(columns["MoE"])
    figures = (
        ("geo-mean / dense", trained / geo_mean(columns["dense"]), "<=", 0.70),
        ("random routing / trained", geo_mean(columns["random"]) / trained, ">=", 1.10),
        ("load entropy", routed.load_entropy, ">=", 0.95),
        ("chat / dense", columns["MoE"]["chat"] / columns["dense"]["chat"], "<=", 1.02),
    )
    for name, value, sign, bar in figures:
        reached = value <= bar if sign == "<=" else value >= bar
        yield f"{name}: {value:.3f} (bar {sign} {bar:.2f}): {'reached' if reached else 'MISSED'}"


if __name__ == "__main__":
    typer.run(main)
