"""From a checkpoint directory and settings to a runner that can execute plans."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from toptwo.messages import EngineInfo
from toptwo.models.checkpoint import CausalLM
from toptwo.models.registry import read_config
from toptwo.moe.counts import expert_counts
from toptwo.runtime.batch import SlotTable
from toptwo.runtime.constraints import GrammarStates
from toptwo.runtime.device import resolve
from toptwo.runtime.graphs import Step, prepare_step
from toptwo.runtime.kv_cache import allocate_kv_cache
from toptwo.runtime.random_weights import make_weights
from toptwo.runtime.runner import Runner
from toptwo.runtime.tuning import tune
from toptwo.runtime.weights import WeightSource, prepare_weights
from toptwo.settings import Settings
from toptwo_kernels.ops import KVCache
from toptwo_kernels.registry import load_backend


@dataclass(frozen=True)
class Runtime:
    """A loaded model, ready to run, and what its settings were resolved to."""

    runner: Runner
    model: CausalLM
    step: Step
    kv_cache: list[KVCache]
    info: EngineInfo


def build_runtime(
    settings: Settings,
    directory: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    own_process: bool = False,
) -> Runtime:
    """Load the checkpoint. Raises CheckpointError when it cannot be loaded, StartupError when it cannot fit.

    own_process: nothing else runs in this process, so that its threads may be bound to processors.
    """
    started = time.monotonic()
    architecture, model_config = read_config(directory)
    specs = architecture.weight_map(model_config)
    config = resolve(settings, model_config, specs)
    tuning = settings.cache_dir / "tuning"
    ops = load_backend(config.backend, config.num_threads, pinned=own_process, tuning_directory=tuning)
    ignored = architecture.ignored_tensors(model_config)
    if settings.random_weights:
        weights, weights_id = make_weights(specs, config, ops, on_progress), "random"
    else:
        source = WeightSource(directory, model_config, specs, ignored, settings.cache_dir)
        weights, weights_id = prepare_weights(source, config, ops, on_progress)
    with config.torch_device:  # what the model makes itself: tables of angles, counts
        model = architecture.build(model_config, weights, config.max_model_len, ops)
    if settings.tune:
        tune(model, weights, config, ops, on_progress)
    kv_cache = allocate_kv_cache(model_config, config.num_blocks, config.kv_dtype, ops)
    with torch.inference_mode():
        step = prepare_step(model, kv_cache, ops, config.max_step_tokens)
    table = SlotTable(config.max_num_seqs, config.max_model_len, config.block_size)
    info = EngineInfo(
        architecture=model_config.architecture,
        device=config.device,
        dtype=config.dtype,
        kv_dtype=str(config.kv_dtype).removeprefix("torch."),
        quantization=config.quantization,
        backend=config.backend,
        num_threads=config.num_threads,
        vocab_size=model_config.vocab_size,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_step_tokens=config.max_step_tokens,
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        prefix_caching=config.prefix_caching,
        num_parameters=sum(math.prod(spec.shape) for spec in specs),
        weight_bytes=config.weight_bytes,
        kv_cache_bytes=config.kv_cache_bytes,
        load_seconds=time.monotonic() - started,
        weights_id=weights_id,
    )
    grammars = GrammarStates(directory, model_config.vocab_size)
    counts = expert_counts(model.layers)
    runner = Runner(step, table, ops, grammars, counts, on_gpu=config.device == "cuda")
    return Runtime(runner, model, step, kv_cache, info)
