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
import random
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from common import (
    RESULTS,
    Bar,
    PeakMemory,
    Spread,
    provenance,
    ratio,
    show_bars,
    start,
    where,
    write_json,
)
from peers import (
    AUTO,
    DCP,
    LEVEL_1,
    NO_OVERLAP,
    NO_SAVING,
    OFF,
    Way,
    settle,
    ways,
)
from pictures import draw_bars, draw_timeline
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from training import Training

import asyncsave
from asyncsave import SaveReport

LAYERS, WIDTH, HEADS = 19, 768, 12  # GPT-2's width; 135 M parameters, as vocabulary is only bytes
BATCH, CONTEXT = 1, 64
CUDA_BATCH, CUDA_CONTEXT = 8, 1024
QUICK = {"layers": 2, "width": 64, "heads": 2, "batch": 2, "context": 32, "saves": 2, "steps": 4}
SAVES = 5
WARMUP_STEPS = 8
LEAST_STEPS = 4
SPARE = 1.25  # steps of a cycle, by what the way's slowest save took; later ones vary
CYCLE_LIMIT_SECONDS = 300.0


# -- measuring --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cycle:
    """One save and the steps after it, as measured.

    Attributes:
        number: its place among all cycles of the run.
        round: 0 for the first save of each way.
        step_ends: seconds from the call of each step's end.
        report: what asyncsave itself says about the save.
    """

    way: str
    number: int
    round: int
    steps: int
    cycle_seconds: float
    blocked_seconds: float
    fence_seconds: float
    durable_seconds: float
    stored_bytes: int
    rss_before_bytes: int
    rss_peak_bytes: int
    rss_after_bytes: int
    step_ends: list[float]
    report: dict[str, Any] | None

    @property
    def step_seconds(self) -> float:
        return self.cycle_seconds / self.steps


@dataclass(slots=True)
class Row:
    """A way of saving, its cycles, and why it has no more of them."""

    way: Way
    cycles: list[Cycle] = field(default_factory=list)
    why: str | None = None


def measure(way: Way, training: Training, number: int, round_: int, least_steps: int) -> Cycle:
    """Measure one cycle, of ``least_steps`` at least and until the save is done."""
    training.step()
    training.synchronize()
    steps = 0
    ended: list[float] = []
    done = threading.Event()

    def note_end(_: Any) -> None:
        ended.append(time.perf_counter())
        done.set()

    training.guard, training.guard_seconds = contextlib.nullcontext, 0.0
    ends: list[float] = []
    with PeakMemory() as memory:
        began = time.perf_counter()
        pending = way.save(training)
        blocked = time.perf_counter() - began
        pending.add_done_callback(note_end)
        while steps < least_steps or not done.is_set():
            training.step()
            steps += 1
            ends.append(time.perf_counter() - began)
            if time.perf_counter() - began > CYCLE_LIMIT_SECONDS:
                raise TimeoutError(f"not done after {CYCLE_LIMIT_SECONDS:.0f} s")
        training.synchronize()
        seconds = time.perf_counter() - began
    report = pending.result()
    training.guard = contextlib.nullcontext
    saving = way.name != NO_SAVING
    return Cycle(
        way=way.name,
        number=number,
        round=round_,
        steps=steps,
        cycle_seconds=seconds,
        blocked_seconds=blocked if saving else 0.0,
        fence_seconds=report.fence_seconds
        if isinstance(report, SaveReport)
        else training.guard_seconds,
        durable_seconds=ended[0] - began if saving else 0.0,
        stored_bytes=_length(way.directory),
        rss_before_bytes=memory.before,
        rss_peak_bytes=memory.peak,
        rss_after_bytes=memory.now(),
        step_ends=ends,
        report=_plain(report) if isinstance(report, SaveReport) else None,
    )


