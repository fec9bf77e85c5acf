"""The card that kernels run on, and what every launch must know of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from toptwo_kernels.cuda import support
from toptwo_kernels.cuda.tuning import Tuner

_INTERPRETED_PROCESSORS = 4


@dataclass
class Device:
    """One CUDA device, or the processor under Triton's interpreter.

    pdl: kernels are launched before those in front of them have ended, and wait themselves
        (programmatic dependent launch).
    num_live: int32 [1] while a padded step runs; tokens from that number on are padding.
    """

    torch_device: torch.device
    interpreted: bool
    num_processors: int
    pdl: bool
    tuner: Tuner
    num_live: Tensor | None = field(default=None)


def open_device(tuning_directory: Path | None = None) -> Device:
    """The first CUDA device, or the interpreter's stand-in for one.

    tuning_directory: where measured launch configurations are kept.
    Raises ValueError when there is neither.
    """
    if support.is_interpreted():
        tuner = Tuner("interpreter", None)
        return Device(torch.device("cpu"), True, _INTERPRETED_PROCESSORS, False, tuner)
    if problem := support.problem():
        raise ValueError(problem)
    properties = torch.cuda.get_device_properties(0)
    return Device(
        torch_device=torch.device("cuda", 0),
        interpreted=False,
        num_processors=properties.multi_processor_count,
        pdl=properties.major >= 9,
        tuner=Tuner(properties.name, tuning_directory, support.shared_bytes(properties)),
    )
