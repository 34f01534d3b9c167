"""What do many small tensors cost?

A state of 1,000, 10,000, 20,000 and 100,000 tensors of 1 KiB on the CPU is saved by one way of
saving after the other. The bytes are nothing here (20 MB at most times); what is measured is what
each tensor costs by itself.

How it is measured. Every round saves once in each way, in an order that is drawn anew; before each
save, outside the measured time, the last checkpoint is deleted, the disks are synced, and garbage
is collected, so that no way pays for another's. The first save of each way at each size is reported
apart (asyncsave plans then, and later only compares); medians are over the others. A way that
took long at one size is left out at the next, if by its growth a save would take longer than
LONGEST_SECONDS, and its row says so.

How to read it.

    blocked    seconds in the call
    per tensor the median of blocked, in microseconds, by the number of tensors; a way whose figure
               stays the same grows in proportion
    done       seconds from the call until the background is done; for ``torch.save`` with the sync
               of file and directory, which the row's name says; ``dcp.async_save`` syncs files only
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from harness import MEDIANS, Bar, Bench, Column, Results, Size, cell, ratio, spread, table
from rich.table import Table
from training import State
from ways import DCP, OFF, TORCH, AsyncSave, Way, settle, ways

NAMES = (TORCH, DCP, OFF)
COUNTS = (1_000, 10_000, 20_000, 100_000)
QUICK_COUNTS = (20, 200)
ELEMENTS = 256  # of fp32: 1 KiB
LONGEST_SECONDS = 40.0  # that one save may be expected to take
BUDGET_SECONDS = 60.0  # for one way at one size; then it has fewer saves than asked for
BAR_COUNT, BAR_SECONDS, BAR_SHARE = 20_000, 0.1, 1 / 5


Sample = dict[str, float]
"""One save: "blocked_seconds" and "done_seconds", from its call."""


@dataclass(slots=True)
class Row:
    """One way of saving one number of tensors; ``samples[0]`` is its first save."""

    way: str
    count: int
    samples: list[Sample] = field(default_factory=list)
    why: str | None = None


def state_of(count: int) -> State:
    """Return a state of so many tensors of 1 KiB, named as layers name theirs."""
    values = torch.randn(count, ELEMENTS, generator=torch.Generator().manual_seed(0))
    named = {f"layers.{i // 4}.weight.{i % 4}": values[i].clone() for i in range(count)}
    return State({"model": named})


# -- measuring --------------------------------------------------------------------------------


def sample(way: Way, state: State) -> Sample:
    """Measure one save."""
    settle(way)
    gc.collect()
    state.steps += 1
    began = time.perf_counter()
    pending = way.save(state)
    blocked = time.perf_counter() - began
    pending.result()
    return {"blocked_seconds": blocked, "done_seconds": time.perf_counter() - began}


def leave_out(row: Row, before: list[Row]) -> None:
    """Say why a row is not measured, if by what smaller ones took it would take too long."""
    smaller = [each for each in before if each.way == row.way]
    if not smaller:
        return
    if smaller[-1].why is not None:
        row.why = f"left out, as {smaller[-1].count} were"
        return
    seconds = [min(sample["done_seconds"] for sample in each.samples) for each in smaller[-2:]]
    expected = seconds[-1] * row.count / smaller[-1].count
    if len(seconds) == 2:  # worse than in proportion: that goes on
        growth = seconds[1] / seconds[0] / (smaller[-1].count / smaller[-2].count)
        expected *= max(1.0, growth)
    if expected > LONGEST_SECONDS:
        row.why = f"left out: one save would take about {expected:.0f} s"


# -- results ----------------------------------------------------------------------------------


def summarize(row: Row) -> dict[str, Any]:
    """Return the row's figures: of the first save, and medians with spread of the others."""
    warm = row.samples[1:]
    blocked, done = (
        spread(each[figure] for each in warm) if warm else None
        for figure in ("blocked_seconds", "done_seconds")
    )
    return {
        "name": f"{row.way}, {row.count:,}",
        "way": row.way,
        "tensors": row.count,
        "why": row.why,
        "saves": len(warm),
        "first": row.samples[0] if row.samples else None,
        "blocked_seconds": blocked,
        "done_seconds": done,
        "blocked_us_per_tensor": blocked["median"] / row.count * 1e6 if blocked else None,
        "samples": row.samples,
    }


class Many(Bench):
    name = "many"
    question = "What do many small tensors cost?"
    sizes: ClassVar = {"saves": Size(5, quick=2, help="warm saves of each way")}

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--counts", type=int, nargs="+", help=f"of tensors; default: {COUNTS}")

    def check(self) -> str | None:
        options = self.options
        options.counts = options.counts or list(QUICK_COUNTS if options.quick else COUNTS)
        return "--counts must be at least 1" if min(options.counts) < 1 else None

    def measure(self) -> Results:
        rows: list[Row] = []
        # code that is loaded at a first save is no tensor's cost
        self._fill([Row(way, 1) for way in NAMES], 1, self.directory / "1")
        for number, count in enumerate(sorted(self.options.counts)):
            new = [Row(way, count) for way in NAMES]
            for row in new:
                leave_out(row, rows)
            self._fill(new, self.options.saves, self.directory / f"{number}-{count}")
            rows += new
        return {"tensor_bytes": 4 * ELEMENTS, "rows": [summarize(row) for row in rows]}

    def _fill(self, rows: list[Row], saves: int, directory: Path) -> None:
        """Measure the rows of one size."""
        state, found = state_of(rows[0].count), {}
        directory.mkdir()
        with contextlib.ExitStack() as stack:
            for way in ways(directory, names=NAMES):
                found[way.name] = stack.enter_context(contextlib.closing(way))
                if isinstance(way, AsyncSave):
                    way.reuse = "off"  # the state is the same each time
                way.open(state)
            for round_, row in self.turns(rows, saves, first=0):
                spent = sum(sample["done_seconds"] for sample in row.samples)
                if row.why is None and spent <= BUDGET_SECONDS:
                    row.samples.append(sample(found[row.way], state))
                    blocked = row.samples[-1]["blocked_seconds"]
                    self.say(f"{round_}/{saves} {row.way}, {row.count}: {blocked:.3f} s blocked")
            for way in found.values():
                settle(way)

    def bars(self, results: Results) -> list[Bar]:
        found = {
            row["way"]: row["blocked_seconds"]["median"]
            for row in results["rows"]
            if row["tensors"] == BAR_COUNT and row["blocked_seconds"]
        }
        own, peer = found.get(OFF), found.get(DCP)
        what = f"{BAR_COUNT:,} tensors: blocked"
        return [
            Bar.of(f"{what}, s", own, BAR_SECONDS),
            Bar.of(f"{what}, off / {DCP}", ratio(own, peer), BAR_SHARE),
        ]

    def tables(self, results: Results) -> Iterator[Table]:
        columns: dict[str, Column] = {
            "tensors": lambda row: f"{row['tensors']:,}",
            "": "way",
            "blocked s": ("blocked_seconds", 4),
            "µs per tensor": ("blocked_us_per_tensor", 1),
            "done s": ("done_seconds", 3),
            "first:\nblocked s": lambda row: cell((row["first"] or {}).get("blocked_seconds"), 3),
        }
        saves = f"{results['settings']['saves']} warm saves each"
        note = f"tensors of 1 KiB on the CPU, {saves}\n{MEDIANS}"
        yield table(results, "What many small tensors cost", columns, note)


if __name__ == "__main__":
    sys.exit(Many().main(sys.argv[1:]))
