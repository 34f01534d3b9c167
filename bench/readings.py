"""What bench/knobs.py reads of the product.

Each function of a name without underscore makes ready, in an empty directory, and returns what
reads once: figures by their names, in seconds where those do not say another thing. Whatever it
opens ends with its process.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import auto
import gil
import numpy as np
import torch
from cache import drop, trim, warm
from codings import asyncsave_coding
from machine import peak_memory
from training import State, trained_tensors
from ways import LEVEL_1, OFF, settle, ways

import asyncsave
from asyncsave.storage.local import LOCAL

Read = Callable[[], dict[str, float]]

MIB = 1 << 20
TRAINING_STEPS = 30


def _state(mib: int, quick: bool) -> dict[str, torch.Tensor]:
    return trained_tensors((4 if quick else mib) * MIB, 2 if quick else TRAINING_STEPS)


def _seconds(call: Callable[[], object]) -> float:
    gc.collect()
    trim()
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


# -- saving -------------------------------------------------------------------------------------


def _save(saver: asyncsave.Saver, state: Any, path: Path) -> dict[str, float]:
    report = saver.save(state, path).result()
    shutil.rmtree(path)
    os.sync()
    return {"blocked": report.blocked_seconds, "durable": report.durable_seconds}


def saves(directory: Path, quick: bool, memory_limit: int | str = "auto") -> Read:
    """Later saves of one saver, without compression."""
    state = _state(512, quick)
    saver = asyncsave.Saver(compression="off", memory_limit=memory_limit, reuse="off")
    return lambda: _save(saver, state, directory / "a")


def saves_in_little_memory(directory: Path, quick: bool) -> Read:
    """The same, with a fifth of the memory that the state takes."""
    return saves(directory, quick, (4 if quick else 512) * MIB // 5)


def memory_beyond_the_limit(directory: Path, quick: bool) -> Read:
    """The most memory that a new saver takes, less its memory_limit."""
    state, limit = _state(512, quick), (4 if quick else 128) * MIB

    def read() -> dict[str, float]:
        found = {}
        for what, level in (("as it is", 0), ("encoded", 1)):
            gc.collect()
            trim()
            with (
                peak_memory(0.003) as peak,
                asyncsave.Saver(compression=level, memory_limit=limit, reuse="off") as saver,
            ):
                _save(saver, state, directory / "a")
            found[f"{what}: MiB"] = (peak.most - peak.before - limit) / MIB
        return found

    return read


def saves_beside_python(directory: Path, quick: bool, name: str = OFF) -> Read:
    """Saves beside a loop of pure Python, as bench/gil.py measures them."""
    state = State({"model": _state(512, quick)})
    torch.set_num_threads(1)
    (way,) = ways(directory, names=[name])
    way.open(state)

    def read() -> dict[str, float]:
        turn = gil.measure(way, state, 0.05 if quick else 1.0)
        settle(way)
        return {"save": turn["save_seconds"], "lost": turn["lost_seconds"]}

    return read


def encoded_beside_python(directory: Path, quick: bool) -> Read:
    """The same, with level 1."""
    return saves_beside_python(directory, quick, LEVEL_1)


def chosen(directory: Path, quick: bool) -> Read:
    """Two saves of a new saver with "auto", on this disk and on a slow one, as in bench/auto.py."""
    state = _state(256, quick)
    disks = (("", LOCAL), (f", {auto.SLOW}", auto.ThrottledDisk()))

    def read() -> dict[str, float]:
        return {
            f"{save['ordinal']}{where}": save["durable_seconds"]
            for where, disk in disks
            for save in auto.measure(disk, "auto", state, directory)
        }

    return read


# -- reading ------------------------------------------------------------------------------------


def reads(directory: Path, quick: bool) -> Read:
    """Reading everything, out of the page cache and from it."""
    state = _state(256, quick)
    off, level_1 = directory / "off", directory / "level1"
    asyncsave.save(state, off, compression="off").result()
    asyncsave.save(state, level_1, compression=1).result()

    def read() -> dict[str, float]:
        drop(off)
        load = _seconds(lambda: asyncsave.load(off))
        drop(off)
        restore = _seconds(lambda: asyncsave.restore(off, state))
        drop(level_1)
        cold = _seconds(lambda: asyncsave.restore(level_1, state))
        warm(level_1)
        again = _seconds(lambda: asyncsave.restore(level_1, state))
        return {
            "load, cold": load,
            "restore, cold": restore,
            "restore level 1, cold": cold,
            "restore level 1, warm": again,
        }

    return read


def first_save_and_reads(directory: Path, quick: bool) -> Read:
    """A new saver's first save, a later one, and reading everything."""
    state, rest = _state(512, quick), reads(directory, quick)

    def read() -> dict[str, float]:
        trim()
        with asyncsave.Saver(compression="off", reuse="off") as saver:
            first, later = (_save(saver, state, directory / "a") for _ in range(2))
        own = {"first: blocked": first["blocked"], "first: durable": first["durable"]}
        return {**own, "later: durable": later["durable"], **rest()}

    return read


def reads_in_pieces(directory: Path, quick: bool) -> Read:
    """Reading one file from its start to its end, out of the page cache, in pieces."""
    path, nbytes = directory / "file", (4 if quick else 128) * MIB
    path.write_bytes(os.urandom(nbytes))
    memory = np.empty(2 * MIB, np.uint8)
    file = LOCAL.open(path)

    def through(piece: int) -> None:
        for offset in range(0, nbytes, piece):
            file.read_into(offset, memory[:piece].data)

    def read() -> dict[str, float]:
        found = {}
        for kib in (64, 256, 512, 1024, 2048):
            drop(path)
            begun = time.perf_counter()
            through(kib << 10)
            found[f"{kib} KiB"] = time.perf_counter() - begun
        return found

    return read


def many_leaves(directory: Path, quick: bool) -> Read:
    """Loading many small tensors, from the page cache."""
    counts = {"elements": (1, 20_000), "KiB": (256, 10_000), "8 KiB": (2048, 5_000)}
    for name, (elements, count) in counts.items():
        values = torch.randn(count // 500 if quick else count, elements)
        tensors = {str(i): value.clone() for i, value in enumerate(values)}
        asyncsave.save(tensors, directory / name, compression="off").result()

    def read() -> dict[str, float]:
        return {name: _seconds(partial(asyncsave.load, directory / name)) for name in counts}

    return read


# -- coding -------------------------------------------------------------------------------------


def codes(directory: Path, quick: bool) -> Read:
    """Coding one chunk at level 1, and decoding it in one thread and in two."""
    state = _state(32, quick)
    whole = torch.cat([tensor.flatten() for tensor in state.values()]).view(torch.uint8).numpy()
    chunk = whole[: (2 if quick else 16) * MIB].copy()
    coding = asyncsave_coding(1)
    coders = [coding.make(torch.float32, 1) for _ in range(2)]
    outs = [np.empty_like(chunk) for _ in coders]
    pool = ThreadPoolExecutor(2)

    def read() -> dict[str, float]:
        begun = time.perf_counter()
        coded = [encode(chunk) for encode, _ in coders]
        encoded = time.perf_counter()
        for (_, decode), one, out in zip(coders, coded, outs, strict=True):
            decode(one, out)
        decoded = time.perf_counter()
        list(pool.map(lambda i: coders[i][1](coded[i], outs[i]), range(2)))
        together = time.perf_counter()
        return {
            "encode": (encoded - begun) / 2,
            "decode": (decoded - encoded) / 2,
            "decode, in two threads": (together - decoded) / 2,
            "stored MB": coding.length(coded[0]) / 1e6,
        }

    return read
