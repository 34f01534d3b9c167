"""How tests/golden was made, by hand and once for each format: ``python -m tests.make_golden``.

Golden files are never made anew: what a released version wrote must stay readable, so a change of
the format adds a directory and leaves these alone. Hence this refuses to overwrite anything. It
also writes what the checkpoints hold in a form that has nothing to do with asyncsave: the JSON that
`describe` makes of the state before it is saved. At the end it prints the digests, for
tests/rooms/test_format.py.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import json
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import asyncsave
from asyncsave.format.dtypes import DTYPES
from asyncsave.state import values
from tests.support import bits

GOLDEN = Path(__file__).parent / "golden"

TORCH_DTYPES = [dtype for name, dtype in sorted(values.TORCH_DTYPES.items()) if name in DTYPES]

_LATER_THAN_2_6 = {"float8_e8m0fnu", "float4_e2m1fn_x2", "bcomplex32"}

# how NumPy shows elements of the dtypes that it has; of the others it has the bits
_NUMPY = {
    "bool": "|b1",
    "uint8": "|u1",
    "int8": "|i1",
    "uint16": "<u2",
    "int16": "<i2",
    "uint32": "<u4",
    "int32": "<i4",
    "uint64": "<u8",
    "int64": "<i8",
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
    "complex64": "<c8",
    "complex128": "<c16",
}


class Pair(NamedTuple):
    left: Any
    right: Any


class Stateful:
    """An object that is saved through ``state_dict()``."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state


# -- trees as JSON ----------------------------------------------------------------------------


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _doubles(*values: float) -> str:
    return struct.pack(f">{len(values)}d", *values).hex()


def describe(value: Any) -> Any:
    """Return a tree as JSON that two trees share only if they are the same to the bit."""
    match value:
        case None:
            return ["none"]
        case torch.Tensor():
            dtype, parameter = str(value.dtype), isinstance(value, torch.nn.Parameter)
            flags = [value.requires_grad, parameter]
            return ["tensor", dtype, list(value.shape), *flags, _packed(bits(value))]
        case np.ndarray():
            return ["array", value.dtype.str, list(value.shape), _packed(value.tobytes())]
        case np.generic():
            return ["scalar", value.dtype.str, value.tobytes().hex()]
        case bool():
            return ["bool", value]
        case int():
            return ["int", hex(value)]
        case float():
            return ["float", _doubles(value)]
        case complex():
            return ["complex", _doubles(value.real, value.imag)]
        case str():
            return ["str", value.encode("utf-8", "surrogatepass").hex()]
        case bytes():
            return ["bytes", _packed(value)]
        case torch.Size():
            return ["size", list(value)]
        case torch.dtype() | torch.device():
            return [type(value).__name__, str(value).removeprefix("torch.")]
        case Stateful():
            return describe(value.state)
        case dict():
            kind = "odict" if isinstance(value, collections.OrderedDict) else "dict"
            return [kind, [[describe(key), describe(item)] for key, item in value.items()]]
        case tuple() if hasattr(value, "_fields"):
            return [type(value).__name__, list(value._fields), [describe(item) for item in value]]
        case list() | tuple():
            return [type(value).__name__, [describe(item) for item in value]]
    raise TypeError(type(value))


def as_numpy(plain: Any) -> Any:
    """Return the description of a tree as numpy_reader gives it, which knows no torch."""
    if not isinstance(plain, list) or not plain:
        return plain
    match plain:
        case ["tensor", str(name), shape, _, _, data]:
            dtype = getattr(torch, name.removeprefix("torch."))
            bare = f"<u{dtype.itemsize}" if dtype.itemsize > 1 else "|u1"
            return ["array", _NUMPY.get(name.removeprefix("torch."), bare), shape, data]
        case ["size", dims]:
            return ["tuple", [["int", hex(size)] for size in dims]]
        case ["dtype" | "device", str(name)]:
            return ["str", name.encode().hex()]
    return [as_numpy(item) for item in plain]


# -- states -----------------------------------------------------------------------------------


