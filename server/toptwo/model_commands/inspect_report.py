"""What a model costs in each number format, and what `serve` would make of it on a machine.

The fields of `Report` are the keys of `--json`, with their units. Every decision is `runtime.device`'s own.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO

import torch

from toptwo.errors import StartupError
from toptwo.model_commands.inspect_machine import Machine
from toptwo.model_commands.inspect_shape import Shape, active_specs, measure_shape, read_specs
from toptwo.model_commands.inspect_source import Headers, Stored
from toptwo.runtime.device import RuntimeConfig, choose_device, resolve
from toptwo.runtime.formats import count_bytes
from toptwo.runtime.kv_cache import kv_bytes_per_token
from toptwo.settings import Settings

FORMATS: dict[str, dict[str, object]] = {
    "float32": {"quantization": "none", "dtype": "float32"},
    "bfloat16": {"quantization": "none", "dtype": "bfloat16"},
    "int8": {"quantization": "int8", "dtype": "auto"},
    "int4": {"quantization": "int4", "dtype": "auto"},
}
# What a person may have set for another model or machine and is not asked about here.
UNSET: dict[str, object] = {
    **{"device": "cpu", "backend": "auto", "kv_dtype": "auto"},
    **{"max_model_len": None, "kv_cache_gib": None},
}
BOUNDLESS = 1 << 62
CACHE_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class CacheCost:
    """The KV cache of one sequence in a number format."""

    bytes_per_token: int
    bytes_of_full_context: int


@dataclass(frozen=True)
class FormatCost:
    """Serving in a number format. max_context_tokens: the longest that `serve` could offer, None where the
    weights do not fit. tokens_per_second: of one stream, if nothing but reading took time; None where the
    bandwidth is not known."""

    weight_bytes: int
    read_bytes_per_token: int
    max_context_tokens_in_memory: int | None
    max_context_tokens_in_vram: int | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class Choice:
    """What `serve` would run with its present settings."""

    device: str
    quantization: str
    dtype: str
    kv_dtype: str
    backend: str
    context_tokens: int
    weight_bytes: int
    kv_cache_bytes: int


@dataclass(frozen=True)
class Report:
    """Everything that is shown. speed_context_tokens: behind how many tokens the one is for whose speed is
    given. serve: None where it could not start, and then serve_problem says why."""

    name: str
    model: Shape
    stored: Stored
    kv_cache: Mapping[str, CacheCost]
    speed_context_tokens: int
    formats: Mapping[str, FormatCost]
    machine: Machine
    serve: Choice | None
    serve_problem: str | None


def make_report(
    name: str, headers: Headers, machine: Machine, settings: Settings, context_tokens: int
) -> Report:
    """context_tokens: for `Report.speed_context_tokens`."""
    serve, problem = None, None
    try:
        memory = machine.memory_bytes
        if choose_device(settings) == "cuda" and machine.vram_bytes is not None:
            memory = machine.vram_bytes
        serve = _choice(_resolve(settings, headers, memory))
    except StartupError as error:
        problem = str(error)
    return Report(
        name=name,
        model=measure_shape(headers.config, headers.specs),
        stored=headers.stored,
        kv_cache={key: _cache_cost(headers, dtype) for key, dtype in CACHE_DTYPES.items()},
        speed_context_tokens=context_tokens,
        formats={
            key: _format_cost(settings.model_copy(update=UNSET | chosen), headers, machine, context_tokens)
            for key, chosen in FORMATS.items()
        },
        machine=machine,
        serve=serve,
        serve_problem=problem,
    )


def _resolve(settings: Settings, headers: Headers, memory: int) -> RuntimeConfig:
    with redirect_stdout(StringIO()):  # whatever is logged on the way is in the report as well
        return resolve(settings, headers.config, headers.specs, memory)


def _choice(config: RuntimeConfig) -> Choice:
    return Choice(
        device=config.device,
        quantization=config.quantization,
        dtype=config.dtype,
        kv_dtype=str(config.kv_dtype).removeprefix("torch."),
        backend=config.backend,
        context_tokens=config.max_model_len,
        weight_bytes=config.weight_bytes,
        kv_cache_bytes=config.kv_cache_bytes,
    )


def _cache_cost(headers: Headers, dtype: torch.dtype) -> CacheCost:
    size = kv_bytes_per_token(headers.config, dtype)
    return CacheCost(size, size * headers.config.max_position)


def _format_cost(settings: Settings, headers: Headers, machine: Machine, context_tokens: int) -> FormatCost:
    ideal = _resolve(settings, headers, BOUNDLESS)
    active = read_specs(active_specs(headers.config, headers.specs))
    read = count_bytes(active, ideal.quantization, ideal.dtype)
    read += context_tokens * kv_bytes_per_token(headers.config, ideal.kv_dtype)
    bandwidth, vram = machine.read_bandwidth_bytes_per_second, machine.vram_bytes
    on_gpu = settings.model_copy(update={"device": "cuda"})
    return FormatCost(
        weight_bytes=ideal.weight_bytes,
        read_bytes_per_token=read,
        max_context_tokens_in_memory=_max_context(settings, headers, machine.memory_bytes),
        max_context_tokens_in_vram=None if vram is None else _max_context(on_gpu, headers, vram),
        tokens_per_second=bandwidth / read if bandwidth else None,
    )


def _max_context(settings: Settings, headers: Headers, memory: int) -> int | None:
    try:
        return _resolve(settings, headers, memory).max_model_len
    except StartupError:
        return None
