"""How long does it take until asyncsave is there?

Whoever looks at a checkpoint, completes a command line or reads arrays waits for the import first,
and torch alone takes seconds. So `import asyncsave` imports nothing that is not used.

How it is measured. Each row is a program in a process of its own, timed from its start to its end,
its interpreter's start (the row "python alone") included. Rows take turns, in an order that is
drawn anew in every round; one round before the first fills the page cache and is not counted. One
cell is the median, and under it the smallest and the largest value.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import ClassVar

from harness import MEDIANS, Bar, Bench, Column, Results, Size, cell, spread, table
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


class Start(Bench):
    name = "start"
    question = "How long does it take until asyncsave is there?"
    sizes: ClassVar = {"rounds": Size(7, quick=1)}

    def measure(self) -> Results:
        rounds = self.options.rounds
        found: dict[str, list[float]] = {name: [] for name in ROWS}
        path = str(self.directory / "a")
        asyncsave.save({"x": b"x" * 10_000, "step": 1}, path).result()
        for round_, name in self.turns(list(ROWS), rounds, first=1 if self.options.quick else 0):
            took = seconds([part.format(path=path) for part in ROWS[name]])
            self.say(f"{round_}/{rounds} {name}: {took:.2f} s")
            if round_:
                found[name].append(took)
        spreads = {name: spread(values) for name, values in found.items()}
        rows = [
            {"name": name, "seconds": each["median"], "min": each["min"], "max": each["max"]}
            for name, each in spreads.items()
        ]
        return {"rounds": rounds, "rows": rows}

    def bars(self, results: Results) -> list[Bar]:
        seconds = {row["name"]: row["seconds"] for row in results["rows"]}
        return [
            Bar.of("import asyncsave, s", seconds["import asyncsave"], 0.3),
            Bar.of("asyncsave --help, s", seconds["asyncsave --help"], 0.5),
        ]

    def tables(self, results: Results) -> Iterator[Table]:
        columns: dict[str, Column] = {
            "": "name",
            "seconds": lambda row: cell({**row, "median": row["seconds"]}),
        }
        yield table(results, "Until it is there", columns, f"{results['rounds']} rounds; {MEDIANS}")


if __name__ == "__main__":
    sys.exit(Start().main(sys.argv[1:]))
