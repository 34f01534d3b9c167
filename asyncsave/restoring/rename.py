"""Rename: parts of a saved tree under other names, as fine-tuning wants them.

A part is taken out of the tree by its fqn, and put where the live state has the new one: as a
value of a dict, or, where the state has a module or a state dict with dotted keys, as the keys that
begin with it. Changes nothing that is live.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import msgspec
import torch

from ..format.select import OMITTED
from ..format.tree import (
    CONTAINERS,
    WRAPPERS,
    DictNode,
    Node,
    ObjectNode,
    OrderedDictNode,
    children,
    key_name,
    unwrapped,
)
from .live import loads_itself

_DICTS = (DictNode, OrderedDictNode)


class _RefusedError(Exception):
    """A reason why something cannot be put where it should."""


def renamed(tree: Node, into: Any, rename: Mapping[str, str]) -> tuple[Node, list[str], list[str]]:
    """Return ``tree`` with parts moved.

    Args:
        tree: a saved tree.
        into: the live state, whose structure decides where a name is.
        rename: fqns in the checkpoint, and what they are in the state; "" is all of it.

    Returns:
        The tree; the names of the checkpoint that are not there; reasons against the others.
    """
    taken: list[tuple[str, str, Node]] = []
    absent, reasons = [], []
    for source in sorted(rename, key=len, reverse=True):  # what is inside another goes first
        tree, part = _take(tree, source)
        if part is OMITTED:
            absent.append(source)
        else:
            taken.append((source, rename[source], part))
    for source, target, part in taken:
        try:
            tree = _put(tree, into, target, part)
        except _RefusedError as refused:
            reasons.append(f"rename={{{source!r}: {target!r}}}: {refused}")
    return tree, absent, reasons


# -- out of its place -----------------------------------------------------------------------------


def _take(node: Node, name: str) -> tuple[Node, Node]:
    """Return ``node`` without what is called ``name`` in it, and that; OMITTED for nothing."""
    if not name:
        return OMITTED, node
    if isinstance(node, WRAPPERS):
        rest, part = _take(node.of, name)
        return _wrapped(node, rest), part
    if isinstance(node, _DICTS):
        return _take_from_dict(node, name)
    if not isinstance(node, CONTAINERS):
        return node, OMITTED
    items = list(node.items)
    for i, item in enumerate(items):
        if name == str(i) or name.startswith(f"{i}."):
            items[i], part = _take(item, name[len(str(i)) + 1 :])
            return msgspec.structs.replace(node, items=items), part
    return node, OMITTED


def _take_from_dict(node: DictNode | OrderedDictNode, name: str) -> tuple[Node, Node]:
    below = f"{name}."
    part: Node = OMITTED
    keys: list[Node] = []
    values: list[Node] = []
    dotted: dict[str, Node] = {}  # what is below the name by keys that begin with it
    for key, value in zip(node.keys, node.values, strict=True):
        label, rest = key_name(key), value
        if label.startswith(below):
            dotted[label.removeprefix(below)] = value
            continue
        if part is OMITTED:
            rest, part = _take_from_entry(label, value, name)
        if rest is not OMITTED:
            keys.append(key)
            values.append(rest)
    if dotted:
        part = _joined(part, dotted, node, name)
    if part is OMITTED:
        return node, OMITTED
    return (msgspec.structs.replace(node, keys=keys, values=values) if keys else OMITTED), part


def _take_from_entry(label: str, value: Node, name: str) -> tuple[Node, Node]:
    """Return what stays of a dict's value, and what of it is called ``name``."""
    if label == name:
        return OMITTED, value
    if name.startswith(f"{label}."):
        return _take(value, name[len(label) + 1 :])
    return value, OMITTED


def _joined(
    part: Node, dotted: dict[str, Node], node: DictNode | OrderedDictNode, name: str
) -> Node:
    """Return what is called ``name`` in a dict, with what its dotted keys have of it."""
    keys: list[Node] = list(dotted)
    if part is not OMITTED:
        return _merged(part, OrderedDictNode(keys, list(dotted.values())), name)
    metadata = _below(node.metadata, name) if isinstance(node, OrderedDictNode) else None
    return OrderedDictNode(keys, list(dotted.values()), metadata)


def _below(metadata: Node, name: str) -> Node:
    """Return what a module's ``_metadata`` says of the submodule ``name`` and those in it."""
    if not isinstance(metadata, _DICTS):
        return None
    pairs = [
        (key[len(name) + 1 :], value)
        for key, value in zip(metadata.keys, metadata.values, strict=True)
        if isinstance(key, str) and (key == name or key.startswith(f"{name}."))
    ]
    return msgspec.structs.replace(
        metadata, keys=[key for key, _ in pairs], values=[value for _, value in pairs]
    )


# -- into another ---------------------------------------------------------------------------------


