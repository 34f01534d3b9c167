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
from .listing import checkpoints, verify
from .report import (
    CheckpointInfo,
    RestoreReport,
    SaveReport,
    Stats,
    TuneReport,
    TuneRow,
    VerifyReport,
)
from .restore import load, restore
from .single import save
from .state.rng import RngState
from .tune import tune

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
    "StagingError",
    "StateError",
    "Stats",
    "TuneReport",
    "TuneRow",
    "UnsupportedVersionError",
    "VerifyReport",
    "WriteError",
    "__version__",
    "checkpoints",
    "load",
    "restore",
    "save",
    "tune",
    "verify",
]
