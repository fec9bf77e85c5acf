"""SECURITY.md and these tests speak of the same: every advisory has its test, and every test its row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TEXT = (HERE.parents[1] / "SECURITY.md").read_text()
FILES = sorted(path for path in HERE.glob("test_*.py") if path != Path(__file__))
TESTS = {name for path in FILES for name in re.findall(r"def (test_\w+)", path.read_text())}
CVE = re.compile(r"CVE-\d{4}-\d+")


def sections() -> dict[str, str]:
    """The text under each heading of the third level."""
    parts = re.split(r"^### ", TEXT, flags=re.M)[1:]
    return {part.partition("\n")[0]: part for part in parts}


def test_every_named_test_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    assert len(named) > 35
    assert named <= TESTS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_linked(path: Path) -> None:
    assert f"](tests/security/{path.name})" in TEXT


def test_every_advisory_of_a_test_is_in_the_table() -> None:
    """By its number, in the test's name or in its words."""
    told = set(CVE.findall(TEXT))
    tested = {found for path in FILES for found in CVE.findall(path.read_text())}
    tested |= {
        f"CVE-{year}-{number}" for name in TESTS for year, number in re.findall(r"cve_(\d{4})_(\d+)", name)
    }
    assert tested <= told


def test_every_row_names_its_test() -> None:
    """A row's test is named after its advisory, or has the advisory's number in its own text."""
    for heading, text in sections().items():
        if heading == "What cannot apply":
            continue
        for row in re.findall(r"^\| (?!advisory|---)(.+) \|$", text, re.M):
            tests = re.findall(r"`(test_\w+)`", row)
            assert tests, row
            (path,) = [p for p in FILES if p.name in heading]
            words = path.read_text() + (HERE / "test_sources.py").read_text()
            for number in CVE.findall(row):
                assert number.lower().replace("-", "_") in " ".join(tests) or number in words, number


def test_what_cannot_apply_is_not_tested() -> None:
    numbers = set(CVE.findall(sections()["What cannot apply"]))
    assert not [n for n in numbers if n.lower().replace("-", "_") in " ".join(TESTS)]
