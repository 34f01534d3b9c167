"""Counts: what one run of the tests has tried in all; pytest prints the sums at its end."""

from __future__ import annotations

from collections import Counter

WORDS = {
    "faults": "faults tried",
    "images": "crash images checked",
    "kills": "kills survived",
    "flips": "bytes flipped",
    "interrupts": "interrupts survived",
    "hostile": "hostile files refused",
}

_totals: Counter[str] = Counter()


def add(what: str, count: int = 1) -> None:
    """Note that so many were tried; ``what`` is one of `WORDS`."""
    assert what in WORDS, what
    _totals[what] += count


def totals() -> dict[str, int]:
    """Return all sums, to be added to those of another process."""
    return dict(_totals)


def summary() -> str:
    """Return all sums in one line; empty if nothing was counted."""
    return ", ".join(f"{WORDS[what]}: {_totals[what]:,}" for what in WORDS if _totals[what])
