"""How fast does a checkpoint come back?

One state of fp32 tensors with the shapes of a Transformer is saved in every way, and read back in
every way, *cold* (from the disk) and *warm* (from the page cache).

How it is measured. All rows in one process, in rounds; every round has each row once cold and once
warm, in an order that is drawn anew, so drift of the machine hits all alike. Before a cold reading,
outside the measured time, the row's files are synced and dropped from the page cache, and
mincore(2) must find none of their pages there; before a warm one they are read once. The first
round is not counted. After each reading, also outside the time, the tensors are compared with what
was saved.

How to read it. GB/s are bytes of tensors (not of files) by seconds: the median, and under it the
smallest and the largest value.

    new memory       the tensors are new: taking memory from the system is part of the time
    existing tensors the values come into tensors that are there, as a training loop has them
    checked          what is known of the bytes when the call returns

`asyncsave.restore` changes nothing before every byte was checked. What is not in the page cache as
plain bytes it holds meanwhile, in up to half of the available memory.

The values are normal with a standard deviation of 0.02, as weights of language models are before
training. What compresses is their exponents.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from cache import drop, files_of, trim, warm
from harness import MEDIANS, Bar, Bench, Column, Results, Size, ratio, spread, table
from loads import KINDS, MAPPED, RESTORE_1, RESTORE_OFF, TORCH, Load, Tensors, loads
from rich.table import Table

BARS = (
    (RESTORE_OFF, "cold", 1.5, TORCH),
    (RESTORE_OFF, "warm", 1.5, TORCH),
    (RESTORE_OFF, "warm", 1.1, MAPPED),
    (RESTORE_1, "cold", 1.3, TORCH),
    (RESTORE_1, "warm", 1.3, TORCH),
)


@dataclass(slots=True)
class Row:
    """A way of reading, what it reads, why it has no figures, and all that was measured."""

    load: Load
    path: Path
    why: str | None = None
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"cold": [], "warm": []})


def make_state(layers: int, width: int) -> Tensors:
    """Return weights as they are before training."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"tokens": (4 * width, width)}
    for i in range(layers):
        for name, rows, columns in (
            ("qkv", 3 * width, width),
            ("out", width, width),
            ("up", 4 * width, width),
            ("down", width, 4 * width),
        ):
            shapes[f"{i}.{name}.weight"] = rows, columns
            shapes[f"{i}.{name}.bias"] = (rows,)
        shapes[f"{i}.norm"] = (width,)
    return {name: torch.randn(shape).mul_(0.02) for name, shape in shapes.items()}


def save_all(rows: list[Row], state: Tensors) -> None:
    """Write what the rows read; say in those that read it why something could not be written."""
    for path in dict.fromkeys(row.path for row in rows):
        try:
            KINDS[path.name](state, path)
        except ImportError:
            for row in rows:
                row.why = f"{path.name} is not installed" if row.path == path else row.why


def measure(row: Row, temperature: str, state: Tensors, into: Tensors) -> float:
    """Return the seconds of one reading."""
    for tensor in into.values():
        tensor.zero_()
    gc.collect()
    trim()  # a restore happens once: its memory is not what an earlier one has left
    if temperature == "cold":
        drop(row.path)
    else:
        warm(row.path)
    began = time.perf_counter()
    result = row.load.read(row.path, into)
    seconds = time.perf_counter() - began
    if result is not None and not all(torch.equal(result[name], state[name]) for name in state):
        raise AssertionError(f"{row.load.name} returned other values than were saved")
    return seconds


def summarize(row: Row, state_bytes: int) -> dict[str, Any]:
    """Return the row's figures, in GB/s."""
    speeds = {
        temperature: spread(state_bytes / 1e9 / each for each in seconds)
        if seconds and row.why is None
        else None
        for temperature, seconds in row.seconds.items()
    }
    return {
        "name": row.load.name,
        "where": row.load.where,
        "checked": row.load.checked,
        "why": row.why,
        "stored_bytes": sum(file.stat().st_size for file in files_of(row.path)),
        **speeds,
        "seconds": row.seconds,
    }


class Restore(Bench):
    name = "restore"
    question = "How fast does a checkpoint come back?"
    sizes: ClassVar = {
        "layers": Size(21, quick=1),
        "width": Size(1024, quick=128),  # with embeddings, 1 GiB and what norms and biases add
        "rounds": Size(7, quick=2),
    }

    def measure(self) -> Results:
        state = make_state(self.options.layers, self.options.width)
        into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        state_bytes = sum(tensor.nbytes for tensor in state.values())
        rows = [Row(load, self.directory / load.kind) for load in loads()]
        save_all(rows, state)
        self._run(rows, state, into)
        return {"state_bytes": state_bytes, "rows": [summarize(row, state_bytes) for row in rows]}

    def _run(self, rows: list[Row], state: Tensors, into: Tensors) -> None:
        """Measure all rounds, and one before them that is not counted."""
        each, rounds = [(row, how) for row in rows for how in row.seconds], self.options.rounds
        for round_, (row, temperature) in self.turns(each, rounds, first=0):
            if row.why is not None:
                continue
            try:
                seconds = measure(row, temperature, state, into)
            except Exception as error:
                row.why = f"{type(error).__name__}: {error}"
                continue
            self.say(f"{round_}/{rounds} {row.load.name}, {temperature}: {seconds:.3f} s")
            if round_:
                row.seconds[temperature].append(seconds)

    def bars(self, results: Results) -> list[Bar]:
        rows = {row["name"]: row for row in results["rows"]}

        def speed(name: str, temperature: str) -> float | None:
            found = rows[name][temperature]
            return None if found is None else float(found["median"])

        return [
            Bar.of(
                f"{name}, {temperature} / {other}",
                ratio(speed(name, temperature), speed(other, temperature)),
                factor,
                at_least=True,
            )
            for name, temperature, factor, other in BARS
        ]

    def tables(self, results: Results) -> Iterator[Table]:
        columns: dict[str, Column] = {
            "": "name",
            "into": "where",
            "cold GB/s": ("cold", 2),
            "warm GB/s": ("warm", 2),
            "stored GB": ("stored_bytes", 3, 1e9),
            "checked": "checked",
        }
        note = (
            f"{results['state_bytes'] / 2**30:.2f} GiB of fp32, normal with σ = 0.02; "
            f"{results['settings']['rounds']} rounds; {MEDIANS}"
        )
        yield table(results, self.question, columns, note)


if __name__ == "__main__":
    sys.exit(Restore().main(sys.argv[1:]))
