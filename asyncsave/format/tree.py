"""Nodes: the records that a state tree is written as, which are a manifest's ``tree``.

FORMAT.md is their specification. Containers are nodes of nodes; values with bulk are left out and
numbered (`TensorNode`); everything else is in its record, exact. Also here: what a record's value
is, and the names (fqns) of what is in a tree. Knows no torch: what its sizes, dtypes and devices
are made of is given (`Values`). Pure: no threads, no files, no clock.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Union

import msgspec
import numpy as np

from ..errors import FormatError
from .dtypes import numpy_dtype

MAX_DEPTH = 64
"""Containers nested deeper than this are taken for a cycle, and refused on load too."""

MAX_ONE_HASH = 64
"""Of the keys of a dict, so many may have the same hash."""

_HEX_INT = re.compile("-?[0-9a-f]+")

# torch keeps the number of a device in a signed byte
_DEVICE = re.compile(r"[a-z][a-z0-9_]{0,39}(:([0-9]|[1-9][0-9]|1[01][0-9]|12[0-7]))?")


class _Node(msgspec.Struct, frozen=True, tag_field="t", omit_defaults=True):
    pass


class TensorNode(_Node, frozen=True, gc=False, tag="tensor"):
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


class ObjectNode(_Node, frozen=True, tag="object", rename={"of": "state"}):
    """An object with ``state_dict()``: the name of its type, for people, and what it returned."""

    type: str
    of: Node


class TypedNode(_Node, frozen=True, tag="typed"):
    """A value of a class of the program's: the class's name, and the plain value ``of`` it.

    A name is data: a reader gives the plain value, except for names that its program has registered
    itself.
    """

    type: str
    of: Node


class MadeNode(_Node, frozen=True, tag="made"):
    """A value that is made of others, which may have bulk: of a type in the list MADE, kinds.py.

    ``args`` is a key, the rest of what it is made of.
    """

    type: str
    of: Node
    args: Node = None


class PlainNode(_Node, frozen=True, tag="plain"):
    """A plain value of a type in the list PLAIN, kinds.py, and a key, what it is made of."""

    type: str
    of: Node


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
    TypedNode,
    MadeNode,
    PlainNode,
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


@dataclass(frozen=True, slots=True)
class Values:
    """What makes those plain values of which torch has types of its own.

    Attributes:
        size: makes a tensor's lengths.
        dtype: makes a dtype of its name without ``torch.``.
        device: makes a device of its name, as in ``cuda:0``.
        made: makes a value of one of torch's types in kinds.py: of its name there, of what it is
            made of, and of the rest.
        typed: makes a value of a class of the program's, of its name and its plain value.
    """

    size: Callable[[list[int]], Any]
    dtype: Callable[[str], Any]
    device: Callable[[str], Any]
    made: Callable[[str, Any, Any], Any]
    typed: Callable[[str, Any], Any]


NAMES = Values(
    size=tuple,
    dtype=DtypeNode,
    device=DeviceNode,
    made=lambda name, of, args: (name, of, args),
    typed=lambda name, of: of,
)
"""Without torch, equal where torch's are: to check records, also as keys."""


def plain(node: Node, values: Values = NAMES) -> Any:
    """Return the value of a record that is neither a container nor bulk.

    Raises:
        FormatError: there is no such value; or what ``IMPOSSIBLE`` in build.py lists.
    """
    match node:
        case IntNode():
            if not _HEX_INT.fullmatch(node.hex):
                raise FormatError(f"the checkpoint has the integer {node.hex!r:.40}")
            return int(node.hex, 16)
        case FloatNode():
            return struct.unpack(">d", bytes.fromhex(node.hex))[0]
        case ComplexNode():
            return complex(*struct.unpack(">dd", bytes.fromhex(node.hex)))
        case BytesNode():
            return node.data
        case StrNode():
            return node.data.decode("utf-8", "surrogatepass")
        case SizeNode() | DtypeNode() | DeviceNode():
            return _of_torch(node, values)
        case NumpyNode():
            return numpy_scalar(node)
        case _:
            return node


def _of_torch(node: SizeNode | DtypeNode | DeviceNode, values: Values) -> Any:
    if isinstance(node, SizeNode):
        if not all(-(2**63) <= dim < 2**63 for dim in node.dims):
            raise FormatError("the checkpoint has a torch.Size with a number beyond 64 bits")
        return values.size(node.dims)
    name = node.name
    if isinstance(node, DeviceNode):
        if not _DEVICE.fullmatch(name):
            raise FormatError(f"the checkpoint has the device {name!r:.40}, which cannot be one")
        return values.device(name)
    if not name.isidentifier() or len(name) > 40:
        raise FormatError(f"the checkpoint names the dtype {name!r:.40}, which is no name of one")
    return values.dtype(name)


def numpy_scalar(node: NumpyNode) -> np.generic:
    """Return the scalar of a NumpyNode whose dtype `numpy_dtype` accepts."""
    dtype = numpy_dtype(node.dtype)
    if dtype.itemsize != len(node.data):
        raise FormatError(f"a NumPy scalar of dtype {node.dtype!r} has {len(node.data)} bytes")
    if dtype.kind == "U":
        points = np.frombuffer(node.data, dtype.str[0] + "u4")
        if points.max() > 0x10FFFF:  # Python would raise SystemError
            raise FormatError("a NumPy scalar has characters that are beyond Unicode")
    return np.frombuffer(node.data, dtype=dtype)[0]  # type: ignore[no-any-return]


