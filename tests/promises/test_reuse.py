"""What did not change is stored once, and every checkpoint is whole by itself all the same."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asyncsave
from asyncsave import Checkpointer, Saver
from asyncsave.state.changes import Stillness
from asyncsave.state.flatten import flatten
from tests.doubles.disks import WrappedDisk
from tests.doubles.fault_disk import FaultDisk, Faults
from tests.support import assert_same

SMALL: Any = {"durable": False}
PIECE = 65_536 // 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 KiB: what does not change is told by whole ones."""
    monkeypatch.setattr("asyncsave.pipeline.budget.CHUNK_BYTES", 65_536)


def pieces(*seeds: int) -> dict[str, torch.Tensor]:
    """Return a tensor for each seed, of a chunk's length."""
    return {f"p{i:03d}": _piece(seed) for i, seed in enumerate(seeds)}


def _piece(seed: int) -> torch.Tensor:
    return torch.randn(PIECE, generator=torch.Generator().manual_seed(seed))


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir() if each.suffix == ".data")


def step(run: Path, number: int) -> Path:
    return run / f"step-{number:09d}"


class LoRA:
    """A frozen base with small trained parts, whose names lie between those of the base."""

    def __init__(self, layers: int = 4, width: int = 256) -> None:
        torch.manual_seed(0)
        linear = torch.nn.Linear
        self.model = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {"base": linear(width, width), "lora": linear(4, width, bias=False)}
            )
            for _ in range(layers)
        )
        for layer in self.model:
            layer["base"].requires_grad_(False)  # type: ignore[index]
        trained = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(trained)

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def train(self) -> None:
        for each in self.model.parameters():
            if each.requires_grad:
                each.grad = torch.randn_like(each)
        self.optimizer.step()


@pytest.mark.parametrize("compression", ["off", 1, 6])
def test_a_frozen_base_is_stored_once(tmp_path: Path, compression: Any) -> None:
    run = tmp_path / "run"
    lora = LoRA()
    with Checkpointer(run, compression=compression, durable=False) as ckpt:
        for number in range(1, 6):
            lora.train()
            handle = ckpt.save(number, lora.state, block=True)
            assert handle is not None
            report = handle.result()
            if number > 1:
                assert report.stored_bytes < 100_000, report
                assert report.shared_bytes > 500_000
                assert report.shared_chunks >= report.chunks - 3
        infos = ckpt.checkpoints()
        assert [info.shared_bytes > 0 for info in infos] == [False, True, True, True, True]
        assert ckpt.stats.shared_bytes == sum(info.shared_bytes for info in infos)
    linked = [next(step(run, n).glob("*linked*")) for n in range(2, 6)]
    inodes = {each.stat().st_ino for each in linked}
    assert inodes == {(step(run, 1) / "rank-00000.data").stat().st_ino}
    loaded = [asyncsave.load(step(run, number)) for number in range(1, 6)]
    for keep in range(1, 6):
        copy = tmp_path / f"only {keep}"
        shutil.copytree(step(run, keep), copy)
        assert_same(asyncsave.load(copy), loaded[keep - 1])
    for number in (1, 3, 2, 4):
        shutil.rmtree(step(run, number))
        asyncsave.verify(run)
    assert_same(asyncsave.load(run), loaded[4])
    assert_same(
        asyncsave.load(run)["model"]["0.base.weight"], lora.model[0]["base"].weight.detach()
    )


