"""kill -9, SIGTERM and the end of the program, with real processes.

A child saves at every step and says on a pipe what is durable. Wherever it is killed, all it said
is there, as far as retention keeps it, everything that is there loads, and a new process goes on.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import torch

import asyncsave
from tests import children, counts
from tests.children import Child

SAVING = """
import sys, torch, asyncsave
directory, seed = sys.argv[1], int(sys.argv[2])
torch.manual_seed(seed)
state = {"w": torch.zeros(300_000), "v": [torch.zeros(1000)], "step": 0}
with asyncsave.Checkpointer(directory, every_steps=1, keep_last=3, compression=seed % 2) as ckpt:
    start = ckpt.restore(state) or 0
    assert state["step"] == start
    for step in range(start + 1, 10_000):
        state["w"].fill_(step); state["v"][0].fill_(-step); state["step"] = step
        handle = ckpt.step(step, state)
        if step == start + 1:  # from the first step on, signals are handled
            print("restored", start, flush=True)
        handle.add_done_callback(lambda h: print("durable", h.step, flush=True))
        if ckpt.should_stop:
            print("stopped", step, flush=True)
            break
"""


def check(directory: Path, step: int) -> None:
    state = asyncsave.load(directory / f"step-{step:09d}")
    assert state["step"] == step
    assert torch.equal(state["w"], torch.full((300_000,), float(step)))
    assert torch.equal(state["v"][0], torch.full((1000,), -float(step)))


def finish(child: Child) -> tuple[list[tuple[str, int]], str]:
    out, err = child.stdout.read(), child.stderr.read()  # with what was read ahead of a line
    child.wait()
    child.close()
    lines = [line.split() for line in out.splitlines(keepends=True) if line.endswith("\n")]
    return [(word, int(number)) for word, number in lines], err


def kill_once(directory: Path, seed: int, delay: float) -> int:
    """Let a child save for ``delay`` seconds, kill it, check; return the newest step."""
    child = children.start(SAVING, directory, seed)
    first = child.stdout.readline()
    assert first.startswith("restored"), finish(child)[1]
    time.sleep(delay)
    child.kill()
    events, _ = finish(child)
    counts.add("kills")
    return check_all(directory, [step for word, step in events if word == "durable"])


def check_all(directory: Path, durable: list[int]) -> int:
    """Check a directory whose writer has ended, having reported these; return the newest step."""
    steps = sorted(int(path.name[5:]) for path in directory.glob("step-*"))
    newest = steps[-1] if steps else 0
    # every step is saved: a later one, durable but not yet reported, may have pruned one more
    kept = {step for step in durable if step > newest - 3}
    assert kept <= set(steps), "what was reported durable and is to be kept is there"
    assert not durable or durable[-1] in kept
    for step in steps:
        check(directory, step)
    if steps:
        assert asyncsave.load(directory)["step"] == newest
    return newest


def kills(directory: Path, count: int, seed: int) -> None:
    chance = random.Random(seed)
    newest, leftovers = 0, 0
    for i in range(count):
        after = kill_once(directory, i, chance.uniform(0, 0.25))
        assert after >= newest
        newest = after
        leftovers += len(list(directory.glob(".step-*")))
    assert newest > count / 2
    child = children.start(SAVING, directory, 0)
    assert child.stdout.readline() == f"restored {newest}\n"
    child.send_signal(signal.SIGTERM)
    events, err = finish(child)
    assert child.returncode == 0, err
    assert events[-1][0] == "stopped" or events[-2][0] == "stopped"
    assert not list(directory.glob(".step-*"))
    assert leftovers, "no kill hit a save in flight: the test has become blunt"


def test_sixteen_kills(tmp_path: Path) -> None:
    kills(tmp_path, 16, 1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_hundred_kills(tmp_path: Path) -> None:
    kills(tmp_path, 200, 2)


def test_sigterm_leaves_the_state_of_that_moment(tmp_path: Path) -> None:
    child = children.start(SAVING, tmp_path, 1)
    child.stdout.readline()
    time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    events, err = finish(child)
    assert child.returncode == 0, err
    stopped = [step for word, step in events if word == "stopped"]
    assert len(stopped) == 1
    check(tmp_path, stopped[0])
    assert asyncsave.load(tmp_path)["step"] == stopped[0]


SIGNALLED = """
import os, random, signal, sys, threading, time, torch, asyncsave
directory, count = sys.argv[1], int(sys.argv[2])
chance = random.Random(int(sys.argv[3]))
previous = []
signal.signal(signal.SIGTERM, lambda number, frame: previous.append(number))
state = {"w": torch.zeros(300_000), "v": [torch.zeros(1000)], "step": 0}

def shoot():
    time.sleep(chance.uniform(0, 0.06))
    for _ in range(signals):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(chance.uniform(0.001, 0.01))  # two at once are one to the system

