"""Restore into every kind of live memory: what was asked for is there, and nothing else changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import asyncsave
from tests.support import assert_same, bits

CANARY = 0x5A
SETTINGS = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Memory:
    """A piece of memory full of canaries, and the views that are taken of it."""

    def __init__(self, nbytes: int = 16384) -> None:
        self.raw = np.full(nbytes, CANARY, np.uint8)
        self.base = torch.from_numpy(self.raw)
        self.owned = np.zeros(nbytes, bool)

    def tensor(
        self, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
    ) -> torch.Tensor:
        """A view, in elements; what it reaches is no canary any more."""
        width = dtype.itemsize
        view = torch.empty(0, dtype=dtype)
        view.set_(self.base.untyped_storage(), offset, shape, strides)
        places = np.lib.stride_tricks.as_strided(
            self.owned[offset * width :], (*shape, width), (*(s * width for s in strides), 1)
        )
        places[...] = True
        return view

    def check(self) -> None:
        assert (self.raw[~self.owned] == CANARY).all(), "something beside the views was changed"


def random_like(view: torch.Tensor, seed: int) -> torch.Tensor:
    """New values of the same dtype and shape, contiguous and alone, with any bits."""
    raw = np.random.default_rng(seed).bytes(max(1, view.numel() * view.element_size()))
    if view.dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    new = torch.empty(0, dtype=view.dtype)
    strides = torch.empty(view.shape, device="meta").stride()
    return new.set_(flat.untyped_storage(), 0, view.shape, strides)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """A shape, its strides in elements and an offset; elements may share memory."""
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    if draw(st.booleans()):  # a slice of something, permuted
        order = draw(st.permutations(range(len(shape))))
        strides, step = [0] * len(shape), 1
        for i in order:
            gap = draw(st.integers(1, 3))
            strides[i] = step * gap
            step *= gap * shape[i]
    else:
        strides = [draw(st.integers(0, 7)) for _ in shape]
    return shape, tuple(strides), draw(st.integers(0, 16))


def places_of(shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> list[int]:
    return [
        offset + sum(i * step for i, step in zip(index, strides, strict=True))
        for index in np.ndindex(*shape)
    ]


DTYPES = [torch.float32, torch.uint8, torch.bfloat16, torch.complex64, torch.float64, torch.bool]


@SETTINGS
@given(
    layout=layouts(),
    dtype=st.sampled_from(DTYPES),
    saved_as=st.sampled_from(["alone", "same view", "in a tie"]),
    seed=st.integers(0, 999),
)
def test_one_view(
    tmp_path: Path,
    layout: tuple[tuple[int, ...], tuple[int, ...], int],
    dtype: torch.dtype,
    saved_as: str,
    seed: int,
) -> None:
    shape, strides, offset = layout
    memory, there = Memory(), Memory()
    view = memory.tensor(dtype, shape, strides, offset)
    places = places_of(*layout)
    overlaps = len(set(places)) < len(places)
    value = random_like(view, seed)
    state = {"x": value}
    if saved_as != "alone" and not overlaps:
        other = there.tensor(dtype, shape, strides, offset)
        _move(other, value)
        state = {"x": other}
        if saved_as == "in a tie":
            state["all"] = there.base
    asyncsave.save(state, tmp_path / "a", overwrite=True).result()
    before = memory.raw.copy()
    if overlaps:
        with pytest.raises(asyncsave.MismatchError, match=r"x: .* elements that share memory"):
            asyncsave.restore(tmp_path / "a", {"x": view}, keys="x")
        assert np.array_equal(memory.raw, before)
        return
    asyncsave.restore(tmp_path / "a", {"x": view}, keys="x")
    assert bits(view) == bits(value)
    memory.check()


def _move(into: torch.Tensor, value: torch.Tensor) -> None:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.itemsize]
    into.view(integers).copy_(value.view(integers))


@SETTINGS
@given(
    items=st.lists(layouts(), min_size=2, max_size=4),
    tied=st.booleans(),
    equal=st.booleans(),
    seed=st.integers(0, 999),
)
def test_several_views_of_one_memory(
    tmp_path: Path, items: list[Any], tied: bool, equal: bool, seed: int
) -> None:
    """All have what was saved, or the error names two, and nothing has changed."""
    items = [item for item in items if len(set(places_of(*item))) == len(places_of(*item))]
    memory, there = Memory(), Memory()
    names = [f"k{i}" for i in range(len(items))]
    views = [memory.tensor(torch.float32, *item) for item in items]
    if tied:  # the checkpoint has the very ties of the state
        _move(there.base, random_like(there.base, seed))
        saved = [there.tensor(torch.float32, *item) for item in items]
    elif equal:  # it has none, but might have had them
        ground = random_like(there.base.view(torch.float32), seed)
        saved = [ground.as_strided(shape, strides, at).clone() for shape, strides, at in items]
    else:
        saved = [random_like(view, seed + i) for i, view in enumerate(views)]
    values = [bits(value) for value in saved]
    asyncsave.save(dict(zip(names, saved, strict=True)), tmp_path / "a", overwrite=True).result()
    before = memory.raw.copy()
    shared = [set(places_of(*one)) & set(places_of(*other)) for one, other in _pairs(items)]
    try:
        asyncsave.restore(tmp_path / "a", dict(zip(names, views, strict=True)))
        refused = ""
    except asyncsave.MismatchError as error:
        refused = str(error)
    if refused:
        assert not tied
        assert not equal
        assert any(shared)
        assert "shares memory in the state with k" in refused
        assert np.array_equal(memory.raw, before)
        return
    assert [bits(view) for view in views] == values
    memory.check()


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return ((one, other) for i, one in enumerate(items) for other in items[:i])


@SETTINGS
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    how=st.lists(st.sampled_from(["T", "flip", "step", "F", "swap"]), max_size=3),
    dtype=st.sampled_from(["<f4", ">i2", "u1", "<c16", "<M8[s]", "<U2"]),
    seed=st.integers(0, 99),
)
def test_numpy_views(
    tmp_path: Path, shape: tuple[int, ...], how: list[str], dtype: str, seed: int
) -> None:
    memory = np.full(1 << 15, CANARY, np.uint8)
    owned = np.zeros(1 << 15, bool)
    size = int(np.prod([3 * n for n in shape])) * np.dtype(dtype).itemsize
    array = memory[64 : 64 + size].view(dtype).reshape([3 * n for n in shape])
    array = array[tuple(slice(0, n) for n in shape)]
    for each in how:
        match each:
            case "T":
                array = array.T
            case "flip":
                array = array[::-1]
            case "step":
                array = array[..., ::2]
            case "swap":
                array = array.swapaxes(0, -1)
            case "F":
                array = array[..., :1]
    first = array.ctypes.data - memory.ctypes.data
    np.ndarray((*array.shape, array.itemsize), bool, owned.data, first, (*array.strides, 1))[
        ...
    ] = True
    raw = np.random.default_rng(seed).bytes(array.size * array.itemsize)
    raw = bytes(len(raw)) if dtype == "<U2" else raw
    value = np.frombuffer(raw, dtype).reshape(array.shape)
    asyncsave.save({"x": value}, tmp_path / "a", overwrite=True).result()
    asyncsave.restore(tmp_path / "a", {"x": array})
    assert array.tobytes() == value.tobytes()
    assert (memory[~owned] == CANARY).all()


def test_numpy_arrays_that_cannot_be_filled(tmp_path: Path) -> None:
    asyncsave.save(
        {"x": np.arange(6.0).reshape(2, 3), "ok": torch.ones(2)}, tmp_path / "a"
    ).result()
    frozen = np.zeros((2, 3))
    frozen.flags.writeable = False
    windows = np.lib.stride_tricks.as_strided(np.zeros(4), (2, 3), (8, 8))
    for array, says in ((frozen, "read-only"), (windows, "elements that share memory")):
        ok = torch.zeros(2)
        with pytest.raises(asyncsave.MismatchError, match=f"x: the array .*{says}"):
            asyncsave.restore(tmp_path / "a", {"x": array, "ok": ok})
        assert not array.any()
        assert not ok.any()
    apart = np.lib.stride_tricks.as_strided(np.zeros(12), (2, 3), (24, 16))  # 0 2 4 and 3 5 7
    asyncsave.restore(tmp_path / "a", {"x": apart, "ok": torch.zeros(2)})
    assert np.array_equal(apart, np.arange(6.0).reshape(2, 3))


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_arrays_of_other_classes(tmp_path: Path) -> None:
    values = np.arange(3.0 * (1 << 19)).reshape(3, -1)  # several chunks
    asyncsave.save({"x": values, "ok": torch.ones(2)}, tmp_path / "a", compression="off").result()

    class Own(np.ndarray[Any, Any]):
        def __setitem__(self, *_: Any) -> None:
            raise AssertionError

    across = np.zeros(values.T.shape).T
    for array in (
        np.zeros(values.shape).view(Own),
        (values * 0).view(np.matrix),
        across.view(np.matrix),
    ):
        asyncsave.restore(tmp_path / "a", {"x": array, "ok": torch.zeros(2)})
        assert array.tobytes() == values.tobytes()
    file = np.memmap(tmp_path / "mapped", np.float64, "w+", shape=values.shape)
    asyncsave.restore(tmp_path / "a", {"x": file, "ok": torch.zeros(2)})
    assert np.array_equal(file, values)
    ok = torch.zeros(2)
    for hard in (False, True):
        masked = np.ma.masked_array(np.zeros(values.shape), mask=True, hard_mask=hard)
        with pytest.raises(asyncsave.MismatchError, match=r"x: the array .* has a mask"):
            asyncsave.restore(tmp_path / "a", {"x": masked, "ok": ok})
        assert not masked.data.any()
        assert not ok.any()


def test_many_small_tensors_have_memory_of_their_own(tmp_path: Path) -> None:
    """They are read together: what is between them, and in other dtypes, is not lost or mixed."""
    memory, state, into = Memory(1 << 16), {}, {}
    for i in range(300):
        dtype = [torch.float32, torch.int64, torch.bfloat16, torch.bool][i // 20 % 4]
        shape = [(), (1,), (2, 2), (3,)][i % 4]
        view = memory.tensor(dtype, shape, torch.empty(shape).stride(), i * 128 // dtype.itemsize)
        state[str(i)], into[str(i)] = random_like(view, i), view
    state["7"] = nn.Parameter(state["7"])
    asyncsave.save(state, tmp_path / "a").result()
    asyncsave.restore(tmp_path / "a", into)
    assert {name: bits(value) for name, value in into.items()} == {
        name: bits(value) for name, value in state.items()
    }
    memory.check()
    loaded = asyncsave.load(tmp_path / "a")
    assert_same(loaded, state)
    assert len({value.untyped_storage().data_ptr() for value in loaded.values()}) == 300
    part = asyncsave.load(tmp_path / "a", keys=["3", "4", "9"])
    assert_same(part, {name: state[name] for name in ("3", "4", "9")})


# -- the cases that were found ----------------------------------------------------------------


def test_a_column_does_not_bring_the_others(tmp_path: Path) -> None:
    theirs = torch.randn(4, 3)
    asyncsave.save({"a": theirs[:, 0], "b": theirs[:, 1]}, tmp_path / "a").result()
    mine = torch.zeros(4, 3)
    asyncsave.restore(tmp_path / "a", {"b": mine[:, 1]}, keys="b")
    assert torch.equal(mine[:, 1], theirs[:, 1])
    assert not mine[:, [0, 2]].any()


def test_a_tensor_its_half_and_the_half_of_another(tmp_path: Path) -> None:
    x, z = torch.randn(10), torch.randn(10)
    asyncsave.save({"x": x, "even": x[::2], "odd": z[1::2]}, tmp_path / "a").result()
    x2, z2 = torch.zeros(10), torch.zeros(10)
    asyncsave.restore(tmp_path / "a", {"x": x2, "even": x2[::2], "odd": z2[1::2]})
    assert torch.equal(x2, x)
    assert torch.equal(z2[1::2], z[1::2])
    assert not z2[::2].any()
    y2 = torch.zeros(10)
    with pytest.raises(asyncsave.MismatchError, match=r"odd: shares memory.*with x|x: shares"):
        asyncsave.restore(tmp_path / "a", {"x": y2, "even": y2[::2], "odd": y2[1::2]})
    assert not y2.any()


@pytest.mark.parametrize("compression", ["off", 1])
def test_two_values_into_one_tensor(tmp_path: Path, compression: Any) -> None:
    n = 3 << 20
    state = {"a": torch.full((n,), 1.0), "b": torch.full((n,), 2.0), "c": torch.ones(1)}
    asyncsave.save(state, tmp_path / "a", compression=compression).result()
    one, c = torch.zeros(n), torch.zeros(1)
    with pytest.raises(asyncsave.MismatchError, match="a: shares memory in the state with b"):
        asyncsave.restore(tmp_path / "a", {"a": one, "b": one, "c": c})
    assert not one.any()
    assert not c.any()
    state["b"] = state["a"].clone()  # not tied, but equal: nothing is lost
    asyncsave.save(state, tmp_path / "a", compression=compression, overwrite=True).result()
    asyncsave.restore(tmp_path / "a", {"a": one, "b": one, "c": c})
    assert (one == 1).all()


def test_two_numbers_into_one_tensor(tmp_path: Path) -> None:
    asyncsave.save({"a": 1.0, "b": 2.0}, tmp_path / "a").result()
    one = torch.tensor(0.0)
    with pytest.raises(asyncsave.MismatchError, match="a: shares memory in the state with b"):
        asyncsave.restore(tmp_path / "a", {"a": one, "b": one})
    assert one == 0


def test_weights_that_were_tied_after_saving(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            if tied:
                self.head.weight = self.embed.weight

    asyncsave.save({"m": Net(tied=False)}, tmp_path / "a").result()
    mine = Net(tied=True)
    before = mine.embed.weight.detach().clone()
    with pytest.raises(
        asyncsave.MismatchError, match=r"m.embed.weight: shares memory .* with m.head.weight"
    ):
        asyncsave.restore(tmp_path / "a", {"m": mine})
    assert torch.equal(mine.embed.weight, before)
    asyncsave.save({"m": mine}, tmp_path / "b").result()  # the other way round, each has its own
    apart = Net(tied=False)
    asyncsave.restore(tmp_path / "b", {"m": apart})
    assert torch.equal(apart.embed.weight, before)
    assert torch.equal(apart.head.weight, before)
    again = Net(tied=True)
    asyncsave.restore(tmp_path / "b", {"m": again})
    assert torch.equal(again.head.weight, before)


def test_many_columns_take_no_more_memory_than_their_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(200, 300)
    state = {str(i): x[:, i] for i in range(300)}
    asyncsave.save(state, tmp_path / "a").result()
    taken: list[int] = []
    empty = torch.empty

    def counting(*shape: Any, **options: Any) -> torch.Tensor:
        made = empty(*shape, **options)
        taken.append(made.nbytes)
        return made

    mine = torch.zeros(200, 300)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", counting)
        asyncsave.restore(tmp_path / "a", {str(i): mine[:, i] for i in range(300)})
    assert torch.equal(mine, x)
    assert 0 < sum(taken) <= x.nbytes, "a column's own would be nearly as much"


@pytest.mark.parametrize("what", ["conj", "neg", "both", "imag"])
def test_lazy_views(tmp_path: Path, what: str) -> None:
    base = torch.zeros(6, dtype=torch.complex64)
    view = {
        "conj": lambda: base[::2].conj(),
        "neg": lambda: torch._neg_view(base[::2]),
        "both": lambda: torch._neg_view(base[::2].conj()),
        "imag": lambda: base[::2].conj().imag,
    }[what]()
    value = torch.randn(3, dtype=view.dtype)
    asyncsave.save({"x": value}, tmp_path / "a").result()
    asyncsave.restore(tmp_path / "a", {"x": view})
    assert torch.equal(view.resolve_conj().resolve_neg(), value)
    assert not base[1::2].any()
    # a view beside its base, as it is saved
    x = torch.randn(4, dtype=torch.complex64)
    asyncsave.save({"x": x, "y": x.conj()}, tmp_path / "b").result()
    mine = torch.zeros(4, dtype=torch.complex64)
    asyncsave.restore(tmp_path / "b", {"x": mine, "y": mine.conj()})
    assert torch.equal(mine, x)


def test_a_tensor_and_its_array(tmp_path: Path) -> None:
    t = torch.randn(4)
    asyncsave.save({"t": t, "n": t.numpy(), "half": t.numpy()[::2]}, tmp_path / "a").result()
    mine = torch.zeros(4)
    state = {"t": mine, "n": mine.numpy(), "half": mine.numpy()[::2]}
    asyncsave.restore(tmp_path / "a", state)
    assert torch.equal(mine, t)


def test_inference_tensors(tmp_path: Path) -> None:
    with torch.inference_mode():
        theirs = {"a": torch.randn(4), "b": torch.randn(4, 4).t(), "n": torch.tensor(2.0)}
        mine = {"a": torch.zeros(4), "b": torch.zeros(4, 4), "n": torch.tensor(0.0)}
        also = {name: torch.zeros_like(value) for name, value in mine.items()}
    asyncsave.save({**theirs, "n": 2.0}, tmp_path / "a").result()
    asyncsave.restore(tmp_path / "a", mine)
    with torch.inference_mode():
        asyncsave.restore(tmp_path / "a", also)
        loaded = asyncsave.load(tmp_path / "a")
        normal = nn.Linear(4, 4)
        asyncsave.save({"m": normal}, tmp_path / "b").result()
    for state in (mine, also):
        assert all(torch.equal(state[name], value) for name, value in theirs.items())
    loaded["a"].requires_grad_().sum().backward()  # what was loaded can be trained
    linear = nn.Linear(4, 4)
    with torch.inference_mode():
        asyncsave.restore(tmp_path / "b", {"m": linear})
    assert torch.equal(linear.weight, normal.weight)


def test_meta_tensors_are_refused_by_name(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(net.parameters())
    asyncsave.save({"m": net, "o": optimizer, "ok": torch.ones(2)}, tmp_path / "a").result()
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ok = torch.zeros(2)
    with pytest.raises(
        asyncsave.MismatchError, match=r"m\.0\.weight: .* meta device .* to_empty\(device=…\)"
    ) as caught:
        asyncsave.restore(
            tmp_path / "a", {"m": bare, "o": torch.optim.AdamW(bare.parameters()), "ok": ok}
        )
    assert "o: the optimizer's parameters are on the meta device" in str(caught.value)
    assert not ok.any()

    class Own(nn.Linear):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(*args, **kwargs)

    asyncsave.save({"m": Own(2, 2)}, tmp_path / "b").result()
    with pytest.raises(asyncsave.MismatchError, match=r"m\.weight: .* meta device"):
        asyncsave.restore(tmp_path / "b", {"m": Own(2, 2, device="meta")})


def test_tensors_without_memory_of_their_own(tmp_path: Path) -> None:
    asyncsave.save({"x": torch.ones(2, 2), "ok": torch.ones(2)}, tmp_path / "a").result()
    freed = torch.zeros(2, 2)
    freed.untyped_storage().resize_(0)
    for into, says in (
        (torch.zeros(2, 2).to_sparse(), "with layout torch.sparse_coo"),
        (freed, "has been given back"),
    ):
        ok = torch.zeros(2)
        with pytest.raises(asyncsave.MismatchError, match=f"x: .*{says}"):
            asyncsave.restore(tmp_path / "a", {"x": into, "ok": ok})
        assert not ok.any()


# -- modules that are not what their state dict is ------------------------------------------------


class Copies(nn.Linear):
    def _save_to_state_dict(self, into: Any, prefix: str, keep: bool) -> None:
        super()._save_to_state_dict(into, prefix, keep)
        for key in list(into):
            if key.startswith(prefix):
                into[key] = into[key].clone()


class Scales(nn.Linear):
    """Keeps its weight in another form than it shows."""

    def _save_to_state_dict(self, into: Any, prefix: str, keep: bool) -> None:
        super()._save_to_state_dict(into, prefix, keep)
        into[prefix + "weight"] = into[prefix + "weight"].t()


def replaced(net: nn.Module) -> nn.Module:
    original = net.state_dict
    net.state_dict = lambda *a, **k: {  # type: ignore[method-assign]
        key: value.clone() for key, value in original(*a, **k).items()
    }
    return net


@pytest.mark.parametrize(
    "make",
    [
        lambda: Copies(3, 3),
        lambda: Scales(3, 3),
        lambda: nn.Sequential(Copies(3, 3), nn.BatchNorm1d(3)),
        lambda: replaced(nn.Linear(3, 3)),
        lambda: nn.Sequential(replaced(nn.Linear(3, 3))),
    ],
)
def test_modules_that_show_copies(tmp_path: Path, make: Any) -> None:
    net, mine = make(), make()
    asyncsave.save({"m": net}, tmp_path / "a").result()
    other = make()
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    asyncsave.restore(tmp_path / "a", {"m": mine})
    assert_same(dict(mine.named_parameters()), dict(other.named_parameters()))
    assert_same(dict(mine.named_buffers()), dict(other.named_buffers()))


def test_a_state_dict_of_adapters_alone(tmp_path: Path) -> None:
    """As PEFT does: the model's state_dict is replaced by one that has other, and fewer, names."""

    def adapted() -> nn.Module:
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        original = net.state_dict
        net.state_dict = lambda *a, **k: {  # type: ignore[method-assign]
            f"base_model.{key}": value
            for key, value in original(*a, **k).items()
            if key.startswith("1.")
        }
        return net

    net, mine = adapted(), adapted()
    before = mine[0].weight.detach().clone()  # type: ignore[index,operator]
    asyncsave.save({"m": net}, tmp_path / "a").result()
    asyncsave.restore(tmp_path / "a", {"m": mine})
    assert torch.equal(mine[1].weight, net[1].weight)  # type: ignore[index,operator,arg-type]
    assert torch.equal(mine[0].weight, before)  # type: ignore[index,operator,arg-type]


