"""Kinds: values of further types, each of them made of plainer ones.

`PLAIN` has those that are plain values themselves, and are made of keys alone; `MADE` those that
hold other values or have bulk. A row says how a value is taken apart and how it is made again; for
torch's types, of which this room knows the names alone, state/kinds.py does. To add a type, add a
row, and a line to FORMAT.md; a reader that lacks one says so. Pure: no threads, no files, no clock.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import pathlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .generators import generator, generator_apart, random_state, random_state_apart
from .structured import of_type, record, record_apart, records, records_apart
from .tree import (
    BytesNode,
    DictNode,
    ListNode,
    MadeNode,
    TensorNode,
)

MAX_DIGITS = 4096
"""Of a Decimal or a Fraction, so many characters: making one of more takes quadratic time."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A type of plain values.

    Attributes:
        name: what it is called in a checkpoint.
        type: the type, exactly; None: it is torch's.
        apart: takes a value; returns what it is made of, which can be a key.
        together: takes that; returns the value, or raises what ``IMPOSSIBLE`` in build.py lists.
    """

    name: str
    type: type | None
    apart: Callable[[Any], Any]
    together: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Made:
    """A type of values that may hold others.

    Attributes:
        name: what it is called in a checkpoint.
        form: what ``of`` must be: the types of node; of a dict, it must have exactly ``keys``.
        keys: see there; None: any.
        type: the type, exactly; None: it is torch's.
        apart: takes a value; returns what it is made of, and the rest, which can be a key.
        together: takes both; returns the value, or raises what ``IMPOSSIBLE`` in build.py lists.
    """

    name: str
    form: tuple[Any, ...]
    keys: frozenset[str] | None = None
    type: type | None = None
    apart: Callable[[Any], tuple[Any, Any]] = lambda value: (value, None)
    together: Callable[[Any, Any], Any] | None = None


# -- plain ----------------------------------------------------------------------------------------


def _number_text(value: decimal.Decimal | fractions.Fraction) -> str:
    text = str(value)
    if len(text) > MAX_DIGITS:
        raise ValueError(f"it has {len(text)} digits, of which a checkpoint allows {MAX_DIGITS}")
    return text


def _decimal(text: str) -> decimal.Decimal:
    return decimal.Decimal(_short_text(text))


def _fraction(text: str) -> fractions.Fraction:
    numerator, _, denominator = _short_text(text).partition("/")
    return fractions.Fraction(int(numerator), int(denominator or 1))


def _short_text(text: str) -> str:
    if len(of_type(text, str)) > MAX_DIGITS:
        raise ValueError("a number with too many digits")
    return text


def _timezone_apart(value: datetime.timezone) -> Any:
    offset, *name = value.__getinitargs__()  # type: ignore[attr-defined]
    return (offset, *name)


def _clock(value: datetime.datetime | datetime.time) -> tuple[Any, ...]:
    if type(value.tzinfo) not in (type(None), datetime.timezone):
        kind = type(value.tzinfo)
        raise ValueError(
            f"its tzinfo is a {kind.__module__}.{kind.__qualname__}; convert it first, with "
            "value.astimezone(datetime.timezone.utc) say"
        )
    return (value.hour, value.minute, value.second, value.microsecond, value.fold, value.tzinfo)


def _clocked(kind: type[datetime.datetime] | type[datetime.time], of: Any) -> Any:
    *numbers, fold, zone = of
    return kind(*numbers).replace(tzinfo=zone, fold=fold)


def _set(of: Any) -> set[Any]:
    made = set(of)
    if len(made) < len(of):
        raise ValueError("a set with an item twice")
    return made


def _in_order(value: Any) -> tuple[Any, ...]:
    """Return a set's items in an order that is the same in all processes, where they have one."""
    try:
        return tuple(sorted(value))
    except Exception:  # also of NaNs, and of classes of somebody's own
        return tuple(value)


PLAIN = {
    row.name: row
    for row in (
        Plain("set", set, _in_order, _set),
        Plain("frozenset", frozenset, _in_order, lambda of: frozenset(_set(of))),
        Plain("range", range, lambda v: (v.start, v.stop, v.step), lambda of: range(*of)),
        Plain("slice", slice, lambda v: (v.start, v.stop, v.step), lambda of: slice(*of)),
        Plain("pathlib.Path", type(pathlib.Path()), str, lambda of: pathlib.Path(of)),
        Plain("pathlib.PurePosixPath", pathlib.PurePosixPath, str, pathlib.PurePosixPath),
        Plain("pathlib.PureWindowsPath", pathlib.PureWindowsPath, str, pathlib.PureWindowsPath),
        Plain(
            "datetime.date",
            datetime.date,
            lambda v: (v.year, v.month, v.day),
            lambda of: datetime.date(*of),
        ),
        Plain(
            "datetime.datetime",
            datetime.datetime,
            lambda v: (v.year, v.month, v.day, *_clock(v)),
            partial(_clocked, datetime.datetime),
        ),
        Plain("datetime.time", datetime.time, _clock, partial(_clocked, datetime.time)),
        Plain(
            "datetime.timedelta",
            datetime.timedelta,
            lambda v: (v.days, v.seconds, v.microseconds),
            lambda of: datetime.timedelta(*of),
        ),
        Plain(
            "datetime.timezone",
            datetime.timezone,
            _timezone_apart,
            lambda of: datetime.timezone(*of),
        ),
        Plain("decimal.Decimal", decimal.Decimal, _number_text, _decimal),
        Plain("fractions.Fraction", fractions.Fraction, _number_text, _fraction),
        Plain("uuid.UUID", uuid.UUID, str, uuid.UUID),
        Plain("torch.layout", None, str, lambda of: of),
        Plain("torch.memory_format", None, str, lambda of: of),
    )
}
"""By name."""


