"""Packed weights from a checkpoint to logits: kept at the first start, mapped at the next, never believed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from tiny import load_runner, write_mixtral
from toptwo.messages import NewSequence, Row, SamplingParams, StepPlan
from toptwo.runtime import packed_file, weights
from toptwo_kernels import cpu

pytestmark = pytest.mark.skipif(
    not cpu.instruction_sets(), reason="packed weights belong to the native backend"
)

DAMAGED = "the packed weights are damaged and are made anew"
TESTS = Path(__file__).parents[1]


def packed_path(directory: Path, quantization: str = "int8") -> Path:
    return directory / f"toptwo-packed-{quantization}.bin"


def logits(directory: Path, quantization: str = "int8", **options: Any) -> Tensor:
    """Of one prompt, by a runner that loads anew."""
    runner = load_runner(directory, quantization=quantization, **options)
    admitted = [NewSequence(0, list(range(20)), 20, SamplingParams(seed=0), [5, 2])]
    result: Tensor = runner.compute_logits(StepPlan(1, admitted, [Row(0, 0, 20, [], True)]))[0].clone()
    return result


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original")
    write_mixtral(directory)
    return directory


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy that may be written to."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((original / name).read_bytes())
    return tmp_path


def forbid_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Any:
        raise AssertionError("the weights were packed again")

    monkeypatch.setattr(weights, "_pack", refuse)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_second_start_maps_what_the_first_one_wrote(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    path = packed_path(checkpoint, quantization)
    with capture_logs() as logs:
        first = logits(checkpoint, quantization)
        assert path.exists()
        assert str(path) not in Path("/proc/self/maps").read_text()
        forbid_packing(monkeypatch)
        runner = load_runner(checkpoint, quantization=quantization)
        assert str(path) in Path("/proc/self/maps").read_text()
        del runner
        assert torch.equal(logits(checkpoint, quantization), first)
    assert logs == []
    assert {each.name for each in checkpoint.iterdir()} == {"config.json", "model.safetensors", path.name}


def test_formats_have_files_of_their_own(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {name: logits(checkpoint, name) for name in ("int8", "int4")}
    assert not torch.equal(first["int8"], first["int4"])
    forbid_packing(monkeypatch)
    for name, expected in first.items():
        assert torch.equal(logits(checkpoint, name), expected)


def test_without_quantisation_nothing_is_kept(checkpoint: Path) -> None:
    logits(checkpoint, "none")
    assert {each.name for each in checkpoint.iterdir()} == {"config.json", "model.safetensors"}


def flip_tensor(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[packed_file.PAGE + 77] ^= 4
    path.write_bytes(content)


def flip_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2] ^= 1
    path.write_bytes(content)


def set_version(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[24] += 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def change_name(path: Path) -> None:
    """A byte of the table that is valid JSON before and after."""
    content = path.read_bytes()
    assert content.count(b'"layers.1.qkv"') == 1
    path.write_bytes(content.replace(b'"layers.1.qkv"', b'"layers.1.qkw"'))


def change_shape(path: Path) -> None:
    content = path.read_bytes()
    assert content.count(b'"rows":320') == 2
    path.write_bytes(content.replace(b'"rows":320', b'"rows":328'))


DAMAGES = [flip_tensor, flip_header, set_version, truncate, empty, change_name, change_shape]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_leads_to_a_new_file_and_the_same_logits(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    path = packed_path(checkpoint)
    first = logits(checkpoint)
    before = path.read_bytes()
    damage(path)
    assert path.read_bytes() != before
    with capture_logs() as logs:
        assert torch.equal(logits(checkpoint), first)
    assert [entry["event"] for entry in logs] == [DAMAGED]
    assert logs[0]["path"] == str(path)
    assert path.read_bytes() == before
    forbid_packing(monkeypatch)
    assert torch.equal(logits(checkpoint), first)


def test_a_file_under_another_formats_name_is_not_taken_for_it(checkpoint: Path) -> None:
    first = logits(checkpoint, "int4")
    logits(checkpoint, "int8")
    packed_path(checkpoint, "int8").replace(packed_path(checkpoint, "int4"))
    assert torch.equal(logits(checkpoint, "int4"), first)


def test_another_checkpoint_is_packed_anew(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = logits(checkpoint)
    write_mixtral(checkpoint, seed=1)
    other = tmp_path_factory.mktemp("other")
    write_mixtral(other, seed=1)
    expected = logits(other)
    assert not torch.equal(before, expected)
    assert torch.equal(logits(checkpoint), expected)


def test_a_touched_checkpoint_is_packed_anew(checkpoint: Path) -> None:
    """Its size is the same and nobody reads all of it to know whether its content is."""
    first = logits(checkpoint)
    before = packed_path(checkpoint).stat().st_mtime_ns
    weight_file = checkpoint / "model.safetensors"
    os.utime(weight_file, ns=(weight_file.stat().st_atime_ns, weight_file.stat().st_mtime_ns + 1))
    assert torch.equal(logits(checkpoint), first)
    assert packed_path(checkpoint).stat().st_mtime_ns > before


def test_where_nothing_may_be_written_the_cache_directory_is_used(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    # Not by permissions, which mean nothing to root.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != checkpoint)
    first = logits(checkpoint, cache_dir=cache)
    (path,) = cache.rglob("*.bin")
    assert path.name == packed_path(checkpoint).name
    assert not packed_path(checkpoint).exists()
    forbid_packing(monkeypatch)
    assert torch.equal(logits(checkpoint, cache_dir=cache), first)


def test_two_checkpoints_do_not_share_a_cached_file(
    original: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for directory in (original, checkpoint, original):
        logits(directory, cache_dir=cache)
    assert len(list(cache.rglob("*.bin"))) == 2


def test_a_full_disk_costs_nothing_but_the_file(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(checkpoint)
    packed_path(checkpoint).unlink()
    append, calls = packed_file._append, 0

    def fill_up(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return append(*arguments)

    monkeypatch.setattr(packed_file, "_append", fill_up)
    with capture_logs() as logs:
        assert torch.equal(logits(checkpoint), expected)
    assert [entry["event"] for entry in logs] == ["packed weights are not kept; every start will pack anew"]
    assert {each.name for each in checkpoint.iterdir()} == {"config.json", "model.safetensors"}
    monkeypatch.undo()
    assert torch.equal(logits(checkpoint), expected)
    assert packed_path(checkpoint).exists()


# --- Memory ---------------------------------------------------------------------------------------

MIB = 1 << 20
MEASURE = """
import json, sys
from pathlib import Path
import torch
from tiny import load_runner
import toptwo.runtime.build

