"""Restore: a checkpoint back into values. ``load``, ``restore`` and ``verify``.

`restore` fills what is there, all or nothing: it lists every difference before it begins
(match.py); then it reads and checks all stored bytes, into new tensors and memory held for the
purpose, lets objects that load by themselves do so (and puts them back if one refuses), and only
then fills the live tensors (leaves.py).
"""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import (
    CheckpointNotFoundError,
    ConfigError,
    FormatError,
    IntegrityError,
    LoadError,
    MismatchError,
    UnsupportedVersionError,
)
from .leaves import NewLeaves, fill_run
from .match import Match, show
from .report import VerifyReport
from .snapshot.arena import Bytes
from .snapshot.available import available_memory
from .state.nodes import (
    bulk_indices,
    select,
)
from .state.tree import unflatten
from .storage.filesystem import FileSystem, LocalFileSystem
from .storage.reader import Checkpoint, Run
from .storage.steps import find

_log = logging.getLogger("asyncsave")

PathLike = str | os.PathLike[str]
PassedOver = Callable[[Path, str], None]


def load(
    path: PathLike,
    *,
    keys: str | Sequence[str] | None = None,
    device: str | torch.device = "cpu",
) -> Any:
    """Return the state in a checkpoint as it was saved, in new tensors.

    Args:
        path: a checkpoint, or a run directory: then the newest checkpoint that verifies.
        keys: a glob or a list of globs of fqns (``"model.*"``); only the chunks they need are read.
            Dicts then have only what was asked for, and lists and tuples None in place of the rest.
        device: where tensors go; arrays and plain values stay where they are.

    Returns:
        The tree that was saved. Objects that were saved through ``state_dict()`` are what that
        returned; NamedTuples are of a new type with the same names.

    Raises:
        CheckpointNotFoundError, FormatError, IntegrityError: see `asyncsave.errors`.
        MismatchError: ``keys`` names something that is not there.
    """
    return load_from(LocalFileSystem(), Path(path), keys=keys, device=device)


def restore(path: PathLike, into: Any, *, strict: bool = True) -> int | None:
    """Fill ``into`` from a checkpoint, all or nothing, and return its step.

    Tensors and arrays are filled in place; plain values inside dicts and lists are replaced, and so
    is None by whatever was saved; an empty dict or list takes all that was saved there; objects
    with ``load_state_dict`` have it called, except that plain modules are filled in place, which
    comes to the same and needs no second copy.

    Args:
        path: a checkpoint, or a run directory: then the newest checkpoint that verifies.
        into: a state of the same structure as the one that was saved.
        strict: raise if names are missing on either side; if False, what both have is restored.
            Shapes and dtypes must agree in any case.

    Returns:
        The step, or None if the checkpoint was saved without one.

    Raises:
        MismatchError: the checkpoint does not fit; every difference is listed, nothing was changed.
        CheckpointNotFoundError, FormatError, IntegrityError: see `asyncsave.errors`. Stored bytes
            were all checked before anything was changed.
    """
    return restore_from(LocalFileSystem(), Path(path), into, strict=strict)


def verify(path: PathLike) -> VerifyReport:
    """Read and decode every byte of a checkpoint, or of all those in a run directory.

    Raises:
        IntegrityError, FormatError: the first damage found in each damaged checkpoint; if several
            are damaged, the error is the newest one's and the others are in its notes.
        CheckpointNotFoundError: there is no checkpoint.
    """
    began = time.perf_counter()
    filesystem = LocalFileSystem()
    paths, damage = [], []
    chunks = raw_bytes = stored_bytes = 0
    for each in find(filesystem, Path(path)):
        try:
            with Checkpoint.open(filesystem, each) as checkpoint:
                checkpoint.check()
                checkpoint.check_padding()
                chunks += len(checkpoint.rank.chunks)
                raw_bytes += sum(chunk.raw_length for chunk in checkpoint.rank.chunks)
                stored_bytes += checkpoint.stored_bytes
            paths.append(each)
        except LoadError as error:
            damage.append((each, error))
    if damage:
        for each, older in damage[1:]:
            damage[0][1].add_note(f"also damaged: {each}: {older}")
        raise damage[0][1]
    seconds = time.perf_counter() - began
    return VerifyReport(tuple(reversed(paths)), chunks, raw_bytes, stored_bytes, seconds)


# -- with any filesystem ----------------------------------------------------------------------


def load_from(
    filesystem: FileSystem,
    path: Path,
    *,
    keys: str | Sequence[str] | None,
    device: str | torch.device,
    passed_over: PassedOver | None = None,
) -> Any:
    """Do what `load` says; tell ``passed_over`` which checkpoints could not be used, and why."""
    where = _device(device)

    def one(checkpoint: Checkpoint) -> Any:
        tree = checkpoint.rank.tree
        if keys is not None:
            tree, unused = select(tree, keys)
            if unused:
                raise MismatchError(
                    f"{checkpoint.path} has nothing that these keys name:",
                    _suggest(checkpoint, unused),
                )
        new = NewLeaves(checkpoint.rank.tensors, sorted(set(bulk_indices(tree))))
        checkpoint.read(new.runs)
        bulk = new.values(where)
        return unflatten(tree, bulk.__getitem__)

    return _first_sound(filesystem, path, one, passed_over)


