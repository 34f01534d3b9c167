"""Restore: a checkpoint back into values. ``load`` and ``restore``.

`restore` fills what is there, all or nothing: it lists every difference before it begins
(matcher.py), and only then carries it out (apply.py). Here is also which checkpoint is used, and
what is said of it afterwards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, MismatchError
from ..format.build import unflatten
from ..format.names import refuse_unused, some
from ..format.records import CheckpointRecord
from ..format.select import completed, select
from ..format.tree import CONTAINERS, TensorNode, bulk_indices
from ..reading.checkpoint import Checkpoint
from ..reading.newest import PassedOver, first_sound, note_loaded
from ..report import RestoreReport, gb
from ..state.values import TORCH
from ..storage.place import PathLike, Place, place_of
from .apply import apply
from .match import Edit, Match
from .matcher import match_state
from .new import NewLeaves
from .rename import renamed
from .wish import Wish

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
        ConfigError: ``device`` is none that is here.
        CheckpointNotFoundError, FormatError, IntegrityError: see `asyncsave.errors`.
        MismatchError: ``keys`` names something that is not there.
    """
    return load_from(place_of(path), keys=keys, device=device)


def restore(
    path: PathLike,
    into: Any,
    *,
    strict: bool = True,
    keys: str | Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    cast: bool = False,
    report: Callable[[RestoreReport], None] | None = None,
) -> int | None:
    """Fill ``into`` from a checkpoint, all or nothing, and return its step.

    Tensors and arrays are filled in place, and nothing beside their own elements; plain values
    inside dicts and lists, None included, are replaced by whatever was saved there; an empty dict
    or list takes all that was saved there. A number fills a tensor without dimensions that can hold
    it exactly. Objects with ``load_state_dict`` have it called, except that plain modules are
    filled in place, which comes to the same and needs no second copy. A module that only one side
    wraps (``torch.compile``, DDP) is the same module.

    Plain values are replaced where they are, in ``into``: ``{"step": step}`` does not change the
    variable ``step``, so read it from the dict again.

    Args:
        path: a checkpoint, or a run directory: then the newest checkpoint that verifies.
        into: a state of the same structure as the one that was saved.
        strict: raise if names are missing on either side; if False, what both have is restored,
            which must be something. Shapes must agree in any case.
        keys: a glob or a list of globs of fqns in the checkpoint, as in `load`: only what they
            name is restored, and all else on either side is left alone.
        rename: names in the checkpoint, and what they are in ``into``, for example
            ``{"model.transformer": "body.encoder"}``; all below a name goes with it, and ``""`` is
            the whole.
        cast: convert tensors, and those of optimizers, from one floating dtype to another where
            they differ, which may round; other dtypes are never converted. Objects that load in
            their own way may convert all the same; the report names what an optimizer does.
        report: called at the end with a `RestoreReport`, which lists what was restored.

    Returns:
        The step, or None if the checkpoint was saved without one.

    Raises:
        MismatchError: the checkpoint does not fit; every difference is listed, nothing was changed.
            Objects are asked last, when nothing else is against it; then all that refuse are.
        CheckpointNotFoundError, FormatError, IntegrityError: see `asyncsave.errors`. Stored bytes
            were all checked before anything was changed.
    """
    wish = Wish.parse(strict=strict, keys=keys, rename=rename, cast=cast)
    return restore_from(place_of(path), into, wish, report=report)


# -- at any place -----------------------------------------------------------------------------


def load_from(
    place: Place,
    *,
    keys: str | Sequence[str] | None,
    device: str | torch.device,
    passed_over: PassedOver | None = None,
) -> Any:
    """Do what `load` says; tell ``passed_over`` which checkpoints could not be used, and why."""
    where = _device(device)

    def use(checkpoint: Checkpoint) -> Any:
        tree = checkpoint.tree
        if keys is not None:
            tree, unused = select(tree, keys)
            refuse_unused(checkpoint.path, checkpoint.tree, unused, "keys")
            tree = completed(tree)
        new = NewLeaves([checkpoint.leaves[i] for i in sorted(set(bulk_indices(tree)))])
        checkpoint.read(new.fills)
        bulk = new.values(where)
        state = unflatten(tree, bulk.__getitem__, TORCH)
        note_loaded(checkpoint)
        return state

    return first_sound(place, use, passed_over)


