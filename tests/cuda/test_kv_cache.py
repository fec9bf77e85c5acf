"""Room for the cache, and that attention writes the step's tokens there and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from cuda_paged import BLOCK, Paged
from toptwo_kernels.ops import AttentionSpec, HeadShape, LatentShape, LatentSpec

if TYPE_CHECKING:
    from toptwo_kernels.cuda.device import Device

Normal = Callable[..., Tensor]


def test_an_unknown_dtype_is_refused(device: Device) -> None:
    from toptwo_kernels.cuda.kv_cache import allocate_kv

    with pytest.raises(ValueError, match="int8"):
        allocate_kv(device, 2, BLOCK, HeadShape(2, 1, 32), torch.int8)


@pytest.mark.parametrize(
    "spec", [AttentionSpec(HeadShape(4, 2, 32), 0.2), LatentSpec(LatentShape(2, 24, 8), 0.2)]
)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_only_the_tokens_of_a_step_are_written(
    device: Device, normal: Normal, spec: AttentionSpec | LatentSpec, kv_dtype: torch.dtype
) -> None:
    paged = Paged(device, normal, spec, [40, 30], kv_dtype=kv_dtype)
    paged.step([(0, 21), (1, 3)])
    paged.step([(1, 1)], room=4)
    written = torch.zeros(len(paged.kv[0]), BLOCK, dtype=torch.bool)
    for sequence in paged.sequences:
        for position in range(sequence.num_done):
            written[sequence.blocks[position // BLOCK], position % BLOCK] = True
    for part in paged.kv:
        values = part.float().cpu()
        rows = values.transpose(1, 2).flatten(2) if values.dim() == 4 else values
        assert torch.equal(~rows.isnan().any(-1), written)
        assert torch.equal(rows.isnan().all(-1), ~written)


def test_values_are_kept_as_they_are(device: Device, normal: Normal) -> None:
    paged = Paged(device, normal, AttentionSpec(HeadShape(2, 1, 32), 0.2), [20], kv_dtype=torch.bfloat16)
    paged.step([(0, 20)])
    sequence = paged.sequences[0]
    kept = torch.cat([paged.kv[1][block, 0] for block in sequence.blocks])[:20]
    assert torch.equal(kept, sequence.inputs_LX[:, -32:].bfloat16())
