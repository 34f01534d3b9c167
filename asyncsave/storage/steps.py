"""Steps: the checkpoints in a run directory, by their names."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import IntegrityError, LoadError
from .filesystem import FileSystem
from .manifest import CHECKPOINT_FILE

STEP = re.compile(r"step-([0-9]{9,18})")
"""The names of checkpoints in a run directory."""


def step_path(directory: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` is, or would be."""
    return directory / f"step-{step:09d}"


def check_name(path: Path, step: int | None) -> None:
    """Raise IntegrityError if the checkpoint at ``path`` has the name of another one's step.

    Who asks for a step must not be given another. Names that are none of a step's are as good as
    any, and so is a checkpoint that was saved without one.
    """
    named = STEP.fullmatch(path.name)
    if named and step is not None and step != int(named[1]):
        raise IntegrityError(
            f"{path} is the checkpoint of step {step} under another one's name; rename it to "
            f"{step_path(path.parent, step).name}, or to what does not name a step",
            path=path / CHECKPOINT_FILE,
            offset=0,
        )


def list_steps(filesystem: FileSystem, directory: Path) -> list[int]:
    """Return the steps of all committed checkpoints, ascending; [] where there is no directory.

    Raises:
        LoadError: the directory cannot be read.
    """
    steps = []
    try:
        for name in filesystem.list_directory(directory):
            match = STEP.fullmatch(name)
            if not match or step_path(directory, int(match[1])).name != name:
                continue
            if filesystem.is_directory(directory / name):
                steps.append(int(match[1]))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as cause:
        raise LoadError(f"{directory} cannot be read: {cause.strerror}") from cause
    except ValueError as cause:  # a NUL in the path
        raise LoadError(f"{directory} cannot be looked into: {cause}") from cause
    return sorted(steps)
