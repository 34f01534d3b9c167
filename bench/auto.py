"""Does compression="auto" choose well?

A checkpoint is saved again and again without compression, with level 1, and with "auto", which has
to find out by itself what is best where it is. Two bars:

    never much later   "auto" is durable in at most 1.1 times the time of "off" on this disk, be the
                       cores idle or busy with a training
    helps a slow disk  where 150 MB/s is all that can be written, "off" takes at least 1.15 times as
                       long as "auto"

How it is measured. The state is that of a GPT-2-shaped model after some training with AdamW in fp32
(the model of stall.py): trained numbers, since zeros or random ones say nothing about compression.
Every round has a new saver for each way of saving, in an order that is drawn anew, and each saves
twice. The first save knows nothing and takes its memory from the system; the second one knows what
the first has measured. Bars hold for both, each compared with the same save of "off". The slow disk
is this one, behind a filesystem that lets a write return no sooner than 150 MB/s allow. Busy cores
are busy with matrix products in one process per core.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, ClassVar

from harness import MEDIANS, Bar, Bench, Column, Results, Size, cell, ratio, spread, table
from rich.table import Table
from training import Training

import asyncsave
from asyncsave.codec.compression import CompressionSetting
from asyncsave.storage.disk import WritableFile
from asyncsave.storage.local import LocalDisk
from asyncsave.storage.place import Place

THROTTLE = 150e6  # bytes per second: a network filesystem, or a cheap cloud disk
WAYS: dict[str, CompressionSetting] = {"off": "off", "level 1": 1, "auto": "auto"}
DISK, BUSY, SLOW = "this disk", "this disk, cores busy", "150 MB/s"
MOST_TIMES_OFF, LEAST_GAIN = 1.1, 1.15
ORDINALS = ("first", "second")

MULTIPLY = """
import numpy
one = numpy.random.default_rng(0).random((512, 512), numpy.float32)
print("busy", flush=True)
while True:
    one @ one
"""


class ThrottledFile:
    """A file to which writes take at least as long as a slow disk would need."""

    def __init__(self, file: WritableFile) -> None:
        self._file = file
        self.sync, self.close = file.sync, file.close

    async def write(self, view: memoryview) -> int:
        began = time.perf_counter()
        count = await self._file.write(view)
        await asyncio.sleep(count / THROTTLE - (time.perf_counter() - began))
        return count


class ThrottledDisk(LocalDisk):
    """The machine's files, written no faster than `THROTTLE`."""

    async def create(self, path: Path, executor: Executor) -> WritableFile:
        return ThrottledFile(await super().create(path, executor))


def measure(disk: LocalDisk, way: str, state: Any, directory: Path) -> Iterator[dict[str, Any]]:
    """Save twice with a new saver; yield what each save took and made."""
    names = ("durable_seconds", "stored_bytes", "chunks", "encoded_chunks")
    with asyncsave.Saver(compression=WAYS[way], reuse="off") as saver:
        for ordinal in ORDINALS:
            path = directory / ordinal
            report = saver.save(state, Place(path, disk)).result()
            shutil.rmtree(path)
            os.sync()
            yield {"ordinal": ordinal, **{name: getattr(report, name) for name in names}}


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Keep all cores busy, as a training would."""
    one = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        for _ in os.sched_getaffinity(0):
            command = [sys.executable, "-c", MULTIPLY]
            child = subprocess.Popen(command, env=one, stdout=subprocess.PIPE)
            stack.enter_context(child)
            stack.callback(child.kill)
            assert child.stdout is not None
            child.stdout.readline()
        yield


class Auto(Bench):
    name = "auto"
    question = "Does auto choose well?"
    sizes: ClassVar = {
        "layers": Size(5, quick=1),
        "width": Size(768, quick=256),  # 36 M parameters, 428 MB of state
        "heads": Size(12, quick=4),
        "training_steps": Size(60, quick=2),
        "rounds": Size(5, quick=1),
    }

    def measure(self) -> Results:
        options = self.options
        training = Training(options.layers, options.width, options.heads, batch=1, context=64)
        for _ in range(options.training_steps):
            training.step()
        saves = self._saves(DISK, LocalDisk(), training.state)
        with busy_cores():
            saves += self._saves(BUSY, LocalDisk(), training.state)
        saves += self._saves(SLOW, ThrottledDisk(), training.state)
        rows = summarize(saves)
        return {"state_bytes": training.state_bytes, "rows": rows, "saves": saves}

    def _saves(self, place: str, disk: LocalDisk, state: Any) -> list[dict[str, Any]]:
        rounds, saves = self.options.rounds, []
        for round_, way in self.turns(list(WAYS), rounds):
            for each in measure(disk, way, state, self.directory):
                saves.append({"place": place, "way": way, "round": round_, **each})
                self.say(
                    f"{round_}/{rounds} {place}, {way}, {each['ordinal']} save: "
                    f"{each['durable_seconds']:.3f} s, {each['encoded_chunks']} of "
                    f"{each['chunks']} encoded"
                )
        return saves

    def bars(self, results: Results) -> list[Bar]:
        seconds = {
            (row["place"], row["save"], row["way"]): row["durable_seconds"]["median"]
            for row in results["rows"]
        }
        found = []
        for place, save in itertools.product((DISK, BUSY, SLOW), ORDINALS):
            auto, off = seconds[place, save, "auto"], seconds[place, save, "off"]
            what = f"{place}, {save} save: durable, "
            if place == SLOW:
                gain = ratio(off, auto)
                found.append(Bar.of(f"{what}off / auto", gain, LEAST_GAIN, at_least=True))
            else:
                found.append(Bar.of(f"{what}auto / off", ratio(auto, off), MOST_TIMES_OFF))
        return found

    def tables(self, results: Results) -> Iterator[Table]:
        columns: dict[str, Column] = {
            "": "place",
            "save": "save",
            "way": "way",
            "durable s": ("durable_seconds", 3),
            "stored MB": lambda row: cell(row["stored_bytes"]["median"], 0, 1e6),
            "% of chunks encoded": ("encoded_share", 0, 0.01),
        }
        saves = f"{results['settings']['rounds']} saves each"
        note = f"{results['state_bytes'] / 1e6:.0f} MB of state, {saves}\n{MEDIANS}"
        yield table(results, 'Does compression="auto" choose well?', columns, note)


def summarize(saves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for every place, way and ordinal."""
    rows = []
    for place, ordinal, way in itertools.product((DISK, BUSY, SLOW), ORDINALS, WAYS):
        own = [s for s in saves if (s["place"], s["ordinal"], s["way"]) == (place, ordinal, way)]
        rows.append(
            {
                "place": place,
                "save": ordinal,
                "way": way,
                "saves": len(own),
                "durable_seconds": spread(s["durable_seconds"] for s in own),
                "stored_bytes": spread(s["stored_bytes"] for s in own),
                "encoded_share": spread(s["encoded_chunks"] / s["chunks"] for s in own),
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(Auto().main(sys.argv[1:]))
