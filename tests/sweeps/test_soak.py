"""The soak test, for a few seconds; `python -m tests.sweeps.soak` is the long one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_five_seconds_of_soaking() -> None:
    command = [sys.executable, "-m", "tests.sweeps.soak", "--seconds", "5", "--seed", "1"]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert ended.returncode == 0, ended.stderr
    for what in ("rounds", "saves", "loads", "failures"):
        found = re.search(rf"(\d+) {what}\b", ended.stdout)
        assert found, f"no {what}: {ended.stdout}"
        assert int(found[1]) > 0
