"""Build: values made anew from a tree's records. Pure: no threads, no files, no clock."""

from __future__ import annotations

import collections
import struct
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import FormatError, LoadError
from .kinds import MADE, PLAIN
from .tree import (
    LITERALS,
    DictNode,
    ListNode,
    MadeNode,
    NamedTupleNode,
    Node,
    ObjectNode,
    OrderedDictNode,
    PlainNode,
    TensorNode,
    TupleNode,
    TypedNode,
    Values,
    plain,
)

IMPOSSIBLE = (ValueError, TypeError, RuntimeError, OverflowError, struct.error)
"""What Python, NumPy and torch raise when a record asks for a value that cannot be."""


def unflatten(tree: Node, bulk: Callable[[int], Any], values: Values) -> Any:
    """Build a new state from node records.

    Args:
        tree: records that `validate` accepted.
        bulk: gives the value of the i-th leaf with bulk.
        values: makes sizes, dtypes and devices.

    Raises:
        FormatError: a record says something that cannot be.
        LoadError: ``values`` cannot make something, or makes the same of two keys of a dict.
    """
    try:
        return _build(tree, bulk, values)
    except LoadError:
        raise
    except IMPOSSIBLE as cause:
        raise FormatError(f"the checkpoint's tree has an impossible value: {cause}") from cause


def _build(node: Node, bulk: Callable[[int], Any], values: Values) -> Any:
    if isinstance(node, TensorNode):
        return bulk(node.i)
    if isinstance(node, (DictNode, OrderedDictNode)):
        return _build_dict(node, bulk, values)
    if isinstance(node, (ListNode, TupleNode, NamedTupleNode)):
        items = [_build(item, bulk, values) for item in node.items]
        if isinstance(node, ListNode):
            return items
        if isinstance(node, TupleNode):
            return tuple(items)
        return named_tuple(node.name, tuple(node.fields))(*items)
    if isinstance(node, ObjectNode):
        return _build(node.of, bulk, values)
    if isinstance(node, TypedNode):
        return values.typed(node.type, _build(node.of, bulk, values))
    if isinstance(node, (PlainNode, MadeNode)):
        return _build_kind(node, bulk, values)
    return plain(node, values)


def _build_kind(node: PlainNode | MadeNode, bulk: Callable[[int], Any], values: Values) -> Any:
    of = _build(node.of, bulk, values)
    args = _build(node.args, bulk, values) if isinstance(node, MadeNode) else None
    try:
        if node.type.startswith("torch."):
            return values.made(node.type, of, args)
        if isinstance(node, PlainNode):
            return PLAIN[node.type].together(of)
        together = MADE[node.type].together
        assert together is not None
        return together(of, args)
    except (*IMPOSSIBLE, ArithmeticError, LookupError, AttributeError) as cause:
        if isinstance(cause, LoadError):
            raise
        raise FormatError(
            f"the checkpoint has an impossible {node.type}: {cause!r:.200}"
        ) from cause


def _build_dict(
    node: DictNode | OrderedDictNode, bulk: Callable[[int], Any], values: Values
) -> Any:
    keys = build_keys(node.keys, values)
    made = dict(zip(keys, [_build(value, bulk, values) for value in node.values], strict=True))
    if len(made) < len(keys):
        raise LoadError(
            "the checkpoint has a dict with keys that are the same here, as torch's dtypes and "
            "their names are without torch"
        )
    if isinstance(node, DictNode):
        return made
    ordered: Any = collections.OrderedDict(made)
    if node.metadata is not None:
        ordered._metadata = _build(node.metadata, bulk, values)
    return ordered


def build_keys(nodes: Sequence[Node], values: Values) -> Sequence[Any]:
    """Return the keys of a dict's record: values, for which `is_key` holds.

    Raises:
        FormatError: one says something that cannot be; or what ``IMPOSSIBLE`` lists.
        LoadError: ``values`` cannot make one.
    """
    if LITERALS.issuperset(map(type, nodes)):  # as in nearly all dicts
        return nodes
    return [_build(node, _no_bulk, values) for node in nodes]


def _no_bulk(i: int) -> Any:
    raise AssertionError("unreachable: a key holds no leaf")


_made: dict[tuple[str, tuple[str, ...]], Any] = {}


def named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    """Return a NamedTuple type with these names, the same one each time."""
    # namedtuple() refuses whatever is not an identifier, so no record can smuggle in code
    if len(fields) > 256 or len(name) > 256 or any(len(part) > 256 for part in fields):
        raise FormatError("the checkpoint has a NamedTuple with too many or too long names")
    # Python reads identifiers in their normal form, so that two different ones may be the same
    if any(unicodedata.normalize("NFKC", part) != part for part in (name, *fields)):
        raise FormatError(f"the checkpoint has a NamedTuple {name!r} with names not in normal form")
    key = (name, fields)
    made = _made.get(key)  # another thread may clear it at any time
    if made is None:
        if len(_made) >= 1024:
            _made.clear()
        made = _made.setdefault(key, collections.namedtuple(name, fields))
    return made
