"""Nesting without end, to overflow the stack of whoever follows it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .forge import Attack, forge_text, sign, sign_text, tree_text

NESTS = {
    "lists": ('{"t":"list","items":[', "null", "]}"),
    "tuples": ('{"t":"tuple","items":[', "null", "]}"),
    "dicts": ('{"t":"dict","keys":[0],"values":[', "null", "]}"),
    "keys": ('{"t":"dict","values":[0],"keys":[', "0", "]}"),
    "objects": ('{"t":"object","type":"x","state":', "null", "}"),
    "metadata": ('{"t":"odict","keys":[],"values":[],"metadata":', "null", "}"),
    "typed": ('{"t":"typed","type":"x","of":', "null", "}"),
    "plain": ('{"t":"plain","type":"frozenset","of":', "null", "}"),
    "made": ('{"t":"made","type":"collections.deque","of":{"t":"list","items":[', "null", "]}}"),
    "args": ('{"t":"made","type":"bytearray","of":{"t":"bytes","data":""},"args":', "0", "}"),
    "named tuples": ('{"t":"namedtuple","name":"P","fields":["x"],"items":[', "null", "]}"),
}


def nested(kind: str, depth: int) -> str:
    before, middle, after = NESTS[kind]
    return before * depth + middle + after * depth


def tree(kind: str, depth: int, directory: Path) -> None:
    forge_text(directory, tree_text(nested(kind, depth)))


def key(depth: int, directory: Path) -> None:
    text = nested("tuples", depth)
    forge_text(directory, tree_text(f'{{"t":"dict","keys":[{text}],"values":[1]}}'))


def ignored(before: str, after: str, depth: int, directory: Path) -> None:
    """A member that nobody knows, and that must be skipped."""
    rest = f',"later":{before * depth}0{after * depth}'
    forge_text(directory, tree_text("5", rest))


def metadata(depth: int, directory: Path) -> None:
    forge_text(directory, tree_text("5"))
    sign(directory, (directory / "rank-00000.json").read_bytes())
    text = (directory / "checkpoint.json").read_text()
    text = text.replace('"metadata": null', f'"metadata": {"[" * depth}{"]" * depth}')
    sign_text(directory, "{" + text[len('{"xxh3_128":"') + 34 :])


ATTACKS = {
    **{
        f"{kind}, {depth}": Attack(partial(tree, kind, depth))
        for kind in NESTS
        for depth in (129, 300, 900, 100_000)
    },
    **{f"tuple keys, {depth}": Attack(partial(key, depth)) for depth in (128, 300, 900, 100_000)},
    "as deep as allowed": Attack(partial(tree, "lists", 128), None),
    "key as deep as allowed": Attack(partial(key, 127), None),
    "lists to ignore": Attack(partial(ignored, "[", "]", 1_000_000)),
    "objects to ignore": Attack(partial(ignored, '{"a":', "}", 1_000_000)),
    "metadata": Attack(partial(metadata, 1_000_000)),
    "cut off": Attack(lambda directory: forge_text(directory, tree_text('{"t":"list","items":['))),
}
