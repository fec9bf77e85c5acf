"""`toptwo model quality`: what quantising a model costs, measured token by token on a fixed text.

Every position's next-token distribution is compared with that of the same model in float32: mean and
99th percentile of the Kullback-Leibler divergence, how often the likeliest token is the same, and the
perplexity of the text. All models run as the server runs them, on the native kernels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from toptwo.errors import StartupError
from toptwo.model_commands.forward import TEXT, distributions, load, read_windows
from toptwo.settings import load_settings
from toptwo.source import find_model

FORMATS = ("int8", "int4")


@dataclass(frozen=True)
class Quality:
    """Divergences in nats, over `num_tokens` positions; agreement is a share of 1."""

    quantization: str
    num_tokens: int
    mean_kl: float
    p99_kl: float
    top1_agreement: float
    perplexity: float


@dataclass(frozen=True)
class QualityOptions:
    """What to measure: a directory, hub id or None for the default model; formats; a text of one's own."""

    model: str | None
    quantizations: Sequence[str]
    text: Path | None
    json_file: Path | None


def quality(options: QualityOptions, console: Console) -> None:
    """Measure and print. Raises StartupError with one clear line for what cannot be measured."""
    unknown = [name for name in options.quantizations if name not in FORMATS]
    if unknown or not options.quantizations:
        raise StartupError(f"--quantization {','.join(unknown)}: there is {', '.join(FORMATS)}")
    base: dict[str, object] = {} if options.model is None else {"model": options.model}
    source = find_model(load_settings(base)[0], console)
    windows = read_windows(source.directory, options.text or TEXT)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Measuring", total=(1 + len(options.quantizations)) * len(windows))
        exact = []
        for logprobs in distributions(load(source.directory, dtype="float32"), windows):
            exact.append(logprobs)
            progress.advance(task)
        results = [_measure("none", windows, exact, exact)]
        for name in options.quantizations:
            rounded = []
            for logprobs in distributions(load(source.directory, quantization=name), windows):
                rounded.append(logprobs)
                progress.advance(task)
            results.append(_measure(name, windows, exact, rounded))
    console.print(_table(source.name, results))
    if options.json_file:
        report = {"model": source.name, "results": [asdict(result) for result in results]}
        options.json_file.write_text(json.dumps(report, indent=2) + "\n")


def _measure(name: str, windows: list[list[int]], exact: list[Tensor], rounded: list[Tensor]) -> Quality:
    divergences, agreements, surprises = [], [], []
    for window, p, q in zip(windows, exact, rounded, strict=True):
        divergences.append((p.exp() * (p - q)).sum(-1))
        agreements.append((p.argmax(-1) == q.argmax(-1)).float())
        following = torch.tensor(window[1:]).unsqueeze(1)
        surprises.append(-q[:-1].gather(1, following).squeeze(1))
    divergence = torch.cat(divergences)
    return Quality(
        quantization=name,
        num_tokens=len(divergence),
        mean_kl=float(divergence.mean().clamp(min=0)),
        p99_kl=float(divergence.quantile(0.99).clamp(min=0)),
        top1_agreement=float(torch.cat(agreements).mean()),
        perplexity=float(torch.cat(surprises).mean().exp()),
    )


def _table(model: str, results: list[Quality]) -> Table:
    table = Table(title=f"{model}, {results[0].num_tokens} tokens, against float32")
    for heading in ("weights", "mean KL", "p99 KL", "same top-1", "perplexity"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    for r in results:
        figures = f"{r.mean_kl:.5f}", f"{r.p99_kl:.4f}", f"{r.top1_agreement:.2%}", f"{r.perplexity:.3f}"
        table.add_row("float32" if r.quantization == "none" else r.quantization, *figures)
    return table
