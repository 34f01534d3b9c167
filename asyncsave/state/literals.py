"""Literals: the records of plain values. Pure: no threads, no files, no clock."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch

from ..format.tree import (
    ComplexNode,
    DeviceNode,
    DtypeNode,
    FloatNode,
    IntNode,
    Node,
    PlainNode,
    SizeNode,
    StrNode,
)

_SAFE_INT = 2**53  # beyond it, JSON readers that use doubles would round


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


LITERALS: dict[type, Callable[..., Node]] = {
    type(None): _same,
    bool: _same,
    int: _int,
    float: _float,
    complex: lambda value, *_: ComplexNode(struct.pack(">dd", value.real, value.imag).hex()),
    str: _str,
    torch.Size: lambda value, *_: SizeNode(list(value)),
    torch.dtype: lambda value, *_: DtypeNode(str(value).removeprefix("torch.")),
    torch.device: lambda value, *_: DeviceNode(str(value)),
    torch.layout: lambda value, *_: PlainNode("torch.layout", str(value)),
    torch.memory_format: lambda value, *_: PlainNode("torch.memory_format", str(value)),
}
"""By type, exactly: takes a value, and whatever else; returns its record."""
