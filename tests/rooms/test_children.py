"""The children that other tests run programs in are like processes that python starts."""

from __future__ import annotations

import signal

import pytest

from tests import children


@pytest.mark.parametrize(
    ("program", "status", "out", "err"),
    [
        ("import sys\nprint(sys.argv)\nsys.exit(3)", 3, "['-c', 'a', '5']\n", ""),
        ("print(__name__, __import__('__main__').__dict__ is globals())", 0, "__main__ True\n", ""),
        ("1 / 0", 1, "", "ZeroDivisionError"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "", "KeyboardInterrupt"),
        ("import os\nos.kill(os.getpid(), 9)", -signal.SIGKILL, "", ""),
        ("import atexit\natexit.register(print, 'over')", 0, "over\n", ""),
        ("import warnings\nwarnings.warn('careful')", 1, "", "UserWarning: careful"),
        (
            "import torch\nprint(float((torch.ones(600, 600) @ torch.ones(600)).sum()))",
            0,
            "360000.0\n",
            "",
        ),
    ],
)
def test_a_child_ends_as_a_process_does(program: str, status: int, out: str, err: str) -> None:
    ended = children.run(program, "a", 5)
    assert ended.returncode == status
    assert ended.stdout == out
    assert err in ended.stderr
    assert bool(err) == bool(ended.stderr)


def test_a_child_that_is_killed() -> None:
    with children.start("import time\nprint('up', flush=True)\ntime.sleep(60)") as child:
        assert child.stdout.readline() == "up\n"
        child.kill()
    assert child.returncode == -signal.SIGKILL


def test_a_child_that_does_not_end_is_killed() -> None:
    child = children.start("import time\ntime.sleep(60)")
    with pytest.raises(TimeoutError):
        child.communicate(timeout=0.1)
    assert child.returncode == -signal.SIGKILL
