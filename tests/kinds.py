"""A state with every kind of value, and classes of a program of its own."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import types
import uuid
import warnings
from typing import Any

import numpy as np
import torch


class Color(enum.Enum):
    RED = 1
    BLUE = (2, "x")


class Level(enum.IntEnum):
    LOW = 5
    HIGH = 7


class Flags(enum.Flag):
    A = 1
    B = 2


class History(list[Any]):
    """A list of one's own."""


class Table(dict[Any, Any]):
    """A dict of one's own."""


class Name(str):
    """A text of one's own, and another ``str()`` of it."""

    def __str__(self) -> str:
        return "shown"


class Count(int):
    """A number of one's own."""


class Rate(float):
    """Another one."""


class Row(tuple[Any, ...]):
    """A tuple of one's own."""


@dataclasses.dataclass
class Config:
    size: int
    names: list[str]
    weight: Any
    level: Level = Level.LOW


@dataclasses.dataclass(frozen=True)
class Frozen:
    size: int
    weight: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    size: int
    made: int = dataclasses.field(default=0, init=False)


class Celsius:
    """A class that is registered."""

    def __init__(self, degrees: Any) -> None:
        self.degrees = degrees


class Image(torch.Tensor):
    """A tensor subclass that is nothing but its memory."""


class Scaled(torch.Tensor):
    """A traceable tensor subclass: integers, and what they are multiplied by."""

    data_: torch.Tensor
    scale: torch.Tensor
    unit: str

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor, unit: str) -> Scaled:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)
        return made  # type: ignore[no-any-return]

    def __init__(self, data: torch.Tensor, scale: torch.Tensor, unit: str) -> None:
        self.data_, self.scale, self.unit = data, scale, unit

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["data_", "scale"], {"unit": self.unit, "dtype": torch.int8}

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Scaled:
        return cls(inner["data_"], inner["scale"], context["unit"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            own = args[0]
            return cls(own.data_, own.scale, own.unit)
        raise NotImplementedError(func)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Scaled({self.data_}, {self.scale})"


def scaled(fill: int, unit: str = "m") -> Scaled:
    return Scaled(torch.full((3, 4), fill, dtype=torch.int8), torch.full((3, 1), 0.5 * fill), unit)


RECORD = np.dtype(
    [("a", "<f4"), ("b", ">i8", (2,)), ("c", [("x", "S3"), ("y", "<M8[s]")]), ("d", "V3")]
)


def records(fill: int) -> Any:
    array = np.zeros(5, RECORD)
    array["a"] = np.arange(5) * fill
    array["b"] = fill
    array["c"]["x"] = b"ab\0"
    array["d"] = b"\1\2\3"
    return array


def data(seed: int = 1) -> dict[str, Any]:
    """Return values that come back equal and of the same type."""
    rng = np.random.default_rng(seed)
    tensor = torch.from_numpy(rng.normal(size=(3, 2)))
    return {
        "set": {seed, 2, "a", (1, None)},
        "frozenset": frozenset([(1, 2), None, frozenset({seed})]),
        "deque": collections.deque([seed, "x", tensor], 5),
        "deque of values": collections.deque([seed]),
        "defaultdict": collections.defaultdict(list, {seed: [2], "t": tensor + 1}),
        "defaultdict of none": collections.defaultdict(None, {seed: 1}),
        "Counter": collections.Counter("hello" * seed),
        "ordered": collections.OrderedDict(b=1, a=seed),
        "range": range(2, 90, seed),
        "slice": slice(seed, None, 2),
        "bytearray": bytearray(b"x" * 1000),
        "short bytearray": bytearray([seed]),
        "path": pathlib.Path("/a") / str(seed),
        "posix": pathlib.PurePosixPath("x/y"),
        "windows": pathlib.PureWindowsPath("c:/x"),
        "date": datetime.date(2024, 1, seed),
        "datetime": datetime.datetime(2024, 1, 2, 3, 4, 5, seed, fold=1),
        "aware": datetime.datetime(
            2024, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2), "X")
        ),
        "time": datetime.time(1, seed, tzinfo=datetime.UTC),
        "timedelta": datetime.timedelta(-1, seed, 3),
        "timezone": datetime.timezone.utc,  # noqa: UP017 - as people write it
        "decimal": decimal.Decimal(f"1.50E+{seed}"),
        "infinite": decimal.Decimal("-Infinity"),
        "fraction": fractions.Fraction(-3, 7 + seed),
        "uuid": uuid.UUID(int=seed),
        "complex": complex(seed, -0.0),
        "size": torch.Size([3, seed]),
        "dtype": torch.bfloat16,
        "layout": torch.sparse_coo,
        "memory_format": torch.channels_last,
        "records": records(seed),
        "fortran records": np.asfortranarray(records(seed).repeat(2).reshape(5, 2)),
        "record": records(seed)[1],
        "dates": np.array(["2024-01-01", "NaT"], "M8[D]"),
        "scalar": np.datetime64("2024-01-01T00:00:07"),
        "keys": {
            datetime.date(2024, 1, 1): 1,
            pathlib.Path("a"): tensor,
            frozenset({1}): 2,
            decimal.Decimal("0.1"): 3,
            (uuid.UUID(int=3), range(3)): 4,
        },
    }


