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

import argparse
import asyncio
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Bar, Spread, provenance, show_bars, start, where, write_json
from rich.console import Console
from rich.table import Table
from training import Training

import asyncsave
from asyncsave.codec.compression import CompressionSetting, parse_compression
from asyncsave.pipeline.pipeline import Pipeline
from asyncsave.pipeline.save import Target
from asyncsave.storage.filesystem import FileSystem, LocalFileSystem, WritableFile

LAYERS, WIDTH, HEADS, CONTEXT = 5, 768, 12, 64  # 36 M parameters, 428 MB of state
TRAINING_STEPS = 60
QUICK = {"layers": 2, "width": 256, "heads": 4, "training_steps": 2, "rounds": 1}
ROUNDS = 5
THROTTLE = 150e6  # bytes per second: a network filesystem, or a cheap cloud disk
WAYS: dict[str, CompressionSetting] = {"off": "off", "level 1": 1, "auto": "auto"}
DISK, BUSY, SLOW = "this disk", "this disk, cores busy", "150 MB/s"
MOST_TIMES_OFF, LEAST_GAIN = 1.1, 1.15
ORDINALS = ("first", "second")


class ThrottledFile:
    """A file to which writes take at least as long as a slow disk would need."""

    def __init__(self, file: WritableFile) -> None:
        self._file = file

    async def write(self, view: memoryview) -> None:
        began = time.perf_counter()
        await self._file.write(view)
        await asyncio.sleep(view.nbytes / THROTTLE - (time.perf_counter() - began))

    async def sync(self) -> None:
        await self._file.sync()

    async def close(self) -> None:
        await self._file.close()


class ThrottledFileSystem(LocalFileSystem):
    """The machine's files, written no faster than `THROTTLE`."""

    async def create(self, path: Path, executor: Executor) -> WritableFile:
        return ThrottledFile(await super().create(path, executor))


@dataclass(frozen=True, slots=True)
class Sample:
    """One save, as measured."""

    place: str
    way: str
    round: int
    ordinal: str
    durable_seconds: float
    stored_bytes: int
    chunks: int
    encoded_chunks: int


def measure(
    place: str, filesystem: FileSystem, state: dict[str, Any], directory: Path, rounds: int
) -> Iterator[Sample]:
    """Save twice in every round with a new saver of each way."""
    order = random.Random(0)
    for round_ in range(rounds):
        for way in order.sample(list(WAYS), len(WAYS)):
            pipeline = Pipeline(
                filesystem,
                compression=parse_compression(WAYS[way]),
                memory_limit="auto",
                overlap=True,
                durable=True,
            )
            try:
                for ordinal in ORDINALS:
                    path = directory / ordinal
                    handle = pipeline.save(state, Target(path), time.perf_counter())
                    report = handle.result()
                    yield Sample(
                        place,
                        way,
                        round_,
                        ordinal,
                        report.durable_seconds,
                        report.stored_bytes,
                        report.chunks,
                        report.encoded_chunks,
                    )
                    shutil.rmtree(path)
                    os.sync()
            finally:
                pipeline.close()


def multiply() -> None:
    """Keep one core busy until killed, as a training would."""
    torch.set_num_threads(1)
    one = torch.randn(512, 512)
    while True:
        one @ one


@contextmanager
def busy_cores() -> Iterator[None]:
    """Keep all cores busy."""
    spawn = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0))
    processes = [spawn.Process(target=multiply, daemon=True) for _ in range(cores)]
    for process in processes:
        process.start()
    try:
        time.sleep(4)  # they import torch first
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


# -- results ----------------------------------------------------------------------------------


