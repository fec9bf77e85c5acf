"""What a measurement found, for people as a table and for programs as JSON.

Knows units and wording; must not know how anything was measured. Keys are not told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import orjson
from rich import box
from rich.console import Console
from rich.table import Table

from toptwo import __version__
from toptwo.bench.client import Outcome, Target
from toptwo.bench.load import LevelRun
from toptwo.bench.options import BenchOptions
from toptwo.bench.summary import Spread, Summary, summarise
from toptwo.errors import StartupError

FORMAT = 1  # of the JSON; to be raised when a figure changes its name or meaning
SEVERAL_PER_CHUNK = 1.05
TABLE_WIDTH = 200  # where there is no terminal whose width could be asked

Cell = Callable[[Summary], str]


@dataclass(frozen=True)
class Report:
    """A whole measurement. overhead: prompt tokens that the chat template adds, as far as is known."""

    options: BenchOptions
    target: Target
    overhead: int
    began: datetime
    runs: list[LevelRun]

    @property
    def summaries(self) -> list[Summary]:
        """The figures, level by level."""
        return [summarise(run, self.options.limits) for run in self.runs]

    @property
    def all_failed(self) -> bool:
        """Whether not one request was answered."""
        return not any(outcome.error is None for run in self.runs for outcome in run.outcomes)


def print_report(console: Console, report: Report) -> None:
    """The table, a level per column, and what must be known to read it."""
    options, summaries = report.options, report.summaries
    asked = f"prompt {options.prompt_tokens}, output {options.max_tokens} tokens"
    ends = "" if options.ignore_eos else ", may end earlier"
    head = f"\n{report.target.model} at {report.target.base_url}\n{asked}{ends}, seed {options.seed}"
    console.print(head, markup=False, highlight=False, soft_wrap=True)
    wide = console if console.is_terminal else Console(file=console.file, width=TABLE_WIDTH)
    wide.print(_table(report, summaries))
    for line in [*_failures(report), *_notes(report, summaries)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write_json(report: Report, path: Path) -> None:
    """Everything: configuration, figures, and each request. Raises StartupError."""
    write_file(path, orjson.dumps(as_json(report), option=orjson.OPT_INDENT_2) + b"\n", "--json")


def write_file(path: Path, content: bytes, flag: str) -> None:
    """Write a file that `flag` has asked for. Raises StartupError."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise StartupError(f"{flag} {path}: {error.strerror}") from None


def as_json(report: Report) -> dict[str, object]:
    """The JSON document. Moments are seconds since the level began, latencies are milliseconds."""
    return {
        "format": FORMAT,
        "toptwo": __version__,
        "began": report.began.astimezone(UTC).isoformat(timespec="seconds"),
        "base_url": report.target.base_url,
        "model": report.target.model,
        "template_tokens": report.overhead,
        "config": report.options.shown(),
        "levels": [
            {
                "concurrency": run.level.concurrency,
                "rate": run.level.rate,
                "summary": asdict(summary),
                "requests": [_request(outcome, run.started) for outcome in run.outcomes],
            }
            for run, summary in zip(report.runs, report.summaries, strict=True)
        ],
    }


def _request(outcome: Outcome, began: float) -> dict[str, object]:
    return {
        "started_s": round(outcome.started - began, 6),
        "ttft_ms": _milliseconds(outcome.ttft),
        "inter_token_ms": [_milliseconds(gap) for gap in outcome.inter_token],
        "end_to_end_ms": _milliseconds(outcome.end_to_end),
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "error": outcome.error,
        "detail": outcome.detail,
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)


def _table(report: Report, summaries: list[Summary]) -> Table:
    closed = report.runs[0].level.concurrency is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("requests at once" if closed else "requests/s offered", no_wrap=True)
    for run in report.runs:
        table.add_column(run.level.number, justify="right", no_wrap=True)
    for section in _sections(report.options):
        for label, cell in section:
            table.add_row(label, *(cell(summary) for summary in summaries))
        table.add_section()
    return table


def _sections(options: BenchOptions) -> list[list[tuple[str, Cell]]]:
    """Rows of the table, in groups: a label, and its cell for a level."""
    counts: list[tuple[str, Cell]] = [
        ("requests ok", lambda s: f"{s.num_ok:,}"),
        ("requests failed", lambda s: f"{s.num_failed:,}"),
        ("prompt tokens", lambda s: shown_number(s.mean_prompt_tokens)),
        ("output tokens", lambda s: shown_number(s.mean_output_tokens)),
    ]
    rates: list[tuple[str, Cell]] = [
        ("requests/s", lambda s: f"{s.request_rate:,.2f}"),
        ("prompt tok/s", lambda s: shown_number(s.prompt_rate)),
        ("output tok/s", lambda s: shown_number(s.output_rate)),
    ]
    if options.limits.stated:
        rates.append(("goodput, requests/s", lambda s: f"{s.goodput or 0:,.2f}"))
    return [
        counts,
        rates,
        _latency("TTFT", lambda s: s.ttft),
        _latency("inter-token", lambda s: s.inter_token),
        _latency("end-to-end", lambda s: s.end_to_end),
    ]


def _latency(label: str, spread_of: Callable[[Summary], Spread | None]) -> list[tuple[str, Cell]]:
    def cell(name: str) -> Cell:
        return lambda summary: shown_number(getattr(spread_of(summary), name, None))

    return [(f"{label} {name}, ms", cell(name)) for name in ("p50", "p90", "p99")]


def shown_number(value: float | None) -> str:
    """A figure with as many decimals as its size deserves; "-" when there is none."""
    if value is None:
        return "-"
    decimals = 0 if value >= 1000 else 2 if 0 < value < 1 else 1
    return f"{value:,.{decimals}f}"


def _failures(report: Report) -> list[str]:
    """A line per kind of failure and level, with what the server said about the first of them."""
    lines = []
    for run, summary in zip(report.runs, report.summaries, strict=True):
        for kind, count in summary.errors.items():
            said = next((o.detail for o in run.outcomes if o.error == kind and o.detail), None)
            lines.append(f"{run.level.name}: {count:,} x {kind}" + (f" ({said})" if said else ""))
    return lines


def _notes(report: Report, summaries: list[Summary]) -> list[str]:
    """What a reader could otherwise get wrong."""
    notes = []
    if (several := max((s.tokens_per_chunk or 0 for s in summaries), default=0)) > SEVERAL_PER_CHUNK:
        notes.append(f"A chunk has up to {several:.2f} tokens: inter-token figures are between chunks.")
    outputs = [s.mean_output_tokens for s in summaries if s.mean_output_tokens is not None]
    if report.options.ignore_eos and outputs and min(outputs) < report.options.max_tokens.low:
        notes.append("Answers ended before their length: the server does not honour ignore_eos.")
    if any(s.num_ok and s.mean_prompt_tokens is None for s in summaries):
        notes.append("The server does not count tokens: an output token is a chunk here.")
    return notes