def _length(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _plain(report: SaveReport) -> dict[str, Any]:
    return {name: value for name, value in asdict(report).items() if name != "path"}


def run(rows: list[Row], training: Training, saves: int, steps: int | None, log: Console) -> None:
    """Measure all rounds.

    Args:
        steps: of each cycle at least; None for as many as the way's saves have shown to need.
    """
    for _ in range(WARMUP_STEPS):
        training.step()
    order, number = random.Random(0), 0
    for round_ in range(saves + 1):
        for row in order.sample(rows, len(rows)) if round_ else rows:
            if row.why is not None:
                continue
            try:
                if round_ == 0:
                    row.way.open(training)
                cycle = measure(row.way, training, number, round_, steps or _steps(row, rows))
                row.cycles.append(cycle)
                log.print(
                    f"{round_}/{saves} {row.way.name}: {cycle.steps} steps, "
                    f"{cycle.cycle_seconds:.2f} s, blocked {cycle.blocked_seconds:.3f} s"
                )
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # DCP's own is not an Exception
                row.why = f"{type(error).__name__}: {error}"
                log.print(escape(f"{round_}/{saves} {row.way.name}: {row.why}"))
            number += 1
            settle(row.way)


def _steps(row: Row, rows: list[Row]) -> int:
    """Return how many steps hold the slowest save of this way; of any, for the one that has none.

    Warm saves tell, where there are some: first ones take longer.
    """
    plain = min((c.step_seconds for r in rows for c in r.cycles), default=math.inf)
    slowest = 0.0
    for each in rows if row.way.name == NO_SAVING else [row]:
        cycles = each.cycles[1:] or each.cycles
        slowest = max([slowest, *(cycle.durable_seconds for cycle in cycles)])
    return max(LEAST_STEPS, math.ceil(SPARE * slowest / plain))


# -- results ----------------------------------------------------------------------------------


def summarize(row: Row, plain_step: float) -> dict[str, Any]:
    """Return the row's figures: of the first save, and medians with spread of the others."""
    kept = 0
    extra: dict[int, int] = {}
    for cycle in row.cycles:
        extra[cycle.round] = cycle.rss_peak_bytes - cycle.rss_before_bytes + max(0, kept)
        kept += cycle.rss_after_bytes - cycle.rss_before_bytes

    def figures(cycle: Cycle) -> dict[str, float]:
        return {
            "blocked_seconds": cycle.blocked_seconds,
            "fence_seconds": cycle.fence_seconds,
            "lost_seconds": cycle.cycle_seconds - cycle.steps * plain_step,
            "durable_seconds": cycle.durable_seconds,
            "stored_bytes": cycle.stored_bytes,
            "extra_memory_bytes": extra[cycle.round],
        }

    first = [figures(cycle) for cycle in row.cycles if cycle.round == 0]
    warm = [figures(cycle) for cycle in row.cycles if cycle.round]
    return {
        "name": row.way.name,
        "synced": row.way.synced,
        "reference": row.way.reference,
        "why": row.why,
        "saves": len(warm),
        "first": first[0] if first else None,
        "warm": {name: asdict(Spread.of(each[name] for each in warm)) for name in warm[0]}
        if warm
        else None,
    }


def bars(results: dict[str, Any]) -> list[Bar]:
    """Return what the project promises, and what was measured: nothing, where a row has failed."""
    rows = {row["name"]: row for row in results["rows"]}

    def figure(when: str, name: str, of: str) -> float | None:
        found = rows[name][when] if name in rows else None
        if found is None:
            return None
        return float(found[of]["median"] if when == "warm" else found[of])

    peers = [
        figure("warm", name, "lost_seconds")
        for name, row in rows.items()
        if not row["reference"] and not name.startswith("asyncsave")
    ]
    best = min((lost for lost in peers if lost is not None), default=None)
    blocked, lost, durable = (
        figure("warm", OFF, f"{what}_seconds") for what in ("blocked", "lost", "durable")
    )
    level_1, dcp = (figure("warm", name, "lost_seconds") for name in (LEVEL_1, DCP))
    auto = figure("warm", AUTO, "durable_seconds")
    judged = [
        Bar.of("lost, off / the best peer's", ratio(lost, best), 0.6),
        Bar.of("lost, level 1 / dcp.async_save's", ratio(level_1, dcp), 1.0),
        Bar.of("durable, auto / off", ratio(auto, durable), 1.1),
    ]
    at_once = figure("warm", NO_OVERLAP, "blocked_seconds")
    if at_once is not None:
        fence = figure("warm", OFF, "fence_seconds")
        waited = None if blocked is None or fence is None else blocked + fence
        between = 10 * results["plain_step_seconds"]
        copied = results["state_bytes"] / at_once / pinned_bandwidth()
        judged += [
            Bar.of("blocked + fence / 10 steps", ratio(waited, between), 0.01),
            Bar.of("copied / pinned bandwidth", copied, 0.8, at_least=True),
        ]
    return judged


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


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table."""
    settings = results["settings"]
    table = Table(
        title="What one checkpoint costs a training loop",
        caption=(
            f"{results['state_bytes'] / 1e9:.2f} GB of state on {settings['device']}, "
            f"{settings['saves']} warm saves each; a step takes "
            f"{results['plain_step_seconds']:.3f} s\n"
            f"{where(results)}\n"
            "median, and smallest … largest; the range of “no saving” is the noise"
        ),
    )
    table.add_column("")
    for name in ("blocked s", "fence s", "lost s", "durable s"):
        table.add_column(name, justify="right")
    table.add_column("synced")
    for name in ("stored GB", "extra MB"):
        table.add_column(name, justify="right")
    for row in results["rows"]:
        table.add_row(*_cells(row))
    console.print(table)
    for row in results["rows"]:
        if row["why"] is not None:
            console.print(escape(f"{row['name']}: {row['why']}"))


def _cells(row: dict[str, Any]) -> list[str]:
    name = row["name"]
    if row["warm"] is None:
        return [name, "failed: see below", *[""] * 6]
    warm = {key: Spread(**value) for key, value in row["warm"].items()}
    lost = warm["lost_seconds"].show()
    extra = warm["extra_memory_bytes"].show(0, 1e6)
    if name == NO_SAVING:
        return [name, "–", "–", lost, "–", "", "–", extra]
    return [
        name,
        warm["blocked_seconds"].show(3),
        warm["fence_seconds"].show(3),
        lost,
        warm["durable_seconds"].show(),
        row["synced"],
        f"{warm['stored_bytes'].median / 1e9:.3f}",
        extra,
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options; those that depend on others are filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, help=f"default: {LAYERS}")
    parser.add_argument("--width", type=int, help=f"default: {WIDTH}")
    parser.add_argument("--heads", type=int, help=f"default: {HEADS}")
    parser.add_argument("--batch", type=int, help=f"default: {BATCH}, on CUDA {CUDA_BATCH}")
    parser.add_argument("--context", type=int, help=f"default: {CONTEXT}, on CUDA {CUDA_CONTEXT}")
    parser.add_argument("--saves", type=int, help=f"warm saves of each way; default: {SAVES}")
    parser.add_argument("--steps", type=int, help="in a cycle; default: as the way's saves need")
    parser.add_argument("--ways", nargs="+", help="only rows that contain one of these")
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument(
        "--json", type=Path, help="default: bench/results/stall.json; with --quick or --ways: none"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    cuda = options.device == "cuda"
    defaults = {
        "layers": LAYERS,
        "width": WIDTH,
        "heads": HEADS,
        "batch": CUDA_BATCH if cuda else BATCH,
        "context": CUDA_CONTEXT if cuda else CONTEXT,
        "saves": SAVES,
    } | (QUICK if options.quick else {})
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in (*defaults, "steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.width % options.heads:
        parser.error("--width must be a multiple of --heads")
    if options.json is None and not options.quick and not options.ways:
        options.json = RESULTS / ("stall-cuda.json" if cuda else "stall.json")
    return options


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    options = parse(arguments)
    console, log = start(150)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".stall-", dir=options.directory) as name:
        directory = Path(name).resolve()
        about = provenance(options.device, directory)
        log.print(f"asyncsave {asyncsave.__version__}, checkpoints on {about['filesystem']}")
        if about["filesystem"] == "tmpfs":
            log.print("tmpfs is memory: choose another --directory to measure a disk")
        training = Training(
            options.layers,
            options.width,
            options.heads,
            batch=options.batch,
            context=options.context,
            device=options.device,
        )
        wanted = options.ways and [NO_SAVING, *options.ways]
        rows = [Row(way) for way in ways(directory, options.device, wanted)]
        expected = 12 * sum(parameter.numel() for parameter in training.model.parameters())
        available = psutil.virtual_memory().available
        if available < 9 * expected:  # arenas, cached stagers, snapshots, the state itself
            log.print(f"only {available / 1e9:.1f} GB of memory: asyncsave will stage in waves")
        try:
            run(rows, training, options.saves, options.steps, log)
        finally:
            for row in rows:
                row.way.close()
    plain = [c for row in rows if row.way.name == NO_SAVING for c in row.cycles if c.round]
    plain_step = Spread.of(cycle.step_seconds for cycle in plain).median
    results: dict[str, Any] = {
        "benchmark": "stall",
        "question": "What does one checkpoint cost a training loop?",
        **about,
        "settings": {
            key: value for key, value in vars(options).items() if key not in ("json", "directory")
        },
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "state_bytes": training.state_bytes,
        "plain_step_seconds": plain_step,
        "run_seconds": time.perf_counter() - began,
        "rows": [summarize(row, plain_step) for row in rows],
        "cycles": [asdict(cycle) for row in rows for cycle in row.cycles],
    }
    judged = bars(results)
    results["bars"] = [asdict(bar) for bar in judged]
    if options.json is not None:
        write_json(options.json, results)
        try:
            draw_bars(results, options.json.with_suffix(".png"))
            draw_timeline(results, options.json.with_name(f"{options.json.stem}-timeline.png"))
        except ImportError as cause:
            log.print(f"no pictures: {cause}")
    show(results, console)
    show_bars(judged, console)
    log.print(f"{results['run_seconds']:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
