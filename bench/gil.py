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

import contextlib
import gc
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import ClassVar

import torch
from harness import MEDIANS, Bar, Bench, Column, Results, Size, spread, table
from rich.table import Table
from training import State, Training
from ways import DCP, LEVEL_1, OFF, AsyncSave, Pending, Way, settle, ways

UNIT = 20_000  # about a millisecond
NOTHING = "nothing"
BAR_PERCENT = 90.0


def count(units: int) -> None:
    """The loop: as much pure Python as ``units`` says."""
    i = 0
    while i < units:
        i += 1


@dataclass(slots=True)
class Sleep(Way):
    """Lets time pass."""

    seconds: float = 0.0

    def save(self, state: State) -> Pending:
        future: Future[None] = Future()
        threading.Timer(self.seconds, future.set_result, [None]).start()
        return future


FIGURES = {
    "percent": ("speed %", 1),
    "lost_seconds": ("lost s", 3),
    "longest_ms": ("longest ms", 1),
    "save_seconds": ("save s", 2),
    "other_cpu_seconds": ("CPU s", 2),
    "waits": ("waits", 0),
}
"""What a turn measures, its column, and digits there."""


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


def alone(seconds: float) -> list[float]:
    """Run the loop while nothing else does."""
    until = time.perf_counter() + seconds
    return run_units(lambda: time.perf_counter() >= until)


def voluntary_waits() -> int:
    """Return how often this thread has gone to sleep: it does so for the GIL alone."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def measure(way: Way, state: State, seconds: float) -> dict[str, float]:
    """Take one turn, with the loop alone for ``seconds`` before and after; return its `FIGURES`."""
    gc.collect()
    before = alone(seconds)
    state.steps += 1
    pending = way.save(state)
    cpu, waits = time.process_time() - time.thread_time(), voluntary_waits()
    during = run_units(pending.done)
    cpu, waits = time.process_time() - time.thread_time() - cpu, voluntary_waits() - waits
    after = alone(seconds)
    pending.result()
    speed_alone = (len(before) / sum(before) + len(after) / sum(after)) / 2
    return {
        "percent": 100 * len(during) / sum(during) / speed_alone,
        "lost_seconds": sum(during) - len(during) / speed_alone,
        "longest_ms": (max(during) - statistics.median(before + after)) * 1e3,
        "save_seconds": sum(during),
        "other_cpu_seconds": cpu,
        "waits": waits,
        "units": len(during),  # how often the loop ran to UNIT
    }


class Gil(Bench):
    name = "gil"
    question = "How much does a pure-Python loop in the training thread slow beside a save?"
    sizes: ClassVar = {
        "layers": Size(12, quick=1),
        "width": Size(768, quick=64),  # 85 M parameters: 1.02 GB with AdamW's state
        "repetitions": Size(7, quick=2, help="of each way"),
        "seconds": Size(1.0, quick=0.05, help="alone"),
    }

    def measure(self) -> Results:
        options = self.options
        training = Training(options.layers, options.width, 1, batch=1, context=16)
        for _ in range(2):
            training.step()
        torch.set_num_threads(1)
        nothing = Sleep(NOTHING, directory=self.directory / NOTHING, seconds=options.seconds)
        every = [nothing, *ways(self.directory, names=(DCP, OFF, LEVEL_1))]
        turns: dict[str, list[dict[str, float]]] = {way.name: [] for way in every}
        with contextlib.ExitStack() as stack:
            for way in every:
                stack.enter_context(contextlib.closing(way))
                if isinstance(way, AsyncSave):
                    way.reuse = "off"  # the state is the same each time
                way.open(training)
            for round_, way in self.turns(every, options.repetitions, first=0):
                turn = measure(way, training, options.seconds if round_ else 0.01)
                self.say(f"{round_}/{options.repetitions} {way.name}: {turn['percent']:.0f} %")
                if round_:
                    turns[way.name].append(turn)
                settle(way)
        rows = []
        for name, found in turns.items():
            spreads = {figure: spread(turn[figure] for turn in found) for figure in FIGURES}
            rows.append({"way": name, **spreads, "turns": found})
        return {
            "unit": UNIT,
            "switch_interval_seconds": sys.getswitchinterval(),
            "state_bytes": training.state_bytes,
            "rows": rows,
        }

    def bars(self, results: Results) -> list[Bar]:
        return [
            Bar.of(
                f"{row['way']}: % of its speed alone",
                row["percent"]["median"],
                BAR_PERCENT,
                at_least=True,
            )
            for row in results["rows"]
            if row["way"] in (OFF, LEVEL_1)
        ]

    def tables(self, results: Results) -> Iterator[Table]:
        columns: dict[str, Column] = {"": "way"}
        columns |= {name: (figure, digits) for figure, (name, digits) in FIGURES.items()}
        saves = f"{results['settings']['repetitions']} saves each"
        note = f"{results['state_bytes'] / 1e9:.2f} GB of state, {saves}\n{MEDIANS}"
        title = "A pure-Python loop in the training thread while a save runs"
        yield table(results, title, columns, note)


if __name__ == "__main__":
    sys.exit(Gil().main(sys.argv[1:]))
