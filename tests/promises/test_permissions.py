"""What is written may be read by whom the umask lets, and nothing is ever pickled."""

from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import asyncsave
from tests.doubles.disks import WrappedDisk


@pytest.fixture(params=[0o077, 0o022, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    mask: int = request.param
    before = os.umask(mask)
    yield mask
    os.umask(before)


@pytest.mark.parametrize("compression", ["off", 1])
def test_the_umask_is_kept(tmp_path: Path, umask: int, compression: object) -> None:
    state = {"w": torch.randn(1000)}
    asyncsave.save(state, tmp_path / "new" / "single", compression=compression).result()  # type: ignore[arg-type]
    with asyncsave.Checkpointer(tmp_path / "run", compression=compression) as run:  # type: ignore[arg-type]
        run.save(1, state)
    made = [
        path for top in ("new", "run") for path in (tmp_path / top, *(tmp_path / top).rglob("*"))
    ]
    assert len(made) == 10
    for path in made:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path
    assert os.umask(umask) == umask  # nor does a save change it


class LookingDisk(WrappedDisk):
    """Looks at who may read what, just before it gets its name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def rename(self, source: Path, target: Path) -> None:
        self.seen += [stat.S_IMODE(path.stat().st_mode) for path in (source, *source.iterdir())]
        super().rename(source, target)


def test_what_is_being_written_is_not_more_open(tmp_path: Path, umask: int) -> None:
    disk = LookingDisk()
    asyncsave.save({"w": torch.ones(10)}, disk.at(tmp_path / "a")).result()
    assert len(disk.seen) == 4
    assert not any(mode & umask for mode in disk.seen)


class Trap:
    """Counts what asks to be pickled, or unpickled."""

    def __init__(self) -> None:
        self.w = torch.ones(3)

    def __reduce__(self) -> str:
        raise AssertionError("pickled")

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"w": self.w}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.w = state["w"]


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That no module imports pickle is seen to in test_architecture.py; nor does torch for us."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"m": model, "o": optimizer, "r": asyncsave.RngState(), "t": Trap(), "n": [1, "x"]}
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    asyncsave.save(state, tmp_path / "a").result()
    asyncsave.load(tmp_path / "a")
    asyncsave.restore(tmp_path / "a", state)
    asyncsave.verify(tmp_path / "a")
    for path in (tmp_path / "a").iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK"))  # pickle, and torch's zip of it
