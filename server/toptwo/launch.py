"""The composition root: the only module that sees engine, runtime and app together.

Two processes are put together here. The API process (`serve`) owns text and HTTP and never imports
torch; the engine process (`run_engine`) owns the model. Each imports what it needs when it starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
import uvloop
from rich.console import Console
from rich.progress import Progress

from toptwo.api.health import Lifecycle
from toptwo.api.security import KeyRing
from toptwo.app import create_app
from toptwo.banner import print_banner, print_key
from toptwo.engine.supervisor import Supervisor
from toptwo.errors import StartupError
from toptwo.local_key import LocalKey, load_or_create_key
from toptwo.settings import Settings
from toptwo.source import ModelSource, find_model
from toptwo.telemetry.logs import configure_logging
from toptwo.text.model import load_served_model


def serve(settings: Settings, sources: dict[str, str], console: Console) -> None:
    """Serve until SIGTERM or Ctrl-C, which drain open requests first.

    Raises StartupError when the server cannot start, or its engine keeps dying.
    """
    configure_logging(settings.log_level)
    with contextlib.closing(_bind(settings)) as listener:
        source = find_model(settings, console)
        key = None if settings.api_key else load_or_create_key(settings.cache_dir)
        with tempfile.TemporaryDirectory(prefix="toptwo-") as run_dir:
            site = _Site(settings, sources, console, source, key, listener, Path(run_dir))
            uvloop.run(site.run())


def _bind(settings: Settings) -> socket.socket:
    """The address, taken but not yet listening: a taken port must be known before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise StartupError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; see --host and --port"
        ) from None
    return listener


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling, which would end a drained process by the signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class _Site:
    """Everything one server is made of."""

    settings: Settings
    sources: dict[str, str]
    console: Console
    source: ModelSource
    key: LocalKey | None
    listener: socket.socket
    run_dir: Path

    async def run(self) -> None:
        """API server and engine side by side, until one of them ends."""
        supervisor = Supervisor(
            [sys.executable, "-m", "toptwo.launch"], _engine_config(self.settings, self.source), self.run_dir
        )
        lifecycle = Lifecycle()
        server = self._create_server(supervisor, lifecycle)

        def drain(number: int) -> None:
            lifecycle.draining = True
            server.handle_exit(number, None)  # stops listening; a second Ctrl-C stops waiting, too

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, drain, number)
        engine = asyncio.create_task(supervisor.run(), name="engine")
        announcing = asyncio.create_task(self._announce(supervisor), name="banner")
        serving = asyncio.create_task(server.serve(sockets=[self.listener]), name="server")
        await asyncio.wait({engine, serving}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        try:
            await serving
        finally:
            announcing.cancel()
            await supervisor.stop()
        await engine  # raises what made the engine give up

    def _create_server(self, supervisor: Supervisor, lifecycle: Lifecycle) -> _Server:
        keys = [self.key.secret] if self.key else self.settings.api_key
        model = load_served_model(self.source.directory, self.source.name)
        ring = KeyRing.from_keys(keys)
        app = create_app(supervisor.client, model, ring, lifecycle)
        return _Server(
            uvicorn.Config(
                app,
                loop="uvloop",
                http="httptools",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=self.settings.drain_timeout,
            )
        )

    async def _announce(self, supervisor: Supervisor) -> None:
        await supervisor.client.ready.wait()
        info = supervisor.client.info
        if info is None:  # died again at once; the supervisor tells
            return
        host, port = self.listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v3/openai"
        print_banner(self.console, self.source.name, info, url, self.settings, self.sources)
        print_key(self.console, self.key, url, self.source.name)


def _engine_config(settings: Settings, source: ModelSource) -> bytes:
    """What an engine process must know, as one line of JSON. Keys stay in the API process."""
    fields = settings.model_dump(mode="json", exclude={"api_key"})
    return json.dumps({"settings": fields, "directory": str(source.directory)}).encode()


def run_engine(socket_path: Path) -> None:
    """The engine process: load the model, then serve the socket until the parent is gone.

    Raises StartupError when the model cannot be loaded.
    """
    from toptwo.engine import process
    from toptwo.engine.blocks import BlockPool
    from toptwo.engine.engine import Engine
    from toptwo.engine.scheduler import Scheduler, SchedulerLimits
    from toptwo.engine.transport import EngineSocket
    from toptwo.runtime.build import build_runtime

    config = json.loads(process.read_config())
    process.bind_to_parent()
    settings = Settings(**config["settings"])
    configure_logging(settings.log_level)
    endpoint = EngineSocket(socket_path)
    with _loading_bar() as on_progress:
        runtime = build_runtime(settings, Path(config["directory"]), on_progress)
    chosen = runtime.config
    limits = SchedulerLimits(
        max_model_len=chosen.max_model_len,
        max_num_seqs=chosen.max_num_seqs,
        max_step_tokens=chosen.max_step_tokens,
        prefix_caching=chosen.prefix_caching,
    )
    scheduler = Scheduler(limits, BlockPool(chosen.num_blocks, chosen.block_size))
    Engine(scheduler, runtime.runner, endpoint, runtime.info).run()


@contextlib.contextmanager
def _loading_bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal's standard error; nothing elsewhere, and nothing left behind."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Loading weights", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


if __name__ == "__main__":
    try:
        run_engine(Path(sys.argv[1]))
    except StartupError as reason:
        sys.exit(f"toptwo: {reason}")
