"""States of real programs: every kind of value, and what is said of those that cannot be saved."""

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asyncsave
from tests import kinds
from tests.kinds import Celsius, Color, Config, Frozen, Image, Level, Scaled, scaled
from tests.support import assert_same

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*(quantized|nested tensor|Sparse C|Sparse B).*:UserWarning"
    ),
]


def saved(state: Any, path: Path, level: Any = "off") -> Path:
    asyncsave.save(state, path, compression=level).result()
    return path


@pytest.fixture
def registered() -> Iterator[None]:
    from asyncsave.state import classes  # there is no way to take a registration back

    before = dict(classes.BY_TYPE), dict(classes._BY_NAME)
    asyncsave.register(
        Celsius, to_plain=lambda v: {"degrees": v.degrees}, from_plain=lambda p: Celsius(**p)
    )
    yield
    for known, old in zip((classes.BY_TYPE, classes._BY_NAME), before, strict=True):
        known.clear()  # type: ignore[attr-defined]
        known.update(old)  # type: ignore[attr-defined]


# -- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["off", 1, 6])
def test_data_comes_back_equal_and_of_the_same_type(tmp_path: Path, level: Any) -> None:
    state = kinds.data()
    loaded = asyncsave.load(saved(state, tmp_path / "a", level))
    assert list(loaded) == list(state)
    for name, value in state.items():
        assert type(loaded[name]) is type(value), name
        if isinstance(value, (np.ndarray, np.void)):
            assert loaded[name].dtype == value.dtype, name
            assert loaded[name].tobytes() == value.tobytes(), name
        elif name.startswith("deque"):
            assert_same(list(value), list(loaded[name]), name)
            assert loaded[name].maxlen == value.maxlen
        elif name.startswith("defaultdict"):
            assert_same(dict(value), dict(loaded[name]), name)
            assert loaded[name].default_factory is value.default_factory
        else:
            assert_same(value, loaded[name], name)
    assert loaded["datetime"].fold == 1
    assert loaded["aware"].tzname() == "X"


@pytest.mark.parametrize("level", ["off", 1, 6])
def test_tensors_that_are_no_plain_memory(tmp_path: Path, level: Any) -> None:
    state = kinds.tensors()
    loaded = asyncsave.load(saved(state, tmp_path / "a", level))
    for name, value in state.items():
        assert loaded[name].layout == value.layout, name
        assert loaded[name].dtype == value.dtype, name
        assert loaded[name].requires_grad == value.requires_grad, name
        assert_same(kinds.as_parts(value), kinds.as_parts(loaded[name]), name)


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    state = kinds.generators()
    loaded = asyncsave.load(saved(state, tmp_path / "a"))
    assert {name: type(each) for name, each in loaded.items()} == {
        name: type(each) for name, each in state.items()
    }
    fresh = kinds.generators(9)
    held = dict(fresh)
    asyncsave.restore(tmp_path / "a", fresh)
    assert all(fresh[name] is held[name] for name in fresh), "filled where they are"
    assert kinds.draws(state) == kinds.draws(loaded) == kinds.draws(fresh)


def test_own_classes_are_loaded_as_plain_data(tmp_path: Path) -> None:
    loaded = asyncsave.load(saved(kinds.classes(), tmp_path / "a"))
    weight = torch.ones(2)
    assert_same(
        loaded,
        {
            "enum": 1,
            "int enum": 5,
            "flags": 3,
            "enum keys": {1: 1, (2, "x"): weight + 1, 5: [7]},
            "enum set": {1},
            "list": [1, 2],
            "dict": {"a": 1, "b": weight + 2},
            "str": "x",
            "int": 1,
            "float": 1.0,
            "tuple": (1, weight + 3),
            "config": {"size": 1, "names": ["a"], "weight": weight + 4, "level": 5},
            "frozen": {"size": 1, "weight": weight + 5},
            "slotted": {"size": 1, "made": 0},
            "namespace": {"a": 1, "w": weight + 6, "level": 7},
            "args": {"lr": 0.1, "config": {"size": 1, "names": [], "weight": None, "level": 5}},
        },
    )


