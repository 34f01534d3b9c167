"""How much does a pure-Python loop in the training thread slow while a save runs?

Training is Python between the kernels: data loading, logging, launching. It needs the GIL, which
every thread of a save needs too, if only for moments. So here the training thread counts in pure
Python, which is the worst case: it never gives the GIL up of its own will.

How it is measured. The main thread counts to UNIT, over and over, and notes what each time took.
One *turn* is one save: as soon as the call has returned, units are counted until the checkpoint is
durable, and then as many alone, and before the save as many alone. Its figure is the speed during
the save by the mean of the speeds alone around it, in percent, so that drift of the machine cancels
out. Ways take turns, in an order that is drawn anew in every round. The first save of each way,
which takes its memory, is not counted. The row "nothing" is a turn with a sleep for a save: the
noise.

How to read it. One cell is the median, and under it the smallest and the largest value.

    speed    units in a second during the save, in percent of the speed alone. One of two cores is
             the loop's, the other the save's; with the GIL held by others for a tenth of the time,
             or the loop's core for a tenth, 90 are left
    lost     seconds of the loop that one save cost: what the speed misses, times how long it was
             missed. A save that is done sooner may slow the loop more, and cost less
    longest  the longest single unit during the save, in milliseconds beyond the median alone: how
             long a step may be held up at once
    save s   seconds from the return of the call until the background is done
    CPU s    processor time that all other threads took meanwhile
    waits    how often the loop's thread went to sleep, which it does only for the GIL: another
             thread asked for it, and got it after the switch interval of 5 ms

The state is a Transformer of the size given, trained for a few steps, as in ``bench/stall.py``;
tensors of its layers and their AdamW state.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import resource
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
from rich.table import Table
from torch.distributed.checkpoint.state_dict_saver import async_save
from training import Training

import asyncsave

UNIT = 20_000  # about a millisecond
ALONE_SECONDS = 1.0
REPETITIONS = 7
LAYERS, WIDTH = 12, 768  # 85 M parameters: 1.02 GB with AdamW's state
BAR_PERCENT = 90.0
NOTHING, DCP = "nothing", "dcp.async_save"

Wait = Callable[[], bool]


def count(units: int) -> None:
    """The loop: as much pure Python as ``units`` says."""
    i = 0
    while i < units:
        i += 1


@dataclass(frozen=True, slots=True)
class Turn:
    """One save, and the loop beside it. ``units`` is how many times the loop ran to UNIT."""

    percent: float
    lost_seconds: float
    longest_ms: float
    save_seconds: float
    other_cpu_seconds: float
    waits: int
    units: int


@dataclass(slots=True)
class Way:
    """A way of saving: ``save(number)`` returns what tells whether it is done."""

    name: str
    save: Callable[[int], Wait]
    turns: list[Turn] = field(default_factory=list)


# -- the ways of saving -----------------------------------------------------------------------


def save_nothing(seconds: float) -> Wait:
    """Let time pass."""
    until = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= until


def save_dcp(state: dict[str, Any], path: Path) -> Wait:
    """``torch.distributed.checkpoint.async_save`` with its defaults, for a single process."""
    future = async_save(state, checkpoint_id=path)
    assert isinstance(future, Future)
    return future.done


def save_with(checkpointer: asyncsave.Checkpointer, number: int, state: dict[str, Any]) -> Wait:
    """A `Checkpointer` that lives as long as the run."""
    handle = checkpointer.save(number, state)
    assert handle is not None
    return handle.done


# -- measuring --------------------------------------------------------------------------------


def run_units(over: Callable[[], bool]) -> list[float]:
    """Run the loop until ``over()``, at least once; return what each unit took, in seconds."""
    seconds: list[float] = []
    before = time.perf_counter()
    while not seconds or not over():
        count(UNIT)
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    return seconds


def voluntary_waits() -> int:
    """Return how often this thread has gone to sleep: it does so for the GIL alone."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def alone(seconds: float) -> list[float]:
    """Run the loop while nothing else does."""
    until = time.perf_counter() + seconds
    return run_units(lambda: time.perf_counter() >= until)


def measure(way: Way, number: int, seconds: float) -> Turn:
    """Take one turn."""
    gc.collect()
    before = alone(seconds)
    done = way.save(number)
    cpu, waits = time.process_time() - time.thread_time(), voluntary_waits()
    during = run_units(done)
    cpu, waits = time.process_time() - time.thread_time() - cpu, voluntary_waits() - waits
    after = alone(seconds)
    plain = Spread.of(before + after).median
    speed_alone = (len(before) / sum(before) + len(after) / sum(after)) / 2
    return Turn(
        percent=100 * len(during) / sum(during) / speed_alone,
        lost_seconds=sum(during) - len(during) / speed_alone,
        longest_ms=(max(during) - plain) * 1e3,
        save_seconds=sum(during),
        other_cpu_seconds=cpu,
        waits=waits,
        units=len(during),
    )


