"""What people do by habit: a mistake is told at once, and nothing is lost or swallowed."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asyncsave
from asyncsave import Checkpointer
from asyncsave.storage.place import PathLike, place_of
from asyncsave.tuning.sample import sample_of_checkpoint
from tests.doubles.disks import AskingDisk, GatedDisk
from tests.doubles.fault_disk import FaultDisk, Faults
from tests.support import eventually, make_newer

STATE = {"w": torch.arange(1000.0), "n": 1}


def make(directory: PathLike, **options: Any) -> Checkpointer:
    return Checkpointer(directory, **{"durable": False, **options})


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno == level]


# -- paths ----------------------------------------------------------------------------------------


USES: dict[str, Any] = {
    "save": lambda path: asyncsave.save(STATE, path).result(),
    "load": asyncsave.load,
    "restore": lambda path: asyncsave.restore(path, {}),
    "verify": asyncsave.verify,
    "checkpoints": asyncsave.checkpoints,
    "tune": lambda path: asyncsave.tune(path, seconds=0.1),
    "directory of tune": lambda path: asyncsave.tune(STATE, directory=path, seconds=0.1),
    "Checkpointer": lambda path: Checkpointer(path).close(),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("path", ["s3://bucket/a", Path("s3://bucket/a"), "gs://b", "file:///a"])
def test_urls_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str, path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(asyncsave.ConfigError, match="nothing here handles"):
        USES[use](path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [b"a", 3, "", "a\0b", None])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(asyncsave.ConfigError, match="path"):
        asyncsave.save(STATE, path)


def test_the_home_directory_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    asyncsave.save(STATE, "~/a").result()
    assert (tmp_path / "a").is_dir()
    with make(Path("~") / "run") as ckpt:
        ckpt.save(1, STATE, block=True)
        assert ckpt.directory == tmp_path / "run"
    assert asyncsave.load("~/run")["n"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "run"]
    with pytest.raises(asyncsave.ConfigError, match="home"):
        asyncsave.load("~nobody-of-this-name/a")


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "nbytes"),
    [("2GB", 2 * 10**9), ("512MiB", 512 << 20), ("1.5 gib", 3 << 29), ("90000000b", 90_000_000)],
)
def test_memory_limits_as_people_write_them(tmp_path: Path, given: str, nbytes: int) -> None:
    from asyncsave.pipeline.budget import parse_limit

    assert parse_limit(given) == nbytes
    with make(tmp_path, memory_limit=given) as ckpt:
        ckpt.save(1, STATE, block=True)
        assert ckpt.stats.peak_memory_bytes < nbytes


@pytest.mark.parametrize("step", [np.int64(4), np.uint8(4), torch.tensor(4)], ids=repr)
def test_steps_of_other_libraries(tmp_path: Path, step: Any) -> None:
    with make(tmp_path, every_steps=2) as ckpt:
        ckpt.step(step, STATE)
        ckpt.wait()
        assert ckpt.steps() == [4]
        assert ckpt.load(step=step)["n"] == 1


def test_swapped_arguments(tmp_path: Path) -> None:
    with make(tmp_path, every_steps=2) as ckpt:
        for use in (ckpt.step, ckpt.save):
            with pytest.raises(asyncsave.ConfigError, match="swapped"):
                use(STATE, 4)  # type: ignore[arg-type]
            with pytest.raises(asyncsave.ConfigError, match="step=None"):
                use(None, STATE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"p": Path("x")}, r"metadata\['p'\] is a PosixPath"),
        ({"a": [1, {"b": torch.ones(1)}]}, r"metadata\['a'\]\[1\]\['b'\] is a Tensor"),
        ({"a": {1: 2}}, r"metadata\['a'\] has the key 1, a int"),
        ({"lr": float("nan")}, r"metadata\['lr'\] is nan"),
        ([float("inf")], r"metadata\[0\] is inf"),
        ({"x": np.float64(3)}, r"metadata\['x'\] is a float64"),
    ],
    ids=str,
)
def test_metadata_that_is_not_plain_is_named(tmp_path: Path, metadata: Any, says: str) -> None:
    with make(tmp_path) as ckpt, pytest.raises(asyncsave.StateError, match=says):
        ckpt.save(1, STATE, metadata=metadata)


def test_metadata_that_holds_itself(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    with make(tmp_path) as ckpt, pytest.raises(asyncsave.StateError, match="metadata"):
        ckpt.save(1, STATE, metadata=loop)


def test_metadata_is_that_of_the_call(tmp_path: Path) -> None:
    gated = GatedDisk()
    notes: dict[str, Any] = {"lr": 0.1, "tags": ["a"]}
    metrics = {"loss": 1.0}
    with make(gated.at(tmp_path)) as ckpt:
        ckpt.save(1, STATE, metadata=notes, metrics=metrics)
        notes["lr"] = object()
        notes["tags"].append("b")
        metrics["loss"] = 2.0
        gated.gate.set()
        ckpt.wait()
        (info,) = ckpt.checkpoints()
    assert info.metadata == {"lr": 0.1, "tags": ["a"]}
    assert info.metrics == {"loss": 1.0}


@pytest.mark.parametrize(
    "value", [10**400, "low", None, [1], torch.ones(2)], ids=lambda v: str(v)[:9]
)
def test_metrics_that_are_none(tmp_path: Path, value: Any) -> None:
    with make(tmp_path) as ckpt:
        with pytest.raises(asyncsave.ConfigError, match="the metric 'loss' is"):
            ckpt.save(1, STATE, metrics={"loss": value})
        with pytest.raises(asyncsave.ConfigError, match="dict of names"):
            ckpt.save(1, STATE, metrics=[value])  # type: ignore[arg-type]


def test_metrics_of_other_libraries(tmp_path: Path) -> None:
    with make(tmp_path) as ckpt:
        metrics: Any = {"a": torch.tensor(0.5), "b": np.float32(0.25), "c": 3}
        ckpt.save(1, STATE, metrics=metrics, block=True)
        assert ckpt.checkpoints()[0].metrics == {"a": 0.5, "b": 0.25, "c": 3.0}


# -- keep_best ------------------------------------------------------------------------------------


def test_metrics_that_are_not_finite_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with make(tmp_path) as ckpt:
        ckpt.save(1, STATE, metrics={"loss": float("nan"), "lr": 0.1}, block=True)
        assert ckpt.checkpoints()[0].metrics == {"loss": None, "lr": 0.1}
    assert "'loss' of step 1 is not finite" in caplog.text


@pytest.mark.parametrize("keys", [[], [3], 5, True, b"model"])
def test_keys_that_name_nothing(tmp_path: Path, keys: Any) -> None:
    with make(tmp_path) as ckpt:
        ckpt.save(1, STATE, block=True)
        for use in (lambda: ckpt.load(keys=keys), lambda: ckpt.restore(STATE, keys=keys)):
            with pytest.raises(asyncsave.ConfigError, match="names nothing"):
                use()


class Loader:
    """A class with a mistake in its load_state_dict."""

    def state_dict(self) -> dict[str, int]:
        return {"pos": 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.pos = state["position"]


def test_a_mistake_in_a_load_state_dict_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asyncsave.save({"loader": Loader(), "w": torch.ones(1)}, tmp_path / "a").result()
    into = {"loader": Loader(), "w": torch.zeros(1)}
    with pytest.raises(asyncsave.MismatchError, match=r"loader: Loader.*KeyError\('position'\)"):
        asyncsave.restore(tmp_path / "a", into)
    assert into["w"] == 0  # type: ignore[comparison-overlap]
    assert "could not be put back" in caplog.text


def test_a_copy_of_an_optimizers_state_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    asyncsave.save({"opt": optimizer.state_dict()}, tmp_path / "a").result()
    asyncsave.restore(tmp_path / "a", {"opt": optimizer})
    assert caplog.text == ""
    asyncsave.restore(tmp_path / "a", {"opt": torch.optim.Adam([weight]).state_dict()})
    assert "opt is what an optimizer's state_dict() returned" in caplog.text


def test_which_way_is_better_must_be_said(tmp_path: Path) -> None:
    with pytest.raises(
        asyncsave.ConfigError, match=r"\('accuracy', 'min'\) or \('accuracy', 'max'"
    ):
        make(tmp_path, keep_best="accuracy")


def test_metrics_that_keep_best_cannot_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with make(tmp_path, keep_best=("accuracy", "max"), keep_last=1) as ckpt:
        ckpt.save(1, STATE, metrics={"acuracy": 0.5})
        ckpt.save(2, STATE)
        ckpt.save(3, STATE, metrics={"accuracy": float("nan")})
        ckpt.save(4, STATE, metrics={"accuracy": 0.5})
        ckpt.wait()
    said = messages(caplog, logging.WARNING)
    assert len(said) == 2, "a metric that lacks is said once"
    assert "'accuracy', which step 1 was saved without (given: 'acuracy')" in said[0]
    assert "'accuracy' of step 3 is not finite" in said[1]


def test_the_best_step(tmp_path: Path) -> None:
    with make(tmp_path, keep_best=("score", "max", 2)) as ckpt:
        assert ckpt.best_step() is None
        with pytest.raises(asyncsave.CheckpointNotFoundError, match="metric"):
            ckpt.restore({}, step="best")
        for step, score in enumerate((0.1, 0.9, 0.5, 0.9, 0.2)):
            ckpt.save(step, {"n": step}, metrics={"score": score})
        ckpt.wait()
        assert ckpt.best_step() == 3, "of equals, the later"
        assert ckpt.steps() == [1, 3, 4]
        assert ckpt.load(step="best") == {"n": 3}
    with make(tmp_path) as ckpt, pytest.raises(asyncsave.ConfigError, match="keep_best"):
        ckpt.best_step()


def test_what_is_known_of_checkpoints(tmp_path: Path) -> None:
    with make(tmp_path, reuse="off") as ckpt:
        assert ckpt.checkpoints() == []
        for step in (1, 2, 3):
            ckpt.save(step, STATE, metrics={"loss": step / 2}, metadata={"note": step})
        ckpt.wait()
        infos = ckpt.checkpoints()
        assert [info.step for info in infos] == [1, 2, 3]
        assert [info.newest for info in infos] == [False, False, True]
        assert [info.sound for info in infos] == [None] * 3
        assert infos[0].metrics == {"loss": 0.5}
        assert infos[0].metadata == {"note": 1}
        assert infos[0].time is not None
        assert infos[0].stored_bytes == sum(f.stat().st_size for f in infos[0].path.iterdir())
        data = tmp_path / "step-000000002" / "rank-00000.data"
        data.write_bytes(b"\1" + data.read_bytes()[1:])
        (tmp_path / "step-000000001" / "checkpoint.json").write_text("{}")
        infos = ckpt.checkpoints(verify=True)
        assert [info.sound for info in infos] == [False, False, True]
        assert "checksum" in infos[1].error
    (info,) = asyncsave.checkpoints(tmp_path / "step-000000003", verify=True)
    assert (info.step, info.sound, info.newest) == (3, True, True)
    with pytest.raises(asyncsave.CheckpointNotFoundError):
        asyncsave.checkpoints(tmp_path / "nothing")


# -- saves that fail ------------------------------------------------------------------------------


@pytest.mark.parametrize("on_error", ["raise", "warn"])
@pytest.mark.parametrize("how", ["step", "save", "save and block"])
def test_a_failed_save_costs_no_other_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, on_error: str, how: str
) -> None:
    fail = Faults(0, 28)
    fail.on = False
    with make(FaultDisk(fail).at(tmp_path), every_steps=10, on_error=on_error) as ckpt:
        fail.operations.clear()
        fail.on = True
        handle = ckpt.step(10, STATE)
        assert handle is not None
        assert eventually(handle.done)
        fail.on = False

        def use() -> Any:
            if how == "step":
                return ckpt.step(20, STATE)
            return ckpt.save(20, STATE, block=how != "save")

        if on_error == "raise":
            with pytest.raises(asyncsave.DiskFullError, match="step-000000010"):
                use()
        else:
            assert use() is not None
            (said,) = messages(caplog, logging.WARNING)
            assert "step-000000010" in said
            assert "the training goes on" in said
        ckpt.wait()
        assert ckpt.steps() == [20]
        assert ckpt.stats.failures == 1


def test_an_error_that_was_logged_keeps_no_checkpointer_alive(tmp_path: Path) -> None:
    import gc

    fail = Faults(0, 28)
    fail.on = False
    ckpts = [make(FaultDisk(fail).at(tmp_path), every_steps=10, on_error="warn", signals=())]
    fail.operations.clear()
    fail.on = True
    handle = ckpts[0].step(10, STATE)
    assert handle is not None
    assert eventually(handle.done)
    fail.on = False
    ckpts[0].step(11, STATE)
    ckpts.append(ckpts)  # type: ignore[arg-type]  # a cycle, which only a collection ends
    del ckpts
    with pytest.warns(ResourceWarning, match="dropped without close"):
        gc.collect()
    assert isinstance(handle.exception(), asyncsave.DiskFullError)


def test_warn_is_for_the_loop_only(tmp_path: Path) -> None:
    ckpt = make(tmp_path / "run", on_error="warn")
    (tmp_path / "run").rename(tmp_path / "moved")
    ckpt.save(1, STATE)
    with pytest.raises(asyncsave.SaveError):
        ckpt.close()


# -- ranks ----------------------------------------------------------------------------------------


def test_many_ranks_are_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    with (
        make(tmp_path),
        pytest.raises(asyncsave.BusyError, match=r"rank 2 of 4.*on rank 0 alone") as caught,
    ):
        make(tmp_path)
    assert "another directory" not in str(caught.value)


# -- signals --------------------------------------------------------------------------------------

SIGNALLED = """
import os, signal, sys, time, logging, torch, asyncsave
logging.basicConfig(level=logging.INFO, format="%(message)s")
state = {"w": torch.ones(1000)}
number = getattr(signal, sys.argv[2])
with asyncsave.Checkpointer(sys.argv[1], every_steps=1000, signals=[number]) as ckpt:
    MORE
    time.sleep(0.2)
