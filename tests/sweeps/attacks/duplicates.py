"""The same name twice: one reader takes the first, another the last, and they see two states."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from .forge import TENSOR, Attack, chunk, forge, forge_text, padded, tensor, tree_text


def keys(kind: str, names: list[Any], directory: Path) -> None:
    forge(directory, {"t": kind, "keys": names, "values": list(range(len(names)))})


def twin_of(node: Any) -> dict[str, Any]:
    return {"t": "tuple", "items": [node]}


def members(directory: Path) -> None:
    """The tree twice: the last one counts, as it does for Python's json."""
    forge_text(directory, tree_text("5", ',"tree":{"t":"list","items":"x"}'))


def named(directory: Path) -> None:
    """Two tensors of one name, which a glob then both means."""
    tree = {"t": "list", "items": [TENSOR, {"t": "tensor", "i": 1}]}
    tensors, data = [tensor(), tensor()], b"abcd"
    forge(directory, tree, tensors=tensors, chunks=[chunk(data)], data=padded(data))


NAN = {"t": "float", "hex": "7ff8000000000000"}
ZERO = {"t": "numpy", "dtype": "<i4", "data": "AAAAAA=="}

ATTACKS = {
    "text": Attack(partial(keys, "dict", ["a", "a"]), says="twice"),
    "text in an OrderedDict": Attack(partial(keys, "odict", ["a", "b", "a"]), says="twice"),
    "one and true": Attack(partial(keys, "dict", [1, True]), says="twice"),
    "one and 1.0": Attack(partial(keys, "dict", [1, 1.0]), says="twice"),
    "zeros": Attack(partial(keys, "dict", [0, ZERO]), says="twice"),
    "tuples": Attack(partial(keys, "dict", [twin_of("a"), twin_of("a")]), says="twice"),
    "nans are not the same": Attack(partial(keys, "dict", [NAN, NAN]), None),
    "1 and '1' are not the same": Attack(partial(keys, "dict", [1, "1"]), None),
    "members": Attack(members),
    "tensors": Attack(named, None),
}
