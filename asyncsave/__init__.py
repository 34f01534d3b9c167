"""asyncsave writes PyTorch checkpoints in the background, inside a memory limit, and safely.

See `Checkpointer` for training loops; `save`, `load`, `restore` and `verify` for single
checkpoints; `tune` for which compression to use.
"""

from ._version import __version__
from .checkpointer import Checkpointer
from .codec.choose import Compression
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
from .handle import SaveHandle
from .report import RestoreReport, SaveReport, Stats, TuneReport, TuneRow, VerifyReport
from .restore import load, restore, verify
from .single import save
from .state.rng import RngState
from .tune import tune

__all__ = [
    "AsyncSaveError",
    "BusyError",
    "CheckpointExistsError",
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
    "StagingError",
    "StateError",
    "Stats",
    "TuneReport",
    "TuneRow",
    "UnsupportedVersionError",
    "VerifyReport",
    "WriteError",
    "__version__",
    "load",
    "restore",
    "save",
    "tune",
    "verify",
]
