"""Whatever can be saved comes back to the bit, ties included."""

from __future__ import annotations

import collections
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import asyncsave
from asyncsave.format.dtypes import DTYPES as DTYPES_KNOWN
from asyncsave.state import flatten as tree
from asyncsave.state import values
from asyncsave.state.flatten import flatten
from tests.strategies import DTYPES, from_bits, states
from tests.support import assert_same


@pytest.fixture(scope="module", params=["off", 1, 6], ids=lambda level: f"level {level}")
def saver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that saves and loads, with one Checkpointer, whose memory is reused."""
    directory = tmp_path_factory.mktemp("run")
    steps = itertools.count()

    def roundtrip(state: Any) -> Any:
        # one Checkpointer for a few saves: reuse matters, but so does that none outlives its test
        with asyncsave.Checkpointer(
            directory, compression=request.param, durable=False, keep_last=1
        ) as ckpt:
            for _ in range(2):
                ckpt.save(next(steps), state, block=True)
            return ckpt.load()

    return roundtrip


def overlaps(state: Any) -> list[tuple[int, int, int]]:
    """Return the distance in bytes between all pairs of leaves that share memory."""
    spans = []
    for value in flatten(state).values:
        if isinstance(value, torch.Tensor) and value.numel() and not value.is_conj():
            extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
            spans.append((value.data_ptr(), value.data_ptr() + extent * value.element_size()))
        else:
            spans.append((0, 0))
    return [
        (i, j, b[0] - a[0])
        for (i, a), (j, b) in itertools.combinations(enumerate(spans), 2)
        if max(a[0], b[0]) < min(a[1], b[1])
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(state=states())
def test_any_state(saver: Any, state: Any) -> None:
    loaded = saver(state)
    assert_same(state, loaded)
    assert overlaps(loaded) == overlaps(state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_with_every_bit_pattern(saver: Any, dtype: torch.dtype) -> None:
    raw = np.random.default_rng(1).bytes(4096 * dtype.itemsize)
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    tensor = from_bits(raw, dtype, (64, 64))
    state = {"flat": tensor, "scalar": tensor[0, 0], "t": tensor.t(), "cut": tensor[:, 1:9:3]}
    assert_same(state, saver(state))
    lone = {"cut": tensor[:, 1:9:3]}
    assert_same(lone, saver(lone))


@pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support")
@pytest.mark.parametrize("name", ["complex32", "bcomplex32"])
def test_complex_numbers_of_two_halves(saver: Any, name: str) -> None:
    if name not in values.TORCH_DTYPES:
        pytest.skip(f"this torch has no {name}")
    dtype = values.TORCH_DTYPES[name]
    tensor = from_bits(bytes(range(64)), dtype, (4, 4))
    assert_same({"x": tensor}, saver({"x": tensor}))
    state = {"t": tensor.t(), "column": tensor[:, 1], "z": tensor}
    assert_same(state, saver(state))


def test_sub_byte_dtypes(saver: Any) -> None:
    names = ["bits1x8", "bits2x4", "bits4x2", "bits8", "bits16"]
    state = {n: from_bits(bytes(range(32)), getattr(torch, n), (4,)) for n in names}
    assert state
    assert_same(state, saver(state))


def test_conjugate_and_negative_views(saver: Any) -> None:
    z = torch.randn(5, 3, dtype=torch.complex64)
    state = {"z": z, "conj": z.conj(), "imag": z.conj().imag, "t": z.conj().t()}
    loaded = saver(state)
    for name, value in state.items():
        assert torch.equal(loaded[name], value), name


def test_views_of_different_dtypes_stay_tied(saver: Any) -> None:
    base = torch.arange(16, dtype=torch.int32)
    state = {"ints": base, "bytes": base.view(torch.uint8)[5:17], "shorts": base.view(torch.int16)}
    loaded = saver(state)
    assert_same(state, loaded)
    loaded["ints"][2] = -1
    assert loaded["bytes"][3] == 255
    assert loaded["shorts"][4] == -1


def test_strides_are_kept_where_they_cost_nothing(saver: Any) -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    loaded = saver({"image": image})["image"]
    assert loaded.stride() == image.stride()
    assert torch.equal(loaded, image)


def test_a_small_view_of_a_large_tensor_is_saved_alone(tmp_path: Path) -> None:
    large = torch.randn(1000, 1000)
    report = asyncsave.save({"column": large[:, 3]}, tmp_path / "a", compression="off").result()
    assert report.raw_bytes == 4000


def test_twenty_thousand_tensors_are_few_of_anything(tmp_path: Path) -> None:
    state = {f"layer.{i}": torch.full((256,), float(i)) for i in range(20_000)}
    report = asyncsave.save(state, tmp_path / "a", compression="off").result()
    assert report.chunks == 2
    assert report.tensors == 20_000
    assert len(list((tmp_path / "a").iterdir())) == 3
    loaded = asyncsave.load(tmp_path / "a")
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_state_larger_than_a_chunk(saver: Any) -> None:
    state = {
        "large": torch.randn(3 * 2**20 + 17, dtype=torch.float64),
        "small": torch.randn(3),
        "bf16": torch.randn(2**20 + 1).bfloat16(),
        "strided": torch.randn(1500, 3001)[:, ::3],
    }
    assert_same(state, saver(state))


def test_tensors_of_one_state_that_move_keep_the_plan_right(tmp_path: Path) -> None:
    with asyncsave.Checkpointer(tmp_path, compression="off", durable=False) as ckpt:
        a, b = torch.randn(100), torch.randn(100)
        ckpt.save(1, {"a": a, "b": b})
        ckpt.save(2, {"a": a.clone(), "b": b})  # moved
        ckpt.save(3, {"a": b, "b": b})  # tied now
        ckpt.save(4, {"a": b.clone(), "b": b})  # and not any more
        for step in (1, 2, 4):
            loaded = ckpt.load(step=step)
            assert loaded["a"].data_ptr() != loaded["b"].data_ptr()
            assert torch.equal(loaded["b"], b)
        assert torch.equal(ckpt.load(step=2)["a"], a)
        loaded = ckpt.load(step=3)
        assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.empty(3, device="meta"), "meta"),
        (torch.nn.UninitializedParameter(), "run the module once"),
        (memoryview(b"abc"), "bytes"),
        (lambda: 0, "code is never saved"),
        (object(), "state_dict"),
        (torch.nn.Linear, "code is never saved"),
        (np.array([object()]), "Python objects"),
        (np.array([(1, None)], dtype="i4,O"), "no plain memory"),
        ({(torch.zeros(1),): 1}, "key"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_saved_is_named(tmp_path: Path, value: Any, says: str) -> None:
    with pytest.raises(asyncsave.StateError, match=says) as caught:
        asyncsave.save({"outer": [0, {"inner": value}]}, tmp_path / "a")
    assert "outer.1.inner" in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_a_dtype_that_the_table_lacks_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No door: the table has all that any torch has so far. What is taken out stands for the next.
    known = tree._KNOWN
    with monkeypatch.context() as older:
        older.setattr(tree, "_KNOWN", known - {torch.bfloat16})
        with pytest.raises(asyncsave.StateError, match=r"'a.x' is a .* of torch.bfloat16.*view"):
            asyncsave.save({"a": {"x": torch.ones(2).bfloat16()}}, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    asyncsave.save({"x": torch.ones(2).bfloat16()}, tmp_path / "a").result()
    monkeypatch.delitem(DTYPES_KNOWN, "bfloat16")
    with pytest.raises(asyncsave.UnsupportedVersionError, match="bfloat16, which this asyncsave"):
        asyncsave.load(tmp_path / "a")


@pytest.mark.filterwarnings("ignore")
def test_every_dtype_of_this_torch_is_saved_or_refused_by_name(tmp_path: Path) -> None:
    for name, dtype in values.TORCH_DTYPES.items():
        if name.startswith("q"):
            continue  # quantized: see below
        state = {"x": from_bits(bytes(range(16)), dtype, (1,))}
        if name in DTYPES_KNOWN:
            asyncsave.save(state, tmp_path / name).result()
            assert asyncsave.load(tmp_path / name)["x"].dtype is dtype
        else:
            with pytest.raises(asyncsave.StateError, match=f"'x' is a torch.Tensor of {dtype}"):
                asyncsave.save(state, tmp_path / name)


def test_more_dimensions_than_a_checkpoint_has(tmp_path: Path) -> None:
    asyncsave.save({"a": torch.ones((1,) * 64)}, tmp_path / "a").result()
    assert asyncsave.load(tmp_path / "a")["a"].dim() == 64
    with pytest.raises(asyncsave.StateError, match=r"'b' is a .* of 65 dimensions.*flatten"):
        asyncsave.save({"b": torch.ones((1,) * 65)}, tmp_path / "b")


def test_an_empty_tensor_that_torch_has_by_expand_alone(tmp_path: Path) -> None:
    shape = (0, 2**61, 2**61)
    asyncsave.save({"a": torch.empty(0, 1, 1).expand(shape)}, tmp_path / "a").result()
    assert asyncsave.load(tmp_path / "a")["a"].shape == shape


@pytest.mark.parametrize("early", [True, False])
def test_tensors_whose_memory_was_taken_away(tmp_path: Path, early: bool) -> None:
    x = torch.randn(100)
    state = {"y": torch.ones(5), "part": x[30:40], "x": x, "none": torch.empty(0)}
    for name in ("x", "part"):
        with asyncsave.Checkpointer(tmp_path / name) as ckpt:
            if not early:
                ckpt.save(1, state, block=True)
            x.untyped_storage().resize_(0)
            lone = {"y": state["y"], name: state[name], "none": state["none"]}
            for each in (lone, state):
                with pytest.raises(asyncsave.StateError, match=r"'(x|part)' .* has no memory"):
                    ckpt.save(2, each)
            x.untyped_storage().resize_(400)
            x.fill_(3)
            ckpt.save(2, state, block=True)
            loaded = ckpt.load()  # assert_same() would make a storage that cannot be resized
            assert all(torch.equal(loaded[name], value) for name, value in state.items())


class Broken:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def state_dict(self) -> Any:
        raise self.error


@pytest.mark.parametrize(
    "error", [AttributeError("no _x"), RuntimeError("half built"), MemoryError(), RecursionError()]
)
def test_an_error_in_a_foreign_state_dict_says_whose(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(asyncsave.StateError) as caught:
        asyncsave.save({"parts": [0, {"b": Broken(error)}]}, tmp_path / "a")
    assert caught.value.__cause__ is error
    for word in ("'parts.1.b'", "Broken", type(error).__name__, str(error)):
        assert word in str(caught.value)
    with pytest.raises(asyncsave.StateError, match=r"the state itself is a .*Broken"):
        asyncsave.save(Broken(error), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_foreign_state_dict_may_be_interrupted(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        asyncsave.save({"x": Broken(error())}, tmp_path / "a")


@pytest.mark.parametrize("as_key", [lambda i: i, lambda i: ("x", i)])
def test_keys_with_one_hash(tmp_path: Path, as_key: Any) -> None:
    step = 2**61 - 1  # what Python counts hashes of numbers by
    few = {as_key(i * step): i for i in range(64)}
    asyncsave.save({"few": few}, tmp_path / "few").result()
    assert asyncsave.load(tmp_path / "few")["few"] == few
    many = {as_key(i * step): i for i in range(65)} | {str(i): i for i in range(100)}
    with pytest.raises(asyncsave.StateError, match=r"'many'.*65 of its keys.*list\(value.items"):
        asyncsave.save({"many": many}, tmp_path / "many")
    pairs = {"many": list(many.items())}
    asyncsave.save(pairs, tmp_path / "many").result()
    assert asyncsave.load(tmp_path / "many") == pairs


def test_a_container_that_holds_itself(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(asyncsave.StateError, match="itself"):
        asyncsave.save({"loop": loop}, tmp_path / "a")


class Odd(NamedTuple):
    a: Any


def test_keys_of_all_kinds(saver: Any) -> None:
    keys = [0, -1, 2.5, None, True, b"b", "s", "\ud800", (1, ("x", None)), Odd(1), 10**5000]
    state = {"d": {key: torch.ones(i + 1) for i, key in enumerate(keys)}}
    loaded = saver(state)
    assert [torch.numel(value) for value in loaded["d"].values()] == list(range(1, len(keys) + 1))
    assert list(loaded["d"])[:-2] == [key for key in keys if not isinstance(key, Odd)][:-1]
    assert list(loaded["d"])[-1] == 10**5000


def test_tensors_in_a_state_dicts_metadata(saver: Any) -> None:
    state = torch.nn.Linear(2, 2).state_dict()
    state._metadata = {"": {"version": 1}, "more": torch.ones(3)}  # type: ignore[attr-defined]
    loaded = saver(state)
    assert torch.equal(loaded._metadata["more"], torch.ones(3))
    assert loaded._metadata[""] == {"version": 1}


class Nest:
    def __init__(self, depth: int) -> None:
        self.depth = depth

    def state_dict(self) -> Any:
        return Nest(self.depth - 1) if self.depth else {"x": 1}


@pytest.mark.parametrize(
    "value",
    [
        np.str_(""),
        np.bytes_(b"ab\0"),
        collections.namedtuple("Renamed", ["class", "x"], rename=True)(1, 2),
        collections.namedtuple("Wide", [f"f{i}" for i in range(300)])(*range(300)),
        {(torch.nn.Linear(1, 1),): 1},
        Nest(200),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, value: Any) -> None:
    with pytest.raises(asyncsave.StateError):
        asyncsave.save({"outer": value}, tmp_path / "a")