def test_live_values_keep_their_classes(tmp_path: Path) -> None:
    state, live = kinds.classes(1), kinds.classes(2)
    held = {name: live[name] for name in ("list", "dict", "config", "slotted", "namespace", "args")}
    weights = [live["config"].weight, live["frozen"].weight, live["namespace"].w]
    asyncsave.restore(saved(state, tmp_path / "a"), live)
    for name, value in state.items():
        assert type(live[name]) is type(value), name
    assert all(live[name] is value for name, value in held.items()), "filled where they are"
    now = [live["config"].weight, live["frozen"].weight, live["namespace"].w]
    assert all(one is other for one, other in zip(weights, now, strict=True))
    assert [weight[0].item() for weight in weights] == [5, 6, 7]
    for name in ("enum", "int enum", "flags", "enum set", "str", "int", "float", "slotted"):
        assert live[name] == state[name], name
    assert list(live["enum keys"]) == [Color.RED, Color.BLUE, Level.LOW]
    assert live["enum keys"][Color.RED] == 1
    assert live["enum keys"][Level.LOW] == [Level.HIGH]
    assert type(live["enum keys"][Level.LOW][0]) is Level
    assert type(live["config"].level) is Level
    assert live["config"].names == ["a"]
    assert live["frozen"].size == 1
    assert type(live["args"].config) is Config


def test_containers_are_filled_where_they_are(tmp_path: Path) -> None:
    state, live = kinds.data(1), kinds.data(3)
    mutable = ("set", "deque", "defaultdict", "Counter", "bytearray", "short bytearray", "records")
    live["defaultdict"].clear()  # takes all
    live["defaultdict of none"].clear()
    live["deque of values"] = collections.deque([1, 2, 3])
    held = {name: live[name] for name in (*mutable, "deque of values")}
    inner = live["deque"][2]
    asyncsave.restore(saved(state, tmp_path / "a"), live)
    assert all(live[name] is value for name, value in held.items())
    assert live["set"] == state["set"]
    assert live["Counter"] == state["Counter"]
    assert live["deque"][2] is inner
    assert torch.equal(inner, state["deque"][2])
    assert live["deque of values"] == state["deque of values"]
    assert live["bytearray"] == state["bytearray"]
    assert live["records"].tobytes() == state["records"].tobytes()
    assert live["datetime"] == state["datetime"]
    assert live["path"] == state["path"]


def test_other_tensors_are_filled_where_they_are(tmp_path: Path) -> None:
    state, live = kinds.tensors(1), kinds.tensors(2)
    held = dict(live)
    del live["grad"], state["grad"]
    asyncsave.restore(saved(state, tmp_path / "a"), live)
    for name, value in state.items():
        assert live[name] is held[name], name
        assert_same(kinds.as_parts(value), kinds.as_parts(live[name]), name)


def _quantized(size: int) -> Any:
    return torch.quantize_per_tensor(torch.ones(size), 1.0, 0, torch.quint8)


