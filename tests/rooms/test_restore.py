"""Restore: in place, all or nothing, from the newest checkpoint that verifies."""

from __future__ import annotations

import collections
import copy
import logging
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import asyncsave
from tests.doubles.fault_disk import FaultDisk, Faults
from tests.support import assert_same, make_newer


def put(state: Any, path: Path, **options: Any) -> Path:
    asyncsave.save(state, path, **options).result()
    return path


def damage(path: Path, offset: int = 100) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


class Model(torch.nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, width)
        self.norm = torch.nn.BatchNorm1d(width)
        self.head = torch.nn.Linear(width, 10, bias=False)
        self.head.weight = self.embed.weight  # tied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.embed(x)))
        return out


def trained(width: int = 8) -> dict[str, Any]:
    model = Model(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)
    scaler = torch.amp.GradScaler("cpu")
    state = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": scaler,
        "rng": asyncsave.RngState(),
        "epoch": 0,
        "losses": [],
        "best": {"loss": float("inf"), "at": None},
    }
    train(state, 3)
    return state


def train(state: dict[str, Any], steps: int) -> None:
    for _ in range(steps):
        x = torch.randint(0, 10, (16,))
        loss = torch.nn.functional.cross_entropy(state["model"](x), x)
        state["optimizer"].zero_grad()
        loss.backward()
        state["optimizer"].step()
        state["scheduler"].step()
        state["losses"].append(loss.item())
        state["epoch"] += 1
        noise = np.random.rand() + torch.rand(()).item()
        if loss.item() < state["best"]["loss"]:
            state["best"] = {"loss": loss.item(), "at": noise}


@pytest.mark.parametrize("compression", ["off", 1])
def test_a_restored_run_goes_on_to_the_bit(tmp_path: Path, compression: Any) -> None:
    state = trained()
    put(state, tmp_path / "a", compression=compression)
    train(state, 5)
    torch.manual_seed(99)
    again = trained()
    assert asyncsave.restore(tmp_path / "a", again) is None
    assert again["model"].head.weight is again["model"].embed.weight
    train(again, 5)
    assert again["losses"] == state["losses"]
    assert again["best"] == state["best"]
    assert_same(dict(state["model"].state_dict()), dict(again["model"].state_dict()))
    assert_same(state["optimizer"].state_dict(), again["optimizer"].state_dict())
    assert_same(state["scheduler"].state_dict(), again["scheduler"].state_dict())


def test_restore_fills_the_tensors_that_are_there(tmp_path: Path) -> None:
    state = {
        "a": torch.randn(4, 6),
        "t": torch.randn(4, 6).t(),
        "cut": torch.randn(8, 8)[:, ::2],
        "b": torch.randn(3).to(torch.float8_e5m2),
        "array": np.arange(6.0).reshape(2, 3),
        "view": np.arange(12).reshape(3, 4).T,
        "empty": torch.empty(0, 3),
        "zero": torch.tensor(3.5),
        "list": [torch.ones(2), 1, (torch.zeros(2), "x")],
        "none": None,
        "later": torch.ones(5),
    }
    put(state, tmp_path / "a")
    into: dict[str, Any] = {
        "a": torch.zeros(6, 4).t(),  # another layout than was saved
        "t": torch.zeros(6, 4),
        "cut": torch.zeros(8, 8)[:, 1::2],
        "b": torch.zeros(3).to(torch.float8_e5m2),
        "array": np.zeros((2, 3)),
        "view": np.zeros((4, 3), dtype=np.int64),
        "empty": torch.empty(0, 3),
        "zero": torch.tensor(0.0),
        "list": [torch.zeros(2), 0, (torch.ones(2), "y")],
        "none": 5,
        "later": None,
    }
    before = {name: id(value) for name, value in into.items()}
    inner = into["list"][0]
    asyncsave.restore(tmp_path / "a", into)
    assert_same(state, into)
    for name in ("a", "t", "cut", "b", "array", "view", "empty", "zero", "list"):
        assert id(into[name]) == before[name], name
    assert into["list"][0] is inner


class Pair(NamedTuple):
    left: Any
    right: Any


