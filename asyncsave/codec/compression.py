"""Compression: what users ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError


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
