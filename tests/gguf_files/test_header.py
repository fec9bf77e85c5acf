"""A GGUF file's header: everything in it comes back, and every lie ends in one line that names it."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Format

from llama_cpp import write_gguf
from tiny import FAMILIES
from toptwo.errors import CheckpointError, StartupError
from toptwo.gguf import header
from toptwo.gguf.directory import write_model_directory
from toptwo.gguf.header import read_gguf
from toptwo.models.registry import read_config
from toptwo.runtime.checkpoints.open import open_checkpoint
from toptwo.runtime.loader import load_weights

NAMED = {"blk.0.attn_q.weight": (4, 32), "blk.0.ffn_gate_exps.weight": (2, 3, 64), "output_norm.weight": (5,)}


def write(path: Path, tensors: dict[str, Any] | None = None, **keys: tuple[Any, gguf.GGUFValueType]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, (value, kind) in keys.items():
        writer.add_key_value(key, value, kind)
    rng = np.random.default_rng(0)
    for name, shape in (NAMED if tensors is None else tensors).items():
        weight = rng.standard_normal(shape, np.float32)
        kind = Format.F32 if shape[-1] % 32 else Format.Q8_0
        writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_values_of_every_type_come_back(tmp_path: Path) -> None:
    kinds = gguf.GGUFValueType
    values: dict[str, tuple[Any, gguf.GGUFValueType]] = {
        "u8": (200, kinds.UINT8),
        "i8": (-100, kinds.INT8),
        "u16": (60_000, kinds.UINT16),
        "i16": (-30_000, kinds.INT16),
        "u32": (4_000_000_000, kinds.UINT32),
        "i32": (-2_000_000_000, kinds.INT32),
        "u64": (1 << 63, kinds.UINT64),
        "i64": (-(1 << 62), kinds.INT64),
        "f32": (1e-5, kinds.FLOAT32),
        "f64": (0.1, kinds.FLOAT64),
        "yes": (True, kinds.BOOL),
        "text": ("naïve 🦙", kinds.STRING),
        "texts": (["a", "", "ß"], kinds.ARRAY),
        "numbers": ([1, -2, 3], kinds.ARRAY),
        "halves": ([0.5, -0.25], kinds.ARRAY),
        "flags": ([True, False], kinds.ARRAY),
    }
    found = read_gguf([write(tmp_path / "a.gguf", **values)]).metadata.values
    for key, (value, _) in values.items():
        assert found[key] == value, key  # 1e-05, not the float32 next to it
        assert type(found[key]) is type(value), key


def test_tensors_are_where_the_library_finds_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found = read_gguf([path]).tensors
    assert found.keys() == expected.keys() == NAMED.keys()
    for name, tensor in found.items():
        theirs = expected[name]
        assert (tensor.kind, tensor.offset, tensor.size) == (
            theirs.tensor_type,
            theirs.data_offset,
            theirs.n_bytes,
        )
        assert tensor.shape == NAMED[name] == tuple(theirs.shape.tolist()[::-1])


def test_parts_make_one_model(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    assert len(paths) == 3
    model = read_gguf(paths)
    assert model.tensors.keys() == NAMED.keys()
    assert {tensor.path for tensor in model.tensors.values()} == set(paths)
    assert model.metadata.text("general.architecture") == "llama"
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf: is part 2 of 3, not part 1 of 3"):
        read_gguf([paths[1], paths[0], paths[2]])
    with pytest.raises(CheckpointError, match=r"m-00001-of-00003\.gguf: is part 1 of 3, not part 1 of 1"):
        read_gguf(paths[:1])
    paths[2].write_bytes(paths[1].read_bytes().replace(b"split.no", b"split.xx"))
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf: is part 1 of 3"):
        read_gguf(paths)


def write_parts(directory: Path) -> list[Path]:
    writer = gguf.GGUFWriter(directory / "m.gguf", "llama", split_max_tensors=1)
    for name, shape in NAMED.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(directory.glob("m-*.gguf"))


def test_parts_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    second = paths[1].read_bytes()
    first_name, second_name = (name.encode() for name in list(NAMED)[:2])
    renamed = second.replace(
        struct.pack("<Q", len(second_name)) + second_name,
        b"".join([struct.pack("<Q", len(second_name)), first_name.ljust(len(second_name), b"x")]),
    )
    paths[1].write_bytes(renamed)
    read_gguf(paths)  # another name is another tensor
    told = paths[0].read_bytes()
    at = told.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    paths[0].write_bytes(told[:at] + struct.pack("<i", 4) + told[at + 4 :])
    with pytest.raises(CheckpointError, match=r"split\.tensors\.count is 4, and 3 tensors are there"):
        read_gguf(paths)


class Raw:
    """A header byte by byte, so that it can lie."""

    def __init__(self, num_tensors: int = 0, num_keys: int = 0, version: int = 3) -> None:
        self.bytes = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)

    def text(self, text: bytes, length: int | None = None) -> Raw:
        self.bytes += struct.pack("<Q", len(text) if length is None else length) + text
        return self

    def number(self, layout: str, *values: int) -> Raw:
        self.bytes += struct.pack("<" + layout, *values)
        return self

    def tensor(self, name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> Raw:
        return (
            self.text(name).number("I", len(dims)).number("Q" * len(dims), *dims).number("IQ", kind, offset)
        )

    def data(self, size: int) -> Raw:
        self.bytes += bytes(-len(self.bytes) % 32 + size)
        return self


U32, TEXT, ARRAY = 4, 8, 9
LIES: dict[str, tuple[Raw, str]] = {
    "old version": (Raw(version=1), "GGUF version 1 is not supported; there is 2 and 3"),
    "byte order": (Raw(version=3 << 24), "in the byte order of another machine is not supported"),
    "many tensors": (Raw(num_tensors=1 << 40), "announces 1099511627776 tensors and 0 keys"),
    "many keys": (Raw(num_keys=1 << 40), "announces 0 tensors and 1099511627776 keys"),
    "no keys": (Raw(num_keys=2), "the file ends within the name of key 0: it is cut short"),
    "long key": (Raw(num_keys=1).text(b"a", 1 << 62), "the file ends within the name of key 0"),
    "strange key": (Raw(num_keys=1).text(b"a\nb"), r"the name of key 0 cannot be 'a\\nb'"),
    "key in no encoding": (Raw(num_keys=1).text(b"\xff"), "the name of key 0 is not valid UTF-8"),
    "key twice": (
        Raw(num_keys=2).text(b"a").number("II", U32, 1).text(b"a").number("II", U32, 1),
        "a is in its metadata twice",
    ),
    "unknown type": (Raw(num_keys=1).text(b"a").number("I", 99), "a has a value of the unknown type 99"),
    "long text": (Raw(num_keys=1).text(b"a").number("I", TEXT).text(b"", 10), "the file ends within a:"),
    "long list": (
        Raw(num_keys=1).text(b"a").number("IIQ", ARRAY, U32, 1 << 50),
        "a announces 112589",
    ),
    "cut list": (Raw(num_keys=1).text(b"a").number("IIQ", ARRAY, U32, 1000), "the file ends within a:"),
    "list of texts": (Raw(num_keys=1).text(b"a").number("IIQ", ARRAY, TEXT, 9), "the file ends within a:"),
    "list of lists": (
        Raw(num_keys=1).text(b"a").number("IIQ", ARRAY, ARRAY, 1),
        "a has a value",
    ),
    "alignment": (
        Raw(num_keys=1).text(b"general.alignment").number("II", U32, 24),
        "general.alignment must be a power of two from 8 on, not 24",
    ),
    "small alignment": (
        Raw(num_keys=1).text(b"general.alignment").number("II", U32, 1),
        "general.alignment must be a power of two from 8 on, not 1",
    ),
    "no dimensions": (Raw(1).tensor(b"t", ()).data(64), "t cannot have 0 dimensions"),
    "dimensions": (Raw(1).text(b"t").number("I", 1 << 31), "t cannot have 2147483648 dimensions"),
    "format": (Raw(1).tensor(b"t", (8,), kind=4).data(64), "t is stored in the unknown number format 4"),
    "empty": (Raw(1).tensor(b"t", (8, 0)).data(64), r"t of shape \[0, 8\] cannot be F32"),
    "half a block": (
        Raw(1).tensor(b"t", (48,), kind=8).data(64),
        r"t of shape \[48\] cannot be Q8_0, which has blocks of 32",
    ),
    "huge": (Raw(1).tensor(b"t", (1 << 40, 1 << 40)).data(64), "t ends at byte"),
    "outside": (Raw(1).tensor(b"t", (8,), offset=1 << 40).data(64), "t ends at byte"),
    "crooked": (
        Raw(1).tensor(b"t", (8,), offset=4).data(64),
        "t begins at byte 4 of the data, not at a multiple of 32",
    ),
    "cut short": (
        Raw(1).tensor(b"t", (16,)).data(63),
        "t ends at byte .*: it is cut short",
    ),
    "overlap": (Raw(2).tensor(b"t", (16,)).tensor(b"u", (8,), offset=32).data(99), "u overlaps t"),
    "tensor twice": (
        Raw(2).tensor(b"t", (8,)).tensor(b"t", (8,), offset=32).data(99),
        "t is in its header",
    ),
    "nameless": (Raw(1).tensor(b"", (8,)).data(99), "the name of tensor 0 cannot be ''"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named(tmp_path: Path, lie: str) -> None:
    raw, message = LIES[lie]
    path = tmp_path / "a.gguf"
    path.write_bytes(raw.bytes)
    with pytest.raises(CheckpointError, match=rf"a\.gguf: .*{message}"):
        read_gguf([path])


def test_what_is_no_gguf_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for content, message in [(b"", "0 bytes are too few"), (b"PK\x03\x04 zip", "not a GGUF file")]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_gguf([path])
    for place, message in [(tmp_path, "not a file"), (tmp_path / "b.gguf", "not there")]:
        with pytest.raises(CheckpointError, match=message):
            read_gguf([place])


def test_a_header_takes_little_memory_whatever_it_announces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two million empty texts in a file of 16 MB: more than any vocabulary, and within the file."""
    path = tmp_path / "a.gguf"
    raw = Raw(num_keys=1).text(b"a").number("IIQ", ARRAY, TEXT, header.MAX_ARRAY + 1)
    path.write_bytes(raw.data(16 << 20).bytes)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="a announces 2097153 entries"):
        read_gguf([path])
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    monkeypatch.setattr(header, "MAX_HEADER_BYTES", 100)
    path.write_bytes(Raw(num_keys=1).text(b"a").number("I", TEXT).text(bytes(200)).bytes)
    with pytest.raises(CheckpointError, match="a lies beyond the first 100 bytes"):
        read_gguf([path])


