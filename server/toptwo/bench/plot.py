"""A picture of a measurement: curves over the levels, or the distributions of a single one.

matplotlib is an extra, and is imported only when a picture is asked for. Knows how to draw; must not
compute any figure of its own.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toptwo.bench.client import Outcome
from toptwo.bench.report import Report, shown_number, write_file
from toptwo.bench.summary import Spread, Summary
from toptwo.errors import StartupError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
BLUE, ORANGE, GREY = "#2a6fbb", "#d9772b", "#606060"  # told apart by those who see no red or green, too
TAIL = 1.5  # of p99: one answer that took very long must not squeeze all others together
LARGE = 10.0  # a curve that spans more than this factor is drawn on a logarithmic scale

SpreadOf = Callable[[Summary], Spread | None]


def require_matplotlib() -> None:
    """Raise StartupError, before anything is measured, where pictures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise StartupError("--plot needs matplotlib; install the extra: pip install 'toptwo[plot]'")


def write_plot(report: Report, path: Path) -> None:
    """Draw the report into a PNG file. Raises StartupError."""
    picture = io.BytesIO()
    draw(report).savefig(picture, format="png", dpi=DOTS_PER_INCH)
    write_file(path, picture.getvalue(), "--plot")


def draw(report: Report) -> Figure:
    """Three panels: throughput and latencies over the levels, or the latencies of the only one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    if len(report.runs) > 1:
        _draw_curves(report, (left, middle, right))
    else:
        _draw_distributions(report, (left, middle, right))
    options = report.options
    title = f"{report.target.model}: prompt {options.prompt_tokens}, output {options.max_tokens} tokens"
    figure.suptitle(title, fontsize=12, parse_math=False)
    return figure


def _draw_curves(report: Report, axes: Sequence[Axes]) -> None:
    closed = report.runs[0].level.concurrency is not None
    order = sorted(range(len(report.runs)), key=lambda i: _intensity(report, i))
    loads = [_intensity(report, i) for i in order]
    summaries = [report.summaries[i] for i in order]
    throughput, first, between = axes
    _curve(throughput, loads, [s.output_rate for s in summaries], "output", BLUE)
    throughput.set_title("output tokens per second", fontsize=10)
    _latency_curves(first, loads, summaries, lambda s: s.ttft)
    first.set_title("time to first token, ms", fontsize=10)
    _latency_curves(between, loads, summaries, lambda s: s.inter_token)
    between.set_title("inter-token time, ms", fontsize=10)
    for axis in axes:
        axis.set_xlabel("requests at once" if closed else "requests per second")
        if closed:
            axis.set_xscale("log", base=2)
        axis.set_xticks(loads, [f"{load:g}" for load in loads])
        axis.minorticks_off()
    throughput.set_ylim(bottom=0)


def _intensity(report: Report, index: int) -> float:
    level = report.runs[index].level
    return level.concurrency or level.rate or 0.0


def _latency_curves(axis: Axes, loads: list[float], summaries: list[Summary], spread_of: SpreadOf) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    known = [(load, spread) for load, s in zip(loads, summaries, strict=True) if (spread := spread_of(s))]
    where = [load for load, _ in known]
    _curve(axis, where, [spread.p50 for _, spread in known], "p50", BLUE)
    _curve(axis, where, [spread.p99 for _, spread in known], "p99", ORANGE)
    values = [value for _, spread in known for value in (spread.p50, spread.p99)]
    if values and min(values) > 0 and max(values) > LARGE * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axis.set_ylim(bottom=0)
    axis.legend(frameon=False)


def _curve(axis: Axes, loads: Sequence[float], values: Sequence[float], label: str, color: str) -> None:
    axis.plot(loads, values, marker="o", markersize=4, label=label, color=color)
    _plain(axis)


def _draw_distributions(report: Report, axes: Sequence[Axes]) -> None:
    (run,), (summary,) = report.runs, report.summaries
    ok = [outcome for outcome in run.outcomes if outcome.error is None]
    panels: list[tuple[str, Callable[[Outcome], list[float]], Spread | None]] = [
        ("time to first token, ms", lambda o: [] if o.ttft is None else [o.ttft], summary.ttft),
        ("inter-token time, ms", lambda o: o.inter_token, summary.inter_token),
        ("end to end, ms", lambda o: [o.end_to_end], summary.end_to_end),
    ]
    for axis, (title, values_of, spread) in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=10)
        _plain(axis)
        if spread is None:
            continue
        values = sorted(1000 * value for outcome in ok for value in values_of(outcome))
        axis.ecdf(values, color=BLUE)
        axis.set_xlim(right=1.03 * min(values[-1], TAIL * spread.p99))
        for name, value in (("p50", spread.p50), ("p99", spread.p99)):
            axis.axvline(value, color=GREY, linestyle=":", linewidth=1)
            text = f"{name} {shown_number(value)}"
            axis.annotate(text, (value, 0.02), rotation=90, fontsize=9, color=GREY, ha="right")
    axes[0].set_ylabel(f"share of values ({run.level.name})")


def _plain(axis: Axes) -> None:
    axis.grid(visible=True, color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
