"""Names: what a checkpoint has, for those who asked for something else. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ..errors import MismatchError
from .select import OMITTED, names
from .tree import Node, is_leaf

_COMPARED = 10_000

_CHARACTERS = 16 << 20
"""Of names in all: a checkpoint may have a million, or one long key above many."""


def leaf_names(tree: Node) -> list[str]:
    """Return the fqns of the values in a saved tree, as many as can reasonably be shown."""
    if is_leaf(tree):
        return [] if tree is OMITTED else [""]
    found, room = [], _CHARACTERS
    for name, node in names(tree):
        if is_leaf(node) and node is not OMITTED:
            found.append(name)
            room -= len(name)
            if room < 0:
                break
    return found


def some(of: Sequence[str]) -> str:
    """Return a few names, and how many more there are."""
    shown = ", ".join(repr(name) for name in of[:8])
    return shown if len(of) <= 8 else f"{shown} and {len(of) - 8} more"


def close_names(saved: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return a line for each name that is wanted and not there: what it may be."""
    lines = []
    some_saved = [name[:200] for name in saved[:_COMPARED]]
    for key in wanted:
        close = difflib.get_close_matches(key[:200], some_saved, 3, 0.5) or some_saved[:3]
        lines.append(f"{key!r}; there are {', '.join(map(repr, close))} …" if close else repr(key))
    return lines


def refuse_unused(path: object, tree: Node, unused: Sequence[str], argument: str) -> None:
    """Raise MismatchError if there are keys that name nothing; it says what is there instead.

    Args:
        path: the checkpoint's.
        argument: what the keys were passed as.
    """
    if unused:
        raise MismatchError(
            f"{path} has nothing that these {argument} name:",
            close_names(leaf_names(tree), unused),
        )
