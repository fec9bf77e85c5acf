"""What a client's run said, read from its JUnit file, and the table of all of them.

Knows counts and names; must not know clients or servers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table


@dataclass
class Outcome:
    """What became of one client.

    failures, skips: "name: reason". trouble: why there is no complete run, if there is none.
    """

    client: str
    version: str
    passed: int = 0
    failures: list[str] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)
    seconds: float = 0.0
    trouble: str = ""

    @property
    def good(self) -> bool:
        """Whether everything that ran passed, and something did."""
        return not self.failures and not self.trouble and self.passed > 0


def read_junit(path: Path, outcome: Outcome) -> None:
    """Count the test cases of the file into `outcome`. Raises OSError, ElementTree.ParseError."""
    for case in ElementTree.parse(path).iter("testcase"):  # written by a child of ours
        place = case.get("classname", "").rpartition(".")[2].removeprefix("check_")
        name = f"{place} {case.get('name', '?')}"
        bad = [*case.findall("failure"), *case.findall("error")]
        skipped = case.find("skipped")
        if bad:
            outcome.failures.append(f"{name}: {_first_line(bad[0])}")
        elif skipped is not None:
            outcome.skips.append(f"{name}: {_first_line(skipped)}")
        else:
            outcome.passed += 1


def print_details(console: Console, outcome: Outcome) -> None:
    """The names and reasons behind the numbers."""
    if outcome.trouble:
        console.print(f"  {outcome.trouble}", style="red", markup=False, highlight=False, soft_wrap=True)
    for line in outcome.failures:
        console.print(f"  failed  {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    for line in outcome.skips:
        console.print(f"  skipped {line}", style="dim", markup=False, highlight=False, soft_wrap=True)
    counts = f"{outcome.passed} passed, {len(outcome.failures)} failed, {len(outcome.skips)} skipped"
    console.print(f"  {counts}, {outcome.seconds:.0f} s", highlight=False)


def print_table(console: Console, outcomes: list[Outcome]) -> None:
    """One row per client."""
    table = Table("client", "version")
    for name in ("passed", "failed", "skipped", "seconds"):
        table.add_column(name, justify="right")
    for outcome in outcomes:
        counts = [outcome.passed, len(outcome.failures), len(outcome.skips), round(outcome.seconds)]
        style = "" if outcome.good else "red"
        table.add_row(outcome.client, outcome.version, *map(str, counts), style=style)
        if outcome.trouble:
            table.add_row("", outcome.trouble.splitlines()[0], style=style)
    console.print(table)


def _first_line(element: ElementTree.Element) -> str:
    text = (element.get("message") or element.text or "").strip()
    return text.splitlines()[0][:300] if text else "no message"
