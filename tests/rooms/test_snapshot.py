"""The snapshot: what is saved is the state at save(), whatever happens to it afterwards."""

from __future__ import annotations

import contextlib
import gc
import mmap
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import optimizer

import asyncsave
from asyncsave.pipeline.save import Target
from asyncsave.snapshot.arena import Arena, Slot
from asyncsave.snapshot.snapshotter import Snapshotter
from asyncsave.state.chunks import Plan
from asyncsave.state.flatten import flatten
from asyncsave.state.layout import Layouts
from asyncsave.storage.place import Place
from tests.doubles.disks import GatedDisk
from tests.doubles.fake_device import FakeDevice, make_pipeline, tensors_of
from tests.support import assert_same


def training_state() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "extra": torch.randn(3 << 20)}


@pytest.mark.parametrize("compression", ["off", 1, "auto"])
def test_mutating_everything_right_after_save_never_shows(tmp_path: Path, compression: Any) -> None:
    gated = GatedDisk()
    state = training_state()
    copies = [tensor.clone() for tensor in tensors_of(state)]
    with asyncsave.Checkpointer(gated.at(tmp_path), compression=compression) as ckpt:
        handle = ckpt.save(1, state)
        assert handle is not None
        assert handle.wait_staged(0)
        with torch.no_grad():
            for tensor in tensors_of(state):
                tensor.fill_(7)
        gated.gate.set()
        handle.result()
        assert_same(copies, [t.clone() for t in tensors_of(ckpt.load())])


def test_the_second_save_allocates_no_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 64 << 20
    pipeline = make_pipeline(compression=asyncsave.Compression(1), memory_limit=limit)
    state = training_state()
    first = pipeline.save(state, Target(Place(tmp_path / "1")), 0.0).result()
    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", lambda *_, **__: pytest.fail("memory was taken"))
        second = pipeline.save(state, Target(Place(tmp_path / "2")), 0.0).result()
    # a frame may be used that was not, if the disk was slower
    assert first.raw_bytes <= first.peak_memory_bytes <= second.peak_memory_bytes <= limit
    pipeline.close()


def test_many_leaves_set_off_no_garbage_collection() -> None:
    flat = flatten({str(i): torch.zeros(2) for i in range(20_000)})
    layouts = Layouts()
    layout = layouts.of(flat)
    before = gc.get_stats()[0]["collections"]
    assert layouts.of(flat) is layout
    assert gc.get_stats()[0]["collections"] - before <= 1  # flatten() may have left almost one
    (chunk,) = Plan.cut(layout, 1 << 20).chunks
    assert not any(map(gc.is_tracked, (*layout.sources, *layout.placements, *chunk.pieces)))


def test_views_of_one_slot_at_most_are_kept_for_a_chunk() -> None:
    flat = flatten({f"{i:02}": torch.full((3, 5), float(i)) for i in range(100)})
    plan = Plan.cut(Layouts().of(flat), 1 << 20)
    snapshotter, arena = Snapshotter(None), Arena(8192, 3)
    for _ in range(2):
        slots = [arena.acquire(wait=False) for _ in range(3)]
        for slot in slots:
            assert slot is not None
            slot.array[:] = 0
            snapshotter.stage(flat, plan, plan.chunks[0], slot, None)
            saved = slot.array[: plan.layout.nbytes].view(np.float32).reshape(100, 15)
            assert (saved == np.arange(100)[:, None]).all()
            arena.release(slot)
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    assert [len(views_of(slot, tensors)) for slot in slots] == [0, 0, 100]
    snapshotter.forget()
    arena.close()