def generators(seed: int = 1) -> dict[str, Any]:
    """Return random generators that have drawn some numbers."""
    made: dict[str, Any] = {
        "torch": torch.Generator().manual_seed(seed),
        "RandomState": np.random.RandomState(seed),
        **{
            each.__name__: np.random.Generator(each(seed))
            for each in (
                *(np.random.PCG64, np.random.MT19937, np.random.Philox),
                *(np.random.SFC64, np.random.PCG64DXSM),
            )
        },
    }
    draws(made)
    return made


def draws(generators: dict[str, Any]) -> list[float]:
    """Return a number of each, with the odd one of 32 bits before, half of which stays."""
    drawn = []
    for each in generators.values():
        if isinstance(each, torch.Generator):
            drawn += torch.rand(3, generator=each).tolist()
        elif isinstance(each, np.random.RandomState):
            drawn += [each.normal(), each.normal(), each.normal()]
        else:
            drawn += [int(each.integers(2**31, dtype=np.int32)), each.normal()]
    return drawn


def classes(seed: int = 1) -> dict[str, Any]:
    """Return values of the program's own classes."""
    weight = torch.full((2,), float(seed))
    return {
        "enum": Color.RED if seed % 2 else Color.BLUE,
        "int enum": Level.LOW if seed % 2 else Level.HIGH,
        "flags": Flags.A | Flags.B if seed % 2 else Flags.A,
        "enum keys": {
            Color.RED: seed,
            Color.BLUE: weight + 1,
            Level.LOW: [Level(5 + 2 * (seed % 2))],
        },
        "enum set": {Color.RED} if seed % 2 else {Color.BLUE},
        "list": History([seed, 2]),
        "dict": Table(a=seed, b=weight + 2),
        "str": Name("x" * seed),
        "int": Count(seed),
        "float": Rate(seed),
        "tuple": Row((seed, weight + 3)),
        "config": Config(seed, ["a"] * seed, weight + 4),
        "frozen": Frozen(seed, weight + 5),
        "slotted": Slotted(seed),
        "namespace": types.SimpleNamespace(a=seed, w=weight + 6, level=Level.HIGH),
        "args": argparse.Namespace(lr=0.1 * seed, config=Config(seed, [], None)),
    }


def tensors(seed: int = 1) -> dict[str, Any]:
    """Return tensors that are no plain memory, and that torch itself knows."""
    rng = torch.Generator().manual_seed(seed)
    eye = torch.diag(torch.rand(4, generator=rng) + 0.5)
    rows = [torch.rand(2, 3, generator=rng), torch.rand(4, 3, generator=rng)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: some of these are in beta
        return {
            "coo": eye.to_sparse(),
            "uncoalesced": torch.sparse_coo_tensor([[1, 1]], [1.0, float(seed)], (3,)),
            "hybrid": torch.rand(3, 2, generator=rng).to_sparse(1),
            "csr": eye.to_sparse_csr(),
            "csc": eye.to_sparse_csc(),
            "bsr": eye.to_sparse_bsr((2, 2)),
            "bsc": eye.to_sparse_bsc((2, 2)),
            "per tensor": torch.quantize_per_tensor(eye, 0.1 * seed, 3, torch.quint8),
            "per channel": torch.quantize_per_channel(
                eye, torch.rand(4, generator=rng) + 0.1, torch.arange(4), 1, torch.qint8
            ),
            "nested": torch.nested.nested_tensor(rows),
            "jagged": torch.nested.nested_tensor(rows, layout=torch.jagged),
            "grad": eye.to_sparse().requires_grad_(),
        }


def as_parts(value: torch.Tensor) -> list[Any]:
    """Return plain tensors and values that two tensors share only if they are the same."""
    value = value.detach()
    if value.layout is torch.sparse_coo:
        return [value.shape, value.is_coalesced(), value._indices(), value._values()]
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [value.shape, value.crow_indices(), value.col_indices(), value.values()]
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [value.shape, value.ccol_indices(), value.row_indices(), value.values()]
    if value.is_nested:
        return list(value.unbind())
    if value.is_quantized and value.qscheme() == torch.per_tensor_affine:
        return [value.int_repr(), value.q_scale(), value.q_zero_point()]
    if value.is_quantized:
        scales, points = value.q_per_channel_scales(), value.q_per_channel_zero_points()
        return [value.int_repr(), scales, points, value.q_per_channel_axis()]
    return [value]
