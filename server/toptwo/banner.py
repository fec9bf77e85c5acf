"""What a person sees when the server is ready."""

from __future__ import annotations

import json
import shlex

from rich.console import Console

from toptwo import __version__
from toptwo.local_key import LocalKey
from toptwo.messages import EngineInfo
from toptwo.settings import SECRETS, Settings

GIB = 1 << 30
_OF_ACCOUNTS = "that of an account; to make one on this machine: toptwo keys create"


def print_banner(
    console: Console, model: str, info: EngineInfo, url: str, settings: Settings, sources: dict[str, str]
) -> None:
    """Model, device, memory plan, and where each non-default setting came from."""
    tokens = info.num_blocks * info.block_size
    caching = "on" if info.prefix_caching else "off"
    weights, cache = info.weight_bytes / GIB, info.kv_cache_bytes / GIB
    lines = [
        ("model", f"{model}  ({info.architecture}, {info.num_parameters / 1e6:,.1f} M parameters)"),
        ("device", f"{info.device}, {info.num_threads} threads, {info.backend} kernels"),
        ("weights", f"{weights:.2f} GiB, {info.dtype if info.quantization == 'none' else info.quantization}"),
        ("KV cache", f"up to {cache:.2f} GiB, {info.kv_dtype}"),
        ("", f"= {tokens:,} tokens in {info.num_blocks:,} blocks of {info.block_size}"),
        ("limits", f"context {info.max_model_len:,}, {info.max_num_seqs} sequences at once"),
        ("", f"{info.max_step_tokens} tokens per step, prefix caching {caching}"),
        ("loaded in", f"{info.load_seconds:.1f} s"),
    ]
    lines += [
        ("setting" if index == 0 else "", _show_setting(settings, name, source))
        for index, (name, source) in enumerate(sources.items())
    ]
    lines.append(("serving", url))
    _print(console, f"\ntoptwo {__version__} is ready\n")
    for label, text in lines:
        _print(console, f"  {label:<10}{text}")


def print_chat_off(console: Console) -> None:
    """What a model without a chat template can be asked for."""
    _print(console, f"  {'chat':<10}off: the model has no chat template; completions work,")
    _print(console, f"  {'':<10}and --chat-template FILE gives it one")


def print_key(
    console: Console,
    key: LocalKey | None,
    url: str,
    model: str,
    *,
    has_chat: bool = True,
    has_accounts: bool = False,
) -> None:
    """The key, if it was made by this start, and a line to copy that tries it."""
    if key is None:
        _print(console, f"  {'key':<10}{_OF_ACCOUNTS if has_accounts else 'as configured'}")
        bearer = "$TOPTWO_API_KEY"
    elif key.created:
        _print(console, f"  {'key':<10}{key.secret}")
        key.shown = True
        _print(console, f"  {'':<10}created now and kept in {key.path}; it is not shown again")
        bearer = key.secret
    else:
        _print(console, f"  {'key':<10}the one in {key.path}")
        bearer = f"$(cat {shlex.quote(str(key.path))})"
    if has_chat:
        path, question = "chat/completions", "What is the capital of France?"
        asked: dict[str, object] = {"messages": [{"role": "user", "content": question}]}
    else:
        path, asked = "completions", {"prompt": "The capital of France is"}
    body = json.dumps({"model": model, **asked, "temperature": 0.2, "max_tokens": 100, "stream": True})
    _print(
        console,
        f'\nTry it:\n\n  curl -N {url}/{path} -H "Authorization: Bearer {bearer}" '
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}\n",
    )


def _show_setting(settings: Settings, name: str, source: str) -> str:
    shown = "(hidden)" if name in SECRETS else getattr(settings, name)
    return f"{name} = {shown}  from {source}"


def _print(console: Console, text: str) -> None:
    # As it is: a line to copy must not be wrapped, and nothing in it is markup.
    console.print(text, markup=False, highlight=False, soft_wrap=True)