def _jagged(*lengths: int) -> Any:
    rows = [torch.ones(length, 3) for length in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize(
    ("name", "other", "says"),
    [
        ("coo", lambda: torch.eye(5).to_sparse(), "shape"),
        ("coo", lambda: torch.eye(4), "a torch.sparse_coo"),
        ("csr", lambda: torch.eye(4).to_sparse_csc(), "sparse_csc"),
        ("per tensor", lambda: kinds.tensors()["per channel"], "per_channel"),
        ("per tensor", lambda: _quantized(3), "shape"),
        ("nested", lambda: torch.nested.nested_tensor([torch.ones(2, 3)]), "2 tensors"),
        ("jagged", lambda: _jagged(3, 3), "rows of other lengths"),
        ("records", lambda: np.zeros(5, [("a", "<f4"), ("b", "V30")]), "another dtype"),
        ("generator", lambda: np.random.Generator(np.random.MT19937(1)), "PCG64"),
        ("generator", torch.Generator, "the state has a Generator"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_changes(
    tmp_path: Path, name: str, other: Any, says: str
) -> None:
    state = {**kinds.tensors(), "records": kinds.records(1), "generator": np.random.default_rng(1)}
    saved({name: state[name], "x": torch.ones(3)}, tmp_path / "a")
    live = {name: other(), "x": torch.zeros(3)}
    with pytest.raises(asyncsave.MismatchError, match=says):
        asyncsave.restore(tmp_path / "a", live)
    assert live["x"].sum() == 0


def test_a_plain_subclass_of_tensor(tmp_path: Path) -> None:
    image = torch.arange(6.0).reshape(2, 3).as_subclass(Image)
    state = {"image": image, "tied": image.as_subclass(torch.Tensor)[0]}
    loaded = asyncsave.load(saved(state, tmp_path / "a"))
    assert type(loaded["image"]) is torch.Tensor
    loaded["tied"][0] = 9
    assert loaded["image"][0, 0] == 9
    live = {"image": torch.zeros(2, 3).as_subclass(Image), "tied": torch.zeros(3)}
    asyncsave.restore(tmp_path / "a", live)
    assert type(live["image"]) is Image
    assert torch.equal(live["image"].as_subclass(torch.Tensor), torch.arange(6.0).reshape(2, 3))
    image.note = "beside"  # type: ignore[attr-defined]
    with pytest.raises(asyncsave.StateError, match="a tensor subclass"):
        asyncsave.check({"image": image})


def test_a_traceable_subclass_is_the_tensors_that_it_is_made_of(tmp_path: Path) -> None:
    loaded = asyncsave.load(saved({"w": scaled(3)}, tmp_path / "a"))["w"]
    assert_same(loaded["tensors"], {"data_": scaled(3).data_, "scale": scaled(3).scale})
    assert loaded["context"] == {"unit": "m", "dtype": torch.int8}
    assert loaded["size"] == torch.Size([3, 4])
    live = {"w": scaled(1)}
    held = live["w"], live["w"].data_, live["w"].scale
    asyncsave.restore(tmp_path / "a", live)
    assert live["w"] is held[0]
    assert live["w"].data_ is held[1]
    assert live["w"].scale is held[2]
    assert (live["w"].data_ == 3).all()
    assert (live["w"].scale == 1.5).all()
    with pytest.raises(asyncsave.MismatchError, match="another context"):
        asyncsave.restore(tmp_path / "a", {"w": scaled(1, "km")})
    with pytest.raises(asyncsave.MismatchError, match="Scaled"):
        asyncsave.restore(tmp_path / "a", {"w": torch.zeros(3, 4)})


def test_a_module_with_parameters_of_a_traceable_subclass(tmp_path: Path) -> None:
    def module(fill: int) -> Any:
        made = torch.nn.Module()
        made.weight = torch.nn.Parameter(scaled(fill), requires_grad=False)
        made.bias = torch.nn.Parameter(torch.full((3,), float(fill)))
        return made

    saved({"model": module(3)}, tmp_path / "a")
    live = module(1)
    inner = live.weight.data_
    asyncsave.restore(tmp_path / "a", {"model": live})
    assert live.weight.data_ is inner
    assert (inner == 3).all()
    assert (live.bias == 3).all()


def test_a_registered_class(tmp_path: Path, registered: None) -> None:
    state = {"t": Celsius(torch.ones(2)), "all": [Celsius(1), {"x": Celsius(2)}]}
    loaded = asyncsave.load(saved(state, tmp_path / "a"))
    assert type(loaded["t"]) is Celsius
    assert torch.equal(loaded["t"].degrees, torch.ones(2))
    assert loaded["all"][1]["x"].degrees == 2
    live = {"t": Celsius(0), "all": [Celsius(0), {"x": Celsius(0)}]}
    asyncsave.restore(tmp_path / "a", live)
    assert torch.equal(live["t"].degrees, torch.ones(2))
    assert live["all"][0].degrees == 1
    assert asyncsave.numpy.load(tmp_path / "a")["all"][0] == {"degrees": 1}


def test_a_class_that_this_process_has_not_registered_is_plain(tmp_path: Path) -> None:
    with pytest.raises(asyncsave.StateError, match=r"tests.kinds.Celsius.*register"):
        asyncsave.check({"t": Celsius(1)})
    saved({"t": kinds.Table(a=1)}, tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "rank-00000.json").read_text())
    assert "tests.kinds.Table" in json.dumps(manifest["tree"])
    assert asyncsave.load(tmp_path / "a")["t"] == {"a": 1}


def test_a_registered_class_that_cannot_be_made_again(tmp_path: Path, registered: None) -> None:
    saved({"t": Celsius(1), "x": torch.ones(2)}, tmp_path / "a")
    asyncsave.register(Celsius, to_plain=lambda v: v.degrees, from_plain=lambda p: p["no"])
    live = {"t": Celsius(5), "x": torch.zeros(2)}
    for use in (
        lambda: asyncsave.load(tmp_path / "a"),
        lambda: asyncsave.restore(tmp_path / "a", live),
    ):
        with pytest.raises(asyncsave.LoadError, match=r"from_plain of tests.kinds.Celsius"):
            use()
    assert live["x"].sum() == 0
    assert live["t"].degrees == 5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: asyncsave.register(3, to_plain=str, from_plain=str),  # type: ignore[arg-type]
        lambda: asyncsave.register(dict, to_plain=str, from_plain=str),
        lambda: asyncsave.register(torch.Tensor, to_plain=str, from_plain=str),
        lambda: asyncsave.register(Celsius, to_plain=3, from_plain=str),  # type: ignore[arg-type]
        lambda: asyncsave.register(Celsius, to_plain=str, from_plain=str, name=""),
        lambda: asyncsave.register(
            Config, to_plain=str, from_plain=str, name="tests.kinds.Celsius"
        ),
    ],
)
def test_what_cannot_be_registered(registered: None, wrong: Any) -> None:
    with pytest.raises(asyncsave.ConfigError, match="register"):
        wrong()


class Keeper:
    """An object that loads by itself, and wants its values as they were."""

    def __init__(self, seed: int) -> None:
        self.state = {**kinds.classes(seed), "plain": seed}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if type(value) is not type(self.state[name]):
                raise TypeError(f"{name} is a {type(value).__name__}")
        self.state = state


def test_load_state_dict_is_given_the_classes_that_the_object_has(tmp_path: Path) -> None:
    live = Keeper(2)
    asyncsave.restore(saved({"k": Keeper(1)}, tmp_path / "a"), {"k": live})
    assert live.state["enum"] is Color.RED
    assert live.state["config"].level is Level.LOW
    assert list(live.state["enum keys"]) == [Color.RED, Color.BLUE, Level.LOW]
    assert live.state["dict"]["b"][0] == 3


def test_a_value_of_a_class_that_has_no_such_value(tmp_path: Path) -> None:
    class Later(enum.Enum):
        RED = 7

    saved({"color": Color.RED, "x": torch.ones(1)}, tmp_path / "a")
    live = {"color": Later.RED, "x": torch.zeros(1)}
    with pytest.raises(asyncsave.MismatchError, match=r"color: no Later can be made"):
        asyncsave.restore(tmp_path / "a", live)
    assert live["x"] == 0
    live = {"color": "red", "x": torch.zeros(1)}
    asyncsave.restore(tmp_path / "a", live)
    assert live["color"] == 1, "as it was saved"


def test_parts_of_other_values(tmp_path: Path) -> None:
    state = {"c": Config(1, ["a"], torch.ones(2)), "s": torch.eye(2).to_sparse(), "d": kinds.data()}
    saved(state, tmp_path / "a")
    assert_same(asyncsave.load(tmp_path / "a", keys="c.weight"), {"c": {"weight": torch.ones(2)}})
    part = asyncsave.load(tmp_path / "a", keys="s.values")["s"]
    assert_same(part, {"values": torch.ones(2)})
    assert asyncsave.load(tmp_path / "a", keys="s")["s"].layout is torch.sparse_coo
    only = asyncsave.load(tmp_path / "a", keys="d.deque.1")["d"]["deque"]
    assert only == [None, "x", None]
    live = {"c": Config(0, [], torch.zeros(2)), "other": 3}
    asyncsave.restore(tmp_path / "a", live, keys="c.weight")
    assert live["c"].size == 0
    assert live["c"].weight.sum() == 2
    body = {"body": Config(0, ["z"], torch.zeros(2))}
    asyncsave.restore(tmp_path / "a", body, rename={"c": "body"}, keys="c")
    assert body["body"].names == ["a"]


def test_without_torch_all_of_it_is_plain(tmp_path: Path) -> None:
    state = {"d": kinds.data(), "t": kinds.tensors(), "g": kinds.generators(), "c": kinds.classes()}
    arrays = asyncsave.numpy.load(saved(state, tmp_path / "a", 1))
    assert arrays["d"]["set"] == state["d"]["set"]
    assert arrays["d"]["layout"] == "torch.sparse_coo"
    assert arrays["d"]["records"].tobytes() == state["d"]["records"].tobytes()
    assert arrays["t"]["coo"]["size"] == (4, 4)
    assert arrays["t"]["csr"]["values"].dtype == np.float32
    assert arrays["t"]["per tensor"]["int_repr"].dtype == np.uint8
    assert [row.shape for row in arrays["t"]["nested"]] == [(2, 3), (4, 3)]
    assert arrays["g"]["torch"]["device"] == "cpu"
    assert arrays["g"]["PCG64"].normal() == asyncsave.load(tmp_path / "a")["g"]["PCG64"].normal()
    assert arrays["c"]["config"]["size"] == 1


# -- what cannot be saved -------------------------------------------------------------------------


class Chatty(list[int]):
    def __init__(self) -> None:
        super().__init__([1])
        self.best = 3.2


class Mirror(dict[str, Any]):
    """As some libraries have it: attributes are items."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__.update(items)


@dataclasses.dataclass
class Unset:
    x: int = dataclasses.field(init=False)


class Zone(datetime.tzinfo):
    def utcoffset(self, when: Any) -> Any:
        return None


REFUSED: dict[str, tuple[Any, str]] = {
    "function": (lambda: 0, "code is never saved"),
    "object": (object(), "asyncsave.register"),
    "meta": (torch.ones(2, device="meta"), "materialise"),
    "attributes": (Chatty(), "'best', which would be lost"),
    "unset": (Unset(), "field 'x' has no value"),
    "zone": (datetime.datetime(2024, 1, 1, tzinfo=Zone()), "astimezone"),
    "digits": (decimal.Decimal("1" * 5000), "digits"),
    "objects": (np.array([object()]), "Python objects"),
    "objects in records": (np.zeros(1, [("a", "O")]), "no plain memory"),
    "titles": (np.zeros(1, [(("title", "a"), "i4")]), "more than names"),
    "tensor in a set": ({torch.ones(1)}, "no plain value"),
    "tensor in a slice": (slice(torch.ones(1)), "no plain value"),
    "memoryview": (memoryview(b"x"), "bytes"),
    "bit generator": (np.random.PCG64(1), "numpy.random.Generator"),
    "one hash": ({i * (2**61 - 1) for i in range(200)}, "items have the same hash"),
    "enum of objects": (enum.Enum("E", {"A": object()})["A"], "register"),
    "equal keys": ({Color.RED: 1, enum.Enum("E", {"A": 1})["A"]: 2}, "same as plain data"),
}


def test_all_that_cannot_be_saved_is_said_at_once(tmp_path: Path) -> None:
    state = {"fine": torch.ones(3), "deep": [{name: each for name, (each, _) in REFUSED.items()}]}
    with pytest.raises(asyncsave.StateError) as caught:
        asyncsave.save(state, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    problems = caught.value.problems
    assert str(caught.value).startswith(f"{len(problems)} values of the state cannot be saved:\n")
    for name, (_, says) in REFUSED.items():
        (problem,) = [p for p in problems if p.fqn.startswith(f"deep.0.{name}") and says in p.hint]
        assert problem.type
        assert str(problem) in str(caught.value)
    with pytest.raises(asyncsave.StateError) as again:
        asyncsave.check(state)
    assert again.value.problems == problems


@pytest.mark.parametrize("name", REFUSED)
def test_each_of_them_alone(name: str) -> None:
    value, says = REFUSED[name]
    with pytest.raises(asyncsave.StateError, match=says) as caught:
        asyncsave.check({"x": value})
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].fqn.startswith("x")


def test_what_can_be_saved_is_checked_without_a_word() -> None:
    state = {**kinds.data(), **kinds.tensors(), **kinds.classes(), "m": Mirror(a=1)}
    assert asyncsave.check(state) is None


def test_many_problems_are_not_a_wall_of_text() -> None:
    with pytest.raises(asyncsave.StateError) as caught:
        asyncsave.check([object() for _ in range(300)])
    assert len(caught.value.problems) == 300
    assert str(caught.value).count("\n") == 51
    assert "250 more" in str(caught.value)


def test_the_first_step_checks_though_nothing_is_due(tmp_path: Path) -> None:
    with asyncsave.Checkpointer(tmp_path, every_steps=500) as ckpt:
        with pytest.raises(asyncsave.StateError, match="'x' is a object"):
            ckpt.step(1, {"x": object()})
        with pytest.raises(asyncsave.StateError):  # again: it was not mended
            ckpt.step(2, {"x": object()})
        assert ckpt.step(3, {"x": torch.ones(2)}) is None
        assert ckpt.step(4, {"x": object()}) is None, "only the first that is well"


def test_an_empty_namespace_takes_all_and_an_attribute_is_not_invented(tmp_path: Path) -> None:
    saved({"a": types.SimpleNamespace(x=1, y=torch.ones(1))}, tmp_path / "a")
    live = {"a": types.SimpleNamespace()}
    asyncsave.restore(tmp_path / "a", live)
    assert live["a"].x == 1
    assert live["a"].y == 1
    saved({"a": Config(1, [], None)}, tmp_path / "b")
    with pytest.raises(asyncsave.MismatchError, match=r"a.names: unexpected"):
        asyncsave.restore(tmp_path / "b", {"a": Frozen(1, None)})


def test_a_copy_is_of_its_own(tmp_path: Path) -> None:
    """What is restored into a state is not shared with what stands for it in the checkpoint."""
    state = {"a": {1}, "b": collections.deque([1]), "c": collections.Counter("a")}
    saved(state, tmp_path / "a")
    one, two = copy.deepcopy(state), copy.deepcopy(state)
    asyncsave.restore(tmp_path / "a", one)
    asyncsave.restore(tmp_path / "a", two)
    one["a"].add(5)
    assert two["a"] == {1}


def test_a_deque_that_has_no_room_for_what_was_saved(tmp_path: Path) -> None:
    saved({"d": collections.deque(range(5))}, tmp_path / "a")
    live = {"d": collections.deque([0], 3)}
    with pytest.raises(asyncsave.MismatchError, match="room for 3"):
        asyncsave.restore(tmp_path / "a", live)
    assert live["d"] == collections.deque([0])


def test_scaled_is_traceable() -> None:
    """The double is what torch takes for a traceable subclass."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    assert is_traceable_wrapper_subclass(scaled(1))
    assert isinstance(scaled(1), Scaled)


# -- what others found ----------------------------------------------------------------------------


class Other(enum.Enum):
    RED = 1
    NONE = None
    PAIR = (Color.RED, 2)
    NAN = float("nan")


@pytest.mark.parametrize(
    "value",
    [
        {Color.RED, Other.RED},
        frozenset({Color.RED, 1}),
        {(Color.RED, 0): 1, (Other.RED, 0): 2},
        {frozenset({Color.RED}): 1, frozenset({1}): 2},
    ],
)
def test_what_is_the_same_as_plain_data_is_refused(value: Any) -> None:
    with pytest.raises(asyncsave.StateError, match="the same as plain data"):
        asyncsave.check({"x": value})


def test_keys_and_enums_that_are_not_plain_themselves(tmp_path: Path) -> None:
    def state(n: int) -> dict[str, Any]:
        return {
            "d": {(Color.RED, 0): n, frozenset({Color.BLUE}): torch.full((2,), float(n))},
            "s": {(Color.RED, 1)} if n else {(Color.BLUE, 1)},
            "mixed": {Color.RED, Level.LOW},
            "none": Other.NONE if n else Other.RED,
            "pair": Other.PAIR if n else Other.RED,
            "nan": Other.NAN if n else Other.RED,
            "grown": [Level.LOW, Level.HIGH] if n else [Level.LOW],
            "decimals": {decimal.Decimal("NaN"), decimal.Decimal(1)} if n else {1},
            "deque": collections.deque([n], 2**63 - 1),
        }

    live = state(0)
    asyncsave.restore(saved(state(1), tmp_path / "a"), live)
    expected = state(1)
    assert list(live["d"]) == list(expected["d"])
    assert live["d"][Color.RED, 0] == 1
    for name in ("mixed", "none", "pair", "nan", "grown", "deque"):
        assert live[name] == expected[name], name
        assert type(live[name]) is type(expected[name]), name
    assert all(type(each) is Level for each in live["grown"])
    assert len(live["decimals"]) == 2


class Strict:
    """A descriptor that takes no negative number."""

    def __set_name__(self, owner: Any, name: str) -> None:
        self.name = "_" + name

    def __get__(self, one: Any, owner: Any = None) -> Any:
        return self if one is None else getattr(one, self.name)

    def __set__(self, one: Any, value: Any) -> None:
        if isinstance(value, int) and value < 0:
            raise ValueError("negative")
        setattr(one, self.name, value)


class Guarded(dict[Any, Any]):
    """A dict that takes no number."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if value == 5:
            raise TypeError("no fives")
        super().__setitem__(key, value)


@pytest.mark.parametrize(
    ("old", "live"),
    [
        (b"x" * 20, bytearray(b"123")),
        (torch.ones(3), bytearray(3)),
        (np.ones(3), bytearray(3)),
        (np.random.default_rng(1), collections.Counter("a")),
        (torch.eye(2).to_sparse(), collections.Counter("a")),
        ("nested", []),
        ({"a": 5}, Guarded(a=1)),
    ],
)
def test_what_a_container_does_not_take_changes_nothing(
    tmp_path: Path, old: Any, live: Any
) -> None:
    old = kinds.tensors()[old] if isinstance(old, str) else old  # not at import: it would stay
    saved({"first": 1, "w": torch.ones(3), "x": old}, tmp_path / "a")
    state = {"first": 0, "w": torch.zeros(3), "x": live}
    before = copy.copy(live)
    if isinstance(old, bytes):  # which is replaced, as another one may see into it
        asyncsave.restore(tmp_path / "a", state)
        assert state["x"] == old
        assert live == before
        return
    with pytest.raises(asyncsave.MismatchError):
        asyncsave.restore(tmp_path / "a", state)
    assert state["first"] == 0
    assert state["w"].sum() == 0
    assert state["x"] is live
    assert live == before


def test_a_part_leaves_the_rest_alone(tmp_path: Path) -> None:
    deque = collections.deque([torch.ones(1), torch.ones(1), torch.ones(1)])
    saved({"c": collections.Counter(a=2, b=3), "d": deque}, tmp_path / "a")
    live = {"c": collections.Counter(a=1, z=7), "d": collections.deque([torch.zeros(1)] * 2)}
    asyncsave.restore(tmp_path / "a", live, keys="c.a")
    assert live["c"] == {"a": 2, "z": 7}
    with pytest.raises(asyncsave.MismatchError, match="3 items"):
        asyncsave.restore(tmp_path / "a", live, keys="d.0")


def test_rows_that_differ_in_another_dimension(tmp_path: Path) -> None:
    saved({"x": _jagged(2, 1)}, tmp_path / "a")
    live = {
        "x": torch.nested.nested_tensor(
            [torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged
        ).transpose(1, 2)
    }
    with pytest.raises(asyncsave.MismatchError, match="dimension"):
        asyncsave.restore(tmp_path / "a", live)


def test_a_factory_that_is_code_stays(tmp_path: Path) -> None:
    live = {"h": [collections.defaultdict(lambda: 7, a=1)]}
    asyncsave.restore(saved(live, tmp_path / "a"), live)
    assert live["h"][0]["new"] == 7


class Tag(str):
    def __new__(cls, text: str) -> Tag:
        return super().__new__(cls, f"<{text}>")


class Upside(dict[Any, Any]):
    def __getitem__(self, key: Any) -> Any:
        return ("w", super().__getitem__(key))


class Attr(dict[Any, Any]):
    __getattr__ = dict.__getitem__


def test_classes_with_ways_of_their_own(tmp_path: Path) -> None:
    live = {"t": Tag("a"), "u": Upside(a=1), "attr": Attr(a=1)}
    loaded = asyncsave.load(saved(live, tmp_path / "a"))
    assert loaded == {"t": "<a>", "u": {"a": 1}, "attr": {"a": 1}}
    asyncsave.restore(tmp_path / "a", live)
    assert live["t"] == "<a>"
    assert type(live["t"]) is Tag
    assert dict.items(live["u"]) == {"a": 1}.items()


class Noted(list[Any]):
    __slots__ = ("note",)


@dataclasses.dataclass
class Partial:
    size: int


def test_attributes_that_would_be_lost_are_refused() -> None:
    slotted, ordered, partial = Noted([1]), collections.OrderedDict(a=1), Partial(1)
    slotted.note = 1
    ordered.note = 1  # type: ignore[attr-defined]
    partial.momentum = torch.ones(2)  # type: ignore[attr-defined]
    for value in (slotted, ordered, partial):
        with pytest.raises(asyncsave.StateError, match="would be lost"):
            asyncsave.check({"x": value})


def test_a_registered_class_that_loads_itself(tmp_path: Path, registered: None) -> None:
    asyncsave.register(Keeper, to_plain=lambda v: {"n": 1}, from_plain=lambda p: Keeper(2))
    live = {"k": Keeper(1)}
    asyncsave.restore(saved(live, tmp_path / "a"), live)
    assert live["k"].state["plain"] == 2
    with pytest.raises(asyncsave.ConfigError, match="is a module"):
        asyncsave.register(Net, to_plain=str, from_plain=str)


class Net(torch.nn.Module):
    pass
