"""What does one checkpoint cost a training loop?

One process trains one GPT-2-shaped Transformer (fp32, AdamW) on the sources of Python's standard
library, and saves model and optimizer with one way of saving after the other.

How it is measured. A *cycle* is one save and the training steps that follow, more than the save's
background lasts: a cycle contains the whole save. Every round has one cycle of each way, and one
without a save, in an order that is drawn anew; so drift of the machine hits all alike. Before each
cycle, outside the measured time: the last checkpoint is deleted, the disks are synced, and one
training step is made. The first save of each way, which allocates what later ones reuse, does
not count here: bench/save.py is about that. Two rows are no ways of saving but floors: torch's copy
of the same bytes into memory it has used before, and a bare O_DIRECT write of as many bytes with an
fsync, while the training stands still.

How to read it. One cell is the median, and under it the smallest and the largest value.

    blocked   seconds in the call
    fence     seconds that training then waited before optimizer.step(): for late copies on CUDA,
              and for ways of saving that want a lock there
    lost      seconds of training a checkpoint cost in all: the cycle's time, less as many steps at
              the median step time of the cycles without a save, which are as long as the longest.
              What it exceeds blocked + fence by is the background slowing down the steps. The range
              in the row "no saving" is the noise: smaller differences mean nothing.
    durable   seconds from the call until the background is done. "synced" says what is on the disk
              by then; without the directory, a power cut may still lose the file's name.
    stored    length of the checkpoint's files
    extra     most resident memory during the cycle, that of writing processes included, beyond what
              was resident right before the save, plus what this way of saving kept from its earlier
              saves (asyncsave keeps its arena). The row "no saving" shows what training's own ups
              and downs contribute.

Batches are small, so that a step is short and the run too; most of a step is then memory traffic,
as it is in the copies of a save: a step of many tokens loses less.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
from harness import MEDIANS, Bar, Bench, Column, Results, Size, cell, ratio, spread, table
from machine import peak_memory, resident_bytes
from pictures import draw_bars, draw_timeline
from rich.table import Table
from training import Training
from ways import AUTO, DCP, LEVEL_1, NO_OVERLAP, NO_SAVING, OFF, PREWARMED, Way, settle, ways

from asyncsave import SaveReport

WARMUP_STEPS = 8
LEAST_STEPS = 4
SPARE = 1.25  # steps of a cycle, by what the way's slowest save took; later ones vary
CYCLE_LIMIT_SECONDS = 300.0


# -- measuring --------------------------------------------------------------------------------


Cycle = dict[str, Any]
"""One save and the steps after it, as `measure` returns it."""


@dataclass(slots=True)
class Row:
    """A way of saving, its cycles, and why it has no more of them."""

    way: Way
    cycles: list[Cycle] = field(default_factory=list)
    why: str | None = None


def measure(way: Way, training: Training, least_steps: int) -> Cycle:
    """Measure one cycle, of ``least_steps`` at least and until the save is done.

    "step_ends" are seconds from the call; "report" is what asyncsave itself says about the save.
    """
    training.step()
    training.synchronize()
    training.guard, training.guard_seconds = contextlib.nullcontext, 0.0
    ends: list[float] = []
    ended: list[float] = []
    with peak_memory() as peak:
        began = time.perf_counter()
        pending = way.save(training)
        blocked = time.perf_counter() - began
        pending.add_done_callback(lambda _: ended.append(time.perf_counter() - began))
        while len(ends) < least_steps or not ended:
            training.step()
            ends.append(time.perf_counter() - began)
            if ends[-1] > CYCLE_LIMIT_SECONDS:
                raise TimeoutError(f"not done after {CYCLE_LIMIT_SECONDS:.0f} s")
        training.synchronize()
        seconds = time.perf_counter() - began
    report = pending.result()
    training.guard = contextlib.nullcontext
    own, saving = isinstance(report, SaveReport), way.name != NO_SAVING
    return {
        "steps": len(ends),
        "cycle_seconds": seconds,
        "blocked_seconds": blocked if saving else 0.0,
        "fence_seconds": report.fence_seconds if own else training.guard_seconds,
        "durable_seconds": ended[0] if saving else 0.0,
        "stored_bytes": sum(p.stat().st_size for p in way.directory.rglob("*") if p.is_file()),
        "rss_before_bytes": peak.before,
        "rss_peak_bytes": peak.most,
        "rss_after_bytes": resident_bytes(),
        "step_ends": ends,
        "report": {k: v for k, v in asdict(report).items() if k != "path"} if own else None,
    }


def _steps(row: Row, rows: list[Row]) -> int:
    """Return how many steps hold the slowest save of this way; of any, for the one that has none.

    Warm saves tell, where there are some: first ones take longer.
    """
    cycles = [cycle for each in rows for cycle in each.cycles]
    plain = min((cycle["cycle_seconds"] / cycle["steps"] for cycle in cycles), default=math.inf)
    slowest = 0.0
    for each in rows if row.way.name == NO_SAVING else [row]:
        cycles = each.cycles[1:] or each.cycles
        slowest = max([slowest, *(cycle["durable_seconds"] for cycle in cycles)])
    return max(LEAST_STEPS, math.ceil(SPARE * slowest / plain))


# -- results ----------------------------------------------------------------------------------


def summarize(row: Row, plain_step: float) -> dict[str, Any]:
    """Return the row's figures: of the first save, and medians with spread of the others."""
    kept, figures = 0, []
    for cycle in row.cycles:
        before, peak = cycle["rss_before_bytes"], cycle["rss_peak_bytes"]
        figures.append(
            {
                "blocked_seconds": cycle["blocked_seconds"],
                "fence_seconds": cycle["fence_seconds"],
                "lost_seconds": cycle["cycle_seconds"] - cycle["steps"] * plain_step,
                "durable_seconds": cycle["durable_seconds"],
                "stored_bytes": cycle["stored_bytes"],
                "extra_memory_bytes": peak - before + max(0, kept),
            }
        )
        kept += cycle["rss_after_bytes"] - before
    first, warm = next(iter(figures), None), figures[1:]
    return {
        "name": row.way.name,
        "synced": row.way.synced,
        "reference": row.way.reference,
        "why": row.why,
        "saves": len(warm),
        "first": first,
        "warm": {name: spread(each[name] for each in warm) for name in warm[0]} if warm else None,
    }


