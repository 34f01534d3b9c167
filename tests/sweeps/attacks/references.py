"""The tree refers to tensors that are not there, to one many times, or to none at all."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from .forge import TENSOR, Attack, chunk, forge, padded, tensor

DATA = bytes(1 << 20)


def build(tree: Any, directory: Path) -> None:
    tensors = [tensor((1 << 20,)), tensor((1 << 20,), kind="bytes")]
    forge(directory, tree, tensors=tensors, chunks=[chunk(DATA)], data=padded(DATA))


def items(*nodes: Any) -> dict[str, Any]:
    return {"t": "list", "items": list(nodes)}


ATTACKS = {
    "one too far": Attack(partial(build, {"t": "tensor", "i": 2})),
    "inside a list": Attack(partial(build, items(1, items(2, {"t": "tensor", "i": 2})))),
    "in an object": Attack(
        partial(build, {"t": "object", "type": "x", "state": {"t": "tensor", "i": 9}})
    ),
    "in metadata": Attack(
        partial(
            build, {"t": "odict", "keys": [], "values": [], "metadata": {"t": "tensor", "i": 9}}
        )
    ),
    "twice": Attack(partial(build, items(TENSOR, TENSOR)), says="is twice"),
    "100 000 times": Attack(
        partial(build, items(*[TENSOR, {"t": "tensor", "i": 1}] * 50_000)), megabytes=100
    ),
    "never": Attack(partial(build, items()), None),
}
