"""Parts: live values that are made of others, beside the record of one.

Those whose parts can be filled are filled part by part: sparse and nested tensors, tensor
subclasses, structured arrays. Those that keep their parts to themselves adopt a new value, as an
object that loads by itself does: generators, quantized and jagged tensors.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Iterator
from typing import Any, Union

import msgspec
import numpy as np
import torch

from ..format.kinds import MADE, PLAIN
from ..format.tree import ListNode, MadeNode, Node, TypedNode, children
from ..state.classes import BY_TYPE, class_name
from ..state.flatten import flatten
from ..state.kinds import is_wrapper, tensor_parts, wrapper_parts
from .fits import kind_of_node
from .live import PLAIN_TENSORS, Bulk

Generator = Union[torch.Generator, np.random.Generator, np.random.RandomState]  # noqa: UP007

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState)

_PLAIN = (
    *(bool, int, float, complex, str, bytes, enum.Enum),
    *(torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format, np.generic),
    *(row.type for row in PLAIN.values() if row.type not in (None, set)),
)


def is_value(value: Any) -> bool:
    """Whether a live value is one that is replaced where it is, whatever was saved there."""
    return value is None or type(value) in BY_TYPE or isinstance(value, _PLAIN)


def is_kind(node: Node, *names: str) -> bool:
    """Whether a record is of one of these types of kinds.py."""
    return getattr(node, "type", None) in names and not isinstance(node, TypedNode)


# -- parts that are filled ------------------------------------------------------------------------

_ADOPTED = frozenset({"torch.per_tensor_affine", "torch.per_channel_affine", "torch.jagged"})
_NOT_COMPARED = frozenset({"requires_grad", "parameter", "stride"})


class LiveParts(msgspec.Struct, frozen=True, gc=False):
    """What a live tensor or array is made of.

    Attributes:
        name: of its type.
        record: the type of record that it has.
        of: its parts, as they are saved.
        args: the rest, where it says how long they are.
    """

    name: str
    record: type[MadeNode] | type[TypedNode]
    of: Any
    args: Any = None

    @property
    def adopts(self) -> bool:
        """Whether it takes a new value as a whole."""
        return self.name in _ADOPTED

    def fits(self, node: Node) -> bool:
        """Whether a record is of the same type."""
        return isinstance(node, self.record) and node.type == self.name

    def reasons(self, node: Node) -> list[str]:
        """Return what forbids to fill the parts, of what is no tensor in them."""
        if not self.fits(node):
            return [f"the checkpoint has a {kind_of_node(node)}, the state a {self.name}"]
        assert isinstance(node, (MadeNode, TypedNode))
        if isinstance(node, MadeNode) and self.args is not None and node.args != _node(self.args):
            return [f"saved as a {self.name} of another dtype than the state has"]
        if isinstance(self.of, list):
            count = len(node.of.items) if isinstance(node.of, ListNode) else -1
            why = f"saved as {count} tensors, the state has {len(self.of)}"
            return [why] if count != len(self.of) else []
        return [
            f"saved with another {key} than the state's {self.name} has"
            for key, part, saved in _pairs(self.of, node.of)
            if not isinstance(part, (torch.Tensor, np.ndarray)) and not _same(key, part, saved)
        ]

    def tensors(self, node: Any) -> Iterator[tuple[str, Bulk, Node]]:
        """Yield the parts to fill: the name of each below its own, the live part, its record."""
        for key, part, saved in _pairs(self.of, node.of):
            if isinstance(part, (torch.Tensor, np.ndarray)):
                yield key, part, saved


def parts_of(into: Bulk) -> LiveParts | None:
    """Return what a live tensor or array is made of; None: it is itself what is filled."""
    if isinstance(into, np.ndarray):
        if into.dtype.names is None or isinstance(into, np.ma.MaskedArray):
            return None
        apart = MADE["numpy.ndarray"].apart
        return LiveParts("numpy.ndarray", MadeNode, *apart(into))
    if type(into) in PLAIN_TENSORS and into.layout is torch.strided and not into.is_quantized:
        parts = tensor_parts(into) if into.is_nested else None
    elif is_wrapper(into):
        return LiveParts(class_name(type(into)), TypedNode, wrapper_parts(into))
    else:
        parts = tensor_parts(into)
    return None if parts is None else LiveParts(parts[0], MadeNode, parts[1])


def _pairs(of: Any, node: Node, prefix: str = "") -> Iterator[tuple[str, Any, Node]]:
    """Yield parts and their records, by name; of what only one side has, None."""
    if not isinstance(of, (dict, list)):
        yield prefix, of, node
        return
    saved = dict(children(node))
    for key, part in of.items() if isinstance(of, dict) else enumerate(of):
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(part, dict) and key == "tensors":
            yield from _pairs(part, saved.get(str(key)), name)
        else:
            yield name, part, saved.get(str(key))


def _same(key: str, part: Any, saved: Node) -> bool:
    if key in _NOT_COMPARED or (key == "is_coalesced" and part is False):
        return True  # of what is in order, nothing need be known
    return bool(_node(part) == saved)


def _node(value: Any) -> Node:
    return flatten(value).tree


# -- what adopts a new value ----------------------------------------------------------------------


def kind_name(into: Generator) -> str:
    """Return what a generator's type is called in a checkpoint."""
    if isinstance(into, torch.Generator):
        return "torch.Generator"
    return (
        class_name(type(into))
        .replace("numpy.random.mtrand", "numpy.random")
        .replace("numpy.random._generator", "numpy.random")
    )


