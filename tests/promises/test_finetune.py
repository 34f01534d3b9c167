"""Restore parts of a checkpoint, under other names, into other dtypes, through wrappers."""

from __future__ import annotations

import copy
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import asyncsave
from tests.support import assert_same


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, classes)


def saved(tmp_path: Path, state: Any = None, **more: Any) -> tuple[Path, Net]:
    net = Net()
    with torch.no_grad():
        for value in net.state_dict().values():
            value.copy_(torch.randint(1, 99, value.shape))
    state = {"model": net, "epoch": 7, **more} if state is None else state
    asyncsave.save(state, tmp_path / "a").result()
    return tmp_path / "a", net


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def before_and_after(module: nn.Module) -> Any:
    return copy.deepcopy(dict(module.state_dict()))


# -- what is not found is said ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (lambda net: {"modle": net}, r"under 'model': use rename=\{'model': 'modle'\}"),
        (lambda net: net, r"under 'model': use rename=\{'model': ''\}"),
        (lambda net: {"body": net.body}, r"under 'model.body': use rename=\{'model.body': 'body'"),
        (lambda net: {"x": {"y": net.head}}, r"under 'model.head': use rename=\{'model.head': 'x"),
    ],
)
def test_a_state_under_another_name_is_an_error_that_says_where(
    tmp_path: Path, wrap: Any, says: str
) -> None:
    path, _ = saved(tmp_path)
    net = Net()
    before = before_and_after(net)
    for strict in (True, False):
        with pytest.raises(asyncsave.MismatchError, match=says):
            asyncsave.restore(path, wrap(net), strict=strict)
    assert_same(before, dict(net.state_dict()))


def test_nothing_in_both_lists_what_both_have(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    with pytest.raises(asyncsave.MismatchError, match=r"has 'model.body.0.weight'") as caught:
        asyncsave.restore(path, {"step": 1, "other": torch.zeros(1)}, strict=False)
    assert "the state has 'step', 'other'" in str(caught.value)
    asyncsave.save({}, tmp_path / "empty").result()
    assert asyncsave.restore(tmp_path / "empty", {"step": 1}, strict=False) is None


def test_a_module_that_takes_nothing_is_an_error(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)

    class Own(nn.Linear):
        def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict(state, strict)

    with pytest.raises(asyncsave.MismatchError, match="model: took nothing of what was saved"):
        asyncsave.restore(path, {"model": Own(2, 2)}, strict=False)


def test_a_part_that_matches_nothing_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, net = saved(tmp_path)
    into = {"model": Net(), "extra": nn.Linear(2, 2), "deep": {"er": {"w": torch.zeros(1)}}, "n": 1}
    caplog.set_level(logging.INFO, "asyncsave")
    asyncsave.restore(path, into, strict=False)
    assert same(into["model"], net)  # type: ignore[arg-type]
    warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert len(warnings) == 2
    assert "nothing of 'extra'" in warnings[0]
    assert "nothing of 'deep'" in warnings[1]


def test_one_line_says_what_was_restored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "asyncsave")
    reports: list[asyncsave.RestoreReport] = []
    with asyncsave.Checkpointer(tmp_path, durable=False) as ckpt:
        ckpt.save(5, {"model": Net(), "epoch": 3, "old": 1}, block=True)
        caplog.clear()
        into = {"model": Net(), "epoch": 0, "new": 2}
        assert ckpt.restore(into, strict=False, report=reports.append) == 5
    lines = [each.getMessage() for each in caplog.records if each.name == "asyncsave"]
    (line,) = [each for each in lines if each.startswith("restored ")]
    assert f"restored step 5 from {tmp_path / 'step-000000005'}: 9 tensors" in line
    assert "replaced in the state: 'epoch'" in line
    assert "1 missing: 'new'" in line
    assert "1 unexpected: 'old'" in line
    (report,) = reports
    assert report.path == tmp_path / "step-000000005"
    assert (report.step, report.missing, report.unexpected) == (5, ("new",), ("old",))
    assert report.loaded[0] == "model.body.0.weight"
    assert report.loaded[-1] == "epoch"
    assert report.cast == ()
    assert report.seconds > 0


