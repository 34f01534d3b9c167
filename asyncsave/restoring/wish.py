"""Wish: what of a checkpoint is to be restored, and how: the arguments of `restore`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from ..format.select import is_named, patterns_of


@dataclass(frozen=True, slots=True)
class Wish:
    """What of a checkpoint is to be restored, and how.

    Attributes:
        strict: a name that only one side has is a reason against it.
        patterns: globs of names in the checkpoint; None: all is asked for.
        rename: names in the checkpoint, and what they are in the state.
        cast: floating dtypes may differ.
    """

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

    def leaves_out(self, name: str) -> bool:
        """Whether what the state calls ``name`` is none of what is asked for."""
        return self.patterns is not None and not is_named(self._saved_name(name), self.patterns)

    def _saved_name(self, name: str) -> str:
        """Return what the checkpoint calls what the state calls ``name``."""
        # the longest goes first: what is inside another one's new name may have its own
        for saved, own in sorted(self.rename.items(), key=lambda pair: -len(pair[1])):
            if not own or name == own or name.startswith(f"{own}."):
                rest = name[len(own) :].lstrip(".")
                return f"{saved}.{rest}" if saved and rest else saved or rest
        return name
