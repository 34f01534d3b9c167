"""Torn snapshots: what is committed is the state at save(), or the save fails by name.

A device is pretended whose late copies finish at moments that hypothesis chooses, while parameters,
buffers and optimizer state change by every usual route. Which routes a version counter does not see
is written down here as well: those are the README's limit, and `overlap=False` is the way out.
"""

from __future__ import annotations

import copy
import gc
import random
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import asyncsave
from asyncsave.pipeline.target import OnDisk, Target
from asyncsave.snapshot.fence import FENCE
from asyncsave.storage.place import Place
from tests.doubles.fake_device import FakeDevice, make_pipeline, tensors_of
from tests.support import assert_same

WIDTH = 128
ALL, WAVES = 900_000, 200_000
"""Limits of memory that make chunks of 64 KiB, so that a small state has many late copies: in slots
for all of them at once; and in two, so that save() waits for late copies itself."""


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, WIDTH)).square().mean().backward()
    optimizer.step()


class Training:
    """A model, two optimizers over it, an average of it, and values on the host."""

    def __init__(self, **options: Any) -> None:
        self.model = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, WIDTH), torch.nn.BatchNorm1d(WIDTH), torch.nn.Linear(WIDTH, 3)
        )
        self.first = torch.optim.AdamW(self.model.parameters(), **options)
        self.second = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        self.loose, self.host = torch.randn(5000), torch.randn(5000)
        self.array, self.plain = np.arange(1000.0), {"step": 0, "losses": [0.5]}
        train(self.model, self.first)
        train(self.model, self.second)

    def is_on_device(self, tensor: torch.Tensor) -> bool:
        return tensor.data_ptr() != self.host.data_ptr()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "first": self.first,
            "second": self.second,
            "average": self.average,
            "loose": self.loose,
            "host": self.host,
            "array": self.array,
            "plain": self.plain,
        }

    def clone(self) -> tuple[Any, ...]:
        return (
            [tensor.clone() for tensor in tensors_of(self.state())],
            self.array.copy(),
            copy.deepcopy(self.plain),
        )

    # -- routes: each is called at random moments ---------------------------------------------

    def change_host(self) -> None:
        """Values that were copied before save() returned, by routes no counter sees."""
        self.host.numpy()[:] += 1
        self.array += 1
        self.plain["step"] += 1
        self.plain["losses"].append(0.25)

    def change_loose(self) -> None:
        self.loose.data.add_(1)

    def forward(self) -> None:
        self.model(torch.randn(8, WIDTH))  # changes the running statistics

    def load_optimizers(self) -> None:
        for each in (self.first, self.second):
            each.load_state_dict(copy.deepcopy(each.state_dict()))

    def convert(self) -> None:
        """Gives every parameter other memory, and frees the old."""
        self.model.double().float()

    def replace_data(self) -> None:
        for parameter in self.model.parameters():
            parameter.data = torch.randn_like(parameter)

    def change_grads(self) -> None:
        self.model(torch.randn(8, WIDTH)).sum().backward()
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(2)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)

    def zero_grad(self) -> None:
        self.first.zero_grad(set_to_none=False)
        self.second.zero_grad()

    def change_options(self) -> None:
        for group in self.first.param_groups:
            group["lr"] *= 0.5

    def harmless(self) -> list[Callable[[], None]]:
        """Whatever these do between save and fence, the save must succeed."""
        return [
            *(self.change_host, self.change_loose, self.forward, self.load_optimizers),
            *(self.convert, self.replace_data, self.change_grads, self.zero_grad),
            self.change_options,
        ]

    def tearing(self) -> list[Callable[[torch.Tensor], object]]:
        """In place, and seen by the counter: the save fails, or had been copied before."""
        return [
            lambda t: t.mul_(2),
            lambda t: t.copy_(torch.randn_like(t)),
            lambda t: t.view(-1)[: t.numel() // 2].add_(1),
            lambda t: t.detach().neg_(),
            lambda t: t.__setitem__(..., 3.0),
            lambda t: t.lerp_(torch.ones_like(t), 0.5),
            lambda t: torch.add(t, 1, out=t),
            lambda t: torch._foreach_mul_([t], 0.5),
            lambda t: torch._foreach_lerp_([t], [torch.zeros_like(t)], 0.1),
            lambda t: torch._foreach_copy_([t], [torch.randn_like(t)]),
            lambda t: torch.nn.init.normal_(t),
            lambda t: t.set_(torch.randn_like(t)),
        ]

    def late_tensors(self) -> list[torch.Tensor]:
        found = [*self.model.parameters(), *self.average.parameters()]
        for each in (self.first, self.second):
            found += [v for s in each.state.values() for v in s.values() if v.dim()]
        return found


class Torn(RuleBasedStateMachine):
    options: ClassVar[dict[str, Any]] = {"memory_limit": ALL}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.directory = Path(tempfile.mkdtemp())
        self.training = Training()
        self.device = FakeDevice(self.training.is_on_device)
        self.pipeline = make_pipeline(self.device, **self.options)
        self.handle: asyncsave.SaveHandle | None = None
        self.saves = 0
        self.fenced = self.touched = False

    def in_flight(self) -> bool:
        return self.handle is not None

    @precondition(lambda self: not self.in_flight())
    @rule()
    def save(self) -> None:
        self.saves += 1
        self.fenced = self.touched = False
        self.expected = self.training.clone()
        target = Target(Place(self.directory / str(self.saves)), self.saves)
        self.handle = self.pipeline.save(self.training.state(), target, 0.0)
        assert any(not event.query() for event in self.device.copies), "some copies are late"

    @precondition(in_flight)
    @rule(count=st.integers(1, 20))
    def copies_go_on(self, count: int) -> None:
        self.device.advance(count)

    @rule(i=st.integers(0, 8))
    def harmless(self, i: int) -> None:
        self.training.harmless()[i]()

    @rule(second=st.booleans())
    def step(self, second: bool) -> None:
        train(self.training.model, self.training.second if second else self.training.first)
        self.fenced = True

    @rule()
    def update_average(self) -> None:
        self._touch()
        self.training.average.update_parameters(self.training.model)

    @rule()
    def load_model(self) -> None:
        self._touch()
        other = {name: t + 1 for name, t in self.training.model.state_dict().items()}
        self.training.model.load_state_dict(other)

    @rule(i=st.integers(0, 11), j=st.integers(0, 1000))
    def tear(self, i: int, j: int) -> None:
        self._touch()
        tensors = self.training.late_tensors()
        with torch.no_grad():
            self.training.tearing()[i](tensors[j % len(tensors)])

    def _touch(self) -> None:
        self.touched |= self.in_flight() and not self.fenced

    @precondition(in_flight)
    @rule()
    def end(self) -> None:
        assert self.handle is not None
        self.device.finish()
        handle, self.handle = self.handle, None
        error = handle.exception(20)
        self.device.copies.clear()
        if error is not None:
            assert type(error) is asyncsave.StagingError, error
            assert "was changed in place while it was being copied" in str(error)
            assert self.touched, "nothing had torn it"
            assert not handle.path.exists()
        else:
            tensors, array, plain = self.expected
            loaded = asyncsave.load(handle.path)
            assert_same(tensors, tensors_of(loaded))
            assert_same(array, loaded["array"])
            assert_same(plain, loaded["plain"])

    @invariant()
    def nothing_but_whole_checkpoints(self) -> None:
        if not self.in_flight():
            assert not list(self.directory.glob(".*"))

    def teardown(self) -> None:
        if self.in_flight():
            self.end()
        self.pipeline.close()
        shutil.rmtree(self.directory)


TestTorn = Torn.TestCase
TestTorn.settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class TornAndShared(Torn):
    """What no counter has seen a write to is not copied, and may be in flight beside what is."""

    options: ClassVar[dict[str, Any]] = {"on_disk": OnDisk(durable=False, reuse="versions")}


TestTornAndShared = TornAndShared.TestCase
TestTornAndShared.settings = TestTorn.settings


class FreeDevice(FakeDevice):
    """Copies at its own pace, in its own thread, as a real device does."""

    def __init__(self, owns: Callable[[torch.Tensor], bool]) -> None:
        super().__init__(owns)
        self.serves_who_waits = False
        self._chance, self._over = random.Random(0), threading.Event()
        self._thread = threading.Thread(target=self._run, name="device")
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self._chance.uniform(0, 0.002)):
            self.advance(self._chance.randrange(12))

    def close(self) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.parametrize("waves", [False, True])
