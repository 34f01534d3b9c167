"""Apply: carry out a match, all or nothing.

First all stored bytes are read and checked, into new tensors and memory held for the purpose; then
objects that load by themselves do so, and are put back if one refuses; only then live tensors are
filled, and last plain values replaced.
"""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

import torch

from ..available import available_memory
from ..errors import IntegrityError, MismatchError
from ..format.build import unflatten
from ..format.manifest import extent_bytes
from ..format.select import completed
from ..format.tree import Node, bulk_indices
from ..pages import Bytes
from ..reading.checkpoint import Checkpoint, Run
from ..state.values import TORCH
from .leaves import NewLeaves, fill_runs, put
from .live import Fill
from .match import Loading, Match, show
from .tangle import contradictions, untangle, value_of

_log = logging.getLogger("asyncsave")


def apply(checkpoint: Checkpoint, match: Match) -> int:
    """Carry out a match that has no reasons against it; return how many bytes it was.

    Raises:
        MismatchError: values contradict each other, or an object refused; nothing was changed.
        IntegrityError: stored bytes are damaged; nothing was changed.
    """
    tensors = checkpoint.rank.tensors
    fills, tangled = untangle(tensors, match.fills)
    nodes = [each.node for each in match.objects] + [each.node for each in match.values]
    indices = {i for node in nodes for i in bulk_indices(node)}
    indices |= {fill.index for group in tangled for fill in group if fill.index >= 0}
    new = NewLeaves(tensors, sorted(indices))
    runs = fill_runs(tensors, fills)
    if runs:
        # every byte, and what it decodes to, before the first one of the state is changed; the
        # memory beside new and old values is taken only where it is plainly there
        hold_bytes = max(0, available_memory() - new.nbytes) // 2
        held = checkpoint.check(fill=new.runs, hold=runs, hold_bytes=hold_bytes)
    else:
        checkpoint.read(new.runs)
    bulk = new.values(torch.device("cpu"))
    reasons = [why for group in tangled if len(group) > 1 for why in contradictions(group, bulk)]
    if reasons:
        raise MismatchError(f"{checkpoint.path} does not fit the state:", reasons)

    def built(node: Node) -> Any:
        return unflatten(completed(node), bulk.__getitem__, TORCH)

    new_values = [(value.put, built(value.node)) for value in match.values]
    _synchronize(match)  # what is queued for these tensors must not come after the new values
    _load_objects(checkpoint, match, [built(each.node) for each in match.objects])
    for group in tangled:
        for fill in group:
            put(fill, value_of(fill, bulk))
    if runs:
        _fill(checkpoint, fills, runs, held)
    _synchronize(match)
    for replace, value in new_values:
        replace(value)
    filled = [fill.index for fill in fills] + sorted(indices)
    return sum(extent_bytes(tensors[i]) for i in filled)


def _fill(
    checkpoint: Checkpoint, fills: list[Fill], runs: list[Run], held: dict[int, Bytes] | None
) -> None:
    """Decode into the live tensors; every byte was found sound just now."""
    try:
        checkpoint.read(runs, held)
    except IntegrityError:
        # once more: there is no way back to what the tensors were
        try:
            checkpoint.read(fill_runs(checkpoint.rank.tensors, fills))
        except IntegrityError as error:
            error.add_note("it was sound a moment ago, and the state is partly filled from it")
            raise


def _synchronize(match: Match) -> None:
    tensors = [fill.into for fill in match.fills if isinstance(fill.into, torch.Tensor)]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)


# -- objects --------------------------------------------------------------------------------------


def _load_objects(checkpoint: Checkpoint, match: Match, states: list[Any]) -> None:
    """Call every ``load_state_dict``; when one refuses, put back those before it."""
    before: list[tuple[Any, Any]] = []
    nothing = bool(match.objects) and len(match.objects) == match.found
    for each, state in zip(match.objects, states, strict=True):
        into = each.into
        try:
            # optimizers replace their tensors, others may write into them
            old = into.state_dict() if callable(getattr(into, "state_dict", None)) else None
            if not isinstance(into, torch.optim.Optimizer):
                old = copy.deepcopy(old)
            before.append((into, old))
            if isinstance(into, torch.nn.Module):
                nothing &= _load_module(match, each, state)
            else:
                into.load_state_dict(state)
                nothing = False
        except BaseException as cause:
            _put_back(before)
            if not isinstance(cause, Exception):
                raise  # the user's own interrupt, now that all is as it was
            why = str(cause) if type(cause) in _SAYS_WHY else repr(cause)
            reason = f"{show(each.name)}: {type(into).__name__}.load_state_dict refused: {why}"
            raise MismatchError(f"{checkpoint.path} does not fit the state:", [reason]) from cause
    if nothing:
        _put_back(before)
        names = [f"{show(each.name)}: took nothing of what was saved" for each in match.objects]
        raise MismatchError(f"{checkpoint.path} does not fit the state:", names)


_SAYS_WHY = (ValueError, RuntimeError, TypeError, MismatchError)


def _put_back(before: list[tuple[Any, Any]]) -> None:
    for done, old in before:
        try:
            if old is not None:
                done.load_state_dict(old)
        except Exception as error:  # the others are put back all the same
            _log.warning(
                "restore: %s could not be put back to what it was: %r", type(done).__name__, error
            )


def _load_module(match: Match, each: Loading, state: Any) -> bool:
    """Let a module load; note what it left out, and return whether that is everything."""
    strict = match.strict and match.is_left is None
    options = {"strict": strict} if not strict or _takes_strict(each.into) else {}
    result = each.into.load_state_dict(state, **options)
    prefix = f"{each.name}." if each.name else ""
    saved = set(state) if isinstance(state, dict) else set()
    # a module may leave out what it does not have: what counts is what it has and was not given
    missing = [
        key
        for key in getattr(result, "missing_keys", ())
        if key in each.keys and key not in saved
        if match.is_left is None or not match.is_left(prefix + key)
    ]
    dropped = [key for key in getattr(result, "unexpected_keys", ()) if key in saved]
    if match.strict and (missing or dropped):
        lost = ", ".join(map(repr, (missing + dropped)[:8]))
        raise ValueError(f"it would go without {lost}, of which only one side knows")
    match.missing += [prefix + key for key in missing]
    match.unexpected += [prefix + key for key in dropped]
    return bool(saved) and len(dropped) == len(saved)


def _takes_strict(module: torch.nn.Module) -> bool:
    try:
        parameters = inspect.signature(module.load_state_dict).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(each.name == "strict" or each.kind is each.VAR_KEYWORD for each in parameters)
