"""`toptwo model inspect`: what a model is, what it costs, and what this machine would make of it.

Headers alone are read: a model larger than memory is as quick to inspect as a small one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich.console import Console

from toptwo.errors import StartupError
from toptwo.model_commands.inspect_machine import look_at_machine
from toptwo.model_commands.inspect_report import make_report
from toptwo.model_commands.inspect_source import find_subject, read_headers
from toptwo.model_commands.inspect_table import print_report
from toptwo.runtime.memory import available_cpus
from toptwo.settings import load_settings

USUAL_CONTEXT = 4096


@dataclass(frozen=True)
class InspectOptions:
    """What to look at: a directory, GGUF file, hub id or None for the default model.

    bandwidth: of another machine, in GB/s. context: how many tokens the cache holds when speed is told.
    """

    model: str | None = None
    bandwidth: float | None = None
    context: int | None = None
    as_json: bool = False


def inspect(options: InspectOptions, console: Console) -> None:
    """Print everything that is known of a model. Raises StartupError with one clear line."""
    if options.bandwidth is not None and not 0 < options.bandwidth < float("inf"):
        raise StartupError(f"--bandwidth {options.bandwidth:g}: must be positive, in GB/s")
    settings, _ = load_settings({} if options.model is None else {"model": options.model})
    subject = find_subject(settings)
    headers = read_headers(subject)
    longest = headers.config.max_position
    context = min(USUAL_CONTEXT, longest) if options.context is None else options.context
    if not 0 < context <= longest:
        raise StartupError(f"--context {context}: the model has 1 to {longest} positions")
    bandwidth = options.bandwidth * 1e9 if options.bandwidth else None
    machine = look_at_machine(settings.threads or available_cpus(), bandwidth)
    report = make_report(subject.name, headers, machine, settings, context)
    if options.as_json:
        text = json.dumps(asdict(report), indent=2)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        print_report(report, console)