def test_containers(tmp_path: Path) -> None:
    state = {
        "pair": Pair(torch.ones(2), 3),
        "ordered": collections.OrderedDict(a=1, b=[1, 2]),
        "history": [1.0, 2.0, 3.0],
        "any": {"what": torch.ones(1), 5: "five"},
    }
    put(state, tmp_path / "a")
    into = {
        "pair": Pair(torch.zeros(2), 0),
        "ordered": collections.OrderedDict(a=0, b=[]),
        "history": [9.0],
        "any": {},
    }
    asyncsave.restore(tmp_path / "a", into)
    assert type(into["pair"]) is Pair
    assert_same(state, into)


MISMATCHES: dict[str, tuple[Any, Any, str]] = {
    "missing": ({"a": 1}, {"a": 1, "b": torch.zeros(1)}, "b: missing in the checkpoint"),
    "unexpected": ({"a": 1, "b": 2}, {"a": 1}, "b: unexpected"),
    "shape": ({"a": torch.ones(2)}, {"a": torch.ones(3)}, r"saved with shape \[2\]"),
    "dtype": ({"a": torch.ones(2)}, {"a": torch.ones(2).double()}, "saved with dtype float32"),
    "kind": ({"a": torch.ones(2)}, {"a": np.ones(2)}, "saved as torch"),
    # a number is replaced in any case, so it takes a tensor too: test_finetune.py; a dict is filled
    "tensor for a dict": ({"a": torch.ones(2)}, {"a": {"b": 3}}, "has a dict, the checkpoint a te"),
    "number for a tensor": ({"a": 3}, {"a": torch.ones(2)}, "has a tensor, the checkpoint a plain"),
    "dict for a list": (
        {"a": {}},
        {"a": [torch.ones(1)]},
        "state has a list, the checkpoint a dict",
    ),
    "length": ({"a": [torch.ones(1)]}, {"a": [torch.ones(1)] * 2}, "saved with 1 items"),
    "expanded": ({"a": torch.ones(3)}, {"a": torch.ones(1).expand(3)}, "share memory"),
    "not fillable": ({"a": 1}, {"a": object()}, "the state a object"),
    "module": (
        {"m": torch.nn.Linear(2, 2)},
        {"m": torch.nn.Linear(2, 3)},
        r"m\.weight: saved with shape \[2, 2\], the state has \[3, 2\]",
    ),
    "module keys": (
        {"m": torch.nn.Linear(2, 2, bias=False)},
        {"m": torch.nn.Linear(2, 2)},
        r"m\.bias: missing",
    ),
    "module of nothing": (
        {"m": torch.nn.Linear(2, 2)},
        {"m": torch.nn.ReLU()},
        "m.weight: unexpect",
    ),
    "groups": (
        {"o": torch.optim.SGD([torch.zeros(1), torch.zeros(1)])},
        {"o": torch.optim.SGD([torch.zeros(1)])},
        "parameter group 0 was saved with 2 parameters",
    ),
    "root": (5, 6, "the state itself is a int"),
}


class Size(tuple[Any, ...]):
    """Is made of positive numbers alone."""

    def __new__(cls, items: Any) -> Size:
        items = tuple(items)
        if items[0] < 1:
            raise ValueError(f"never {items[0]}")
        return super().__new__(cls, items)


class Two(tuple[Any, ...]):
    def __new__(cls, one: Any, two: Any) -> Two:
        return super().__new__(cls, (one, two))


def test_tuples_that_cannot_be_made_anew_are_refused_before_anything_changes(
    tmp_path: Path,
) -> None:
    picky = Picky()
    picky.value = 7
    saved = {"o": picky, "w": torch.ones(3), "n": 1, "t": [(0, (0, torch.ones(1)))], "p": (1, 2)}
    put(saved, tmp_path / "a")
    w = torch.zeros(3)
    mine: dict[str, Any] = {"o": Picky(), "w": w, "n": 0, "p": Two(0, 0)}
    mine["t"] = [(5, Size((4, torch.zeros(1))))]
    with pytest.raises(asyncsave.MismatchError) as caught:
        asyncsave.restore(tmp_path / "a", mine)
    assert len(caught.value.reasons) == 2
    assert "t.0.1: no Size can be made of what was saved" in str(caught.value)
    assert "p: no Two can be made of what was saved" in str(caught.value)
    assert (mine["o"].value, mine["n"], mine["t"][0][0], mine["p"]) == (0, 0, 5, (0, 0))
    assert not w.any()
    mine["t"], mine["p"] = [(5, Size((4, torch.zeros(1))))], (0, 0)
    put(saved | {"t": [(0, (3, torch.ones(1)))]}, tmp_path / "b")
    asyncsave.restore(tmp_path / "b", mine)
    assert type(mine["t"][0][1]) is Size
    assert mine["t"][0][1][0] == 3
    assert mine["p"] == (1, 2)