def pinned_bandwidth() -> float:
    """Return how many bytes a second are copied from the device into pinned memory."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target.copy_(source)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(5):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return 5 * source.nbytes / (time.perf_counter() - begun)


class Stall(Bench):
    name = "stall"
    question = "What does one checkpoint cost a training loop?"
    sizes: ClassVar = {
        "layers": Size(19, quick=1),
        "width": Size(768, quick=64),  # GPT-2's; 135 M parameters, as the vocabulary is only bytes
        "heads": Size(12, quick=2),
        "batch": Size(1, quick=2, cuda=8),
        "context": Size(64, quick=32, cuda=1024),
        "saves": Size(5, quick=2, help="warm ones of each way"),
    }

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        parser.add_argument("--steps", type=int, help="of a cycle; default: as its saves need")
        parser.add_argument("--ways", nargs="+", help="only rows that contain one of these")

    def check(self) -> str | None:
        options = self.options
        if options.quick and options.steps is None:
            options.steps = LEAST_STEPS
        if options.steps is not None and options.steps < 1:
            return "--steps must be at least 1"
        if options.width % options.heads:
            return "--width must be a multiple of --heads"
        if options.device == "cuda" and not torch.cuda.is_available():
            return "--device cuda: torch finds no CUDA device"
        return None

    def file(self) -> str | None:
        if self.options.quick or self.options.ways:
            return None
        return "stall-cuda.json" if self.options.device == "cuda" else "stall.json"

    def measure(self) -> Results:
        options = self.options
        size = (options.layers, options.width, options.heads)
        more = {name: getattr(options, name) for name in ("batch", "context", "device")}
        training = Training(*size, **more)
        parameters = sum(parameter.numel() for parameter in training.model.parameters())
        available = psutil.virtual_memory().available
        if available < 9 * 12 * parameters:  # arenas, cached stagers, snapshots, the state itself
            self.say(f"only {available / 1e9:.1f} GB of memory: asyncsave will stage in waves")
        rows = [Row(way) for way in self._wanted()]
        for _ in range(WARMUP_STEPS):
            training.step()
        with contextlib.ExitStack() as stack:
            for row in rows:
                stack.enter_context(contextlib.closing(row.way))
            for number, (round_, row) in enumerate(self.turns(rows, options.saves, first=0)):
                if row.why is None:
                    self._cycle(row, rows, training, number, round_)
        plain = [c for row in rows if row.way.name == NO_SAVING for c in row.cycles if c["round"]]
        plain_step = statistics.median(c["cycle_seconds"] / c["steps"] for c in plain)
        return {
            "parameters": parameters,
            "state_bytes": training.state_bytes,
            "plain_step_seconds": plain_step,
            "pinned_bytes_per_second": pinned_bandwidth() if options.device == "cuda" else None,
            "rows": [summarize(row, plain_step) for row in rows],
            "cycles": [cycle for row in rows for cycle in row.cycles],
        }

    def _cycle(
        self, row: Row, rows: list[Row], training: Training, number: int, round_: int
    ) -> None:
        """Measure one cycle; round 0 is the first save of each way."""
        name, steps = row.way.name, self.options.steps or _steps(row, rows)
        try:
            if round_ == 0:
                row.way.open(training)
            cycle = measure(row.way, training, steps)
            row.cycles.append({"way": name, "number": number, "round": round_, **cycle})
            said = f"{cycle['cycle_seconds']:.2f} s, blocked {cycle['blocked_seconds']:.3f} s"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # DCP's own is not an Exception
            row.why = said = f"{type(error).__name__}: {error}"
        self.say(f"{round_}/{self.options.saves} {name}: {said}")
        settle(row.way)

    def _wanted(self) -> list[Way]:
        parts = [NO_SAVING, *self.options.ways] if self.options.ways else [""]
        return [
            way
            for way in ways(self.directory, self.options.device)
            if way.name != PREWARMED  # it is another one in its first save alone
            and any(part in way.name for part in parts)
        ]

    def bars(self, results: Results) -> list[Bar]:
        rows = {row["name"]: row for row in results["rows"]}

        def warm(name: str, figure: str) -> float | None:
            found = rows[name]["warm"] if name in rows else None
            return None if found is None else float(found[figure]["median"])

        peers = [
            warm(name, "lost_seconds")
            for name, row in rows.items()
            if not row["reference"] and not name.startswith("asyncsave")
        ]
        best = min((lost for lost in peers if lost is not None), default=None)
        off, level_1, dcp = (warm(name, "lost_seconds") for name in (OFF, LEVEL_1, DCP))
        auto, durable = (warm(name, "durable_seconds") for name in (AUTO, OFF))
        judged = [
            Bar.of("lost, off / the best peer's", ratio(off, best), 0.6),
            Bar.of("lost, level 1 / dcp.async_save's", ratio(level_1, dcp), 1.0),
            Bar.of("durable, auto / off", ratio(auto, durable), 1.1),
        ]
        pinned = results.get("pinned_bytes_per_second")  # on CUDA
        if pinned is not None:
            blocked, fence = (warm(OFF, f"{what}_seconds") for what in ("blocked", "fence"))
            waited = None if blocked is None or fence is None else blocked + fence
            at_once = warm(NO_OVERLAP, "blocked_seconds")
            copied = ratio(results["state_bytes"] / pinned, at_once)
            judged += [
                Bar.of(
                    "blocked + fence / 10 steps",
                    ratio(waited, 10 * results["plain_step_seconds"]),
                    0.01,
                ),
                Bar.of("copied / pinned bandwidth", copied, 0.8, at_least=True),
            ]
        return judged

    def tables(self, results: Results) -> Iterator[Table]:
        settings = results["settings"]
        columns: dict[str, Column] = {
            "": "name",
            "blocked s": lambda row: _cell(row, "blocked_seconds", 3),
            "fence s": lambda row: _cell(row, "fence_seconds", 3),
            "lost s": lambda row: _cell(row, "lost_seconds"),
            "durable s": lambda row: _cell(row, "durable_seconds"),
            "synced": "synced",
            "stored GB": lambda row: _cell(row, "stored_bytes", 3, 1e9),
            "extra MB": lambda row: _cell(row, "extra_memory_bytes", 0, 1e6),
        }
        note = (
            f"{results['state_bytes'] / 1e9:.2f} GB of state on {settings['device']}, "
            f"{settings['saves']} warm saves each; a step takes "
            f"{results['plain_step_seconds']:.3f} s\n"
            f"{MEDIANS}; the range of “no saving” is the noise"
        )
        yield table(results, "What one checkpoint costs a training loop", columns, note)

    def draw(self, results: Results, path: Path) -> None:
        draw_bars(results, path.with_suffix(".png"))
        draw_timeline(results, path.with_name(f"{path.stem}-timeline.png"))


def _cell(row: dict[str, Any], figure: str, digits: int = 2, scale: float = 1.0) -> str:
    saves = row["name"] != NO_SAVING or figure in ("lost_seconds", "extra_memory_bytes")
    return cell(row["warm"][figure] if row["warm"] and saves else None, digits, scale)


if __name__ == "__main__":
    sys.exit(Stall().main(sys.argv[1:]))
