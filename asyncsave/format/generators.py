"""Generators: the state of NumPy's random generators, checked. Pure: no files, no clock."""

from __future__ import annotations

from typing import Any

import numpy as np

from .structured import of_type

_BIT_GENERATORS: dict[str, Any] = {
    each.__name__: each
    for each in (
        *(np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM),
        *(np.random.Philox, np.random.SFC64),
    )
}
# where a generator stands in its buffer: NumPy does not check it, and would read beyond it
_POSITIONS = {"MT19937": ("state", "pos", 624), "Philox": ("buffer_pos", None, 4)}


def _bits_state(value: Any) -> Any:
    """Return a bit generator's state; ValueError for one that is not NumPy's own."""
    state = value.state
    name = state["bit_generator"]
    if type(value) is not _BIT_GENERATORS.get(name):
        raise ValueError(f"its bit generator is a {type(value).__name__}, not one of NumPy's")
    return state


def checked_bits(state: Any) -> Any:
    """Return a state of one of NumPy's bit generators, if it can be one.

    Raises:
        ValueError, TypeError, LookupError: it cannot.
    """
    name = of_type(state, dict)["bit_generator"]
    if name not in _BIT_GENERATORS:
        raise ValueError(f"the bit generator {name!r:.40}")
    for row in (_POSITIONS[name],) if name in _POSITIONS else ():
        at = state[row[0]] if row[1] is None else state[row[0]][row[1]]
        if not 0 <= int(at) <= row[2]:
            raise ValueError(f"the position of a {name}")
    return state


def generator_apart(value: np.random.Generator) -> tuple[Any, Any]:
    """Return a generator's state; ValueError if it draws from a class of somebody's own."""
    return _bits_state(value.bit_generator), None


def generator(of: Any, args: Any) -> np.random.Generator:
    """Return the generator of a state; what `checked_bits` raises if there is none."""
    bits = _BIT_GENERATORS[checked_bits(of)["bit_generator"]]()
    bits.state = of
    return np.random.Generator(bits)


def random_state_apart(value: np.random.RandomState) -> tuple[Any, Any]:
    """Return a generator's state; ValueError if it is no Mersenne Twister."""
    state: Any = value.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        raise ValueError("it does not draw from a Mersenne Twister, which is all that is known")
    return state, None


def random_state(of: Any, args: Any) -> np.random.RandomState:
    """Return the generator of a state; what `checked_bits` raises if there is none."""
    made = np.random.RandomState(0)
    made.set_state(checked_bits(of))
    return made