def test_what_is_changed_inside_a_tuple_does_not_replace_it(tmp_path: Path) -> None:
    inner = ({"step": 1}, [1, 2])
    state = (inner, torch.ones(2))
    put(state, tmp_path / "a")
    inner[0]["step"], inner[1][:] = 0, []  # type: ignore[index]
    state[1].zero_()
    asyncsave.restore(tmp_path / "a", state)
    assert state[0] is inner
    assert inner == ({"step": 1}, [1, 2])
    assert state[1].tolist() == [1, 1]


def test_nested_tuples_are_made_anew_from_the_inside(tmp_path: Path) -> None:
    put({"a": (1, (2, torch.ones(1)), ({"n": 3}, torch.ones(1)))}, tmp_path / "a")
    tensor, untouched = torch.zeros(1), ({"n": 0}, torch.zeros(1))
    mine = {"a": (0, (0, tensor), untouched)}
    asyncsave.restore(tmp_path / "a", mine)
    assert mine["a"][:2] == (1, (2, tensor))
    assert mine["a"][2] is untouched
    assert untouched == ({"n": 3}, torch.ones(1))


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_mismatch_is_listed_and_changes_nothing(tmp_path: Path, case: str) -> None:
    saved, into, says = MISMATCHES[case]
    good = {"good": torch.ones(5), "n": 1, "case": saved}
    mine = {"good": torch.zeros(5), "n": 0, "case": into}
    if case == "root":
        good, mine = saved, into
    put(good, tmp_path / "a")
    before = copy.deepcopy(mine) if case != "expanded" else mine
    with pytest.raises(asyncsave.MismatchError, match=says) as caught:
        asyncsave.restore(tmp_path / "a", mine)
    assert caught.value.reasons
    if case != "root":
        assert torch.equal(mine["good"], torch.zeros(5))
        assert mine["n"] == 0
        if isinstance(into, dict) and all(isinstance(v, torch.Tensor) for v in into.values()):
            assert_same(before, mine)
    assert asyncsave.verify(tmp_path / "a").paths == (tmp_path / "a",)


def test_all_differences_are_listed_at_once(tmp_path: Path) -> None:
    put({f"k{i}": torch.zeros(i) for i in range(200)}, tmp_path / "a")
    with pytest.raises(asyncsave.MismatchError) as caught:
        asyncsave.restore(tmp_path / "a", {f"k{i}": torch.zeros(i + 1) for i in range(200)})
    assert len(caught.value.reasons) == 200
    assert "and 150 more" in str(caught.value)


def test_not_strict_restores_what_both_have(tmp_path: Path) -> None:
    small, large = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2)
    put({"model": small, "old": 1}, tmp_path / "a")
    bias = large.bias.detach().clone()
    into = {"model": large, "new": 2}
    asyncsave.restore(tmp_path / "a", into, strict=False)
    assert torch.equal(large.weight, small.weight)
    assert torch.equal(large.bias, bias)
    assert into["new"] == 2
    with pytest.raises(asyncsave.MismatchError, match="shape"):
        asyncsave.restore(tmp_path / "a", {"model": torch.nn.Linear(3, 2)}, strict=False)


class Picky:
    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["value"] == 13:
            raise ValueError("never 13")
        self.value = state["value"]


