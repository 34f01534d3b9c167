"""Ties: what shares memory when it is saved does so again, and plans notice when that changes."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asyncsave
import asyncsave.numpy
from asyncsave.state.flatten import flatten
from asyncsave.state.layout import Layouts
from tests.strategies import DTYPES, NUMPY_DTYPES
from tests.support import assert_same
from tests.sweeps.attacks.forge import chunk, forge, padded, tensor

Roundtrip = Callable[[Any], Any]


@pytest.fixture(params=["off", 1])
def roundtrip(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Roundtrip]:
    """Save and load with one Checkpointer, so that plans are kept."""
    steps = itertools.count()
    with asyncsave.Checkpointer(
        tmp_path, compression=request.param, durable=False, keep_last=1
    ) as ckpt:

        def save_and_load(state: Any) -> Any:
            ckpt.save(next(steps), state, block=True)
            return ckpt.load()

        yield save_and_load


def span(value: torch.Tensor | np.ndarray[Any, Any]) -> tuple[int, int]:
    """Return the addresses that a tensor or an array reaches over."""
    if isinstance(value, np.ndarray):
        low: int = value.__array_interface__["data"][0]
        return low, low + value.nbytes
    steps = zip(value.shape, value.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in steps)
    return value.data_ptr(), value.data_ptr() + extent * value.element_size()


def tie(one: Any, other: Any) -> int | None:
    """Return how far the second begins behind the first if they share memory, else None."""
    (low, high), (start, stop) = span(one), span(other)
    return start - low if max(low, start) < min(high, stop) else None


# -- storages -------------------------------------------------------------------------------------


def test_a_view_whose_storage_begins_elsewhere_next_time(roundtrip: Roundtrip) -> None:
    """Same address, same shape and strides: what was counted from the storage was wrong then."""
    buffer = np.arange(1000, dtype=np.float32)
    states = [
        {"t": torch.from_numpy(buffer[first:])[100 - first :][:64].view(8, 8).t(), "x": tied}
        for first in (0, 60, 100, 3)
        for tied in [torch.from_numpy(buffer[first:])[300 - first :][:9]]
    ]
    assert len({state["t"].data_ptr() for state in states}) == 1
    assert len({state["t"].untyped_storage().data_ptr() for state in states}) == 4
    for state in states:
        state["overlapping"] = state["x"].as_strided((7,), (1,))
        assert_same(state, roundtrip(state))


def test_views_of_one_storage_become_views_of_two(roundtrip: Roundtrip) -> None:
    buffer = np.arange(200, dtype=np.float64)
    base = torch.from_numpy(buffer)
    for state in (
        {"a": base[10:60], "b": base[40:90]},
        {"a": torch.from_numpy(buffer[10:60]), "b": torch.from_numpy(buffer[40:90])},
        {"a": torch.from_numpy(buffer[10:60]), "b": base[40:90]},
    ):
        loaded = roundtrip(state)
        assert_same(state, loaded)
        assert tie(loaded["a"], loaded["b"]) == 240


# -- arrays ---------------------------------------------------------------------------------------


def test_views_of_an_array_are_tied_to_it(roundtrip: Roundtrip) -> None:
    base = np.arange(40, dtype=np.int32).reshape(8, 5)
    state = {"rows": base[2:5], "base": base, "raw": base.view(np.uint8), "again": base}
    loaded = roundtrip(state)
    assert_same(state, loaded)
    loaded["base"][2, 0] = -1
    assert loaded["rows"][0, 0] == loaded["again"][2, 0] == -1
    assert loaded["raw"][2, 0] == 255


def test_a_tensor_and_its_array_are_tied(roundtrip: Roundtrip) -> None:
    t = torch.arange(12.0)
    state = {
        "t": t,
        "n": t.numpy(),
        "slice": t.numpy()[3:],
        "back": torch.from_numpy(t.numpy()[5:]),
        "parameter": torch.nn.Parameter(t),
    }
    loaded = roundtrip(state)
    assert_same(state, loaded)
    loaded["n"][6] = 77
    assert loaded["t"][6] == loaded["slice"][3] == loaded["back"][1] == loaded["parameter"][6] == 77
    report = {name: tie(loaded["t"], loaded[name]) for name in ("n", "slice", "back")}
    assert report == {"n": 0, "slice": 12, "back": 20}


def test_tensors_tied_to_arrays_are_on_the_device_all_the_same(tmp_path: Path) -> None:
    t = torch.arange(12.0)
    asyncsave.save({"t": t, "n": t.numpy(), "part": t[3:]}, tmp_path / "a").result()
    loaded = asyncsave.load(tmp_path / "a", device="meta")
    assert loaded["t"].device.type == loaded["part"].device.type == "meta"
    assert loaded["t"].untyped_storage()._cdata == loaded["part"].untyped_storage()._cdata
    assert_same(t.numpy(), loaded["n"])


def test_what_is_tied_is_saved_once(tmp_path: Path) -> None:
    t = torch.zeros(1 << 16)
    state = {"t": t, "n": t.numpy(), "half": t.numpy()[: 1 << 15]}
    report = asyncsave.save(state, tmp_path / "a", compression="off").result()
    assert report.raw_bytes == 1 << 18


def test_what_no_reader_could_align_is_not_tied(roundtrip: Roundtrip) -> None:
    raw = np.random.default_rng(0).integers(0, 255, 240, np.uint8)
    state = {
        "bytes": raw,
        "at 1": raw[1:9].view("<f8"),
        "five": raw[10:40].view("S5"),
        "seven": raw[3:38].view("V7").view("S7"),
        "text": np.array(["abc", "de"]),
        "wide": raw[7:207].view("S40"),
        "words": raw[16:64].view("<i8"),
    }
    loaded = roundtrip(state)
    assert_same(state, loaded)
    assert tie(loaded["bytes"], loaded["words"]) == 16


def test_arrays_that_share_memory_from_now_on(roundtrip: Roundtrip) -> None:
    base = np.arange(64.0)
    t = torch.arange(64.0)
    apart = {"a": base.copy(), "b": base[:32].copy(), "t": t.clone(), "n": t.numpy().copy()}
    tied = {"a": base, "b": base[:32], "t": t, "n": t.numpy()}
    for state, expected in ((apart, None), (tied, 0), (apart, None), (tied, 0)):
        for _ in range(2):
            loaded = roundtrip(state)
            assert_same(state, loaded)
            assert tie(loaded["a"], loaded["b"]) == tie(loaded["t"], loaded["n"]) == expected


def test_an_array_in_the_place_of_one_that_is_gone() -> None:
    layouts, base = Layouts(), np.arange(1000.0)
    for _ in range(50):
        for make in (np.copy, np.asarray):
            flat = flatten({"base": base, "part": make(base[10:20])})
            layout = layouts.of(flat)
            assert len(layout.sources) == (2 if make is np.copy else 1)
            del flat


def test_arrays_that_move_alone_keep_the_plan() -> None:
    layouts, weight = Layouts(), torch.ones(10)

    def layout() -> Any:
        state = {"w": weight, "words": np.arange(99), "moved": torch.ones(3), "b": bytes(999)}
        return layouts.of(flatten(state))

    first = layout()
    assert all(layout() is first for _ in range(5))


def test_a_tie_to_a_conjugate_is_lost_and_its_values_are_right(roundtrip: Roundtrip) -> None:
    z = torch.randn(5, dtype=torch.complex64)
    state = {"z": z, "conj": z.conj(), "twice": z.conj()}
    loaded = roundtrip(state)
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_states_of_views_at_random(roundtrip: Roundtrip) -> None:
    """Tensors and arrays of all kinds over the same memory, each time with the same Layouts."""
    draw = random.Random(5)
    buffer = np.frombuffer(np.random.default_rng(1).bytes(512), np.uint8).copy() & 1
    dtypes = [dtype for dtype in DTYPES if dtype is not torch.bool]
    state: dict[str, Any] = {}
    for _ in range(120):
        for name in "abcdef":
            if draw.random() < 0.5:
                state[name] = _view_at_random(buffer, dtypes, draw)
        assert_same(state, roundtrip(state))


def _view_at_random(buffer: Any, dtypes: list[torch.dtype], draw: random.Random) -> Any:
    first = draw.randrange(0, 256)
    if draw.random() < 0.5:
        names = [name for name in NUMPY_DTYPES if np.dtype(name).kind not in "?U"]
        dtype = np.dtype(draw.choice(names))
        view = buffer[first : first + dtype.itemsize * draw.randrange(1, 7)].view(dtype)
        view = view[:: draw.choice([1, 1, 2])]
        return view.copy() if draw.random() < 0.3 else view
    kind = draw.choice(dtypes)
    first -= first % kind.itemsize
    begin = draw.randrange(0, first + 1) // kind.itemsize * kind.itemsize
    storage = torch.from_numpy(buffer[begin:]).untyped_storage()
    shape = (draw.randrange(1, 4), draw.randrange(1, 4))
    strides = draw.choice([(shape[1], 1), (1, shape[0]), (4, 1), (0, 2)])
    tensor = torch.empty(0, dtype=kind)
    return tensor.set_(storage, (first - begin) // kind.itemsize, shape, strides)


# -- arrays that are not contiguous ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_arrays_of_every_layout(roundtrip: Roundtrip, dtype: str) -> None:
    width = np.dtype(dtype).itemsize
    raw = np.random.default_rng(2).integers(0, 2, 7 * 6 * 5 * width, np.uint8)
    base = (raw * (0 if dtype == "<U3" else 1)).view(dtype).reshape(7, 6, 5)
    state = {
        "f": np.asfortranarray(base),
        "t": base.transpose(1, 2, 0),
        "cut": base[::2, 1:, ::-1],
        "column": base[:, 3, 2],
        "one": np.broadcast_to(base[0, 0, 0], (3, 4)),
        "none": base[:0].T,
        "back": base[::-1],
    }
    assert_same(state, roundtrip(state))


@pytest.mark.parametrize("dtype", ["<f8", "S7", "<U3"])
def test_an_array_that_is_not_contiguous_is_never_copied_whole(tmp_path: Path, dtype: str) -> None:
    width = np.dtype(dtype).itemsize
    count = (24 << 20) // width
    array = np.zeros((8, count // 8), dtype).T
    array[3::7] = np.ones(1).astype(dtype)
    limit = 4 << 20
    asyncsave.save({"x": array[:9]}, tmp_path / "warm", memory_limit=limit).result()
    tracemalloc.start()
    try:
        asyncsave.save({"x": array}, tmp_path / "a", memory_limit=limit, compression="off").result()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20  # slots are taken from the system, which tracemalloc does not see
    assert_same({"x": array}, asyncsave.load(tmp_path / "a"))


# -- ties of other writers ------------------------------------------------------------------------


def forge_list(directory: Path, *records: Any) -> None:
    tree = {"t": "list", "items": [{"t": "tensor", "i": i} for i in range(len(records))]}
    data = bytes(range(64))
    forge(directory, tree, tensors=records, chunks=[chunk(data)], data=padded(data))


def test_ties_that_cannot_be_aligned_are_refused_by_all_readers_alike(tmp_path: Path) -> None:
    floats = [tensor((4,), start, dtype="float32") for start in (0, 2)]
    forge_list(tmp_path / "a", *floats)
    into = [torch.zeros(4), torch.zeros(4)]
    readers: list[Callable[[Path], object]] = [asyncsave.verify, asyncsave.load]
    readers += [asyncsave.numpy.load, lambda path: asyncsave.restore(path, into)]
    readers.append(lambda path: asyncsave.load(path, keys="0"))
    for read in readers:
        with pytest.raises(asyncsave.FormatError, match="not aligned"):
            read(tmp_path / "a")
    assert not torch.stack(into).any()


def test_a_part_of_what_is_tied_can_be_aligned_as_well(tmp_path: Path) -> None:
    """Also by the rule of FORMAT.md for the whole, where elements are of 12 bytes."""
    whole, number = tensor((64,)), tensor((1,), 16, dtype="complex128")
    forge_list(tmp_path / "a", whole, number, tensor((2,), 24, dtype="|S12", kind="numpy"))
    expected = bytes(range(24, 48))
    for load in (asyncsave.load, asyncsave.numpy.load):
        assert load(tmp_path / "a")[2].tobytes() == expected
        assert load(tmp_path / "a", keys=["1", "2"])[2].tobytes() == expected
