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

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    Bar,
    Spread,
    provenance,
    ratio,
    run_child,
    show_bars,
    start,
    where,
    write_json,
)
from peers import (
    AUTO,
    BARE,
    COPY,
    DCP,
    LEVEL_1,
    OFF,
    PREWARMED,
    Way,
    prewarmed,
    settle,
    ways,
)
from rich.console import Console
from rich.table import Table
from training import Training

LAYERS, WIDTH, HEADS = 19, 768, 12  # as in bench/stall.py
BATCH, CONTEXT = 1, 64
QUICK = {"layers": 2, "width": 64, "heads": 2, "rounds": 1, "saves": 2}
ROUNDS, SAVES = 5, 3
STEPS_BETWEEN = 2
NAMES = (COPY, BARE, DCP, f"{DCP}, cached stager", OFF, PREWARMED, LEVEL_1, AUTO)


# -- one process ------------------------------------------------------------------------------


def child(options: argparse.Namespace) -> None:
    """Measure one way; print JSON."""
    training = Training(options.layers, options.width, options.heads, batch=BATCH, context=CONTEXT)
    with tempfile.TemporaryDirectory(prefix=".save-", dir=options.directory) as name:
        way = _way(options.child, Path(name).resolve())
        blocked, durable = [], []
        try:
            for save in range(options.saves + 1):
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
        finally:
            way.close()
    found = {"blocked": blocked, "durable": durable, "state_bytes": training.state_bytes}
    print(json.dumps(found))


def _way(name: str, directory: Path) -> Way:
    every = [*ways(directory, "cpu"), prewarmed(directory / "prewarmed")]
    return next(way for way in every if way.name == name)


# -- all of them ------------------------------------------------------------------------------


def summarize(name: str, turns: list[dict[str, Any]], synced: str) -> dict[str, Any]:
    """Return the figures of a way, and every reading."""
    return {
        "name": name,
        "synced": synced,
        "first_seconds": asdict(Spread.of(turn["blocked"][0] for turn in turns)),
        "blocked_seconds": asdict(
            Spread.of(statistics.median(turn["blocked"][1:]) for turn in turns)
        ),
        "durable_seconds": asdict(
            Spread.of(statistics.median(turn["durable"][1:]) for turn in turns)
        ),
        "turns": turns,
    }


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """Return what the project promises, and what was measured."""
    found = {row["name"]: row for row in rows}

    def of(name: str, figure: str) -> float:
        return float(found[name][f"{figure}_seconds"]["median"])

    blocked, first = of(OFF, "blocked"), of(DCP, "first")
    return [
        Bar.of("blocked, off / copy into warm memory", ratio(blocked, of(COPY, "blocked")), 1.5),
        Bar.of("blocked, off / dcp.async_save", ratio(blocked, of(DCP, "blocked")), 0.5),
        *(
            Bar.of(f"first, {name} / dcp.async_save's first", ratio(of(name, "first"), first), 1.0)
            for name in (OFF, LEVEL_1, AUTO)
        ),
        Bar.of("first, off, prewarmed / a later one", ratio(of(PREWARMED, "first"), blocked), 1.5),
        Bar.of(
            "durable, off / a bare O_DIRECT write",
            ratio(of(OFF, "durable"), of(BARE, "durable")),
            1.3,
        ),
    ]


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table."""
    settings = results["settings"]
    table = Table(
        title="One save with nothing beside it",
        caption=(
            f"{results['state_bytes'] / 1e9:.2f} GB of state, {settings['rounds']} processes each, "
            f"{settings['saves']} saves after the first\n{where(results)}\n"
            "median, and smallest … largest"
        ),
    )
    table.add_column("")
    for name in ("first: blocked s", "blocked s", "durable s"):
        table.add_column(name, justify="right")
    table.add_column("synced")
    for row in results["rows"]:
        figures = (Spread(**row[f"{name}_seconds"]) for name in ("first", "blocked", "durable"))
        table.add_row(row["name"], *(each.show(3) for each in figures), row["synced"])
    console.print(table)


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="processes of each way")
    parser.add_argument("--saves", type=int, default=SAVES, help="after the first")
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="default: bench/results/save.json; quick: none")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    console, log = start(120)
    if options.child:
        child(options)
        return 0
    for name, value in (QUICK if options.quick else {}).items():
        setattr(options, name, value)
    if options.json is None and not options.quick:
        options.json = RESULTS / "save.json"
    began = time.perf_counter()
    about = provenance("cpu", options.directory)
    order = random.Random(0)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for round_ in range(options.rounds):
        for name in order.sample(NAMES, len(NAMES)):
            names = ("layers", "width", "heads", "saves", "directory")
            turn = run_child(__file__, options, names, "--child", name)
            turns[name].append(turn)
            first, *later = turn["blocked"]
            log.print(
                f"{round_ + 1}/{options.rounds} {name}: first {first:.3f} s, later "
                f"{statistics.median(later):.3f} s"
            )
    synced = {name: _way(name, Path()).synced for name in NAMES}
    shown = ("layers", "width", "heads", "rounds", "saves", "quick")
    rows = [summarize(name, turns[name], synced[name]) for name in NAMES]
    judged = bars(rows)
    results = {
        "benchmark": "save",
        "question": "How long does one save take, first and later, with nothing beside it?",
        **about,
        "settings": {name: getattr(options, name) for name in shown},
        "state_bytes": turns[OFF][0]["state_bytes"],
        "run_seconds": time.perf_counter() - began,
        "rows": rows,
        "bars": [asdict(bar) for bar in judged],
    }
    if options.json is not None:
        write_json(options.json, results)
    show(results, console)
    show_bars(judged, console)
    log.print(f"{results['run_seconds']:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
