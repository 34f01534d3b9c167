"""Hypothesis strategies: states with every kind of leaf that can be saved."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from asyncsave.format.dtypes import DTYPES as KNOWN_DTYPES
from asyncsave.state.values import TORCH_DTYPES


class Point(NamedTuple):
    x: Any
    y: Any


DTYPES = [
    dtype
    for name, dtype in sorted(TORCH_DTYPES.items())
    if name in KNOWN_DTYPES
    and not name.startswith(("bits", "uint1", "uint2", "uint3", "uint4", "uint5"))
    and not name.endswith("complex32")  # torch warns about them; test_roundtrip has them apart
]


NUMPY_DTYPES = (
    "? i1 u1 <i2 >i2 <u4 <i8 >i8 <f2 <f4 >f4 <f8 <c8 <c16 <U3 S5 <M8[s] <m8[ns]".split()  # noqa: SIM905
)


def from_bits(raw: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor with exactly these bytes."""
    tensor = torch.empty(0, dtype=dtype)
    storage = torch.frombuffer(bytearray(raw or b"\0"), dtype=torch.uint8).untyped_storage()
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tensor.set_(storage, 0, shape, tuple(reversed(strides)))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype, shape and layout, with any bits."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    count = int(np.prod(shape, dtype=np.int64))
    seed = draw(st.integers(0, 2**32 - 1))
    raw = np.random.default_rng(seed).bytes(count * dtype.itemsize)
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    tensor = from_bits(raw, dtype, shape)
    match draw(st.sampled_from(["as is", "transposed", "sliced", "expanded", "grad", "parameter"])):
        case "transposed" if tensor.dim() >= 2:
            return tensor.transpose(0, -1)
        case "sliced" if tensor.dim() >= 1:
            return tensor[..., ::2]
        case "expanded":
            return tensor.unsqueeze(0).expand(3, *shape)
        case "grad" if dtype.is_floating_point and dtype.itemsize > 1:
            return tensor.requires_grad_()
        case "parameter" if dtype.is_floating_point and dtype.itemsize > 1:
            return torch.nn.Parameter(tensor)
    return tensor


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """A NumPy array of any dtype that can be saved."""
    dtype = np.dtype(draw(st.sampled_from(NUMPY_DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).bytes(count * dtype.itemsize)
    if dtype.kind in "?U":
        raw = bytes(byte & 1 for byte in raw)
        raw = raw if dtype.kind == "?" else bytes(len(raw))
    array = np.frombuffer(bytearray(raw), dtype).reshape(shape) if raw else np.empty(shape, dtype)
    return array.T if draw(st.booleans()) else array


numpy_scalars = st.one_of(
    st.integers(-(2**31), 2**31 - 1).map(np.int32),
    st.floats(width=32).map(np.float32),
    st.booleans().map(np.bool_),
    st.integers(0, 2**64 - 1).map(np.uint64),
)

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**200), 2**200),
    st.floats(),
    st.complex_numbers(allow_nan=True),
    st.text(st.characters(), max_size=20),
    st.text(st.characters(categories=["Cs"]), max_size=3),
    st.binary(max_size=20),
    st.integers(0, 1000).map(lambda n: bytes(range(256)) * 3 + bytes(n)),
    st.lists(st.integers(0, 9), max_size=3).map(torch.Size),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    st.sampled_from([torch.device("cpu"), torch.device("cuda", 1), torch.device("meta")]),
    numpy_scalars,
)

keys = st.one_of(
    st.text(max_size=8),
    st.integers(),
    st.floats(allow_nan=False),
    st.none(),
    st.binary(max_size=4),
    st.tuples(st.integers(), st.text(max_size=3)),
)


def _containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dicts = st.dictionaries(keys, children, max_size=4)
    return st.one_of(
        dicts,
        dicts.map(collections.OrderedDict),
        st.lists(children, max_size=4),
        st.lists(children, max_size=4).map(tuple),
        st.tuples(children, children).map(lambda pair: Point(*pair)),
    )


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    """A nested state; some of its tensors are views of others in it."""
    leaves = st.one_of(plain, tensors(), arrays())
    tree = draw(st.recursive(leaves, _containers, max_leaves=12))
    base = draw(tensors().filter(lambda tensor: tensor.dim() >= 1 and not tensor.requires_grad))
    views = [base[1:], base[:2], base.detach(), base.unsqueeze(0), base[..., ::2]]
    return {"tree": tree, "base": base, "ties": draw(st.lists(st.sampled_from(views), max_size=4))}
