"""Target: what a save is to become, and what is written beside its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..errors import ConfigError
from ..format.lineage import NO_LINEAGE, Lineage
from ..format.notes import encode_plain, parse_metrics
from ..storage.place import Place
from ..storage.sidecars import Files, read_sidecars
from .reuse import Earlier


@dataclass(frozen=True, slots=True)
class Notes:
    """What the user wants written beside a state.

    Attributes:
        metrics: numbers by which retention may judge it.
        metadata: what is to be found in ``checkpoint.json``, encoded.
        files: the bytes of files, by name.
    """

    metrics: Mapping[str, float | None] = field(default_factory=dict)
    metadata: object = None
    files: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(
        cls, metrics: Mapping[str, float] | None, metadata: object, files: Files | None
    ) -> Notes:
        """Return them as they are now.

        Raises:
            ConfigError, StateError: they cannot be stored.
        """
        plain = encode_plain(metadata, "metadata")
        return cls(parse_metrics(metrics), plain, read_sidecars(files))

    @property
    def nbytes(self) -> int:
        """Length of all files."""
        return sum(map(len, self.files.values()))


ReuseSetting = Literal["content", "versions", "off"]

MAX_FILE_BYTES = 4 << 30
LEAST_FILE_BYTES = 1 << 30
"""With shorter ones, whoever reads a large checkpoint would run out of descriptors."""


@dataclass(frozen=True, slots=True)
class OnDisk:
    """How checkpoints are put on the disk.

    Attributes:
        durable: files and directories are synced.
        reuse: what tells what has not changed since the last checkpoint, which is linked then and
            not written: its bytes; or torch's version counters, and then its bytes; or nothing.
        max_file_bytes: longest data file.
    """

    durable: bool = True
    reuse: ReuseSetting = "content"
    max_file_bytes: int = MAX_FILE_BYTES

    @classmethod
    def parse(cls, durable: bool, reuse: ReuseSetting, max_file_bytes: int) -> OnDisk:
        """Return it for what a user gave; ConfigError for what cannot be."""
        if reuse not in ("content", "versions", "off"):
            raise ConfigError(f"reuse={reuse!r} must be 'content', 'versions' or 'off'")
        if type(max_file_bytes) is not int or max_file_bytes < LEAST_FILE_BYTES:
            raise ConfigError(
                f"max_file_bytes={max_file_bytes!r} must be an int, and at least "
                f"{LEAST_FILE_BYTES} (1 GiB)"
            )
        return cls(durable, reuse, max_file_bytes)


@dataclass(frozen=True, slots=True)
class Target:
    """What a save is to become.

    Attributes:
        place: the checkpoint's directory.
        step: the training step, or None.
        lineage: its place in a run.
        replace: a checkpoint that is there already is replaced.
        notes: what is written beside the state.
        earlier: reads what the checkpoint may share with an earlier one, where this process has not
            saved that itself.
        then: called in the background once the checkpoint is durable, for retention.
    """

    place: Place
    step: int | None = None
    lineage: Lineage = NO_LINEAGE
    replace: bool = False
    notes: Notes = field(default_factory=Notes)
    earlier: Earlier = lambda: None
    then: Callable[[], None] = lambda: None