def views_of(slot: Slot | None, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    assert slot is not None
    begin = slot.tensor.data_ptr()
    return [
        each
        for each in tensors
        if each.shape == (3, 5) and begin <= each.data_ptr() < begin + slot.nbytes
    ]


def test_slots_are_pages() -> None:
    arena = Arena(8192, 3)
    slots = [arena.acquire() for _ in range(3)]
    assert all(slot is not None and slot.tensor.data_ptr() % 4096 == 0 for slot in slots)
    assert arena.acquire(wait=False) is None
    for slot in slots:
        assert slot is not None
        arena.release(slot)
    with pytest.raises(RuntimeError, match="twice"):
        arena.release(slot)  # type: ignore[arg-type]
    arena.close()


def test_a_slot_that_is_preferred_is_given_if_free() -> None:
    arena = Arena(4096, 4)
    first, other = arena.acquire(2), arena.acquire(2)
    assert first is not None
    assert first.index == 2
    assert other is not None
    assert other.index != 2
    arena.close()


MEASURE = """
import sys, threading, time, psutil, torch, asyncsave
asyncsave.Checkpointer, asyncsave.load  # imported before memory is counted
limit, level = int(sys.argv[1]), int(sys.argv[2])
state = {f"w{i}": torch.randn(1 << 20) for i in range(30)}           # 120 MiB
state["big"] = torch.randn(5 << 20)                                  # 20 MiB
process = psutil.Process()
# loads what code a save needs, which is not what is measured
asyncsave.save({"x": torch.randn(1 << 18)}, sys.argv[3] + "/warm", compression=level).result()
base, peak, done = process.memory_info().rss, 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, process.memory_info().rss - base)
        time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
with asyncsave.Checkpointer(sys.argv[3] + "/run", memory_limit=limit, compression=level) as ckpt:
    for step in range(3):
        report = ckpt.save(step, state, block=True)
        report = report.result()
        assert report.peak_memory_bytes <= limit, report
done.set(); thread.join()
loaded = asyncsave.load(sys.argv[3] + "/run")
for name in state:
    assert torch.equal(loaded[name].view(torch.int32), state[name].view(torch.int32))
print(peak)
"""


@pytest.mark.parametrize("level", [0, 1])
def test_memory_limit_at_a_tenth_of_the_state_is_kept(tmp_path: Path, level: int) -> None:
    limit = 14 << 20
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(limit), str(level), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    peak = int(run.stdout)
    assert peak <= limit * 1.05, f"{peak} bytes"  # for the sampling thread and noise


def test_a_limit_that_is_too_small_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(asyncsave.ConfigError, match="takes at least"):
        asyncsave.save({"x": torch.zeros(1 << 20)}, tmp_path / "a", memory_limit=10_000)


WITHOUT_MEMORY = """
import os, resource, sys, threading, torch, asyncsave
from pathlib import Path
run = Path(sys.argv[1])
compression = "off" if sys.argv[2] == "off" else int(sys.argv[2])
state = {"x": torch.randn(64 << 20)}                                            # 256 MiB
asyncsave.save({"x": torch.ones(9)}, run / "warm").result()
with asyncsave.Checkpointer(run / "run", compression=compression, memory_limit=1 << 29) as ckpt:
    def pages_taken():
        return int(Path("/proc/self/statm").read_text().split()[0])
    pages = pages_taken()
    space = pages * os.sysconf("SC_PAGE_SIZE") + (96 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (space, resource.RLIM_INFINITY))
    taken = []
    for _ in range(2):
        try:
            ckpt.save(1, state)
        except asyncsave.StagingError as error:
            assert "bytes of memory" in str(error) and "memory_limit" in str(error), error
            assert isinstance(error.__cause__, (OSError, MemoryError))
            taken.append(pages_taken())
        else:
            raise AssertionError("there was memory")
    assert [path.name for path in (run / "run").glob("*step*")] == []
    assert max(taken) - pages < (32 << 20) // 4096, "only a thread's stack, say"
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ckpt.save(1, state).result()
assert torch.equal(asyncsave.load(run / "run")["x"], state["x"])
"""


@pytest.mark.parametrize("compression", ["off", "1"])
def test_memory_that_the_system_does_not_give(tmp_path: Path, compression: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY, str(tmp_path), compression],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


# -- modes of torch that a program may be in ------------------------------------------------------


def saved_in(mode: Any, ckpt: asyncsave.Checkpointer, step: int, make: Any) -> None:
    """Save under ``mode`` what is made there; it is as it was in what was saved."""
    with mode:
        state = make()
        ckpt.save(step, state, block=True)
        before = [tensor.clone() for tensor in tensors_of(state)]
    assert_same(before, tensors_of(ckpt.load(step=step)))


@pytest.mark.parametrize("compression", ["off", 1])
@pytest.mark.parametrize("first_is_inference", [True, False])
def test_saves_in_and_out_of_inference_mode(
    tmp_path: Path, first_is_inference: bool, compression: Any
) -> None:
    outside = {
        "a": torch.randn(100, 7),
        "columns": torch.randn(9, 9)[:, ::2],
        "views": [torch.arange(30)[:20], torch.arange(12).view(3, 4).t()],
        "bits": torch.randn(5).to(torch.float8_e5m2),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
    }
    outside["tied"] = outside["a"][3:]
    with asyncsave.Checkpointer(tmp_path, compression=compression, durable=False) as ckpt:
        for step in range(4):
            inside = (step % 2 == 0) == first_is_inference
            saved_in(torch.inference_mode(inside), ckpt, step, lambda: outside)
        with torch.inference_mode():
            made_inside = {
                name: value.clone() if isinstance(value, torch.Tensor) else value
                for name, value in outside.items()
            }
            made_inside["view"] = made_inside["a"][5:]
            assert made_inside["a"].is_inference()
        for step in range(4, 8):
            saved_in(torch.inference_mode(step % 2 == 0), ckpt, step, lambda: made_inside)


@pytest.mark.parametrize("first_is_inference", [True, False])
def test_prewarmed_in_and_out_of_inference_mode(tmp_path: Path, first_is_inference: bool) -> None:
    state = training_state()
    with asyncsave.Checkpointer(tmp_path, durable=False) as ckpt:
        with torch.inference_mode(first_is_inference):
            ckpt.prewarm(state)
        saved_in(torch.inference_mode(not first_is_inference), ckpt, 1, lambda: state)


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def meta_by_default() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("default", ["meta_by_default", "float64_by_default", "meta_for_now"])
def test_defaults_of_torch_change_nothing(
    tmp_path: Path, default: str, request: pytest.FixtureRequest
) -> None:
    state = training_state() | {
        "strided": torch.randn(6, 7)[:, ::3],
        "views": [torch.arange(30)[:20], torch.arange(12).view(3, 4).t()],
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "array": np.arange(12.0).reshape(3, 4).T,
        "rng": asyncsave.RngState(),
    }
    state["tied"] = state["strided"][1:]
    before = [tensor.clone() for tensor in tensors_of(state)]
    mode: Any = contextlib.nullcontext()
    if default == "meta_for_now":
        mode = torch.device("meta")
    else:
        request.getfixturevalue(default)
    with mode, asyncsave.Checkpointer(tmp_path, compression=1, durable=False) as ckpt:
        ckpt.prewarm(state)
        for step in range(2):
            ckpt.save(step, state, block=True)
        tune = asyncsave.tune(state, directory=tmp_path, levels=[0, 1], seconds=0.2)
    assert tune.rows
    torch.set_default_device(None)  # type: ignore[arg-type]
    assert_same(before, tensors_of(asyncsave.load(tmp_path)))


# -- late copies, through a device that is only pretended -----------------------------------------


def simple_training() -> tuple[torch.nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    model = torch.nn.Linear(16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 16)).sum().backward()
    optimizer.step()
    return model, optimizer, {"model": model, "optimizer": optimizer}


def test_late_copies_end_at_the_fence(tmp_path: Path) -> None:
    device = FakeDevice()
    pipeline = make_pipeline(device)
    _, optimizer, state = simple_training()
    before = [tensor.clone() for tensor in tensors_of(state)]
    handle = pipeline.save(state, Target(Place(tmp_path / "a")), 0.0)
    assert not handle.wait_staged(0.05)
    optimizer.step()  # the hook fences, then the parameters change
    assert device.waits == 1
    assert handle.wait_staged(20)
    report = handle.result(20)
    assert report.fence_seconds >= 0.25
    assert_same(before, tensors_of(asyncsave.load(tmp_path / "a")))
    optimizer.step()
    assert device.waits == 1, "nothing is waited for once the copies are complete"
    pipeline.close()


def test_a_change_before_the_fence_fails_by_name(tmp_path: Path) -> None:
    device = FakeDevice()
    pipeline = make_pipeline(device)
    model, optimizer, state = simple_training()
    handle = pipeline.save(state, Target(Place(tmp_path / "a")), 0.0)
    with torch.no_grad():
        model.bias.mul_(2)
    optimizer.step()
    with pytest.raises(asyncsave.StagingError, match=r"'model\.bias' was changed"):
        handle.result(20)
    assert list(tmp_path.iterdir()) == []
    # and the pipeline works on: with a slot less, it would wait for ever
    device.eager = True
    pipeline.save(state, Target(Place(tmp_path / "b")), 0.0).result(20)
    assert_same(tensors_of(state), tensors_of(asyncsave.load(tmp_path / "b")))
    pipeline.close()


def test_a_change_after_the_copy_is_no_tear(tmp_path: Path) -> None:
    device = FakeDevice()
    device.eager = True
    pipeline = make_pipeline(device)
    model, _, state = simple_training()
    before = [tensor.clone() for tensor in tensors_of(state)]
    handle = pipeline.save(state, Target(Place(tmp_path / "a")), 0.0)
    assert handle.wait_staged(20)
    with torch.no_grad():
        model.weight.zero_()
    handle.result(20)
    assert_same(before, tensors_of(asyncsave.load(tmp_path / "a")))
    pipeline.close()


def test_without_overlap_nothing_is_late(tmp_path: Path) -> None:
    device = FakeDevice()
    device.eager = True
    pipeline = make_pipeline(device, overlap=False)
    model, optimizer, state = simple_training()
    before = [tensor.clone() for tensor in tensors_of(state)]
    handle = pipeline.save(state, Target(Place(tmp_path / "a")), 0.0)
    assert handle.wait_staged(0)
    with torch.no_grad():
        model.weight.zero_()
    optimizer.step()
    assert handle.result(20).fence_seconds == 0
    assert_same(before, tensors_of(asyncsave.load(tmp_path / "a")))
    pipeline.close()


def test_buffers_and_raw_tensors_are_never_late(tmp_path: Path) -> None:
    device = FakeDevice()
    pipeline = make_pipeline(device)
    model = torch.nn.BatchNorm1d(4)
    loose = torch.randn(4)
    state = {"model": model, "loose": loose}
    device.serves_who_waits = False
    finisher = threading.Timer(0.05, device.finish)
    finisher.start()
    handle = pipeline.save(
        state, Target(Place(tmp_path / "a")), 0.0
    )  # returns once those are copied
    finisher.join()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(8, 4))  # changes the running statistics
    loose.zero_()
    handle.result(20)
    loaded = asyncsave.load(tmp_path / "a")
    assert_same(before, dict(loaded["model"]))
    assert loaded["loose"].abs().sum() > 0
    pipeline.close()


