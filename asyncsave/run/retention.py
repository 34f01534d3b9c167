"""Retention: which checkpoints of a run may go. Pure: no threads, no files, no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError

Direction = Literal["min", "max"]
KeepBest = tuple[str, Direction] | tuple[str, Direction, int]
Metrics = Callable[[int], float | None]
"""Gives the metric of a step; None where it has none that can be compared."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Which checkpoints stay; one rule suffices. Without rules, all stay.

    Attributes:
        last: the newest so many.
        every: those whose step is a multiple of this.
        best: (metric, "min" or "max", how many).
    """

    last: int | None = None
    every: int | None = None
    best: tuple[str, str, int] | None = None

    @classmethod
    def parse(
        cls, keep_last: int | None, keep_every: int | None, keep_best: KeepBest | None
    ) -> Policy:
        """Return the policy that a Checkpointer's arguments mean; ConfigError if none."""
        for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}={value!r} must be a positive int, or None to not use it")
        if keep_best is None:
            return cls(keep_last, keep_every, None)
        parts: list[Any] = [keep_best] if isinstance(keep_best, str) else list(keep_best)
        metric, mode, count = (parts + ["", "", 1][len(parts) :])[:3]
        if not (
            2 <= len(parts) <= 3
            and isinstance(metric, str)
            and mode in ("min", "max")
            and type(count) is int
            and count >= 1
        ):
            name = metric if isinstance(metric, str) and metric else "loss"
            raise ConfigError(
                f"keep_best={keep_best!r} must say which way is better: ({name!r}, 'min') or "
                f"({name!r}, 'max'), and may say how many, one or more: ({name!r}, 'min', 3)"
            )
        return cls(keep_last, keep_every, (metric, mode, count))

    def doomed(self, line: Sequence[int], all_steps: Sequence[int], metric: Metrics) -> list[int]:
        """Return the steps that may be pruned.

        What a rollback left is kept as long as it is among the last so many of all, so that a
        rollback by mistake can be taken back for a while. No other rule counts it.

        Args:
            line: the steps of the run's line, newest first; the newest always stays.
            all_steps: these and those that rollbacks left, newest first.
            metric: gives the one that ``best`` goes by.
        """
        if self == Policy():
            return []
        keep = set(line[:1])
        if self.last is not None:
            keep.update(line[: self.last], all_steps[: self.last])
        if self.every is not None:
            keep.update(step for step in line if step % self.every == 0)
        if self.best is not None:
            keep.update(self.best_of(line, metric)[: self.best[2]])
        return [step for step in all_steps if step not in keep]

    def best_of(self, line: Sequence[int], metric: Metrics) -> list[int]:
        """Return the steps that have the metric, the best one first; of equals, the later."""
        assert self.best is not None
        sign = 1 if self.best[1] == "min" else -1
        known = [(sign * value, -step) for step in line if (value := metric(step)) is not None]
        return [-step for _, step in sorted(known)]
