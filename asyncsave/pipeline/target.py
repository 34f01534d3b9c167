"""Target: what a save is to become, and what is written beside its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..format.lineage import NO_LINEAGE, Lineage
from ..format.notes import encode_plain, parse_metrics
from ..storage.place import Place
from ..storage.sidecars import Files, read_sidecars


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
    files: Mapping[str, bytes] = field(default_factory=dict)

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


@dataclass(frozen=True, slots=True)
class Target:
    """What a save is to become.

    Attributes:
        place: the checkpoint's directory.
        step: the training step, or None.
        lineage: its place in a run.
        replace: a checkpoint that is there already is replaced.
        notes: what is written beside the state.
        then: called in the background once the checkpoint is durable, for retention.
    """

    place: Place
    step: int | None = None
    lineage: Lineage = NO_LINEAGE
    replace: bool = False
    notes: Notes = field(default_factory=Notes)
    then: Callable[[], None] = lambda: None
