"""Restore: a checkpoint back into values. ``load`` and ``restore``.

`restore` fills what is there, all or nothing: it lists every difference before it begins
(match.py), and only then carries it out (apply.py). Here is also which checkpoint is used, and what
is said of it afterwards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, MismatchError
from ..format.build import unflatten
from ..format.manifest import CheckpointRecord
from ..format.names import refuse_unused, some
from ..format.select import OMITTED, is_named, patterns_of, select
from ..format.tree import CONTAINERS, TensorNode, bulk_indices
from ..reading.checkpoint import Checkpoint
from ..reading.newest import PassedOver, first_sound
from ..report import RestoreReport, gb
from ..state.values import TORCH
from ..storage.filesystem import FileSystem, LocalFileSystem
from ..storage.place import PathLike, local_path
from .apply import apply
from .leaves import NewLeaves
from .match import Match, Value
from .rename import renamed

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
        cast: convert tensors from one floating dtype to another where they differ, which may round;
            other dtypes are never converted.
        report: called at the end with a `RestoreReport`, which lists what was restored.

    Returns:
        The step, or None if the checkpoint was saved without one.

    Raises:
        MismatchError: the checkpoint does not fit; every difference is listed, nothing was changed.
        CheckpointNotFoundError, FormatError, IntegrityError: see `asyncsave.errors`. Stored bytes
            were all checked before anything was changed.
    """
    wish = Wish.parse(strict=strict, keys=keys, rename=rename, cast=cast)
    return restore_from(LocalFileSystem(), local_path(path), into, wish, report=report)


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
            refuse_unused(checkpoint.path, checkpoint.rank.tree, unused, "keys")
        new = NewLeaves(checkpoint.rank.tensors, sorted(set(bulk_indices(tree))))
        checkpoint.read(new.runs)
        bulk = new.values(where)
        return unflatten(tree, bulk.__getitem__, TORCH)

    return first_sound(filesystem, path, one, passed_over)


@dataclass(frozen=True, slots=True)
class Wish:
    """What of a checkpoint is to be restored, and how: the arguments of `restore`."""

    strict: bool
    patterns: tuple[str, ...] | None
    rename: Mapping[str, str]
    cast: bool

    @classmethod
    def parse(
        cls,
        *,
        strict: bool,
        keys: str | Sequence[str] | None,
        rename: Mapping[str, str] | None,
        cast: bool,
    ) -> Wish:
        """Return the wish, if the arguments can be.

        Raises:
            ConfigError: they cannot.
        """
        names = dict(rename or {}) if isinstance(rename, Mapping | None) else {None: None}
        if not all(isinstance(name, str) for name in (*names, *names.values())):
            raise ConfigError(
                f"rename={rename!r} must be a dict of names in the checkpoint and in the state, as "
                "in {'model.transformer': 'body.encoder'}"
            )
        patterns = None if keys is None else tuple(patterns_of(keys))
        return cls(strict, patterns, names, cast)

    def match(self, checkpoint: Checkpoint, into: Any) -> Match:
        """Return what is to be done.

        Raises:
            MismatchError: it cannot be done; nothing was changed.
        """
        tree = checkpoint.rank.tree
        if self.patterns is not None:
            tree, unused = select(tree, self.patterns, OMITTED)
            refuse_unused(checkpoint.path, checkpoint.rank.tree, unused, "keys")
        tree, absent, reasons = renamed(tree, into, self.rename)
        refuse_unused(checkpoint.path, checkpoint.rank.tree, absent, "rename")
        is_left = None if self.patterns is None else self._is_left
        match = Match(checkpoint.rank.tensors, self.strict, self.cast, is_left, reasons)
        if not reasons:
            match.root(into, tree)
        if match.reasons:
            raise MismatchError(f"{checkpoint.path} does not fit the state:", match.reasons)
        return match

    def _is_left(self, name: str) -> bool:
        """Whether the keys do not name what the state calls ``name``."""
        for saved, own in self.rename.items():
            if not own or name == own or name.startswith(f"{own}."):
                rest = name[len(own) :].lstrip(".")
                name = f"{saved}.{rest}" if saved and rest else saved or rest
                break
        return not is_named(name, self.patterns or ())


def restore_from(
    filesystem: FileSystem,
    path: Path,
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

    def one(checkpoint: Checkpoint) -> RestoreReport:
        match = wish.match(checkpoint, into)
        nbytes = apply(checkpoint, match)
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
        _tell(done, match, nbytes)
        return done

    done = first_sound(filesystem, path, one, passed_over)
    if report is not None:
        report(done)
    return done.step


def _loaded(match: Match) -> tuple[str, ...]:
    named = [fill.name for fill in match.fills]
    named += [each.name for each in match.objects]
    return (*named, *(each.name for each in match.values if each.name is not None))


def _tell(done: RestoreReport, match: Match, nbytes: int) -> None:
    """Log what was restored, in one line, and what surprisingly was not."""
    for name in () if match.strict else match.untouched():
        _log.warning("restore: %s has nothing of %r, which stays as it was", done.path, name)
    for name in match.copies:
        _log.warning(
            "restore: %s is what an optimizer's state_dict() returned, and the optimizer does not "
            "look at it again: pass the optimizer itself, or call its load_state_dict() with this",
            name,
        )
    step = "" if done.step is None else f"step {done.step} from "
    parts = [f"{len(match.fills)} tensors and {len(match.objects)} objects"]
    parts[0] += f", {gb(nbytes)} in {done.seconds:.2f} s"
    if replaced := [each.name for each in match.values if each.name and _is_read_anew(each)]:
        # a variable that the value came from is not changed: whoever wonders finds it here
        parts.append(f"replaced in the state: {some(replaced)}")
    for what in ("missing", "unexpected", "cast"):
        if names := getattr(done, what):
            parts.append(f"{len(names)} {what}: {some(names)}")
    _log.info("restored %s%s: %s", step, done.path, "; ".join(parts))


def _is_read_anew(value: Value) -> bool:
    """Whether a value is a plain one at the root of the state."""
    assert value.name is not None
    return "." not in value.name and not isinstance(value.node, (*CONTAINERS, TensorNode))


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as cause:
        raise ConfigError(f"device={device!r} is not a device: {cause}") from cause