def summarize(samples: list[Sample]) -> list[dict[str, Any]]:
    """Return one row for every place, way and ordinal."""
    keys = dict.fromkeys((each.place, each.ordinal, each.way) for each in samples)
    rows = []
    for place, ordinal, way in keys:
        own = [s for s in samples if (s.place, s.ordinal, s.way) == (place, ordinal, way)]
        rows.append(
            {
                "place": place,
                "save": ordinal,
                "way": way,
                "saves": len(own),
                "durable_seconds": asdict(Spread.of(s.durable_seconds for s in own)),
                "stored_bytes": asdict(Spread.of(s.stored_bytes for s in own)),
                "encoded_share": asdict(Spread.of(s.encoded_chunks / s.chunks for s in own)),
            }
        )
    return sorted(rows, key=lambda row: [*keys].index((row["place"], row["save"], row["way"])))


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """Return what the project promises, and what was measured."""
    seconds = {
        (row["place"], row["save"], row["way"]): row["durable_seconds"]["median"] for row in rows
    }
    found = []
    for place in (DISK, BUSY, SLOW):
        for save in ORDINALS:
            auto, off = seconds[place, save, "auto"], seconds[place, save, "off"]
            what = f"{place}, {save} save: durable, "
            if place == SLOW:
                found.append(Bar.of(f"{what}off / auto", off / auto, LEAST_GAIN, at_least=True))
            else:
                found.append(Bar.of(f"{what}auto / off", auto / off, MOST_TIMES_OFF))
    return found


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(
        title='Does compression="auto" choose well?',
        caption=(
            f"{results['state_bytes'] / 1e6:.0f} MB of state, {results['settings']['rounds']} "
            f"saves each\n{where(results)}\nmedian, and smallest … largest"
        ),
    )
    table.add_column("")
    table.add_column("save")
    table.add_column("way")
    for name in ("durable s", "stored MB", "chunks encoded"):
        table.add_column(name, justify="right")
    for row in results["rows"]:
        share = row["encoded_share"]
        table.add_row(
            row["place"],
            row["save"],
            row["way"],
            Spread(**row["durable_seconds"]).show(3),
            f"{row['stored_bytes']['median'] / 1e6:.0f}",
            f"{share['median']:.0%}\n[dim]{share['min']:.0%} … {share['max']:.0%}[/dim]",
        )
    console.print(table)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="default: bench/results/auto.json; quick: none")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all")
    options = parser.parse_args(arguments)
    sizes = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "training_steps": TRAINING_STEPS}
    for name, value in (sizes | (QUICK if options.quick else {})).items():
        setattr(options, name, value)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.json is None and not options.quick:
        options.json = RESULTS / "auto.json"
    return options


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    options = parse(arguments)
    console, log = start(110)
    began = time.perf_counter()
    size = {"layers": options.layers, "width": options.width, "heads": options.heads}
    training = Training(**size, batch=1, context=CONTEXT)
    for _ in range(options.training_steps):
        training.step()
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix=".auto-", dir=options.directory) as name:
        directory = Path(name).resolve()
        about = provenance("cpu", directory)
        log.print(f"asyncsave {asyncsave.__version__}, checkpoints on {about['filesystem']}")

        def run(place: str, filesystem: FileSystem) -> None:
            for each in measure(place, filesystem, training.state, directory, options.rounds):
                samples.append(each)
                log.print(
                    f"{each.round + 1}/{options.rounds} {place}, {each.way}, {each.ordinal} save: "
                    f"{each.durable_seconds:.3f} s, {each.encoded_chunks} of {each.chunks} encoded"
                )

        run(DISK, LocalFileSystem())
        with busy_cores():
            run(BUSY, LocalFileSystem())
        run(SLOW, ThrottledFileSystem())
    rows = summarize(samples)
    judged = bars(rows)
    results = {
        "benchmark": "auto",
        "question": "Does auto choose well?",
        **about,
        "settings": {**size, "training_steps": options.training_steps, "rounds": options.rounds},
        "state_bytes": training.state_bytes,
        "run_seconds": time.perf_counter() - began,
        "bars": [asdict(bar) for bar in judged],
        "rows": rows,
        "saves": [asdict(each) for each in samples],
    }
    if options.json is not None:
        write_json(options.json, results)
    show(results, console)
    show_bars(judged, console)
    log.print(f"{results['run_seconds']:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
