"""The figures of the promises: one line of JSON per measurement, and the README's table made of them.

Knows how a figure is kept and shown; must not know how it is measured. A test calls `record` when its promise
has held; run as a program, this prints the table.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

FILE = Path(__file__).parents[2] / "build" / "reliability.jsonl"
COLUMNS = ("promise", "done", "times", "lost", "figure")
PROMISES = {
    "R1": "No token is lost, doubled or somebody else's",
    "R2": "Bad input is refused, and harms nothing",
    "R3": "Leaving frees everything",
    "R4": "An engine's death is told, and survived",
    "R5": "Nothing outlives its parent",
    "R6": "SIGTERM lets everything end",
    "R7": "Overload is refused, not absorbed",
    "R8": "Preemption does not show",
    "R9": "Memory is flat",
    "R10": "A slow reader harms only itself",
    "R11": "A slow sender harms only itself",
    "R12": "The event loop is never blocked",
    "R14": "The counts add up",
    "R16": "What cannot start says why",
    "R17": "It stays up under all of this at once",
}


def record(promise: str, done: str, times: int | str, lost: int | str, figure: str) -> None:
    """Keep and print what was measured; a later figure for the same promise and deed replaces an earlier one.

    promise: its number, as "R1". done: what was done. times: how often.
    lost: what was lost, 0 for nothing. figure: what was measured, with its unit.
    """
    row = dict(zip(COLUMNS, (promise, done, str(times), str(lost), figure), strict=True))
    FILE.parent.mkdir(exist_ok=True)
    with FILE.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    print(f"\n{promise}: {done} | {times} times | lost: {lost} | {figure}")


def table(lines: list[str]) -> str:
    """The rows as a table in Markdown, in the order of the promises' numbers."""
    rows = {}
    for line in lines:
        row = json.loads(line)
        rows[row["promise"], row["done"]] = row
    ordered = sorted(rows.values(), key=lambda row: (_number(row["promise"]), row["done"]))
    written = [("promise", "what was done", "how often", "lost", "figure"), ("---",) * len(COLUMNS)]
    for row in ordered:
        number, _, variant = row["promise"].partition(" ")
        title = f"{number} {PROMISES[number]}" if number in PROMISES else row["promise"]
        done = f"{row['done']} ({variant})" if variant and number in PROMISES else row["done"]
        written.append((title, done, *(row[name] for name in COLUMNS[2:])))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in written)


def _number(promise: str) -> int:
    found = re.match(r"R(\d+)", promise)
    return int(found[1]) if found else 1000


if __name__ == "__main__":
    print(table(FILE.read_text().splitlines() if FILE.exists() else []))
