"""bench/restore.py runs, and what it writes can be read. No figure is judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_restore(tmp_path: Path) -> None:
    path = tmp_path / "restore.json"
    command = [sys.executable, "bench/restore.py", "--quick", "--json", path]
    ran = subprocess.run(
        [*command, "--directory", tmp_path],
        cwd=ROOT,
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
        "torch.load",
        "torch.load(mmap=True) + clone",
        "safetensors load_file + clone",
        "asyncsave.load, off",
        "asyncsave.load, level 1",
        "torch.load + copy_",
        "dcp.load",
        "asyncsave.restore, off",
        "asyncsave.restore, level 1",
        "asyncsave.verify, off",
        "asyncsave.verify, level 1",
    ]
    for name, row in rows.items():
        assert name in ran.stdout
        if row["why"] is not None:
            assert (name, row["why"]) == (
                "safetensors load_file + clone",
                "safetensors is not installed",
            )
            assert row["cold"] is row["warm"] is None
            continue
        for temperature in ("cold", "warm"):
            spread = row[temperature]
            assert 0 < spread["min"] <= spread["median"] <= spread["max"] < 1000
            assert len(row["seconds"][temperature]) == results["settings"]["rounds"] == 2
        assert row["stored_bytes"] > 0.5 * results["state_bytes"]
    plain, packed = rows["asyncsave.restore, off"], rows["asyncsave.restore, level 1"]
    assert packed["stored_bytes"] < plain["stored_bytes"]

    assert [type(bar["met"]) for bar in results["bars"]] == [bool] * 3
    cold = rows["asyncsave.restore, off"]["cold"]["median"] / rows["torch.load"]["cold"]["median"]
    assert results["bars"][0]["measured"] == cold
    assert results["bars"][0]["met"] is (cold >= 1.2)
    assert results["command"][1] == "bench/restore.py"
