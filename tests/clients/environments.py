"""One small environment per client, made once: a virtual environment, or node_modules.

Knows how packages are installed; must not know the server or what is checked.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CLIENTS = Path(__file__).parent
BUILD = CLIENTS.parents[1] / "build" / "clients"
INSTALL_SECONDS = 420


class InstallError(Exception):
    """An environment could not be made; the message says why in one line."""


@dataclass(frozen=True)
class Client:
    """A client: the folder of its checks, and the package whose version is shown."""

    name: str
    package: str
    seconds: int = 240

    @property
    def source(self) -> Path:
        """Folder of the checks."""
        return CLIENTS / self.name

    @property
    def home(self) -> Path:
        """Folder of the environment and of what a run leaves behind."""
        return BUILD / self.name

    @property
    def on_node(self) -> bool:
        """Whether it runs on Node and not on Python."""
        return (self.source / "package.json").exists()

    @property
    def python(self) -> Path:
        """The interpreter of its virtual environment."""
        return self.home / "venv" / "bin" / "python"

    @property
    def version(self) -> str:
        """The pinned version of its package."""
        if self.on_node:
            return str(json.loads((self.source / "package.json").read_text())["dependencies"][self.package])
        for line in (self.source / "requirements.txt").read_text().splitlines():
            name, _, version = line.partition("==")
            if name.lower().replace("_", "-") == self.package:
                return version
        raise KeyError(self.package)


def is_installed(client: Client) -> bool:
    """Whether its environment was made of the present pins by the present interpreter."""
    stamp = _stamp(client)
    return stamp.exists() and stamp.read_text() == _fingerprint(client)


def install(client: Client, environment: Mapping[str, str]) -> None:
    """Make the client's environment anew. Raises InstallError."""
    shutil.rmtree(client.home, ignore_errors=True)
    client.home.mkdir(parents=True)
    (_install_on_node if client.on_node else _install_on_python)(client, environment)
    _stamp(client).write_text(_fingerprint(client))


def _stamp(client: Client) -> Path:
    return client.home / "stamp"


def _fingerprint(client: Client) -> str:
    pins = client.source / ("package-lock.json" if client.on_node else "requirements.txt")
    return hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()


def _install_on_python(client: Client, environment: Mapping[str, str]) -> None:
    pip = [str(client.python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    _run(client, [sys.executable, "-m", "venv", str(client.home / "venv")], environment)
    # The pins are complete, so nothing is resolved: that is quick, and nothing unforeseen is pulled in.
    _run(client, [*pip, "--no-deps", "--requirement", str(client.source / "requirements.txt")], environment)
    _run(client, [*pip[:-2], "check"], environment)


def _install_on_node(client: Client, environment: Mapping[str, str]) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise InstallError("npm is not on this machine")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(client.source / name, client.home)
    _run(client, [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"], environment)


def _run(client: Client, command: list[str], environment: Mapping[str, str]) -> None:
    log = client.home / "install.txt"
    with log.open("ab") as output:
        try:
            done = subprocess.run(
                command,
                cwd=client.home,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=INSTALL_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise InstallError(f"no end within {INSTALL_SECONDS} s") from None
    if done.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise InstallError(f"{lines[-1][:200]} ({log})")
