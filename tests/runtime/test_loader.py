"""Checkpoint files that lie, lack or are of the wrong kind."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tiny import write_mixtral
from toptwo.errors import StartupError
from toptwo.models.checkpoint import Piece, WeightSpec, whole
from toptwo.runtime.build import build_runtime
from toptwo.runtime.loader import Checkpoint, load_weights
from toptwo.settings import Settings
from toptwo_kernels.registry import BACKENDS


def load(directory: Path, *specs: WeightSpec) -> dict[str, torch.Tensor]:
    kept: dict[str, torch.Tensor] = {}
    with Checkpoint(directory) as checkpoint:
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
    with Checkpoint(tmp_path) as checkpoint:
        specs = [vector("b", 1), vector("a", 2)]
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


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(StartupError, match=f"{name}: pickled weights are refused"):
        Checkpoint(tmp_path)


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no weights"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "not a valid weight index"),
        ("[]", "not a valid weight index"),
        ('{"weight_map": {"a": 1}}', "not the name of a safetensors file"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "not the name of a safetensors file"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not the name of a safetensors file"),
        ('{"weight_map": {"a": "x.bin"}}', "not the name of a safetensors file"),
        ('{"weight_map": {"a": "x.safetensors"}}', "listed in"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: str, words: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(StartupError, match=words):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(StartupError, match="tensor a is also in another file"):
        Checkpoint(tmp_path)


def test_many_missing_tensors_are_summed_up(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(StartupError, match=r"misses t0, t1, t2, t3 and 6 more and has unknown a"):
        load(tmp_path, *(vector(f"t{i}", 1) for i in range(10)))


HEADER = {
    "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    "b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 32]},
}
VALUES = st.one_of(
    st.integers(-5, 2**70), st.floats(), st.text(max_size=3), st.none(), st.just([2**62, 2**62])
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["a", "b"]),
    st.sampled_from(["dtype", "shape", "data_offsets"]),
    st.one_of(VALUES, st.lists(VALUES, max_size=3)),
    st.integers(-40, 8),
)
def test_headers_that_lie_about_sizes_are_refused(
    tmp_path: Path, name: str, key: str, value: object, extra_bytes: int
) -> None:
    header = {**HEADER, name: {**HEADER[name], key: value}}
    if header == HEADER and extra_bytes == 0:
        return
    data = json.dumps(header).encode()
    body = struct.pack("<Q", len(data)) + data + bytes(32)
    body = body + bytes(extra_bytes) if extra_bytes > 0 else body[: len(body) + extra_bytes]
    (tmp_path / "model.safetensors").write_bytes(body)
    with pytest.raises(StartupError, match=r"safetensors|has shape|only F32"):
        load(tmp_path, vector("a", 4), vector("b", 2, 2))
