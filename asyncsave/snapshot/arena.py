"""Arena: page-aligned slots, allocated once and reused by every save.

Why it exists: copying into memory that was touched before runs at the memory's speed, copying into
fresh memory at the page fault's, five times slower. Slots are pages of one private anonymous
mapping, so they satisfy O_DIRECT (4096-byte alignment) and, registered with CUDA, asynchronous
copies too.

Who calls what: any thread may `acquire` and `release`. Closing belongs to the pipeline, when
no slot is out.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import warnings
from collections.abc import Callable

import torch

from ..pages import PAGE_BYTES, Bytes, pages


class Slot:
    """One fixed-size piece of the arena, as a NumPy array and as a torch tensor of uint8."""

    __slots__ = ("array", "index", "nbytes", "tensor")

    def __init__(self, index: int, tensor: torch.Tensor) -> None:
        self.index = index
        self.tensor = tensor
        self.array: Bytes = tensor.numpy()
        self.nbytes = tensor.numel()


class Arena:
    """``count`` slots of ``slot_bytes`` each.

    Memory is reserved at once and taken from the system slot by slot, on first use; from then on
    it is kept until `close`.

    Args:
        slot_bytes: length of a slot, a multiple of 4096.
        count: how many.
        pin: register slots with CUDA so that device copies into them are asynchronous.
    """

    def __init__(self, slot_bytes: int, count: int, *, pin: bool = False) -> None:
        if slot_bytes % PAGE_BYTES or slot_bytes <= 0 or count <= 0:
            raise ValueError(f"an arena of {count} slots of {slot_bytes} bytes cannot be")
        self.slot_bytes = slot_bytes
        self.count = count
        self._pin = pin
        self._memory: Bytes | None = pages(slot_bytes * count)
        # Locks of C, and not a Condition: an interrupt in its Python code would leave it locked.
        self._lock = threading.Lock()
        self._bell = threading.Lock()  # free: it has rung since somebody last waited for it
        self._slots: list[Slot | None] = [None] * count
        # last is first: a slot that was just used is warm, one that never was costs memory
        self._free = collections.OrderedDict.fromkeys(reversed(range(count)))
        self._registered: list[int] = []
        self.allocated = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the slots that were ever used."""
        return self.allocated * self.slot_bytes

    @property
    def free(self) -> int:
        """Slots that are not out."""
        with self._lock:
            return len(self._free)

    def acquire(
        self,
        prefer: int | None = None,
        *,
        wait: bool = True,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Slot | None:
        """Take a slot out: slot ``prefer`` modulo count if it is free, else the last one used.

        Returns None if none is free and ``wait`` is off, or once ``give_up()`` is true; call
        `wake` when that may have changed.
        """
        slot: Slot | None = None
        while True:
            with self._lock:
                if self._free:
                    slot = self._take(prefer)
            if slot is not None or not wait or give_up():
                break
            self._bell.acquire()
        if wait:
            self._ring()  # for others who wait: it rings once for several slots
        return slot

    def release(self, slot: Slot) -> None:
        """Give a slot back."""
        with self._lock:
            if slot.index in self._free:
                raise RuntimeError(f"slot {slot.index} was released twice")
            self._free[slot.index] = None
        self._ring()

    def reclaim(self) -> None:
        """Take all slots back, from whoever had them: nobody touches them any more.

        It needs no record of who has which. None could be right: an interrupt may come between a
        slot's being taken out and its being noted.
        """
        with self._lock:
            for index in range(self.count):
                self._free.setdefault(index)
        self._ring()

    def view(self, first: Slot, nbytes: int) -> memoryview:
        """Return ``nbytes`` from the start of a slot, on into those that follow it in memory."""
        assert self._memory is not None
        start = first.index * self.slot_bytes
        return self._memory[start : start + nbytes].data

    def wake(self) -> None:
        """Let waiting `acquire` calls look at ``give_up`` again."""
        self._ring()

    def touch(self) -> None:
        """Take all memory from the system (and pin it) now, instead of during the first save."""
        with self._lock:
            for index in self._free:
                if self._slots[index] is None:
                    slot = self._slots[index] = self._make(index)
                    # all of it, by torch's threads: one thread that touches pages takes longer
                    slot.tensor.zero_()

    def close(self) -> None:
        """Give the memory back to the system. No slot may be out."""
        with self._lock:
            for pointer in self._registered:
                torch.cuda.cudart().cudaHostUnregister(pointer)
            self._registered.clear()
            self._slots = []
            self._free.clear()
            self._memory = None  # unmapped when the last view of it is gone

    def _take(self, prefer: int | None) -> Slot:
        index = -1 if prefer is None else prefer % self.count
        if index in self._free:
            del self._free[index]
        else:
            index, _ = self._free.popitem()
        slot = self._slots[index]
        if slot is None:
            try:
                slot = self._slots[index] = self._make(index)
            except BaseException:
                self._free[index] = None
                raise
        return slot

    def _ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has rung already
            self._bell.release()

    def _make(self, index: int) -> Slot:
        assert self._memory is not None
        start = index * self.slot_bytes
        with torch.inference_mode(False):  # a slot serves saves outside of it, too
            tensor = torch.frombuffer(
                self._memory, dtype=torch.uint8, offset=start, count=self.slot_bytes
            )
        if self._pin:
            self._register(tensor)
        slot = Slot(index, tensor)
        self.allocated += 1
        return slot

    def _register(self, tensor: torch.Tensor) -> None:
        status = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0))
        if status == 0:
            self._registered.append(tensor.data_ptr())
            return
        self._pin = False
        with contextlib.suppress(RuntimeError):
            # CUDA remembers the error, and would tell it to the next kernel launch: this one
            torch.empty(1, device="cuda").fill_(0)
        warnings.warn(
            f"asyncsave could not pin {tensor.numel()} bytes for CUDA (error {status}); copies "
            "will be pageable and block longer. Raise the locked-memory limit (ulimit -l), or "
            "lower memory_limit",
            RuntimeWarning,
            stacklevel=2,
        )
