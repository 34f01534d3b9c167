"""A file of the checkpoint is a link: to a secret, to an endless device, to itself, to a twin."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .forge import Attack, forge

FILES = ("checkpoint.json", "rank-00000.json", "rank-00000.data")
TARGETS = {
    "secret": "/etc/passwd",
    "endless": "/dev/zero",
    "memory": "/proc/self/mem",
    "nowhere": "nothing",
    "twin": "twin",
}


def build(name: str, target: str, directory: Path) -> None:
    forge(directory, {"t": "dict", "keys": [], "values": []})
    file = directory / name
    file.rename(directory / "twin")
    file.symlink_to(target)


def loop(name: str, directory: Path) -> None:
    build(name, name, directory)


def deep(directory: Path) -> None:
    forge(directory.parent / "elsewhere", 5)
    directory.mkdir()
    for name in FILES:
        (directory / name).symlink_to(directory.parent / "elsewhere" / name)


ATTACKS = {
    **{
        f"{name} to {key}": Attack(partial(build, name, target), raises="IntegrityError")
        for name in FILES
        for key, target in TARGETS.items()
    },
    **{f"{name} to itself": Attack(partial(loop, name), raises="IntegrityError") for name in FILES},
    "all to another checkpoint": Attack(deep, raises="IntegrityError"),
}
