"""The frozen config that `auto` settings resolve to, given the model and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import structlog
import torch

from toptwo.errors import StartupError
from toptwo.models.checkpoint import ModelConfig, WeightSpec
from toptwo.runtime.formats import count_bytes
from toptwo.runtime.kv_cache import BLOCK_SIZE, kv_bytes_per_token
from toptwo.runtime.memory import available_cpus, available_memory
from toptwo.settings import Settings
from toptwo_kernels import cpu
from toptwo_kernels.cuda import support as cuda
from toptwo_kernels.ops import HeadShape, KVShape, WeightFormat

log = structlog.get_logger()

GIB = 1 << 30
# Share of the memory left after the weights that an automatic KV cache may take. A processor's memory is for
# others as well; on a GPU the rest is for activations and graphs.
KV_MEMORY_SHARE = {"cpu": 0.4, "cuda": 0.85}


@dataclass(frozen=True)
class RuntimeConfig:
    """Every choice made; nothing in it is `auto`. Sizes in tokens unless the name says otherwise.

    torch_device: where tensors are; the processor also for a GPU's kernels when they are interpreted.
    dtype: of weights that are not quantised. kv_dtype: of the KV cache.
    """

    device: str
    torch_device: torch.device
    dtype: WeightFormat
    kv_dtype: torch.dtype
    quantization: str
    backend: str
    num_threads: int
    max_model_len: int
    max_num_seqs: int
    max_step_tokens: int
    block_size: int
    num_blocks: int
    weight_bytes: int
    kv_cache_bytes: int
    prefix_caching: bool


def resolve(
    settings: Settings, model: ModelConfig, specs: Sequence[WeightSpec], memory: int | None = None
) -> RuntimeConfig:
    """The config that will run. `memory`: bytes available, by default what the system says.

    Raises StartupError for what cannot fit.
    """
    device = choose_device(settings)
    if settings.tune and device != "cuda":
        raise StartupError("--tune: only a GPU's kernels have something to choose from")
    backend = "cuda" if device == "cuda" else choose_backend(settings, model)
    quantization = choose_quantization(settings, backend)
    dtype = _choose_dtype(settings, device)
    kv_dtype = _choose_kv_dtype(settings, device, dtype, quantization)
    weight_bytes = count_bytes(specs, quantization, dtype)
    available = _available_memory(_torch_device(device)) if memory is None else memory
    if weight_bytes > available:
        raise StartupError(
            f"the weights need {weight_bytes / GIB:.1f} GiB as "
            f"{dtype if quantization == 'none' else quantization} and "
            f"{available / GIB:.1f} GiB of memory are available"
        )
    share = KV_MEMORY_SHARE[device]
    max_len, num_blocks = _plan_memory(settings, model, kv_dtype, available - weight_bytes, share)
    return RuntimeConfig(
        device=device,
        torch_device=_torch_device(device),
        dtype=dtype,
        kv_dtype=kv_dtype,
        quantization=quantization,
        backend=backend,
        num_threads=settings.threads or available_cpus(),
        max_model_len=max_len,
        max_num_seqs=settings.max_num_seqs,
        max_step_tokens=settings.max_step_tokens,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        weight_bytes=weight_bytes,
        kv_cache_bytes=num_blocks * BLOCK_SIZE * kv_bytes_per_token(model, kv_dtype),
        prefix_caching=not settings.no_prefix_caching,
    )


def choose_device(settings: Settings) -> str:
    """The GPU where it is asked for: it is not chosen for anybody before all of its tests have passed on one.

    Raises StartupError when it cannot be had, or with kernels that are not for it.
    """
    if settings.device != "cuda":
        return "cpu"
    if settings.backend != "auto":
        raise StartupError(f"--backend {settings.backend} cannot go with --device cuda: it is for processors")
    if problem := cuda.problem():
        raise StartupError(f"--device cuda: {problem}")
    return "cuda"


def _choose_dtype(settings: Settings, device: str) -> WeightFormat:
    if settings.dtype == "auto":
        return "bfloat16" if device == "cuda" else "float32"
    return cast(WeightFormat, settings.dtype)


def _choose_kv_dtype(settings: Settings, device: str, dtype: WeightFormat, quantization: str) -> torch.dtype:
    if settings.kv_dtype == "fp8":
        if device != "cuda":
            raise StartupError("--kv-dtype fp8: only a GPU's kernels have it")
        return torch.float8_e4m3fn
    # Half precision costs a quantised model nothing that its weights have not cost already.
    half = settings.dtype == "auto" and quantization != "none" and device == "cpu"
    return torch.float16 if half else cast(torch.dtype, getattr(torch, dtype))


def choose_backend(settings: Settings, model: ModelConfig) -> str:
    """The native backend wherever it was built and can run the model; else the reference, and a word why."""
    if settings.backend == "reference":
        return "reference"
    problem = ""
    if not cpu.instruction_sets():
        problem = "the native CPU kernels were not built on this machine"
    elif problem_of_shape := _problem_of(model.kv_shape):
        problem = f"the native CPU kernels do not compute {problem_of_shape}"
    if not problem:
        return "cpu"
    if settings.backend == "cpu":
        raise StartupError(f"--backend cpu: {problem}")
    log.warning("falling back to the reference kernels, which are slow", reason=problem)
    return "reference"


def _problem_of(shape: KVShape) -> str:
    """What of a shape the native kernels' vectors of eight numbers do not fit; "" for nothing."""
    if isinstance(shape, HeadShape):
        return f"a head dimension of {shape.head_dim}" if shape.head_dim % 8 else ""
    if shape.latent_dim % 8 or shape.rope_dim % 8:
        return f"latent vectors of {shape.latent_dim} + {shape.rope_dim} numbers"
    return ""