class Adopting:
    """A live value that takes over a new one of its kind, by ``load_state_dict``."""

    def __init__(self, into: Any) -> None:
        self.into = into

    def load_state_dict(self, new: Any) -> None:
        """Be as ``new`` is; ValueError if it cannot."""
        into = self.into
        if isinstance(into, torch.Generator):
            into.set_state(new.get_state())
        elif isinstance(into, np.random.Generator):
            _take_bits(into.bit_generator, new.bit_generator.state)
        elif isinstance(into, np.random.RandomState):
            into.set_state(new.get_state(legacy=False))
        elif into.is_nested:
            _take_rows(into, new)
        else:
            _take_quantized(into, new)

    def way_back(self) -> Callable[[], None]:
        """Return what brings it back to what it is now."""
        into = self.into
        old: Any
        if isinstance(into, torch.Generator):
            old = torch.Generator(into.device)
            old.set_state(into.get_state())
        elif isinstance(into, torch.Tensor):
            old = into.detach().clone()
        else:
            old = copy.deepcopy(into)
        return lambda: self.load_state_dict(old)


def _take_bits(own: Any, state: Any) -> None:
    if state["bit_generator"] != own.state["bit_generator"]:
        raise ValueError(
            f"saved as a {state['bit_generator']}, the state has a {own.state['bit_generator']}"
        )
    own.state = state


def _take_rows(into: Any, new: Any) -> None:
    pairs = [(into.offsets(), new.offsets()), (into.lengths(), new.lengths())]
    if into._ragged_idx != new._ragged_idx:
        raise ValueError(
            f"saved with rows that differ in dimension {new._ragged_idx}, the state's do in "
            f"{into._ragged_idx}"
        )
    if into.shape[0] != new.shape[0] or not all(_equal(*pair) for pair in pairs):
        raise ValueError("saved with rows of other lengths than the state has")
    if into.values().shape != new.values().shape or into.dtype != new.dtype:
        raise ValueError(
            f"saved with values {list(new.values().shape)} of {new.dtype}, the state has "
            f"{list(into.values().shape)} of {into.dtype}"
        )
    with torch.no_grad():
        into.values().copy_(new.values())


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.cpu(), other.cpu())


def _take_quantized(into: torch.Tensor, new: torch.Tensor) -> None:
    own, saved = (f"{list(t.shape)} of {t.dtype}, {t.qscheme()}" for t in (into, new))
    if own != saved:
        raise ValueError(f"saved with shape {saved}, the state has {own}")
    with torch.no_grad():
        into.copy_(new)
