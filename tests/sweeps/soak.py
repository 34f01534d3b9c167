"""Soak: train, save, fail, restore for a long time, and watch that nothing grows or is left behind.

    python -m tests.sweeps.soak --seconds 600

A model trains and saves in rounds. In each round the Checkpointer has another policy, compression,
memory limit and busy policy, the disk fails now and then, and the round ends by close(), by
an exception or by being dropped. After every round all that is durable is compared with what was
saved, and memory, descriptors and threads with what they were after the first rounds.

Prints one line of figures; the exit status is 1 at the first violation.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import itertools
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

import asyncsave
from asyncsave import Checkpointer
from tests.doubles.fault_disk import Fault, FaultDisk, Faults
from tests.support import eventually

SETTLED_ROUNDS = 10
"""What memory was after so many rounds is what it is compared with; all else after the first."""
GROWTH_BYTES = 48 << 20
KEEP_LAST = 3


class ViolationError(Exception):
    """Something that must not be."""


class RandomFaults(Faults):
    """Fails one operation in 60, with one of the errors that disks report."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self._chance = chance
        self.on = False

    def meet(self, kind: str, path: Path, offset: int = 0, length: int = 0) -> Fault | None:
        if self.on and self._chance.randrange(60) == 0:
            number = self._chance.choice([errno.EIO, errno.ENOSPC, errno.EDQUOT])
            raise OSError(number, os.strerror(number), str(path))
        return None


