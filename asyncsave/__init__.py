"""asyncsave writes PyTorch checkpoints in the background, inside a memory limit, and safely.

See `Checkpointer` for training loops; `Saver` for saves to any path; `save`, `load`, `restore` and
`verify` for single checkpoints; `check` and `register` for what a state may hold; `tune` for which
compression to use; `asyncsave.numpy` to load without torch.

Each name is imported when it is first asked for: whoever only looks at checkpoints waits for no
torch, and needs none.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import numpy as numpy
    from .codec.compression import Compression
    from .errors import (
        AsyncSaveError,
        BusyError,
        CheckpointExistsError,
        CheckpointNotFoundError,
        ClosedError,
        CommitError,
        ConfigError,
        DiskFullError,
        FormatError,
        IntegrityError,
        LoadError,
        MismatchError,
        SaveError,
        StagingError,
        StateError,
        UnsupportedVersionError,
        WriteError,
    )
    from .pipeline.handle import SaveHandle
    from .reading.listing import checkpoints, verify
    from .report import CheckpointInfo, RestoreReport, SaveReport, Stats, VerifyReport
    from .restoring.restore import load, restore
    from .run.checkpointer import Checkpointer
    from .saver import Saver, save
    from .state.check import check
    from .state.classes import register
    from .state.rng import RngState
    from .tuning.measure import tune
    from .tuning.report import TuneReport, TuneRow

_ROOMS = {
    "AsyncSaveError": "errors",
    "BusyError": "errors",
    "CheckpointExistsError": "errors",
    "CheckpointInfo": "report",
    "CheckpointNotFoundError": "errors",
    "Checkpointer": "run.checkpointer",
    "ClosedError": "errors",
    "CommitError": "errors",
    "Compression": "codec.compression",
    "ConfigError": "errors",
    "DiskFullError": "errors",
    "FormatError": "errors",
    "IntegrityError": "errors",
    "LoadError": "errors",
    "MismatchError": "errors",
    "RestoreReport": "report",
    "RngState": "state.rng",
    "SaveError": "errors",
    "SaveHandle": "pipeline.handle",
    "SaveReport": "report",
    "Saver": "saver",
    "StagingError": "errors",
    "StateError": "errors",
    "Stats": "report",
    "TuneReport": "tuning.report",
    "TuneRow": "tuning.report",
    "UnsupportedVersionError": "errors",
    "VerifyReport": "report",
    "WriteError": "errors",
    "check": "state.check",
    "checkpoints": "reading.listing",
    "load": "restoring.restore",
    "register": "state.classes",
    "restore": "restoring.restore",
    "save": "saver",
    "tune": "tuning.measure",
    "verify": "reading.listing",
}
_MODULES = ("errors", "numpy", "report")  # not in __all__: a star must not hide NumPy

__all__ = [
    "AsyncSaveError",
    "BusyError",
    "CheckpointExistsError",
    "CheckpointInfo",
    "CheckpointNotFoundError",
    "Checkpointer",
    "ClosedError",
    "CommitError",
    "Compression",
    "ConfigError",
    "DiskFullError",
    "FormatError",
    "IntegrityError",
    "LoadError",
    "MismatchError",
    "RestoreReport",
    "RngState",
    "SaveError",
    "SaveHandle",
    "SaveReport",
    "Saver",
    "StagingError",
    "StateError",
    "Stats",
    "TuneReport",
    "TuneRow",
    "UnsupportedVersionError",
    "VerifyReport",
    "WriteError",
    "__version__",
    "check",
    "checkpoints",
    "load",
    "register",
    "restore",
    "save",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        room = importlib.import_module(f".{_ROOMS[name]}", __name__)
    except ModuleNotFoundError as cause:
        if cause.name != "torch":
            raise
        raise ModuleNotFoundError(
            f"asyncsave.{name} needs torch, which is not here: pip install torch. To read a "
            "checkpoint without it: asyncsave.numpy.load(path)",
            name="torch",
        ) from cause
    value = globals()[name] = getattr(room, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
