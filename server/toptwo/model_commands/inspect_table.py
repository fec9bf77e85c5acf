"""A report as a person reads it. Knows words and units; decides nothing."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from toptwo.model_commands.inspect_machine import Machine
from toptwo.model_commands.inspect_report import Report
from toptwo.model_commands.inspect_shape import Shape
from toptwo.model_commands.inspect_source import Stored

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def print_report(report: Report, console: Console) -> None:
    """Sizes in powers of ten, as bandwidths are."""
    console.print(Text(report.name))
    console.print(_facts(report))
    console.print()
    console.print(_formats(report))
    console.print()
    notes = (
        "max context: the longest that serve would offer with the memory that is free now.",
        f"tokens/s: of one stream, {report.speed_context_tokens:,} tokens into its context, at most: "
        "the bandwidth over the bytes read per token, which are active weights and KV cache.",
    )
    for note in notes:
        console.print(Padding(Text(note), (0, 0, 0, 2)))


def _facts(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    shape = report.model
    rows = [
        ("architecture", _architecture(shape)),
        ("experts", "; ".join(_experts(shape))),
        ("parameters", f"{_count(shape.parameters)}, {_active(shape)}"),
        ("context", f"{shape.context_tokens:,} tokens"),
        ("stored", _stored(report.stored)),
        *(
            (
                f"KV, {key}",
                f"{_size(cost.bytes_per_token)} per token, {_size(cost.bytes_of_full_context)} for all",
            )
            for key, cost in report.kv_cache.items()
        ),
        ("memory", _memory(report.machine)),
        ("bandwidth", _bandwidth(report.machine)),
        ("serve", _serve(report)),
    ]
    for label, text in rows:
        table.add_row(Text(f"  {label}"), Text(text))
    return table


def _architecture(shape: Shape) -> str:
    layers = f"{shape.layers} layers"
    if 0 < shape.expert_layers < shape.layers:
        layers += f" ({shape.expert_layers} of them with experts)"
    return f"{shape.architecture}, {layers}, hidden size {shape.hidden_size:,}"


def _experts(shape: Shape) -> Iterator[str]:
    if shape.expert_ffn_size is None:
        yield "1 of 1: a dense model"
    else:
        yield f"{shape.experts_per_token} of {shape.experts} per token, each {shape.expert_ffn_size:,} wide"
        if shape.shared_expert_ffn_size is not None:
            times = shape.shared_expert_ffn_size / shape.expert_ffn_size
            yield f"shared by every token: {shape.shared_expert_ffn_size:,}, as wide as {times:g}"
    if shape.dense_ffn_size is not None:
        yield f"dense layers: {shape.dense_ffn_size:,}"


def _active(shape: Shape) -> str:
    active, read = shape.active_parameters, shape.active_parameters_without_input_embedding
    if active == read:
        return f"{_count(active)} active per token"
    return f"{_count(active)} active per token ({_count(read)} without the input embedding)"


def _stored(stored: Stored) -> str:
    method = f"{stored.quantization}, " if stored.quantization else ""
    listed = stored.files + stored.missing_files
    if not stored.files:
        return f"{method}no weight files" + (f" ({listed} are listed)" if listed else "")
    formats = ", ".join(f"{name} {_size(size)}" for name, size in stored.bytes_by_format.items())
    files = f"{stored.files} files" if stored.files > 1 else "1 file"
    if stored.missing_files:
        files = f"{stored.files} of {listed} files, the others are missing"
    return f"{method}{stored.kind}, {files}, {_size(stored.bytes)}: {formats}"


def _memory(machine: Machine) -> str:
    memory = f"{_size(machine.memory_bytes)} available"
    return memory if machine.vram_bytes is None else f"{memory}, VRAM {_size(machine.vram_bytes)}"


def _bandwidth(machine: Machine) -> str:
    if machine.read_bandwidth_bytes_per_second is None:
        return "unmeasured: the native CPU kernels were not built on this machine"
    how = f"measured with {machine.threads} threads" if machine.bandwidth_is_measured else "as given"
    return f"{machine.read_bandwidth_bytes_per_second / 1e9:.1f} GB/s, {how}"


def _serve(report: Report) -> str:
    choice = report.serve
    if choice is None:
        return f"cannot: {report.serve_problem}"
    weights = choice.dtype if choice.quantization == "none" else choice.quantization
    return (
        f"{weights} weights of {_size(choice.weight_bytes)}, context {choice.context_tokens:,}, "
        f"up to {_size(choice.kv_cache_bytes)} of {choice.kv_dtype} KV cache, {choice.backend} kernels"
    )


def _formats(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=False)
    places = ["max context"] if report.machine.vram_bytes is None else ["max context", "in VRAM"]
    headings = ["  format", "weights", "read/token", *places, "tokens/s"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right", no_wrap=True)
    for name, cost in report.formats.items():
        contexts = [cost.max_context_tokens_in_memory, cost.max_context_tokens_in_vram][: len(places)]
        table.add_row(
            f"  {name}",
            _size(cost.weight_bytes),
            _size(cost.read_bytes_per_token),
            *("does not fit" if context is None else f"{context:,}" for context in contexts),
            "unmeasured" if cost.tokens_per_second is None else f"{cost.tokens_per_second:,.1f}",
        )
    return table


def _size(size: float) -> str:
    for unit, name in UNITS:
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
