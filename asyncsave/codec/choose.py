"""Choose: which level a chunk is encoded with.

``compression="auto"`` is settled per chunk, from what this run has measured so far: writing at
``w`` bytes per second takes ``1/w`` per byte uncompressed; encoding at ``e`` (all encoders
together) to a fraction ``r`` takes ``max(1/e, r/w)``, because both go on at once. The smaller wins,
with a margin for noise, so a fast disk is left alone and a slow one is helped. Pure: what was
measured is told to it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError

AUTO_LEVEL = 1
_MARGIN = 0.9  # encoding must promise a tenth, or the CPU time is better left to the training
_FADE = 0.5  # how much the last save's measurements count beside this one's
_PROBE_AFTER = 2  # frames written before the first one is encoded to see what that would bring


@dataclass(frozen=True, slots=True)
class Compression:
    """How chunks are coded.

    Attributes:
        level: 0 is off; 1 is entropy coding alone, made for floats; 2 to 22 are zstd's levels.
        byte_planes: split elements into byte planes (floats at the exponent) before zstd.
    """

    level: int = 1
    byte_planes: bool = True

    def __post_init__(self) -> None:
        if type(self.level) is not int or not 0 <= self.level <= 22:
            raise ConfigError(
                f"compression level {self.level!r} is not known: 0 is off, 1 entropy coding only, "
                "2 to 22 zstd's levels"
            )


CompressionSetting = Literal["auto", "off"] | int | Compression


def parse_compression(setting: CompressionSetting) -> Compression | None:
    """Return what a ``compression=`` argument means; None for "auto"."""
    if isinstance(setting, Compression):
        return setting
    if setting == "auto":
        return None
    if setting == "off":
        return Compression(0)
    if isinstance(setting, int) and not isinstance(setting, bool):
        return Compression(setting)
    raise ConfigError(
        f"compression={setting!r} is not known: use 'auto', 'off', a level from 0 to 22, or "
        "asyncsave.Compression(level, byte_planes)"
    )


class Chooser:
    """Picks levels. `pick` and `encoded` are called by encoders, the rest by the event loop."""

    def __init__(self, setting: Compression | None, encoders: int) -> None:
        self._fixed = None if setting is None else setting.level
        self._encoders = encoders
        self._lock = threading.Lock()
        self._frames = 0
        self._written_bytes = self._written_seconds = 0.0
        self._raw_bytes = self._stored_bytes = self._encode_seconds = 0.0
        self._probing = False

    def begin_save(self) -> None:
        """Let what earlier saves measured fade, and look at encoding afresh."""
        with self._lock:
            self._written_bytes *= _FADE
            self._written_seconds *= _FADE
            self._raw_bytes *= _FADE
            self._stored_bytes *= _FADE
            self._encode_seconds *= _FADE
            self._frames = 0
            self._probing = False

    def pick(self) -> int:
        """Return the level for the next chunk."""
        if self._fixed is not None:
            return self._fixed
        with self._lock:
            if self._frames >= _PROBE_AFTER and not self._probing:
                self._probing = True  # once in every save, so that the figures stay fresh
                return AUTO_LEVEL
            if not self._written_seconds or not self._encode_seconds:
                return 0
            write = self._written_bytes / self._written_seconds
            encode = self._raw_bytes / self._encode_seconds * self._encoders
            ratio = self._stored_bytes / self._raw_bytes
            return AUTO_LEVEL if max(1 / encode, ratio / write) < _MARGIN / write else 0

    def encoded(self, raw_bytes: int, stored_bytes: int, seconds: float) -> None:
        """Note what encoding one chunk took on one encoder, and brought."""
        with self._lock:
            self._raw_bytes += raw_bytes
            self._stored_bytes += stored_bytes
            self._encode_seconds += seconds

    def wrote(self, stored_bytes: int, seconds: float) -> None:
        """Note what writing took; the final sync counts as a write of no bytes."""
        with self._lock:
            self._frames += 1
            self._written_bytes += stored_bytes
            self._written_seconds += seconds
