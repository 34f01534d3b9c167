"""Match: a live state beside a checkpoint's tree. What differs, and what is to be done.

Walks both side by side and changes nothing: the result is a list of reasons against the restore
and, where there are none, what to fill, which objects to let load, and which plain values to
replace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .state.nodes import (
    CONTAINERS,
    DictNode,
    ListNode,
    NamedTupleNode,
    Node,
    ObjectNode,
    OrderedDictNode,
    TensorNode,
    TupleNode,
    bulk_indices,
    children,
    key_name,
)
from .state.plan import dtype_name
from .state.tree import unflatten
from .storage.reader import Checkpoint


@dataclass(slots=True)
class Match:
    """A live state beside a checkpoint's tree: what differs, and what is to be done.

    Attributes:
        reasons: the differences that forbid the restore.
        fills: (number of the leaf, live tensor or array to fill).
        objects: (object, its fqn, the records for its ``load_state_dict``).
        values: what to do at the end with the new leaves: replace plain values in containers.
    """

    checkpoint: Checkpoint
    strict: bool
    reasons: list[str] = field(default_factory=list)
    fills: list[tuple[int, torch.Tensor | np.ndarray[Any, Any]]] = field(default_factory=list)
    objects: list[tuple[Any, str, Node]] = field(default_factory=list)
    values: list[tuple[Callable[[Any], None], Node]] = field(default_factory=list)

    def root(self, into: Any) -> None:
        """Match the whole state."""
        self.walk(into, self.checkpoint.rank.tree, "", _refuse)
        if any(put is _refuse for put, _ in self.values):
            self.reasons.append(
                f"the state itself is a {type(into).__name__}, which cannot be filled in place; "
                "pass a dict, or use load()"
            )

    def walk(self, into: Any, node: Node, name: str, replace: Callable[[Any], None]) -> None:
        """Match one value; ``replace`` puts a new one in its place."""
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
        elif into is None or (isinstance(into, _PLAIN) and self._is_plain_node(node)):
            self.values.append((replace, node))
        else:
            self.reasons.append(
                f"{show(name)}: the checkpoint has a {_kind(node)}, "
                f"the state a {type(into).__name__}"
            )

    def _is_plain_node(self, node: Node) -> bool:
        if isinstance(node, TensorNode):
            return self.checkpoint.rank.tensors[node.i].kind == "bytes"
        return not isinstance(node, CONTAINERS)

    def _bulk(self, into: torch.Tensor | np.ndarray[Any, Any], node: Node, name: str) -> None:
        if not isinstance(node, TensorNode):
            what = "an array" if isinstance(into, np.ndarray) else "a tensor"
            self.reasons.append(
                f"{show(name)}: the state has {what}, the checkpoint a {_kind(node)}"
            )
            return
        record = self.checkpoint.rank.tensors[node.i]
        if isinstance(into, np.ndarray):
            kind, dtype = "numpy", into.dtype.str
        else:
            kind, dtype = "torch", dtype_name(into.dtype)
        shape = list(into.shape)
        if record.kind != kind:
            self.reasons.append(f"{show(name)}: saved as {record.kind}, the state has {kind}")
        elif record.shape != shape:
            self.reasons.append(
                f"{show(name)}: saved with shape {record.shape}, the state has {shape}"
            )
        elif record.dtype != dtype:
            self.reasons.append(
                f"{show(name)}: saved with dtype {record.dtype}, the state has {dtype}"
            )
        elif isinstance(into, np.ndarray) and not into.flags.writeable:
            self.reasons.append(f"{show(name)}: the array in the state is read-only")
        elif _overlaps_itself(into):
            self.reasons.append(
                f"{show(name)}: the tensor in the state has elements that share memory "
                "(expand()); it cannot be filled in place"
            )
        else:
            self.fills.append((node.i, into))

    def _dict(self, into: dict[Any, Any], node: Node, name: str, *, takes_all: bool = True) -> None:
        if not isinstance(node, (DictNode, OrderedDictNode)):
            self.reasons.append(
                f"{show(name)}: the state has a dict, the checkpoint a {_kind(node)}"
            )
            return
        keys = unflatten(ListNode(node.keys), dict[int, Any]().__getitem__)
        saved = dict(zip(keys, node.values, strict=True))
        names = dict(zip(keys, map(key_name, node.keys), strict=True))
        prefix = f"{name}." if name else ""
        if not into and takes_all:
            for key, value in saved.items():
                self.values.append((_setter(into, key), value))
            return
        for key, value in into.items():
            if key in saved:
                self.walk(value, saved[key], prefix + names[key], _setter(into, key))
            elif self.strict:
                self.reasons.append(f"{prefix}{key}: missing in the checkpoint")
        if self.strict:
            self.reasons.extend(
                f"{prefix}{names[key]}: unexpected, the state has no such key"
                for key in saved
                if key not in into
            )

    def _sequence(self, into: Any, node: Node, name: str, replace: Callable[[Any], None]) -> None:
        if not isinstance(node, (ListNode, TupleNode, NamedTupleNode)):
            self.reasons.append(
                f"{show(name)}: the state has a {type(into).__name__}, "
                f"the checkpoint a {_kind(node)}"
            )
            return
        items = node.items
        if isinstance(into, list) and (not into or (_is_plain(into) and not bulk_indices(node))):
            # a list of plain values is a value: a history of losses, say, which has grown
            self.values.append((lambda new: into.__setitem__(slice(None), list(new)), node))
            return
        if len(into) != len(items):
            self.reasons.append(
                f"{show(name)}: saved with {len(items)} items, the state has {len(into)}"
            )
            return
        prefix = f"{name}." if name else ""
        if isinstance(into, list):
            for i, (value, item) in enumerate(zip(into, items, strict=True)):
                self.walk(value, item, f"{prefix}{i}", _setter(into, i))
            return
        # tuples cannot be changed: what must be replaced in one replaces the tuple
        changed: dict[int, Any] = {}

        def put(i: int) -> Callable[[Any], None]:
            return lambda new: changed.__setitem__(i, new)

        before = len(self.values)
        for i, (value, item) in enumerate(zip(into, items, strict=True)):
            self.walk(value, item, f"{prefix}{i}", put(i))
        if len(self.values) > before:

            def rebuild(_: Any) -> None:
                new = [changed.get(i, value) for i, value in enumerate(into)]
                replace(type(into)(*new) if hasattr(into, "_fields") else type(into)(new))

            self.values.append((replace if replace is _refuse else rebuild, None))

    def _object(self, into: Any, node: Node, name: str) -> None:
        if not isinstance(into, torch.nn.Module):
            if isinstance(into, torch.optim.Optimizer):
                self.reasons.extend(_optimizer_reasons(into, node, name))
            self.objects.append((into, name, node))
            return
        state = into.state_dict()
        if _fills_in_place(into) and all(isinstance(v, torch.Tensor) for v in state.values()):
            self._dict(state, node, name, takes_all=False)
        else:
            self.objects.append((into, name, node))


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
    return not isinstance(value, (torch.Tensor, np.ndarray)) and not hasattr(value, "state_dict")


def _overlaps_itself(into: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    return isinstance(into, torch.Tensor) and any(
        stride == 0 and size > 1 for size, stride in zip(into.shape, into.stride(), strict=True)
    )


def _fills_in_place(module: torch.nn.Module) -> bool:
    """Whether ``load_state_dict`` of a module does nothing but fill what ``state_dict`` returns."""
    if type(module).load_state_dict is not torch.nn.Module.load_state_dict:
        return False
    for each in module.modules():
        own = type(each)._load_from_state_dict
        if own is not torch.nn.Module._load_from_state_dict and not own.__module__.startswith(
            "torch.nn."
        ):
            return False
        if type(each).set_extra_state is not torch.nn.Module.set_extra_state:
            return False
        if type(each).state_dict is not torch.nn.Module.state_dict:
            return False
        hooks = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_hooks")
        if any(getattr(each, name, None) for name in hooks):
            return False
    return True


def _optimizer_reasons(optimizer: torch.optim.Optimizer, node: Node, name: str) -> list[str]:
    """Compare parameter groups, whose mismatch an optimizer may notice too late."""
    parts = dict(children(node))
    groups = parts.get("param_groups")
    if not isinstance(groups, ListNode):
        return [
            f"{show(name)}: the state has an optimizer, the checkpoint has no param_groups there"
        ]
    if len(groups.items) != len(optimizer.param_groups):
        return [
            f"{show(name)}: saved with {len(groups.items)} parameter groups, "
            f"the optimizer has {len(optimizer.param_groups)}"
        ]
    reasons = []
    for i, (group, live) in enumerate(zip(groups.items, optimizer.param_groups, strict=True)):
        saved = dict(children(group)).get("params")
        count = len(saved.items) if isinstance(saved, ListNode) else 0
        if count != len(live["params"]):
            reasons.append(
                f"{show(name)}: parameter group {i} was saved with {count} parameters, "
                f"the optimizer has {len(live['params'])}"
            )
    return reasons
