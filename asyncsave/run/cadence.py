"""Cadence: when a training loop's steps are saved."""

from __future__ import annotations

import math
import time
from typing import Any

from ..errors import ConfigError


class Cadence:
    """Says which steps are due. Called by one thread at a time.

    Args:
        every_steps: those that are a multiple of this.
        every_seconds: the first one this long after the last save began.

    Raises:
        ConfigError: not a positive number, or None.
    """

    def __init__(self, every_steps: int | None, every_seconds: float | None) -> None:
        self._every_steps = _positive("every_steps", every_steps, int)
        self._every_seconds = _positive("every_seconds", every_seconds, int, float)
        self._since = time.monotonic()

    @property
    def is_never(self) -> bool:
        """Whether no step is ever due."""
        return self._every_steps is None and self._every_seconds is None

    def restart(self) -> None:
        """Count ``every_seconds`` from now."""
        self._since = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether ``step`` is to be saved."""
        if self._every_steps is not None and step % self._every_steps == 0:
            return True
        seconds = self._every_seconds
        return seconds is not None and time.monotonic() - self._since >= seconds


def _positive(name: str, value: Any, *types: type) -> Any:
    if value is not None and (type(value) not in types or not value > 0 or math.isinf(value)):
        raise ConfigError(f"{name}={value!r} must be a positive {types[-1].__name__}, or None")
    return value