def _put(node: Node, live: Any, name: str, part: Node, where: str = "") -> Node:
    """Return ``node`` with ``part`` where ``name`` is in ``live``, which lies beside it.

    Args:
        where: the fqn of that, for messages; ``name`` if it is not said.
    """
    where = where or name
    if isinstance(node, WRAPPERS):
        return _wrapped(node, _put(node.of, live, name, part, where))
    part = _without_object(part)
    if name:
        return _put_below(node, live, name, part, where)
    if loads_itself(live):
        flat = _flat(part, set(live.state_dict())) if isinstance(live, torch.nn.Module) else part
        return _merged(node, flat, where)
    if isinstance(live, dict) and live and isinstance(part, _DICTS):
        return _distributed(node, live, part, where)
    return _merged(node, part, where)


def _put_below(node: Node, live: Any, name: str, part: Node, where: str) -> Node:
    """Do what `_put` does, for a name that is not that of ``live`` itself."""
    live = live.state_dict() if loads_itself(live) else live
    if not isinstance(live, dict):
        raise _nothing_called(where)
    labels = {str(key): key for key in live}
    for label, key in labels.items():
        if name == label or name.startswith(f"{label}."):
            inside = _put(_child(node, label), live[key], name[len(label) + 1 :], part, where)
            return _with(node, [(_key_node(key), inside)], where, replace=True)
    return _put_new(node, labels, name, part, where)


def _put_new(node: Node, labels: Collection[str], name: str, part: Node, where: str) -> Node:
    """Put ``part`` into a dict that has no key of that name: as dotted keys, or in an empty one.

    Args:
        labels: the live dict's keys, as text.
    """
    if not labels:
        return _with(node, [(name, part)], where)
    known = {label[len(name) + 1 :] for label in labels if label.startswith(f"{name}.")}
    if not known or not isinstance(part, _DICTS):
        raise _nothing_called(where)
    above = where.removesuffix(name).rstrip(".")
    dotted = children(_flat(part, known))
    return _with(node, [(f"{name}.{label}", value) for label, value in dotted], above)


def _nothing_called(where: str) -> _RefusedError:
    return _RefusedError(f"the state has nothing called {where!r}")


def _distributed(node: Node, live: dict[Any, Any], part: Node, where: str) -> Node:
    """Put what is in ``part`` where ``live`` has it, name by name."""
    for label in map(str, live):
        rest, inside = _take(part, label)
        if inside is not OMITTED:
            node, part = _put(node, live, label, inside, f"{where}.{label}"), rest
    return _merged(node, part, where)  # of what is left, the match will say what it is


def _key_node(key: Any) -> Node:
    if key is None or isinstance(key, (str, int, float)):
        return key
    raise _RefusedError(f"a key that is a {type(key).__name__} has no name to go by")


def _child(node: Node, label: str) -> Node:
    node = unwrapped(node)
    return dict(children(node)).get(label, OMITTED) if isinstance(node, _DICTS) else OMITTED


def _with(
    node: Node, pairs: Iterable[tuple[Node, Node]], where: str, *, replace: bool = False
) -> Node:
    """Return a dict's node with more in it; with ``replace``, in place of what was there."""
    if node is OMITTED:
        node = DictNode([], [])
    if not isinstance(node, _DICTS):
        raise _RefusedError(f"the checkpoint has another value where {where!r} is to go")
    entries = {key_name(key): (key, old) for key, old in zip(node.keys, node.values, strict=True)}
    for key, value in pairs:
        label = key_name(key)
        key, old = entries.get(label, (key, OMITTED))
        entries[label] = (key, value if replace else _merged(old, value, f"{where}.{label}"))
    keys, values = zip(*entries.values(), strict=True) if entries else ((), ())
    return msgspec.structs.replace(node, keys=list(keys), values=list(values))


def _merged(one: Node, other: Node, where: str) -> Node:
    """Return both in one place, if one is nothing or no name is in both."""
    if one is OMITTED or other is OMITTED:
        return other if one is OMITTED else one
    if isinstance(one, WRAPPERS):
        return _wrapped(one, _merged(one.of, other, where))
    other = _without_object(other)
    if not isinstance(one, _DICTS) or not isinstance(other, _DICTS):
        raise _RefusedError(f"two values of the checkpoint would be {where.strip('.')!r}")
    return _with(one, zip(other.keys, other.values, strict=True), where)


def _wrapped(node: Any, of: Node) -> Node:
    """Return what a wrapper is when another record is in it: a part of a value is plain."""
    if of is OMITTED or not isinstance(node, ObjectNode):
        return node if of is node.of else of
    return msgspec.structs.replace(node, of=of)


def _without_object(node: Node) -> Node:
    """Return what an object's ``state_dict()`` had returned; other records as they are."""
    return node.of if isinstance(node, ObjectNode) else node


def _flat(part: Node, known: set[str]) -> Node:
    """Return a dict's node with dotted names, as modules have them, down to names in ``known``."""
    if not isinstance(part, _DICTS):
        return part
    pairs = dict(_flat_items(part, "", known))
    return msgspec.structs.replace(part, keys=list(pairs), values=list(pairs.values()))


def _flat_items(part: Node, prefix: str, known: set[str]) -> Iterator[tuple[str, Node]]:
    for label, value in children(part):
        inner = _without_object(value)
        name = prefix + label
        if name not in known and isinstance(inner, _DICTS) and inner.keys:
            yield from _flat_items(inner, f"{name}.", known)
        else:
            yield name, value