UNHASHABLE = frozenset({"set", "slice"})
"""Types of plain values that cannot be keys. (A slice can be from Python 3.12 on.)"""

LITERALS = frozenset({bool, int, float, str, type(None)})
"""Types of the nodes that are their own values."""

CONTAINERS = (
    DictNode,
    OrderedDictNode,
    ListNode,
    TupleNode,
    NamedTupleNode,
    ObjectNode,
    TypedNode,
    MadeNode,
)

WRAPPERS = (ObjectNode, TypedNode, MadeNode)
"""Containers of one record, ``of``, which has the same fqn."""


def unwrapped(node: Node) -> Node:
    """Return what a record is a wrapper of, if it is one."""
    while isinstance(node, WRAPPERS):
        node = node.of
    return node


def inside(node: Node) -> Node:
    """Return what a record of an object, or of Python's own containers, is a wrapper of."""
    while isinstance(node, WRAPPERS):
        if isinstance(node, MadeNode) and node.type.startswith(("torch.", "numpy.")):
            return node
        node = node.of
    return node


def is_leaf(node: Node) -> bool:
    """Whether a record holds no others that have names of their own."""
    return not isinstance(unwrapped(node), CONTAINERS)


def children(node: Node) -> Iterator[tuple[str, Node]]:
    """Yield the name and record of what a container holds; nothing for a leaf."""
    if isinstance(node, (DictNode, OrderedDictNode)):
        for key, value in zip(node.keys, node.values, strict=True):
            yield key_name(key), value
    elif isinstance(node, (ListNode, TupleNode, NamedTupleNode)):
        for i, item in enumerate(node.items):
            yield str(i), item


def parts(node: Node) -> Iterator[Node]:
    """Yield every record directly inside another, keys and metadata included."""
    if isinstance(node, (DictNode, OrderedDictNode)):
        yield from node.keys
        yield from node.values
        if isinstance(node, OrderedDictNode):
            yield node.metadata
    elif isinstance(node, (ListNode, TupleNode, NamedTupleNode)):
        yield from node.items
    elif isinstance(node, MadeNode):
        yield node.of
        yield node.args
    elif isinstance(node, (*WRAPPERS, PlainNode)):
        yield node.of


def is_key(node: Node) -> bool:
    """Whether a record can be a dict key: a plain value, or a tuple of such."""
    if isinstance(node, (TupleNode, NamedTupleNode)):
        return all(is_key(item) for item in node.items)
    if isinstance(node, (TypedNode, PlainNode)):
        return is_key(node.of) and not (isinstance(node, PlainNode) and node.type in UNHASHABLE)
    return not isinstance(node, (*CONTAINERS, TensorNode))


def key_name(key: Node) -> str:
    """Return the part of an fqn that a dict key makes."""
    if isinstance(key, TupleNode):
        return f"({', '.join(key_name(item) for item in key.items)})"
    if isinstance(key, NamedTupleNode):
        return f"{key.name}({', '.join(key_name(item) for item in key.items)})"
    if isinstance(key, IntNode):
        return key.hex  # a decimal of any length would take quadratic time
    if isinstance(key, (SizeNode, DtypeNode, DeviceNode)):
        return _torch_text(key)
    if isinstance(key, (TypedNode, PlainNode)):
        return key_name(key.of)
    return str(plain(key))


def _torch_text(node: SizeNode | DtypeNode | DeviceNode) -> str:
    """Return the text that torch would make of it: names are the same without torch."""
    if isinstance(node, SizeNode):
        return f"torch.Size([{', '.join(map(str, node.dims))}])"
    return f"torch.{node.name}" if isinstance(node, DtypeNode) else node.name


def has_typed(node: Node) -> bool:
    """Whether there is a value of one of the program's classes in ``node``."""
    return isinstance(node, TypedNode) or any(
        has_typed(part) for part in parts(node) if type(part) not in LITERALS
    )


def bulk_indices(tree: Node) -> list[int]:
    """Return the numbers of all leaves with bulk in ``tree``, in order."""
    return bulk_and_made(tree)[0]


def bulk_and_made(tree: Node) -> tuple[list[int], list[int]]:
    """Return what `bulk_indices` does, and those of them that another value is made of."""
    found: list[int] = []
    made: list[int] = []
    _find_bulk(tree, found, made, False)
    return found, made


def _find_bulk(node: Node, found: list[int], made: list[int], is_made: bool) -> None:
    """HOT (per leaf)."""
    if isinstance(node, TensorNode):
        found.append(node.i)
        if is_made:
            made.append(node.i)
    elif isinstance(node, CONTAINERS):
        if isinstance(node, MadeNode):
            is_made = is_made or node.type.startswith(("torch.", "numpy.", "bytearray"))
        for part in parts(node):
            if type(part) not in LITERALS:
                _find_bulk(part, found, made, is_made)
