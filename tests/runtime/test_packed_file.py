"""The file of packed weights: what is read is what was written, or nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from toptwo.runtime import packed_file
from toptwo.runtime.packed_file import HEADER, PAGE, PackedWriter, read_packed
from toptwo_kernels import cpu
from toptwo_kernels.ops import Matrix

FINGERPRINT = "0123456789abcdef" * 4
WEIGHTS: dict[str, Matrix | Tensor] = {}


@pytest.fixture(scope="module", autouse=True)
def weights() -> None:
    ops, generator = cpu.create(1, "scalar"), torch.Generator().manual_seed(0)
    WEIGHTS.update(
        embed=ops.pack(torch.randn(30, 40, generator=generator), "int8"),
        gate_up=ops.pack(torch.randn(3, 10, 40, generator=generator), "int4", paired=True),
        router=ops.pack(torch.randn(3, 40, generator=generator), "float32"),
        norm=torch.randn(40, generator=generator),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some" / "packed.bin"


def write(path: Path, fingerprint: str = FINGERPRINT) -> None:
    with PackedWriter(path, fingerprint) as writer:
        for name, weight in WEIGHTS.items():
            writer.add(name, weight)
        writer.finish()


def warnings(logs: Any) -> list[str]:
    return [entry["event"] for entry in logs if entry["log_level"] == "warning"]


def check_whole(path: Path) -> None:
    got = read_packed(path, FINGERPRINT)
    assert got
    assert {*got.matrices, *got.vectors} == {*WEIGHTS}
    for name, weight in WEIGHTS.items():
        if isinstance(weight, Tensor):
            assert torch.equal(got.vectors[name], weight)
        else:
            same = got.matrices[name]
            assert torch.equal(same.data, weight.data)
            assert (same.format, same.num_matrices, same.rows, same.cols, same.paired) == (
                weight.format,
                weight.num_matrices,
                weight.rows,
                weight.cols,
                weight.paired,
            )
            assert same.data.data_ptr() % PAGE == 0


def test_what_was_written_is_read_and_mapped(path: Path) -> None:
    write(path)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    with capture_logs() as logs:
        check_whole(path)
    assert logs == []
    got = read_packed(path, FINGERPRINT)
    assert got
    assert str(path) in Path("/proc/self/maps").read_text()
    got.matrices["embed"].data.fill_(7)  # private to this process
    check_whole(path)


def test_no_file_or_another_checkpoints_is_none_and_no_reason_for_a_warning(path: Path) -> None:
    with capture_logs() as logs:
        assert read_packed(path, FINGERPRINT) is None
        write(path)
        assert read_packed(path, FINGERPRINT[::-1]) is None
    assert logs == []


def places(path: Path) -> Iterator[tuple[str, int]]:
    """Where a byte may change: every one of the header and the table, some of every weight."""
    content = path.read_bytes()
    offset, size = HEADER.unpack_from(content)[3:5]
    yield from (("header", at) for at in range(HEADER.size))
    yield from (("table", at) for at in range(offset, offset + size))
    for entry in msgspec.json.decode(content[offset : offset + size], type=packed_file.Table).entries:
        begin, end = entry.offset, entry.offset + entry.size
        yield from ((entry.name, at) for at in (begin, begin + 1, (begin + end) // 2, end - 9, end - 1))


@pytest.mark.parametrize("flip", [0x01, 0x10, 0xFF])
@pytest.mark.parametrize("part", ["header", "table", "embed", "gate_up", "router", "norm"])
def test_a_changed_byte_is_found(path: Path, part: str, flip: int) -> None:
    write(path)
    content = bytearray(path.read_bytes())
    chosen = [at for name, at in places(path) if name == part]
    assert len(chosen) >= 5
    for at in chosen:
        content[at] ^= flip
        path.write_bytes(content)
        with capture_logs() as logs:
            assert read_packed(path, FINGERPRINT) is None, (
                f"byte {at}: {bytes(content[max(0, at - 20) : at + 9])!r}"
            )
        assert [entry["event"] for entry in logs] == ["the packed weights are damaged and are made anew"] or (
            part == "table"  # its fingerprint may have become that of another checkpoint
        )
        content[at] ^= flip
    path.write_bytes(content)
    check_whole(path)


def test_a_file_of_another_length_is_found(path: Path) -> None:
    write(path)
    content = path.read_bytes()
    for length in (
        0,
        1,
        HEADER.size - 1,
        HEADER.size,
        PAGE,
        len(content) // 2,
        len(content) - 1,
        len(content) + 1,
    ):
        path.write_bytes((content + b"}")[:length])
        with capture_logs() as logs:
            assert read_packed(path, FINGERPRINT) is None
        assert warnings(logs) == ["the packed weights are damaged and are made anew"]


def test_another_version_is_made_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(packed_file, "VERSION", packed_file.VERSION + 1)
        write(path)
    with capture_logs() as logs:
        assert read_packed(path, FINGERPRINT) is None
    (entry,) = logs
    assert f"version {packed_file.VERSION + 1}, expected {packed_file.VERSION}" in entry["reason"]
    assert entry["path"] == str(path)


def test_a_directory_in_its_place_costs_the_file_only(path: Path) -> None:
    (path / "x").mkdir(parents=True)
    with capture_logs() as logs:
        assert read_packed(path, FINGERPRINT) is None
        write(path)
    assert len(warnings(logs)) == 2
    assert [each.name for each in path.parent.iterdir()] == [path.name]


# --- Writing that fails ---------------------------------------------------------------------------


def fail(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing", ["mkdir", "open", "_append", "fsync", "replace"])
def test_a_full_disk_costs_the_file_only(path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    where: Any = packed_file if failing == "_append" else os if failing == "fsync" else Path
    if failing != "mkdir":
        path.parent.mkdir()
    monkeypatch.setattr(where, failing, fail)
    with capture_logs() as logs:
        write(path)
    monkeypatch.undo()
    (entry,) = logs  # once, not for every weight
    assert entry["event"] == "packed weights are not kept; every start will pack anew"
    assert "No space left on device" in entry["reason"]
    assert not path.parent.exists() or not list(path.parent.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_really_full_disk_costs_the_file_only(path: Path) -> None:
    """Not only a write fails then: closing the file tries once more to write what is left of it."""
    path.parent.mkdir()
    path.with_name(f"{path.name}.tmp-{os.getpid()}").symlink_to("/dev/full")
    with capture_logs() as logs:
        write(path)
    assert warnings(logs) == ["packed weights are not kept; every start will pack anew"]
    assert not list(path.parent.iterdir())


def test_what_could_not_be_finished_leaves_nothing(path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), PackedWriter(path, FINGERPRINT) as writer:  # noqa: PT012
        writer.add("embed", WEIGHTS["embed"])
        assert list(path.parent.iterdir())
        raise KeyboardInterrupt
    assert not list(path.parent.iterdir())


def test_the_old_file_stays_until_the_new_one_is_complete(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", fail)
    with capture_logs():
        write(path, FINGERPRINT[::-1])
    assert path.read_bytes() == before


def test_unfinished_files_of_the_dead_are_removed(path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path.parent.mkdir()
    dead, alive, stranger = (
        path.with_name(name)
        for name in (
            f"{path.name}.tmp-{ended.pid}",
            f"{path.name}.tmp-{os.getppid()}",
            f"other.tmp-{ended.pid}",
        )
    )
    for each in (dead, alive, stranger):
        each.touch()
    write(path)
    assert {*path.parent.iterdir()} == {path, alive, stranger}
