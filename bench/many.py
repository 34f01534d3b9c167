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
import gc
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Bar, Spread, provenance, show_bars, start, where, write_json
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.distributed.checkpoint.state_dict_saver import async_save

import asyncsave

COUNTS = (1_000, 10_000, 20_000, 100_000)
ELEMENTS = 256  # of fp32: 1 KiB
SAVES = 5
LONGEST_SECONDS = 40.0  # that one save may be expected to take
BUDGET_SECONDS = 60.0  # for one way at one size; then it has fewer saves than asked for
BAR_COUNT, BAR_SECONDS, BAR_SHARE = 20_000, 0.1, 1 / 5

TORCH, DCP, ASYNCSAVE = "torch.save + fsync", "dcp.async_save", "asyncsave, off"


@dataclass(frozen=True, slots=True)
class Sample:
    """One save, in seconds from its call."""

    blocked_seconds: float
    done_seconds: float


@dataclass(slots=True)
class Row:
    """One way of saving one number of tensors; ``samples[0]`` is its first save."""

    way: str
    count: int
    samples: list[Sample] = field(default_factory=list)
    why: str | None = None


def state_of(count: int) -> dict[str, Any]:
    """Return a state of so many tensors of 1 KiB, named as layers name theirs."""
    values = torch.randn(count, ELEMENTS, generator=torch.Generator().manual_seed(0))
    return {"model": {f"layers.{i // 4}.weight.{i % 4}": values[i].clone() for i in range(count)}}


# -- the ways of saving -----------------------------------------------------------------------


def save_torch(state: dict[str, Any], path: Path) -> Sample:
    """``torch.save``, and then all that is needed for the file to survive a power cut."""
    began = time.perf_counter()
    torch.save(state, path)
    for each in (path, path.parent):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    seconds = time.perf_counter() - began
    return Sample(seconds, seconds)


def save_dcp(state: dict[str, Any], path: Path) -> Sample:
    """``torch.distributed.checkpoint.async_save`` with its defaults, for a single process."""
    began = time.perf_counter()
    future = async_save(state, checkpoint_id=path)
    blocked = time.perf_counter() - began
    assert isinstance(future, Future)
    future.result()
    return Sample(blocked, time.perf_counter() - began)


def save_with(checkpointer: asyncsave.Checkpointer, state: dict[str, Any], path: Path) -> Sample:
    """A `Checkpointer` that lives as long as the run."""
    began = time.perf_counter()
    handle = checkpointer.save(int(path.name), state)
    blocked = time.perf_counter() - began
    assert handle is not None
    handle.result()
    return Sample(blocked, time.perf_counter() - began)


Save = Callable[[dict[str, Any], Path], Sample]


# -- measuring --------------------------------------------------------------------------------


