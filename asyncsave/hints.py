"""Hints: what a checkpoint has under another name than the state does."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .state.nodes import CONTAINERS, Node
from .state.select import OMITTED, names

_FIRST = 20  # each takes time
_COMPARED = 10_000
_CHARACTERS = 16 << 20
"""Of names in all: a checkpoint may have a million, or one long key above many."""


def leaf_names(tree: Node) -> list[str]:
    """Return the fqns of the values in a saved tree, as many as can reasonably be shown."""
    if not isinstance(tree, CONTAINERS):
        return [] if tree is OMITTED else [""]
    found, room = [], _CHARACTERS
    for name, node in names(tree):
        if not isinstance(node, CONTAINERS) and node is not OMITTED:
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


def hints(saved: Sequence[str], absent: Mapping[str, Any]) -> list[str]:
    """Return how to restore parts of a state whose names the checkpoint has elsewhere."""
    there = set(saved)
    lines = []
    for name, value in list(absent.items())[:_FIRST]:
        own = _live_names(value)
        place, count = _elsewhere(own, saved, there)
        if place is not None and place != name and 2 * count >= len(own):
            lines.append(
                f"{name or 'the state itself'}: the checkpoint has {count} of its {len(own)} "
                f"names under {place!r}: use rename={{{place!r}: {name!r}}}, and keys= if nothing "
                "else is wanted"
            )
    return lines


def _elsewhere(own: Sequence[str], saved: Sequence[str], there: set[str]) -> tuple[str | None, int]:
    """Return under which name of the checkpoint most of ``own`` are, and how many."""
    best, most = None, 0
    for key in {*own[:1], *own[len(own) // 2 : len(own) // 2 + 1], *own[-1:]}:
        for name in saved:
            if name == key or name.endswith(f".{key}"):
                place = name[: -len(key) - 1]
                count = sum((f"{place}.{each}" if place else each) in there for each in own)
                if count > most or (count == most and best is not None and place < best):
                    best, most = place, count
    return best, most


def _live_names(value: Any) -> list[str]:
    """Return the names of what is in a live value, as they are below it."""
    if isinstance(value, torch.nn.Module):
        state = value.state_dict()
        return [key for key in state if isinstance(key, str)]
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    found = []
    for key, item in items:
        inner = _live_names(item)
        found += [f"{key}.{each}" for each in inner] if inner else [str(key)]
    return found
