"""Fence: late copies, and the place where the training waits for them.

A *late* copy is made on the device's side stream while the next forward and backward pass runs. It
reads tensors that only ``optimizer.step()`` changes, so what protects it is a hook before every
optimizer step that makes the compute stream, not the CPU, wait for the copy's event.

What a hook cannot see, a version check does: every late tensor's ``_version`` is compared with the
one at the time of the save, once: when its copy has finished, or at the fence, whichever comes
first. A difference fails the save by the tensor's name; a torn snapshot is never committed.

Who calls what: `Fence.add` and `Fence.wait` run in training threads, `LateCopies.settle` in a
background thread. A lock in LateCopies orders them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import StagingError


class Event(Protocol):
    """The moment a copy is complete."""

    def synchronize(self) -> None:
        """Wait for it, without the GIL."""

    def query(self) -> bool:
        """Whether it has come."""


class Probe(Protocol):
    """Measures how long a compute stream stood still at a fence."""

    def seconds(self) -> float:
        """Return the time; waits until it is known."""


class Transport(Protocol):
    """Asynchronous copies from a device to pinned memory. CUDA's is `CudaTransport`."""

    pinned: bool

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is on a device of this transport."""

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Event:
        """Start copying each (slot view, device tensor) after the work queued so far."""

    def wait(self, event: Event) -> Probe:
        """Make work queued from now on wait for ``event``."""

    def drain(self) -> None:
        """Wait for every copy that was started."""


class CudaTransport:
    """One side stream per CUDA device, made when first used."""

    pinned = True

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Event:
        device = pairs[0][1].device
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.no_grad():
            for destination, source in pairs:
                # resolved here: copy_ would conjugate the host's bytes before they have arrived
                resolved = source.resolve_conj().resolve_neg()
                destination.copy_(resolved, non_blocking=True)
            # blocking: the thread that waits sleeps instead of spinning on a core
            event = torch.cuda.Event(blocking=True)
            event.record(stream)
        return _CudaEvent(event, device)

    def wait(self, event: Event) -> Probe:
        assert isinstance(event, _CudaEvent)
        stream = torch.cuda.current_stream(event.device)
        before = torch.cuda.Event(enable_timing=True)
        after = torch.cuda.Event(enable_timing=True)
        before.record(stream)
        stream.wait_event(event.event)
        after.record(stream)
        return _CudaProbe(before, after)

    def drain(self) -> None:
        for stream in list(self._streams.values()):
            stream.synchronize()


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self.event = event
        self.device = device

    def synchronize(self) -> None:
        with torch.cuda.device(self.device):  # or this thread would open a context on device 0
            self.event.synchronize()

    def query(self) -> bool:
        with torch.cuda.device(self.device):
            return bool(self.event.query())


class _CudaProbe:
    def __init__(self, before: torch.cuda.Event, after: torch.cuda.Event) -> None:
        self._before, self._after = before, after

    def seconds(self) -> float:
        self._after.synchronize()
        return float(self._before.elapsed_time(self._after)) / 1e3


class LateCopies:
    """The late copies of one save: what was copied, at which version, and until when."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lock = threading.Lock()
        self._guards: dict[int, list[tuple[str, torch.Tensor, int]]] = {}
        self._last: dict[torch.device, Event] = {}
        self._probes: list[Probe] = []
        self._fenced = False
        self._torn: str | None = None
        self._hook_seconds = 0.0

    def add(self, chunk: int, guards: list[tuple[str, torch.Tensor, int]], event: Event) -> None:
        """Note that ``chunk`` copies these (fqn, tensor, version) until ``event``."""
        with self._lock:
            # holding the tensors also keeps their memory from being reused during the copy
            self._guards[chunk] = guards
            self._last[guards[0][1].device] = event

    def settle(self, chunk: int) -> None:
        """Check a chunk whose copy has completed, and let go of its tensors.

        Raises:
            StagingError: one of them changed in place before the fence.
        """
        with self._lock:
            guards = self._guards.pop(chunk, [])
            if not self._fenced:
                self._compare(guards)
            torn = self._torn
        if torn is not None:
            raise StagingError(
                f"the tensor {torn!r} was changed in place while it was being copied, between "
                "save() and optimizer.step(); change it after the step, or use overlap=False"
            )

    def drop(self) -> None:
        """Let go of all tensors of a save that has failed, once its copies have completed."""
        with self._lock:
            self._guards.clear()
            self._last.clear()

    def fence(self) -> bool:
        """Make the compute streams wait for all copies; return whether all are complete."""
        begin = time.perf_counter()
        with self._lock:
            events = list(self._last.values())
            if not self._fenced:
                for guards in self._guards.values():
                    self._compare(guards)
                self._fenced = True
        if all(event.query() for event in events):
            return True
        for event in events:
            self._probes.append(self._transport.wait(event))
        self._hook_seconds += time.perf_counter() - begin
        return False

    def fence_seconds(self) -> float:
        """Return how long the training waited at the fence, on the CPU and on the device."""
        return self._hook_seconds + sum(probe.seconds() for probe in self._probes)

    def _compare(self, guards: list[tuple[str, torch.Tensor, int]]) -> None:
        for name, tensor, version in guards:
            if tensor._version != version and self._torn is None:
                self._torn = name


class Fence:
    """The hook before every optimizer step of the process, for late copies that are under way.

    There is one hook for the whole process, registered with the first late copy and then kept: it
    returns at once while nothing is pending. To remove it would mean to change torch's table of
    hooks in a thread that knows nothing of the training thread, which may be going through it.
    """

    def __init__(self) -> None:
        # a signal's handler that saves elsewhere may come while this thread holds it
        self._lock = threading.RLock()
        self._pending: list[LateCopies] = []
        self._hook: Any = None

    def add(self, late: LateCopies) -> None:
        """Let the training wait for these copies before its next optimizer step."""
        with self._lock:
            self._pending.append(late)
            if self._hook is None:
                self._hook = register_optimizer_step_pre_hook(self._before_step)

    def wait(self) -> None:
        """Do what the hook does; for training loops that change parameters without an optimizer."""
        with self._lock:
            pending = list(self._pending)
        complete = [late for late in pending if late.fence()]
        if complete:
            with self._lock:
                self._pending = [late for late in self._pending if late not in complete]

    def _before_step(self, *_: Any) -> None:
        if self._pending:
            self.wait()


FENCE = Fence()
"""That of the process."""
