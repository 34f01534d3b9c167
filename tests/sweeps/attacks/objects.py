"""Objects whose type's name is something to be imported or called. It is text, for people."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from .forge import Attack, forge

TYPES = ["os.system", "builtins.eval", "torch.nn.Linear", "antigravity", "", "a\0b", "../x"]


def build(name: str, state: Any, directory: Path) -> None:
    forge(directory, {"t": "object", "type": name, "state": state})


def member(tree: dict[str, Any], directory: Path) -> None:
    forge(directory, tree)


REDUCE = {"t": "dict", "keys": ["__reduce__", "__class__"], "values": ["os.system", "id"]}

ATTACKS = {
    **{f"type {name!r}": Attack(partial(build, name, 1), None) for name in TYPES},
    "with __reduce__": Attack(partial(build, "os.system", REDUCE), None),
    "no state": Attack(partial(member, {"t": "object", "type": "x"})),
    "no type": Attack(partial(member, {"t": "object", "state": 1})),
    "metadata of a number": Attack(
        partial(member, {"t": "odict", "keys": [], "values": [], "metadata": 5}), None
    ),
}
