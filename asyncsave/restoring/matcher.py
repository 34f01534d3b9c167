"""Matcher: walks a live state and a checkpoint's tree side by side, and changes nothing."""

from __future__ import annotations

import collections
from collections.abc import MutableMapping, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import StateError
from ..format.leaf import Leaf
from ..format.names import leaf_names, some
from ..format.select import OMITTED, is_whole
from ..format.tree import (
    MAX_DEPTH,
    BytesNode,
    DictNode,
    ListNode,
    MadeNode,
    NamedTupleNode,
    Node,
    ObjectNode,
    OrderedDictNode,
    TensorNode,
    TupleNode,
    inside,
    key_name,
    unwrapped,
)
from ..state.classes import BY_TYPE, NAMESPACES, Fields, is_frozen, is_record, plain_key
from .fits import fit_leaf, fit_number, kind_of_node
from .hints import hints
from .live import PLAIN_TENSORS, Bulk, Target, bare, can_cast, dtype_name, loads_itself, refusal
from .match import Contents, Edit, Loading, Match, Place, TupleEdit, show
from .modules import entries, fills_in_place, loaded_by_torch, paired
from .optimizers import optimizer_reasons, state_casts
from .parts import GENERATORS, Adopting, is_kind, is_value, kind_name, parts_of
from .wish import Wish


def match_state(
    into: Any, tree: Node, leaves: Sequence[Leaf], wish: Wish, reasons: Sequence[str] = ()
) -> Match:
    """Return what restoring ``tree`` into a state would be.

    Args:
        into: the live state.
        tree: of the checkpoint, what is asked for, under the state's names.
        leaves: the checkpoint's.
        wish: what may differ.
        reasons: what is against it already; then nothing is looked for.
    """
    match = Match(reasons=list(reasons))
    if reasons:
        return match
    root = [into]
    _Matcher(match, leaves, wish).walk(into, tree, "", Place(root, 0))
    if match.changes(root):
        match.reasons.append(
            f"the state itself is a {type(into).__name__}, which cannot be filled in place; "
            "pass a dict, or use load()"
        )
    if not match.reasons and not match.found and (saved := leaf_names(tree)):
        match.reasons += [
            f"no name is in both: the checkpoint has {some(saved)}",
            f"and the state has {some(match.missing) if match.missing else 'nothing'}",
        ]
    if match.reasons and match.absent:
        match.reasons[:0] = hints(tree, leaves, match.absent)
    return match


