"""Is memory_limit kept?

Each setting saves the same state over and over in a process of its own, whose resident memory is
sampled every few milliseconds. Before the first sample, a tiny save has loaded all code; so what is
measured is what saving takes.

The state is a small GPT-2-shaped model and its AdamW, trained for a few steps, and copies of both
with a little noise until there are as many bytes as wanted: values that compress as real ones do.
Limits below the state's length make it be copied in waves.

How to read it. MiB beyond what was resident before the first save.

    peak      the most of any sample
    says      what the largest SaveReport.peak_memory_bytes said
    after 2   resident after the second save: what the Checkpointer keeps
    after n   the same after the last one; more than after 2 would be a leak
    durable   seconds of a save, median
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from common import (
    RESULTS,
    Bar,
    PeakMemory,
    provenance,
    run_child,
    show_bars,
    start,
    where,
    write_json,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table
from training import Training

import asyncsave

STATE_BYTES = 640 << 20
SAVES = 100
LIMITS: tuple[int | str, ...] = (128 << 20, 512 << 20, "auto")
LEVELS = (0, 1)
TRAINING_STEPS = 30
SAMPLE_SECONDS = 0.003
MIB = 1 << 20
NOISE_BYTES = 2 * MIB  # what a process's memory moves by anyway: Python's and the C library's own


def state_of(nbytes: int, steps: int) -> dict[str, torch.Tensor]:
    """Return at least ``nbytes`` of trained values, as tensors of many sizes."""
    training = Training(2, 256, 4, batch=2, context=64)
    for _ in range(steps):
        training.step()
    tensors = [tensor.detach().float() for tensor in training.tensors]
    once = sum(tensor.nbytes for tensor in tensors)
    state = {}
    for copy in range(-(-nbytes // once)):
        for i, tensor in enumerate(tensors):
            state[f"{copy}.{i}"] = tensor * (1 + 1e-3 * torch.randn_like(tensor))
    return state


def child(options: argparse.Namespace) -> None:
    """Measure one setting, in this process; print JSON."""
    limit = "auto" if options.limit == "auto" else int(options.limit)
    state = state_of(options.state_bytes, options.training_steps)
    with tempfile.TemporaryDirectory(prefix=".memory-", dir=options.directory) as name:
        directory = Path(name)
        tiny = {"x": torch.randn(1 << 18)}
        asyncsave.save(tiny, directory / "tiny", compression=options.level).result()
        process = psutil.Process()
        after, seconds, says = [], [], 0
        with (
            PeakMemory(SAMPLE_SECONDS) as memory,
            asyncsave.Checkpointer(
                directory / "run",
                memory_limit=limit,
                compression=options.level,
                keep_last=1,
                signals=(),
            ) as ckpt,
        ):
            for step in range(options.saves):
                handle = ckpt.save(step, state, block=True)
                assert handle is not None
                report = handle.result()
                seconds.append(report.durable_seconds)
                says = max(says, report.peak_memory_bytes)
                after.append(process.memory_info().rss - memory.before)
        found = {
            "state_bytes": sum(tensor.nbytes for tensor in state.values()),
            "peak_bytes": memory.peak - memory.before,
            "says_bytes": says,
            "after_2_bytes": after[min(1, len(after) - 1)],
            "after_all_bytes": after[-1],
            "after_bytes": after,
            "durable_seconds": statistics.median(seconds),
        }
    print(json.dumps(found))


def measure(options: argparse.Namespace, limit: int | str, level: int) -> dict[str, Any]:
    """Measure one setting in a process of its own."""
    names = ("state_bytes", "saves", "training_steps", "directory")
    setting = ("--limit", str(limit), "--level", str(level))
    found = run_child(__file__, options, names, "--child", *setting)
    return {"limit_bytes": limit, "level": level, **found}


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """Return what the project promises, and what was measured: the worst of both levels."""
    found = []
    for limit in dict.fromkeys(row["limit_bytes"] for row in rows):
        mine = [row for row in rows if row["limit_bytes"] == limit]
        most = max(
            row["peak_bytes"] / (row["says_bytes"] if limit == "auto" else row["limit_bytes"])
            for row in mine
        )
        what = "what the report says" if limit == "auto" else f"limit of {limit // MIB} MiB"
        found.append(Bar.of(f"peak extra memory / {what}", most, 1.05))
    growth = max(row["after_all_bytes"] - row["after_2_bytes"] for row in rows)
    found.append(Bar.of("MiB of growth from save 2 to the last", growth / MIB, NOISE_BYTES / MIB))
    return found


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table."""
    settings = results["settings"]
    table = Table(
        title="Memory that saving takes, MiB",
        caption=(
            f"{results['rows'][0]['state_bytes'] / MIB:.0f} MiB of state, "
            f"{settings['saves']} saves for each row\n{where(results)}"
        ),
    )
    names = ("memory_limit", "level", "peak", "says", "after 2", f"after {settings['saves']}")
    for name in (*names, "durable s"):
        table.add_column(name, justify="right")
    for row in results["rows"]:
        limit = row["limit_bytes"]
        figures = ("peak_bytes", "says_bytes", "after_2_bytes", "after_all_bytes")
        table.add_row(
            "auto" if limit == "auto" else f"{limit // MIB}",
            str(row["level"]),
            *(f"{row[figure] / MIB:.1f}" for figure in figures),
            f"{row['durable_seconds']:.2f}",
        )
    console.print(table)


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--state-bytes", type=int, default=STATE_BYTES)
    parser.add_argument("--saves", type=int, default=SAVES, help="of each setting")
    parser.add_argument("--training-steps", type=int, default=TRAINING_STEPS)
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to save to")
    parser.add_argument("--json", type=Path, help="default: bench/results/memory.json; quick: none")
    parser.add_argument("--quick", action="store_true", help="a small state: does it run at all")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--limit", help=argparse.SUPPRESS)
    parser.add_argument("--level", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(options)
        return 0
    limits = LIMITS
    if options.quick:
        options.state_bytes, options.saves, options.training_steps = 16 << 20, 3, 2
        limits = (8 << 20, "auto")
    elif options.json is None:
        options.json = RESULTS / "memory.json"
    console, log = start(120)
    began = time.perf_counter()
    settings = [(limit, level) for limit in limits for level in LEVELS]
    each = track(settings, "measuring", console=log)
    rows = [measure(options, limit, level) for limit, level in each]
    shown = ("state_bytes", "saves", "training_steps", "quick")
    judged = bars(rows)
    results = {
        "benchmark": "memory",
        "question": "Is memory_limit kept?",
        **provenance("cpu", options.directory),
        "settings": {name: getattr(options, name) for name in shown},
        "run_seconds": time.perf_counter() - began,
        "rows": rows,
        "bars": [asdict(bar) for bar in judged],
    }
    if options.json is not None:
        write_json(options.json, results)
    show(results, console)
    show_bars(judged, console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
