"""Budget: how a limit is divided among slots, frames and encoders, and what holds them.

Who calls what: who saves fits, when no save is in flight; the background closes, at its end; the
arenas and the queue of encoders are for everybody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..available import available_memory
from ..codec.compression import Compression
from ..codec.frame import Encoder, encoder_bytes
from ..errors import ConfigError, StagingError
from ..pages import padded
from ..snapshot.arena import Arena
from .choose import AUTO_LEVEL

MemoryLimit = int | str
"""Bytes, a text as "2GB", or "auto"."""

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kmgt]i?b|b)", re.IGNORECASE)
_UNITS = {
    "b": 1,
    **{f"{prefix}b": 1000 ** (i + 1) for i, prefix in enumerate("kmgt")},
    **{f"{prefix}ib": 1024 ** (i + 1) for i, prefix in enumerate("kmgt")},
}

CHUNK_BYTES = 16 << 20
"""Longest chunk. From 4 to 64 MiB make no difference (bench/knobs.py chunk): 0.08 to 0.10 s blocked
for 512 MiB; 1 MiB blocks for 0.14. With O_DIRECT alone: 1.65 GB/s in writes of 16 MiB, 1.48 of 4.
"""

MIN_CHUNK_BYTES = 64 << 10
_MIN_SLOTS = 2
# With fewer, staging waits for single chunks, and smaller ones serve better. Measured, 512 MiB in
# 128 MiB of memory (bench/knobs.py slots): blocked for 0.55 s with 8, 1.27 with 4, 0.72 with 2,
# 1.01 with 16.
_PREFERRED_SLOTS = 8
_HEAP_RESERVE_BYTES = 3 << 20
"""Kept free for what encoding takes from the heap beside what is counted: measured, 2.7 MiB.

