"""Flatten: any nest of containers and leaves, taken apart.

`flatten` turns a live state into records (format/tree.py) and a list of leaves with bulk: tensors,
arrays, long bytes; format/build.py puts them together again. Fqns join keys with dots. They name
things for people and for ``keys=``; the tree, not the fqn, is what identifies a leaf, so keys that
contain dots lose nothing. Pure: no threads, no files, no clock.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Union

import numpy as np
import torch

from ..errors import FormatError, Problem, StateError
from ..format.build import build_keys, named_tuple
from ..format.dtypes import DTYPES
from ..format.files import MAX_DIMS
from ..format.kinds import MADE, PLAIN, Made, Plain
from ..format.tree import (
    MAX_DEPTH,
    MAX_ONE_HASH,
    NAMES,
    BytesNode,
    DictNode,
    ListNode,
    MadeNode,
    NamedTupleNode,
    Node,
    NumpyNode,
    ObjectNode,
    OrderedDictNode,
    PlainNode,
    TensorNode,
    TupleNode,
    TypedNode,
    has_typed,
    is_key,
    key_name,
    numpy_scalar,
)
from .classes import BY_TYPE, class_name, has_method, has_plain_form, plain_form, vars_of
from .kinds import Parts, is_wrapper, plain_memory, tensor_parts, wrapper_parts
from .late import frozen, late_copies
from .literals import LITERALS
from .refusals import hint_for, is_distributed, one_hash, tensor_refusal, type_name
from .values import TORCH_DTYPES

INLINE_BYTES = 256
"""Longer ``bytes`` values go into chunks instead of into the tree."""

_KNOWN = frozenset(dtype for name, dtype in TORCH_DTYPES.items() if name in DTYPES)

Bulk = Union[torch.Tensor, "np.ndarray[Any, Any]", bytes]


@dataclass(slots=True)
class Flat:
    """A state taken apart.

    Attributes:
        tree: the node records.
        names: fqn of every leaf with bulk.
        values: those leaves, live: tensors share memory with the state until they are staged.
        objects: every object whose ``state_dict()`` was called, in order of appearance.
        late: of every leaf, whether its copy may go on until the next ``optimizer.step()``.
        frozen: of every leaf, whether it is not expected to change.
        on_device: some leaf is on a device, of which copies are asynchronous.
    """

    tree: Node = None
    names: list[str] = field(default_factory=list)
    values: list[Bulk] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)
    late: list[bool] = field(default_factory=list)
    frozen: list[bool] = field(default_factory=list)
    on_device: bool = False


def flatten(
    state: Any, owns: Callable[[torch.Tensor], bool] | None = None, *, overlap: bool = False
) -> Flat:
    """Take ``state`` apart. Calls ``state_dict()`` on objects; copies no tensor.

    Args:
        owns: says whether a tensor is on a device that copies asynchronously; None: there is none.
        overlap: let copies from there go on during the next forward and backward pass, of what only
            ``optimizer.step()`` changes, as far as is known: the parameters and the optimizer state
            of live modules and optimizers. (A module's buffers change in the forward pass already.)

    Raises:
        StateError: it has values that cannot be saved; names all of them.
    """
    flat = Flat()
    flattener = _Flattener(flat)
    flat.tree = flattener.node(state, "", 0)
    if flattener.problems:
        raise StateError(problems=flattener.problems) from flattener.cause
    flat.late, flat.on_device = [False] * len(flat.values), False
    flat.frozen = frozen(flat.values, flat.objects)
    if owns is not None:
        flat.late, flat.on_device = late_copies(flat.values, flat.objects, owns, overlap=overlap)
    return flat


class _Flattener:
    """Takes values apart; what cannot be saved is listed, and None in its place."""

    def __init__(self, flat: Flat) -> None:
        self._flat = flat
        self.problems: list[Problem] = []
        self.cause: Exception | None = None
        self._exact: dict[type, Callable[[Any, str, int], Node]] = {
            torch.Tensor: self._tensor,
            torch.nn.Parameter: self._tensor,
            dict: self._dict,
            collections.OrderedDict: self._ordered_dict,
            list: lambda value, name, depth: ListNode(self._items(value, name, depth)),
            tuple: lambda value, name, depth: TupleNode(self._items(value, name, depth)),
            np.ndarray: self._array,
            bytes: self._bytes,
            **LITERALS,
            torch.Generator: self._generator,
            **{row.type: self._plain(row) for row in PLAIN.values() if row.type},
            **{row.type: self._made(row) for row in MADE.values() if row.type},
            **dict.fromkeys(BY_TYPE, self._registered),
        }

    def node(self, value: Any, name: str, depth: int) -> Node:
        handler = self._exact.get(type(value))
        if handler is not None:
            return handler(value, name, depth)
        if isinstance(value, np.generic):
            return self._numpy_scalar(value, name, depth)
        if isinstance(value, torch.Tensor):
            return self._subclass(value, name, depth)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._namedtuple(value, name, depth)
        if has_method(value, "state_dict"):
            return self._object(value, name, depth)
        if has_plain_form(value):
            return self._typed(class_name(type(value)), plain_form, value, name, depth)
        return self._refuse(name, type_name(value), hint_for(value))

    def _refuse(self, name: str, kind: str, hint: str, cause: Exception | None = None) -> Node:
        """Note that a value cannot be saved; return what stands for it meanwhile."""
        self.problems.append(Problem(name, kind, hint))
        self.cause = self.cause or cause
        return None

    # -- containers ---------------------------------------------------------------------------

    def _items(self, value: Iterable[Any], name: str, depth: int) -> list[Node]:
        self._check_depth(name, depth)
        prefix = f"{name}." if name else ""
        return [self.node(item, f"{prefix}{i}", depth + 1) for i, item in enumerate(value)]

    def _dict(self, value: dict[Any, Any], name: str, depth: int) -> Node:
        return DictNode(*self._entries(value, name, depth))

    def _ordered_dict(self, value: Any, name: str, depth: int) -> Node:
        keys, values = self._entries(value, name, depth)
        metadata = getattr(value, "_metadata", None)
        if metadata is not None:
            metadata = self.node(metadata, f"{name}._metadata", depth + 1)
        if beside := vars_of(value).keys() - {"_metadata"}:
            hint = f"it has attributes, as {min(beside)!r}, which would be lost"
            return self._refuse(name, type_name(value), hint)
        return OrderedDictNode(keys, values, metadata)

    def _entries(
        self, value: dict[Any, Any], name: str, depth: int
    ) -> tuple[list[Node], list[Node]]:
        self._check_depth(name, depth)
        prefix = f"{name}." if name else ""
        exact, before = self._exact, len(self.problems)
        texts = True
        keys: list[Node] = []
        values: list[Node] = []
        for key, item in value.items():
            if type(key) is str:
                child = prefix + key
                keys.append(LITERALS[str](key))
            else:
                texts = False
                keys.append(self._key(key, prefix, depth))
                child = prefix + key_name(keys[-1])
            handler = exact.get(type(item), self.node)  # the hot loop of states with many leaves
            values.append(handler(item, child, depth + 1))
        if not texts and len(self.problems) == before:
            self._check_keys(keys, name, type_name(value))
        return keys, values

    def _key(self, key: Any, prefix: str, depth: int) -> Node:
        node = self.node(key, f"{prefix}<key>", depth + 1)
        if not is_key(node):
            return self._refuse(
                f"{prefix}<key>",
                type_name(key),
                "it is, or holds, what cannot be a key in a checkpoint; use a str, a number, None, "
                "short bytes, or a tuple of those",
            )
        return node

    def _check_keys(self, nodes: list[Node], name: str, kind: str) -> None:
        """Refuse keys, or items, of a dict or set that a reader would.

        Those that have one hash: looking them up takes quadratic time. And those that are the same
        as plain data.
        """
        plain = build_keys(nodes, NAMES)
        if len(nodes) > MAX_ONE_HASH and (many := one_hash(plain)):
            hint = (
                f"{many[0]} of its keys or items have the same hash, {many[1]}, and no more than "
                f"{MAX_ONE_HASH} may; save it as a list, list(value.items()) say"
            )
            self._refuse(name, kind, hint)
        elif any(map(has_typed, nodes)) and len(set(plain)) < len(plain):
            hint = "two of its keys or items are the same as plain data; save it as a list"
            self._refuse(name, kind, hint)

    def _namedtuple(self, value: Any, name: str, depth: int) -> Node:
        try:
            named_tuple(type(value).__name__, tuple(value._fields))
        except (FormatError, ValueError, TypeError) as cause:
            hint = (
                f"as a NamedTuple its names could not be restored ({cause}); pass tuple(value) or "
                "value._asdict()"
            )
            return self._refuse(name, type_name(value), hint, cause)
        if vars_of(value):
            hint = f"it has attributes, as {next(iter(vars_of(value)))!r}, which would be lost"
            return self._refuse(name, type_name(value), hint)
        items = self._items(value, name, depth)
        return NamedTupleNode(type(value).__name__, list(value._fields), items)

    def _object(self, value: Any, name: str, depth: int) -> Node:
        self._check_depth(name, depth)
        try:
            state = value.state_dict()
        except Exception as cause:
            hint = f"its state_dict() raised {type(cause).__name__}: {cause}"
            return self._refuse(name, type_name(value), hint, cause)
        self._flat.objects.append(value)
        return ObjectNode(class_name(type(value)), self.node(state, name, depth + 1))

    def _check_depth(self, name: str, depth: int) -> None:
        if depth >= MAX_DEPTH:
            hint = (
                f"the state is nested more than {MAX_DEPTH} levels deep there; does a container "
                "hold itself?"
            )
            self._refuse(f"{name[:80]}…", "container", hint)
            raise StateError(problems=self.problems)  # who holds himself twice would never end

    # -- values made of others ------------------------------------------------------------------

    def _plain(self, row: Plain) -> Callable[[Any, str, int], Node]:
        def node(value: Any, name: str, depth: int) -> Node:
            before = len(self.problems)
            of = self._part(row.apart, value, name, depth)
            if len(self.problems) > before:
                return None
            if not is_key(of):
                hint = "it holds what is no plain value; use a list in its place"
                return self._refuse(name, type_name(value), hint)
            if isinstance(of, TupleNode) and isinstance(value, (set, frozenset)):
                self._check_keys(of.items, name, type_name(value))
            return PlainNode(row.name, of)

        return node

    def _made(self, row: Made) -> Callable[[Any, str, int], Node]:
        def node(value: Any, name: str, depth: int) -> Node:
            taken = self._taken(row.apart, value, name, depth)
            return self._made_of((row.name, *taken[0]), name, depth) if taken else None

        return node

    def _made_of(self, parts: Parts, name: str, depth: int) -> Node:
        kind, of, args = parts
        return MadeNode(kind, self.node(of, name, depth + 1), self.node(args, name, depth + 1))

    def _part(self, apart: Callable[[Any], Any], value: Any, name: str, depth: int) -> Node:
        """Return the record of what a value is made of."""
        taken = self._taken(apart, value, name, depth)
        return self.node(taken[0], name, depth + 1) if taken else None

    def _taken(
        self, apart: Callable[[Any], Any], value: Any, name: str, depth: int
    ) -> tuple[Any] | None:
        """Return what ``apart`` makes of a value; None if it cannot, which is noted."""
        self._check_depth(name, depth)
        try:
            return (apart(value),)
        except Exception as cause:
            said = f"taking it apart raised {type(cause).__name__}: {cause}"
            hint = str(cause) if isinstance(cause, ValueError) else said
            self._refuse(name, type_name(value), hint, cause)
            return None

    def _typed(
        self, kind: str, apart: Callable[[Any], Any], value: Any, name: str, depth: int
    ) -> Node:
        return TypedNode(kind, self._part(apart, value, name, depth))

    def _registered(self, value: Any, name: str, depth: int) -> Node:
        known = BY_TYPE[type(value)]
        return self._typed(known.name, known.to_plain, value, name, depth)

    def _generator(self, value: torch.Generator, name: str, depth: int) -> Node:
        of = {"device": value.device, "state": value.get_state()}
        return self._made_of(("torch.Generator", of, None), name, depth)

    # -- leaves with bulk -----------------------------------------------------------------------

    def _bulk(self, value: Bulk, name: str) -> Node:
        flat = self._flat
        flat.names.append(name)
        flat.values.append(value)
        return TensorNode(len(flat.values) - 1)

    def _tensor(self, value: torch.Tensor, name: str, depth: int) -> Node:
        if (
            value.layout is not torch.strided
            or value.dtype not in _KNOWN
            or value.is_meta
            or value.is_nested
            or value.dim() > MAX_DIMS
        ):
            parts = tensor_parts(value)
            if parts is None:
                return self._refuse(name, *tensor_refusal(value))
            return self._made_of(parts, name, depth)
        flat = self._flat  # as in _bulk(), without the call
        flat.names.append(name)
        flat.values.append(value)
        return TensorNode(len(flat.values) - 1)

    def _subclass(self, value: torch.Tensor, name: str, depth: int) -> Node:
        if torch.nn.parameter.is_lazy(value) or value.is_meta or is_distributed(value):
            return self._refuse(name, *tensor_refusal(value))
        if value.is_nested:
            return self._made_of(_known(tensor_parts(value)), name, depth)
        if is_wrapper(value):
            return self._typed(class_name(type(value)), wrapper_parts, value, name, depth)
        bare = plain_memory(value)
        if bare is None:
            return self._refuse(name, *tensor_refusal(value))
        return TypedNode(class_name(type(value)), self._tensor(bare, name, depth))

    def _array(self, value: np.ndarray[Any, Any], name: str, depth: int) -> Node:
        if value.dtype.names is not None:
            return self._made(MADE["numpy.ndarray"])(value, name, depth)
        if value.dtype.kind not in "?biufcSUMm" or value.dtype.itemsize == 0:
            hint = "it holds Python objects or nothing; save its columns as plain numeric arrays"
            return self._refuse(name, f"NumPy array of dtype {value.dtype}", hint)
        return self._bulk(value, name)

    def _bytes(self, value: bytes, name: str, depth: int) -> Node:
        return BytesNode(value) if len(value) <= INLINE_BYTES else self._bulk(value, name)

    def _numpy_scalar(self, value: Any, name: str, depth: int) -> Node:
        if value.dtype.names is not None:
            return self._made(MADE["numpy.void"])(value, name, depth)
        if value.dtype.kind in "?biufcSUMm" and value.dtype.itemsize:
            node = NumpyNode(value.dtype.str, value.tobytes())
            if value.dtype.kind not in "SU" or numpy_scalar(node) == value:
                return node  # NumPy's text loses its last NULs
        hint = "it cannot be kept exactly; save a plain value, as in value.item()"
        return self._refuse(name, f"NumPy scalar of dtype {value.dtype}", hint)


def _known(parts: Parts | None) -> Parts:
    assert parts is not None
    return parts
