"""Restore: a checkpoint back into values. ``load`` and ``restore``.

`restore` fills what is there, all or nothing: it lists every difference before it begins
(match.py); then it reads and checks all stored bytes, into new tensors and memory held for the
purpose, lets objects that load by themselves do so (and puts them back if one refuses), and only
then fills the live tensors (leaves.py).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import (
    ConfigError,
    IntegrityError,
    MismatchError,
)
from .leaves import NewLeaves, fill_run
from .match import Match, show
from .snapshot.arena import Bytes
from .snapshot.available import available_memory
from .state.nodes import (
    bulk_indices,
    select,
)
from .state.tree import unflatten
from .storage.filesystem import FileSystem, LocalFileSystem
from .storage.manifest import CheckpointRecord
from .storage.newest import PassedOver, first_sound
from .storage.place import PathLike, local_path
from .storage.reader import Checkpoint, Run

_log = logging.getLogger("asyncsave")


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
    return load_from(LocalFileSystem(), local_path(path), keys=keys, device=device)


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
    return restore_from(LocalFileSystem(), local_path(path), into, strict=strict)[1].step


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

    return first_sound(filesystem, path, one, passed_over)


def restore_from(
    filesystem: FileSystem,
    path: Path,
    into: Any,
    *,
    strict: bool,
    passed_over: PassedOver | None = None,
) -> tuple[Path, CheckpointRecord]:
    """Do what `restore` says, and return which checkpoint was used.

    Args:
        passed_over: told which checkpoints could not be used, and why.
    """

    def one(checkpoint: Checkpoint) -> tuple[Path, CheckpointRecord]:
        match = Match(checkpoint, strict)
        match.root(into)
        if match.reasons:
            raise MismatchError(f"{checkpoint.path} does not fit the state:", match.reasons)
        _apply(checkpoint, match)
        return checkpoint.path, checkpoint.record

    return first_sound(filesystem, path, one, passed_over)


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