SECONDS = 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("whole")
    FAMILIES["mixtral"].write(directory, num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    write_gguf(directory, directory / "a.gguf")
    return (directory / "a.gguf").read_bytes()


@pytest.mark.parametrize("damage", ["flip", "number", "cut"])
def test_damage_is_an_error_of_one_line_or_harmless(whole: bytes, tmp_path: Path, damage: str) -> None:
    first_byte = min(t.data_offset for t in reader_of(whole, tmp_path).tensors)
    rng, until, refused = random.Random(0), time.monotonic() + SECONDS / 3, 0
    for attempt in range(300):
        content = bytearray(whole)
        at = rng.randrange(first_byte)
        if damage == "flip":
            content[at] ^= 1 << rng.randrange(8)
        elif damage == "number":
            content[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 1 << 31, (1 << 32) - 1, 1 << 62]))
        else:
            del content[rng.randrange(len(content)) :]
        refused += not opens(bytes(content), tmp_path / str(attempt))
        if time.monotonic() > until:
            break
    assert refused > attempt / 4


def reader_of(whole: bytes, directory: Path) -> Any:
    (directory / "whole.gguf").write_bytes(whole)
    return gguf.GGUFReader(directory / "whole.gguf")


def opens(content: bytes, directory: Path) -> bool:
    """Whether the whole way from a file to weights works; every error but one of one line is raised."""
    (model := directory / "model").mkdir(parents=True)
    path = directory / "a.gguf"
    path.write_bytes(content)
    try:
        write_model_directory([path], model)
        architecture, config = read_config(model)
        specs = architecture.weight_map(config)
        with open_checkpoint(model, specs) as checkpoint:
            load_weights(checkpoint, specs, architecture.ignored_tensors(config), lambda *_: None)
    except StartupError as error:
        if "\n" in str(error):
            raise
        return False
    return True