def restore_from(
    filesystem: FileSystem,
    path: Path,
    into: Any,
    *,
    strict: bool,
    passed_over: PassedOver | None = None,
) -> int | None:
    """Do what `restore` says; tell ``passed_over`` which checkpoints could not be used, and why."""

    def one(checkpoint: Checkpoint) -> int | None:
        match = Match(checkpoint, strict)
        match.root(into)
        if match.reasons:
            raise MismatchError(f"{checkpoint.path} does not fit the state:", match.reasons)
        _apply(checkpoint, match)
        return checkpoint.record.step

    step: int | None = _first_sound(filesystem, path, one, passed_over)
    return step


def _first_sound(
    filesystem: FileSystem,
    path: Path,
    use: Callable[[Checkpoint], Any],
    passed_over: PassedOver | None,
) -> Any:
    """Use the newest checkpoint that is not damaged; raise the newest one's error if all are."""
    errors: list[LoadError] = []
    for each in find(filesystem, path):
        try:
            with Checkpoint.open(filesystem, each) as checkpoint:
                result = use(checkpoint)
        except UnsupportedVersionError:
            raise  # it is sound: going on from an older one would lose work without a word
        except (IntegrityError, FormatError, CheckpointNotFoundError) as error:
            errors.append(error)
            if each != path:
                _log.warning("passed over %s: %s", each, error)
                if passed_over is not None:
                    passed_over(each, str(error))
            continue
        if errors:
            _log.warning("used %s instead", each)
        return result
    for older in errors[1:]:
        errors[0].add_note(f"and the one before: {older}")
    raise errors[0]


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as cause:
        raise ConfigError(f"device={device!r} is not a device: {cause}") from cause


def _suggest(checkpoint: Checkpoint, unused: list[str]) -> list[str]:
    import difflib

    names = [tensor.name for tensor in checkpoint.rank.tensors]
    lines = []
    for key in unused:
        close = difflib.get_close_matches(key, names, 3, 0.5) or names[:3]
        lines.append(f"{key!r}; there are {', '.join(map(repr, close))} …" if close else repr(key))
    return lines


def _apply(checkpoint: Checkpoint, match: Match) -> None:
    """Carry out a match that has no reasons against it."""
    tensors = checkpoint.rank.tensors
    nodes = [node for _, _, node in match.objects] + [node for _, node in match.values]
    new = NewLeaves(tensors, sorted({i for node in nodes for i in bulk_indices(node)}))
    fills = [fill_run(tensors[i], into) for i, into in match.fills]
    if fills:
        # every byte, and what it decodes to, before the first one of the state is changed; the
        # memory beside new and old values is taken only where it is plainly there
        hold_bytes = max(0, available_memory() - new.nbytes) // 2
        held = checkpoint.check(fill=new.runs, hold=fills, hold_bytes=hold_bytes)
    else:
        checkpoint.read(new.runs)
    bulk = new.values(torch.device("cpu"))
    new_values = [(put, unflatten(node, bulk.__getitem__)) for put, node in match.values]
    _synchronize(match)  # what is queued for these tensors must not come after the new values
    _load_objects(match, [unflatten(node, bulk.__getitem__) for _, _, node in match.objects])
    if fills:
        _fill(checkpoint, match, fills, held)
    _synchronize(match)
    for put, value in new_values:
        put(value)


def _fill(
    checkpoint: Checkpoint, match: Match, fills: list[Run], held: dict[int, Bytes] | None
) -> None:
    """Decode into the live tensors; every byte was found sound just now."""
    try:
        checkpoint.read(fills, held)
    except IntegrityError:
        # once more: there is no way back to what the tensors were
        try:
            tensors = checkpoint.rank.tensors
            checkpoint.read([fill_run(tensors[i], into) for i, into in match.fills])
        except IntegrityError as error:
            error.add_note("it was sound a moment ago, and the state is partly filled from it")
            raise


def _synchronize(match: Match) -> None:
    tensors = [into for _, into in match.fills if isinstance(into, torch.Tensor)]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def _load_objects(match: Match, states: list[Any]) -> None:
    """Call every ``load_state_dict``; when one refuses, put back those before it."""
    before: list[tuple[Any, Any]] = []
    for (each, name, _), state in zip(match.objects, states, strict=True):
        try:
            # optimizers replace their tensors, others may write into them
            old = each.state_dict() if callable(getattr(each, "state_dict", None)) else None
            if not isinstance(each, torch.optim.Optimizer):
                old = copy.deepcopy(old)
            before.append((each, old))
            if isinstance(each, torch.nn.Module):
                each.load_state_dict(state, strict=match.strict)
            else:
                each.load_state_dict(state)
        except BaseException as cause:
            for done, old in before:
                if old is not None:
                    done.load_state_dict(old)
            if not isinstance(cause, Exception):
                raise  # the user's own interrupt, now that all is as it was
            reason = f"{show(name)}: {type(each).__name__}.load_state_dict refused: {cause}"
            raise MismatchError(
                f"{match.checkpoint.path} does not fit the state:", [reason]
            ) from cause