def test_objects_are_put_back_when_one_refuses(tmp_path: Path) -> None:
    first, second = Picky(), Picky()
    first.value, second.value = 7, 13
    put({"t": torch.ones(3), "a": first, "b": second}, tmp_path / "a")
    into = {"t": torch.zeros(3), "a": Picky(), "b": Picky()}
    with pytest.raises(asyncsave.MismatchError, match="refused: never 13"):
        asyncsave.restore(tmp_path / "a", into)
    assert into["a"].value == 0  # type: ignore[attr-defined]
    assert torch.equal(into["t"], torch.zeros(3))  # type: ignore[arg-type]


def test_all_objects_that_refuse_are_named(tmp_path: Path) -> None:
    objects = [Picky() for _ in range(4)]
    for each, value in zip(objects, (13, 7, 13, 7), strict=True):
        each.value = value
    put({"o": objects}, tmp_path / "a")
    mine = [Picky() for _ in range(4)]
    with pytest.raises(asyncsave.MismatchError) as caught:
        asyncsave.restore(tmp_path / "a", {"o": mine})
    assert [reason.split(":")[0] for reason in caught.value.reasons] == ["o.0", "o.2"]
    assert isinstance(caught.value.__cause__, ValueError)
    assert not any(each.value for each in mine)


def test_objects_are_put_back_when_the_user_interrupts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Picky(), Picky()
    first.value = second.value = 7
    put({"a": first, "b": second}, tmp_path / "a")
    into = {"a": Picky(), "b": Picky()}

    def interrupted(state: dict[str, Any]) -> None:
        if state["value"] == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(into["b"], "load_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asyncsave.restore(tmp_path / "a", into)
    assert into["a"].value == 0


class Renaming(torch.nn.Module):
    """A module that loads in its own way, as many in the wild do."""

    def __init__(self) -> None:
        super().__init__()
        self.new = torch.nn.Parameter(torch.zeros(3))
        self.extra = 0

    def get_extra_state(self) -> Any:
        return {"extra": self.extra}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state["extra"]


def test_modules_that_load_by_themselves(tmp_path: Path) -> None:
    module = Renaming()
    module.extra = 5
    with torch.no_grad():
        module.new.fill_(2)
    put({"m": module}, tmp_path / "a")
    into = Renaming()
    asyncsave.restore(tmp_path / "a", {"m": into})
    assert into.extra == 5
    assert torch.equal(into.new, module.new)
    with pytest.raises(asyncsave.MismatchError, match="refused"):
        asyncsave.restore(tmp_path / "a", {"m": torch.nn.Sequential(Renaming())})


def test_shapes_in_a_module_that_loads_by_itself_are_listed_with_all_else(tmp_path: Path) -> None:
    class Hooked(torch.nn.Linear):
        """Loads what has any shape."""

        def __init__(self, width: int) -> None:
            super().__init__(width, 1)
            self.register_load_state_dict_pre_hook(self.cut)

        def cut(self, _: Any, state: dict[str, Any], prefix: str, *__: Any) -> None:
            name = f"{prefix}weight"
            state[name] = state[name][:, : self.weight.shape[1]]

    def net(width: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(2, width), Hooked(width))

    put({"a": net(5), "b": net(5), "t": torch.ones(2)}, tmp_path / "a")
    mine = {"a": net(4), "b": net(4), "t": torch.zeros(3)}
    with pytest.raises(asyncsave.MismatchError) as caught:
        asyncsave.restore(tmp_path / "a", mine)
    names = ["a.0.weight", "a.0.bias", "b.0.weight", "b.0.bias", "t"]
    assert [reason.split(":")[0] for reason in caught.value.reasons] == names
    wide, narrow = (torch.nn.Sequential(Hooked(width)) for width in (5, 4))
    put({"m": wide}, tmp_path / "b")
    asyncsave.restore(tmp_path / "b", {"m": narrow})
    assert torch.equal(narrow[0].weight, wide[0].weight[:, :4])  # type: ignore[arg-type,index]


# -- damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["off", 1])
def test_damage_changes_nothing(tmp_path: Path, compression: Any) -> None:
    model = torch.nn.Linear(600, 600)
    put({"first": torch.ones(3), "model": model}, tmp_path / "a", compression=compression)
    damage(tmp_path / "a" / "rank-00000.data", 200_000)
    into = {"first": torch.zeros(3), "model": torch.nn.Linear(600, 600)}
    before = into["model"].weight.detach().clone()  # type: ignore[union-attr]
    with pytest.raises(asyncsave.IntegrityError, match="checksum") as caught:
        asyncsave.restore(tmp_path / "a", into)
    assert caught.value.path == tmp_path / "a" / "rank-00000.data"
    assert caught.value.offset % 4096 == 0
    assert torch.equal(into["first"], torch.zeros(3))  # type: ignore[arg-type]
    assert torch.equal(into["model"].weight, before)  # type: ignore[union-attr,arg-type]
    with pytest.raises(asyncsave.IntegrityError):
        asyncsave.load(tmp_path / "a")
    with pytest.raises(asyncsave.IntegrityError):
        asyncsave.verify(tmp_path / "a")


def test_padding_harms_no_value_and_verify_sees_it(tmp_path: Path) -> None:
    put({"w": torch.ones(3)}, tmp_path / "a")
    damage(tmp_path / "a" / "rank-00000.data", 4000)
    into = {"w": torch.zeros(3)}
    asyncsave.restore(tmp_path / "a", into)
    assert torch.equal(into["w"], torch.ones(3))
    with pytest.raises(asyncsave.IntegrityError, match="not zero between"):
        asyncsave.verify(tmp_path / "a")


@pytest.mark.parametrize("file", ["rank-00000.data", "rank-00000.json", "checkpoint.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "delete", "link", "pipe"])
def test_the_newest_that_verifies_is_used(
    tmp_path: Path, file: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with asyncsave.Checkpointer(tmp_path, durable=False) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, {"w": torch.full((100,), float(step))})
        ckpt.wait()
        victim = tmp_path / "step-000000003" / file
        match how:
            case "flip":
                damage(victim)
            case "cut":
                os.truncate(victim, victim.stat().st_size - 1)
            case "delete":
                victim.unlink()
            case "link":
                victim.rename(tmp_path / "elsewhere")
                victim.symlink_to(tmp_path / "elsewhere")
            case "pipe":
                victim.unlink()
                os.mkfifo(victim)
        state = {"w": torch.zeros(100)}
        assert ckpt.restore(state) == 2
        assert state["w"][0] == 2
        assert ckpt.load()["w"][0] == 2
        assert asyncsave.load(tmp_path)["w"][0] == 2
        assert asyncsave.restore(tmp_path, state) == 2
        assert "passed over" in caplog.text
        path, why = ckpt.stats.passed_over[0]
        assert path == tmp_path / "step-000000003"
        assert why
        with pytest.raises(asyncsave.LoadError):
            ckpt.restore(state, step=3)
        with pytest.raises(asyncsave.LoadError):
            asyncsave.verify(tmp_path)


def test_all_damaged(tmp_path: Path) -> None:
    with asyncsave.Checkpointer(tmp_path, durable=False) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"w": torch.full((100,), float(step))})
        ckpt.wait()
        for step in (1, 2):
            damage(tmp_path / f"step-00000000{step}" / "rank-00000.data")
        with pytest.raises(asyncsave.IntegrityError, match="step-000000002") as caught:
            ckpt.restore({"w": torch.zeros(100)})
        assert "step-000000001" in caught.value.__notes__[0]


def test_a_mismatch_does_not_fall_back(tmp_path: Path) -> None:
    with asyncsave.Checkpointer(tmp_path, durable=False) as ckpt:
        ckpt.save(1, {"w": torch.zeros(1)})
        ckpt.save(2, {"w": torch.zeros(2)})
        with pytest.raises(asyncsave.MismatchError):
            ckpt.restore({"w": torch.zeros(1)})


def test_nothing_there(tmp_path: Path) -> None:
    for use in (asyncsave.load, asyncsave.verify, lambda path: asyncsave.restore(path, {})):
        with pytest.raises(asyncsave.CheckpointNotFoundError, match="nothing there"):
            use(tmp_path / "nowhere")
        with pytest.raises(asyncsave.CheckpointNotFoundError, match=r"no checkpoint\.json"):
            use(tmp_path)
    with asyncsave.Checkpointer(tmp_path, durable=False) as ckpt:
        ckpt.save(5, {})
        with pytest.raises(asyncsave.CheckpointNotFoundError, match=r"it has \[5\]"):
            ckpt.restore({}, step=4)


def test_a_newer_format_is_not_passed_over(tmp_path: Path) -> None:
    with asyncsave.Checkpointer(tmp_path, durable=False) as ckpt:
        ckpt.save(1, {"x": 1})
        ckpt.save(2, {"x": 2}, block=True)
        make_newer(tmp_path / "step-000000002")
        with pytest.raises(asyncsave.UnsupportedVersionError, match="format 2"):
            ckpt.load()


# -- keys -----------------------------------------------------------------------------------------


def test_keys_select_and_read_only_what_they_need(tmp_path: Path) -> None:
    state = {
        "model": torch.nn.Linear(3, 3),
        "big": torch.zeros(20 << 20, dtype=torch.uint8),
        "list": [torch.ones(1), torch.ones(2)],
        "epoch": 4,
    }
    put(state, tmp_path / "a", compression="off")
    faults = Faults()
    place = FaultDisk(faults).at(tmp_path / "a")

    def read() -> int:
        reads = [each for each in faults.operations if each.kind == "read"]
        return sum(each.length for each in reads if each.path.suffix == ".data")

    loaded = asyncsave.load(place, keys="model.*")
    assert list(loaded) == ["model"]
    assert_same(dict(state["model"].state_dict()), dict(loaded["model"]))  # type: ignore[attr-defined]
    assert read() < 1000
    assert asyncsave.load(place, keys="epoch") == {"epoch": 4}
    assert list(asyncsave.load(place, keys=["model.weight"])["model"]) == ["weight"]
    loaded = asyncsave.load(place, keys=["list.1", "epoch"])
    assert loaded["list"][0] is None
    assert_same(loaded["list"][1], torch.ones(2))
    assert sorted(asyncsave.load(place, keys=["model", "model.bias"])["model"]) == [
        "bias",
        "weight",
    ]
    assert read() < 10_000
    with pytest.raises(asyncsave.MismatchError, match=r"'model.wieght'; there are 'model.weight'"):
        asyncsave.load(place, keys=["model.wieght", "epoch"])


def test_device_is_checked(tmp_path: Path) -> None:
    put({"x": torch.ones(1)}, tmp_path / "a")
    with pytest.raises(asyncsave.ConfigError, match="device"):
        asyncsave.load(tmp_path / "a", device="gpu")
    lacks = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(asyncsave.ConfigError, match=f"device='{lacks}' is not a device here"):
        asyncsave.load(tmp_path / "nothing is read", device=lacks)
    loaded = asyncsave.load(tmp_path / "a", device="meta")
    assert loaded["x"].is_meta


@pytest.mark.parametrize("threads", [0, 1])
def test_where_the_system_has_no_more_threads_fewer_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    state = {f"w{i}": torch.randn(1 << 20) for i in range(9)}
    asyncsave.save(state, tmp_path / "a", compression="off").result()
    start, begun = threading.Thread.start, 0

    def scarce(thread: threading.Thread) -> None:
        nonlocal begun
        if thread.name.startswith("asyncsave-read"):
            begun += 1
            if begun > threads:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    assert_same(asyncsave.load(tmp_path / "a"), state)
    assert begun == threads + 1


@pytest.mark.parametrize("compression", ["off", 1])
@pytest.mark.parametrize("elements", [1, 70_000, 300_001, 1 << 20, (4 << 20) + 5])
def test_tensors_of_any_length_are_filled_in_pieces(
    tmp_path: Path, elements: int, compression: Any
) -> None:
    """A chunk may be part of one tensor, a few, or many; and some of them are not wanted."""
    state = {f"w{i}": torch.randn(elements + i) for i in range(11)}
    asyncsave.save(state, tmp_path / "a", compression=compression).result()
    into = {name: torch.zeros_like(value) for name, value in state.items()}
    asyncsave.restore(tmp_path / "a", into)
    assert_same(into, state)
    some = {name: torch.zeros_like(state[name]) for name in ("w1", "w2", "w5")}
    asyncsave.restore(tmp_path / "a", some, keys=list(some))
    assert_same(some, {name: state[name] for name in some})
