"""Fits: whether a live tensor or array can be filled with what a checkpoint has for it."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

from ..format.leaf import Leaf
from ..format.tree import (
    CONTAINERS,
    DictNode,
    ListNode,
    MadeNode,
    NamedTupleNode,
    Node,
    ObjectNode,
    OrderedDictNode,
    PlainNode,
    TensorNode,
    TupleNode,
    TypedNode,
    plain,
)
from .live import Bulk, as_number, can_cast, dtype_name, held, is_float, kind_of, refusal


class Fit(msgspec.Struct, frozen=True, gc=False):
    """How a value of a checkpoint fits a live one.

    Attributes:
        why: why it does not; "" if it does.
        number: what fills it, of its dtype, where that is no leaf.
        cast: it fits once it is converted.
    """

    why: str = ""
    number: Any = None
    cast: bool = False


_AS_IT_IS = Fit()


def fit_leaf(leaf: Leaf, into: Bulk, cast: bool) -> Fit:
    """Return how a leaf fits. HOT (per leaf).

    Args:
        cast: floating dtypes may be converted.
    """
    saved, own = leaf.dtype.name, dtype_name(into)
    if leaf.kind != kind_of(into):
        return Fit(f"saved as {leaf.kind}, the state has {kind_of(into)}")
    if leaf.shape != list(into.shape):
        return Fit(f"saved with shape {leaf.shape}, the state has {list(into.shape)}")
    is_cast = saved != own and cast and can_cast(saved, into)
    if saved != own and not is_cast:
        hint = " (cast=True converts it)" if not cast and can_cast(saved, into) else ""
        return Fit(f"saved with dtype {saved}, the state has {own}{hint}")
    why = refusal(into)
    if why is None and not is_cast:
        return _AS_IT_IS
    return Fit(why or "", cast=is_cast)


def fit_number(node: Node, into: Bulk, cast: bool) -> Fit:
    """Return how a plain value fits: a number may fill a tensor that has no dimension.

    Args:
        cast: numbers may be rounded to floating dtypes.
    """
    what = "an array" if isinstance(into, np.ndarray) else "a tensor"
    number = None if isinstance(node, CONTAINERS) else as_number(plain(node), into)
    if number is None:
        return Fit(f"the state has {what}, the checkpoint a {kind_of_node(node)}")
    element = held(into, number)
    is_same = element == number or (element != element and number != number)
    # an infinity in place of a number is no rounding; torch gives that for some dtypes alone
    can_round = element is not None and is_float(into) and math.isfinite(element)
    if not is_same and not (cast and can_round):
        why = f"saved as {_shown(number)}, which {what} of {dtype_name(into)} cannot hold"
        return Fit(why + (" exactly (cast=True rounds it)" if can_round else ""))
    return Fit(refusal(into) or "", element, not is_same)


def _shown(number: Any) -> str:
    """Return a number as messages show it; Python writes out no int of any length."""
    if type(number) is int and number.bit_length() > 400:
        return f"a number of {number.bit_length()} bits"
    return f"the number {number!r}"


def kind_of_node(node: Node) -> str:
    """Return what a record is of, as messages show it."""
    if isinstance(node, (ObjectNode, TypedNode, MadeNode, PlainNode)):
        return node.type
    return {
        DictNode: "dict",
        OrderedDictNode: "dict",
        ListNode: "list",
        TupleNode: "tuple",
        NamedTupleNode: "NamedTuple",
        TensorNode: "tensor",
        type(None): "None",
    }.get(type(node), "plain value")