A third of it without encoding: measured, 0.7 MiB. With 3 MiB a save at level 1 stays 12 MiB below
the limit, with 1 MiB 2.2 (bench/knobs.py around).
"""


@dataclass(frozen=True, slots=True)
class Budget:
    """How memory is used. All lengths in bytes.

    Attributes:
        chunk_bytes: longest chunk.
        slot_bytes: length of a slot, and of a frame buffer.
        slots: how many chunks can be staged at once.
        frames: how many encoded chunks can wait to be written; 0 where nothing is encoded.
        encoders: threads that encode.
        encoder_bytes: what one encoder holds.
    """

    chunk_bytes: int
    slot_bytes: int
    slots: int
    frames: int
    encoders: int
    encoder_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.slot_bytes * (self.slots + self.frames) + self.encoder_bytes * self.encoders * (
            self.frames > 0
        )

    def fits_in(self, other: Budget) -> bool:
        """Whether memory that was divided like ``other`` serves as well, so that it can stay."""
        return (
            self.chunk_bytes == other.chunk_bytes
            and self.slot_bytes <= other.slot_bytes
            and self.slots <= other.slots
        )


def encoder_threads() -> int:
    """Return how many encoders this machine gets: one less than its cores, four at most.

    One core is the training thread's. Measured on 2 cores at level 1, one encoder against two: a
    loop of pure Python beside a save keeps 96 % of its speed, not 81; a training that uses all
    cores loses the same 1.4 s to 1.62 GB, which are durable after 2.0 s, not 1.5. Four entropy-only
    encoders outrun any disk that was measured.
    """
    return max(1, min(4, len(os.sched_getaffinity(0)) - 1))


def parse_limit(limit: MemoryLimit) -> int | Literal["auto"]:
    """Return ``limit`` in bytes: an int, or text as "2GB" (10⁹) or "512 MiB" (2²⁰); or "auto"."""
    if limit == "auto" or (type(limit) is int and limit > 0):
        return limit  # type: ignore[return-value]
    size = _SIZE.fullmatch(limit.strip()) if isinstance(limit, str) else None
    if size and (nbytes := int(float(size[1]) * _UNITS[size[2].lower()])) > 0:
        return nbytes
    raise ConfigError(
        f"memory_limit={limit!r} must be 'auto', or a positive number of bytes: an int, or a text "
        "such as '2GB' or '512MiB'"
    )


def divide(
    limit: int | Literal["auto"], groups: Sequence[int], setting: Compression | None, held: int
) -> Budget:
    """Return the budget for a state.

    Args:
        limit: ``memory_limit``; "auto" takes the whole state if that is at most half of the memory
            that is available, else that half.
        groups: bytes of each group of the state's layout; a group begins a chunk of its own.
        setting: the compression; None for "auto".
        held: what the pipeline holds already, and will give back first.

    Raises:
        ConfigError: the limit is too small for even the smallest chunks.
    """
    allowed = (available_memory() + held) // 2 if limit == "auto" else limit
    encodes = setting is None or setting.level > 0
    allowed -= min(_HEAP_RESERVE_BYTES if encodes else _HEAP_RESERVE_BYTES // 3, allowed // 5)
    best: Budget | None = None
    least = 0
    for chunk_bytes in _halves(CHUNK_BYTES, MIN_CHUNK_BYTES):
        for encoders in sorted({encoder_threads(), 1}, reverse=True):
            wanted = _wanted(chunk_bytes, encoders, groups, setting)
            beside = wanted.total_bytes - wanted.slots * wanted.slot_bytes
            slots = min(wanted.slots, (allowed - beside) // wanted.slot_bytes)
            fitted = dataclasses.replace(wanted, slots=slots)
            if slots >= min(wanted.slots, _PREFERRED_SLOTS):
                return fitted
            fewest = min(wanted.slots, _MIN_SLOTS)
            least = beside + fewest * wanted.slot_bytes
            if slots >= fewest and (best is None or slots > best.slots):
                best = fitted
    if best is None:
        raise ConfigError(
            f"memory_limit={limit!r} allows {allowed} bytes, too few to save this state with this "
            f"compression: that takes at least {least}"
        )
    return best


def _halves(largest: int, smallest: int) -> Iterator[int]:
    while largest >= smallest:
        yield largest
        largest //= 2


def _wanted(
    chunk_bytes: int, encoders: int, groups: Sequence[int], setting: Compression | None
) -> Budget:
    """Return the budget with slots for the whole state."""
    level = AUTO_LEVEL if setting is None else setting.level
    byte_planes = setting is None or setting.byte_planes
    slot_bytes = padded(min(chunk_bytes, max(groups, default=1)))
    slots = max(1, sum(-(-nbytes // chunk_bytes) for nbytes in groups))
    if level == 0:
        return Budget(chunk_bytes, slot_bytes, slots, 0, encoders, 0)
    each_bytes = encoder_bytes(level, slot_bytes, byte_planes)
    # A frame is encoded into by each encoder, one is being written, one waits. Measured, 647 MiB
    # with one encoder: 0.54 s with 3 frames, 0.58 with 2, 0.57 with 4, 0.60 with 5.
    return Budget(chunk_bytes, slot_bytes, slots, encoders + 2, encoders, each_bytes)


class Memory:
    """Slots, frames and encoders for states of one kind, kept until a state needs others.

    Attributes:
        budget: how the limit is divided; None before the first `fit`.
        slots: where chunks are staged.
        frames: where they are encoded; None where nothing is.
        encoders: those that are not at work.
    """

    def __init__(self, limit: int | Literal["auto"], compression: Compression | None) -> None:
        self._limit = limit
        self._compression = compression
        self._fitted: tuple[tuple[int, ...], bool] | None = None
        self.budget: Budget | None = None
        self.slots: Arena | None = None
        self.frames: Arena | None = None
        self.encoders: queue.SimpleQueue[Encoder] = queue.SimpleQueue()

    @property
    def chunk_bytes(self) -> int:
        """Longest chunk that fits a slot; after `fit`."""
        assert self.budget is not None
        return self.budget.chunk_bytes

    @property
    def nbytes(self) -> int:
        """Slots and frames that were ever used, and encoders, in bytes."""
        arenas = sum(arena.nbytes for arena in self.arenas)
        budget = self.budget
        return arenas + (budget.encoders * budget.encoder_bytes if budget and budget.frames else 0)

    @property
    def arenas(self) -> list[Arena]:
        """Those there are."""
        return [arena for arena in (self.slots, self.frames) if arena is not None]

    def fit(self, groups: tuple[int, ...], *, pin: bool, let_go: Callable[[], None]) -> None:
        """Make all fit a layout whose groups have these lengths; what is there stays, if it does.

        Args:
            let_go: called before slots are replaced, for whoever keeps views of them.

        Raises:
            ConfigError: the limit is too small for this state.
            StagingError: there is not as much memory as the limit allows. Nothing is held then.
        """
        if (groups, pin) == self._fitted:
            return
        budget = divide(self._limit, groups, self._compression, self.nbytes)
        if (
            self._fitted is None
            or self._fitted[1] != pin
            or self.budget is None
            or not budget.fits_in(self.budget)
        ):
            let_go()
            self.close()
            try:
                self._take(budget, pin=pin)
            except (OSError, MemoryError) as cause:
                self.close()
                raise StagingError(
                    f"the system does not give the {budget.total_bytes} bytes of memory that "
                    f"saving this state was to take (memory_limit={self._limit!r}): {cause}; lower "
                    "memory_limit, or raise what limits the process (ulimit -v, ulimit -d)"
                ) from cause
        self._fitted = groups, pin

    def _take(self, budget: Budget, *, pin: bool) -> None:
        self.budget = budget
        self.slots = Arena(budget.slot_bytes, budget.slots, pin=pin)
        if budget.frames:
            self.frames = Arena(budget.slot_bytes, budget.frames)
            setting = self._compression or Compression(AUTO_LEVEL)
            for _ in range(budget.encoders):
                encoder = Encoder(setting.level, budget.slot_bytes, setting.byte_planes)
                self.encoders.put(encoder)

    def close(self) -> None:
        """Give everything back to the system."""
        self._fitted = None  # first: what is closed by half, after an interrupt, serves nobody
        for arena in self.arenas:
            arena.close()
        self.slots = self.frames = self.budget = None
        with contextlib.suppress(queue.Empty):
            while True:
                self.encoders.get_nowait()