def test_a_module_that_drops_values_is_refused(tmp_path: Path) -> None:
    class Lenient(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.zeros(2)))

        def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict(state, strict=False)

    theirs = Lenient("a", "b")
    with torch.no_grad():
        theirs.a.fill_(1)
    asyncsave.save({"m": theirs}, tmp_path / "a").result()
    for names, lost in ((("a",), "'b'"), (("a", "b", "c"), "'c'")):
        mine = Lenient(*names)
        with pytest.raises(asyncsave.MismatchError, match=f"it would go without {lost}"):
            asyncsave.restore(tmp_path / "a", {"m": mine})
        assert not mine.a.any()
        asyncsave.restore(tmp_path / "a", {"m": mine}, strict=False)
        assert mine.a.all()


# -- optimizers -----------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    name: value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type)
    and issubclass(value, torch.optim.Optimizer)
    and value not in (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
}
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adam": {"amsgrad": True},
    "AdamW": {"amsgrad": True},
}


def stepped(name: str, *shapes: tuple[int, ...]) -> torch.optim.Optimizer:
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer: torch.optim.Optimizer = OPTIMIZERS[name](params, lr=0.01, **OPTIONS.get(name, {}))
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(param.shape)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_other_shapes_is_refused(tmp_path: Path, name: str) -> None:
    shapes: list[tuple[int, ...]] = [(4, 3), (6, 2)]
    shapes += [] if name == "Muon" else [(5,), (), (2, 3, 4)]
    theirs = stepped(name, *shapes)
    asyncsave.save({"o": theirs, "w": torch.ones(2)}, tmp_path / "a").result()
    same, w = stepped(name, *shapes), torch.zeros(2)
    asyncsave.restore(tmp_path / "a", {"o": same, "w": w})
    assert_same(theirs.state_dict()["state"], same.state_dict()["state"])
    other = stepped(name, (4, 5), *shapes[1:])
    before = copy.deepcopy(other.state_dict())
    w = torch.zeros(2)
    with pytest.raises(asyncsave.MismatchError, match=r"o\.state\.0\.\w+: saved with shape \["):
        asyncsave.restore(tmp_path / "a", {"o": other, "w": w})
    assert_same(before["state"], other.state_dict()["state"])
    assert not w.any()


