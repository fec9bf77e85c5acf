"""From logits to the next token, without sorting the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from toptwo_kernels.cpu.tape import Tape
from toptwo_kernels.ops import SamplingBatch
from toptwo_kernels.reference.sampling import penalize


def sample(tape: Tape, logits_RV: Tensor, batch: SamplingBatch) -> Tensor:
    """See `ops.Ops.sample`. Penalties are rare and are the reference's."""
    logits = penalize(logits_RV, batch).contiguous()
    ids = torch.empty(len(logits), dtype=torch.int64)
    tape.workers.sample(
        logits.data_ptr(), *logits.shape, batch.filters_R5.contiguous().data_ptr(), ids.data_ptr()
    )
    return ids
