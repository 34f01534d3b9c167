"""Flatten: any nest of containers and leaves, taken apart.

`flatten` turns a live state into records (format/tree.py) and a list of leaves with bulk: tensors,
arrays, long bytes; format/build.py puts them together again. Fqns join keys with dots. They name
things for people and for ``keys=``; the tree, not the fqn, is what identifies a leaf, so keys that
contain dots lose nothing. Pure: no threads, no files, no clock.
"""

from __future__ import annotations

import collections
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Union

import numpy as np
import torch

from ..errors import FormatError, StateError
from ..format.build import named_tuple
from ..format.dtypes import DTYPES
from ..format.files import MAX_DIMS
from ..format.tree import (
    MAX_DEPTH,
    MAX_ONE_HASH,
    BytesNode,
    ComplexNode,
    DeviceNode,
    DictNode,
    DtypeNode,
    FloatNode,
    IntNode,
    ListNode,
    NamedTupleNode,
    Node,
    NumpyNode,
    ObjectNode,
    OrderedDictNode,
    SizeNode,
    StrNode,
    TensorNode,
    TupleNode,
    is_key,
    key_name,
    numpy_scalar,
)
from .values import TORCH_DTYPES

INLINE_BYTES = 256
"""Longer ``bytes`` values go into chunks instead of into the tree."""

_KNOWN = frozenset(dtype for name, dtype in TORCH_DTYPES.items() if name in DTYPES)

_SAFE_INT = 2**53  # beyond it, JSON readers that use doubles would round

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
        on_device: some leaf is on a device, of which copies are asynchronous.
    """

    tree: Node = None
    names: list[str] = field(default_factory=list)
    values: list[Bulk] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)
    late: list[bool] = field(default_factory=list)
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
        StateError: a value of a kind that cannot be saved; names its fqn and its type.
    """
    flat = Flat()
    flat.tree = _Flattener(flat).node(state, "", 0)
    flat.late = [False] * len(flat.values)
    if owns is not None:
        _classify(flat, owns, overlap=overlap)
    return flat


def _classify(flat: Flat, owns: Callable[[torch.Tensor], bool], *, overlap: bool) -> None:
    there = [
        (i, value)
        for i, value in enumerate(flat.values)
        if isinstance(value, torch.Tensor) and owns(value)
    ]
    flat.on_device = bool(there)
    if overlap and there:
        stepped = {tensor.data_ptr() for each in flat.objects for tensor in _stepped(each)}
        for i, value in there:
            # a tensor of inference mode has no version to compare
            flat.late[i] = not value.is_inference() and value.data_ptr() in stepped