# -- made of others -------------------------------------------------------------------------------

_FACTORIES: dict[str, Any] = {
    f"{each.__module__}.{each.__qualname__}".removeprefix("builtins."): each
    for each in (
        *(bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset),
        *(collections.deque, collections.Counter, collections.OrderedDict, collections.defaultdict),
    )
}
_FACTORY_NAMES = {each: name for name, each in _FACTORIES.items()}


def _defaultdict_apart(value: collections.defaultdict[Any, Any]) -> tuple[Any, Any]:
    """Of a default_factory that is none of these, nothing is kept: it is code."""
    factory: Any = value.default_factory
    try:
        return dict(value), _FACTORY_NAMES.get(factory)
    except TypeError:  # one that cannot be hashed
        return dict(value), None


def _defaultdict(of: Any, args: Any) -> Any:
    return collections.defaultdict(None if args is None else _FACTORIES[args], of)


def _deque(of: Any, args: Any) -> Any:
    if args is not None and not 0 <= of_type(args, int) < 2**63:
        raise ValueError("a deque's maxlen")
    if args is not None and len(of) > args:
        raise ValueError("a deque that is longer than its maxlen")
    return collections.deque(of, args)


def _counter(of: Any, args: Any) -> Any:
    return collections.Counter(of)


def _bytearray(of: Any, args: Any) -> bytearray:
    return bytearray(of_type(of, bytes))


_SPARSE = frozenset({"indices", "values", "size", "is_coalesced"})
_COMPRESSED = frozenset({"compressed_indices", "plain_indices", "values", "size"})

_ROWS = (
    Made(
        "collections.deque",
        (ListNode,),
        None,
        collections.deque,
        lambda v: (list(v), v.maxlen),
        _deque,
    ),
    Made(
        "collections.defaultdict",
        (DictNode,),
        None,
        collections.defaultdict,
        _defaultdict_apart,
        _defaultdict,
    ),
    Made(
        "collections.Counter",
        (DictNode,),
        None,
        collections.Counter,
        lambda v: (dict(v), None),
        _counter,
    ),
    Made(
        "bytearray",
        (BytesNode, TensorNode),
        None,
        bytearray,
        lambda v: (bytes(v), None),
        _bytearray,
    ),
    Made("numpy.ndarray", (TensorNode,), None, None, records_apart, records),
    Made("numpy.void", (TensorNode,), None, None, record_apart, record),
    Made(
        "numpy.random.Generator",
        (DictNode,),
        None,
        np.random.Generator,
        generator_apart,
        generator,
    ),
    Made(
        "numpy.random.RandomState",
        (DictNode,),
        None,
        np.random.RandomState,
        random_state_apart,
        random_state,
    ),
    Made("torch.Generator", (DictNode,), frozenset({"device", "state"})),
    Made("torch.sparse_coo", (DictNode,), _SPARSE),
    *(
        Made(f"torch.sparse_{each}", (DictNode,), _COMPRESSED)
        for each in ("csr", "csc", "bsr", "bsc")
    ),
    Made("torch.per_tensor_affine", (DictNode,), frozenset({"int_repr", "scale", "zero_point"})),
    Made(
        "torch.per_channel_affine",
        (DictNode,),
        frozenset({"int_repr", "scales", "zero_points", "axis"}),
    ),
    Made("torch.nested", (ListNode,)),
    Made("torch.jagged", (DictNode,), frozenset({"values", "offsets", "lengths", "ragged_dim"})),
)

MADE = {row.name: row for row in _ROWS}
"""By name."""


def has_form(node: MadeNode) -> bool:
    """Whether a record has what its type, which is in MADE, is made of."""
    row, of = MADE[node.type], node.of
    if not isinstance(of, row.form):
        return False
    if row.keys is None or not isinstance(of, DictNode):
        return True
    return len(of.keys) == len(row.keys) and row.keys == set(filter(_is_text, of.keys))


def _is_text(key: Any) -> bool:
    return isinstance(key, str)
