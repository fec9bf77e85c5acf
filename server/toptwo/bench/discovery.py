"""What is found out about a server before it is loaded: whether it answers, which model, how it counts.

Whatever would make every request of a run fail is said here, in one line, before the run begins.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace

import httpx2

from toptwo.bench.client import Outcome, Target, error_message, headers_of, kind_of, run_call
from toptwo.bench.workload import Shape, distinct_words
from toptwo.errors import StartupError

LIST_SECONDS = 30.0  # for the list of models, which costs a server nothing
PROBE_WORDS = 16
# A request that is refused with one of these is wrong in itself; any other failure may pass.
KEY_REFUSALS = {"http 401", "http 403"}
REFUSALS = {f"http {status}" for status in (400, 404, 405, 413, 415, 422)}


@dataclass(frozen=True)
class Key:
    """A key for the server, and where it came from, for those who must mend it."""

    secret: str | None
    source: str


def base_url(text: str) -> str:
    """The base URL as OpenAI clients take it; a bare host gets the usual path. Raises StartupError."""
    try:
        url = httpx2.URL(text.strip())
    except httpx2.InvalidURL as error:
        raise StartupError(f"URL {text!r}: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise StartupError(f"URL {text!r}: give a whole one, such as http://127.0.0.1:8000/v1")
    shown = str(url).rstrip("/").removesuffix("/chat/completions")
    return f"{shown}/v1" if url.path in ("", "/") else shown


async def find_target(http: httpx2.AsyncClient, url: str, key: Key, model: str | None) -> Target:
    """The server and the model to ask for: the one named, or else the first it lists.

    Raises StartupError when the server does not answer, refuses the key, or lists no such model.
    """
    models = await _list_models(http, url, key)
    if models is None and model is None:
        raise StartupError(f"{url}/models lists no model; is the URL right? Or name one with --model")
    if models and model and model not in models:
        raise StartupError(f"--model {model}: {url} has no such model; it serves {', '.join(models[:9])}")
    return Target(url, key.secret, model or (models or [""])[0])


async def probe(http: httpx2.AsyncClient, target: Target, shape: Shape, key: Key) -> Shape:
    """Make one tiny request, and learn from it what the chat template adds to a prompt.

    Raises StartupError when the server refuses requests of this shape altogether.
    """
    words = distinct_words(random.Random(), PROBE_WORDS)  # noqa: S311
    outcome = await run_call(http, target, shape.call(" ".join(words), 1))
    if outcome.error in KEY_REFUSALS:  # some servers list their models to anybody
        raise _key_refused(target.base_url, key, outcome.error)
    if outcome.error in REFUSALS:
        raise StartupError(_refusal(target, shape, outcome))
    if outcome.prompt_tokens is None:
        return shape
    return replace(shape, overhead=max(0, outcome.prompt_tokens - PROBE_WORDS))


async def _list_models(http: httpx2.AsyncClient, url: str, key: Key) -> list[str] | None:
    """The ids of the server's models, or None when it keeps no list."""
    try:
        async with asyncio.timeout(LIST_SECONDS):
            response = await http.get(f"{url}/models", headers=headers_of(key.secret))
    except (TimeoutError, httpx2.HTTPError) as error:
        raise StartupError(f"{url}: {kind_of(error)}; is a server running there?") from None
    if (status := f"http {response.status_code}") in KEY_REFUSALS:
        raise _key_refused(url, key, status)
    try:
        return [str(card["id"]) for card in response.json()["data"]] or None
    except (ValueError, TypeError, KeyError):
        if response.status_code >= 500:
            said = error_message(response.content)
            raise StartupError(f"{url}/models: {status}: {said}") from None
        return None


def _key_refused(url: str, key: Key, status: str) -> StartupError:
    given = f"refuses the key from {key.source}" if key.secret else "wants a key; give --api-key"
    return StartupError(f"{url} {given} ({status})")


def _refusal(target: Target, shape: Shape, outcome: Outcome) -> str:
    said = f": {outcome.detail}" if outcome.detail else ""
    hint = ""
    if "ignore_eos" in shape.extra and "ignore_eos" in (outcome.detail or ""):
        hint = "; try --no-ignore-eos"
    return f"{target.base_url} refuses model {target.model!r} ({outcome.error}){said}{hint}"
