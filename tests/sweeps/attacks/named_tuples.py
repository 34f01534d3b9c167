"""A NamedTuple's names become part of code that Python makes for its type."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .forge import Attack, forge

CODE = "x): pass\nimport os; os.system('touch owned')\ndef f(x"


def build(name: str, fields: list[str], directory: Path) -> None:
    items = [1] * len(fields)
    forge(directory, {"t": "namedtuple", "name": name, "fields": fields, "items": items})


def many(directory: Path) -> None:
    """Types without end: each one is made, and none may be kept."""
    tuples = [
        {"t": "namedtuple", "name": f"P{i}", "fields": ["x"], "items": [1]} for i in range(3000)
    ]
    forge(directory, {"t": "list", "items": tuples})


def key(directory: Path) -> None:
    node = {"t": "namedtuple", "name": "P", "fields": [CODE], "items": [1]}
    forge(directory, {"t": "dict", "keys": [node], "values": [1]})


def too_few(directory: Path) -> None:
    forge(directory, {"t": "namedtuple", "name": "P", "fields": ["x", "y"], "items": [1]})


NAMES: dict[str, tuple[str, list[str]]] = {
    "code for a name": (CODE, ["x"]),
    "code for a field": ("P", [CODE]),
    "default value": ("P", ["x=__import__('os')"]),
    "star": ("P", ["*x"]),
    "keyword": ("P", ["lambda"]),
    "keyword for a name": ("class", ["x"]),
    "private": ("P", ["_x"]),
    "dunder": ("P", ["__class__"]),
    "its own machinery": ("P", ["_cls"]),
    "twice": ("P", ["x", "x"]),
    "empty": ("", ["x"]),
    "empty field": ("P", [""]),
    "newline": ("P\n", ["x"]),
    "nul": ("P", ["x\0"]),
    # Python reads these as other identifiers than they are
    "ligature that is fi": ("P", ["ﬁ", "fi"]),
    "ligature alone": ("P", ["ﬁ"]),
    "wide letters that are None": ("P", ["Ｎｏｎｅ"]),
    "wide letters that are lambda": ("P", ["ｌａｍｂｄａ"]),
    "wide name": ("Ｐ", ["x"]),
    "257 fields": ("P", [f"x{i}" for i in range(257)]),
    "long name": ("P" * 257, ["x"]),
    "long field": ("P", ["x" * 100_000]),
}

ATTACKS = {
    **{key: Attack(partial(build, *names)) for key, names in NAMES.items()},
    "code for a field of a key": Attack(key),
    "too few items": Attack(too_few),
    "many": Attack(many, None, seconds=10),
    "256 fields": Attack(partial(build, "P", [f"x{i}" for i in range(256)]), None),
    "fields that tuples have": Attack(partial(build, "tuple", ["count", "index"]), None),
    "letters of the world": Attack(partial(build, "Größe", ["größe", "長さ"]), None),
}
