"""Weights assembled from a checkpoint's tensors, and checkpoints that do not hold what a model wants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tiny import write_mixtral
from toptwo.errors import CheckpointError
from toptwo.models.checkpoint import Piece, WeightSpec
from toptwo.models.weight_specs import whole
from toptwo.runtime.build import build_runtime
from toptwo.runtime.checkpoints.open import open_checkpoint
from toptwo.runtime.loader import load_weights
from toptwo.settings import Settings
from toptwo_kernels.registry import BACKENDS


def load(directory: Path, *specs: WeightSpec) -> dict[str, torch.Tensor]:
    kept: dict[str, torch.Tensor] = {}
    with open_checkpoint(directory, specs) as checkpoint:
        load_weights(checkpoint, specs, [], lambda spec, tensor: kept.update({spec.name: tensor}))
    return kept


def vector(name: str, *shape: int) -> WeightSpec:
    return whole(name, shape, "vector")


def test_weights_are_views_of_the_mapped_file_when_nothing_must_change(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6.0).view(2, 3)}, tmp_path / "model.safetensors")
    weights = load(tmp_path, vector("a", 2, 3))
    mapped = (Path("/proc/self/maps")).read_text()
    assert str(tmp_path / "model.safetensors") in mapped
    assert weights["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_pieces_fill_their_parts(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(1)}, tmp_path / "model.safetensors")
    spec = WeightSpec("w", (3,), "vector", ((Piece("a", (slice(0, 2),)), Piece("b", (slice(2, None),))),))
    assert load(tmp_path, spec)["w"].tolist() == [1, 1, 0]


def test_weights_are_handed_over_one_by_one_in_the_order_of_the_specs(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(1)}, tmp_path / "model.safetensors")
    told: list[tuple[str, list[float]]] = []
    specs = [vector("b", 1), vector("a", 2)]
    with open_checkpoint(tmp_path, specs) as checkpoint:
        load_weights(checkpoint, specs, [], lambda spec, tensor: told.append((spec.name, tensor.tolist())))
    assert told == [("b", [0]), ("a", [1, 1])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_progress_is_reported(tmp_path: Path, backend: str) -> None:
    write_mixtral(tmp_path)
    told: list[tuple[int, int]] = []
    chosen = Settings(backend=backend, dtype="float32", kv_cache_gib=0.01, threads=1)  # type: ignore[arg-type]
    build_runtime(chosen, tmp_path, lambda done, total: told.append((done, total)))
    num_weights = 3 * 7 + 3  # of each layer, and the embeddings, the last norm and the head
    assert told == [(count, num_weights) for count in range(1, num_weights + 1)]


def test_many_missing_tensors_are_summed_up(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"misses t0, t1, t2, t3 and 6 more and has unknown a"):
        load(tmp_path, *(vector(f"t{i}", 1) for i in range(10)))
