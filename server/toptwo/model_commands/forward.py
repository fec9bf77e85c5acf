"""Running a model over texts, for commands that compare models: windows of tokens, and what is made of them.

Knows the runtime and tokenizers; must not know what is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from toptwo.errors import StartupError
from toptwo.runtime.build import Runtime, build_runtime
from toptwo.settings import load_settings
from toptwo_kernels.ops import StepBatch

TEXT = Path(__file__).with_name("quality_text.md")
WINDOW = 512  # tokens of context at most: the text is cut, as nobody's cache is larger on the first question


def read_windows(directory: Path, text: Path) -> list[list[int]]:
    """The text in a model's tokens, cut into windows of at most WINDOW. Raises StartupError."""
    try:
        words = text.read_text()
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the tokenizer's library raises plain Exceptions
        raise StartupError(f"{text} and {directory / 'tokenizer.json'}: {error}") from None
    ids: list[int] = tokenizer.encode(words, add_special_tokens=False).ids
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise StartupError(f"{text}: too short to measure anything")
    return windows


def load(directory: Path, window: int = WINDOW, **formats: object) -> Runtime:
    """A model as the server loads it, for windows of so many tokens. Raises StartupError."""
    flags = {"max_model_len": window, "max_step_tokens": window, "max_num_seqs": 1, **formats}
    return build_runtime(load_settings(flags)[0], directory)


def logits(runtime: Runtime, window: list[int], selected: slice = slice(None)) -> Tensor:
    """Float32 logits [S, V] after the selected tokens of a window. The next call may write over them."""
    size, count = runtime.info.block_size, len(window)
    positions = torch.arange(count)
    batch = StepBatch(
        ids_T=torch.tensor(window),
        positions_T=positions,
        slots_T=positions,
        query_starts_R1=torch.tensor([0, count]),
        context_lens_R=torch.tensor([count]),
        block_tables_RB=torch.arange(-(-count // size)).unsqueeze(0),
        block_size=size,
        selected_S=positions[selected],
    )
    with torch.inference_mode():
        return runtime.step(batch)


def distributions(runtime: Runtime, windows: Iterable[list[int]]) -> Iterator[Tensor]:
    """Log-probabilities [T, V] after every token of each window."""
    for window in windows:
        yield logits(runtime, window).log_softmax(-1)
