"""Validate: a tree of records from a file, before anything is built of it.

Says of the tree what checked.py says of the other records: what is not refused here can be built,
in time and memory that are proportional to its records. Pure: no threads, no files, no clock.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from ..errors import FormatError, UnsupportedVersionError
from .build import IMPOSSIBLE, build_keys, named_tuple
from .kinds import MADE, PLAIN, has_form
from .tree import (
    CONTAINERS,
    LITERALS,
    MAX_DEPTH,
    MAX_ONE_HASH,
    NAMES,
    DictNode,
    MadeNode,
    NamedTupleNode,
    Node,
    OrderedDictNode,
    PlainNode,
    TensorNode,
    TupleNode,
    TypedNode,
    is_key,
    key_name,
    parts,
    plain,
)

_LONGEST_TYPE = 1000


def validate_tree(node: Node, tensors: int, path: object, depth: int = 0) -> None:
    """Check a tree; FormatError says what is wrong with it.

    Args:
        tensors: how many leaves with bulk there are.
        path: the file it is from.
        depth: how far the node is from the root.
    """
    if depth > 2 * MAX_DEPTH:
        raise FormatError(f"{path} has a tree of more than {2 * MAX_DEPTH} levels")
    if type(node) in LITERALS:
        return
    if isinstance(node, TensorNode):
        if not 0 <= node.i < tensors:
            raise FormatError(f"{path} has a tree with tensor {node.i}, and {tensors} tensors")
        return
    _check_itself(node, path)
    for part in parts(node):
        if type(part) not in LITERALS or depth == 2 * MAX_DEPTH:  # most keys need no call
            validate_tree(part, tensors, path, depth + 1)
    # after its parts: keys are not too deep now
    if isinstance(node, (DictNode, OrderedDictNode)):
        _validate_dict(node, path)
    elif isinstance(node, PlainNode):
        _validate_plain(node, path)


def _check_itself(node: Node, path: object) -> None:
    """Check what a record says, without the records in it."""
    try:
        if isinstance(node, NamedTupleNode):
            if len(node.fields) != len(node.items):
                raise FormatError(f"{path} has a NamedTuple that is not as long as its names")
            named_tuple(node.name, tuple(node.fields))
        elif isinstance(node, TypedNode):
            if len(node.type) > _LONGEST_TYPE:
                raise FormatError(f"{path} has a type with a name of {len(node.type)} characters")
        elif isinstance(node, (PlainNode, MadeNode)):
            _check_kind(node, path)
        elif not isinstance(node, CONTAINERS):
            plain(node)
    except FormatError:
        raise
    except IMPOSSIBLE as cause:
        raise FormatError(f"{path} has an impossible value in its tree: {cause!s:.200}") from cause


def _check_kind(node: PlainNode | MadeNode, path: object) -> None:
    if node.type not in (PLAIN if isinstance(node, PlainNode) else MADE):
        raise UnsupportedVersionError(
            f"{path} has a value of the type {node.type!r:.80}, which this asyncsave does not "
            "know: install a newer one"
        )
    is_right = is_key(node.of) if isinstance(node, PlainNode) else has_form(node)
    if not is_right or (isinstance(node, MadeNode) and not is_key(node.args)):
        raise FormatError(f"{path} has a {node.type} that is not made of what it should be")


def _validate_plain(node: PlainNode, path: object) -> None:
    if isinstance(node.of, TupleNode) and node.type in ("set", "frozenset"):
        _built_keys(node.of.items, path)  # looking them up takes time
    build_keys([node], NAMES)


def _validate_dict(node: DictNode | OrderedDictNode, path: object) -> None:
    kinds = set(map(type, node.keys))
    are_keys = kinds <= LITERALS or all(map(is_key, node.keys))
    if len(node.keys) != len(node.values) or not are_keys:
        raise FormatError(f"{path} has a dict whose keys cannot be the keys of its values")
    keys = node.keys if kinds <= {str} else _built_keys(node.keys, path)
    if len(set(keys)) < len(keys):
        raise FormatError(f"{path} has a dict in which one key is there twice")


def _built_keys(nodes: list[Node], path: object) -> Sequence[Any]:
    try:
        keys = build_keys(nodes, NAMES)
        hashes = collections.Counter(map(hash, keys))
        for node in nodes:
            key_name(node)
    except IMPOSSIBLE as cause:
        raise FormatError(f"{path} has a dict with an impossible key: {cause!s:.200}") from cause
    # numbers can be chosen such that all have one hash, and looking them up takes quadratic time
    if max(hashes.values(), default=0) > MAX_ONE_HASH:
        raise FormatError(f"{path} has a dict or set in which too many keys have the same hash")
    return keys
