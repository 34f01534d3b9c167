"""Every test fails if it leaves a thread, a file descriptor or a lock behind."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from tests import counts

torch.set_num_threads(2)


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if "asyncsave" in thread.name}


def _descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own descriptor
    return found


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before, running = _descriptors(), _threads()
    yield
    deadline = time.monotonic() + 5
    while True:
        threads = _threads() - running
        extra = {name: path for name, path in _descriptors().items() if name not in before}
        if not threads and not extra:
            return
        if time.monotonic() > deadline:
            break
        gc.collect()
        time.sleep(0.01)
    assert not threads, f"threads left: {threads}"
    assert not extra, f"file descriptors left: {extra}"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if summary := counts.summary():
        terminalreporter.write_line(summary)
