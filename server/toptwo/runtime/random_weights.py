"""Made-up weights in a model's shape: what a machine does with a model is measured without its checkpoint.

Numbers are normal and as small as a trained model's, so that activations stay finite and experts are chosen
about equally often. What such a model says means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from toptwo.models.checkpoint import Weights, WeightSpec
from toptwo.runtime.device import RuntimeConfig
from toptwo.runtime.formats import format_of
from toptwo_kernels.ops import Matrix, Ops

_SEED = 0


def make_weights(
    specs: Sequence[WeightSpec], config: RuntimeConfig, ops: Ops, on_progress: Callable[[int, int], None]
) -> Weights:
    """Every weight of `specs` in its format.

    Weights of one shape and use have the same numbers, each in memory of its own: packing takes far longer
    than copying, and reading costs the same.
    """
    generator = torch.Generator(config.torch_device).manual_seed(_SEED)
    models: dict[tuple[object, ...], Matrix] = {}
    matrices: dict[str, Matrix] = {}
    vectors: dict[str, Tensor] = {}
    for done, spec in enumerate(specs, start=1):
        if spec.role == "vector":
            # A norm's weight is near one; as a bias, one added to everything changes no time.
            vectors[spec.name] = torch.ones(spec.shape, device=config.torch_device)
        else:
            kind = spec.shape, spec.role
            if kind in models:
                matrices[spec.name] = replace(models[kind], data=models[kind].data.clone())
            else:
                matrices[spec.name] = models[kind] = _make_matrix(spec, config, ops, generator)
        on_progress(done, len(specs))
    return Weights(matrices, vectors)


def _make_matrix(spec: WeightSpec, config: RuntimeConfig, ops: Ops, generator: torch.Generator) -> Matrix:
    dtype = torch.bfloat16 if config.device == "cuda" else torch.float32
    weight = torch.empty(spec.shape, dtype=dtype, device=config.torch_device)
    weight.normal_(0.0, 1 / math.sqrt(spec.shape[-1]), generator=generator)
    weight_format = format_of(spec.role, config.quantization, config.dtype)
    return ops.pack(weight, weight_format, paired=spec.role == "paired")
