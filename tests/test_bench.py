"""The benchmarks run, and what they write can be read. No figure is judged here."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {
    "blocked_seconds",
    "fence_seconds",
    "lost_seconds",
    "durable_seconds",
    "stored_bytes",
    "extra_memory_bytes",
}


def test_stall(tmp_path: Path) -> None:
    path = tmp_path / "stall.json"
    command = [sys.executable, "bench/stall.py", "--quick", "--json", path, "--directory", tmp_path]
    ran = subprocess.run(
        command,
        cwd=ROOT,
        # one thread: several that wait for each other are slow where others use the cores
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stderr
    results = json.loads(path.read_text())
    assert list(tmp_path.iterdir()) == [path]  # no checkpoint stays

    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == [
        "no saving",
        "torch.save + fsync",
        "dcp.async_save",
        "asyncsave, off",
        "asyncsave, level 1",
        "asyncsave, auto",
    ]
    for name, row in rows.items():
        assert row["why"] is None, name
        assert row["saves"] == results["settings"]["saves"] == 2
        assert set(row["first"]) == set(row["warm"]) == FIGURES
        for figure in (
            *row["first"].values(),
            *(x for s in row["warm"].values() for x in s.values()),
        ):
            assert math.isfinite(figure), name
        for spread in row["warm"].values():
            assert spread["min"] <= spread["median"] <= spread["max"]
        if name != "no saving":
            assert row["warm"]["blocked_seconds"]["min"] > 0
            assert row["warm"]["durable_seconds"]["min"] > 0
            assert row["warm"]["stored_bytes"]["median"] > 0.5 * results["state_bytes"]
            assert name in ran.stdout
    assert len(results["cycles"]) == len(rows) * 3

    assert results["state_bytes"] > 12 * results["parameters"]
    assert set(results["versions"]) == {"asyncsave", "torch", "python", "system"}
    assert results["hardware"]["cpu"]
    assert results["hardware"]["cores"] >= 1
    assert results["hardware"]["memory_bytes"] > 0
    assert results["filesystem"] != "unknown"
    assert results["command"][1] == "bench/stall.py"
    assert "commit" in results
