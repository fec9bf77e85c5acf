"""From a checkpoint's tensors to a model's weights, one at a time.

Knows names and shapes; which names a model wants is the architecture's `weight_map`, how tensors lie in files
is for `checkpoints` to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

import torch
from torch import Tensor

from toptwo.errors import CheckpointError
from toptwo.models.checkpoint import Piece, WeightSpec
from toptwo.runtime.checkpoints.protocol import Checkpoint

# Buffers that old exporters wrote although they follow from the config.
DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)

Keep = Callable[[WeightSpec, Tensor], None]


def load_weights(
    checkpoint: Checkpoint, specs: Sequence[WeightSpec], ignored: Sequence[str], keep: Keep
) -> None:
    """Hand every weight of `specs`, assembled, to `keep`, one at a time.

    Memory beyond what `keep` holds on to is that of the largest weight.
    Raises CheckpointError that names missing, unknown and misshapen tensors.
    """
    sources = check_weights(checkpoint, specs, ignored)
    for spec in specs:
        pieces = sources[spec.name]
        keep(spec, _assemble(checkpoint, spec, pieces))
        for piece in pieces:
            checkpoint.release(piece.name)


def check_weights(
    checkpoint: Checkpoint, specs: Sequence[WeightSpec], ignored: Sequence[str]
) -> dict[str, tuple[Piece, ...]]:
    """The tensors that each weight is made of, by its name; every name and shape was checked.

    Reads headers, and the biases that no spec asks for. Raises CheckpointError, as `load_weights`.
    """
    sources = {spec.name: _choose_source(spec, checkpoint.names) for spec in specs}
    _check_names(checkpoint, sources, ignored)
    for spec in specs:
        for piece in sources[spec.name]:
            _check_shape(checkpoint, spec, piece)
    return sources


def _choose_source(spec: WeightSpec, names: Set[str]) -> tuple[Piece, ...]:
    """The first complete source, else the most complete one, so that an error names what lacks."""
    return max(spec.sources, key=lambda pieces: sum(p.name in names for p in pieces) / len(pieces))


def _check_names(
    checkpoint: Checkpoint, sources: dict[str, tuple[Piece, ...]], ignored: Sequence[str]
) -> None:
    wanted = {piece.name for pieces in sources.values() for piece in pieces}
    unknown = {
        name
        for name in checkpoint.names - wanted
        if not _is_ignored(name, ignored) and not _is_null(checkpoint, name)
    }
    problems = [
        f"{what} {_list_some(names)}"
        for what, names in (("misses", wanted - checkpoint.names), ("has unknown", unknown))
        if names
    ]
    if problems:
        raise CheckpointError(f"{checkpoint.directory}: the checkpoint " + " and ".join(problems))


def _is_ignored(name: str, ignored: Sequence[str]) -> bool:
    """Whether a tensor may be there and is not needed; an entry that ends in a dot covers all below it."""
    return (
        name in ignored
        or name.endswith(DERIVED_SUFFIXES)
        or any(name.startswith(entry) for entry in ignored if entry.endswith("."))
    )


def _is_null(checkpoint: Checkpoint, name: str) -> bool:
    """Whether it is a bias of zeros: exporters of GPTQ give one to matrices that have none."""
    stem = name.removesuffix(".bias")
    return f"{stem}.weight" in checkpoint.names and stem != name and not checkpoint.tensor(name).any()


def _list_some(names: Set[str], limit: int = 4) -> str:
    shown = ", ".join(sorted(names)[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _check_shape(checkpoint: Checkpoint, spec: WeightSpec, piece: Piece) -> None:
    # Meta tensors tell what would come of views and parts, without allocating anything.
    expected = list(torch.empty(spec.shape, device="meta")[piece.into].shape)
    found = checkpoint.shape(piece.name)
    problem = f"{checkpoint.directory}: {piece.name} has shape {list(found)}"
    try:
        viewed = list(_viewed(torch.empty(found, device="meta"), piece).shape)
    except (RuntimeError, IndexError):
        raise CheckpointError(f"{problem}, which cannot be part of {spec.name} {list(spec.shape)}") from None
    if viewed != expected:
        reordered = f" and gives {viewed}" if piece.view else ""
        raise CheckpointError(f"{problem}{reordered}, expected {expected}")


def _viewed(tensor: Tensor, piece: Piece) -> Tensor:
    return piece.view(tensor) if piece.view else tensor


def _assemble(checkpoint: Checkpoint, spec: WeightSpec, pieces: tuple[Piece, ...]) -> Tensor:
    if len(pieces) == 1 and not pieces[0].into:
        return _viewed(checkpoint.tensor(pieces[0].name), pieces[0]).contiguous()
    weight: Tensor | None = None
    for piece in pieces:
        part = checkpoint.tensor(piece.name)
        if weight is None:
            weight = torch.empty(spec.shape, dtype=part.dtype)
        elif weight.dtype != part.dtype:  # quantised parts beside plain ones; none may lose a bit
            weight = weight.to(torch.promote_types(weight.dtype, part.dtype))
        weight[piece.into].copy_(_viewed(part, piece))
        checkpoint.release(piece.name)
    assert weight is not None  # noqa: S101  (a source has pieces)
    return weight
