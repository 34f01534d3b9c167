"""Dict keys that cannot be keys, that are very many, or that all have one hash."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from .forge import TENSOR, Attack, chunk, forge, padded, tensor

# Python's hash of a number is the number modulo this
PRIME = 2**61 - 1


def build(keys: list[Any], directory: Path) -> None:
    forge(
        directory,
        {"t": "dict", "keys": keys, "values": [1] * len(keys)},
        tensors=[tensor()],
        chunks=[chunk(b"abcd")],
        data=padded(b"abcd"),
    )


def items(*nodes: Any) -> dict[str, Any]:
    return {"t": "tuple", "items": list(nodes)}


def count(keys: int, values: int, directory: Path) -> None:
    forge(directory, {"t": "dict", "keys": list(range(keys)), "values": [0] * values})


def long_above_many(directory: Path) -> None:
    """A key of 4 MB, which is in the name of each of 20 000 keys below it."""
    below = {"t": "dict", "keys": list(range(20_000)), "values": [0] * 20_000}
    forge(directory, {"t": "dict", "keys": ["a" * 4_000_000], "values": [below]})


def colliding(n: int) -> list[Any]:
    return [{"t": "int", "hex": f"{PRIME * (i + 2**30):x}"} for i in range(n)]


UNHASHABLE: dict[str, Any] = {
    "list": {"t": "list", "items": []},
    "dict": {"t": "dict", "keys": [], "values": []},
    "odict": {"t": "odict", "keys": [], "values": []},
    "object": {"t": "object", "type": "x", "state": 1},
    "tensor": TENSOR,
    "list in a tuple": items(items({"t": "list", "items": []})),
    "tensor in a tuple": items(TENSOR),
    "object in a named tuple": {
        "t": "namedtuple",
        "name": "P",
        "fields": ["x"],
        "items": [{"t": "object", "type": "x", "state": 1}],
    },
}
UNNAMEABLE = {
    "datetime of no unit": [{"t": "numpy", "dtype": "<M8", "data": "AQAAAAAAAAA="}],
    "timedelta of no unit": [{"t": "numpy", "dtype": "<m8", "data": "AQAAAAAAAAA="}],
}
ODD: dict[str, Any] = {
    "text and null": [None, "None", True, "True"],
    "datetime of year 9e18": [{"t": "numpy", "dtype": "<M8[Y]", "data": "/////////38="}],
    "long integer": [{"t": "int", "hex": "f" * 20_000}],
    "very long integer in a tuple": [items({"t": "int", "hex": "f" * 1_000_000})],
    "size": [{"t": "size", "dims": [1, 2]}],
    "complex of nans": [{"t": "complex", "hex": "7ff8000000000000" * 2}],
    "long text": ["x" * 1_000_000],
}

ATTACKS = {
    **{name: Attack(partial(build, [key])) for name, key in UNHASHABLE.items()},
    **{name: Attack(partial(build, keys)) for name, keys in UNNAMEABLE.items()},
    **{name: Attack(partial(build, keys), None) for name, keys in ODD.items()},
    "more keys than values": Attack(partial(count, 2, 1)),
    "more values than keys": Attack(partial(count, 1, 2)),
    "50 000 keys": Attack(partial(count, 50_000, 50_000), None),
    "a long key above many": Attack(long_above_many, None),
    "one hash": Attack(partial(build, colliding(40_000)), says="hash"),
    "one hash in tuples": Attack(partial(build, [items(key) for key in colliding(40_000)])),
    "a few of one hash": Attack(partial(build, [-1, -2, *colliding(8)]), None),
}