def settle(directory: Path) -> None:
    """Delete what was saved, and leave no dirty pages to the next turn."""
    for path in directory.iterdir():
        shutil.rmtree(path)
    os.sync()


def run(options: argparse.Namespace, directory: Path, log: Console) -> tuple[list[Way], int]:
    """Measure all; return the ways and the bytes of the state."""
    training = Training(options.layers, options.width, 1, batch=1, context=16)
    for _ in range(2):
        training.step()
    torch.set_num_threads(1)
    state, order = training.state, random.Random(0)
    folders = [directory / name for name in ("dcp", "off", "level1")]
    for folder in folders:
        folder.mkdir()
    with (
        asyncsave.Checkpointer(folders[1], compression="off", signals=()) as off,
        asyncsave.Checkpointer(folders[2], compression=1, signals=()) as level1,
    ):
        ways = [
            Way(NOTHING, lambda _: save_nothing(options.seconds)),
            Way(DCP, lambda number: save_dcp(state, folders[0] / str(number))),
            Way("asyncsave, off", lambda number: save_with(off, number, state)),
            Way("asyncsave, level 1", lambda number: save_with(level1, number, state)),
        ]
        for round_ in range(options.repetitions + 1):
            for way in order.sample(ways, len(ways)):
                turn = measure(way, round_, options.seconds if round_ else 0.01)
                log.print(f"{round_}/{options.repetitions} {way.name}: {turn.percent:.0f} %")
                if round_:
                    way.turns.append(turn)
                for folder in folders:
                    settle(folder)
    return ways, training.state_bytes


# -- results ----------------------------------------------------------------------------------


def summarize(way: Way) -> dict[str, Any]:
    """Return medians with spread, and every turn."""
    names = ("percent", "lost_seconds", "longest_ms", "save_seconds", "other_cpu_seconds", "waits")
    return {
        "way": way.name,
        **{name: asdict(Spread.of(getattr(turn, name) for turn in way.turns)) for name in names},
        "turns": [asdict(turn) for turn in way.turns],
    }


def bars_of(rows: list[dict[str, Any]]) -> list[Bar]:
    """Return what should be, and what is."""
    return [
        Bar(
            f"{row['way']}: at least {BAR_PERCENT:.0f} % of its speed alone",
            f"{row['percent']['median']:.1f} %",
            row["percent"]["median"] >= BAR_PERCENT,
        )
        for row in rows
        if row["way"].startswith("asyncsave")
    ]


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(
        title="A pure-Python loop in the training thread while a save runs",
        caption=(
            f"{results['state_bytes'] / 1e9:.2f} GB of state, {results['settings']['repetitions']} "
            f"saves each\n{where(results)}\nmedian, and smallest … largest"
        ),
    )
    table.add_column("")
    for name in ("speed %", "lost s", "longest ms", "save s", "CPU s", "waits"):
        table.add_column(name, justify="right")
    for row in results["rows"]:
        table.add_row(
            row["way"],
            Spread(**row["percent"]).show(1),
            Spread(**row["lost_seconds"]).show(3),
            Spread(**row["longest_ms"]).show(1),
            Spread(**row["save_seconds"]).show(2),
            Spread(**row["other_cpu_seconds"]).show(2),
            Spread(**row["waits"]).show(0),
        )
    console.print(table)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options; those of the training are what bench/stall.py calls them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, help=f"default: {LAYERS}")
    parser.add_argument("--width", type=int, help=f"default: {WIDTH}")
    parser.add_argument("--repetitions", type=int, help=f"of each way; default: {REPETITIONS}")
    parser.add_argument("--seconds", type=float, help=f"alone; default: {ALONE_SECONDS}")
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="default: bench/results/gil.json; quick: none")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.layers = options.layers or (2 if quick else LAYERS)
    options.width = options.width or (64 if quick else WIDTH)
    options.repetitions = options.repetitions or (2 if quick else REPETITIONS)
    options.seconds = options.seconds or (0.05 if quick else ALONE_SECONDS)
    if options.json is None and not quick:
        options.json = RESULTS / "gil.json"
    return options


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    options = parse(arguments)
    console, log = start(120)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".gil-", dir=options.directory) as name:
        directory = Path(name).resolve()
        about = provenance("cpu", directory)
        ways, state_bytes = run(options, directory, log)
    rows = [summarize(way) for way in ways]
    bars = bars_of(rows)
    results = {
        "benchmark": "gil",
        "question": "How much does a pure-Python loop in the training thread slow beside a save?",
        **about,
        "settings": {
            key: value for key, value in vars(options).items() if key not in ("json", "directory")
        },
        "unit": UNIT,
        "switch_interval_seconds": sys.getswitchinterval(),
        "state_bytes": state_bytes,
        "run_seconds": time.perf_counter() - began,
        "rows": rows,
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