# -- keys -------------------------------------------------------------------------------------


def test_keys_restore_what_they_name_and_leave_the_rest(tmp_path: Path) -> None:
    path, net = saved(tmp_path, more=[torch.ones(2), torch.ones(2), 5])
    into: dict[str, Any] = {"model": Net(), "other": torch.zeros(3), "epoch": 0}
    head = before_and_after(into["model"].head)
    asyncsave.restore(path, into, keys="model.body.*")
    assert same(into["model"].body, net.body)
    assert_same(head, dict(into["model"].head.state_dict()))
    assert into["epoch"] == 0
    asyncsave.restore(path, into, keys=["epoch"])
    assert into["epoch"] == 7
    into["more"] = [torch.zeros(2), torch.zeros(2), 0]
    asyncsave.restore(path, into, keys=["more.1", "more.2"])
    assert_same(into["more"], [torch.zeros(2), torch.ones(2), 5])
    into["more"] = []
    asyncsave.restore(path, into, keys="more.1")
    assert_same(into["more"], [None, torch.ones(2), None])


def test_keys_are_strict_about_what_they_name(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    with pytest.raises(asyncsave.MismatchError, match=r"'modle.*'; there are 'model"):
        asyncsave.restore(path, {"model": Net()}, keys="modle.*")
    with pytest.raises(asyncsave.MismatchError, match="model: unexpected"):
        asyncsave.restore(path, {"epoch": 0}, keys=["epoch", "model"])

    class More(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body.append(nn.Linear(4, 4))

    with pytest.raises(asyncsave.MismatchError, match=r"model\.body\.2\.weight: missing"):
        asyncsave.restore(path, {"model": More()}, keys="model.*")
    with pytest.raises(asyncsave.MismatchError, match=r"^.*\n.*net\.body\.2\.weight: missing"):
        asyncsave.restore(path, {"net": More()}, keys="model.body.*", rename={"model": "net"})
    asyncsave.restore(path, {"model": More()}, keys="model.head.*")


# -- rename -----------------------------------------------------------------------------------


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Net().body
        self.out = nn.Linear(4, 2)


RENAMES: dict[str, tuple[dict[str, str], Any, Any]] = {
    "a module": ({"model": "net"}, lambda: {"net": Net()}, lambda into: into["net"]),
    "to the root": ({"model": ""}, Net, lambda into: into),
    "deeper": ({"model": "a.b"}, lambda: {"a": {"b": Net()}}, lambda into: into["a"]["b"]),
    "a dotted key": ({"model": "a.b"}, lambda: {"a.b": Net()}, lambda into: into["a.b"]),
    "a state dict": (
        {"model": "net"},
        lambda: {"net": Net().state_dict()},
        lambda into: _of(into["net"]),
    ),
    "part of a state dict": (
        {"model": "a.net"},
        lambda: {"a": nn.ModuleDict({"net": Net()}).state_dict()},
        lambda into: _of({key[4:]: value for key, value in into["a"].items()}),
    ),
    "part of a module": (
        {"model": "a.net"},
        lambda: {"a": nn.ModuleDict({"net": Net()})},
        lambda into: into["a"]["net"],
    ),
    "parts": (
        {"model.body": "encoder", "model.head": "heads.x"},
        lambda: {"encoder": Net().body, "heads": {"x": Net().head}},
        lambda into: nn.ModuleDict({"body": into["encoder"], "head": into["heads"]["x"]}),
    ),
    "spread over a dict": (
        {"model": "all"},
        lambda: {"all": {"body": Net().body, "head": Net().head}},
        lambda into: nn.ModuleDict(into["all"]),
    ),
    "into an empty dict": (
        {"model": "new"},
        lambda: {"new": {}},
        lambda into: _of(into["new"]),
    ),
}


def _of(state: Any) -> Net:
    net = Net()
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize("case", RENAMES)
def test_rename(tmp_path: Path, case: str) -> None:
    rename, make, net_of = RENAMES[case]
    path, net = saved(tmp_path)
    into = make()
    asyncsave.restore(path, into, keys="model.*", rename=rename)
    assert same(net_of(into), net)


def test_rename_swaps_and_takes_the_whole(tmp_path: Path) -> None:
    path, net = saved(tmp_path, {"a": torch.ones(1), "b": torch.zeros(1)})
    into = {"a": torch.ones(1), "b": torch.zeros(1)}
    asyncsave.restore(path, into, rename={"a": "b", "b": "a"})
    assert (into["a"].item(), into["b"].item()) == (0, 1)
    asyncsave.save(net, tmp_path / "root").result()
    whole = {"model": Net()}
    asyncsave.restore(tmp_path / "root", whole, rename={"": "model"})
    assert same(whole["model"], net)
    modules = {"body": Net().body, "head": Net().head}
    asyncsave.save(modules, tmp_path / "parts").result()
    asyncsave.restore(tmp_path / "parts", whole, rename={"": "model"})
    assert same(nn.ModuleDict(modules), whole["model"])


def test_fine_tuning_with_a_new_head(tmp_path: Path) -> None:
    path, net = saved(tmp_path, optimizer=torch.optim.AdamW(Net().parameters()))
    mine = Other()
    out = before_and_after(mine.out)
    reports: list[asyncsave.RestoreReport] = []
    asyncsave.restore(
        path,
        {"mine": mine},
        keys="model.body.*",
        rename={"model.body": "mine.encoder"},
        report=reports.append,
    )
    assert same(mine.encoder, net.body)
    assert_same(out, dict(mine.out.state_dict()))
    assert reports[0].missing == reports[0].unexpected == ()
    with pytest.raises(asyncsave.MismatchError, match=r"mine\.out\.weight: missing"):
        asyncsave.restore(path, {"mine": mine}, rename={"model.body": "mine.encoder"})


def test_a_state_that_holds_itself_is_refused_like_any_other(tmp_path: Path) -> None:
    asyncsave.save({"v": torch.zeros(1), "list": [1, torch.ones(1)]}, tmp_path / "a").result()
    around: dict[str, Any] = {"w": torch.zeros(1)}
    around["self"] = around
    with pytest.raises(asyncsave.MismatchError, match="q: missing in the checkpoint"):
        asyncsave.restore(tmp_path / "a", {"q": around})
    endless: list[Any] = [0]
    endless.append(endless)
    with pytest.raises(asyncsave.MismatchError, match=r"list\.1: the state has a list"):
        asyncsave.restore(tmp_path / "a", {"v": torch.zeros(1), "list": endless})


@pytest.mark.parametrize("what", ["hints", "wrappers"])
def test_names_that_are_made_to_take_long_do_not(tmp_path: Path, what: str) -> None:
    theirs: dict[str, Any] = {f"a{i}": {"0.w": 1} for i in range(50_000)}
    mine: dict[str, Any] = {"m": {f"{i}.w": torch.zeros(1) for i in range(2_000)}}
    if what == "wrappers":
        theirs, mine = {"m": {"module." * 200_000 + "weight": 1}}, {"m": nn.Linear(1, 1)}
    asyncsave.save(theirs, tmp_path / "a").result()
    began = time.monotonic()
    with pytest.raises(asyncsave.MismatchError, match="m"):
        asyncsave.restore(tmp_path / "a", mine)
    assert time.monotonic() - began < 12  # two at most, and without a bound a minute


@pytest.mark.parametrize("rename", [{"a": "x", "b": "x.y"}, {"b": "x.y", "a": "x"}])
def test_names_that_lack_are_told_in_whatever_order_the_others_are_given(
    tmp_path: Path, rename: dict[str, str]
) -> None:
    asyncsave.save({"a": {"k": torch.ones(1)}, "b": {"z": torch.ones(1)}}, tmp_path / "a").result()
    inner = {"z": torch.zeros(1), "new": torch.zeros(1)}
    into = {"x": {"k": torch.zeros(1), "y": inner}}
    with pytest.raises(asyncsave.MismatchError, match=r"x\.y\.new: missing in the checkpoint"):
        asyncsave.restore(tmp_path / "a", into, keys=["b.*", "a.k"], rename=rename)


@pytest.mark.parametrize(
    ("rename", "says"),
    [
        ({"modle": "net"}, r"nothing that these rename name.*\n.*'modle'; there are 'model"),
        ({"model": "nte"}, "the state has nothing called 'nte'"),
        ({"model.body": "net", "model.head": "net", "epoch": "net"}, "two values of the check"),
        ({"model.body": "epoch"}, "two values of the checkpoint would be 'epoch'"),
        ({"model.body.0": "net.head", "model.head": "net.head"}, "would be 'net.head.weight'"),
    ],
)
def test_a_rename_that_cannot_be(tmp_path: Path, rename: dict[str, str], says: str) -> None:
    path, _ = saved(tmp_path)
    into = {"net": Net(), "epoch": 0}
    before = before_and_after(into["net"])  # type: ignore[arg-type]
    with pytest.raises(asyncsave.MismatchError, match=says):
        asyncsave.restore(path, into, rename=rename, strict=False)
    assert_same(before, dict(into["net"].state_dict()))  # type: ignore[attr-defined]
    assert into["epoch"] == 0
    with pytest.raises(asyncsave.ConfigError, match="must be a dict of names"):
        asyncsave.restore(path, into, rename={"model": 3})  # type: ignore[dict-item]
    with pytest.raises(asyncsave.ConfigError, match="must be a dict of names"):
        asyncsave.restore(path, into, rename="model")  # type: ignore[arg-type]


# -- wrappers ---------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """As DDP and torch.compile wrap, for those that are not made here."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)


def parallel(net: nn.Module) -> nn.Module:
    return nn.DataParallel(net)


def compiled(net: nn.Module) -> Any:
    from torch._dynamo.eval_frame import OptimizedModule

    return OptimizedModule(net, lambda *_: None)


WRAPS: dict[str, Any] = {
    "plain": lambda net: net,
    "parallel": parallel,
    "compiled": compiled,
    "both": lambda net: parallel(compiled(net)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("there", WRAPS)
@pytest.mark.parametrize("here", WRAPS)
def test_wrappers_are_understood(tmp_path: Path, there: str, here: str) -> None:
    net, mine = Net(), Net()
    asyncsave.save({"model": WRAPS[there](net)}, tmp_path / "a").result()
    asyncsave.restore(tmp_path / "a", {"model": WRAPS[here](mine)})
    assert same(mine, net)


def test_a_module_that_is_called_module_is_no_wrapper(tmp_path: Path) -> None:
    net, mine = Wrapped("module", Net()), Wrapped("module", Net())
    asyncsave.save({"model": parallel(net)}, tmp_path / "a").result()
    asyncsave.restore(tmp_path / "a", {"model": mine})
    assert same(mine, net)
    asyncsave.save({"model": net}, tmp_path / "b").result()
    again = Wrapped("module", Net())
    asyncsave.restore(tmp_path / "b", {"model": parallel(again)})
    assert same(again, net)


def test_a_prefix_of_some_keys_is_no_wrapper(tmp_path: Path) -> None:
    state = {"module.weight": torch.ones(2, 2), "bias": torch.ones(2)}
    asyncsave.save({"model": state}, tmp_path / "a").result()
    with pytest.raises(asyncsave.MismatchError, match=r"model\.module\.weight: unexpected"):
        asyncsave.restore(tmp_path / "a", {"model": nn.Linear(2, 2)})


def test_versions_of_modules_come_along(tmp_path: Path) -> None:
    """A module that loads by itself sees the versions that its own state dict would have."""
    seen: list[Any] = []

    class Versioned(nn.Module):
        _version = 3

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            seen.append(metadata.get("version"))
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    asyncsave.save({"m": parallel(nn.Sequential(Versioned()))}, tmp_path / "a").result()
    asyncsave.restore(tmp_path / "a", {"m": nn.Sequential(Versioned())})
    asyncsave.save({"m": nn.Sequential(Versioned())}, tmp_path / "b").result()
    asyncsave.restore(tmp_path / "b", {"n": Versioned()}, rename={"m.0": "n"})
    assert seen == [3, 3]


# -- cast -------------------------------------------------------------------------------------


def test_dtypes_are_converted_only_when_asked_for(tmp_path: Path) -> None:
    values = torch.randn(5, 3)
    state = {"w": values, "t": values.double().t(), "a": values.numpy(), "i": torch.ones(2).int()}
    asyncsave.save(state, tmp_path / "a").result()

    def into() -> dict[str, Any]:
        return {
            "w": torch.zeros(5, 3, dtype=torch.bfloat16),
            "t": torch.zeros(3, 5, dtype=torch.float16),
            "a": np.zeros((5, 3), ">f8"),
            "i": torch.zeros(2).int(),
        }

    mine = into()
    with pytest.raises(asyncsave.MismatchError, match=r"saved with dtype float32.*cast=True"):
        asyncsave.restore(tmp_path / "a", mine)
    assert not mine["w"].any()
    reports: list[asyncsave.RestoreReport] = []
    asyncsave.restore(tmp_path / "a", mine, cast=True, report=reports.append)
    assert torch.equal(mine["w"], values.bfloat16())
    assert torch.equal(mine["t"], values.half().t())
    assert np.array_equal(mine["a"], values.numpy())
    assert reports[0].cast == ("w", "t", "a")
    for other in (torch.float32, torch.int64, torch.uint8, torch.bool):
        mine = {**into(), "i": torch.zeros(2, dtype=other)}
        with pytest.raises(asyncsave.MismatchError, match="i: saved with dtype int32"):
            asyncsave.restore(tmp_path / "a", mine, cast=True)
        assert not mine["w"].any()


def test_a_module_does_not_convert_without_a_word(tmp_path: Path) -> None:
    class Own(nn.Linear):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(*args, **kwargs)

    linear = Own(3, 3)
    asyncsave.save({"m": linear}, tmp_path / "a").result()
    mine = Own(3, 3).half()
    before = before_and_after(mine)
    with pytest.raises(asyncsave.MismatchError, match=r"m\.weight: saved with dtype float32"):
        asyncsave.restore(tmp_path / "a", {"m": mine})
    assert_same(before, dict(mine.state_dict()))
    asyncsave.restore(tmp_path / "a", {"m": mine}, cast=True)
    assert torch.equal(mine.weight, linear.weight.half())


# -- plain values and numbers -----------------------------------------------------------------


class Count:
    """Counts how often it was asked to load."""

    loads = 0

    def state_dict(self) -> dict[str, int]:
        return {"loads": self.loads}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loads += 1


ANYTHING: list[Any] = [
    1.5,
    3,
    None,
    "text",
    True,
    b"x" * 300,
    torch.tensor(2.5),
    torch.ones(3),
    np.arange(3),
    np.float32(2),
    torch.float16,
    {"a": 1, "b": torch.ones(1)},
    [1, torch.ones(1)],
    (1, 2),
]


@pytest.mark.parametrize("i", range(len(ANYTHING)))
def test_a_plain_value_takes_whatever_was_saved(tmp_path: Path, i: int) -> None:
    value = ANYTHING[i]
    asyncsave.save({"best": value, "list": [value], "tuple": (1, value)}, tmp_path / "a").result()
    for old in (0.5, 1, None, "old", torch.float32):
        into = {"best": old, "list": [old], "tuple": (0, old)}
        asyncsave.restore(tmp_path / "a", into)
        assert_same(into, {"best": value, "list": [value], "tuple": (1, value)})


def test_the_loss_that_became_a_tensor(tmp_path: Path) -> None:
    """nanoGPT's best_val_loss is 1e9 at first, and then a tensor."""
    with asyncsave.Checkpointer(tmp_path, durable=False) as ckpt:
        ckpt.save(1, {"best_val_loss": torch.tensor(2.25)}, block=True)
        state = {"best_val_loss": 1e9}
        assert ckpt.restore(state) == 1
        assert_same(state["best_val_loss"], torch.tensor(2.25))


HOLDS: list[tuple[Any, Any, bool]] = [
    (2.25, torch.tensor(0.0), True),
    (3, torch.tensor(0.0), True),
    (float("inf"), torch.tensor(0.0).half(), True),
    (float("nan"), torch.tensor(0.0), True),
    (0.1, torch.tensor(0.0).double(), True),
    (-5, torch.tensor(0), True),
    (True, torch.tensor(False), True),
    (1 + 2j, torch.tensor(0j), True),
    (np.float32(0.1), torch.tensor(0.0), True),
    (2.25, np.zeros(()), True),
    (7, np.zeros((), np.int16), True),
    (0.1, torch.tensor(0.0), False),
    (2**53 + 1, torch.tensor(0.0).double(), False),
    (300, torch.tensor(0, dtype=torch.uint8), False),
    (-1, torch.tensor(0, dtype=torch.uint8), False),
    (1e300, torch.tensor(0.0), False),
    (2**70, torch.tensor(0.0), True),
    (-(2**70), torch.tensor(0.0).double(), True),
    (10**400, torch.tensor(0.0), False),
    (10**400, np.zeros(()), False),
    (10**5000, torch.tensor(0), False),
    (10**5000, torch.tensor(0.0), False),
    (70_000, np.zeros((), np.int16), False),
    (2.0, torch.tensor(0), False),
    (True, torch.tensor(0), False),
    (1, torch.tensor(False), False),
    (2.25, torch.zeros(1), False),
    ("1", torch.tensor(0), False),
    (None, torch.tensor(0.0), False),
]


@pytest.mark.parametrize("case", range(len(HOLDS)))
def test_a_number_fills_a_tensor_that_holds_it_exactly(tmp_path: Path, case: int) -> None:
    value, into, fits = HOLDS[case]
    asyncsave.save({"x": value}, tmp_path / "a").result()
    into = copy.deepcopy(into)
    if not fits:
        with pytest.raises(asyncsave.MismatchError, match="x: "):
            asyncsave.restore(tmp_path / "a", {"x": into})
        assert not into.any()
        return
    asyncsave.restore(tmp_path / "a", {"x": into})
    assert into.item() == value or (math.isnan(value) and math.isnan(into.item()))


def test_a_number_is_rounded_only_when_asked_for(tmp_path: Path) -> None:
    asyncsave.save({"x": 0.1, "y": 0.1}, tmp_path / "a").result()
    into = {"x": torch.tensor(0.0), "y": np.zeros((), np.float32)}
    with pytest.raises(asyncsave.MismatchError, match=r"the number 0.1.*cast=True"):
        asyncsave.restore(tmp_path / "a", into)
    asyncsave.restore(tmp_path / "a", into, cast=True)
    assert torch.equal(into["x"], torch.tensor(0.1))  # type: ignore[arg-type]
    assert into["y"] == np.float32(0.1)


TOO_LARGE: list[tuple[Any, Any]] = [
    (1e300, torch.tensor(0.0)),
    (1e300, torch.tensor(0.0).bfloat16()),
    (1e300, np.zeros((), np.float32)),
    (10**400, torch.tensor(0.0).double()),
    (10**400, np.zeros(())),
    (10**5000, np.zeros(())),
    (1, torch.empty((), dtype=torch.bits8)),
]


@pytest.mark.parametrize("case", range(len(TOO_LARGE)))
def test_a_number_that_is_too_large_is_a_mismatch_with_cast_as_well(
    tmp_path: Path, case: int
) -> None:
    value, into = TOO_LARGE[case]
    count = Count()
    asyncsave.save({"count": Count(), "x": value}, tmp_path / "a").result()
    with pytest.raises(
        asyncsave.MismatchError, match=r"x: .*saved as .*number.* cannot hold"
    ) as caught:
        asyncsave.restore(tmp_path / "a", {"count": count, "x": into}, cast=True)
    assert "exactly" not in str(caught.value)
    assert count.loads == 0
