"""Writes the files that name every package of an installation, its version and the hashes of its files.

`make lock` runs it. uv resolves, because it reads the index alone: what it finds depends neither on this
machine's settings, nor on its platform, nor on which builds lie on its disk. Versions come from
constraints.txt, so that a lock holds what the tests have run with.

requirements.lock        a server with torch's build for CPUs (Linux, x86-64, Python 3.11)
requirements-cuda.lock   a server with the index's build of torch, which wants several GB of CUDA on Linux
requirements-build.lock  what builds the native backend
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADER = "# Made by `make lock`; do not edit.\n"
EXTRAS = ("hub", "postgresql", "sign-in")  # what an image has beside a plain installation
CUDA = ("cuda-", "nvidia-", "triton")

# torch's builds for CPUs, which are not in the index: pip must be shown a place that has them.
TORCH_FOR_CPUS = {"2.13.0": "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"}


def resolve(requirements: str, *arguments: str) -> list[str]:
    """An entry per package, hashes included, in the order of their names."""
    command = [sys.executable, "-m", "uv", "pip", "compile", requirements, *arguments]
    command += ["--constraint", "constraints.txt", "--generate-hashes", "--universal"]
    command += ["--python-version", "3.11", "--no-header", "--no-annotate", "--quiet", "--no-config"]
    # Given on standard input where the requirements are "-".
    asked = "\n".join(build_requirements())
    done = subprocess.run(command, cwd=ROOT, input=asked, stdout=subprocess.PIPE, text=True, check=True)
    return [entry + "\n" for entry in re.split(r"\n(?=\S)", done.stdout.strip())]


def build_requirements() -> list[str]:
    """What the native backend is built with; cmake and ninja where a machine has none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [*project["build-system"]["requires"], "cmake", "ninja"]


def for_cpus(entries: list[str]) -> list[str]:
    """The same packages with torch's build for CPUs, which needs no CUDA."""
    torch = next(entry for entry in entries if entry.startswith("torch=="))
    version = torch.removeprefix("torch==").split()[0]
    if version not in TORCH_FOR_CPUS:
        sys.exit(f"lock: add the hash of torch {version}'s build for CPUs to {Path(__file__).name}")
    build = f"torch=={version}+cpu \\\n    --hash=sha256:{TORCH_FOR_CPUS[version]}\n"
    return [build if entry is torch else entry for entry in entries if not entry.startswith(CUDA)]


def write(name: str, entries: list[str]) -> None:
    (ROOT / name).write_text(HEADER + "".join(entries))


def main() -> None:
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    entries = resolve("pyproject.toml", *extras)
    write("requirements.lock", for_cpus(entries))
    write("requirements-cuda.lock", entries)
    write("requirements-build.lock", resolve("-"))


if __name__ == "__main__":
    main()