def test_the_process_has_one_hook_and_it_lets_go(tmp_path: Path) -> None:
    before: set[int] | None = None
    for name in "abc":
        device = FakeDevice()
        device.eager = True
        pipeline = make_pipeline(device)
        _, sgd, state = simple_training()
        pipeline.save(state, Target(Place(tmp_path / name)), 0.0).result(20)
        pipeline.close()
        held = weakref.ref(device)
        del device, pipeline
        gc.collect()
        assert held() is not None, "the fence has it still"
        sgd.step()
        gc.collect()
        assert held() is None, "what is complete is forgotten at the next step"
        before = before or hooks()
        assert hooks() == before
        assert before


def hooks() -> set[int]:
    """Return what torch calls before every optimizer's step, which it does not tell otherwise."""
    return set(optimizer._global_optimizer_pre_hooks)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("compression", ["off", 1])
def test_cuda_training_is_saved_as_it_was(tmp_path: Path, overlap: bool, compression: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2048, 2048), torch.nn.Linear(2048, 2048)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    data = torch.randn(64, 2048, device="cuda")
    with asyncsave.Checkpointer(tmp_path, overlap=overlap, compression=compression) as ckpt:
        for step in range(5):
            model(data).square().mean().backward()
            optimizer.step()
            state = {"model": model, "optimizer": optimizer, "rng": asyncsave.RngState()}
            before = [tensor.clone() for tensor in tensors_of(state)]
            ckpt.save(step, state)
            model(data).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            saved = tensors_of(ckpt.load(step=step))
            assert_same([tensor.cpu() for tensor in before], saved)
        assert (
            ckpt.restore({"model": model, "optimizer": optimizer, "rng": asyncsave.RngState()}) == 4
        )
        assert_same(saved[: len(list(model.parameters()))], [p.cpu() for p in tensors_of(model)])
