"""`toptwo model export`: a checkpoint as a GGUF file that llama.cpp runs.

Knows the types that can be written and the order of the steps. What is in the file is told by
`gguf_layout` and `gguf_vocabulary`, how its bytes are made by `gguf_file`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType as Format
from rich.console import Console

from toptwo.errors import StartupError
from toptwo.model_commands.gguf_file import ExportType, GgufContent, write_gguf
from toptwo.model_commands.gguf_layout import GgufTensor, tensors_of
from toptwo.model_commands.gguf_vocabulary import read_vocabulary
from toptwo.model_commands.staging import appearing, progress
from toptwo.models.mixtral import MixtralConfig, ignored_tensors
from toptwo.models.registry import read_config
from toptwo.runtime.checkpoints.open import open_checkpoint
from toptwo.runtime.checkpoints.protocol import Checkpoint
from toptwo.runtime.loader import DERIVED_SUFFIXES
from toptwo.settings import load_settings
from toptwo.source import ModelSource, find_model

EXPORT_TYPES = {
    "bf16": ExportType.of(Format.BF16, Format.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": ExportType.of(Format.Q8_0, Format.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    # As many bits as this server's own int4, whose embedding and head are int8 as well.
    "q4_0": ExportType.of(Format.Q8_0, Format.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
METADATA_BYTES = 32 << 20  # generous: names, a vocabulary and its merges are a few MB


def export(model: str | None, out: Path, kind: str, force: bool, console: Console) -> None:
    """Write `model` (None: the default model) as a GGUF file; see EXPORT_TYPES for `kind`.

    Raises StartupError with one clear line, and leaves nothing half-made, whatever goes wrong.
    """
    if kind not in EXPORT_TYPES:
        raise StartupError(f"--type {kind}: there is {', '.join(EXPORT_TYPES)}")
    if out.is_dir():
        raise StartupError(f"{out}: is a directory; name the file to write")
    if not out.parent.is_dir():
        raise StartupError(f"{out.parent}: no such directory")
    if out.exists() and not force:
        raise StartupError(f"{out}: exists; --force overwrites it")
    settings, _ = load_settings({} if model is None else {"model": model})
    export_source(find_model(settings, console), out, EXPORT_TYPES[kind], console)


def export_source(source: ModelSource, out: Path, kind: ExportType, console: Console) -> None:
    """`export` for a model that was found, over whatever is at `out`."""
    directory = source.directory
    architecture, config = read_config(directory)
    if not isinstance(config, MixtralConfig):
        raise StartupError(f"{directory}: only Mixtral checkpoints can be exported")
    vocabulary = read_vocabulary(directory, config.vocab_size)
    if not vocabulary.is_exact:
        console.print(
            f"warning: {directory / 'tokenizer.json'} cuts text in a way that llama.cpp has no known name "
            f"for; {vocabulary.pre!r} is written, and it will tokenise some texts differently",
            markup=False,
            soft_wrap=True,
        )
    with open_checkpoint(directory, architecture.weight_map(config)) as checkpoint:
        content = GgufContent(source.name, kind, config, vocabulary, tensors_of(config, checkpoint.names))
        _check_tensors(checkpoint, content.tensors, ignored_tensors(config))
        total = sum(kind.bytes_of(tensor) for tensor in content.tensors)
        with appearing(out, total + METADATA_BYTES) as staged, progress(console) as bar:
            task = bar.add_task("Exporting", total=total)
            write_gguf(content, checkpoint, staged, lambda size: bar.advance(task, size))
    console.print(
        f"{out}: {len(content.tensors)} tensors, {out.stat().st_size / 1e9:.2f} GB",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _check_tensors(checkpoint: Checkpoint, tensors: list[GgufTensor], ignored: Collection[str]) -> None:
    """Raise StartupError where tensors are missing, misshapen or unknown: those would silently be lost."""
    wanted = {part.source: part.whole for tensor in tensors for part in tensor.parts}
    for name in sorted(wanted):
        if name not in checkpoint.names:
            raise StartupError(f"{checkpoint.directory}: the checkpoint misses {name}")
        if (found := checkpoint.shape(name)) != wanted[name]:
            raise StartupError(
                f"{checkpoint.directory}: {name} has shape {list(found)}, expected {list(wanted[name])}"
            )
    for name in sorted(checkpoint.names - wanted.keys() - set(ignored)):
        if not name.endswith(DERIVED_SUFFIXES):
            raise StartupError(f"{checkpoint.directory}: the checkpoint has {name}, which is unknown")
