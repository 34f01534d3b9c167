"""The demo does what it says, and would notice if it did not."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train_lm.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_lm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_lm"] = module
    spec.loader.exec_module(module)
    return module


def test_the_quick_demo(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--quick"],
        cwd=tmp_path,
        # one thread: where other programs want the cores too, more of them wait for each other
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for words in ("killed with SIGKILL", "resumed from step", "What each save", "Bit-identical"):
        assert words in ran.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_comparison_sees_one_bit(demo: ModuleType) -> None:
    def state() -> dict[str, object]:
        return {
            "model": {"w": torch.ones(100), "nan": torch.tensor(float("nan"))},
            "list": [1, 2.0, (None, "x")],
            "array": np.arange(3),
        }

    assert demo.differences(state(), state()) == []
    other = state()
    other["model"]["w"].view(torch.int32)[50] ^= 1  # type: ignore[index]
    assert demo.differences(state(), other) == ["model.w"]
    other = state()
    other["list"][2] = (None, "y")  # type: ignore[index]
    assert demo.differences(state(), other) == ["list.2.1"]
    other = state()
    del other["array"]
    assert demo.differences(state(), other) == ["the state itself"]
    assert demo.differences({"n": -0.0}, {"n": 0.0}) == ["n"]
