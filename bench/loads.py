"""Ways of reading a checkpoint back, and the files that they read.

A new way is a line in `loads`, and one in `KINDS` if nothing has written what it reads.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import asyncsave

Tensors = dict[str, torch.Tensor]

NOTHING, STORED, BOTH = "nothing", "stored and decoded bytes", "all bytes, before any is changed"
NEW, EXISTING = "new memory", "existing tensors"

TORCH, MAPPED = "torch.load", "torch.load(mmap=True) + clone"
DCP, LOAD_OFF = "dcp.load", "asyncsave.load, off"
RESTORE_OFF, RESTORE_1 = "asyncsave.restore, off", "asyncsave.restore, level 1"


# -- what is read -----------------------------------------------------------------------------


def _safetensors() -> Any:
    return importlib.import_module("safetensors.torch")


def _asyncsave(state: Tensors, path: Path, compression: Any) -> None:
    asyncsave.save(state, path, compression=compression).result()


def save_dcp(state: Tensors, path: Path, threads: int = 1) -> None:
    """``torch.distributed.checkpoint.save``: a directory, with a file for each thread."""
    dcp_save(state, storage_writer=FileSystemWriter(path, thread_count=threads))


KINDS: dict[str, Callable[[Tensors, Path], None]] = {
    "torch.pt": torch.save,
    "safetensors": lambda state, path: _safetensors().save_file(state, path),
    "dcp": save_dcp,
    "off": partial(_asyncsave, compression="off"),
    "level1": partial(_asyncsave, compression=1),
}
"""What writes a file or directory of each name."""


# -- how it is read ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """A way of reading.

    Attributes:
        kind: what it reads, of `KINDS`.
        where: NEW or EXISTING.
        checked: what is known of the bytes when it returns.
        read: reads what is at a path; returns the tensors, and fills those it is given if it is one
            for existing ones.
    """

    name: str
    kind: str
    where: str
    checked: str
    read: Callable[[Path, Tensors], Tensors | None]


def load_dcp(path: Path, into: Tensors) -> Tensors:
    """``torch.distributed.checkpoint.load``."""
    dcp_load(into, checkpoint_id=path)
    return into


def _clone(state: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in state.items()}


def _copy(path: Path, into: Tensors) -> Tensors:
    for name, tensor in torch.load(path).items():
        into[name].copy_(tensor)
    return into


def _restore(path: Path, into: Tensors) -> Tensors:
    asyncsave.restore(path, into)
    return into


def _verify(path: Path, _: Tensors) -> None:
    asyncsave.verify(path)


def _load(path: Path, _: Tensors) -> Tensors:
    found: Tensors = asyncsave.load(path)
    return found


def loads() -> list[Load]:
    """Return all ways."""
    return [
        Load(TORCH, "torch.pt", NEW, NOTHING, lambda path, _: torch.load(path)),
        Load(MAPPED, "torch.pt", NEW, NOTHING, lambda p, _: _clone(torch.load(p, mmap=True))),
        Load(
            "safetensors load_file + clone",
            "safetensors",
            NEW,
            NOTHING,
            lambda path, _: _clone(_safetensors().load_file(path)),
        ),
        Load(LOAD_OFF, "off", NEW, STORED, _load),
        Load("asyncsave.load, level 1", "level1", NEW, STORED, _load),
        Load("torch.load + copy_", "torch.pt", EXISTING, NOTHING, _copy),
        Load(DCP, "dcp", EXISTING, NOTHING, load_dcp),
        Load(RESTORE_OFF, "off", EXISTING, BOTH, _restore),
        Load(RESTORE_1, "level1", EXISTING, BOTH, _restore),
        Load("asyncsave.verify, off", "off", "–", STORED, _verify),
        Load("asyncsave.verify, level 1", "level1", "–", STORED, _verify),
    ]