def _stepped(each: Any) -> Iterator[torch.Tensor]:
    """Yield what only ``optimizer.step()`` changes of an object."""
    if isinstance(each, torch.nn.Module):
        yield from each.parameters()
    elif isinstance(each, torch.optim.Optimizer):
        for state in each.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    yield value


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
            return self._namedtuple(value, name, depth)
        if callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
            self._check_depth(name, depth)
            self._flat.objects.append(value)
            inner = self.node(_state_of(value, name), name, depth + 1)
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
        texts = True
        keys: list[Node] = []
        values: list[Node] = []
        for key, item in value.items():
            if type(key) is str:
                child = prefix + key
                keys.append(_str(key))
            else:
                texts = False
                keys.append(self._key(key, prefix, depth))
                child = prefix + key_name(keys[-1])
            handler = exact.get(type(item), self.node)  # the hot loop of states with many leaves
            values.append(handler(item, child, depth + 1))
        if not texts and len(keys) > MAX_ONE_HASH:
            _check_hashes(value, name)
        return keys, values

    def _key(self, key: Any, prefix: str, depth: int) -> Node:
        node = self.node(key, f"{prefix}<key>", depth + 1)
        if not is_key(node):
            raise StateError(
                f"a dict key at {prefix!r:.200} is, or holds, a {_type_name(key)}, which cannot be "
                "a key in a checkpoint; use a str, a number, None, short bytes, or a tuple of those"
            )
        return node

    def _namedtuple(self, value: Any, name: str, depth: int) -> Node:
        try:
            named_tuple(type(value).__name__, tuple(value._fields))
        except (FormatError, ValueError, TypeError) as cause:
            raise StateError(
                f"{name!r} is a NamedTuple whose names could not be restored ({cause}); pass "
                "tuple(value) or value._asdict()"
            ) from cause
        items = self._items(value, name, depth)
        return NamedTupleNode(type(value).__name__, list(value._fields), items)

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
        if (
            value.layout is not torch.strided
            or value.dtype not in _KNOWN
            or value.is_meta
            or value.is_nested
            or value.dim() > MAX_DIMS
        ):
            raise StateError(_tensor_refusal(value, name))
        flat = self._flat  # as in _bulk(), without the call
        flat.names.append(name)
        flat.values.append(value)
        return TensorNode(len(flat.values) - 1)

    def _array(self, value: np.ndarray[Any, Any], name: str, depth: int) -> Node:
        if value.dtype.kind not in "?biufcSUMm" or value.dtype.itemsize == 0:
            raise StateError(
                f"{name!r} is a NumPy array of dtype {value.dtype}, which holds Python objects, "
                "records or nothing; save its columns as plain numeric arrays"
            )
        return self._bulk(value, name)

    def _bytes(self, value: bytes, name: str, depth: int) -> Node:
        return BytesNode(value) if len(value) <= INLINE_BYTES else self._bulk(value, name)


def _state_of(value: Any, name: str) -> Any:
    try:
        return value.state_dict()
    except Exception as cause:
        where = f"{name!r}" if name else "the state itself"
        raise StateError(
            f"{where} is a {_type_name(value)}, whose state_dict() raised "
            f"{type(cause).__name__}: {cause}"
        ) from cause


def _check_hashes(value: dict[Any, Any], name: str) -> None:
    """Refuse what validate.py would: looking such keys up takes quadratic time."""
    hashes = [hash(key) for key in value]
    if len(set(hashes)) + MAX_ONE_HASH <= len(hashes):
        (most, count), *_ = collections.Counter(hashes).most_common(1)
        if count > MAX_ONE_HASH:
            raise StateError(
                f"{name!r} is a dict in which {count} keys have the same hash, {most}, and no more "
                f"than {MAX_ONE_HASH} may; save it as a list of pairs, list(value.items())"
            )


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
    if value.dtype.kind in "?biufcSUMm" and value.dtype.itemsize:
        node = NumpyNode(value.dtype.str, value.tobytes())
        if value.dtype.kind not in "SU" or numpy_scalar(node) == value:
            return node  # NumPy's text loses its last NULs
    raise StateError(
        f"{name!r} is a NumPy scalar of dtype {value.dtype}, which cannot be kept exactly; save a "
        "plain value, as in value.item()"
    )


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
    elif value.is_nested:
        why, hint = "is a nested tensor", "save list(value.unbind())"
    elif value.is_quantized:
        why, hint = "is quantized", "save value.int_repr(), its scale and its zero point"
    elif value.dtype not in _KNOWN:
        why = f"has dtype {value.dtype}, which this version of asyncsave does not know"
        hint = "save it as value.view(dtype) with a dtype of the same width, torch.int16 say"
    elif type(value) in (torch.Tensor, torch.nn.Parameter):  # not one that has no shape yet
        why = f"has {value.dim()} dimensions, of which a checkpoint allows {MAX_DIMS}"
        hint = "save value.flatten() and its shape"
    else:
        why = f"is a {_type_name(value)}, a tensor subclass"
        hint = "save the plain tensor (to_local(), full_tensor(), or as_subclass(torch.Tensor))"
    return f"the tensor {name!r} {why}, which asyncsave cannot save: {hint}"