def raw_tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor with these bytes, for dtypes in which torch can compute nothing."""
    storage = torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage()
    return view_of(storage, dtype, shape)


def view_of(storage: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a row-major tensor on the first bytes of a storage."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, tuple(reversed(strides)))


def tiny() -> Any:
    """The example of FORMAT.md."""
    w = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    return {"w": w, "tied": w.t()[1:], "lr": 0.1, 3: (None, float("nan"))}


def kinds() -> Any:
    """Every kind of node, and every kind of array."""
    payload = struct.unpack(">d", bytes.fromhex("fff8000000c0ffee"))[0]
    w = torch.nn.Parameter(torch.tensor([[1.5, -0.0], [float("inf"), float("nan")]]))
    array = np.arange(6, dtype=">i4").reshape(2, 3)
    text = '\0 \x7f é \u2028 \U0001f600 "\\/'
    return {
        "constants": [None, True, False],
        "ints": [0, -1, 2**53, -(2**53), 2**53 + 1, -(2**64), 2**300, -(3**400)],
        "floats": [0.1, -0.0, 1.0, 1e22, 1e-7, 5e-324, 1.7976931348623157e308, -1e16, 2.0**60],
        "special": [float("inf"), float("-inf"), float("nan"), payload],
        "complex": [complex(0.1, -0.0), complex(payload, float("-inf"))],
        "strs": ["", text, "\ud800", "a\udfff\ud800z"],
        "bytes": [b"", bytes(range(256)), bytes(range(256)) + b"!", b"long" * 200],
        "torch": [torch.Size([]), torch.Size([2, 0, 2**40]), torch.bfloat16, torch.device("cpu")],
        "devices": [torch.device("cuda", 1), torch.device("meta")],
        "empty": [{}, [], (), collections.OrderedDict(), {"": {"": {}}}],
        "tuples": ((1, (2,)), Pair(1, Pair([], w.detach()[1]))),
        "ordered": collections.OrderedDict([("z", 1), ("a", {"z": 2, "a": 3})]),
        "keys": {
            1: "int",
            "1": "str",
            -0.5: "float",
            None: "None",
            b"\xff": "bytes",
            (1, ("2", None)): "tuple",
            2**70: "big",
            1j: "complex",
            True + 1: "two",
            "a.b": 1,
            "a": {"b": 2},
            "\ud800": "surrogate",
            torch.float32: "dtype",
            Pair(1, "x"): "pair",
            np.int8(77): "scalar",
            torch.Size([3]): "size",
        },
        "object": Stateful({"nested": Stateful([w, 1])}),
        "parameter": w,
        "frozen": torch.nn.Parameter(torch.ones(3), requires_grad=False),
        "grad": torch.ones(2, requires_grad=True),
        "arrays": [
            array,
            array,
            array.T,
            np.array(2.5),
            np.empty((0, 3), np.uint16),
            np.array([True, False]),
            np.array(["é", "abc"]),
            np.array([b"x", b"yz"]),
            np.array(["2020-01-01", "NaT"], "M8[D]"),
            np.array([1, -5], "m8[ns]"),
            np.array([1 + 2j], np.complex64),
            np.array([1, 2], "<f2"),
            np.array([1, 2], ">f8"),
        ],
        "scalars": [
            np.float32(0.1),
            np.float64(-0.0),
            np.int64(-(2**63)),
            np.uint64(2**64 - 1),
            np.bool_(True),
            np.complex64(1 - 2j),
            np.str_("é"),
            np.bytes_(b"ab"),
            np.datetime64("2020-01-01T00:00", "m"),
            np.timedelta64(7, "s"),
        ],
    }


def dtypes() -> Any:
    """Every dtype of torch 2.6. All are views of the same 48 bytes, which keeps the file short."""
    storage = torch.frombuffer(
        bytearray(np.random.default_rng(1).bytes(48)), dtype=torch.uint8
    ).untyped_storage()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex32 is experimental
        return {
            str(dtype): view_of(storage, dtype, (3, 16 // dtype.itemsize))
            for dtype in TORCH_DTYPES
            if str(dtype).removeprefix("torch.") not in _LATER_THAN_2_6
        } | {"column": view_of(storage, torch.int16, (3, 8))[:, 3], "bool": torch.tensor([True])}


def codings() -> Any:
    """Every coding, of odd and of even counts, compressible and not."""
    random = np.random.default_rng(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape, np.float32))

    return {
        "bfloat16": normal(1201).bfloat16(),
        "float32": normal(31, 33),
        "scaled": normal(401).mul(1e-30),
        "transposed": normal(7, 11).t(),
        "expanded": normal(5, 1).expand(5, 40),
        "complex64": torch.complex(normal(301), normal(301)),
        "float16": normal(1200).half(),
        "int32": torch.arange(700, dtype=torch.int32),
        "float64": normal(301).double(),
        "int64": torch.arange(601).reshape(601, 1),
        "uint8": torch.arange(3000).remainder(7).to(torch.uint8),
        "float8": normal(900).to(torch.float8_e4m3fn),
        "bools": torch.arange(2000) % 3 == 0,
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
    }


def chunks() -> Any:
    """Tensors that lie in several chunks, at addresses that are not aligned."""
    counts = torch.arange(50_001) // 500
    floats = counts[:40_003].float()
    return {
        "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "halves": counts.bfloat16(),
        "floats": floats,
        "view": floats[16_000:17_000].view(10, 100).t(),
        "array": np.arange(9000, dtype=">i4") // 100,
    }


CHECKPOINTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tiny": (tiny, {"compression": "off"}),
    "kinds": (kinds, {"compression": 1}),
    "dtypes": (dtypes, {"compression": "off"}),
    "codings-1": (codings, {"compression": 1}),
    "codings-6": (codings, {"compression": 6}),
    "codings-6-bytes": (codings, {"compression": asyncsave.Compression(6, byte_planes=False)}),
    "chunks": (chunks, {"compression": 6, "memory_limit": 3_000_000}),
}


def plain_path(name: str) -> Path:
    """Return the file that says what a golden checkpoint holds; one for all codings of a state."""
    return GOLDEN / f"{name.partition('-')[0]}.plain.json"


def main() -> None:
    """Make what is not there yet; print all digests."""
    for name, (make, arguments) in CHECKPOINTS.items():
        path = GOLDEN / name
        if path.exists():
            print(f"{path} is there already, and stays as it is", file=sys.stderr)
            continue
        state = make()
        plain = json.dumps(describe(state)) + "\n"
        expected = plain_path(name)
        if expected.exists() and expected.read_text() != plain:
            sys.exit(f"{expected} is there already, and says something else")
        expected.parent.mkdir(exist_ok=True)
        expected.write_text(plain)
        asyncsave.save(state, path, **arguments).result()
    for file in sorted(GOLDEN.rglob("*")):
        if file.is_file():
            name = file.relative_to(GOLDEN).as_posix()
            print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {name}")


if __name__ == "__main__":
    main()
