"""Headers of safetensors files that lie about anything: one line that names the file and the tensor."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from toptwo.errors import CheckpointError
from toptwo.runtime.checkpoints.header import ITEM_BYTES, StoredTensor, read_header

GOOD: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    "b": {"dtype": "F16", "shape": [2, 4], "data_offsets": [16, 32]},
}
NAMES = ("a", "b")


def write(path: Path, header: object, data: int = 32) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    return message.removeprefix(f"{path}: ")


def test_every_dtype_of_the_library_is_read_as_it_is_written(path: Path) -> None:
    dtypes = {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    dtypes |= {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    dtypes |= {"U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}
    dtypes |= {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
    dtypes |= {"F8_E8M0": torch.float8_e8m0fnu}
    tensors = {name: torch.zeros(2, 3, dtype=torch.uint8).to(dtype) for name, dtype in dtypes.items()}
    save_file({**tensors, "scalar": torch.tensor(1.0), "empty": torch.empty(0, 3)}, path, {"format": "pt"})
    header = read_header(path)
    scalar, empty = header.pop("scalar"), header.pop("empty")
    assert (scalar.shape, scalar.end - scalar.start) == ((), 4)
    assert (empty.shape, empty.end - empty.start) == ((0, 3), 0)
    assert dtypes.keys() == ITEM_BYTES.keys()
    for name, tensor in tensors.items():
        start = header[name].start
        assert header[name] == StoredTensor(name, (2, 3), start, start + tensor.nbytes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "F31"}, "b has the unknown dtype 'F31'; there is BOOL"),
        ({"dtype": None}, "b has the unknown dtype None"),
        ({"dtype": ["F16"]}, "b has the unknown dtype ['F16']"),
        ({"shape": [-2, -4]}, "b has the shape [-2, -4], not a list of sizes"),
        ({"shape": [2.0, 4]}, "b has the shape [2.0, 4], not a list of sizes"),
        ({"shape": [True, 8]}, "b has the shape [True, 8], not a list of sizes"),
        ({"shape": "8"}, "b has the shape '8', not a list of sizes"),
        ({"shape": [8] + [1] * 8}, "b has the shape [8, 1, 1, 1, 1, 1, 1, 1, 1], not a list of sizes"),
        ({"shape": [10**4000, 0]}, "b has the shape [1000"),
        ({"shape": [2**62, 2**62]}, "b as F16 of shape"),
        ({"shape": [2**62, 2**62, 0], "data_offsets": [16, 16]}, "b as F16 of shape"),
        ({"shape": [2, 5]}, "b as F16 of shape [2, 5] needs 20 bytes and its data_offsets give it 16"),
        ({"dtype": "F32"}, "b as F32 of shape [2, 4] needs 32 bytes and its data_offsets give it 16"),
        ({"data_offsets": [32, 16]}, "b has the data_offsets [32, 16], not [start, end]"),
        ({"data_offsets": [-16, 0]}, "b has the data_offsets [-16, 0], not [start, end]"),
        ({"data_offsets": [16]}, "b has the data_offsets [16], not [start, end]"),
        ({"data_offsets": [16, 32, 48]}, "b has the data_offsets [16, 32, 48], not [start, end]"),
        ({"data_offsets": None}, "b has the data_offsets None, not [start, end]"),
        ({"data_offsets": [24, 40]}, "b ends at byte 40 of the data, of which the file holds 32"),
        ({"data_offsets": [8, 24]}, "b overlaps a"),
        ({"data_offsets": [0, 16]}, "b overlaps a"),
        ({"shape": [4], "data_offsets": [24, 32]}, "b leaves a hole before it: bytes 16 to 24 of the data"),
        ({"shape": [4], "data_offsets": [16, 24]}, "8 bytes follow the last tensor b"),
    ],
)
def test_a_tensor_that_lies_is_named(path: Path, change: dict[str, Any], words: str) -> None:
    read_header(write(path, GOOD))
    write(path, {**GOOD, "b": GOOD["b"] | change})
    assert words in refused(path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"[]", "its header is not a JSON object"),
        (b"", "its header is not valid JSON"),
        (b"{", "its header is not valid JSON"),
        (b"\xff{}", "its header is not valid JSON"),
        (b'{"a": {"dtype": "F32", "shape": [9' + b"9" * 5000 + b"]}}", "its header is not valid JSON"),
        (b"[" * 100_000, "its header is not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' is in its header twice"),
        (b'{"a": {"shape": [4], "shape": [5]}}', "'shape' is in its header twice"),
        ({"a": [1, 2]}, "a is not described by an object"),
        ({"a\nb": {}}, r"'a\nb' is not the name of a tensor"),
        ({"\x1b[31m": {}}, r"'\x1b[31m' is not the name of a tensor"),
        ({"a" * 600: {}}, "is not the name of a tensor"),
        ({"__metadata__": {"format": "pt"}}, "32 bytes follow the last tensor"),
        ({"b": GOOD["b"]}, "b leaves a hole before it: bytes 0 to 16"),
    ],
)
def test_a_header_that_is_none_is_refused(path: Path, header: object, words: str) -> None:
    assert words in refused(write(path, header))


def test_files_of_the_wrong_length_are_refused(path: Path) -> None:
    whole = write(path, GOOD).read_bytes()
    path.write_bytes(whole + b"\0")
    assert refused(path) == "1 bytes follow the last tensor b"
    path.write_bytes(whole[:-1])
    assert refused(path) == "b ends at byte 32 of the data, of which the file holds 31"
    path.write_bytes(whole[:50])
    announced = len(whole) - 8 - 32
    assert refused(path) == f"cut short within its header: {announced} bytes are announced and 42 are there"
    path.write_bytes(whole[:7])
    assert refused(path) == "7 bytes are too few for a safetensors file"
    path.write_bytes(b"")
    assert refused(path) == "0 bytes are too few for a safetensors file"
    path.write_bytes(b"\xff" * 100)
    assert "not a safetensors file, or its header of 18446744073709551615 bytes" in refused(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "not a safetensors file" in refused(path)


def test_what_is_no_file_is_refused_and_not_waited_for(path: Path) -> None:
    assert refused(path) == "not there"
    path.mkdir()
    assert refused(path) == "not a file"
    path.rmdir()
    os.mkfifo(path)
    assert refused(path) == "not a file"


VALUES = st.one_of(
    st.integers(-5, 2**70), st.floats(), st.text(max_size=3), st.none(), st.just([2**62, 2**62])
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(NAMES),
    st.sampled_from(["dtype", "shape", "data_offsets"]),
    st.one_of(VALUES, st.lists(VALUES, max_size=3)),
    st.integers(-40, 8),
)
def test_no_value_is_believed_that_does_not_fit_the_others(
    path: Path, name: str, key: str, value: object, extra: int
) -> None:
    header = {**GOOD, name: {**GOOD[name], key: value}}
    write(path, header, max(0, 32 + extra))
    try:
        tensors = read_header(path)
    except CheckpointError:
        assert refused(path)
    else:
        assert extra == 0  # another shape of as many bytes, at most
        assert sorted((t.start, t.end) for t in tensors.values()) == [(0, 16), (16, 32)]
