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

import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from harness import Bar, Bench, Column, Results, Size, table
from machine import peak_memory, resident_bytes
from rich.table import Table
from training import trained_tensors

import asyncsave

LIMITS: tuple[int | str, ...] = (128 << 20, 512 << 20, "auto")
QUICK_LIMITS: tuple[int | str, ...] = (8 << 20, "auto")
LEVELS = (0, 1)
SAMPLE_SECONDS = 0.003
MIB = 1 << 20
NOISE_BYTES = 2 * MIB  # what a process's memory moves by anyway: Python's and the C library's own


def setting(
    state_bytes: int, training_steps: int, saves: int, limit: int | str, level: int, directory: Path
) -> dict[str, Any]:
    """Measure one setting, in this process."""
    state = trained_tensors(state_bytes, training_steps)
    with tempfile.TemporaryDirectory(dir=directory) as place:
        tiny = {"x": torch.randn(1 << 18)}
        asyncsave.save(tiny, Path(place, "tiny"), compression=level).result()
        after, reports = [], []
        with (
            peak_memory(SAMPLE_SECONDS) as peak,
            asyncsave.Checkpointer(
                Path(place, "run"),
                memory_limit=limit,
                compression=level,
                keep_last=1,
                reuse="off",
                signals=(),
            ) as ckpt,
        ):
            for step in range(saves):
                handle = ckpt.save(step, state, block=True)
                assert handle is not None
                reports.append(handle.result())
                after.append(resident_bytes() - peak.before)
    return {
        "limit_bytes": limit,
        "level": level,
        "state_bytes": sum(tensor.nbytes for tensor in state.values()),
        "peak_bytes": peak.most - peak.before,
        "says_bytes": max(report.peak_memory_bytes for report in reports),
        "after_2_bytes": after[min(1, len(after) - 1)],
        "after_all_bytes": after[-1],
        "after_bytes": after,
        "durable_seconds": statistics.median(report.durable_seconds for report in reports),
    }


class Memory(Bench):
    name = "memory"
    question = "Is memory_limit kept?"
    sizes: ClassVar = {
        "state_bytes": Size(640 << 20, quick=16 << 20),
        "saves": Size(100, quick=3, help="of each setting"),
        "training_steps": Size(30, quick=2),
    }

    def measure(self) -> Results:
        options, rows = self.options, []
        size = (options.state_bytes, options.training_steps, options.saves)
        for limit in QUICK_LIMITS if options.quick else LIMITS:
            for level in LEVELS:
                self.say(f"memory_limit {limit}, level {level}")
                rows.append(self.apart(setting, *size, limit, level, self.directory))
        return {"rows": rows}

    def bars(self, results: Results) -> list[Bar]:
        rows, found = results["rows"], []
        for limit in dict.fromkeys(row["limit_bytes"] for row in rows):
            most = max(  # of both levels
                row["peak_bytes"] / (row["says_bytes"] if limit == "auto" else limit)
                for row in rows
                if row["limit_bytes"] == limit
            )
            what = "what the report says" if limit == "auto" else f"limit of {limit // MIB} MiB"
            found.append(Bar.of(f"peak extra memory / {what}", most, 1.05))
        grown = max(row["after_all_bytes"] - row["after_2_bytes"] for row in rows) / MIB
        found.append(Bar.of("MiB of growth from save 2 to the last", grown, NOISE_BYTES / MIB))
        return found

    def tables(self, results: Results) -> Iterator[Table]:
        saves, rows = results["settings"]["saves"], results["rows"]
        columns: dict[str, Column] = {
            "memory_limit": lambda row: _limit(row["limit_bytes"]),
            "level": lambda row: str(row["level"]),
            "peak": ("peak_bytes", 1, MIB),
            "says": ("says_bytes", 1, MIB),
            "after 2": ("after_2_bytes", 1, MIB),
            f"after {saves}": ("after_all_bytes", 1, MIB),
            "durable s": ("durable_seconds", 2),
        }
        note = f"{rows[0]['state_bytes'] / MIB:.0f} MiB of state, {saves} saves each"
        yield table(results, "Memory that saving takes, MiB", columns, note)


def _limit(limit: int | str) -> str:
    return limit if isinstance(limit, str) else f"{limit // MIB}"


if __name__ == "__main__":
    sys.exit(Memory().main(sys.argv[1:]))
