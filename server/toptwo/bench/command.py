"""`toptwo bench` from its options to its exit status: find the server, load it level by level, report.

The composition root of this room; everything that is measured or shown is done elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx2
from rich.console import Console
from rich.markup import escape

from toptwo.bench.client import Call, Outcome, Target, is_local, open_client, run_call
from toptwo.bench.discovery import Key, base_url, find_target, probe
from toptwo.bench.embedded import embedded_server
from toptwo.bench.live import watch
from toptwo.bench.load import Level, LevelRun, run_level
from toptwo.bench.options import BenchOptions
from toptwo.bench.plot import require_matplotlib, write_plot
from toptwo.bench.report import Report, print_report, write_json
from toptwo.bench.workload import Shape, calls
from toptwo.errors import StartupError
from toptwo.local_key import FILE_NAME
from toptwo.settings import client_key, load_settings


def run_bench(options: BenchOptions, serve_arguments: Sequence[str], console: Console) -> int:
    """Measure, print and write what was asked for. Returns the exit status: 1 when no request succeeded.

    Raises StartupError when there is nothing to measure, or no place for the results.
    """
    _check_places(options)
    aside = Console(stderr=True)
    with _server(options, serve_arguments, aside) as (url, key):
        report = asyncio.run(measure(options, url, key, aside))
    print_report(console, report)
    if options.json_file:
        write_json(report, options.json_file)
    if options.plot_file:
        write_plot(report, options.plot_file)
    return int(report.all_failed)


async def measure(options: BenchOptions, url: str, key: Key, console: Console) -> Report:
    """Load the server with one level after another. console: for the progress. Raises StartupError."""
    began = datetime.now(UTC)
    async with open_client(url) as http:
        target = await find_target(http, url, key, options.model)
        shape = await probe(http, target, shape_of(options), key)
        loader = _Loader(http, target, shape, options.seed, console)
        if options.warmup:
            await loader.run(Level(concurrency=options.warmup, requests=options.warmup), "warm-up")
        runs = [await loader.run(level, level.name) for level in levels_of(options)]
    return Report(options, target, shape.overhead, began, runs)


def levels_of(options: BenchOptions) -> list[Level]:
    """The intensities to measure, one after another."""
    bounds: dict[str, Any] = {"requests": options.requests, "duration": options.duration}
    if options.rate:
        return [Level(rate=rate, **bounds) for rate in options.rate]
    return [Level(concurrency=concurrency, **bounds) for concurrency in options.concurrency or (1,)]


def shape_of(options: BenchOptions) -> Shape:
    """What all requests have in common, as far as it is known before the server is."""
    return Shape(
        options.prompt_tokens,
        options.max_tokens,
        shared_prefix=options.shared_prefix,
        temperature=options.temperature,
        extra={"ignore_eos": True} if options.ignore_eos else {},
        timeout=options.timeout,
    )


def find_key(given: str | None, url: str) -> Key:
    """The key to use: the one given, else the environment's, else the one that a server of ours made here.

    That last one is for local servers only. Raises StartupError.
    """
    key = Key(given, "--api-key")
    if given is None and (found := client_key()):
        key = Key(*found)
    elif given is None and is_local(url):
        # Settings that a server would refuse are no obstacle to measuring another one.
        with contextlib.suppress(OSError, UnicodeDecodeError, StartupError):
            path = load_settings({})[0].cache_dir / FILE_NAME
            key = Key(path.read_text().strip() or None, str(path))
    if key.secret and not (key.secret.isascii() and key.secret.isprintable()):
        raise StartupError(f"{key.source}: a key must be printable ASCII")
    return key


@dataclass(frozen=True)
class _Loader:
    """What all levels of a measurement share; they begin with the same seed, and so ask for the same work."""

    http: httpx2.AsyncClient
    target: Target
    shape: Shape
    seed: int
    console: Console

    async def run(self, level: Level, name: str) -> LevelRun:
        """One level, shown under this name."""
        async with watch(self.console, level, name) as meter:

            async def ask(call: Call) -> Outcome:
                outcome = await run_call(self.http, self.target, call, meter.on_token)
                meter.on_outcome(outcome)
                return outcome

            return await run_level(level, calls(self.shape, self.seed), ask, self.seed)


@contextlib.contextmanager
def _server(
    options: BenchOptions, serve_arguments: Sequence[str], console: Console
) -> Iterator[tuple[str, Key]]:
    """The server to load, the embedded one when no URL is given. Raises StartupError."""
    if options.url is not None:
        if serve_arguments:
            raise StartupError(f"{serve_arguments[0]}: with a URL, no server is started that could obey it")
        url = base_url(options.url)
        yield url, find_key(options.api_key, url)
        return
    with contextlib.ExitStack() as stack:
        with console.status("starting the embedded server") as status:

            def tell(line: str) -> None:
                status.update(f"starting the embedded server  [dim]{escape(line)}[/dim]")

            server = stack.enter_context(embedded_server(serve_arguments, tell))
        yield server.url, Key(server.key, "this run")


def _check_places(options: BenchOptions) -> None:
    """Find out before the measurement, not after it, that its results could not be written."""
    for flag, path in (("--json", options.json_file), ("--plot", options.plot_file)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise StartupError(f"{flag} {path}: no file can be written there")
    if options.plot_file is not None:
        require_matplotlib()