def choose_quantization(settings: Settings, backend: str) -> str:
    """int8 on the native backend, unless a number format is asked for; the reference gains nothing by it, and
    a GPU has the memory for more."""
    if settings.quantization == "fp8" and backend != "cuda":
        raise StartupError("--quantization fp8: only a GPU's kernels have it; use int8")
    if settings.quantization != "auto":
        return settings.quantization
    return "int8" if backend == "cpu" and settings.dtype == "auto" else "none"


def _torch_device(device: str) -> torch.device:
    return torch.device("cuda" if device == "cuda" and not cuda.is_interpreted() else "cpu")


def _available_memory(device: torch.device) -> int:
    """Bytes that can be had now where the model is to run."""
    return int(torch.cuda.mem_get_info()[0]) if device.type == "cuda" else available_memory()


def _plan_memory(
    settings: Settings, model: ModelConfig, dtype: torch.dtype, memory: int, share: float
) -> tuple[int, int]:
    """(max_model_len, num_blocks): at least one full-length sequence always fits."""
    longest = model.max_position
    wanted = settings.max_model_len or longest
    if wanted > longest:
        raise StartupError(f"--max-model-len {wanted} is over the model's {longest} positions")
    block_bytes = BLOCK_SIZE * kv_bytes_per_token(model, dtype)
    budget = int(memory * share if settings.kv_cache_gib is None else settings.kv_cache_gib * GIB)
    num_blocks = min(budget // block_bytes, settings.max_num_seqs * _blocks(wanted))
    if num_blocks * block_bytes > memory:
        raise StartupError(
            f"--kv-cache-gib {settings.kv_cache_gib:g}: {num_blocks * block_bytes / GIB:.1f} GiB would be "
            f"used and {memory / GIB:.1f} GiB are left beside the weights"
        )
    if num_blocks >= _blocks(wanted):
        return wanted, num_blocks
    if settings.max_model_len is None and num_blocks > 0:
        return num_blocks * BLOCK_SIZE, num_blocks  # a shorter context that fits
    need = _blocks(wanted) * block_bytes / GIB
    raise StartupError(
        f"the KV cache of one sequence of {wanted} tokens needs {need:.2f} GiB and "
        f"{budget / GIB:.2f} GiB are planned for it; raise --kv-cache-gib or lower --max-model-len"
    )


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)
