"""State trees: any nest of containers and leaves, to records that can be written, and back.

This module owns the *node* records, which are the ``tree`` of a rank manifest (FORMAT.md), and the
two walks over them: `flatten` takes a live state apart, `unflatten` builds a new one. Values with
bulk (tensors, arrays, long bytes) are left out of the tree and numbered; everything else is in it,
exact. Pure: no threads, no files, no clock.

Fqns join keys with dots. They name things for people and for ``keys=``; the tree, not the fqn, is
what identifies a leaf, so keys that contain dots lose nothing.
"""

from __future__ import annotations

import collections
import fnmatch
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

import msgspec
import numpy as np
import torch

from ..errors import FormatError, StateError

MAX_DEPTH = 64
"""Containers nested deeper than this are taken for a cycle, and refused on load too."""

INLINE_BYTES = 256
"""Longer ``bytes`` values go into chunks instead of into the tree."""

_SAFE_INT = 2**53  # beyond it, JSON readers that use doubles would round


class _Node(msgspec.Struct, frozen=True, tag_field="t", omit_defaults=True):
    pass


class TensorNode(_Node, frozen=True, tag="tensor"):
    """A leaf with bulk; ``i`` numbers it in the manifest's ``tensors``."""

    i: int


class DictNode(_Node, frozen=True, tag="dict"):
    keys: list[Node]
    values: list[Node]


class OrderedDictNode(_Node, frozen=True, tag="odict"):
    """``metadata`` is the ``_metadata`` that ``Module.state_dict`` hangs on its result."""

    keys: list[Node]
    values: list[Node]
    metadata: Node = None


class ListNode(_Node, frozen=True, tag="list"):
    items: list[Node]


class TupleNode(_Node, frozen=True, tag="tuple"):
    items: list[Node]


class NamedTupleNode(_Node, frozen=True, tag="namedtuple"):
    name: str
    fields: list[str]
    items: list[Node]


class ObjectNode(_Node, frozen=True, tag="object"):
    """An object with ``state_dict()``: the name of its type, for people, and what it returned."""

    type: str
    state: Node


class IntNode(_Node, frozen=True, tag="int"):
    """An integer beyond ±2⁵³, as hexadecimal text with an optional leading minus."""

    hex: str


class FloatNode(_Node, frozen=True, tag="float"):
    """inf or nan, as the 16 hexadecimal digits of its IEEE 754 bits, most significant first."""

    hex: str


class ComplexNode(_Node, frozen=True, tag="complex"):
    """Real then imaginary part, each as in FloatNode: 32 digits."""

    hex: str


class BytesNode(_Node, frozen=True, tag="bytes"):
    data: bytes


class StrNode(_Node, frozen=True, tag="str"):
    """Text with lone surrogates, which JSON cannot hold: UTF-8 with ``surrogatepass``."""

    data: bytes


class SizeNode(_Node, frozen=True, tag="size"):
    dims: list[int]


class DtypeNode(_Node, frozen=True, tag="dtype"):
    name: str


class DeviceNode(_Node, frozen=True, tag="device"):
    name: str


class NumpyNode(_Node, frozen=True, tag="numpy"):
    """A NumPy scalar: ``dtype.str`` and its bytes."""

    dtype: str
    data: bytes


Node = Union[  # noqa: UP007 - a forward reference, resolved by msgspec
    None,
    bool,
    int,
    float,
    str,
    TensorNode,
    DictNode,
    OrderedDictNode,
    ListNode,
    TupleNode,
    NamedTupleNode,
    ObjectNode,
    IntNode,
    FloatNode,
    ComplexNode,
    BytesNode,
    StrNode,
    SizeNode,
    DtypeNode,
    DeviceNode,
    NumpyNode,
]

Bulk = Union[torch.Tensor, "np.ndarray[Any, Any]", bytes]


@dataclass(slots=True)
class Flat:
    """A state taken apart.

    Attributes:
        tree: the node records.
        names: fqn of every leaf with bulk.
        values: those leaves, live: tensors share memory with the state until they are staged.
        objects: every object whose ``state_dict()`` was called, in order of appearance.
    """

    tree: Node = None
    names: list[str] = field(default_factory=list)
    values: list[Bulk] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)


def flatten(state: Any) -> Flat:
    """Take ``state`` apart. Calls ``state_dict()`` on objects; copies no tensor.

    Raises:
        StateError: a value of a kind that cannot be saved; names its fqn and its type.
    """
    flat = Flat()
    flat.tree = _Flattener(flat).node(state, "", 0)
    return flat


