"""What is installed with a server: every package named, with hashes, and none that an advisory is about."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPENDENCIES = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
EXTRAS = PROJECT["project"]["optional-dependencies"]
LOCKS = ("requirements.lock", "requirements-cuda.lock", "requirements-build.lock")
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def entries(name: str) -> list[str]:
    """A lock's entries, each a requirement and its hashes in one line."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def locked(name: str) -> dict[str, Requirement]:
    """The packages of a lock by their names."""
    found = [Requirement(entry.partition(" --hash=")[0]) for entry in entries(name)]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def version(requirement: Requirement) -> Version:
    (pin,) = requirement.specifier
    assert pin.operator == "==", requirement
    return Version(pin.version)


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_has_one_version_and_hashes(name: str) -> None:
    """LiteLLM 1.82.7 and 1.82.8, PyTorch Lightning 2.6.2: releases that somebody else had put there."""
    assert len(locked(name)) == len(entries(name)) > 5
    for entry in entries(name):
        requirement, *hashes = entry.split(" --hash=")
        assert version(Requirement(requirement))
        assert hashes
        assert all(HASH.fullmatch(f"--hash={each.strip()}") for each in hashes), entry


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_says_where_nothing_comes_from(name: str) -> None:
    """Where packages are to be had is the business of who installs them."""
    text = (ROOT / name).read_text()
    assert not re.search(r"https?:|file:|@|--(?:extra-)?index|--find-links|--trusted", text)


@pytest.mark.parametrize("name", LOCKS[:2])
@pytest.mark.parametrize("wanted", [*DEPENDENCIES, *map(Requirement, EXTRAS["hub"])], ids=str)
def test_what_a_server_needs_is_locked(name: str, wanted: Requirement) -> None:
    requirement = locked(name)[canonicalize_name(wanted.name)]
    assert wanted.specifier.contains(version(requirement))


def needs(name: str) -> set[str]:
    """What an installed package says it needs here."""
    environment = {key: str(value) for key, value in default_environment().items()} | {"extra": ""}
    wanted = [Requirement(text) for text in metadata.requires(name) or []]
    return {canonicalize_name(r.name) for r in wanted if r.marker is None or r.marker.evaluate(environment)}


@pytest.mark.parametrize("name", LOCKS[:2])
def test_nothing_is_missing(name: str) -> None:
    """`pip install --require-hashes` refuses a list that leaves anything to be found."""
    lock = locked(name)
    here = [each for each, r in lock.items() if r.marker is None or r.marker.evaluate()]
    for each in here:
        if find_spec(each.replace("-", "_")) or not each.startswith(("cuda-", "nvidia-", "triton")):
            assert needs(each) <= set(lock), each


def test_the_locks_hold_what_was_tested() -> None:
    """The same versions as constraints.txt, by which the tests are installed."""
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    tested = {canonicalize_name(pin.name): version(pin) for pin in pins}
    for name in LOCKS:
        for each, requirement in locked(name).items():
            if each in tested:
                assert version(requirement).public == tested[each].public, each
    cpu, cuda = (set(locked(name)) for name in LOCKS[:2])
    assert {each.partition("-")[0] for each in cuda - cpu} == {"cuda", "nvidia", "triton"}
    assert cpu < cuda


def test_the_build_is_locked_too() -> None:
    lock = locked("requirements-build.lock")
    for text in PROJECT["build-system"]["requires"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(version(lock[canonicalize_name(wanted.name)]))
    assert {"cmake", "ninja"} <= set(lock)


def test_the_image_is_made_of_locks() -> None:
    """Every package that pip fetches for the image is named by a lock, and what is built there needs none."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    commands = [c for c in re.split(r"\n|&& (?=\S*pip )", text) if re.search(r"\bpip (?:install|wheel)", c)]
    assert len(commands) == 4
    for command in commands:
        assert "--require-hashes" in command or ("--no-index" in command and "--no-deps" in command), command
    assert set(LOCKS) == set(re.findall(r"requirements[\w-]*\.lock", " ".join(commands)))


FLOORS = {
    "starlette": ("1.0.1", "CVE-2026-48710, CVE-2025-62727, CVE-2024-47874"),
    "transformers": ("5.3", "CVE-2026-4372, CVE-2026-1839, CVE-2026-5241"),
    "torch": ("2.10", "CVE-2026-24747, CVE-2025-32434"),
    "jinja2": ("3.1.6", "CVE-2025-27516, CVE-2024-56326"),
    "h11": ("0.16", "CVE-2025-43859"),
}


@pytest.mark.parametrize("name", FLOORS)
def test_versions_are_past_the_advisories(name: str) -> None:
    """Installed here, locked, and, where we ask for it ourselves, by whatever pip may choose."""
    floor, _ = FLOORS[name]
    assert Version(metadata.version(name)) >= Version(floor)
    if name != "transformers":
        assert version(locked("requirements.lock")[name]) >= Version(floor)
    asked = [*DEPENDENCIES, *map(Requirement, EXTRAS["test"])]
    for wanted in [each for each in asked if canonicalize_name(each.name) == name]:
        lowest = min(Version(s.version) for s in wanted.specifier if s.operator == ">=")
        assert lowest >= Version(floor), wanted


ABSENT = {
    "python-multipart": "CVE-2026-42561, CVE-2026-53540, CVE-2024-53981, CVE-2024-24762",
    "multipart": "the same, by its older name",
    "litellm": "releases 1.82.7 and 1.82.8, CVE-2026-42208",
    "pytorch-lightning": "releases 2.6.2 and 2.6.3",
    "lightning": "the same",
    "ray": "CVE-2023-48022",
    "vllm": "CVE-2025-25183 and many more",
    "xgrammar": "advisories about nested schemas",
    "outlines": "its cache on disk, CVE-2025-29770",
    "aiohttp": "nothing here needs it",
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_installed_cannot_be_attacked(name: str) -> None:
    for lock in LOCKS:
        assert name not in locked(lock)
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version(name)


def test_transformers_is_for_tests_alone() -> None:
    """A server reads configs itself; what reads them for the tests' references does not come with it."""
    for lock in LOCKS:
        assert "transformers" not in locked(lock)
    assert "transformers" not in [canonicalize_name(each.name) for each in DEPENDENCIES]
