"""Values that are made of others, of what they cannot be made of."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .forge import Attack, Json, chunk, forge, padded, tensor

STEP = 2**61 - 1  # numbers that far from each other have one hash in Python


def plain(type: str, of: Any) -> Json:
    return {"t": "plain", "type": type, "of": of}


def made(type: str, of: Any, args: Any = None) -> Json:
    return {"t": "made", "type": type, "of": of, "args": args}


def items(*nodes: Any) -> Json:
    return {"t": "tuple", "items": list(nodes)}


def members(**nodes: Any) -> Json:
    return {"t": "dict", "keys": list(nodes), "values": list(nodes.values())}


def tree(node: Any, directory: Path) -> None:
    forge(directory, node)


def bulk(node: Any, arrays: dict[str, Any], directory: Path) -> None:
    """A tree with these arrays as its tensors, in order; of kind torch, if nothing else is said."""
    data, tensors = b"", []
    for i, array in enumerate(arrays.values()):
        array = np.asarray(array)
        tensors.append(
            tensor(array.shape, len(data), array.dtype.name, name=f"x{i}")
            if array.dtype.kind != "S"
            else tensor((array.nbytes,), len(data), "uint8", kind="bytes", name=f"x{i}")
        )
        data += array.tobytes() + bytes(-array.nbytes % 16)
    forge(directory, node, tensors=tensors, chunks=[chunk(data)], data=padded(data))


def leaf(i: int) -> Json:
    return {"t": "tensor", "i": i}


PLAIN = {
    "set of a number": plain("set", 5),
    "set of a list": plain("set", {"t": "list", "items": []}),
    "set with an item twice": plain("set", items(1, 1.0)),
    "set of sets": plain("set", items(plain("set", items()))),
    "set of a tensor": plain("set", items(leaf(0))),
    "set of one hash": plain("set", items(*(i * STEP for i in range(1000)))),
    "frozenset of one hash": plain("frozenset", items(*(items(i * STEP) for i in range(1000)))),
    "set as a key": {"t": "dict", "keys": [plain("set", items())], "values": [1]},
    "set in a key": {"t": "dict", "keys": [items(plain("set", items()))], "values": [1]},
    "range of text": plain("range", items("a", "b", "c")),
    "range of step 0": plain("range", items(1, 2, 0)),
    "range of four": plain("range", items(1, 2, 3, 4)),
    "slice of five": plain("slice", items(1, 2, 3, 4, 5)),
    "path of a number": plain("pathlib.Path", 5),
    "path of a dict": plain("pathlib.Path", members()),
    "month 13": plain("datetime.date", items(2024, 13, 1)),
    "year of text": plain("datetime.date", items("2024", 1, 1)),
    "hour 25": plain("datetime.time", items(25, 0, 0, 0, 0, None)),
    "fold of 7": plain("datetime.time", items(1, 0, 0, 0, 7, None)),
    "time of three": plain("datetime.time", items(1, 0, 0)),
    "zone of text": plain("datetime.datetime", items(2024, 1, 1, 1, 1, 1, 1, 0, "UTC")),
    "days without end": plain("datetime.timedelta", items(10**15, 0, 0)),
    "days of nan": plain(
        "datetime.timedelta", items({"t": "float", "hex": "7ff8" + "0" * 12}, 0, 0)
    ),
    "zone of a number": plain("datetime.timezone", items(5)),
    "zone of two days": plain(
        "datetime.timezone", items(plain("datetime.timedelta", items(2, 0, 0)))
    ),
    "decimal of words": plain("decimal.Decimal", "one"),
    "decimal of a tuple": plain("decimal.Decimal", items(0, items(1), 5)),
    "decimal of a million digits": plain("decimal.Decimal", "9" * 1_000_000),
    "signalling nan as a key": {
        "t": "dict",
        "keys": [plain("decimal.Decimal", "sNaN")],
        "values": [1],
    },
    "fraction of words": plain("fractions.Fraction", "one/two"),
    "fraction of nothing": plain("fractions.Fraction", "1/0"),
    "fraction of a million digits": plain("fractions.Fraction", "9" * 1_000_000),
    "fraction of a long number": plain("fractions.Fraction", {"t": "int", "hex": "f" * 100_000}),
    "uuid of words": plain("uuid.UUID", "not one"),
    "uuid of bytes": plain("uuid.UUID", {"t": "bytes", "data": "AAAA"}),
    "layout of a dict": plain("torch.layout", members()),
}
UNKNOWN = {
    "a type that is not listed": plain("os.system", "ls"),
    "a container that is not listed": made("collections.ChainMap", {"t": "list", "items": []}),
    "a plain type as a container": made("set", {"t": "list", "items": []}),
}
LATE = {  # found when they are made, not before
    "layout of no name": plain("torch.layout", "torch.save"),
    "memory format of no name": plain("torch.memory_format", "torch.load"),
}
STATE = {"state": leaf(0), "inc": 1}
MADE = {
    "deque of a dict": made("collections.deque", members()),
    "deque that is too long": made("collections.deque", {"t": "list", "items": [1, 2]}, 1),
    "deque of text": made("collections.deque", {"t": "list", "items": [1]}, "x"),
    "deque of -1": made("collections.deque", {"t": "list", "items": []}, -1),
    "deque of 2^70": made(
        "collections.deque", {"t": "list", "items": []}, {"t": "int", "hex": "4" + "0" * 17}
    ),
    "defaultdict of os.system": made("collections.defaultdict", members(), "os.system"),
    "defaultdict of a list": made("collections.defaultdict", members(), {"t": "list", "items": []}),
    "Counter of a list": made("collections.Counter", {"t": "list", "items": []}),
    "bytearray of a number": made("bytearray", 2**40),
    "records of a number": made("numpy.ndarray", 5, items("struct", 4, False)),
    "generator of nothing": made("numpy.random.Generator", members()),
    "generator of os.system": made("numpy.random.Generator", members(bit_generator="os.system")),
    "generator of a list": made("numpy.random.Generator", {"t": "list", "items": []}),
    "generator of half a state": made(
        "numpy.random.Generator", members(bit_generator="PCG64", state=members(state=1))
    ),
    "generator of long numbers": made(
        "numpy.random.Generator",
        members(
            bit_generator="PCG64",
            state=members(state={"t": "int", "hex": "f" * 1000}, inc=1),
            has_uint32=0,
            uinteger=0,
        ),
    ),
    "sparse of a list": made("torch.sparse_coo", {"t": "list", "items": []}),
    "sparse with more": made(
        "torch.sparse_coo",
        members(indices=1, values=1, size=1, is_coalesced=True, more=1),
        items(False, False),
    ),
    "sparse of numbers": made(
        "torch.sparse_coo",
        members(indices=1, values=1, size=1, is_coalesced=True),
        items(False, False),
    ),
    "nested of numbers": made("torch.nested", {"t": "list", "items": [1]}, items(False, False)),
    "generator on no device": made("torch.Generator", members(device="cpu:x", state=1)),
}

FLAGS = items(False, False)


def sparse(indices: Any, values: Any, size: Any, coalesced: bool = True) -> Attack:
    node = made(
        "torch.sparse_coo",
        members(
            indices=leaf(0),
            values=leaf(1),
            size={"t": "size", "dims": size},
            is_coalesced=coalesced,
        ),
        FLAGS,
    )
    return Attack(partial(bulk, node, {"i": np.array(indices), "v": np.array(values)}))


def compressed(rows: Any, columns: Any, values: Any, size: Any) -> Attack:
    node = made(
        "torch.sparse_csr",
        members(
            compressed_indices=leaf(0),
            plain_indices=leaf(1),
            values=leaf(2),
            size={"t": "size", "dims": size},
        ),
        FLAGS,
    )
    arrays = {"r": np.array(rows), "c": np.array(columns), "v": np.array(values)}
    return Attack(partial(bulk, node, arrays))


def jagged(offsets: Any, lengths: Any = None, dim: Any = 1) -> Attack:
    arrays = {"v": np.zeros((4, 2), np.float32), "o": np.array(offsets)}
    if lengths is not None:
        arrays["l"] = np.array(lengths)
    node = made(
        "torch.jagged",
        members(
            values=leaf(0),
            offsets=leaf(1),
            lengths=None if lengths is None else leaf(2),
            ragged_dim=dim,
        ),
        FLAGS,
    )
    return Attack(partial(bulk, node, arrays), megabytes=128)


def channels(scales: Any, points: Any, axis: Any) -> Attack:
    node = made(
        "torch.per_channel_affine",
        members(int_repr=leaf(0), scales=leaf(1), zero_points=leaf(2), axis=axis),
        FLAGS,
    )
    arrays = {"q": np.zeros((2, 3), np.int8), "s": np.array(scales), "z": np.array(points)}
    return Attack(partial(bulk, node, arrays))


def twister(position: int) -> Attack:
    """A generator that stands beyond its numbers: NumPy would read there."""
    node = made(
        "numpy.random.Generator",
        members(bit_generator="MT19937", state=members(key=leaf(0), pos=position)),
    )

    def build(directory: Path) -> None:
        data = np.arange(624, dtype=np.uint32).tobytes()
        record = tensor((624,), 0, "<u4", kind="numpy")
        forge(directory, node, tensors=[record], chunks=[chunk(data)], data=padded(data))

    return Attack(build)


def records(dtype: Any, shape: tuple[int, ...] = (2, 8)) -> Attack:
    node = made("numpy.ndarray", leaf(0), dtype)

    def build(directory: Path) -> None:
        data = bytes(range(16))
        record = tensor(shape, 0, "|u1", kind="numpy")
        forge(directory, node, tensors=[record], chunks=[chunk(data)], data=padded(data))

    return Attack(build)


def field(name: Any, offset: Any, dtype: Any) -> Json:
    return items(name, offset, dtype)


def nested_dtype(depth: int) -> Any:
    node: Any = "<f4"
    for _ in range(depth):
        node = items("array", node, 1)
    return items("struct", 8, False, field("a", 0, node))


def repeated(type: str, **more: Any) -> Attack:
    """A value made of tensors that repeat their elements 2^40 times, by strides of 0."""

    def build(directory: Path) -> None:
        names = {"int_repr": 0, "scale": None, "zero_point": None} if "affine" in type else {}
        node = made(type, {"t": "list", "items": [leaf(0)]}, FLAGS)
        if names:
            node = made(type, members(int_repr=leaf(0), scale=1.0, zero_point=0), FLAGS)
        data = bytes(64)
        record = tensor((2**40,), 0, "int8", strides=[0])
        forge(directory, node, tensors=[record], chunks=[chunk(data)], data=padded(data))

    return Attack(build, says="strides")


def copies(count: int) -> Attack:
    """Many bytearrays of the same bytes."""

    def build(directory: Path) -> None:
        data = bytes(1 << 20)
        one = tensor((len(data),), 0, "uint8", kind="bytes")
        nodes = [made("bytearray", leaf(i)) for i in range(count)]
        forge(
            directory,
            {"t": "list", "items": nodes},
            tensors=[one] * count,
            chunks=[chunk(data)],
            data=padded(data),
        )

    return Attack(build, says="made of the same bytes")


ATTACKS = {
    "nested, repeated": repeated("torch.nested"),
    "quantized, repeated": repeated("torch.per_tensor_affine"),
    "400 copies": copies(400),
    **{name: Attack(partial(tree, node)) for name, node in PLAIN.items()},
    **{
        name: Attack(partial(tree, node), "UnsupportedVersionError", "install a newer one")
        for name, node in UNKNOWN.items()
    },
    **{name: Attack(partial(tree, node), "LoadError") for name, node in LATE.items()},
    **{name: Attack(partial(tree, node)) for name, node in MADE.items()},
    "typed with a long name": Attack(partial(tree, {"t": "typed", "type": "x" * 5000, "of": 1})),
    "typed as os.system": Attack(
        partial(tree, {"t": "typed", "type": "os.system", "of": "ls"}), None
    ),
    "typed keys that are one": Attack(
        partial(
            tree,
            {
                "t": "dict",
                "keys": [
                    {"t": "typed", "type": "A", "of": 1},
                    {"t": "typed", "type": "B", "of": 1},
                ],
                "values": [1, 2],
            },
        )
    ),
    "sparse: index beyond its size": sparse([[0, 9]], [1.0, 2.0], [3]),
    "sparse: index below 0": sparse([[0, -1]], [1.0, 2.0], [3]),
    "sparse: one index for two values": sparse([[0]], [1.0, 2.0], [3]),
    "sparse: indices of floats": sparse([[0.0, 1.0]], [1.0, 2.0], [3]),
    "sparse: said to be in order": sparse([[1, 0]], [1.0, 2.0], [3]),
    "sparse: size of 2^62": sparse([[0, 1]], [1.0, 2.0], [2**62, 2**62]),
    "csr: rows beyond the values": compressed([0, 9], [0], [1.0], [1, 1]),
    "csr: column beyond its size": compressed([0, 1], [7], [1.0], [1, 1]),
    "csr: rows that go back": compressed([0, 2, 1], [0, 1], [1.0, 2.0], [2, 2]),
    "jagged: beyond its values": jagged([0, 2, 9]),
    "jagged: back": jagged([0, 3, 2]),
    "jagged: below 0": jagged([-2, 0, 2]),
    "jagged: of nothing": jagged(np.zeros(0, np.int64)),
    "jagged: of two dimensions": jagged([[0, 2]]),
    "jagged: of floats": jagged([0.0, 2.0]),
    "jagged: lengths beyond": jagged([0, 2, 4], [9, 1]),
    "jagged: lengths below 0": jagged([0, 2, 4], [-9, 1]),
    "jagged: too few lengths": jagged([0, 2, 4], [1, 1, 1]),
    "jagged: dimension 9": jagged([0, 2, 4], dim=9),
    "jagged: dimension of text": jagged([0, 2, 4], dim="1"),
    "channels: too few scales": channels([0.5], [0, 0, 0], 1),
    "channels: axis 9": channels([0.5, 0.5, 0.5], [0, 0, 0], 9),
    "channels: axis of text": channels([0.5, 0.5, 0.5], [0, 0, 0], "1"),
    "twister beyond its numbers": twister(100_000),
    "twister before its numbers": twister(-5),
    "records: longer than their bytes": records(items("struct", 80, False, field("a", 0, "<f4"))),
    "records: field beyond": records(items("struct", 8, False, field("a", 6, "<f4"))),
    "records: field before": records(items("struct", 8, False, field("a", -4, "<f4"))),
    "records: objects": records(items("struct", 8, False, field("a", 0, "|O"))),
    "records: expression": records(items("struct", 8, False, field("a", 0, "(2,2)f4,os"))),
    "records: no fields": records("<f8"),
    "records: a field twice": records(
        items("struct", 8, False, field("a", 0, "<i2"), field("a", 4, "<i2"))
    ),
    "records: name of a number": records(items("struct", 8, False, field(1, 0, "<i2"))),
    "records: 2^40 of them in one": records(
        items("struct", 8, False, field("a", 0, items("array", "<f4", 2**40)))
    ),
    "records: nested": records(nested_dtype(100)),
    "records: of no dimension": records(items("struct", 16, False, field("a", 0, "<f4")), ()),
    "bytearray of a tensor": Attack(partial(bulk, made("bytearray", leaf(0)), {"x": np.zeros(4)})),
}