def test_with_a_device_that_copies_at_its_own_pace(tmp_path: Path, waves: bool) -> None:
    """With ``waves``, memory is for a part of the state: save() waits for late copies itself."""
    chance, training = random.Random(1), Training(fused=True)
    device = FreeDevice(training.is_on_device)
    pipeline = make_pipeline(device, memory_limit=WAVES if waves else ALL)
    committed = failed = 0
    for i in range(60):
        expected = training.clone()
        handle = pipeline.save(training.state(), Target(Place(tmp_path / str(i))), 0.0)
        tears = i % 3 == 0
        for _ in range(chance.randrange(4)):
            chance.choice(training.harmless())()
        if tears:
            with torch.no_grad():
                chance.choice(training.tearing())(chance.choice(training.late_tensors()))
        train(training.model, training.first)
        error = handle.exception(20)
        device.copies.clear()
        if error is None:
            committed += 1
            loaded = asyncsave.load(handle.path)
            assert_same(expected[0], tensors_of(loaded))
            assert_same(expected[2], loaded["plain"])
        else:
            failed += 1
            assert tears
            assert type(error) is asyncsave.StagingError
    assert committed >= 40
    assert failed or waves, "no change was ever caught: the test has become blunt"
    pipeline.close()
    device.close()


@pytest.mark.parametrize("owner", ["model", "optimizer"])
def test_memory_that_is_being_copied_is_kept(tmp_path: Path, owner: str) -> None:
    """``tensor.data = …``, as module.to() and offloading do, frees memory: not before its copy."""
    array = np.array([range(1000)], dtype=np.float32)
    alive = weakref.ref(array)
    model = torch.nn.Linear(1000, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tensor: torch.Tensor = torch.from_numpy(array)
    del array
    if owner == "model":
        tensor = model.weight = torch.nn.Parameter(tensor)
    else:
        optimizer.state[model.weight]["momentum_buffer"] = tensor
    device = FakeDevice()
    pipeline = make_pipeline(device)
    state = {"model": model} if owner == "model" else {"optimizer": optimizer}
    handle = pipeline.save(state, Target(Place(tmp_path / "a")), 0.0)
    (event,) = device.copies
    assert not event.query(), "it is late"
    event.pairs = [(event.pairs[0][0], torch.arange(1000.0).view(1, 1000))]  # queues hold no tensor
    tensor.data = torch.zeros(3)
    gc.collect()
    assert alive() is not None
    device.finish()
    handle.result(20)
    gc.collect()
    assert alive() is None, "and not longer than that"
    assert torch.equal(tensors_of(asyncsave.load(tmp_path / "a"))[0][0], torch.arange(1000.0))
    pipeline.close()


# -- what a version counter does not see: the README's limit --------------------------------------


def fused(tensor: torch.Tensor) -> None:
    """The kernel of a fused optimizer, not called by the optimizer's step."""
    ones = [torch.ones_like(tensor)]
    torch._fused_sgd_(
        [tensor.detach()],
        ones,
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=0.1,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


INVISIBLE: dict[str, Callable[[torch.Tensor], object]] = {
    ".data": lambda t: t.data.add_(1),
    "a view made of .data": lambda t: t.data.view(-1)[:5].add_(1),
    "NumPy": lambda t: t.detach().numpy().__iadd__(1),
    "DLPack": lambda t: torch.from_dlpack(t.detach()).add_(1),
    "the storage": lambda t: t.untyped_storage().fill_(1),
    "a fused kernel": fused,
}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("route", INVISIBLE)
def test_routes_that_no_counter_sees_are_what_the_readme_says(
    tmp_path: Path, route: str, overlap: bool
) -> None:
    device = FakeDevice()
    pipeline = make_pipeline(device, overlap=overlap)
    model = torch.nn.Linear(16, 16)
    version, before = model.weight._version, model.weight.detach().clone()
    handle = pipeline.save({"model": model}, Target(Place(tmp_path / "a")), 0.0)
    INVISIBLE[route](model.weight)
    assert model.weight._version == version
    after = model.weight.detach().clone()
    assert not torch.equal(before, after)
    device.finish()
    handle.result(20)
    saved = asyncsave.load(tmp_path / "a")["model"]["weight"]
    assert torch.equal(saved, after if overlap else before)
    pipeline.close()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_an_optimizers_step_is_fenced_whatever_its_kernels_do(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    training = Training(**options)
    device = FakeDevice(training.is_on_device)
    pipeline = make_pipeline(device, memory_limit=ALL)
    expected, _, _ = training.clone()
    handle = pipeline.save(training.state(), Target(Place(tmp_path / "a")), 0.0)
    assert not handle.wait_staged(0.01)
    train(training.model, training.first)
    handle.result(20)
    assert device.waits > 0
    assert_same(expected, tensors_of(asyncsave.load(tmp_path / "a")))
    pipeline.close()


def test_changes_in_inference_mode_are_seen(tmp_path: Path) -> None:
    device = FakeDevice()
    pipeline = make_pipeline(device)
    model = torch.nn.Linear(16, 16)
    handle = pipeline.save({"model": model}, Target(Place(tmp_path / "a")), 0.0)
    with torch.inference_mode():
        model.weight.add_(1)
    FENCE.wait()  # what a loop without an optimizer may call
    with pytest.raises(asyncsave.StagingError, match=r"'model\.weight'"):
        handle.result(20)
    pipeline.close()
