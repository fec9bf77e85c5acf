"""The composition root of an engine process: the only module that sees engine and runtime together.

Started by the supervisor as `python -P -m toptwo.launch_engine SOCKET`, with its configuration on
standard input. It never imports the API.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from toptwo.engine import process
from toptwo.errors import StartupError


def run_engine(socket_path: Path) -> None:
    """Load the model, then serve the socket until the parent is gone.

    Raises StartupError when the model cannot be loaded.
    """
    # Before anything slow is imported: signals to the group are the parent's to answer.
    process.bind_to_parent()
    config = json.loads(process.read_config())

    from toptwo.engine.blocks import BlockPool
    from toptwo.engine.engine import Engine
    from toptwo.engine.scheduler import Scheduler, SchedulerLimits
    from toptwo.engine.transport import EngineSocket
    from toptwo.runtime.build import build_runtime
    from toptwo.settings import Settings
    from toptwo.telemetry.logs import configure_logging

    settings = Settings(**config["settings"])
    configure_logging(settings.log_level, quoting=True)  # it sees no text and no key
    endpoint = EngineSocket(socket_path)
    with _loading_bar() as show:

        def on_progress(done: int, total: int) -> None:
            process.report_progress(socket_path, done, total)
            show(done, total)

        runtime = build_runtime(settings, Path(config["directory"]), on_progress, own_process=True)
    info, grammars = runtime.info, runtime.runner.grammars
    grammars.load_vocabulary(config["end_token_ids"])
    limits = SchedulerLimits(
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        max_step_tokens=info.max_step_tokens,
        prefix_caching=info.prefix_caching,
        max_queue_seconds=settings.queue_timeout,
    )
    scheduler = Scheduler(limits, BlockPool(info.num_blocks, info.block_size), prepare=grammars.prepare)
    Engine(scheduler, runtime.runner, endpoint, info).run()


@contextlib.contextmanager
def _loading_bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal's standard error; nothing elsewhere, and nothing left behind."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Loading weights", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


if __name__ == "__main__":
    try:
        run_engine(Path(sys.argv[1]))
    except StartupError as reason:
        process.explain_failure(Path(sys.argv[1]), str(reason))
        sys.exit(reason.exit_code)
    except Exception:
        structlog.get_logger().exception("engine failed")
        os._exit(1)  # an orderly end would take a second, in which requests still come that nobody reads
