"""How long does it take until asyncsave is there?

Whoever looks at a checkpoint, completes a command line or reads arrays waits for the import first,
and torch alone takes seconds. So `import asyncsave` imports nothing that is not used.

How it is measured. Each row is a program in a process of its own, timed from its start to its end,
its interpreter's start (the row "python alone") included. Rows take turns, in an order that is
drawn anew in every round; one round before the first fills the page cache and is not counted. One
cell is the median, and under it the smallest and the largest value.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from common import RESULTS, Bar, Spread, provenance, show_bars, start, where, write_json
from rich.table import Table

import asyncsave

ROWS = {
    "python alone": ["-c", "pass"],
    "import asyncsave": ["-c", "import asyncsave"],
    "asyncsave --help": ["-m", "asyncsave", "--help"],
    "import asyncsave.numpy": ["-c", "import asyncsave.numpy"],
    "asyncsave verify, a small checkpoint": ["-m", "asyncsave", "verify", "{path}"],
    "asyncsave.numpy.load, of it": ["-c", "import asyncsave.numpy as a; a.load({path!r})"],
    "import torch": ["-c", "import torch"],
    "asyncsave.Checkpointer": ["-c", "import asyncsave; asyncsave.Checkpointer"],
}


def seconds(arguments: list[str]) -> float:
    """Run Python with these arguments to its end; return how long that took."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="default: bench/results/start.json; quick: none")
    parser.add_argument("--quick", action="store_true", help="one round; writes no file by itself")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = 1
    elif options.json is None:
        options.json = RESULTS / "start.json"
    console, progress = start(90)
    found: dict[str, list[float]] = {name: [] for name in ROWS}
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "a")
        asyncsave.save({"x": b"x" * 10_000, "step": 1}, path).result()
        for turn in range(options.rounds + (not options.quick)):
            for name in random.sample(list(ROWS), len(ROWS)):
                progress.print(f"round {turn}: {name}")
                took = seconds([part.format(path=path) for part in ROWS[name]])
                if turn or options.quick:
                    found[name].append(took)
    spreads = {name: Spread.of(values) for name, values in found.items()}
    bars = [
        Bar.of("import asyncsave, s", spreads["import asyncsave"].median, 0.3),
        Bar.of("asyncsave --help, s", spreads["asyncsave --help"].median, 0.5),
    ]
    results = {
        "benchmark": "start",
        "question": "How long does it take until asyncsave is there?",
        **provenance("cpu", Path(tempfile.gettempdir())),
        "rounds": options.rounds,
        "rows": [
            {"name": name, "seconds": each.median, "min": each.min, "max": each.max}
            for name, each in spreads.items()
        ],
        "bars": [asdict(bar) for bar in bars],
    }
    if options.json is not None:
        write_json(options.json, results)
    table = Table("", "seconds", title="Until it is there", caption=where(results))
    for name, each in spreads.items():
        table.add_row(name, each.show())
    console.print(table)
    show_bars(bars, console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