def restore_from(
    place: Place,
    into: Any,
    wish: Wish,
    *,
    report: Callable[[RestoreReport], None] | None = None,
    passed_over: PassedOver | None = None,
    restored: Callable[[Path, CheckpointRecord], None] = lambda *_: None,
) -> int | None:
    """Do what `restore` says.

    Args:
        passed_over: told which checkpoints could not be used, and why.
        restored: told which one was, as soon as the state is filled.
    """
    began = time.perf_counter()

    def use(checkpoint: Checkpoint) -> RestoreReport:
        match = _match(checkpoint, into, wish)
        nbytes = apply(checkpoint, match, wish)
        note_loaded(checkpoint)
        restored(checkpoint.path, checkpoint.record)
        done = RestoreReport(
            path=checkpoint.path,
            step=checkpoint.record.step,
            loaded=_loaded(match),
            missing=tuple(match.missing),
            unexpected=tuple(match.unexpected),
            cast=tuple(match.cast_names),
            seconds=time.perf_counter() - began,
        )
        _tell(done, match, nbytes, wish)
        return done

    done = first_sound(place, use, passed_over)
    if report is not None:
        report(done)
    return done.step


def _match(checkpoint: Checkpoint, into: Any, wish: Wish) -> Match:
    """Return what is to be done.

    Raises:
        MismatchError: it cannot be done; nothing was changed.
    """
    tree = checkpoint.tree
    if wish.patterns is not None:
        tree, unused = select(tree, wish.patterns)
        refuse_unused(checkpoint.path, checkpoint.tree, unused, "keys")
    tree, absent, reasons = renamed(tree, into, wish.rename)
    refuse_unused(checkpoint.path, checkpoint.tree, absent, "rename")
    match = match_state(into, tree, checkpoint.leaves, wish, reasons)
    if match.reasons:
        raise MismatchError(f"{checkpoint.path} does not fit the state:", match.reasons)
    return match


def _loaded(match: Match) -> tuple[str, ...]:
    names = [target.name for target in match.targets]
    names += [each.name for each in match.objects]
    return (*names, *(edit.name for edit in match.edits))


def _tell(done: RestoreReport, match: Match, nbytes: int, wish: Wish) -> None:
    """Log what was restored, in one line, and what surprisingly was not."""
    for name in () if wish.strict else match.untouched():
        _log.warning("restore: %s has nothing of %r, which stays as it was", done.path, name)
    for name in match.copies:
        _log.warning(
            "restore: %s is what an optimizer's state_dict() returned, and the optimizer does not "
            "look at it again: pass the optimizer itself, or call its load_state_dict() with this",
            name,
        )
    step = "" if done.step is None else f"step {done.step} from "
    parts = [f"{len(match.targets)} tensors and {len(match.objects)} objects"]
    parts[0] += f", {gb(nbytes)} in {done.seconds:.2f} s"
    if replaced := [edit.name for edit in match.edits if edit.name and _is_read_anew(edit)]:
        # a variable that the value came from is not changed: whoever wonders finds it here
        parts.append(f"replaced in the state: {some(replaced)}")
    for what in ("missing", "unexpected", "cast"):
        if names := getattr(done, what):
            parts.append(f"{len(names)} {what}: {some(names)}")
    _log.info("restored %s%s: %s", step, done.path, "; ".join(parts))


def _is_read_anew(edit: Edit) -> bool:
    """Whether a value is a plain one at the root of the state."""
    return "." not in edit.name and not isinstance(edit.node, (*CONTAINERS, TensorNode))


def _device(device: str | torch.device) -> torch.device:
    """Return a device that is there: else this would be found after all was read."""
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, TypeError, AssertionError, ImportError) as cause:  # as backends say it
        raise ConfigError(f"device={device!r} is not a device here: {cause}") from cause
    return where
