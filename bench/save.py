"""How long does one save take, first and later, with nothing beside it?

Each reading is of a process of its own, which uses one way of saving alone, so that no way finds
memory that another one has warmed, or has left none. The process makes the state, makes two
training steps, and saves; then it waits until that is done, makes two more steps, and saves again.
Processes of all ways take turns, in an order that is drawn anew in every round.

How to read it. One cell is the median, and under it the smallest and the largest value.

    first     seconds in the call, of the first save, which takes its memory from the system; that
              is fast where the machine has the memory at hand, and slow where a host must give it
    blocked   the same of later saves: of each process, their median
    durable   seconds from the call until the save is done: of later ones. "synced" says what is on
              the disk by then

Two rows are floors: a copy of the same bytes into memory that was used before, and a bare O_DIRECT
write of as many bytes from one buffer, with an fsync.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from harness import MEDIANS, Bar, Bench, Column, Results, Size, ratio, spread, table
from rich.table import Table
from training import Training
from ways import AUTO, BARE, CACHED, COPY, DCP, LEVEL_1, OFF, PREWARMED, settle, ways

BATCH, CONTEXT = 1, 64
STEPS_BETWEEN = 2
NAMES = (COPY, BARE, DCP, CACHED, OFF, PREWARMED, LEVEL_1, AUTO)


def turn(name: str, size: tuple[int, int, int], saves: int, directory: Path) -> dict[str, Any]:
    """Measure one way, in this process: one save and ``saves`` more.

    Args:
        size: layers, width and heads of the model.
    """
    training = Training(*size, batch=BATCH, context=CONTEXT)
    blocked, durable = [], []
    with tempfile.TemporaryDirectory(dir=directory) as place:
        (way,) = ways(Path(place), names=[name])
        with contextlib.closing(way):
            for save in range(saves + 1):
                for _ in range(STEPS_BETWEEN):
                    training.step()
                if save == 0:
                    way.open(training)
                begun = time.perf_counter()
                pending = way.save(training)
                blocked.append(time.perf_counter() - begun)
                pending.result()
                durable.append(time.perf_counter() - begun)
                settle(way)
    return {"blocked": blocked, "durable": durable, "state_bytes": training.state_bytes}


def summarize(name: str, synced: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a way, and every reading."""
    return {
        "name": name,
        "synced": synced,
        "first_seconds": spread(each["blocked"][0] for each in turns),
        **{
            f"{what}_seconds": spread(statistics.median(each[what][1:]) for each in turns)
            for what in ("blocked", "durable")
        },
        "turns": turns,
    }


class Save(Bench):
    name = "save"
    question = "How long does one save take, first and later, with nothing beside it?"
    sizes: ClassVar = {
        "layers": Size(19, quick=1),  # as in bench/stall.py
        "width": Size(768, quick=64),
        "heads": Size(12, quick=2),
        "rounds": Size(5, quick=1, help="processes of each way"),
        "saves": Size(3, quick=2, help="after the first"),
    }

    def measure(self) -> Results:
        options = self.options
        size = (options.layers, options.width, options.heads)
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
        for round_, name in self.turns(NAMES, options.rounds):
            found = self.apart(turn, name, size, options.saves, self.directory)
            turns[name].append(found)
            first, *later = found["blocked"]
            self.say(
                f"{round_}/{options.rounds} {name}: first {first:.3f} s, later "
                f"{statistics.median(later):.3f} s"
            )
        every = ways(self.directory, names=NAMES)
        return {
            "state_bytes": turns[OFF][0]["state_bytes"],
            "rows": [summarize(way.name, way.synced, turns[way.name]) for way in every],
        }

    def bars(self, results: Results) -> list[Bar]:
        rows = {row["name"]: row for row in results["rows"]}

        def of(name: str, figure: str) -> float:
            return float(rows[name][f"{figure}_seconds"]["median"])

        blocked, first = of(OFF, "blocked"), of(DCP, "first")
        prewarmed, durable = of(PREWARMED, "first"), of(OFF, "durable")
        return [
            Bar.of(
                "blocked, off / copy into warm memory", ratio(blocked, of(COPY, "blocked")), 1.5
            ),
            Bar.of("blocked, off / dcp.async_save", ratio(blocked, of(DCP, "blocked")), 0.5),
            *(
                Bar.of(
                    f"first, {name} / dcp.async_save's first", ratio(of(name, "first"), first), 1
                )
                for name in (OFF, LEVEL_1, AUTO)
            ),
            Bar.of("first, off, prewarmed / a later one", ratio(prewarmed, blocked), 1.5),
            Bar.of(
                "durable, off / a bare O_DIRECT write", ratio(durable, of(BARE, "durable")), 1.3
            ),
        ]

    def tables(self, results: Results) -> Iterator[Table]:
        settings = results["settings"]
        columns: dict[str, Column] = {
            "": "name",
            "first: blocked s": ("first_seconds", 3),
            "blocked s": ("blocked_seconds", 3),
            "durable s": ("durable_seconds", 3),
            "synced": "synced",
        }
        note = (
            f"{results['state_bytes'] / 1e9:.2f} GB of state, {settings['rounds']} processes each, "
            f"{settings['saves']} saves after the first\n{MEDIANS}"
        )
        yield table(results, "One save with nothing beside it", columns, note)


if __name__ == "__main__":
    sys.exit(Save().main(sys.argv[1:]))
