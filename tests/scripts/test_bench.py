"""The benchmarks run, and what they write can be read. No figure is judged here."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIGURES = {
    "blocked_seconds",
    "fence_seconds",
    "lost_seconds",
    "durable_seconds",
    "stored_bytes",
    "extra_memory_bytes",
}


def run(name: str, path: Path, *arguments: str | Path) -> tuple[dict[str, Any], str]:
    """Run a benchmark on a tiny state; return what it wrote and what it printed."""
    command = [sys.executable, f"bench/{name}.py", "--quick", "--json", path, *arguments]
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
    assert set(results["versions"]) == {"asyncsave", "torch", "python", "system"}
    assert results["hardware"]["cpu"]
    assert results["hardware"]["cores"] >= 1
    assert results["hardware"]["memory_bytes"] > 0
    assert results["filesystem"] != "unknown"
    assert results["command"][1] == f"bench/{name}.py"
    assert "commit" in results
    return results, ran.stdout


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def test_stall(tmp_path: Path) -> None:
    path = tmp_path / "stall.json"
    results, printed = run("stall", path, "--directory", tmp_path)
    pictures = {tmp_path / "stall.png", tmp_path / "stall-timeline.png"}
    expected = {path} | (pictures if installed("matplotlib") else set())
    assert set(tmp_path.iterdir()) == expected  # no checkpoint stays

    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == [
        "no saving",
        "copy into warm memory",
        "bare O_DIRECT write + fsync",
        "torch.save + fsync",
        "dcp.async_save",
        "dcp.async_save, its ZStandard",
        "dcp.async_save, cached stager",
        "torchsnapshot.async_take",
        "torch_checkpointing",
        "asyncsave, off",
        "asyncsave, level 1",
        "asyncsave, auto",
    ]
    for name, row in rows.items():
        peer = name.partition(".")[0]
        if peer in ("torchsnapshot", "torch_checkpointing") and not installed(peer):
            assert f"No module named '{peer}'" in row["why"]
            continue
        if row["why"] is not None:  # an old torch may not have all that a peer needs
            assert not name.startswith("asyncsave"), row["why"]
            continue
        assert row["saves"] == 2
        assert set(row["first"]) == FIGURES
        assert row["first"]["blocked_seconds"] > 0 or name == "no saving"
        assert all(math.isfinite(figure) for figure in row["first"].values())
        assert set(row["warm"]) == FIGURES
        for spread in row["warm"].values():
            assert all(math.isfinite(figure) for figure in spread.values())
            assert spread["min"] <= spread["median"] <= spread["max"]
        if not row["reference"]:
            assert row["warm"]["durable_seconds"]["min"] > 0
            assert row["warm"]["stored_bytes"]["median"] > 0.5 * results["state_bytes"]
    for cycle in results["cycles"]:
        assert len(cycle["step_ends"]) == cycle["steps"] >= 4
        assert cycle["durable_seconds"] <= cycle["cycle_seconds"]

    assert results["state_bytes"] > 12 * results["parameters"]
    assert len(results["bars"]) == 3
    assert "lost, off / the best peer's" in printed


def test_stall_where_rows_are_missing(tmp_path: Path) -> None:
    ways = ["--ways", "copy", "asyncsave, off", "level 1", "asyncsave, auto"]
    results, printed = run("stall", tmp_path / "stall.json", "--directory", tmp_path, *ways)
    assert len(results["bars"]) == 3
    judged = {bar["bar"] for bar in results["bars"] if bar["met"] is not None}
    assert judged == {"durable, auto / off ≤ 1.1"}
    assert "not measured" in printed


def test_stall_of_what_saves_nothing(tmp_path: Path) -> None:
    results, _ = run("stall", tmp_path / "stall.json", "--directory", tmp_path, "--ways", "copy")
    assert [row["name"] for row in results["rows"]] == ["no saving", "copy into warm memory"]


def test_save(tmp_path: Path) -> None:
    results, printed = run("save", tmp_path / "save.json", "--directory", tmp_path)
    assert [row["name"] for row in results["rows"]] == [
        "copy into warm memory",
        "bare O_DIRECT write + fsync",
        "dcp.async_save",
        "dcp.async_save, cached stager",
        "asyncsave, off",
        "asyncsave, off, prewarmed",
        "asyncsave, level 1",
        "asyncsave, auto",
    ]
    for row in results["rows"]:
        (turn,) = row["turns"]
        assert len(turn["blocked"]) == len(turn["durable"]) == 3
        assert all(0 < b <= d for b, d in zip(turn["blocked"], turn["durable"], strict=True))
        assert row["first_seconds"]["median"] == turn["blocked"][0]
    assert len(results["bars"]) == 7
    assert "first, off, prewarmed / a later one ≤ 1.5" in printed
    assert not list(tmp_path.glob(".save-*"))


def test_codec(tmp_path: Path) -> None:
    results, printed = run("codec", tmp_path / "codec.json")
    assert (tmp_path / "codec.png").exists() == installed("matplotlib")
    kinds = {(row["kind"], row["dtype"]) for row in results["rows"]}
    assert len(kinds) == 9
    rows = {(row["coding"], row["kind"], row["dtype"]): row for row in results["rows"]}
    names = {row["coding"] for row in results["rows"]}
    assert {"asyncsave, level 1", "asyncsave, level 22", "zstd 3 on raw bytes"} <= names
    assert ("ZipNN" in names) == installed("zipnn") == ("ZipNN" not in results["missing"])
    for kind, dtype in kinds:
        ours = rows["asyncsave, level 1", kind, dtype]
        assert ours["ratio"] > 1.05
        assert ours["encode"]["median"] > 0
        assert ours["decode_all"]["median"] > 0
        assert rows["asyncsave, level 22", kind, dtype]["encode_all"] is None
    assert "zstd 3 on raw" in printed


def test_memory(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    results, printed = run("memory", path, "--directory", tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert [row["limit_bytes"] for row in results["rows"]] == [8 << 20, 8 << 20, "auto", "auto"]
    for row in results["rows"]:
        assert row["state_bytes"] >= 16 << 20
        assert 0 < row["after_2_bytes"] <= row["peak_bytes"]
        assert row["says_bytes"] > 0
        assert len(row["after_bytes"]) == 3
    assert len(results["bars"]) == 3
    assert "peak extra memory" in printed


def test_auto(tmp_path: Path) -> None:
    path = tmp_path / "auto.json"
    results, printed = run("auto", path, "--directory", tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    places, ways = ["this disk", "this disk, cores busy", "150 MB/s"], {"off", "level 1", "auto"}
    rows = {(row["place"], row["save"], row["way"]): row for row in results["rows"]}
    assert set(rows) == {(p, s, w) for p in places for s in ("first", "second") for w in ways}
    for (_, _, way), row in rows.items():
        assert row["saves"] == results["settings"]["rounds"] == 1
        assert 0 < row["durable_seconds"]["min"] <= row["durable_seconds"]["max"]
        encoded = row["encoded_share"]["median"]
        assert encoded == {"off": 0.0, "level 1": 1.0}.get(way, encoded)
    slow = rows["150 MB/s", "second", "off"]["durable_seconds"]["median"]
    assert slow > 0.9 * results["state_bytes"] / 150e6
    assert len(results["bars"]) == 6
    assert "150 MB/s, second save" in printed


def test_many(tmp_path: Path) -> None:
    results, _ = run("many", tmp_path / "many.json")
    assert results["rows"]


def test_gil(tmp_path: Path) -> None:
    path = tmp_path / "gil.json"
    results, printed = run("gil", path, "--directory", tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    names = [row["way"] for row in results["rows"]]
    assert names == ["nothing", "dcp.async_save", "asyncsave, off", "asyncsave, level 1"]
    assert results["bars"]
    assert "asyncsave, level 1" in printed


def test_faults(tmp_path: Path) -> None:
    results, printed = run("faults", tmp_path / "faults.json")
    rows = {row["way"].partition(".")[0]: row for row in results["rows"]}
    assert set(rows) == {"torch", "dcp", "asyncsave"}
    assert rows["asyncsave"]["flipped_bit"] == "raises IntegrityError"
    full = rows["asyncsave"]["full_disk"]
    assert full in ("raises DiskFullError, nothing is left", "not tried: needs root")
    assert "IntegrityError" in printed


def test_start(tmp_path: Path) -> None:
    path = tmp_path / "start.json"
    results, printed = run("start", path)
    names = [row["name"] for row in results["rows"]]
    assert names[:2] == ["python alone", "import asyncsave"]
    assert all(row["min"] <= row["seconds"] <= row["max"] for row in results["rows"])
    assert all(name in printed for name in names)
    assert len(results["bars"]) == 2
