"""Objects: those that load by themselves do so, all or none."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import MismatchError
from .exact import converted, is_stock, make_exact, way_back
from .match import Loading, Match, show
from .parts import Adopting
from .wish import Wish

_log = logging.getLogger("asyncsave")

_Back = Callable[[], None]

_SAYS_WHY = (ValueError, RuntimeError, TypeError, MismatchError)
"""Errors whose text says enough without their type."""


def load_objects(path: Path, match: Match, states: Sequence[Any], wish: Wish) -> None:
    """Call every ``load_state_dict``; when one refuses, all others say so, too, and are put back.

    Args:
        path: the checkpoint's.
        match: whose objects they are; what modules leave out is noted in it.
        states: what each is to load.
        wish: whether they may leave out anything.

    Raises:
        MismatchError: some refused, all of which are listed; or all took nothing of what was saved.
    """
    before: list[tuple[Any, _Back]] = []
    nothing = bool(match.objects) and len(match.objects) == match.found
    refusals: list[tuple[Loading, Exception]] = []
    try:
        for each, state in zip(match.objects, states, strict=True):
            try:
                before.append((each.into, _way_back(each.into)))
                nothing &= _load(match, each, state, wish)
            except Exception as cause:
                refusals.append((each, cause))
    except BaseException:
        _put_back(before)
        raise  # the user's own interrupt, now that all is as it was
    names = [_refused(*each) for each in refusals]
    if nothing and not refusals:
        names = [f"{show(each.name)}: took nothing of what was saved" for each in match.objects]
    if names:
        _put_back(before)
        raise MismatchError(f"{path} does not fit the state:", names) from next(
            (cause for _, cause in refusals), None
        )


def _way_back(into: Any) -> _Back:
    """Return what brings an object back to what it is now; nothing if it has no state."""
    if isinstance(into, Adopting):
        return into.way_back()
    if isinstance(into, torch.optim.Optimizer):
        return way_back(into)
    old = copy.deepcopy(into.state_dict()) if callable(getattr(into, "state_dict", None)) else None
    return lambda: None if old is None else into.load_state_dict(old)


def _put_back(before: Sequence[tuple[Any, _Back]]) -> None:
    for done, back in before:
        try:
            back()
        except Exception as error:  # the others are put back all the same
            _log.warning(
                "restore: %s could not be put back to what it was: %r", type(done).__name__, error
            )


def _refused(each: Loading, cause: Exception) -> str:
    why = str(cause) if type(cause) in _SAYS_WHY else repr(cause)
    if isinstance(each.into, Adopting):
        return f"{show(each.name)}: {why}"
    return f"{show(each.name)}: {type(each.into).__name__}.load_state_dict refused: {why}"


def _load(match: Match, each: Loading, state: Any, wish: Wish) -> bool:
    """Let an object load; return whether it took nothing of what was saved, as far as it says."""
    if isinstance(each.into, torch.nn.Module):
        return _load_module(match, each, state, wish)
    if isinstance(each.into, torch.optim.Optimizer):
        _load_optimizer(match, each, state)
    else:
        each.into.load_state_dict(state)
    return False


def _load_optimizer(match: Match, each: Loading, state: Any) -> None:
    """Let an optimizer load; note what it converts.

    Raises:
        ValueError: it has lost options without which its next step would fail.
    """
    optimizer = each.into
    known = getattr(optimizer, "defaults", {})  # others are a scheduler's, or the user's own
    options = [group.keys() & known for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except Exception as cause:
        if lost := _lost(options, state["param_groups"]):
            raise _another_kind(lost) from cause
        raise
    # asked afterwards: what was saved by an older torch lacks some, and loading sets them
    if lost := _lost(options, optimizer.param_groups):
        raise _another_kind(lost)
    if is_stock(optimizer):
        make_exact(optimizer, state, each.casts)
    else:
        match.cast_names += [_name_in(each, key) for key in converted(optimizer, state)]


def _lost(options: Sequence[set[str]], groups: Sequence[dict[str, Any]]) -> set[str]:
    """Return which options parameter groups do not have."""
    pairs = zip(options, groups, strict=False)
    return {key for own, group in pairs for key in own if key not in group}


def _another_kind(lost: set[str]) -> ValueError:
    return ValueError(
        f"its parameter groups would go without {', '.join(map(repr, sorted(lost)))}, as the "
        "checkpoint has those of another kind of optimizer: make one of that kind, or leave it out "
        "of the state and begin without its past"
    )


def _load_module(match: Match, each: Loading, state: Any, wish: Wish) -> bool:
    """Let a module load; note what it left out, and return whether that is everything.

    Raises:
        ValueError: it left out something, and may not.
    """
    strict = wish.strict and wish.patterns is None
    options = {"strict": strict} if not strict or _takes_strict(each.into) else {}
    result = each.into.load_state_dict(state, **options)
    saved = set(state) if isinstance(state, dict) else set()
    missing = _missing(result, each, saved, wish)
    dropped = [key for key in getattr(result, "unexpected_keys", ()) if key in saved]
    if wish.strict and (missing or dropped):
        lost = ", ".join(map(repr, (missing + dropped)[:8]))
        raise ValueError(f"it would go without {lost}, of which only one side knows")
    match.missing += [_name_in(each, key) for key in missing]
    match.unexpected += [_name_in(each, key) for key in dropped]
    return bool(saved) and len(dropped) == len(saved)


def _missing(result: Any, each: Loading, saved: set[Any], wish: Wish) -> list[str]:
    """Return what a module says that it has not been given, of what is asked for.

    It may leave out what it does not have: what counts is what it has, and was not given.
    """
    lacks = each.keys - saved
    keys = [key for key in getattr(result, "missing_keys", ()) if key in lacks]
    return [key for key in keys if not wish.leaves_out(_name_in(each, key))]


def _name_in(each: Loading, key: str) -> str:
    return f"{each.name}.{key}" if each.name else key


def _takes_strict(module: torch.nn.Module) -> bool:
    try:
        parameters = inspect.signature(module.load_state_dict).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(each.name == "strict" or each.kind is each.VAR_KEYWORD for each in parameters)
