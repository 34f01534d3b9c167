"""kill -9, SIGTERM and the end of the program, with real processes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import asyncsave

from . import counts

SAVING = """
import sys, torch, asyncsave
directory, seed = sys.argv[1], int(sys.argv[2])
torch.manual_seed(seed)
state = {"w": torch.zeros(300_000), "v": [torch.zeros(1000)], "step": 0}
with asyncsave.Checkpointer(directory, every_steps=1, keep_last=3, compression=seed % 2) as ckpt:
    start = ckpt.restore(state) or 0
    assert state["step"] == start
    print("restored", start, flush=True)
    for step in range(start + 1, 10_000):
        state["w"].fill_(step); state["v"][0].fill_(-step); state["step"] = step
        handle = ckpt.step(step, state)
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


def start(directory: Path, seed: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SAVING, str(directory), str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen[str]) -> tuple[list[tuple[str, int]], str]:
    out, err = child.communicate(timeout=60)
    lines = [line.split() for line in out.splitlines(keepends=True) if line.endswith("\n")]
    return [(word, int(number)) for word, number in lines], err


def kill_once(directory: Path, seed: int, delay: float) -> int:
    """Let a child save for ``delay`` seconds, kill it, check; return the newest step."""
    child = start(directory, seed)
    assert child.stdout is not None
    first = child.stdout.readline()
    assert first.startswith("restored"), child.communicate()[1]
    time.sleep(delay)
    child.kill()
    events, _ = finish(child)
    durable = [step for word, step in events if word == "durable"]
    steps = sorted(int(path.name[5:]) for path in directory.glob("step-*"))
    newest = steps[-1] if steps else 0
    if durable:
        assert newest >= durable[-1], "what was reported durable is there"
    for step in steps:
        check(directory, step)
    counts.add("kills")
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
    child = start(directory, 0)
    assert child.stdout is not None
    assert child.stdout.readline() == f"restored {newest}\n"
    child.send_signal(signal.SIGTERM)
    events, err = finish(child)
    assert child.returncode == 0, err
    assert events[-1][0] == "stopped" or events[-2][0] == "stopped"
    assert not list(directory.glob(".step-*"))
    assert leftovers, "no kill hit a save in flight: the test has become blunt"


def test_twenty_kills(tmp_path: Path) -> None:
    kills(tmp_path, 20, 1)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path) -> None:
    kills(tmp_path, 200, 2)


def test_sigterm_leaves_the_state_of_that_moment(tmp_path: Path) -> None:
    child = start(tmp_path, 1)
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    events, err = finish(child)
    assert child.returncode == 0, err
    stopped = [step for word, step in events if word == "stopped"]
    assert len(stopped) == 1
    check(tmp_path, stopped[0])
    assert asyncsave.load(tmp_path)["step"] == stopped[0]


def program(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", text, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_program_ends_during_a_save(tmp_path: Path) -> None:
    text = """
import sys, torch, asyncsave
asyncsave.save({"w": torch.ones(3_000_000)}, sys.argv[1] + "/single")
ckpt = asyncsave.Checkpointer(sys.argv[1] + "/run")
ckpt.save(1, {"w": torch.ones(3_000_000)})
"""
    ended = program(text, tmp_path)
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
    ended = program(FAILING, tmp_path)
    assert ended.returncode == 1
    assert ended.stdout == "end of training\n"
    assert "WriteError" in ended.stderr
    assert "nobody asked for its result" in ended.stderr


def test_a_failure_at_exit_does_not_hide_the_trainings_exception(tmp_path: Path) -> None:
    ended = program(FAILING + "\nraise KeyError('mine')", tmp_path)
    assert ended.returncode == 1
    assert "KeyError: 'mine'" in ended.stderr
    assert "WriteError" in ended.stderr


def test_a_failure_that_was_seen_leaves_the_exit_status_alone(tmp_path: Path) -> None:
    ended = program(FAILING + "\nprint(type(handle.exception()).__name__)", tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "WriteError" in ended.stdout
