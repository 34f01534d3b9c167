"""A device that is only pretended: copies from it happen when the test says so.

What CUDA does and this keeps: a copy reads the memory that a tensor had when the copy was queued,
at any time after that; the thread that waits for an event waits for the device, not for the test;
and the compute stream, once it was told to wait for an event, runs nothing before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

import asyncsave
from asyncsave.pipeline.pipeline import Pipeline
from asyncsave.pipeline.target import OnDisk

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class FakeEvent:
    """The end of one copy."""

    def __init__(self, device: FakeDevice, pairs: Pairs) -> None:
        self.pairs = pairs
        self._device = device
        self._queued_by = threading.current_thread()
        self._done = threading.Event()

    def advance(self) -> None:
        """Copy one more tensor."""
        if self.pairs:
            destination, source = self.pairs.pop(0)
            with torch.no_grad():
                destination.copy_(source)
        if not self.pairs:
            self._done.set()

    def synchronize(self) -> None:
        if threading.current_thread() is self._queued_by and self._device.serves_who_waits:
            self._device.finish(self)  # nobody else could: the test is waiting here
        assert self._done.wait(20)

    def query(self) -> bool:
        return self._done.is_set()


class FakeProbe:
    def __init__(self, error: BaseException | None) -> None:
        self._error = error

    def seconds(self) -> float:
        if self._error is not None:
            raise self._error
        return 0.25


class FakeDevice:
    """A `Transport` whose copies finish when told to, and at the fence.

    Args:
        owns: which tensors are on it.

    Attributes:
        copies: those that were queued.
        waits: how often the compute stream was told to wait.
        eager: copies finish at once.
        serves_who_waits: they finish as well when the thread that queued them waits for one.
        broken: raised when the device is asked how long it stood still.
    """

    pinned = False

    def __init__(self, owns: Callable[[torch.Tensor], bool] | None = None) -> None:
        self._owns = owns or (lambda tensor: tensor.numel() < 1 << 20)
        self.copies: list[FakeEvent] = []
        self.waits = 0
        self.eager = False
        self.serves_who_waits = True
        self.broken: BaseException | None = None
        self._lock = threading.RLock()

    def owns(self, tensor: torch.Tensor) -> bool:
        return self._owns(tensor)

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> FakeEvent:
        # detached: it keeps the memory of now, whatever `tensor.data = …` does later
        event = FakeEvent(self, [(into, source.detach()) for into, source in pairs])
        with self._lock:
            self.copies.append(event)
        if self.eager:
            self.finish()
        return event

    def advance(self, count: int) -> None:
        """Copy ``count`` more tensors, in the order they were queued."""
        with self._lock:
            for event in self.copies:
                while count and not event.query():
                    event.advance()
                    count -= 1

    def finish(self, last: FakeEvent | None = None) -> None:
        """Do all copies, or those up to ``last``."""
        with self._lock:
            for event in self.copies:
                while not event.query():
                    event.advance()
                if event is last:
                    return

    def drain(self) -> None:
        self.finish()

    def wait(self, event: Any) -> FakeProbe:
        self.waits += 1
        self.finish()
        return FakeProbe(self.broken)


def make_pipeline(transport: Any = None, **options: Any) -> Pipeline:
    """Return a pipeline without compression that copies by ``transport``."""
    arguments: dict[str, Any] = {
        "compression": asyncsave.Compression(0),
        "memory_limit": "auto",
        "overlap": True,
        "on_disk": OnDisk(durable=False, reuse="off"),
        **options,
    }
    return Pipeline(transport=transport, **arguments)


def tensors_of(state: Any) -> list[torch.Tensor]:
    """Return the tensors of a state, in the order they are found in."""
    found: list[torch.Tensor] = []
    if isinstance(state, torch.Tensor):
        found.append(state)
    elif isinstance(state, dict):
        for value in state.values():
            found += tensors_of(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            found += tensors_of(value)
    elif hasattr(state, "state_dict"):
        found += tensors_of(state.state_dict())
    return found
