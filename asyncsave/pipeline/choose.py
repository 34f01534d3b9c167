"""Choose: whether a chunk is encoded.

``compression="auto"`` is settled per chunk, from what the last chunks took: writing at ``w`` bytes
per second takes ``1/w`` per byte uncompressed; encoding at ``e`` (all encoders together) to a
fraction ``r`` takes ``max(1/e, r/w)``, because both go on at once. The smaller wins, with a margin,
so a fast disk is left alone, as it is when the training keeps the encoders from their cores, and a
slow disk is helped. What the final sync takes per byte is counted on both sides, since it begins
when encoding is over: where it is most of the time, encoding gains little.

What encoding would bring is not known before it was tried. So where it is not being done, it is
tried in every save, on a piece of the second chunk: the first one keeps the disk busy meanwhile,
and a piece is ready before that is over, which a whole chunk in memory that was never used would
not be. Nor is the disk known by the first write of all, which is often slow. Pure: what was
measured is told to it.
"""

from __future__ import annotations

import enum
import threading

from ..codec.compression import Compression

# bench/knobs.py turns all of these. Within its noise, a quarter, none wants another value: saves
# are durable after 0.7 to 0.8 s on a disk of 0.4 GB/s and after 1.9 to 2.0 s on one of 150 MB/s,
# with four times as much and with a fourth.
AUTO_LEVEL = 1
PROBE_BYTES = 4 << 20
LEAST_WRITES = 2
"""Frames that must have been written before the disk is known."""

# Encoding must promise a tenth, or the CPU time is better left to the training; a fifth is too
# much: a second save on a disk of 150 MB/s took 2.30 s then, not 2.02.
_MARGIN = 0.9
_CAUTION = 1.25  # a trial has the cores to itself; side by side, encoders are slower by as much
_FADE = 0.85  # how much a frame's measurement counts once the next one is there
_SYNC_FADE = 0.5  # the same for syncs, of which a save has one


class Pick(enum.Enum):
    """What is done with a chunk."""

    RAW = enum.auto()  # stored as it is
    PROBE = enum.auto()  # the same, but `PROBE_BYTES` of it are encoded to see what that brings
    ENCODE = enum.auto()


class Chooser:
    """Picks for each chunk. Encoders call `encoded`, the event loop all else."""

    def __init__(self, setting: Compression | None, encoders: int) -> None:
        self._fixed = None if setting is None else setting.level
        self._encoders = encoders
        self._lock = threading.Lock()
        self._picks = self._writes = 0
        self._written_bytes = self._write_seconds = 0.0
        self._synced_bytes = self._sync_seconds = 0.0
        self._raw_bytes = self._encoded_bytes = self._encode_seconds = 0.0

    @property
    def adapts(self) -> bool:
        """Whether picks depend on what was measured, so that they are best made late."""
        return self._fixed is None

    def begin_save(self) -> None:
        """Note that the next chunk is the first of a save."""
        self._picks = 0

    def pick(self) -> Pick:
        """Return what to do with the next chunk."""
        if self._fixed is not None:
            return Pick.ENCODE if self._fixed else Pick.RAW
        with self._lock:
            self._picks += 1
            if self._pays():
                return Pick.ENCODE
            return Pick.PROBE if self._picks == 2 else Pick.RAW

    def _pays(self) -> bool:
        """Whether encoding has been better than not."""
        if not self._write_seconds or not self._encode_seconds:
            return False
        write = self._write_seconds / self._written_bytes
        encode = self._encode_seconds / self._raw_bytes / self._encoders
        ratio = self._encoded_bytes / self._raw_bytes
        sync = self._sync_seconds / self._synced_bytes if self._synced_bytes else 0.0
        encoded = max(encode * _CAUTION, ratio * write) + sync
        return encoded < _MARGIN * (write + sync)

    def encoded(self, raw_bytes: int, encoded_bytes: int, seconds: float) -> None:
        """Note what encoding a chunk, or a piece of one, took on one encoder, and brought."""
        with self._lock:
            self._raw_bytes = self._raw_bytes * _FADE + raw_bytes
            self._encoded_bytes = self._encoded_bytes * _FADE + encoded_bytes
            self._encode_seconds = self._encode_seconds * _FADE + seconds

    def wrote(self, nbytes: int, seconds: float) -> None:
        """Note what writing one frame took."""
        with self._lock:
            self._writes += 1
            if self._writes < LEAST_WRITES:
                return
            self._written_bytes = self._written_bytes * _FADE + nbytes
            self._write_seconds = self._write_seconds * _FADE + seconds

    def synced(self, nbytes: int, seconds: float) -> None:
        """Note what the sync after all frames took."""
        with self._lock:
            self._synced_bytes = self._synced_bytes * _SYNC_FADE + nbytes
            self._sync_seconds = self._sync_seconds * _SYNC_FADE + seconds
