"""Every test fails if it leaves a thread, a child, a file descriptor or a lock behind."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from tests import children, counts

torch.set_num_threads(2)
hypothesis.settings.register_profile("tests", deadline=None)  # the cores may be somebody else's
hypothesis.settings.load_profile("tests")


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if "asyncsave" in thread.name}


def _descriptors() -> dict[str, str]:
    found = {}
    for name in set(os.listdir("/proc/self/fd")) - children.kept()[0]:
        try:
            path = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own descriptor
        if not path.endswith(".ttf"):  # matplotlib, where it is installed, keeps its fonts open
            found[name] = path
    return found


def _processes() -> set[str]:
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended meanwhile
            found.update((task / "children").read_text().split())
    return found - children.kept()[1]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before, running, living = _descriptors(), _threads(), _processes()
    yield
    deadline = time.monotonic() + 5
    while True:
        threads, processes = _threads() - running, _processes() - living
        extra = {name: path for name, path in _descriptors().items() if name not in before}
        if not (threads or extra or processes):
            return
        for pid in processes:  # what a program left that has ended is inherited (see children.py)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(int(pid), os.WNOHANG)
        if time.monotonic() > deadline:
            break
        gc.collect()
        time.sleep(0.01)
    assert not threads, f"threads left: {threads}"
    assert not extra, f"file descriptors left: {extra}"
    assert not processes, f"children left: {processes}"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes that share the tests
        session.config.workeroutput["counts"] = counts.totals()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for what, count in getattr(node, "workeroutput", {}).get("counts", {}).items():
        counts.add(what, count)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if summary := counts.summary():
        terminalreporter.write_line(summary)