class Training:
    """A small model in training."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.Linear(512, 64))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.step = 0
        self.train()

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(16, 64)).square().mean().backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "rng": asyncsave.RngState(),
            "step": self.step,
        }

    def mark(self) -> tuple[int, ...]:
        """Return what tells this state from any other."""
        tensors = [*self.model.parameters()]
        for each in self.optimizer.state.values():
            tensors += [value for value in each.values() if value.dim()]
        return self.step, *(int(t.detach().view(torch.int32).sum()) for t in tensors)


@dataclass
class Soak:
    directory: Path
    chance: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    marks: dict[int, tuple[int, ...]] = field(default_factory=dict)
    base: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=Counter)

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        faults = RandomFaults(self.chance)
        training = Training(0)
        for number in itertools.count():
            # a slow machine has few rounds: go on until there was something to survive
            if time.monotonic() > end and number > 0 and self.counts["failures"]:
                return
            training = self.round(training, faults)
            self.check_directory()
            self.check_process(number)
            self.counts["rounds"] += 1

    def options(self) -> dict[str, Any]:
        pick = self.chance.choice
        return {
            "keep_last": KEEP_LAST,
            "keep_every": pick([None, 10]),
            "compression": pick(["auto", "off", 1, 3]),
            "memory_limit": pick(["auto", 4 << 20]),
            "on_busy": pick(["wait", "skip", "error"]),
            "on_error": pick(["raise", "warn"]),
            "every_steps": pick([1, 2]),
            "durable": pick([True, False]),
        }

    def round(self, training: Training, faults: RandomFaults) -> Training:
        """Open, restore, train and save a while, and end in one of the ways there are."""
        faults.on = False
        if self.chance.random() < 0.3:
            training = Training(self.chance.randrange(1000))  # a new process, so to say
        ckpts = [Checkpointer(FaultDisk(faults).at(self.directory), **self.options())]
        handles: list[asyncsave.SaveHandle] = []
        start = ckpts[0].restore(training.state())
        training.step = start or 0
        if start is not None and training.mark() != self.marks[start]:
            raise ViolationError(f"step {start} was restored, and is not what was saved")
        faults.on = True
        for _ in range(self.chance.randrange(4, 20)):
            training.step += 1
            training.train()
            self.marks[training.step] = training.mark()
            try:
                handle = ckpts[0].step(training.step, training.state())
            except asyncsave.BusyError:
                self.counts["busy"] += 1
            except (asyncsave.SaveError, asyncsave.CommitError) as error:
                self.counts["failures seen"] += 1
                # its handle keeps the error, and that the frames, which keep the Checkpointer
                traceback.clear_frames(error.__traceback__)
                # The error was an earlier save's, and this step's own was begun all the same.
                # Private: whoever gets the error does not get the handle.
                current = ckpts[0]._pipeline.current
                handles += [current] if current is not None and current not in handles else []
            else:
                handles += [handle] if handle else []
        self.end(ckpts)
        faults.on = False
        self.judge(handles)
        return training

    def end(self, ckpts: list[Checkpointer]) -> None:
        how = self.chance.choice(["close", "with", "drop"])
        self.counts[how] += 1
        try:
            if how == "close":
                ckpts[0].close()
            elif how == "with":
                with contextlib.suppress(KeyError), ckpts[0]:
                    raise KeyError("of the training")
        except (asyncsave.SaveError, asyncsave.CommitError):
            self.counts["failures seen"] += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            ckpts.clear()
            gc.collect()
        if not eventually(lambda: not own_threads(), 30):
            raise ViolationError(f"threads are left after {how}: {own_threads()}")

    def judge(self, handles: list[asyncsave.SaveHandle]) -> None:
        there = {int(path.name[5:]) for path in self.directory.glob("step-*")}
        good = []
        for handle in handles:
            if not handle.done():
                raise ViolationError(f"{handle} has not ended")
            error = handle.exception()
            if error is None:
                good.append(handle.step)
            elif not isinstance(error, (asyncsave.SaveError, asyncsave.CommitError)):
                raise ViolationError(f"{handle} ended with {error!r}")
            elif isinstance(error, asyncsave.SaveError) and handle.step in there:
                raise ViolationError(f"{handle} failed, and is there")
        self.counts["saves"] += len(good)
        self.counts["failures"] += len(handles) - len(good)
        lost = set(good[-1:]) - there
        if lost:
            raise ViolationError(f"durable and gone: {lost}; there: {sorted(there)}, {handles}")

    def check_directory(self) -> None:
        """Every checkpoint is what was saved at its step; beside them, only what a sweep takes."""
        steps = []
        for name in sorted(os.listdir(self.directory)):
            if name.startswith(".step-"):
                self.counts["leftovers"] += 1
                continue
            step = int(name.removeprefix("step-"))
            state = asyncsave.load(self.directory / name)
            self.counts["loads"] += 1
            tensors = list(state["model"].values())
            for each in state["optimizer"]["state"].values():
                tensors += [value for value in each.values() if value.dim()]
            mark = (state["step"], *(int(t.view(torch.int32).sum()) for t in tensors))
            if mark != self.marks[step]:
                raise ViolationError(f"{name} is not what was saved")
            steps.append(step)
        Checkpointer(self.directory).close()
        left = [name for name in os.listdir(self.directory) if not name.startswith("step-")]
        if left:
            raise ViolationError(f"not swept: {left}")
        # pruning may have failed now and then, but the next one makes up for it
        if len([step for step in steps if step % 10]) > 40:
            raise ViolationError(f"nothing is pruned: {steps}")

    def check_process(self, number: int) -> None:
        gc.collect()
        process = psutil.Process()
        now = {
            "rss": process.memory_info().rss,
            "descriptors": process.num_fds(),
            "threads": threading.active_count(),
        }
        for name, value in now.items():
            self.peak[name] = max(self.peak[name], value)
        if number == 0:
            self.base = now
        elif number <= SETTLED_ROUNDS:
            self.base["rss"] = now["rss"]
        elif now["rss"] > self.base["rss"] + GROWTH_BYTES:
            raise ViolationError(f"memory grew from {self.base['rss']} to {now['rss']} bytes")
        if now["descriptors"] > self.base["descriptors"]:
            raise ViolationError(f"descriptors: {self.base['descriptors']} → {now['descriptors']}")
        if now["threads"] > self.base["threads"]:
            raise ViolationError(f"threads: {self.base['threads']} → {now['threads']}")


def own_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("asyncsave")]


def soak(seconds: float, seed: int) -> str:
    """Run; return the line of figures. Raises `ViolationError`."""
    directory = Path(tempfile.mkdtemp(prefix="asyncsave-soak-"))
    began = time.monotonic()
    it = Soak(directory / "run", random.Random(seed))
    try:
        it.run(seconds)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(it.counts.items()))
    settled = min(SETTLED_ROUNDS, it.counts["rounds"] - 1)
    grown = (psutil.Process().memory_info().rss - it.base["rss"]) / 1e6
    return (
        f"{time.monotonic() - began:.0f} s, seed {seed}: {counts}; memory {grown:+.1f} MB since "
        f"round {settled}, at most {it.peak['rss'] / 1e6:.0f} MB, "
        f"{it.peak['descriptors']} descriptors, {it.peak['threads']} threads"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweeps.soak")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    logging.getLogger("asyncsave").addHandler(logging.NullHandler())  # it fails all the time
    try:
        print(soak(arguments.seconds, arguments.seed))
    except ViolationError as violation:
        print(f"violation: {violation}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
