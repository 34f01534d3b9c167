"""Select: which part of a saved tree is asked for, by globs of fqns.

Pure: no threads, no files, no clock.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from ..errors import ConfigError
from .tree import (
    CONTAINERS,
    WRAPPERS,
    DictNode,
    Node,
    ObjectNode,
    OrderedDictNode,
    children,
    parts,
)

_LONGEST_NAME = 4096
"""Of a longer fqn, globs see the beginning: one long key would be in the names of all below it."""


class _Omitted(msgspec.Struct, frozen=True):
    """What stands in a list for what was left out; never in a file."""


OMITTED: Node = _Omitted()  # type: ignore[assignment]


def select(tree: Node, keys: str | Sequence[str]) -> tuple[Node, list[str]]:
    """Return ``tree`` without what ``keys`` does not name, and the keys that named nothing.

    A key is a glob (``*`` also matches dots) for a leaf or for a container, which then stays
    whole. In dicts the other entries go; in lists and tuples they become OMITTED, so that positions
    stay as they were; of a value of another type stays the plain data that it is made of. So does
    the tree, if nothing is named. `completed` makes it one to build.
    """
    selection = _Selection(patterns_of(keys))
    return selection.of(tree, ""), selection.unused


class _Selection:
    """What some globs name in a tree."""

    def __init__(self, patterns: list[str]) -> None:
        self._patterns = patterns
        self._used: set[str] = set()

    @property
    def unused(self) -> list[str]:
        """The globs that have named nothing yet."""
        return [pattern for pattern in self._patterns if pattern not in self._used]

    def of(self, node: Node, name: str) -> Node:
        """Return what is named of ``node``, whose fqn is ``name``; OMITTED if nothing is."""
        if name and self._names(name):
            self._note_inside(node, name)
            return node
        if isinstance(node, WRAPPERS):
            inner = self.of(node.of, name)
            if inner is OMITTED or not isinstance(node, ObjectNode):
                return inner
            return msgspec.structs.replace(node, of=inner)
        prefix = f"{name}." if name else ""
        parts = [self.of(part, (prefix + key)[:_LONGEST_NAME]) for key, part in children(node)]
        if not isinstance(node, CONTAINERS) or all(part is OMITTED for part in parts):
            return OMITTED
        if isinstance(node, (DictNode, OrderedDictNode)):
            return _of_dict(node, parts)
        return msgspec.structs.replace(node, items=parts)

    def _names(self, name: str) -> bool:
        """Whether a glob names ``name``; those that do are noted."""
        hits = [pattern for pattern in self._patterns if fnmatch.fnmatchcase(name, pattern)]
        self._used.update(hits)
        return bool(hits)

    def _note_inside(self, node: Node, name: str) -> None:
        """Note the globs for something in what is whole anyhow: they are no mistakes."""
        if self.unused:
            for inner, _ in names(node, name):
                self._names(inner)


def _of_dict(node: DictNode | OrderedDictNode, values: Sequence[Node]) -> Node:
    """Return a dict's record with these values, without the keys of those that are OMITTED."""
    pairs = [
        (key, value) for key, value in zip(node.keys, values, strict=True) if value is not OMITTED
    ]
    return msgspec.structs.replace(
        node, keys=[key for key, _ in pairs], values=[value for _, value in pairs]
    )


def patterns_of(keys: str | Sequence[str]) -> list[str]:
    """Return the globs that a ``keys=`` is; ConfigError if it is none."""
    several = isinstance(keys, Iterable) and not isinstance(keys, str)
    patterns: list[Any] = list(keys) if several else [keys]
    if not patterns or not all(isinstance(each, str) for each in patterns):
        raise ConfigError(
            f"keys={keys!r:.200} names nothing: give a glob such as 'model.*', or several, or "
            "leave it out"
        )
    return patterns


def is_named(name: str, patterns: Sequence[str]) -> bool:
    """Whether a glob names ``name``, or a container that it is in."""
    words = name.split(".")
    above = [".".join(words[: i + 1]) for i in range(len(words))]
    return any(fnmatch.fnmatchcase(each, pattern) for pattern in patterns for each in above)


def names(node: Node, name: str = "") -> Iterator[tuple[str, Node]]:
    """Yield the fqn and record of everything below ``node``, containers included."""
    if isinstance(node, WRAPPERS):
        yield from names(node.of, name)
    prefix = f"{name}." if name else ""
    for key, child in children(node):
        inner = (prefix + key)[:_LONGEST_NAME]
        yield inner, child
        yield from names(child, inner)


def completed(node: Node) -> Node:
    """Return ``node`` with None in place of what was left out, as it can be built."""
    if node is OMITTED:
        return None
    if isinstance(node, WRAPPERS):
        return msgspec.structs.replace(node, of=completed(node.of))
    if isinstance(node, (DictNode, OrderedDictNode)):
        return msgspec.structs.replace(node, values=[completed(value) for value in node.values])
    if isinstance(node, CONTAINERS):
        return msgspec.structs.replace(node, items=[completed(item) for item in node.items])
    return node


def is_whole(node: Node) -> bool:
    """Whether nothing was left out of ``node``."""
    return node is not OMITTED and all(is_whole(part) for part in parts(node))