for i in range(count):
    signals = chance.randint(1, 2)
    where = chance.choice(["step", "wait", "save", "result"])
    previous.clear()
    shooter = threading.Thread(target=shoot)
    with asyncsave.Checkpointer(directory, every_steps=1, keep_last=3) as ckpt:
        start = ckpt.restore(state) or 0
        assert state["step"] == start
        for step in range(start + 1, start + 10_000):
            state["w"].fill_(step); state["v"][0].fill_(-step); state["step"] = step
            came = len(previous)
            handle = ckpt.step(step, state)
            if ckpt.should_stop:
                break
            assert came == 0, "a signal that came before the step stops it"
            if step == start + 1:  # from the first step on, signals are handled
                shooter.start()
            if where == "wait":
                ckpt.wait()
            elif where == "save":
                handle = ckpt.save(step, state)  # once more, in place of itself
            elif where == "result":
                handle.result()
        assert handle.done() and handle.step == step
        shooter.join()
        # signals that are pending together are one to the system
        assert 1 <= len(previous) <= signals, "the previous handler runs"
        print("stopped", step, where, signals, flush=True)
    # as a new process would see it
    assert asyncsave.load(directory)["step"] == step
    assert not [name for name in os.listdir(directory) if name.startswith(".")]
"""


def signalled(directory: Path, count: int, seed: int) -> None:
    ended = children.run(SIGNALLED, directory, count, seed, timeout=1200)
    assert ended.returncode == 0, ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert len(lines) == count
    assert {line[2] for line in lines} == {"step", "wait", "save", "result"}
    assert {line[3] for line in lines} == {"1", "2"}
    steps = [int(line[1]) for line in lines]
    assert steps == sorted(set(steps)), "each goes on where the one before stopped"
    check_all(directory, steps[-1:])


def test_sigterm_at_random_moments(tmp_path: Path) -> None:
    signalled(tmp_path, 30, 3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sigterm_at_many_random_moments(tmp_path: Path) -> None:
    signalled(tmp_path, 1000, 4)


HELD = """
import os, pathlib, signal, sys, threading, asyncsave
from tests.doubles.disks import GatedDisk
disk = GatedDisk()
place = disk.at(pathlib.Path(sys.argv[1]))
seen = []
signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
with asyncsave.Checkpointer(place, every_steps=1, on_busy=sys.argv[2]) as ckpt:
    ckpt.step(1, {"n": 1})                        # in flight
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)          # the second goes to the handler before alone
    assert seen == [signal.SIGTERM] * 2 and not ckpt.should_stop
    threading.Timer(0.2, disk.gate.set).start()
    handle = ckpt.step(2, {"n": 2})               # waits, whatever on_busy says
    assert handle.done() and ckpt.should_stop
    assert ckpt.step(3, {"n": 3}) is not None     # who does not stop goes on saving
signal.signal(signal.SIGTERM, signal.SIG_DFL)
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("on_busy", ["skip", "error"])
def test_sigterm_during_a_save_in_flight_waits_for_both(tmp_path: Path, on_busy: str) -> None:
    ended = children.run(HELD, tmp_path, on_busy)
    assert ended.returncode == -signal.SIGTERM, ended.stderr
    assert [asyncsave.load(path)["n"] for path in sorted(tmp_path.iterdir())] == [1, 2, 3]


def test_the_program_ends_during_a_save(tmp_path: Path) -> None:
    text = """
import sys, torch, asyncsave
asyncsave.save({"w": torch.ones(3_000_000)}, sys.argv[1] + "/single")
ckpt = asyncsave.Checkpointer(sys.argv[1] + "/run")
ckpt.save(1, {"w": torch.ones(3_000_000)})
"""
    ended = children.run(text, tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    for path in (tmp_path / "single", tmp_path / "run"):
        assert asyncsave.load(path)["w"].sum() == 3_000_000
    assert not list(tmp_path.glob("**/.*"))


FAILING = """
import sys, os, torch, asyncsave
os.mkdir(sys.argv[1] + "/gone")
ckpt = asyncsave.Checkpointer(sys.argv[1] + "/gone/run")
os.rename(sys.argv[1] + "/gone", sys.argv[1] + "/moved")
handle = ckpt.save(1, {"w": torch.ones(3)})
handle.wait_staged(); print("end of training")
"""


def test_a_failure_that_nobody_saw_makes_the_exit_status_non_zero(tmp_path: Path) -> None:
    ended = children.run(FAILING, tmp_path)
    assert ended.returncode == 120
    assert ended.stdout == "end of training\n"
    assert "WriteError" in ended.stderr
    assert "nobody asked for its result" in ended.stderr


def test_a_failure_at_exit_does_not_hide_the_trainings_exception(tmp_path: Path) -> None:
    ended = children.run(FAILING + "\nraise KeyError('mine')", tmp_path)
    assert ended.returncode == 1
    assert "KeyError: 'mine'" in ended.stderr
    assert "WriteError" in ended.stderr


def test_a_failure_that_was_seen_leaves_the_exit_status_alone(tmp_path: Path) -> None:
    ended = children.run(FAILING + "\nprint(type(handle.exception()).__name__)", tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "WriteError" in ended.stdout
