"""Which safetensors files a directory's checkpoint consists of, and files with a few bytes wrong."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from quantized import FP8, GPTQ, halves, words
from toptwo.errors import CheckpointError
from toptwo.runtime.checkpoints.open import open_checkpoint

INDEX = "model.safetensors.index.json"


def refused(directory: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(directory, ())
    assert str(caught.value).startswith(str(directory))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    refused(tmp_path, f"{name}: pickled weights are refused")


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "no weights")


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ("{", "not a valid weight index"),
        ("[]", "not a valid weight index"),
        ("[" * 100_000, "not a valid weight index"),
        ('{"weight_map": [1]}', "not a valid weight index"),
        ('{"weight_map": {"a": 1}}', "not the name of a safetensors file"),
        ('{"weight_map": {"a": ["x.safetensors"]}}', "not the name of a safetensors file"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "not the name of a safetensors file"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not the name of a safetensors file"),
        ('{"weight_map": {"a": "x.bin"}}', "not the name of a safetensors file"),
        ('{"weight_map": {"a": "x.safetensors"}}', "x.safetensors: not there"),
        ('{"weight_map": {}}', "lists no tensors"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: str, match: str) -> None:
    (tmp_path / INDEX).write_text(index)
    refused(tmp_path, match)


def write_index(directory: Path, **file_of: str) -> None:
    weight_map = {name: f"{file}.safetensors" for name, file in file_of.items()}
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_tensors_are_found_in_their_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "y.safetensors")
    write_index(tmp_path, a="x", b="y")
    with open_checkpoint(tmp_path, ()) as checkpoint:
        assert checkpoint.names == {"a", "b"}
        assert [path.name for path in checkpoint.paths] == ["x.safetensors", "y.safetensors"]
        assert (checkpoint.shape("a"), checkpoint.shape("b")) == ((2,), (3,))
        assert checkpoint.tensor("a").tolist() == [1, 1]
        assert checkpoint.tensor("b").tolist() == [0, 0, 0]


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "y.safetensors")
    write_index(tmp_path, a="x", b="y")
    refused(tmp_path, r"y.safetensors: tensor a is also in x.safetensors")


def test_a_tensor_that_is_not_where_the_index_says_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "y.safetensors")
    write_index(tmp_path, a="x", b="y", c="y")
    refused(tmp_path, r"y.safetensors: lacks 'c', which model.safetensors.index.json says is in it")
    write_index(tmp_path, a="y", b="x")
    refused(tmp_path, r"y.safetensors: lacks 'a'")


def test_numbers_of_a_kind_that_no_model_has_are_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.int64)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path, ()) as checkpoint, pytest.raises(CheckpointError) as caught:
        checkpoint.shape("a")
    assert str(caught.value).startswith(f"{tmp_path / 'model.safetensors'}: a is I64; only F32, BF16, F16")


def test_a_config_that_is_no_config_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, r"config.json: must be a JSON object")


PLAIN = {"a": torch.arange(64.0), "b": torch.ones(4, 8).half(), "c.bias": torch.zeros(3).bfloat16()}
QUANTISED = {"m.qweight": words(3, 16), "m.qzeros": words(6, 2), "m.scales": halves(6, 16)}
SMALL = {"m": torch.ones(5, 10).to(torch.float8_e4m3fn), "m_scale_inv": torch.ones(3, 3)}
SUBJECTS: list[tuple[dict[str, Tensor], object]] = [(PLAIN, None), (QUANTISED, GPTQ), (SMALL, FP8)]
HEADROOM = 256 << 20


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What a few small tensors need: whoever believes a header's sizes gets a MemoryError."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(SUBJECTS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    st.lists(st.tuples(st.integers(0, 600), st.sampled_from(b'0123456789[]{},:"-eFIU8 ')), max_size=4),
    st.one_of(st.none(), st.floats(0, 1.2)),
)
def test_files_with_wrong_bytes_load_or_are_refused_and_take_no_memory(
    tmp_path: Path,
    little_memory: None,
    subject: tuple[dict[str, Tensor], object],
    anywhere: list[tuple[float, int]],
    in_header: list[tuple[int, int]],
    length: float | None,
) -> None:
    tensors, config = subject
    content = bytearray(save(tensors))
    for place, byte in anywhere:
        content[int(place * len(content))] = byte
    for index, byte in in_header:
        content[min(8 + index, len(content) - 1)] = byte
    if length is not None:
        content = content[: int(length * len(content))] + bytes(max(0, int((length - 1) * len(content))))
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    message = f"{tmp_path} is fine"
    try:
        with open_checkpoint(tmp_path, ()) as checkpoint:
            for name in checkpoint.names:
                shape = checkpoint.shape(name)
                tensor = checkpoint.tensor(name)
                assert tuple(tensor.shape) == shape
                assert tensor.numel() <= 2 * len(content)
                tensor.sum()
                checkpoint.release(name)
    except CheckpointError as error:
        message = str(error)
    assert message.startswith(str(tmp_path))
    assert message.isprintable()
