"""Match: a live state beside a checkpoint's tree. What differs, and what is to be done.

Walks both side by side and changes nothing: the result is a list of reasons against the restore
and, where there are none, what to fill, which objects to let load, and which plain values to
replace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch

from ..format.manifest import TensorRecord
from ..format.names import leaf_names, some
from ..format.select import OMITTED, is_whole
from ..format.tree import (
    CONTAINERS,
    DictNode,
    ListNode,
    NamedTupleNode,
    Node,
    ObjectNode,
    OrderedDictNode,
    TensorNode,
    TupleNode,
    key_name,
    plain,
)
from .hints import hints
from .live import (
    Bulk,
    Fill,
    as_number,
    can_cast,
    dtype_and_kind,
    holds,
    is_float,
    refusal,
)
from .modules import entries, fills_in_place, paired
from .optimizers import optimizer_reasons


class Value(msgspec.Struct, gc=False):
    """Something to replace at the end; ``name`` is None for a tuple that is made anew."""

    put: Callable[[Any], None]
    node: Node
    name: str | None


class Loading(msgspec.Struct, gc=False):
    """An object that is to load by itself.

    Attributes:
        into: the object.
        name: its fqn.
        node: the records for its ``load_state_dict``.
        keys: of a module, the names in its ``state_dict()``.
    """

    into: Any
    name: str
    node: Node
    keys: frozenset[str] = frozenset()


@dataclass(slots=True)
class Match:
    """A live state beside a checkpoint's tree: what differs, and what is to be done.

    Attributes:
        tensors: the records of the checkpoint's leaves.
        strict: whether a name that only one side has is a reason.
        cast: whether floating dtypes may differ.
        is_left: whether a name of the state is none of those that are asked for.
        reasons: the differences that forbid the restore.
        fills: live tensors and arrays to fill.
        objects: objects to let load.
        values: what to do at the end with the new leaves: replace plain values in containers.
        missing: names that only the state has.
        unexpected: names that only the checkpoint has.
        cast_names: names of tensors whose dtype is converted.
        copies: names of dicts that look like what an optimizer's ``state_dict()`` has returned.
        absent: what matched nothing, though there are values in it.
    """

    tensors: Sequence[TensorRecord]
    strict: bool
    cast: bool = False
    is_left: Callable[[str], bool] | None = None
    reasons: list[str] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    objects: list[Loading] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    cast_names: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    absent: dict[str, Any] = field(default_factory=dict)

    def root(self, into: Any, tree: Node) -> None:
        """Match the whole state."""
        self.walk(into, tree, "", _refuse)
        if any(value.put is _refuse for value in self.values):
            self.reasons.append(
                f"the state itself is a {type(into).__name__}, which cannot be filled in place; "
                "pass a dict, or use load()"
            )
        if not self.reasons and not self.found and (saved := leaf_names(tree)):
            self.reasons += [
                f"no name is in both: the checkpoint has {some(saved)}",
                f"and the state has {some(self.missing) if self.missing else 'nothing'}",
            ]
        if self.reasons and self.absent:
            self.reasons[:0] = hints(tree, self.tensors, self.absent)

    @property
    def found(self) -> int:
        """How much there is to be done."""
        return len(self.fills) + len(self.objects) + len(self.values)

    def untouched(self) -> list[str]:
        """Return the names of parts of the state, as large as can be, that matched nothing."""
        return [name for name in self.absent if not any(up in self.absent for up in _above(name))]

    def walk(self, into: Any, node: Node, name: str, replace: Callable[[Any], None]) -> None:
        """Match one value; ``replace`` puts a new one in its place."""
        if node is OMITTED:
            return
        if callable(getattr(into, "load_state_dict", None)) and not isinstance(into, type):
            self._object(into, node.state if isinstance(node, ObjectNode) else node, name)
            return
        if isinstance(node, ObjectNode):
            node = node.state
        if isinstance(into, (torch.Tensor, np.ndarray)):
            self._bulk(into, node, name)
        elif isinstance(into, dict):
            self._dict(into, node, name)
        elif isinstance(into, (list, tuple)) and not isinstance(into, torch.Size):
            self._sequence(into, node, name, replace)
        elif into is None or isinstance(into, _PLAIN):
            self.values.append(Value(replace, node, name))
        else:
            self.reasons.append(
                f"{show(name)}: the checkpoint has a {_kind(node)}, "
                f"the state a {type(into).__name__}"
            )

    def _missing(self, name: str, value: Any) -> None:
        """Note that the checkpoint has nothing for a name of the state."""
        if self.is_left is not None and self.is_left(name):
            return
        self.missing.append(name)
        if _has_leaves(value):
            self.absent[name] = value
        if self.strict:
            self.reasons.append(f"{name}: missing in the checkpoint")

    # -- leaves -------------------------------------------------------------------------------

    def _bulk(self, into: Bulk, node: Node, name: str) -> None:
        if not isinstance(node, TensorNode):
            self._number(into, node, name)
            return
        record = self.tensors[node.i]
        dtype, kind = dtype_and_kind(into)
        is_cast = self.cast and record.dtype != dtype and can_cast(record.dtype, into)
        if record.kind != kind:
            why = f"saved as {record.kind}, the state has {kind}"
        elif record.shape != list(into.shape):
            why = f"saved with shape {record.shape}, the state has {list(into.shape)}"
        elif record.dtype != dtype and not is_cast:
            why = f"saved with dtype {record.dtype}, the state has {dtype}"
            if not self.cast and can_cast(record.dtype, into):
                why += " (cast=True converts it)"
        else:
            why = refusal(into) or ""
        if why:
            self.reasons.append(f"{show(name)}: {why}")
            return
        if is_cast:
            self.cast_names.append(name)
        self.fills.append(Fill(name, into, node.i, cast=is_cast))

    def _number(self, into: Bulk, node: Node, name: str) -> None:
        """Match a plain value with a tensor: a number may fill one that has no dimension."""
        what = "an array" if isinstance(into, np.ndarray) else "a tensor"
        number = None if isinstance(node, CONTAINERS) else as_number(plain(node), into)
        rounds = number is not None and not holds(into, number)
        if number is None:
            why = f"the state has {what}, the checkpoint a {_kind(node)}"
        elif rounds and not (self.cast and is_float(into)):
            dtype, _ = dtype_and_kind(into)
            why = f"saved as the number {number!r}, which {what} of {dtype} cannot hold"
            why += " exactly (cast=True rounds it)" if is_float(into) else ""
        else:
            why = refusal(into) or ""
        if why:
            self.reasons.append(f"{show(name)}: {why}")
            return
        if rounds:
            self.cast_names.append(name)
        self.fills.append(Fill(name, into, -1, number, cast=rounds))

    # -- containers ---------------------------------------------------------------------------

    def _dict(self, into: dict[Any, Any], node: Node, name: str, *, takes_all: bool = True) -> None:
        if not isinstance(node, (DictNode, OrderedDictNode)):
            self.reasons.append(
                f"{show(name)}: the state has a dict, the checkpoint a {_kind(node)}"
            )
            return
        saved = entries(node)
        if into.keys() == {"state", "param_groups"}:
            self.copies.append(show(name))
        names = dict(zip(saved, map(key_name, node.keys), strict=True))
        prefix = f"{name}." if name else ""
        if not into and takes_all:
            for key, value in saved.items():
                self.values.append(Value(_setter(into, key), value, prefix + names[key]))
            return
        before = self.found + len(self.reasons)
        for key, value in into.items():
            if key in saved:
                self.walk(value, saved[key], prefix + names[key], _setter(into, key))
            else:
                self._missing(f"{prefix}{key}", value)
        for key in saved:
            if key not in into:
                self.unexpected.append(prefix + names[key])
                if self.strict:
                    self.reasons.append(
                        f"{prefix}{names[key]}: unexpected, the state has no such key"
                    )
        if self.found + len(self.reasons) == before or not saved.keys() & into.keys():
            self._nothing_in(name, into)

    def _nothing_in(self, name: str, value: Any) -> None:
        if _has_leaves(value) and not (self.is_left is not None and self.is_left(name)):
            self.absent[name] = value

    def _sequence(self, into: Any, node: Node, name: str, replace: Callable[[Any], None]) -> None:
        is_sequence = isinstance(node, (ListNode, TupleNode, NamedTupleNode))
        if _is_plain(into) and is_whole(node):
            # of plain values alone it is one: a history of losses, say, which has grown
            if isinstance(into, list) and is_sequence:
                self.values.append(
                    Value(lambda new: into.__setitem__(slice(None), list(new)), node, name)
                )
                return
            if isinstance(into, tuple) and not _same_length(into, node) and replace is not _refuse:
                self.values.append(Value(replace, node, name))
                return
        if not isinstance(node, (ListNode, TupleNode, NamedTupleNode)):
            self.reasons.append(
                f"{show(name)}: the state has a {type(into).__name__}, "
                f"the checkpoint a {_kind(node)}"
            )
        elif isinstance(into, list) and not into:  # an empty one takes all, as in load()
            self.values.append(
                Value(lambda new: into.__setitem__(slice(None), list(new)), node, name)
            )
        elif not _same_length(into, node):
            self.reasons.append(
                f"{show(name)}: saved with {len(node.items)} items, the state has {len(into)}"
            )
        else:
            self._items(into, node.items, name, replace)

    def _items(
        self, into: Any, items: list[Node], name: str, replace: Callable[[Any], None]
    ) -> None:
        prefix = f"{name}." if name else ""
        if isinstance(into, list):
            for i, (value, item) in enumerate(zip(into, items, strict=True)):
                self.walk(value, item, f"{prefix}{i}", _setter(into, i))
            return
        # tuples cannot be changed: what must be replaced in one replaces the tuple
        changed: dict[int, Any] = {}
        before = len(self.values)
        for i, (value, item) in enumerate(zip(into, items, strict=True)):
            self.walk(value, item, f"{prefix}{i}", _setter(changed, i))
        if len(self.values) > before:

            def rebuild(_: Any) -> None:
                new = [changed.get(i, value) for i, value in enumerate(into)]
                replace(type(into)(*new) if hasattr(into, "_fields") else type(into)(new))

            self.values.append(Value(replace if replace is _refuse else rebuild, None, None))

    # -- objects ------------------------------------------------------------------------------

    def _object(self, into: Any, node: Node, name: str) -> None:
        if isinstance(into, torch.nn.Module):
            self._module(into, node, name)
            return
        if isinstance(into, torch.optim.Optimizer):
            self.reasons.extend(optimizer_reasons(into, node, self.tensors, name))
        self.objects.append(Loading(into, name, node))

    def _module(self, into: torch.nn.Module, node: Node, name: str) -> None:
        module, state, node = paired(into, node)
        if isinstance(state, dict) and fills_in_place(module, state):
            self._dict(state, node, name, takes_all=False)
            return
        keys = frozenset(state) if isinstance(state, dict) else frozenset()
        prefix = f"{name}." if name else ""
        saved = entries(node)
        params = dict(module.named_parameters())
        for key, value in saved.items():
            own = state.get(key) if key in keys else None
            own = params.get(key, own)
            if not isinstance(own, torch.Tensor) or not isinstance(value, TensorNode):
                continue
            record = self.tensors[value.i]
            if own.is_meta:
                self.reasons.append(f"{prefix}{key}: {refusal(own)}")
            elif record.dtype != dtype_and_kind(own)[0] and can_cast(record.dtype, own):
                # torch would convert it without a word
                self.cast_names.append(f"{prefix}{key}")
                if not self.cast:
                    self.reasons.append(
                        f"{prefix}{key}: saved with dtype {record.dtype}, the state has "
                        f"{dtype_and_kind(own)[0]} (cast=True converts it)"
                    )
        self.objects.append(Loading(module, name, node, keys))


_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.Size,
    torch.dtype,
    torch.device,
    np.generic,
)


def _refuse(_: Any) -> None:
    raise AssertionError("unreachable: a root that must be replaced is a reason")


def _setter(container: Any, key: Any) -> Callable[[Any], None]:
    return lambda new: container.__setitem__(key, new)


def show(name: str) -> str:
    """Return an fqn as messages show it."""
    return name or "the state itself"


def _above(name: str) -> Iterator[str]:
    """Yield the names of everything that ``name`` may be in."""
    if name:
        yield ""
    words = name.split(".")
    yield from (".".join(words[:i]) for i in range(1, len(words)))


def _same_length(into: Any, node: Any) -> bool:
    return not isinstance(node, (ListNode, TupleNode, NamedTupleNode)) or len(into) == len(
        node.items
    )


def _kind(node: Node) -> str:
    return {
        DictNode: "dict",
        OrderedDictNode: "dict",
        ListNode: "list",
        TupleNode: "tuple",
        NamedTupleNode: "NamedTuple",
        TensorNode: "tensor",
        type(None): "None",
    }.get(type(node), "plain value")


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, _PLAIN)


def _has_leaves(value: Any) -> bool:
    if isinstance(value, torch.nn.Module):
        return bool(value.state_dict())
    if isinstance(value, (dict, list, tuple)):
        return bool(value)
    return callable(getattr(value, "load_state_dict", None))
