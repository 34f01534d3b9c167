"""Notes: what a user wants written beside a state: its step, metrics and metadata.

Checked and copied at the call, so that what is wrong is said there, and what changes later is not
stored. Pure: no threads, no files, no clock.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import msgspec

from ..errors import ConfigError, StateError
from .tree import MAX_DEPTH

_MAX_STEP = 10**18


def parse_step(step: Any, state: Any) -> int:
    """Return ``step`` as an int.

    Raises:
        ConfigError: it is none that a checkpoint can have; or it and ``state`` were swapped.
    """
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        number = -1
    if 0 <= number < _MAX_STEP:
        return number
    if type(state) is int:
        raise ConfigError(
            f"step= is a {type(step).__name__} and state= is {state!r:.40}: were they swapped? The "
            "step comes first, as in step(7, state)"
        )
    raise ConfigError(f"step={step!r:.80} must be an int from 0 to 10**18 - 1")


def parse_metrics(metrics: Mapping[str, float] | None) -> dict[str, float | None]:
    """Return metrics as they are stored: floats, and None for what is not finite.

    Raises:
        ConfigError: one is not a number; names it.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise ConfigError(f"metrics={metrics!r:.80} must be a dict of names and numbers")
    numbers: dict[str, float | None] = {}
    for name, value in metrics.items():
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as cause:
            raise ConfigError(
                f"the metric {name!r:.80} is {_shown(value)}, which is not a number that a float "
                "can hold"
            ) from cause
        numbers[str(name)] = number if math.isfinite(number) else None
    return numbers


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:  # an int too long to print
        return f"a {type(value).__name__}"


def encode_plain(value: object, what: str) -> msgspec.Raw:
    """Return ``value`` as JSON, as it is now: what becomes of it later changes nothing.

    Raises:
        StateError: it holds something that JSON cannot say; names the place.
    """
    try:
        _refuse_not_plain(value, what, 0)
        return msgspec.Raw(msgspec.json.encode(value))
    except (TypeError, ValueError, OverflowError, RecursionError) as cause:
        if isinstance(cause, StateError):
            raise
        raise StateError(f"{what} must be plain JSON: {cause}") from cause


def _refuse_not_plain(value: object, where: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise StateError(f"{where[:80]}… is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise StateError(
                    f"{where} has the key {key!r:.80}, a {type(key).__name__}; keys must be str"
                )
            _refuse_not_plain(item, f"{where}[{key!r:.80}]", depth + 1)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _refuse_not_plain(item, f"{where}[{i}]", depth + 1)
    elif type(value) is float:
        if not math.isfinite(value):
            raise StateError(f"{where} is {value!r}, which JSON cannot say; use None or a str")
    elif value is not None and type(value) not in (str, int, bool):
        raise StateError(
            f"{where} is a {type(value).__name__}; it must be plain JSON: dicts with str keys, "
            "lists, str, numbers, bools, None. Use str(…) or float(…) of it"
        )