class _Flattener:
    def __init__(self, flat: Flat) -> None:
        self._flat = flat
        self._exact: dict[type, Callable[[Any, str, int], Node]] = {
            torch.Tensor: self._tensor,
            torch.nn.Parameter: self._tensor,
            dict: self._dict,
            collections.OrderedDict: self._ordered_dict,
            collections.defaultdict: self._dict,
            list: lambda value, name, depth: ListNode(self._items(value, name, depth)),
            tuple: lambda value, name, depth: TupleNode(self._items(value, name, depth)),
            np.ndarray: self._array,
            type(None): _same,
            bool: _same,
            int: _int,
            float: _float,
            complex: lambda value, *_: ComplexNode(
                struct.pack(">dd", value.real, value.imag).hex()
            ),
            str: _str,
            bytes: self._bytes,
            torch.Size: lambda value, *_: SizeNode(list(value)),
            torch.dtype: lambda value, *_: DtypeNode(str(value).removeprefix("torch.")),
            torch.device: lambda value, *_: DeviceNode(str(value)),
        }

    def node(self, value: Any, name: str, depth: int) -> Node:
        handler = self._exact.get(type(value))
        if handler is not None:
            return handler(value, name, depth)
        if isinstance(value, np.generic):
            return _numpy_scalar(value, name)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return NamedTupleNode(
                type(value).__name__, list(value._fields), self._items(value, name, depth)
            )
        if callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
            self._flat.objects.append(value)
            inner = self.node(value.state_dict(), name, depth + 1)
            return ObjectNode(f"{type(value).__module__}.{type(value).__qualname__}", inner)
        raise StateError(_refusal(value, name))

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
        return OrderedDictNode(keys, values, metadata)

    def _entries(
        self, value: dict[Any, Any], name: str, depth: int
    ) -> tuple[list[Node], list[Node]]:
        self._check_depth(name, depth)
        prefix = f"{name}." if name else ""
        exact = self._exact
        keys: list[Node] = []
        values: list[Node] = []
        for key, item in value.items():
            child = f"{prefix}{key}"
            keys.append(_str(key) if type(key) is str else self._key(key, child, depth))
            handler = exact.get(type(item), self.node)  # the hot loop of states with many leaves
            values.append(handler(item, child, depth + 1))
        return keys, values

    def _key(self, key: Any, name: str, depth: int) -> Node:
        bulk = len(self._flat.values)
        node = self.node(key, name, depth + 1)
        if len(self._flat.values) != bulk or isinstance(node, (ObjectNode, ListNode, DictNode)):
            raise StateError(
                f"the dict key {key!r:.80} at {name!r} is a {_type_name(key)}, which cannot be a "
                "key in a checkpoint; use a str, a number, None, short bytes, or a tuple of those"
            )
        return node

    def _check_depth(self, name: str, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise StateError(
                f"the state is nested more than {MAX_DEPTH} levels deep at {name[:80]!r}…; "
                "does a container hold itself?"
            )

    def _bulk(self, value: Bulk, name: str) -> Node:
        flat = self._flat
        flat.names.append(name)
        flat.values.append(value)
        return TensorNode(len(flat.values) - 1)

    def _tensor(self, value: torch.Tensor, name: str, depth: int) -> Node:
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise StateError(_tensor_refusal(value, name))
        return self._bulk(value, name)

    def _array(self, value: np.ndarray[Any, Any], name: str, depth: int) -> Node:
        if value.dtype.kind not in "?biufcSUMm" or value.dtype.itemsize == 0:
            raise StateError(
                f"{name!r} is a NumPy array of dtype {value.dtype}, which holds Python objects, "
                "records or nothing; save its columns as plain numeric arrays"
            )
        return self._bulk(value, name)

    def _bytes(self, value: bytes, name: str, depth: int) -> Node:
        return BytesNode(value) if len(value) <= INLINE_BYTES else self._bulk(value, name)


def _same(value: Any, *_: Any) -> Node:
    return value  # type: ignore[no-any-return]


def _int(value: int, *_: Any) -> Node:
    return value if -_SAFE_INT <= value <= _SAFE_INT else IntNode(f"{value:x}")


def _float(value: float, *_: Any) -> Node:
    finite = value - value == 0.0
    return value if finite else FloatNode(struct.pack(">d", value).hex())


def _str(value: str, *_: Any) -> Node:
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        return StrNode(value.encode("utf-8", "surrogatepass"))
    return value


def _numpy_scalar(value: np.generic, name: str) -> Node:
    if value.dtype.kind not in "?biufcSUMm":
        raise StateError(f"{name!r} is a NumPy scalar of dtype {value.dtype}; save a plain value")
    return NumpyNode(value.dtype.str, value.tobytes())


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _refusal(value: Any, name: str) -> str:
    where = f"{name!r}" if name else "the state itself"
    if isinstance(value, torch.Tensor):
        return _tensor_refusal(value, name)
    if isinstance(value, torch.Generator):
        hint = "save generator.get_state(), or asyncsave.RngState() for the global generators"
    elif isinstance(value, dict):
        hint = "pass dict(value)"
    elif isinstance(value, (set, frozenset)):
        hint = "pass sorted(value) or list(value)"
    elif isinstance(value, (bytearray, memoryview)):
        hint = "pass bytes(value)"
    elif isinstance(value, (int, float, str, list, tuple)):
        hint = "pass the plain value, as in int(value), str(value) or list(value)"
    elif callable(value):
        hint = "code is never saved: leave it out and make it anew when you load"
    else:
        hint = (
            "give it state_dict() and load_state_dict(), or save what it is made of "
            "(tensors, arrays, numbers, strings, dicts, lists); nothing is ever pickled"
        )
    return f"{where} is a {_type_name(value)}, which asyncsave cannot save: {hint}"


def _tensor_refusal(value: torch.Tensor, name: str) -> str:
    if value.is_meta:
        why, hint = "is on the meta device and has no data", "materialise it before saving"
    elif value.layout is not torch.strided:
        why = f"has layout {value.layout}"
        hint = "save value.to_dense(), or its indices and values"
    elif value.is_quantized:
        why, hint = "is quantized", "save value.int_repr(), its scale and its zero point"
    else:
        why = f"is a {_type_name(value)}, a tensor subclass"
        hint = "save the plain tensor (to_local(), full_tensor(), or as_subclass(torch.Tensor))"
    return f"the tensor {name!r} {why}, which asyncsave cannot save: {hint}"


# -- and back ---------------------------------------------------------------------------------


def unflatten(tree: Node, bulk: Callable[[int], Any]) -> Any:
    """Build a new state from node records.

    Args:
        tree: records that `validate` accepted.
        bulk: gives the value of the i-th leaf with bulk.

    Raises:
        FormatError: a record says something that cannot be, such as a device with no such name.
    """
    try:
        return _build(tree, bulk)
    except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as cause:
        if isinstance(cause, FormatError):
            raise
        raise FormatError(f"the checkpoint's tree has an impossible value: {cause}") from cause


def _build(node: Node, bulk: Callable[[int], Any]) -> Any:
    if isinstance(node, TensorNode):
        return bulk(node.i)
    if isinstance(node, (DictNode, OrderedDictNode)):
        pairs = [
            (_build(key, bulk), _build(value, bulk))
            for key, value in zip(node.keys, node.values, strict=True)
        ]
        if isinstance(node, DictNode):
            return dict(pairs)
        ordered: Any = collections.OrderedDict(pairs)
        if node.metadata is not None:
            ordered._metadata = _build(node.metadata, bulk)
        return ordered
    if isinstance(node, ListNode):
        return [_build(item, bulk) for item in node.items]
    if isinstance(node, TupleNode):
        return tuple(_build(item, bulk) for item in node.items)
    if isinstance(node, NamedTupleNode):
        made = _namedtuple(node.name, tuple(node.fields))
        return made(*(_build(item, bulk) for item in node.items))
    if isinstance(node, ObjectNode):
        return _build(node.state, bulk)
    return plain(node)


def plain(node: Node) -> Any:
    """Return the value of a record that is neither a container nor bulk."""
    match node:
        case IntNode():
            return int(node.hex, 16)
        case FloatNode():
            return struct.unpack(">d", bytes.fromhex(node.hex))[0]
        case ComplexNode():
            return complex(*struct.unpack(">dd", bytes.fromhex(node.hex)))
        case BytesNode():
            return node.data
        case StrNode():
            return node.data.decode("utf-8", "surrogatepass")
        case SizeNode():
            return torch.Size(node.dims)
        case DtypeNode():
            dtype = getattr(torch, node.name, None)
            if not isinstance(dtype, torch.dtype):
                raise FormatError(f"the checkpoint names the dtype {node.name!r:.40}, unknown here")
            return dtype
        case DeviceNode():
            return torch.device(node.name)
        case NumpyNode():
            return numpy_scalar(node)
        case _:
            return node


def numpy_scalar(node: NumpyNode) -> np.generic:
    """Return the scalar of a NumpyNode whose dtype `numpy_dtype` accepts."""
    dtype = numpy_dtype(node.dtype)
    if dtype.itemsize != len(node.data):
        raise FormatError(f"a NumPy scalar of dtype {node.dtype!r} has {len(node.data)} bytes")
    return np.frombuffer(node.data, dtype=dtype)[0]  # type: ignore[no-any-return]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype that ``name`` (a ``dtype.str``) says, if it is one that can be saved."""
    try:
        dtype = np.dtype(name) if len(name) <= 32 else None
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or dtype.kind not in "?biufcSUMm" or dtype.str != name:
        raise FormatError(
            f"the checkpoint names the NumPy dtype {name!r:.40}, which is not allowed"
        )
    return dtype


_made: dict[tuple[str, tuple[str, ...]], Any] = {}


def _namedtuple(name: str, fields: tuple[str, ...]) -> Any:
    # namedtuple() refuses whatever is not an identifier, so no record can smuggle in code
    if len(fields) > 256 or len(name) > 256 or any(len(part) > 256 for part in fields):
        raise FormatError("the checkpoint has a NamedTuple with too many or too long names")
    key = (name, fields)
    if key not in _made:
        if len(_made) >= 1024:
            _made.clear()
        _made[key] = collections.namedtuple(name, fields)
    return _made[key]


# -- names ------------------------------------------------------------------------------------

_CONTAINERS = (
    DictNode,
    OrderedDictNode,
    ListNode,
    TupleNode,
    NamedTupleNode,
    ObjectNode,
)


def children(node: Node) -> Iterator[tuple[str, Node]]:
    """Yield the name and record of what a container holds; nothing for a leaf."""
    if isinstance(node, (DictNode, OrderedDictNode)):
        for key, value in zip(node.keys, node.values, strict=True):
            yield str(_build(key, _no_bulk)), value
    elif isinstance(node, (ListNode, TupleNode, NamedTupleNode)):
        for i, item in enumerate(node.items):
            yield str(i), item


def _no_bulk(i: int) -> Any:
    raise FormatError("the checkpoint has a tensor as a dict key")


def select(tree: Node, keys: str | Sequence[str]) -> tuple[Node, list[str]]:
    """Return ``tree`` without what ``keys`` does not name, and the keys that named nothing.

    A key is a glob (``*`` also matches dots) for a leaf or for a container, which then stays
    whole. In dicts the other entries go; in lists and tuples they become None, so that positions
    stay as they were.
    """
    patterns = [keys] if isinstance(keys, str) else list(keys)
    used: set[str] = set()

    def wanted(name: str) -> bool:
        hits = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
        used.update(hits)
        return bool(hits)

    def walk(node: Node, name: str) -> tuple[bool, Node]:
        if name and wanted(name):
            if len(used) < len(patterns):  # a key for something inside is no mistake
                for inner_name in _names(node, name):
                    wanted(inner_name)
            return True, node
        if isinstance(node, ObjectNode):
            kept, inner = walk(node.state, name)
            return kept, msgspec.structs.replace(node, state=inner) if kept else None
        if not isinstance(node, _CONTAINERS):
            return False, None
        prefix = f"{name}." if name else ""
        results = [walk(value, prefix + key) for key, value in children(node)]
        if not any(kept for kept, _ in results):
            return False, None
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


def _names(node: Node, name: str) -> Iterator[str]:
    if isinstance(node, ObjectNode):
        yield from _names(node.state, name)
    for key, child in children(node):
        yield f"{name}.{key}"
        yield from _names(child, f"{name}.{key}")


def bulk_indices(tree: Node) -> list[int]:
    """Return the numbers of all leaves with bulk in ``tree``, in order."""
    if isinstance(tree, TensorNode):
        return [tree.i]
    if isinstance(tree, ObjectNode):
        return bulk_indices(tree.state)
    return [i for _, child in children(tree) for i in bulk_indices(child)]
