"""Everything asyncsave raises on purpose.

::

    AsyncSaveError
    ├ ConfigError              an argument that cannot be, with what can          (ValueError)
    ├ StateError               values that cannot be saved, all of them: .problems (TypeError)
    ├ ClosedError              used after close()                                 (RuntimeError)
    ├ BusyError                a save, or another Checkpointer, is at work        (RuntimeError)
    ├ CheckpointExistsError    the path is taken, overwrite is off                (FileExistsError)
    ├ SaveError                not committed; what was there before is as it was
    │ ├ StagingError           the snapshot could not be taken, or was torn
    │ └ WriteError             the operating system refused: .path, .errno
    │   └ DiskFullError        no space, or quota reached
    ├ CommitError              renamed, but not known to be on disk: outcome unknown
    └ LoadError
      ├ CheckpointNotFoundError     there is none at the path            (FileNotFoundError)
      ├ FormatError            not a checkpoint, or its records contradict        (ValueError)
      │ └ UnsupportedVersionError   written in a newer format
      ├ IntegrityError         bytes differ from their checksum: .path, .offset
      └ MismatchError          the checkpoint does not fit the state, all reasons listed

Errors of other libraries and of the operating system are translated once, where they enter, with
``raise … from``: the original is always the ``__cause__``.
"""

from __future__ import annotations

import contextlib
import errno as _errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "AsyncSaveError",
    "BusyError",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "ClosedError",
    "CommitError",
    "ConfigError",
    "DiskFullError",
    "FormatError",
    "IntegrityError",
    "LoadError",
    "MismatchError",
    "Problem",
    "SaveError",
    "StagingError",
    "StateError",
    "UnsupportedVersionError",
    "WriteError",
    "asking",
    "looking",
    "write_error",
]


class AsyncSaveError(Exception):
    """Base of all errors that asyncsave raises on purpose."""


class ConfigError(AsyncSaveError, ValueError):
    """An argument has a value that it cannot have; the text says which it can."""


class Problem(NamedTuple):
    """A value that cannot be saved.

    Attributes:
        fqn: where it is in the state; "" for the state itself.
        type: what it is, with the name of its type.
        hint: what to do about it.
    """

    fqn: str
    type: str
    hint: str

    def __str__(self) -> str:
        where = repr(self.fqn) if self.fqn else "the state itself"
        return f"{where} is a {self.type}, which asyncsave cannot save: {self.hint}"


class StateError(AsyncSaveError, TypeError):
    """Values in the state cannot be saved; the text names each by its fqn and its type.

    Attributes:
        problems: one for each of them, see `Problem`; none if what is wrong is no single value.
    """

    def __init__(self, message: str = "", problems: Sequence[Problem] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__(message or _listed(self.problems))


def _listed(problems: Sequence[Problem]) -> str:
    if len(problems) == 1:
        return str(problems[0])
    lines = [f"{len(problems)} values of the state cannot be saved:"]
    lines += [f"  {_shown(str(problem))}" for problem in problems[:50]]
    if len(problems) > 50:
        lines.append(f"  … and {len(problems) - 50} more, see .problems")
    return "\n".join(lines)


class ClosedError(AsyncSaveError, RuntimeError):
    """The Checkpointer was used after ``close()``, or in a forked child."""


class BusyError(AsyncSaveError, RuntimeError):
    """A save is in flight and ``on_busy="error"``, or another Checkpointer owns the directory."""


class CheckpointExistsError(AsyncSaveError, FileExistsError):
    """The target exists already and must not be replaced."""


class SaveError(AsyncSaveError):
    """The checkpoint was not committed. Checkpoints that were there before are untouched."""


class StagingError(SaveError):
    """The snapshot could not be taken, or a tensor changed while it was being copied."""


class WriteError(SaveError):
    """The operating system refused to create, write, sync or rename.

    Attributes:
        path: the file or directory concerned.
        errno: the system's error number, or None.
    """

    def __init__(self, message: str, *, path: Path, errno: int | None) -> None:
        super().__init__(message)
        self.path = path
        self.errno = errno


class DiskFullError(WriteError):
    """No space is left on the device, or the quota is reached."""


class CommitError(AsyncSaveError):
    """The rename happened, but the directory could not be synced: the outcome is unknown.

    The checkpoint is visible and complete now; whether it would survive a power cut is not known.
    """


class LoadError(AsyncSaveError):
    """A checkpoint could not be loaded."""


class CheckpointNotFoundError(LoadError, FileNotFoundError):
    """There is no checkpoint at the path."""


class FormatError(LoadError, ValueError):
    """The files are no checkpoint, or their records contradict each other."""


class UnsupportedVersionError(FormatError):
    """The checkpoint is in a format that this version of asyncsave does not know."""


class IntegrityError(LoadError):
    """Bytes on disk are not the bytes that were written.

    Attributes:
        path: the damaged file.
        offset: where the damaged range begins, in bytes from the start of the file.
    """

    def __init__(self, message: str, *, path: Path, offset: int) -> None:
        super().__init__(message)
        self.path = path
        self.offset = offset


class MismatchError(LoadError):
    """The checkpoint does not fit the state it should be loaded into; nothing was changed.

    Attributes:
        reasons: one line for every difference found.
    """

    def __init__(self, summary: str, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        shown = [f"  {_shown(reason)}" for reason in self.reasons[:50]]
        if len(self.reasons) > 50:
            shown.append(f"  … and {len(self.reasons) - 50} more, see .reasons")
        super().__init__("\n".join([summary, *shown]))


def _shown(reason: str) -> str:
    """Return a reason as it may be printed: it has names from a file, which nobody has chosen."""
    cut = reason if len(reason) <= 400 else f"{reason[:200]} … {reason[-200:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


_FULL = {_errno.ENOSPC, _errno.EDQUOT}


@contextlib.contextmanager
def asking(doing: str, path: Path) -> Iterator[None]:
    """Ask the system to change ``path``; what it refuses is a `WriteError`."""
    try:
        yield
    except OSError as cause:
        raise write_error(doing, path, cause) from cause


@contextlib.contextmanager
def looking(path: Path) -> Iterator[None]:
    """Look at ``path`` in order to save there; what cannot be looked at is a `WriteError`, too."""
    try:
        yield
    except LoadError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise write_error("read", path, error.__cause__) from error.__cause__


def write_error(doing: str, path: Path, cause: OSError) -> WriteError:
    """Return the SaveError that says ``cause`` in asyncsave's words; raise it ``from cause``."""
    why = os.strerror(cause.errno) if cause.errno else str(cause)
    if cause.errno in _FULL:
        return DiskFullError(
            f"cannot {doing} {path}: {why}. Free some space, keep fewer checkpoints (keep_last=), "
            "or compress (compression=1); checkpoints that were there are untouched",
            path=path,
            errno=cause.errno,
        )
    hint = {
        _errno.ENOENT: "the directory is gone: was it moved or removed?",
        _errno.EACCES: "check who owns the directory and its permissions",
        _errno.EPERM: "check who owns the directory and its permissions",
        _errno.EROFS: "the filesystem is mounted read-only",
        _errno.ENOTDIR: "a part of the path is a file, not a directory",
        _errno.EEXIST: "a part of the path is a file, not a directory",
        _errno.EIO: "the disk reports an error; see the system's log",
        _errno.EMFILE: "this process has too many open files; see ulimit -n",
    }.get(cause.errno or 0, "checkpoints that were there are untouched")
    return WriteError(f"cannot {doing} {path}: {why}; {hint}", path=path, errno=cause.errno)
