"""The records name files outside of the directory: what is read there, or that it was read."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .forge import Attack, forge

NAMES = {
    "parent": "../rank-00000.data",
    "absolute": "/etc/passwd",
    "through itself": "rank-00000.data/../../x",
    "nul": "rank-00000.data\0.json",
    "dot": ".",
    "empty": "",
    "device": "/dev/stdin",
    "other rank": "rank-00001.data",
    "case": "RANK-00000.DATA",
    "long": "a" * 100_000,
    "url": "file:///etc/passwd",
}


def data(name: str, directory: Path) -> None:
    forge(directory, rank={"files": [{"name": name, "length": 0}]})


def manifest(name: str, directory: Path) -> None:
    entry = {"file": name, "length": 1, "xxh3_128": "0" * 32}
    forge(directory, checkpoint={"ranks": [entry]})


def several(directory: Path) -> None:
    forge(directory, rank={"files": [{"name": "rank-00000.data", "length": 0}] * 2})


ATTACKS = {
    **{
        f"data: {key}": Attack(partial(data, name), says="file name") for key, name in NAMES.items()
    },
    **{f"manifest: {key}": Attack(partial(manifest, name)) for key, name in NAMES.items()},
    "two data files": Attack(several, says="file name"),
    "no data file": Attack(lambda directory: forge(directory, rank={"files": []})),
}
