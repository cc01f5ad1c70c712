"""The matrix exercise × mistake: which check rejects which wrong solution, and is it named?

    sum_to                       added  stretched  both  untouched  …
    averaged                     ✗*     ✗          ✗     ·             named
    einsum (alternative)         ·      ·          ·     ·             accepted

`*` marks the check that is meant for the mistake.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmcourse.grading.bank import Entry, examine, faults
from llmcourse.labs.catalog import LABS, Lab, find_lab
from llmcourse.notebook import Table


def command(names: Sequence[str], seed: int = 0) -> int:
    """Print the matrix of the labs called `names` (all by default); status 1 if a grader has a fault."""
    labs = [find_lab(name) for name in names] or list(LABS)
    wrong: list[str] = []
    for lab in labs:
        entries = {e.name: examine(e, seed) for e in lab.exercises}
        for name, found in entries.items():
            print(matrix(name, lab.exercise(name).check_names(), found), end="\n\n")
        everything = [entry for found in entries.values() for entry in found]
        wrong += faults(everything)
        print(summary(lab, everything))
    for fault in wrong:
        print(f"✗ {fault}")
    return 1 if wrong else 0


def matrix(name: str, checks: Sequence[str], entries: Sequence[Entry]) -> Table:
    """One exercise's bank: a row for each solution, a column for each check."""
    rows = [
        [
            entry.name if entry.kind == "mistake" else f"{entry.name} ({entry.kind})",
            *(_mark(entry, check) for check in checks),
            "; ".join(entry.faults) or ("named" if entry.kind == "mistake" else "accepted"),
        ]
        for entry in entries
    ]
    return Table([name, *checks, "verdict"], rows)


def summary(lab: Lab, entries: Sequence[Entry]) -> str:
    mistakes = [e for e in entries if e.kind == "mistake"]
    others = [e for e in entries if e.kind != "mistake"]
    rejected = sum(bool(e.failing) for e in mistakes)
    named = sum(e.named == e.name for e in mistakes)
    accepted = sum(not e.failing for e in others)
    return (
        f"{lab.name}: {rejected} of {len(mistakes)} mistakes rejected, {named} named; "
        f"{accepted} of {len(others)} alternatives accepted; slowest verdict "
        f"{max((e.seconds for e in entries), default=0.0):.2f} s"
    )


def _mark(entry: Entry, check: str) -> str:
    if check not in entry.failing:
        return "·"
    return "✗*" if check == entry.meant else "✗"
