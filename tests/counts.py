"""Counts: how much the tests have tried, added up over a session and shown at its end."""

from __future__ import annotations

import collections

_totals: collections.Counter[str] = collections.Counter()


def add(what: str, n: int = 1) -> None:
    """Count ``n`` more of ``what``."""
    _totals[what] += n


def line() -> str:
    """Return all counts in one line; empty if nothing was counted."""
    return ", ".join(f"{n} {what}" for what, n in sorted(_totals.items()))
