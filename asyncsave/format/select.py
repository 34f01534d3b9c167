"""Select: which part of a saved tree is asked for, by globs of fqns.

Pure: no threads, no files, no clock.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from ..errors import ConfigError
from .tree import CONTAINERS, DictNode, Node, ObjectNode, OrderedDictNode, children, parts

_LONGEST_NAME = 4096
"""Of a longer fqn, globs see the beginning: one long key would be in the names of all below it."""


class _Omitted(msgspec.Struct, frozen=True):
    """What stands in a list for what was left out; never in a file."""


OMITTED: Any = _Omitted()


def select(tree: Node, keys: str | Sequence[str], omitted: Node = None) -> tuple[Node, list[str]]:
    """Return ``tree`` without what ``keys`` does not name, and the keys that named nothing.

    A key is a glob (``*`` also matches dots) for a leaf or for a container, which then stays
    whole. In dicts the other entries go; in lists and tuples they become ``omitted``, so that
    positions stay as they were.
    """
    patterns = patterns_of(keys)
    used: set[str] = set()

    def wanted(name: str) -> bool:
        hits = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
        used.update(hits)
        return bool(hits)

    def walk(node: Node, name: str) -> tuple[bool, Node]:
        if name and wanted(name):
            if len(used) < len(patterns):  # a key for something inside is no mistake
                for inner_name, _ in names(node, name):
                    wanted(inner_name)
            return True, node
        if isinstance(node, ObjectNode):
            kept, inner = walk(node.state, name)
            return kept, msgspec.structs.replace(node, state=inner) if kept else omitted
        if not isinstance(node, CONTAINERS):
            return False, omitted
        prefix = f"{name}." if name else ""
        results = [walk(value, (prefix + key)[:_LONGEST_NAME]) for key, value in children(node)]
        if not any(kept for kept, _ in results):
            return False, omitted
        if isinstance(node, (DictNode, OrderedDictNode)):
            pairs = [
                (key, value) for key, (kept, value) in zip(node.keys, results, strict=True) if kept
            ]
            return True, msgspec.structs.replace(
                node, keys=[key for key, _ in pairs], values=[value for _, value in pairs]
            )
        return True, msgspec.structs.replace(node, items=[value for _, value in results])

    _, pruned = walk(tree, "")
    return pruned, [pattern for pattern in patterns if pattern not in used]


def patterns_of(keys: str | Sequence[str]) -> list[str]:
    """Return the globs that a ``keys=`` is; ConfigError if it is none."""
    patterns = [keys] if isinstance(keys, str) else list(keys)
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
    if isinstance(node, ObjectNode):
        yield from names(node.state, name)
    prefix = f"{name}." if name else ""
    for key, child in children(node):
        inner = (prefix + key)[:_LONGEST_NAME]
        yield inner, child
        yield from names(child, inner)


def completed(node: Node) -> Node:
    """Return ``node`` with None in place of what was left out, as it can be built."""
    if node is OMITTED:
        return None
    if isinstance(node, ObjectNode):
        return msgspec.structs.replace(node, state=completed(node.state))
    if isinstance(node, (DictNode, OrderedDictNode)):
        return msgspec.structs.replace(node, values=[completed(value) for value in node.values])
    if isinstance(node, CONTAINERS):
        return msgspec.structs.replace(node, items=[completed(item) for item in node.items])
    return node


def is_whole(node: Node) -> bool:
    """Whether nothing was left out of ``node``."""
    return node is not OMITTED and all(is_whole(part) for part in parts(node))