print("went on to its end", flush=True)
"""


def signalled(directory: Path, number: str, more: str) -> subprocess.CompletedProcess[str]:
    text = SIGNALLED.replace("MORE", "\n    ".join(more.strip().splitlines()))
    return subprocess.run(
        [sys.executable, "-c", text, str(directory), number],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_the_first_signal_saves_and_says_so(tmp_path: Path, number: str) -> None:
    ended = signalled(
        tmp_path,
        number,
        """
ckpt.step(1, state)
os.kill(os.getpid(), number)
for step in range(2, 9):
    ckpt.step(step, state)
    if ckpt.should_stop: break
print("stopped at", step)
""",
    )
    assert ended.returncode == 0, ended.stderr
    assert "stopped at 2" in ended.stdout
    assert ended.stderr.count(f"{number} arrived: saving at the next step") == 1
    assert "saved step 2" in ended.stderr
    with make(tmp_path) as ckpt:
        assert ckpt.steps() == [2]


@pytest.mark.parametrize(
    "more",
    [
        "ckpt.save(1, state); os.kill(os.getpid(), number)",  # who never calls step()
        "ckpt.step(1, state); os.kill(os.getpid(), number); os.kill(os.getpid(), number)",
        # who does not look at should_stop
        "ckpt.step(1, state); os.kill(os.getpid(), number); ckpt.step(2, state)\n"
        "assert ckpt.should_stop; os.kill(os.getpid(), number)",
    ],
    ids=["no step", "twice", "after should_stop"],
)
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_is_never_swallowed(tmp_path: Path, more: str, number: str) -> None:
    ended = signalled(tmp_path, number, more)
    assert ended.returncode == -getattr(signal, number), ended.stderr
    assert "went on" not in ended.stdout


def test_a_signal_after_the_last_step_is_told(tmp_path: Path) -> None:
    more = "for i in range(3): ckpt.step(i + 1, state)\nos.kill(os.getpid(), number)"
    ended = signalled(tmp_path, "SIGTERM", more)
    assert ended.returncode == 0
    assert "a signal arrived after the last step; nothing was saved for it" in ended.stderr


def test_a_notebook_keeps_its_signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    module: Any = types.ModuleType("IPython")
    module.get_ipython = lambda: object()
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    before = signal.getsignal(signal.SIGTERM)
    with make(tmp_path, every_steps=10) as ckpt:
        ckpt.step(1, STATE)
        assert signal.getsignal(signal.SIGTERM) is before


# -- what is logged -------------------------------------------------------------------------------


def test_one_line_for_each_thing_that_happens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "asyncsave")
    with make(tmp_path, every_steps=10, keep_last=1) as ckpt:
        for step in range(1, 25):
            ckpt.step(step, STATE)
        ckpt.wait()
        ckpt.restore({"w": torch.zeros(1000), "n": 0})
    said = messages(caplog, logging.INFO)
    assert len(said) == 4, said
    assert all(each.levelno == logging.INFO for each in caplog.records)
    # the order of the first two lines of a save is that of what happens: committed, then pruned
    assert sum(each.startswith("saved step 10, 4 kB as ") for each in said) == 1
    assert sum(each.startswith("saved step 20, 4 kB as ") for each in said) == 1
    assert sum(each == f"pruned {tmp_path}: step 10" for each in said) == 1
    assert sum("restored" in each and "step 20" in each for each in said) == 1
    assert all(str(tmp_path) in each for each in said)


def test_nothing_is_printed_by_itself(tmp_path: Path) -> None:
    text = (
        "import sys, torch, asyncsave\n"
        "with asyncsave.Checkpointer(sys.argv[1], every_steps=1, keep_last=1) as ckpt:\n"
        "    for step in (1, 2, 3): ckpt.step(step, {'w': torch.ones(10)})\n"
    )
    command = [sys.executable, "-W", "error", "-c", text, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


# -- which one is read ----------------------------------------------------------------------------


def three(directory: Path) -> None:
    with make(directory) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, {"w": torch.full((100_000,), float(step))})


READ: dict[str, Any] = {
    "load": lambda path: asyncsave.load(path)["w"][0].item(),
    "restore": lambda path: asyncsave.restore(path, {"w": torch.zeros(100_000)}),
    "tune": lambda path: sample_of_checkpoint(place_of(path), 1 << 20).values[0][0].item(),
}


@pytest.mark.parametrize("read", READ)
def test_all_readers_pass_over_damage_by_one_rule(
    tmp_path: Path, read: str, caplog: pytest.LogCaptureFixture
) -> None:
    three(tmp_path)
    data = tmp_path / "step-000000003" / "rank-00000.data"
    data.write_bytes(b"\1" + data.read_bytes()[1:])
    assert READ[read](tmp_path) == 2
    assert "passed over" in caplog.text
    with pytest.raises(asyncsave.IntegrityError) as caught:
        asyncsave.verify(tmp_path)
    assert (
        f"2 of 3 checkpoints are sound; restore() would take {tmp_path}/step-000000002"
        in (caught.value.__notes__[-1])
    )


def test_verify_says_what_restore_takes_though_there_is_dirt_between_frames(
    tmp_path: Path,
) -> None:
    three(tmp_path)
    data = tmp_path / "step-000000003" / "rank-00000.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\1")
    with pytest.raises(asyncsave.IntegrityError, match="between its frames") as caught:
        asyncsave.verify(tmp_path)
    assert (
        f"2 of 3 checkpoints are sound; restore() would take {data.parent}"
        in (caught.value.__notes__[-1])
    )
    assert asyncsave.restore(tmp_path, {"w": torch.zeros(100_000)}) == 3


@pytest.mark.parametrize("read", READ)
def test_no_reader_passes_over_a_newer_format(tmp_path: Path, read: str) -> None:
    three(tmp_path)
    make_newer(tmp_path / "step-000000003")
    with pytest.raises(asyncsave.UnsupportedVersionError):
        READ[read](tmp_path)


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("file", ["checkpoint.json", "rank-00000.data"])
def test_no_reader_passes_over_what_may_not_be_read(tmp_path: Path, read: str, file: str) -> None:
    three(tmp_path)

    def refuse(what: str, path: Path) -> None:
        if what == "open" and path == tmp_path / "step-000000003" / file:
            raise PermissionError(13, "Permission denied", str(path))

    with pytest.raises(asyncsave.LoadError, match="Permission denied"):
        READ[read](AskingDisk(refuse).at(tmp_path))


# -- the command ----------------------------------------------------------------------------------


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "asyncsave", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )


def test_verify_says_how_many_are_sound_and_which_is_restored(tmp_path: Path) -> None:
    three(tmp_path)
    ended = command("verify", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "3 of 3 checkpoints are sound" in ended.stdout
    assert "restore would take step-000000003" in ended.stdout
    assert "0.000 GB" not in ended.stdout
    data = tmp_path / "step-000000003" / "rank-00000.data"
    data.write_bytes(b"\1" + data.read_bytes()[1:])
    ended = command("verify", tmp_path)
    assert ended.returncode == 1
    assert "2 of 3 checkpoints are sound" in ended.stderr
    assert "step-000000002" in ended.stderr


def test_tune_says_what_to_use_first(tmp_path: Path) -> None:
    three(tmp_path)
    figures = tmp_path / "figures.json"
    ended = command("tune", tmp_path, "--seconds", 3, "--json", figures)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("Use compression=")
    assert ended.stdout.count("│") > 0
    rows = [line for line in lines if line.startswith("│")]
    assert len(rows) <= 4
    assert len(json.loads(figures.read_text())["rows"]) > 4
    assert "--all" in ended.stdout
    ended = command("tune", tmp_path, "--seconds", 3, "--all", "--levels", "0-6")
    assert sum(line.startswith("│") for line in ended.stdout.splitlines()) == 7
