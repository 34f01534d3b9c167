"""Check: can a state be saved? ``check``."""

from __future__ import annotations

from typing import Any

from .flatten import flatten
from .layout import Layouts


def check(state: Any) -> None:
    """Raise if ``state`` holds anything that cannot be saved; copy nothing, write nothing.

    Objects in it have their ``state_dict()`` called, as in a save.

    Args:
        state: what is to be passed to `save` or to `Checkpointer.step`.

    Raises:
        StateError: it cannot be saved. The text and ``.problems`` list every value that is in the
            way: its fqn, its type, and what to do about it.
    """
    Layouts().of(flatten(state))
