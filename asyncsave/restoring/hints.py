"""Hints: what a checkpoint has under another name than the state does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..format.leaf import Leaf
from ..format.names import leaf_names
from ..format.select import names
from ..format.tree import Node, TensorNode

_MOST_PARTS = 20  # each takes time


def hints(tree: Node, leaves: Sequence[Leaf], absent: Mapping[str, Any]) -> list[str]:
    """Return how to restore parts of a state whose names the checkpoint has elsewhere."""
    saved = _shapes(tree, leaves)
    lines: list[str] = []
    parts = list(absent.items())[:_MOST_PARTS]
    while parts:
        name, value = parts.pop(0)
        own = _live_shapes(value)
        place, count = _elsewhere(own, saved)
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


def _elsewhere(own: Mapping[str, Any], saved: Mapping[str, Any]) -> tuple[str | None, int]:
    """Return below which name of the checkpoint most of ``own`` are, and how many."""
    best, most = None, 0
    keys = list(own)
    tried = set()
    for key in {*keys[:1], *keys[len(keys) // 2 :][:1], *keys[-1:]}:
        for name in saved:
            place = name[: -len(key) - 1]
            if (name != key and not name.endswith(f".{key}")) or place in tried:
                continue
            tried.add(place)
            prefix = f"{place}." if place else ""
            count = sum(saved.get(prefix + each, ()) == shape for each, shape in own.items())
            if count > most:
                best, most = place, count
    return best, most


def _live_shapes(value: Any) -> dict[str, Any]:
    """Return the shapes of what is in a live value, by the names that it has below it."""
    items: Any = ()
    if isinstance(value, torch.nn.Module):
        items = value.state_dict().items()
    elif isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    found: dict[str, Any] = {}
    for key, item in items:
        if inner := _live_shapes(item):
            found.update((f"{key}.{each}", shape) for each, shape in inner.items())
        else:
            found[str(key)] = list(item.shape) if hasattr(item, "shape") else None
    return found