def test_a_run_that_goes_on_takes_from_what_is_on_the_disk(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        with Checkpointer(tmp_path, **SMALL) as ckpt:
            state = pieces(1, 2, 3, number + 10)
            assert ckpt.restore(pieces(0, 0, 0, 0)) == (number - 1 or None)
            ckpt.save(number, state, block=True)
            report = ckpt.stats.reports[-1]
            assert report.shared_chunks == (3 if number > 1 else 0)
        assert_same(asyncsave.load(tmp_path), state)


def test_one_state_at_two_paths(tmp_path: Path) -> None:
    state = pieces(1, 2, 3)
    with Saver(**SMALL) as saver:
        saver.save(state, tmp_path / "last").result()
        report = saver.save(state, tmp_path / "best").result()
        assert report.shared_chunks == report.chunks == 3
        assert report.stored_bytes < 4000
        saver.save(state, tmp_path / "last", overwrite=True).result()
    shutil.rmtree(tmp_path / "last")
    assert_same(asyncsave.load(tmp_path / "best"), state)
    asyncsave.verify(tmp_path / "best")


@pytest.mark.parametrize("make", [Checkpointer, None])
def test_off_writes_everything(tmp_path: Path, make: Any) -> None:
    state = pieces(1, 2)
    if make is None:
        with Saver(reuse="off", **SMALL) as saver:
            reports = [saver.save(state, tmp_path / str(i)).result() for i in range(2)]
    else:
        with Checkpointer(tmp_path, reuse="off", **SMALL) as ckpt:
            for i in range(2):
                ckpt.save(i, state, block=True)
            reports = ckpt.stats.reports
    assert [report.shared_chunks for report in reports] == [0, 0]
    assert {names(path) == ["rank-00000.data"] for path in tmp_path.iterdir()} == {True}


def test_a_change_that_torch_does_not_see_is_saved(tmp_path: Path) -> None:
    state = pieces(1, 2, 3)
    with Checkpointer(tmp_path, **SMALL) as ckpt:
        ckpt.save(1, state, block=True)
        state["p001"].data.view(-1).numpy()[7] = 5.0
        assert state["p001"]._version == 0
        ckpt.save(2, state, block=True)
        assert ckpt.stats.reports[-1].shared_chunks == 2
        assert ckpt.load()["p001"][7] == 5
        assert ckpt.load(step=1)["p001"][7] != 5


class LinkDisk(WrappedDisk):
    """A disk whose links do something else."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def link(self, source: Path, target: Path, *, sync: bool) -> None:
        self.act(source)
        super().link(source, target, sync=sync)


def refuse(number: int) -> Any:
    def act(source: Path) -> None:
        raise OSError(number, os.strerror(number))

    return act


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP])
@pytest.mark.parametrize("compression", ["off", 1])
def test_where_links_are_refused_all_is_written(
    tmp_path: Path, number: int, compression: Any
) -> None:
    disk = LinkDisk(refuse(number))
    with Checkpointer(disk.at(tmp_path), compression=compression, **SMALL) as ckpt:
        ckpt.save(1, pieces(1, 2, 3), block=True)
        ckpt.save(2, pieces(1, 7, 3), block=True)
        report = ckpt.stats.reports[-1]
        assert report.shared_chunks == report.shared_bytes == 0
        assert_same(ckpt.load(), pieces(1, 7, 3))
    assert names(step(tmp_path, 2)) == ["rank-00000.data"]
    asyncsave.verify(tmp_path)


def test_a_link_that_fails_is_no_failure_of_the_save(tmp_path: Path) -> None:
    with Checkpointer(LinkDisk(refuse(errno.EIO)).at(tmp_path), **SMALL) as ckpt:
        for number in (1, 2, 3):
            ckpt.save(number, pieces(1, 2), block=True)
        assert [report.shared_chunks for report in ckpt.stats.reports] == [0, 0, 0]
        assert_same(ckpt.load(), pieces(1, 2))


class AfterLinkDisk(WrappedDisk):
    """A disk on which something happens right after a link."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def link(self, source: Path, target: Path, *, sync: bool) -> None:
        super().link(source, target, sync=sync)
        self.act(source)


@pytest.mark.parametrize("make", [LinkDisk, AfterLinkDisk])
def test_the_earlier_checkpoint_is_removed_while_it_is_taken_from(
    tmp_path: Path, make: Any
) -> None:
    disk = make(lambda source: shutil.rmtree(source.parent))
    with Checkpointer(disk.at(tmp_path), **SMALL) as ckpt:
        ckpt.save(1, pieces(1, 2, 3), block=True)
        ckpt.save(2, pieces(1, 2, 4), block=True)
        assert ckpt.steps() == [2]
        assert_same(ckpt.load(), pieces(1, 2, 4))
        assert ckpt.stats.reports[-1].shared_chunks == (2 if make is AfterLinkDisk else 0)
    asyncsave.verify(tmp_path)


def test_the_earlier_checkpoint_is_gone_before(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, **SMALL) as ckpt:
        ckpt.save(1, pieces(1, 2, 3), block=True)
        shutil.rmtree(step(tmp_path, 1))
        ckpt.save(2, pieces(1, 2, 4), block=True)
        assert_same(ckpt.load(), pieces(1, 2, 4))
        assert ckpt.stats.reports[-1].shared_chunks == 0


def flip(path: Path, offset: int) -> None:
    """Flip a bit, as a disk that fails does: without a sign of it."""
    about = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def test_what_is_copied_is_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A copy of damaged bytes would look sound; so their file is linked, and the save goes on."""
    with Checkpointer(tmp_path, compression="off", **SMALL) as ckpt:
        ckpt.save(1, pieces(1, 2, 3, 4, 5), block=True)
        flip(step(tmp_path, 1) / "rank-00000.data", 70_000)
        ckpt.save(2, pieces(6, 2, 7, 8, 9), block=True)
        assert "is damaged, and a part of the new checkpoint with it" in caplog.text
        with pytest.raises(asyncsave.IntegrityError):
            asyncsave.verify(step(tmp_path, 2))
        ckpt.save(3, pieces(6, 1, 7, 8, 9), block=True)  # without what is damaged
        asyncsave.verify(step(tmp_path, 3))
        assert_same(ckpt.load(), pieces(6, 1, 7, 8, 9))


def test_what_is_copied(tmp_path: Path) -> None:
    """Of a file that is hardly needed any more, what is needed is copied, and the rest let go."""
    with Checkpointer(tmp_path, compression=1, **SMALL) as ckpt:
        ckpt.save(1, pieces(1, 2, 3, 4, 5), block=True)
        ckpt.save(2, pieces(2, 2, 7, 8, 9), block=True)
        report = ckpt.stats.reports[-1]
        assert (report.shared_chunks, report.shared_bytes) == (0, 0)
        assert names(step(tmp_path, 2)) == ["rank-00000.data"]
        assert_same(ckpt.load(), pieces(2, 2, 7, 8, 9))
    asyncsave.verify(tmp_path)


# -- another file of the same name
# ------------------------------------------------------------------


def overwritten(place: Path, other: dict[str, torch.Tensor]) -> None:
    with Saver(compression="off", **SMALL) as saver:
        saver.save(other, place / "last", overwrite=True).result()


def swapped(place: Path, other: dict[str, torch.Tensor]) -> None:
    with Saver(compression="off", **SMALL) as saver:
        saver.save(other, place / "best").result()
    (place / "last").rename(place / "tmp")
    (place / "best").rename(place / "last")


def copied_onto(place: Path, other: dict[str, torch.Tensor]) -> None:
    with Saver(compression="off", **SMALL) as saver:
        saver.save(other, place / "best").result()
    for each in (place / "best").iterdir():
        (place / "last" / each.name).write_bytes(each.read_bytes())


@pytest.mark.parametrize("happens", [overwritten, swapped, copied_onto])
@pytest.mark.parametrize("reuse", ["content", "versions"])
def test_another_checkpoint_of_the_same_name(tmp_path: Path, happens: Any, reuse: Any) -> None:
    """Its files have the names and the lengths of those that were written, and other bytes."""
    state = pieces(1, 2, 3)
    with Saver(compression="off", reuse=reuse, **SMALL) as saver:
        saver.save(state, tmp_path / "last").result()
        happens(tmp_path, pieces(4, 5, 6))
        assert saver.save(state, tmp_path / "new").result().shared_chunks == 0
        assert_same(asyncsave.load(tmp_path / "new"), state)
        assert saver.save(state, tmp_path / "newer").result().shared_chunks == 3
    asyncsave.verify(tmp_path / "newer")


@pytest.mark.parametrize("reuse", ["content", "versions"])
def test_a_commit_of_which_nobody_knows(tmp_path: Path, reuse: Any) -> None:
    """It is in place, so the one before may be gone; and is not known to be on the disk."""
    faults = Faults()
    disk = FaultDisk(faults)
    one, two = pieces(1, 2, 3), pieces(4, 5, 6)
    with Saver(compression="off", reuse=reuse) as saver:
        for number in range(4):
            saver.save(one, disk.at(tmp_path / "a"), overwrite=True).result()
            disk.faults = Faults(number % 2, errno.EIO, kinds=["sync_directory"])
            with pytest.raises(asyncsave.AsyncSaveError):
                saver.save(two, disk.at(tmp_path / "a"), overwrite=True).result()
            disk.faults = Faults()
            saver.save(one, disk.at(tmp_path / "b"), overwrite=True).result()
            assert_same(asyncsave.load(tmp_path / "b"), one)
            asyncsave.verify(tmp_path / "b")


@pytest.mark.filterwarnings("ignore:.*Sparse (C|B)S.*:UserWarning")
def test_frozen_parameters_of_every_kind(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            eye = torch.eye(3)
            self.w = torch.nn.Parameter(eye.to_sparse(), requires_grad=False)
            self.c = torch.nn.Parameter(eye.to_sparse_csr(), requires_grad=False)
            self.p = torch.nn.Parameter(eye.clone(), requires_grad=False)

        def parameters(self, recurse: bool = True) -> Any:
            yield from super().parameters(recurse)
            raise RuntimeError("of somebody's own")

    report = asyncsave.save({"m": Odd()}, tmp_path / "a").result()
    assert report.tensors == 6


@pytest.mark.parametrize("seed", range(4))
def test_dead_parts_of_linked_files_are_bounded(tmp_path: Path, seed: int) -> None:
    """Whatever changes when: what a checkpoint holds is at most twice what it needs."""
    chance = random.Random(seed)
    seeds = list(range(30))
    shared = 0
    with Checkpointer(tmp_path, compression="off", keep_last=1, **SMALL) as ckpt:
        for number in range(25):
            for i in range(30):
                if chance.random() < i / 30:
                    seeds[i] = chance.randrange(10**6)
            ckpt.save(number, pieces(*seeds), block=True)
            shared += ckpt.stats.reports[-1].shared_chunks
            path = step(tmp_path, number)
            manifest = json.loads((path / "rank-00000.json").read_text())
            for i, file in enumerate(manifest["files"]):
                frames = {
                    c["offset"]: c["length"] for c in manifest["chunks"] if c.get("file", 0) == i
                }
                if file.get("linked"):
                    assert 2 * sum(frames.values()) >= file["length"]
                else:
                    assert sum(frames.values()) == file["length"]
            held = sum((path / each).stat().st_size for each in names(path))
            assert held <= 2 * 30 * 65_536
            assert_same(ckpt.load(), pieces(*seeds))
    assert shared > 100
    asyncsave.verify(tmp_path)


def test_chunks_that_hold_the_same(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, compression="off", **SMALL) as ckpt:
        ckpt.save(1, pieces(1, 2), block=True)
        ckpt.save(2, pieces(2, 1, 1, 2), block=True)  # each is there once, and needed twice
        assert ckpt.stats.reports[-1].shared_chunks == 2
        assert_same(ckpt.load(), pieces(2, 1, 1, 2))
        live = pieces(0, 0, 0, 0)
        ckpt.restore(live)
        assert_same(live, pieces(2, 1, 1, 2))
    asyncsave.verify(tmp_path)


def test_no_more_than_so_many_files_are_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncsave.pipeline.reuse._MOST_KEPT", 8)  # 256 take long
    seeds: list[int] = []
    with Checkpointer(tmp_path, compression="off", keep_last=1, **SMALL) as ckpt:
        for number in range(30):
            seeds.append(number)
            ckpt.save(number, pieces(*seeds), block=True)
        assert len(names(step(tmp_path, 29))) <= 9
        assert_same(ckpt.load(), pieces(*seeds))
        # those of which most is needed are kept: one more piece does not write all of them again
        assert ckpt.stats.reports[-1].stored_bytes < 10 * 65_536


def test_several_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncsave.pipeline.target.LEAST_FILE_BYTES", 1)  # or it takes gigabytes
    state = pieces(*range(10))
    with Saver(compression="off", max_file_bytes=4 * 65_536, **SMALL) as saver:
        saver.save(state, tmp_path / "a").result()
        report = saver.save(state, tmp_path / "b").result()
    sizes = [(tmp_path / "a" / each).stat().st_size for each in names(tmp_path / "a")]
    assert sorted(sizes) == [2 * 65_536, 4 * 65_536, 4 * 65_536]
    assert report.shared_chunks == 10
    assert len(names(tmp_path / "b")) == 4
    for path in (tmp_path / "a", tmp_path / "b"):
        assert_same(asyncsave.load(path), state)
        assert_same(asyncsave.numpy.load(path), {k: v.numpy() for k, v in state.items()})
        asyncsave.verify(path)
    (info,) = asyncsave.checkpoints(tmp_path / "a")
    assert info.stored_bytes == sum(each.stat().st_size for each in (tmp_path / "a").iterdir())


@pytest.mark.parametrize(
    "bad", [{"reuse": "yes"}, {"max_file_bytes": 5}, {"max_file_bytes": "4GB"}]
)
def test_what_cannot_be_asked_for(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(asyncsave.ConfigError, match=next(iter(bad))):
        Saver(**bad)
    with pytest.raises(asyncsave.ConfigError, match=next(iter(bad))):
        Checkpointer(tmp_path, **bad)


@pytest.mark.parametrize("refused", [False, True])
def test_every_operation_of_a_save_that_shares_fails_once(tmp_path: Path, refused: bool) -> None:
    below = LinkDisk(refuse(errno.EXDEV)) if refused else WrappedDisk()
    disk = FaultDisk(Faults(), below)
    seeds = [1, 2, 3, 4]
    number = 1
    with Checkpointer(disk.at(tmp_path), keep_last=2) as ckpt:
        ckpt.save(number, pieces(*seeds), block=True)
        for i in range(200):
            number += 1
            seeds[number % 2] = number  # two stay for ever
            faults = disk.faults = Faults(i, errno.EIO)
            try:
                ckpt.save(number, pieces(*seeds), block=True)
            except asyncsave.AsyncSaveError:
                assert faults.hit is not None
            disk.faults = Faults()
            for each in ckpt.steps():
                asyncsave.verify(step(tmp_path, each))
            if number in ckpt.steps():
                assert_same(ckpt.load(step=number), pieces(*seeds))
            if faults.hit is None:
                break
            number += 1
            ckpt.save(number, pieces(*seeds), block=True)  # which prunes what could not be
            assert_same(ckpt.load(), pieces(*seeds))
        assert 15 < i < 199


def test_records_from_outside_are_not_believed(tmp_path: Path) -> None:
    from tests.sweeps.attacks.forge import chunk, forge, padded, tensor

    data = padded(bytes(range(200)), bytes(100))
    one, two = chunk(bytes(range(200))), chunk(bytes(100), offset=4096)
    own = {"name": "rank-00000.data", "length": len(data)}
    linked = {"name": "rank-00000.linked-0.data", "length": len(data), "linked": True}

    def attempt(name: str, files: Any, chunks: Any) -> None:
        path = tmp_path / name
        forge(
            path,
            {"t": "tensor", "i": 0},
            tensors=[tensor((200,))],
            rank={"files": files, "chunks": chunks},
            data=data,
        )
        shutil.copy(path / "rank-00000.data", path / "rank-00000.linked-0.data")
        shutil.copy(path / "rank-00000.data", path / "rank-00000.1.data")
        try:
            assert np.array_equal(asyncsave.load(path).numpy(), np.arange(200, dtype=np.uint8))
        except asyncsave.FormatError:
            raise AssertionError(name) from None

    second = own | {"name": "rank-00000.1.data"}
    attempt("sound", [own], [one, two])
    attempt("all linked", [linked], [one, two])
    attempt("both", [own, linked], [one, two | {"file": 1}])
    attempt("two of its own", [own, second], [one, two | {"file": 1}])
    asyncsave.verify(tmp_path / "all linked")
    asyncsave.verify(tmp_path / "sound")
    with pytest.raises(asyncsave.IntegrityError, match="not zero"):
        asyncsave.verify(tmp_path / "two of its own")  # which have frames of nobody's
    for i, (files, chunks) in enumerate(
        (
            ([], []),
            ([own, own], [one]),
            ([linked | {"name": "rank-00000.data"}], [one]),
            ([own | {"name": "rank-00000.linked-0.data"}], [one]),
            ([linked, linked], [one]),
            ([linked | {"name": "rank-00000.linked-00.data"}], [one]),
            ([linked | {"name": "rank-00001.linked-0.data"}], [one]),
            ([linked | {"name": "rank-00000.linked-99999.data"}], [one]),
            ([own | {"name": "rank-00000.1.data"}], [one]),
            ([own, linked], [one, two | {"file": 2}]),
            ([own], [one, one]),
            ([own], [one, chunk(bytes(range(100)))]),
            ([own | {"length": -1}], [one]),
        )
    ):
        with pytest.raises((AssertionError, asyncsave.IntegrityError)):
            attempt(f"unsound {i}", files, chunks)


# -- version counters -----------------------------------------------------------------------------


class Frozen(torch.nn.Module):
    """Parameters that nobody trains, of a chunk each, and a buffer."""

    def __init__(self, *seeds: int) -> None:
        super().__init__()
        parameters = [torch.nn.Parameter(_piece(seed), requires_grad=False) for seed in seeds]
        self.p = torch.nn.ParameterList(parameters)
        self.norm = torch.nn.BatchNorm1d(PIECE, affine=False)


def same(ckpt: Checkpointer, module: torch.nn.Module) -> None:
    assert_same(dict(ckpt.load()["m"]), dict(module.state_dict()))


def test_what_has_no_new_version_is_not_even_copied(tmp_path: Path) -> None:
    module = Frozen(*range(20))
    with Checkpointer(tmp_path, reuse="versions", **SMALL) as ckpt:
        for number in range(1, 5):
            with torch.no_grad():
                module.p[3].add_(1)
            ckpt.save(number, {"m": module}, block=True)
            same(ckpt, module)
        reports = ckpt.stats.reports
        assert reports[0].shared_chunks == 0
        assert all(report.shared_chunks >= report.chunks - 3 for report in reports[1:])
        # the proof that they are not looked at: this write is one that no counter sees
        before = module.p[7][5].item()
        module.p[7].numpy()[5] = 77.0
        ckpt.save(5, {"m": module}, block=True)
        assert ckpt.load()["m"]["p.7"][5] == before
        with torch.no_grad():
            module.p[7].add_(0)
        ckpt.save(6, {"m": module}, block=True)
        assert ckpt.load()["m"]["p.7"][5] == 77
    asyncsave.verify(tmp_path)


def _set(module: Any, i: int, value: torch.Tensor) -> None:
    module.p[i] = torch.nn.Parameter(value, requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: _set(m, 3, _piece(99)),
        lambda m: m.p[3].copy_(_piece(99)),
        lambda m: m.p[3][7:9].zero_(),
        lambda m: m.p[3].view(128, 128)[0].zero_(),
        lambda m: torch._foreach_add_([m.p[3]], 1.0),
        lambda m: m.p[3].detach().add_(1),
        lambda m: torch.nn.init.zeros_(m.p[3]),
        lambda m: m.p[3].set_(_piece(99)),
        lambda m: setattr(m.p[3], "data", _piece(99)),
        lambda m: m.load_state_dict(Frozen(5, 4, 3, 2, 1, 0).state_dict()),
        lambda m: m.load_state_dict(Frozen(5, 4, 3, 2, 1, 0).state_dict(), assign=True),
        lambda m: m.double().float(),
        lambda m: m.bfloat16(),
        lambda m: m.norm(torch.randn(8, PIECE)),
        lambda m: m.register_buffer("new", _piece(99)),
        lambda m: m.p[3].requires_grad_(),
    ],
)
def test_every_change_that_torch_can_see_is_saved(tmp_path: Path, change: Any) -> None:
    module = Frozen(*range(6))
    with Checkpointer(tmp_path, reuse="versions", **SMALL) as ckpt:
        for number in (1, 2):
            ckpt.save(number, {"m": module}, block=True)
        with torch.no_grad():
            change(module)
        for number in (3, 4):
            ckpt.save(number, {"m": module}, block=True)
            same(ckpt, module)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("kept", ["in the state", "beside it", "dropped"])
def test_what_optimizers_step_is_copied(tmp_path: Path, options: Any, kept: str) -> None:
    """A fused one counts nothing, so what it has stepped is told by its bytes."""
    module = Frozen(*range(4))
    module.p[1].requires_grad_()
    make = lambda: torch.optim.AdamW([module.p[1]], lr=0.1, **options)  # noqa: E731
    optimizer = make()
    state: dict[str, Any] = {"m": module}
    if kept == "in the state":
        state["o"] = optimizer
    with Checkpointer(tmp_path, reuse="versions", **SMALL) as ckpt:
        for number in range(1, 5):
            module.p[1].grad = torch.randn(PIECE)
            optimizer.step()
            if kept == "dropped":
                optimizer = make()
                module.p[1].requires_grad_(number % 2 == 0)  # as a GAN does
                module.p[1].grad = None
                module.p[1].requires_grad_()
            ckpt.save(number, state, block=True)
            same(ckpt, module)
        assert ckpt.stats.reports[-1].shared_chunks >= 3


def test_plain_state_dicts_are_told_by_their_bytes(tmp_path: Path) -> None:
    """Whose tensors they are nobody knows, nor who writes to them."""
    model = torch.nn.Linear(128, 128)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with Checkpointer(tmp_path, reuse="versions", **SMALL) as ckpt:
        for number in range(1, 4):
            for each in model.parameters():
                each.grad = torch.randn_like(each)
            optimizer.step()
            ckpt.save(number, {"m": model.state_dict()}, block=True)
            same(ckpt, model)


def test_another_tensor_in_the_same_place(tmp_path: Path) -> None:
    """As when an allocator gives the memory of what was dropped to the next one."""
    memory = np.zeros(PIECE, np.float32)
    module = Frozen(1)
    with Checkpointer(tmp_path, reuse="versions", **SMALL) as ckpt:
        for number in range(4):
            memory[:] = number
            _set(module, 0, torch.frombuffer(memory.data, dtype=torch.float32))
            ckpt.save(number, {"m": module}, block=True)
            same(ckpt, module)


def test_versions_where_the_last_checkpoint_is_gone(tmp_path: Path) -> None:
    state = {"m": Frozen(*range(4))}
    with Checkpointer(tmp_path, reuse="versions", **SMALL) as ckpt:
        ckpt.save(1, state, block=True)
        shutil.rmtree(step(tmp_path, 1))
        ckpt.save(2, state, block=True)
        same(ckpt, state["m"])
        (step(tmp_path, 2) / "rank-00000.data").unlink()
        ckpt.save(3, state, block=True)
        same(ckpt, state["m"])


def test_a_failed_save_is_not_taken_from(tmp_path: Path) -> None:
    disk = FaultDisk(Faults())
    module = Frozen(*range(4))
    with Checkpointer(disk.at(tmp_path), reuse="versions", **SMALL) as ckpt:
        ckpt.save(1, {"m": module}, block=True)
        with torch.no_grad():
            module.p[1].zero_()
        disk.faults = Faults(0, errno.EIO, kinds=["write_file"])
        with pytest.raises(asyncsave.WriteError):
            ckpt.save(2, {"m": module}, block=True)
        disk.faults = Faults()
        ckpt.save(3, {"m": module}, block=True)
        assert ckpt.load()["m"]["p.1"].sum() == 0
        assert ckpt.stats.reports[-1].shared_chunks >= 3


def test_versions_when_a_file_goes_between_the_look_and_the_link(tmp_path: Path) -> None:
    """What was not copied cannot be written: that save fails, and the next one writes all."""
    disk = LinkDisk(lambda source: shutil.rmtree(source.parent))
    state = {"m": Frozen(1, 2, 3)}
    with Checkpointer(disk.at(tmp_path), reuse="versions", **SMALL) as ckpt:
        ckpt.save(1, state, block=True)
        with pytest.raises(asyncsave.SaveError, match="the next save copies and writes everything"):
            ckpt.save(2, state, block=True)
        ckpt.save(3, state, block=True)
        same(ckpt, state["m"])


def test_versions_of_a_module_and_its_optimizer(tmp_path: Path) -> None:
    lora = LoRA()
    with Checkpointer(tmp_path, reuse="versions", **SMALL) as ckpt:
        for number in range(1, 6):
            lora.train()
            ckpt.save(number, lora.state, block=True)
            other = LoRA()
            other.train()
            asyncsave.restore(tmp_path, other.state)
            assert_same(dict(other.model.state_dict()), dict(lora.model.state_dict()))
        assert all(r.shared_chunks >= r.chunks - 3 for r in ckpt.stats.reports[1:])


# -- what was seen to change ----------------------------------------------------------------------


def test_what_was_seen_not_to_change_is_laid_apart(tmp_path: Path) -> None:
    """Every second tensor is trained, and nothing says so: chunks straddle both at first."""
    state = {f"p{i:03d}": torch.randn(PIECE // 8) for i in range(64)}
    with Checkpointer(tmp_path, compression="off", **SMALL) as ckpt:
        for number in range(12):
            with torch.no_grad():
                for i in range(0, 64, 2):
                    state[f"p{i:03d}"].add_(1)
            ckpt.save(number, state, block=True)
            assert_same(ckpt.load(), state)
        shared = [report.shared_chunks for report in ckpt.stats.reports]
    assert shared[1] == 0
    assert shared[-1] == 4, "half of eight chunks"


def test_a_layout_does_not_flutter() -> None:
    """Whatever changes now and then, chunks begin anew a few times only."""
    chance = random.Random(1)
    state = {f"p{i:03d}": torch.randn(10) for i in range(64)}
    stillness, said = Stillness(), []
    for _ in range(100):
        with torch.no_grad():
            for each in state.values():
                if chance.random() < 0.3:
                    each.add_(1)
        said.append(tuple(stillness.note(flatten(state))))
    assert 1 < len(set(said)) <= 7
