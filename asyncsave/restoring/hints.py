"""Hints: what a checkpoint has under another name than the state does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..format.leaf import Leaf
from ..format.names import leaf_names
from ..format.select import names
from ..format.tree import MAX_DEPTH, Node, TensorNode

_MOST_PARTS = 20  # each takes time

_MOST_TRIES = 60
"""So many parts are looked at in all: one may be in itself."""

_MOST_NAMES = 50_000
"""So many of a checkpoint are looked at for each key, and compared for each part."""


def hints(tree: Node, leaves: Sequence[Leaf], absent: Mapping[str, Any]) -> list[str]:
    """Return how to restore parts of a state whose names the checkpoint has elsewhere."""
    saved = _shapes(tree, leaves)
    by_word: dict[str, list[str]] = {}
    for full in saved:
        by_word.setdefault(_last_word(full), []).append(full)
    lines: list[str] = []
    parts = list(absent.items())[:_MOST_PARTS]
    for _ in range(_MOST_TRIES):
        if not parts:
            break
        name, value = parts.pop(0)
        own = _live_shapes(value)
        place, count = _elsewhere(own, saved, by_word)
        if place is not None and place != name and 2 * count >= len(own):
            lines.append(
                f"{name or 'the state itself'}: the checkpoint has {count} of its {len(own)} "
                f"names under {place!r}: use rename={{{place!r}: {name!r}}}, and keys= if nothing "
                "else is wanted"
            )
        elif isinstance(value, dict) and len(lines) + len(parts) < _MOST_PARTS:
            prefix = f"{name}." if name else ""
            inside = [(f"{prefix}{key}", item) for key, item in value.items()]
            parts += [part for part in inside if part[0] not in absent and _live_shapes(part[1])]
    return lines


def _shapes(tree: Node, leaves: Sequence[Leaf]) -> dict[str, Any]:
    """Return the shapes of what is in a saved tree, by fqn; None for plain values."""
    wanted = set(leaf_names(tree))
    return {
        name: leaves[node.i].shape if isinstance(node, TensorNode) else None
        for name, node in names(tree)
        if name in wanted
    }


def _elsewhere(
    own: Mapping[str, Any], saved: Mapping[str, Any], by_word: Mapping[str, Sequence[str]]
) -> tuple[str | None, int]:
    """Return below which name of the checkpoint most of ``own`` are, and how many.

    Args:
        by_word: the names in ``saved``, by their last words.
    """
    best, most = None, 0
    for place in itertools.islice(_places(own, by_word), max(4, _MOST_NAMES // max(1, len(own)))):
        prefix = f"{place}." if place else ""
        count = sum(saved.get(prefix + each, ()) == shape for each, shape in own.items())
        if count > most:
            best, most = place, count
    return best, most


def _places(own: Mapping[str, Any], by_word: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield below which names of the checkpoint some of ``own`` are."""
    keys = list(own)
    tried = set()
    for key in {*keys[:1], *keys[len(keys) // 2 :][:1], *keys[-1:]}:
        end = f".{key}"
        for name in itertools.islice(by_word.get(_last_word(key), ()), _MOST_NAMES):
            place = name[: -len(end)]
            if (name == key or name.endswith(end)) and place not in tried:
                tried.add(place)
                yield place


def _last_word(name: str) -> str:
    return name.rpartition(".")[2]


def _live_shapes(value: Any, above: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return the shapes of what is in a live value, by the names that it has below it.

    Args:
        above: the ids of what it is in: a container may be in itself.
    """
    if id(value) in above or len(above) > MAX_DEPTH:
        return {}
    items: Any = ()
    if isinstance(value, torch.nn.Module):
        items = value.state_dict().items()
    elif isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    found: dict[str, Any] = {}
    for key, item in items:
        if inner := _live_shapes(item, (*above, id(value))):
            found.update((f"{key}.{each}", shape) for each, shape in inner.items())
        else:
            found[str(key)] = list(item.shape) if hasattr(item, "shape") else None
    return found
