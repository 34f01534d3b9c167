"""How long does it take to regroup a chunk's bytes, by the time of copying it?

Before a chunk is compressed, its bytes are split into planes, and after it was decoded they are
joined: once by compiled code, once by NumPy, which says what the code must do and stands in where
it was not built. Nothing that reads and writes every byte can be much faster than a copy.

How it is measured. One chunk of 16 MiB of each kind of elements, one thread, memory that was
touched before. In every round each of the five ways is timed once for every coding, in an order
that is drawn anew.

How to read it. Milliseconds a chunk: the median, and under it the smallest and the largest value.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from harness import MEDIANS, Bar, Bench, Column, Results, Size, ratio, spread, table
from rich.table import Table

from asyncsave.codec import kernel, planes
from asyncsave.codec.frame import coding_for
from asyncsave.codec.planes import JOIN_SCRATCH_BYTES, ByteArray
from asyncsave.format.codings import plane_lengths

DTYPES = ("float32", "bfloat16", "float16", "int32", "float64")
COPY = "copy"
BAR = 1.3


def chunk_of(dtype: str, nbytes: int) -> ByteArray:
    """Return normal values with a standard deviation of 0.02, or, of integers, of 20,000."""
    torch.manual_seed(0)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    scale = 0.02 if torch_dtype.is_floating_point else 20_000
    values = torch.randn(nbytes // torch_dtype.itemsize).mul_(scale).to(torch_dtype)
    return values.view(torch.uint8).numpy()


@dataclass(slots=True)
class Row:
    """Elements of one kind, and the milliseconds of every way."""

    dtype: str
    coding: str
    ways: dict[str, Callable[[], object]]
    ms: dict[str, list[float]] = field(default_factory=dict)

    def measure(self, way: str) -> None:
        """Take one turn."""
        begun = time.perf_counter()
        self.ways[way]()
        self.ms.setdefault(way, []).append((time.perf_counter() - begun) * 1e3)


def row_of(dtype: str, nbytes: int) -> Row:
    """Return a row whose ways were each run once, and whose planes joined to the same bytes."""
    raw = chunk_of(dtype, nbytes)
    out, back, scratch = np.zeros_like(raw), np.zeros_like(raw), np.zeros_like(raw)
    join_scratch = np.zeros(JOIN_SCRATCH_BYTES, np.uint8)
    given = coding_for(dtype, byte_planes=True)
    coding = planes.split(given, raw, out, scratch)
    parts = planes.views(out, plane_lengths(coding, nbytes))
    into = scratch.copy()
    ways: dict[str, Callable[[], object]] = {COPY: lambda: np.copyto(into, raw)}
    ways["split, NumPy"] = lambda: planes.split(given, raw, out, scratch)
    ways["join, NumPy"] = lambda: planes.join(coding, parts, back, join_scratch)
    if kernel.LIBRARY.exists():
        compiled = kernel.Kernel()
        ways["split, compiled"] = lambda: compiled.split(given, raw, out, scratch)
        ways["join, compiled"] = lambda: compiled.join(coding, parts, back, join_scratch)
    for name, way in ways.items():
        back[:] = 0
        way()
        if name.startswith("join") and not np.array_equal(back, raw):
            raise AssertionError(f"{name} does not give {dtype} back")
    return Row(dtype, coding, ways)


class Planes(Bench):
    name = "planes"
    question = "How long does it take to regroup a chunk's bytes, by the time of copying it?"
    sizes: ClassVar = {
        "chunk_bytes": Size(16 << 20, quick=1 << 16),
        "rounds": Size(25, quick=2),
    }

    def measure(self) -> Results:
        torch.set_num_threads(1)
        rows = [row_of(dtype, int(self.options.chunk_bytes)) for dtype in DTYPES]
        turns = [(row, way) for row in rows for way in row.ways]
        for _, (row, way) in self.turns(turns, self.options.rounds):
            row.measure(way)
        return {"rows": [self._summary(row) for row in rows]}

    def _summary(self, row: Row) -> dict[str, Any]:
        found = {way: spread(each) for way, each in row.ms.items()}
        return {"dtype": row.dtype, "coding": row.coding.partition(".")[0], "ms": found}

    def bars(self, results: Results) -> list[Bar]:
        rows = {row["dtype"]: row["ms"] for row in results["rows"]}

        def by_copy(dtype: str, way: str) -> float | None:
            found = rows[dtype].get(way)
            return found and ratio(found["median"], rows[dtype][COPY]["median"])

        return [
            Bar.of(f"{way}, {dtype} / copy", by_copy(dtype, way), BAR)
            for dtype in ("float32", "bfloat16")
            for way in ("split, compiled", "join, compiled")
        ]

    def tables(self, results: Results) -> Iterator[Table]:
        ways = list(results["rows"][0]["ms"])
        columns: dict[str, Column] = {"": "dtype", "coding": "coding"}
        rows = [{**row, **row["ms"]} for row in results["rows"]]
        columns |= {way: (way, 2) for way in ways}
        note = f"ms for {results['settings']['chunk_bytes'] / 2**20:.3g} MiB: {MEDIANS}"
        yield table(results, self.question, columns, note, rows)


if __name__ == "__main__":
    sys.exit(Planes().main(sys.argv[1:]))
