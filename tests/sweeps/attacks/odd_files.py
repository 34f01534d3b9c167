"""A file of the checkpoint is no file: reading it would block for ever, or mean something else."""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path

from .forge import Attack, forge
from .links import FILES


def build(kind: str, name: str, directory: Path) -> None:
    forge(directory, 5)
    file = directory / name
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            here = Path.cwd()
            os.chdir(directory)  # the names of sockets are short
            listener.bind(name)
            os.chdir(here)


ATTACKS = {
    f"{name} is a {kind}": Attack(partial(build, kind, name), raises="IntegrityError")
    for kind in ("pipe", "directory", "socket")
    for name in FILES
}