def settle(directory: Path) -> None:
    """Delete what was saved, and leave neither dirty pages nor garbage to the next save."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    os.sync()
    gc.collect()


def measure(count: int, saves: int, rows: list[Row], directory: Path, log: Console) -> None:
    """Fill the rows of one size."""
    state = state_of(count)
    order = random.Random(0)
    folders = {row.way: directory / f"{count}-{i}" for i, row in enumerate(rows)}
    for folder in folders.values():
        folder.mkdir()
    with asyncsave.Checkpointer(folders[ASYNCSAVE], compression="off", signals=()) as checkpointer:
        functions: dict[str, Save] = {
            TORCH: save_torch,
            DCP: save_dcp,
            ASYNCSAVE: lambda state, path: save_with(checkpointer, state, path),
        }
        for round_ in range(saves + 1):
            for row in order.sample(rows, len(rows)):
                spent = sum(sample.done_seconds for sample in row.samples)
                if row.why is not None or spent > BUDGET_SECONDS:
                    continue
                settle(folders[row.way])
                row.samples.append(functions[row.way](state, folders[row.way] / str(round_)))
        for row in rows:
            settle(folders[row.way])
            if row.samples:
                log.print(f"{count} {row.way}: {row.samples[-1].blocked_seconds:.3f} s blocked")


def leave_out(row: Row, before: list[Row]) -> None:
    """Say why a row is not measured, if by what smaller ones took it would take too long."""
    smaller = [each for each in before if each.way == row.way]
    if not smaller:
        return
    if smaller[-1].why is not None:
        row.why = f"left out, as {smaller[-1].count} were"
        return
    seconds = [min(sample.done_seconds for sample in each.samples) for each in smaller[-2:]]
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
    blocked = Spread.of(each.blocked_seconds for each in warm) if warm else None
    return {
        "way": row.way,
        "tensors": row.count,
        "why": row.why,
        "saves": len(warm),
        "first": asdict(row.samples[0]) if row.samples else None,
        "blocked_seconds": asdict(blocked) if blocked else None,
        "done_seconds": asdict(Spread.of(each.done_seconds for each in warm)) if warm else None,
        "blocked_us_per_tensor": blocked.median / row.count * 1e6 if blocked else None,
        "samples": [asdict(sample) for sample in row.samples],
    }


def bars_of(rows: list[dict[str, Any]]) -> list[Bar]:
    """Return what should be, and what is."""
    found = {
        row["way"]: row["blocked_seconds"]["median"]
        for row in rows
        if row["tensors"] == BAR_COUNT and row["blocked_seconds"]
    }
    own, peer = found.get(ASYNCSAVE), found.get(DCP)
    what = f"{BAR_COUNT:,} tensors: blocked at most"
    share = f"{what} 1/{1 / BAR_SHARE:.0f} of {DCP}'s"
    return [
        Bar(f"{what} {BAR_SECONDS} s", "", None)
        if own is None
        else Bar(f"{what} {BAR_SECONDS} s", f"{own:.3f} s", own <= BAR_SECONDS),
        Bar(share, "", None)
        if own is None or peer is None
        else Bar(share, f"1/{peer / own:.1f} ({own:.3f} of {peer:.3f} s)", own <= peer * BAR_SHARE),
    ]


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(
        title="What many small tensors cost",
        caption=(
            f"tensors of 1 KiB on the CPU, {results['settings']['saves']} warm saves each\n"
            f"{where(results)}\nmedian, and smallest … largest"
        ),
    )
    table.add_column("tensors", justify="right")
    table.add_column("")
    for name in ("blocked s", "µs per tensor", "done s", "first:\nblocked s"):
        table.add_column(name, justify="right")
    for row in results["rows"]:
        cells = [f"{row['tensors']:,}", row["way"]]
        if row["blocked_seconds"] is None:
            table.add_row(*cells, escape(row["why"] or "only its first save"))
            continue
        table.add_row(
            *cells,
            Spread(**row["blocked_seconds"]).show(4),
            f"{row['blocked_us_per_tensor']:.1f}",
            Spread(**row["done_seconds"]).show(3),
            f"{row['first']['blocked_seconds']:.3f}",
        )
    console.print(table)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", help=f"of tensors; default: {COUNTS}")
    parser.add_argument("--saves", type=int, help=f"warm saves of each way; default: {SAVES}")
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="default: bench/results/many.json; quick: none")
    parser.add_argument("--quick", action="store_true", help="few tensors: does it run at all")
    options = parser.parse_args(arguments)
    options.counts = options.counts or ([20, 200] if options.quick else list(COUNTS))
    options.saves = options.saves or (2 if options.quick else SAVES)
    if min(*options.counts, options.saves) < 1:
        parser.error("--counts and --saves must be at least 1")
    if options.json is None and not options.quick:
        options.json = RESULTS / "many.json"
    return options


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    options = parse(arguments)
    console, log = start(120)
    began = time.perf_counter()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix=".many-", dir=options.directory) as name:
        directory = Path(name).resolve()
        about = provenance("cpu", directory)
        # code that is loaded at a first save is no tensor's cost
        measure(
            1, 1, [Row(way, 1) for way in (TORCH, DCP, ASYNCSAVE)], directory, Console(quiet=True)
        )
        for count in sorted(options.counts):
            new = [Row(way, count) for way in (TORCH, DCP, ASYNCSAVE)]
            for row in new:
                leave_out(row, rows)
            measure(count, options.saves, new, directory, log)
            rows += new
    summary = [summarize(row) for row in rows]
    bars = bars_of(summary)
    results = {
        "benchmark": "many",
        "question": "What do many small tensors cost?",
        **about,
        "settings": {"counts": options.counts, "saves": options.saves, "quick": options.quick},
        "tensor_bytes": 4 * ELEMENTS,
        "run_seconds": time.perf_counter() - began,
        "rows": summary,
        "bars": [asdict(bar) for bar in bars],
    }
    if options.json is not None:
        write_json(options.json, results)
    show(results, console)
    show_bars(bars, console)
    log.print(f"{results['run_seconds']:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
