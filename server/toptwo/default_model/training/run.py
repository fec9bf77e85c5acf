"""One training run: its batches, its steps, and a state on disk that a stopped run goes on from.

Must not know the command line or how the results are packed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from toptwo.default_model.router_corpus import DOMAINS
from toptwo.default_model.training.chat import Turn
from toptwo.default_model.training.losses import cross_entropy, divergence, load_balance
from toptwo.default_model.training.low_rank import Experts, Mixture
from toptwo.default_model.training.text import Tokens

STATE = "state.safetensors"
IGNORED = -1  # a position of a chat batch behind its answer's end


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. Every step has one sequence of each domain and `chats` of chat."""

    steps: int
    length: int = 128
    chats: int = 2
    rate: float = 2e-3
    warmup: int = 20
    balance: float = 0.02
    save_every: int = 50

    def rate_at(self, step: int) -> float:
        """Warm-up, then a cosine down to a hundredth."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)

    @property
    def tokens_per_step(self) -> int:
        return self.length * (len(DOMAINS) + self.chats)


@dataclass(frozen=True)
class Material:
    """Training tokens of each domain, and chat."""

    domains: dict[str, Tokens]
    chat: list[Turn]


def train(
    model: Mixture,
    material: Material,
    schedule: Schedule,
    folder: Path,
    report: Callable[[dict[str, float]], None],
) -> None:
    """Run all steps, or those that are left; `folder` has the state and `log.jsonl`.

    report: hears what is logged. Raises ValueError where the folder's state is of another plan or schedule.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    state = State(folder, {"plan": asdict(model.plan), "schedule": asdict(schedule)})
    first = state.load(model, optimiser)
    batches = Batches(material, schedule, model.trunk.device)
    begun = time.perf_counter()
    for step in range(first, schedule.steps):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate_at(step)
        figures = losses(model, *batches.at(step), schedule)
        torch.stack(list(figures.values())).sum().backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        line = {name: value.item() for name, value in figures.items()}
        spent = time.perf_counter() - begun
        line |= {"step": step, "tokens": (step + 1) * schedule.tokens_per_step, "norm": norm.item()}
        line["tokens_per_second"] = (step + 1 - first) * schedule.tokens_per_step / spent
        with (folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        report(line)
        if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
            state.save(step + 1, model, optimiser)


def losses(model: Mixture, text_BT: Tensor, chat_BT: Tensor, schedule: Schedule) -> dict[str, Tensor]:
    """The parts of a step's loss, each already weighted; their sum is what is minimised."""
    trunk = model.trunk
    kept = chat_BT.clamp(min=0)
    hidden, logits = model(torch.cat([text_BT, kept]), Experts.route)
    with torch.no_grad():
        teacher, _ = model(kept, None)
    words, chat = hidden.split([len(text_BT), len(kept)])
    known = chat_BT.flatten() != IGNORED
    figures = {
        "cross_entropy": cross_entropy(
            words[:, :-1].flatten(0, 1), trunk.embedding_VH, text_BT[:, 1:].flatten()
        ).mean(),
        "divergence": divergence(
            chat.flatten(0, 1)[known], teacher.flatten(0, 1)[known], trunk.embedding_VH
        ).mean(),
    }
    if len(model.experts[0].router_EH) > 1:
        top_k = model.experts[0].top_k
        uneven = [load_balance(each[: text_BT.numel()], top_k) for each in logits]
        figures["load_balance"] = schedule.balance * torch.stack(uneven).mean()
    return figures


class Batches:
    """Which tokens a step sees: every domain's text in a shuffled order, again when it has all been seen."""

    def __init__(self, material: Material, schedule: Schedule, device: torch.device) -> None:
        self._length, self._chats, self._device = schedule.length, schedule.chats, device
        self._domains = [self._cut(material.domains[name]) for name in DOMAINS]
        self._chat = [self._padded(turn.tokens) for turn in material.chat]

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """(text [domains, T], chat [chats, T])."""
        text = [pieces[_place(step, len(pieces), number)] for number, pieces in enumerate(self._domains)]
        chosen = range(step * self._chats, (step + 1) * self._chats)
        chat = [self._chat[_place(count, len(self._chat), len(DOMAINS))] for count in chosen]
        return self._tensor(text), self._tensor(chat)

    def _tensor(self, rows: list[Tokens]) -> Tensor:
        return torch.tensor(np.stack(rows), dtype=torch.long, device=self._device)

    def _cut(self, tokens: Tokens) -> Tokens:
        return tokens[: len(tokens) // self._length * self._length].reshape(-1, self._length)

    def _padded(self, tokens: list[int]) -> Tokens:
        row = np.full(self._length, IGNORED, np.int32)
        row[: len(tokens)] = tokens[: self._length]
        return row


def _place(count: int, size: int, stream: int) -> int:
    """The count-th of a stream's pieces: each round through them is in another fixed order."""
    turn, place = divmod(count, size)
    return int(np.random.default_rng([stream, turn]).permutation(size)[place])


class State:
    """Where a run stands, on disk; a reader finds the old one or the new one whole."""

    def __init__(self, folder: Path, identity: dict[str, object]) -> None:
        self._path, self._identity = folder / STATE, json.dumps(identity)

    def load(self, model: Mixture, optimiser: torch.optim.Optimizer) -> int:
        """The step to go on with; 0 without a state."""
        if not self._path.exists():
            return 0
        with safe_open(self._path, "pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["identity"] != self._identity:
            raise ValueError(f"{self._path} is of a run with other settings: {about['identity']}")
        model.load_state_dict({name: tensors.pop(name) for name in model.state_dict()})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, key = name.split("/")
            moments.setdefault(int(index), {})[key] = tensor
        optimiser.load_state_dict(optimiser.state_dict() | {"state": moments})
        return int(about["step"])

    def save(self, step: int, model: Mixture, optimiser: torch.optim.Optimizer) -> None:
        tensors = dict(model.state_dict())
        for index, moments in optimiser.state_dict()["state"].items():
            tensors |= {f"{index}/{key}": tensor for key, tensor in moments.items()}
        partial = self._path.with_suffix(".partial")
        save_file(tensors, partial, {"identity": self._identity, "step": str(step)})
        partial.replace(self._path)


def read_log(folder: Path) -> Iterator[dict[str, float]]:
    """The lines of a run's log, each step once: what a resumed run did again counts."""
    lines = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    yield from {line["step"]: line for line in lines}.values()