def status(name):
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = status("VmHWM"), status("RssAnon")
runner = load_runner(Path(sys.argv[1]), quantization=sys.argv[2], max_model_len=64, num_blocks=8)
peak, anonymous = status("VmHWM"), status("RssAnon")
print(json.dumps([before[0], peak, anonymous - before[1]]))
"""


def test_loading_holds_the_packed_weights_and_one_tensor(tmp_path: Path) -> None:
    """A checkpoint of 200 MiB: its pages, and what was made of them, are let go as soon as they are done."""
    directory, quantization = tmp_path, "int8"
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_local_experts": 8}
    write_mixtral(directory, **shape)
    largest_tensor = 8 * 2 * 1024 * 512 * 4
    assert (directory / "model.safetensors").stat().st_size > 200 * MIB

    def measure() -> tuple[int, int, int]:
        command = [sys.executable, "-c", MEASURE, str(directory), quantization]
        environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=True, env=environment
        )
        start, peak, anonymous = json.loads(ended.stdout)
        return start, peak, anonymous

    start, peak, anonymous = measure()
    packed = packed_path(directory, quantization).stat().st_size
    assert packed < 60 * MIB
    assert peak <= packed + largest_tensor + 300 * MIB
    assert peak - start <= packed + largest_tensor + 48 * MIB
    assert anonymous <= packed + 48 * MIB
    start, peak, anonymous = measure()
    assert peak - start <= packed + 48 * MIB
    assert anonymous <= 32 * MIB  # the weights are pages of the file, which the system may take back