class _Matcher:
    """Fills a `Match`, value by value."""

    def __init__(self, match: Match, leaves: Sequence[Leaf], wish: Wish) -> None:
        self._match = match
        self._leaves = leaves
        self._wish = wish

    def walk(self, into: Any, node: Node, name: str, place: Place) -> None:
        """Match one value. HOT (per leaf).

        Args:
            into: the live value.
            node: what the checkpoint has for it.
            name: its fqn.
            place: where it is, should it have to be replaced.
        """
        if type(into) in PLAIN_TENSORS and type(node) is TensorNode:  # as most values are
            self._bulk(into, node, name)
            return
        if node is OMITTED:
            return
        if type(into) in BY_TYPE:
            self._match.edits.append(Edit(place, node, name, into))
        elif loads_itself(into):
            self._object(into, node.of if isinstance(node, ObjectNode) else node, name)
        elif isinstance(into, (torch.Tensor, np.ndarray)):
            self._array_or_tensor(into, node, name)
        elif is_value(into):
            self._match.edits.append(Edit(place, node, name, into))
        else:
            self._container(into, node, name, place)

    def _array_or_tensor(self, into: Bulk, node: Node, name: str) -> None:
        try:
            made = parts_of(into)
        except (ValueError, StateError) as error:
            self._match.reasons.append(f"{show(name)}: the state has what cannot be saved: {error}")
            return
        if made is None:
            inner = unwrapped(node)
            # of what is made of others, the name of its type says more than that of its record
            self._bulk(bare(into), inner if isinstance(inner, TensorNode) else node, name)
            return
        if made.adopts and made.fits(node):
            self._match.objects.append(Loading(Adopting(into), name, node))
            return
        self._match.reasons += [f"{show(name)}: {why}" for why in made.reasons(node)]
        if made.fits(node):
            for key, part, inner in made.tensors(node):
                self.walk(part, inner, f"{name}.{key}" if key else name, Place(None, key))

    def _container(self, into: Any, node: Node, name: str, place: Place) -> None:
        """Match what holds other values."""
        bare_node = inside(node)
        if isinstance(into, GENERATORS):
            if isinstance(node, MadeNode) and node.type == kind_name(into):
                self._match.objects.append(Loading(Adopting(into), name, node))
            else:
                self._differs(into, node, name)
        elif isinstance(into, bytearray):
            self._bytearray(into, node, name, place)
        elif isinstance(into, set) or (
            isinstance(into, collections.Counter) and self._wish.patterns is None
        ):
            self._contents(into, node, name)
        elif isinstance(into, dict):
            self._dict(into, bare_node, name)
        elif isinstance(into, (list, tuple, collections.deque)):
            self._sequence(into, node, name, place)
        elif isinstance(into, NAMESPACES):
            self._dict(vars(into), bare_node, name)
        elif is_record(into) and is_frozen(into):
            self._frozen(into, bare_node, name, place)
        elif is_record(into):
            self._dict(Fields(into), bare_node, name, takes_all=False)
        else:
            why = f"the checkpoint has a {kind_of_node(node)}, the state a {type(into).__name__}"
            self._match.reasons.append(f"{show(name)}: {why}")

    def _contents(self, into: Any, node: Node, name: str) -> None:
        """Match what takes all that was saved in its place."""
        if isinstance(into, set):
            fits = is_kind(node, "set", "frozenset")
        else:
            fits = isinstance(inside(node), (DictNode, OrderedDictNode)) and is_whole(node)
        if fits:
            self._match.edits.append(Edit(Contents(into), node, name, into))
        else:
            self._differs(into, node, name)

    def _bytearray(self, into: bytearray, node: Node, name: str, place: Place) -> None:
        """Match bytes; of another length they are another bytearray, as others may see into one."""
        of = inside(node)
        length = len(of.data) if isinstance(of, BytesNode) else -1
        if isinstance(of, TensorNode) and self._leaves[of.i].kind == "bytes":
            length = self._leaves[of.i].shape[0]
        if length < 0:
            self._differs(into, node, name)
            return
        same = length == len(into)
        where = Place(into, slice(None)) if same else place
        self._match.edits.append(Edit(where, MadeNode("bytearray", of), name, into))

    def _frozen(self, into: Any, node: Node, name: str, place: Place) -> None:
        """Match a dataclass that cannot be changed: as a tuple, it is replaced."""
        match = self._match
        edits, tuples = len(match.edits), len(match.tuples)
        items = dict(Fields(into))
        self._dict(items, node, name, takes_all=False)
        if match.changes(items, edits, tuples):
            match.tuples.append(TupleEdit(place, into, items, name))

    def _differs(self, into: Any, node: Node, name: str) -> None:
        """Note that only the state has a container."""
        kind = "dict" if isinstance(into, dict) else type(into).__name__
        why = f"the state has a {kind}, the checkpoint a {kind_of_node(node)}"
        self._match.reasons.append(f"{show(name)}: {why}")

    def _bulk(self, into: Bulk, node: Node, name: str) -> None:
        match = self._match
        if isinstance(node, TensorNode):
            leaf, number = self._leaves[node.i], None
            fit = fit_leaf(leaf, into, self._wish.cast)
        else:
            leaf = None
            fit = fit_number(node, into, self._wish.cast)
            number = fit.number
        if fit.why:
            match.reasons.append(f"{show(name)}: {fit.why}")
            return
        if fit.cast:
            match.cast_names.append(name)
        match.targets.append(Target(name, into, leaf, number, fit.cast))

    # -- dicts --------------------------------------------------------------------------------

    def _dict(
        self, into: MutableMapping[Any, Any], node: Node, name: str, *, takes_all: bool = True
    ) -> None:
        if not isinstance(node, (DictNode, OrderedDictNode)):
            self._differs(into, node, name)
            return
        match = self._match
        if into.keys() == {"state", "param_groups"}:
            match.copies.append(show(name))
        prefix = f"{name}." if name else ""
        saved = entries(node)
        names = [prefix + key_name(key) for key in node.keys]
        if not into and takes_all:
            items = zip(saved.items(), names, strict=True)
            match.edits += [Edit(Place(into, key), value, each) for (key, value), each in items]
            return
        before = match.found + len(match.reasons)
        by_key = dict(zip(saved, names, strict=True))
        found = set()
        for key, value in into.items():
            at = key if key in saved else plain_key(key)
            if at in saved:
                found.add(at)
                self.walk(value, saved[at], by_key[at], Place(into, key))
            else:
                self._missing(f"{prefix}{key}", value)
        self._unexpected([each for key, each in by_key.items() if key not in found])
        if match.found + len(match.reasons) == before or not found:
            self._nothing_in(name, into)

    def _missing(self, name: str, value: Any) -> None:
        """Note that the checkpoint has nothing for a name of the state."""
        if self._wish.leaves_out(name):
            return
        self._match.missing.append(name)
        if _has_leaves(value):
            self._match.absent[name] = value
        if self._wish.strict:
            self._match.reasons.append(f"{name}: missing in the checkpoint")

    def _unexpected(self, names: list[str]) -> None:
        """Note that the state has nothing for names of the checkpoint."""
        self._match.unexpected += names
        if self._wish.strict:
            self._match.reasons += [
                f"{name}: unexpected, the state has no such key" for name in names
            ]

    def _nothing_in(self, name: str, value: Any) -> None:
        if _has_leaves(value) and not self._wish.leaves_out(name):
            self._match.absent[name] = value

    # -- lists and tuples -----------------------------------------------------------------------

    def _sequence(self, into: Any, node: Node, name: str, place: Place) -> None:
        items: Any = inside(node)
        whole = self._whole_place(into, items, place)
        if whole is not None:
            self._match.edits.append(Edit(whole, node, name, into))
            room = getattr(into, "maxlen", None)
            if room is not None and len(items.items) > room:
                why = f"saved with {len(items.items)} items, the state's deque has room for "
                self._match.reasons.append(f"{show(name)}: {why}{room}")
            return
        node = items
        if not isinstance(node, _SEQUENCES):
            self._differs(into, node, name)
        elif len(into) != len(node.items):
            why = f"saved with {len(node.items)} items, the state has {len(into)}"
            self._match.reasons.append(f"{show(name)}: {why}")
        elif isinstance(into, (list, collections.deque)):
            self._items(into, into, node.items, name)
        else:
            self._tuple(into, node.items, name, place)

    def _whole_place(self, into: Any, node: Node, place: Place) -> Place | Contents | None:
        """Return where to put all of a list or tuple at once, if its items are not matched.

        One of plain values alone is a plain value: a history of losses, say, which has grown. And
        an empty list takes all, as an empty dict does.
        """
        if not isinstance(node, _SEQUENCES):
            return None
        is_plain = _is_plain(into) and is_whole(node)
        if isinstance(into, list):
            return Place(into, slice(None)) if is_plain or not into else None
        if isinstance(into, collections.deque):
            is_other = len(into) != len(node.items) and is_whole(node)
            return Contents(into) if is_plain or is_other else None
        return place if is_plain and len(into) != len(node.items) else None

    def _items(self, into: Sequence[Any], items: Any, nodes: list[Node], name: str) -> None:
        """Match the items of ``into``; what replaces them goes into ``items``."""
        prefix = f"{name}." if name else ""
        for i, (value, node) in enumerate(zip(into, nodes, strict=True)):
            self.walk(value, node, f"{prefix}{i}", Place(items, i))

    def _tuple(self, into: tuple[Any, ...], nodes: list[Node], name: str, place: Place) -> None:
        """Match a tuple: it cannot be changed, so that what is replaced in it replaces it."""
        match = self._match
        edits, tuples = len(match.edits), len(match.tuples)
        items = list(into)
        self._items(into, items, nodes, name)
        if match.changes(items, edits, tuples):
            match.tuples.append(TupleEdit(place, into, items, name))

    # -- objects ------------------------------------------------------------------------------

    def _object(self, into: Any, node: Node, name: str) -> None:
        if isinstance(into, torch.nn.Module):
            self._module(into, node, name)
            return
        if isinstance(into, torch.optim.Optimizer):
            self._optimizer(into, node, name)
            return
        self._match.objects.append(Loading(into, name, node))

    def _optimizer(self, into: torch.optim.Optimizer, node: Node, name: str) -> None:
        reasons = optimizer_reasons(into, node, self._leaves, name)
        self._match.reasons += reasons
        casts = {} if reasons else state_casts(into, node, self._leaves, self._wish.cast)
        prefix = f"{name}." if name else ""
        for (label, entry), (saved, own) in casts.items():
            self._converts(f"{prefix}state.{label}.{entry}", saved, dtype_name(own))
        dtypes = {key: own.dtype for key, (_, own) in casts.items()}
        self._match.objects.append(Loading(into, name, node, casts=dtypes))

    def _module(self, into: torch.nn.Module, node: Node, name: str) -> None:
        module, state, node = paired(into, node)
        if isinstance(state, dict) and fills_in_place(module, state):
            self._dict(state, node, name, takes_all=False)
            return
        own = dict(state) if isinstance(state, dict) else {}
        keys = frozenset(own)
        own.update(module.named_parameters())
        by_torch = set(loaded_by_torch(module))
        for key, value in entries(node).items():
            tensor = own.get(key)
            if isinstance(tensor, torch.Tensor) and isinstance(value, TensorNode):
                leaf = self._leaves[value.i]
                full = f"{name}.{key}" if name else str(key)
                self._loaded_tensor(tensor, leaf, full, key in by_torch)
        self._match.objects.append(Loading(module, name, node, keys))

    def _loaded_tensor(self, own: torch.Tensor, leaf: Leaf, name: str, by_torch: bool) -> None:
        """Match a tensor of a module that loads by itself, of which that may not say enough."""
        # torch takes the first element of what was saved when numbers had a dimension
        if (
            by_torch
            and leaf.shape != list(own.shape)
            and not (own.ndim == 0 and len(leaf.shape) == 1)
        ):
            self._match.reasons.append(
                f"{name}: saved with shape {leaf.shape}, the state has {list(own.shape)}"
            )
        if own.is_meta:
            self._match.reasons.append(f"{name}: {refusal(own)}")
        elif leaf.dtype.name != dtype_name(own) and can_cast(leaf.dtype.name, own):
            self._converts(name, leaf.dtype.name, dtype_name(own))

    def _converts(self, name: str, saved: str, own: str) -> None:
        """Note that torch would convert a tensor without a word."""
        self._match.cast_names.append(name)
        if not self._wish.cast:
            self._match.reasons.append(
                f"{name}: saved with dtype {saved}, the state has {own} (cast=True converts it)"
            )


_SEQUENCES = (ListNode, TupleNode, NamedTupleNode)


def _is_plain(value: Any, depth: int = 0) -> bool:
    if depth > MAX_DEPTH:  # a list that is in itself
        return False
    if isinstance(value, dict):
        return all(_is_plain(item, depth + 1) for item in value.values())
    if isinstance(value, (list, tuple, collections.deque)):
        return all(_is_plain(item, depth + 1) for item in value)
    return is_value(value)


def _has_leaves(value: Any) -> bool:
    if isinstance(value, torch.nn.Module):
        return bool(value.state_dict())
    if isinstance(value, (dict, list, tuple)):
        return bool(value)
    return callable(getattr(value, "load_state_dict", None))
