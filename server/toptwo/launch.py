"""The composition root of the API process: the only module that sees engine client and app together.

It owns text and HTTP and never imports torch; the model lives in an engine process, which
`launch_engine` puts together.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import uvicorn
import uvloop
from rich.console import Console

from toptwo.accounts.book import AccountBook
from toptwo.accounts.opening import are_on, grant_of, open_book
from toptwo.api.admission import AdmissionLimits
from toptwo.api.connection import BoundedHttp
from toptwo.api.health import Lifecycle
from toptwo.api.security import KeyRing
from toptwo.app import AppOptions, create_app
from toptwo.banner import print_banner, print_chat_off, print_key
from toptwo.engine.supervisor import EngineCommand, Supervisor
from toptwo.errors import StartupError
from toptwo.heap import keep_heap_small
from toptwo.identity.opening import SignIn, open_sign_in
from toptwo.local_key import LocalKey, load_or_create_key
from toptwo.messages import EngineInfo
from toptwo.settings import SECRETS, Settings, environment_without_settings, unknown_variables
from toptwo.source import ModelSource, find_model
from toptwo.telemetry.logs import configure_logging
from toptwo.text.grammar import GrammarChecker
from toptwo.text.model import load_served_model

log = structlog.get_logger()

RUN_DIR_PREFIX = "toptwo-run-"
LONGEST_SOCKET_DIR = 80  # a Unix socket's path has at most 107 bytes, the file's name included
BACKLOG = 2048
# libuv takes in one connection per listening socket and turn of its loop, and a turn answers all who wait:
# a busy server would leave new clients, and health checks, at the door for seconds.
ACCEPTS_PER_TURN = 32
# What the kernel keeps of an answer that its client does not take: by itself, it lets this grow to megabytes.
SEND_BUFFER_BYTES = 128 * 1024
KEEP_ALIVE_SECONDS = 60  # of silence, after which the kernel asks whether the client's machine is still there
MOST_OPEN_FILES = 1 << 16  # far more connections than one process serves
CUT_SECONDS = 5  # for the error events of requests that are cut at the end of the drain time


def serve(settings: Settings, sources: dict[str, str], console: Console) -> None:
    """Serve until SIGTERM or Ctrl-C, which drain open requests first.

    Raises StartupError when the server cannot start, or its engine keeps dying.
    """
    # Until there is something to drain. SIGINT too: asyncio would else put a handler of its own in place,
    # which cancels everything, and which a signal in the first moments still reaches.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit_on_signal)
    configure_logging(settings.log_level, quoting=False)
    _raise_file_limit()
    keep_heap_small()
    for name in unknown_variables():
        log.warning("there is no such setting; the variable is ignored", variable=name)
    sign_in = open_sign_in(settings)
    with contextlib.closing(_bind(settings)) as listener, _run_dir() as run_dir:
        source = find_model(settings, console)
        with _accounts(settings) as book, _key(settings, book) as key:
            site = _Site(settings, sources, console, source, key, book, sign_in, listener, run_dir)
            uvloop.run(site.run())


def _raise_file_limit() -> None:
    """A connection is an open file, and the usual soft limit of 1,024 is for programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _exit_on_signal(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _bind(settings: Settings) -> socket.socket:
    """The listening socket: a taken port must be known before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound_clients(listener, settings.send_timeout)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise StartupError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; see --host and --port"
        ) from None
    return listener


def bound_clients(listener: socket.socket, send_timeout: int) -> None:
    """What accepted connections inherit: the kernel ends those whose clients stop reading, or vanish."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_ALIVE_SECONDS)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, send_timeout * 1000)


@contextlib.contextmanager
def _run_dir() -> Iterator[Path]:
    """A private directory for sockets. Those of servers that were killed are removed first."""
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent)) > LONGEST_SOCKET_DIR:
        parent = Path("/tmp")  # noqa: S108  (mkdtemp makes a private directory in it)
    for leftover in parent.glob(f"{RUN_DIR_PREFIX}*-*"):
        pid = leftover.name.removeprefix(RUN_DIR_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{RUN_DIR_PREFIX}{os.getpid()}-", dir=parent) as directory:
        yield Path(directory)


@contextlib.contextmanager
def _accounts(settings: Settings) -> Iterator[AccountBook | None]:
    """The book of accounts, if there are any. What waits to be written is written at the end."""
    if not are_on(settings):
        yield None
        return
    book = open_book(settings)
    try:
        yield book
    finally:
        book.close()


@contextlib.contextmanager
def _key(settings: Settings, book: AccountBook | None) -> Iterator[LocalKey | None]:
    """The created key, if none is configured and there are no accounts. One that nobody saw is not kept."""
    if settings.api_key or book is not None:
        yield None
        return
    key = load_or_create_key(settings.cache_dir)
    try:
        yield key
    finally:
        if key.created and not key.shown:
            key.path.unlink(missing_ok=True)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling, which would end a drained process by the signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass
class _Site:
    """Everything one server is made of."""

    settings: Settings
    sources: dict[str, str]
    console: Console
    source: ModelSource
    key: LocalKey | None
    book: AccountBook | None
    sign_in: SignIn | None
    listener: socket.socket
    run_dir: Path
    has_chat: bool = True  # this and the next are known when the model's words have been read
    end_token_ids: tuple[int, ...] = ()
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    told_to_drain: asyncio.Event = field(default_factory=asyncio.Event)
    told_to_cut: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """API server and engine side by side, until one of them ends."""
        arguments = [sys.executable, "-P", "-m", "toptwo.launch_engine"]  # -P: no modules from where we are
        command = EngineCommand(arguments, environment_without_settings(), self._configure_engine)
        supervisor = Supervisor(command, self.run_dir)
        with contextlib.closing(GrammarChecker(self.source.directory / "tokenizer.json")) as grammars:
            await self._serve(supervisor, self._create_server(supervisor, grammars))

    async def _serve(self, supervisor: Supervisor, server: _Server) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._drain, server)
        engine = asyncio.create_task(supervisor.run(), name="engine")
        doors = [self.listener, *(self.listener.dup() for _ in range(ACCEPTS_PER_TURN - 1))]
        serving = asyncio.create_task(server.serve(sockets=doors), name="server")
        announcing = asyncio.create_task(self._announce(supervisor), name="banner")
        cutting = asyncio.create_task(self._cut(supervisor), name="cut")
        helpers = [announcing, cutting]
        if self.book is not None:
            helpers.append(asyncio.create_task(self.book.keep_alive(), name="accounts"))
        gc.freeze()  # all modules and words are here to stay: looking through them stops everything for long
        await asyncio.wait({engine, serving}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        try:
            await serving
        finally:
            for helper in helpers:
                helper.cancel()
            await supervisor.stop()
        await engine  # raises what made the engine give up

    def _drain(self, server: _Server) -> None:
        """The first signal stops listening and lets open requests end; the second cuts them."""
        if self.told_to_drain.is_set():
            self.told_to_cut.set()
            return
        log.info("draining", seconds=self.settings.drain_timeout)
        self.told_to_drain.set()
        self.lifecycle.draining = True
        server.should_exit = True

    async def _cut(self, supervisor: Supervisor) -> None:
        """When the drain time is over, or a second signal comes, end what is still open."""
        await self.told_to_drain.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_timeout):
                await self.told_to_cut.wait()
        await supervisor.client.end_all("the server is shutting down")

    def _create_server(self, supervisor: Supervisor, grammars: GrammarChecker) -> _Server:
        model = load_served_model(self.source.directory, self.source.name, self.settings.chat_template)
        self.has_chat, self.end_token_ids = model.template is not None, model.stop_token_ids
        if not self.has_chat:
            log.warning("the model has no chat template: chats, responses and messages are refused")
        limits = AdmissionLimits(
            self.settings.max_num_seqs, self.settings.max_queue, self.settings.max_requests_per_key
        )
        keys = KeyRing.from_keys([self.key.secret] if self.key else self.settings.api_key)
        admin_keys = KeyRing.from_keys(self.settings.admin_key)
        grant = grant_of(self.settings)
        options = AppOptions(limits, self.settings.metrics, self.book, admin_keys, grant, self.sign_in)
        app = create_app(supervisor.client, model, grammars, keys, self.lifecycle, options)
        return _Server(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=BoundedHttp,
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=self.settings.drain_timeout + CUT_SECONDS,
            )
        )

    def _configure_engine(self, resolved: EngineInfo | None) -> bytes:
        """What an engine process must know, as one line of JSON. Keys stay in this process."""
        fields = self.settings.model_dump(mode="json", exclude=set(SECRETS))
        if resolved:  # a restart must not shrink what clients were promised
            fields |= {"max_model_len": resolved.max_model_len, "threads": resolved.num_threads}
            fields |= {"backend": resolved.backend, "quantization": resolved.quantization}
            fields |= {"kv_cache_gib": resolved.kv_cache_bytes / (1 << 30)}
        words = {"directory": str(self.source.directory), "end_token_ids": self.end_token_ids}
        return json.dumps({"settings": fields, **words}).encode()

    async def _announce(self, supervisor: Supervisor) -> None:
        while (info := supervisor.client.info) is None:
            await supervisor.client.ready.wait()
        host, port = self.listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v3/openai"
        try:
            print_banner(self.console, self.source.name, info, url, self.settings, self.sources)
            if not self.has_chat:
                print_chat_off(self.console)
            print_key(
                self.console,
                self.key,
                url,
                self.source.name,
                has_chat=self.has_chat,
                has_accounts=self.book is not None,
            )
        except OSError:
            log.exception("the banner could not be printed")