def test_an_optimizer_of_ones_own_knows_its_shapes(tmp_path: Path) -> None:
    class Own(torch.optim.SGD):
        pass

    param = nn.Parameter(torch.zeros(4))
    theirs = Own([param], momentum=0.9)
    theirs.state[param]["momentum_buffer"] = torch.ones(7)
    asyncsave.save({"o": theirs}, tmp_path / "a").result()
    mine = Own([nn.Parameter(torch.zeros(4))], momentum=0.9)
    asyncsave.restore(tmp_path / "a", {"o": mine})
    assert mine.state_dict()["state"][0]["momentum_buffer"].shape == (7,)


# -- torch's defaults -----------------------------------------------------------------------------


@pytest.fixture
def other_defaults() -> Iterator[None]:
    torch.set_default_device("meta")  # in place of "cuda"
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        plain_defaults()


def plain_defaults() -> None:
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def test_defaults_of_torch_change_nothing(tmp_path: Path, other_defaults: None) -> None:
    def state(fill: float) -> dict[str, Any]:
        base = torch.full((6,), fill, dtype=torch.float32, device="cpu")
        return {
            "net": nn.Sequential(nn.Linear(2, 2, device="cpu"), nn.BatchNorm1d(2, device="cpu")),
            "tied": [base, base[::2]],
            "strided": torch.full((4, 4), fill, device="cpu")[:, ::2],
            "empty": torch.empty(0, 3, device="cpu"),
            "array": np.full((2, 3), fill),
            "cut": np.full((4, 3), fill)[::2],
            "zero": torch.tensor(fill, device="cpu"),
            "number": torch.tensor(fill, device="cpu"),
            "half": torch.full((3,), fill, device="cpu", dtype=torch.float16),
            "later": torch.full((3,), fill, device="cpu"),
        }

    theirs, mine = state(2.0), state(0.0)
    theirs["number"], mine["later"] = 2.0, None
    asyncsave.save(theirs, tmp_path / "a").result()
    asyncsave.restore(tmp_path / "a", mine)
    loaded = asyncsave.load(tmp_path / "a")
    assert asyncsave.load(tmp_path / "a", device="meta")["zero"].is_meta
    into_half = {**mine, "half": torch.zeros(3, device="cpu", dtype=torch.float32)}
    asyncsave.restore(tmp_path / "a", into_half, cast=True)
    plain_defaults()
    theirs["number"] = torch.tensor(2.0, dtype=torch.float64)
    assert (into_half["half"] == 2).all()
    for name in ("tied", "strided", "empty", "array", "cut", "zero", "number", "half", "later"):
        assert_same(theirs[name], mine[name])
    assert_same(dict(theirs["net"].state_dict()), dict(mine["net"].state_dict()))
    assert_same(loaded["tied"], theirs["tied"])
    assert_same(loaded["strided"], theirs["strided"])
    assert loaded["empty"].is_cpu
