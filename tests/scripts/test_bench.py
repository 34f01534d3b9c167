"""The benchmarks run, and what they write can be read. No figure is judged here.

They run in this process, one thread each; `save` runs as a script, since it starts processes of
itself.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asyncsave.codec import kernel
from tests.scripts.conftest import ROOT, Run, class_of, outcome

pytestmark = pytest.mark.xdist_group("scripts")  # they share a process of their own

SCRIPTS = (
    "auto",
    "codec",
    "faults",
    "gil",
    "lora",
    "many",
    "memory",
    "planes",
    "restore",
    "save",
    "stall",
    "start",
)
FIGURES = {
    "blocked_seconds",
    "fence_seconds",
    "lost_seconds",
    "durable_seconds",
    "stored_bytes",
    "extra_memory_bytes",
}
MISSING = "safetensors load_file + clone"


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def test_stall(run: Run, tmp_path: Path) -> None:
    results, printed = run("stall")
    path = tmp_path / "stall.json"
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


def test_stall_where_rows_are_missing(run: Run) -> None:
    ways = ["copy", "asyncsave, off", "level 1", "asyncsave, auto"]
    results, printed = run("stall", "--ways", *ways)
    assert len(results["bars"]) == 3
    judged = {bar["bar"] for bar in results["bars"] if bar["met"] is not None}
    assert judged == {"durable, auto / off ≤ 1.1"}
    assert "not measured" in printed


def test_stall_of_what_saves_nothing(run: Run) -> None:
    results, _ = run("stall", "--ways", "copy")
    assert [row["name"] for row in results["rows"]] == ["no saving", "copy into warm memory"]


def test_save_as_a_script(tmp_path: Path) -> None:
    path = tmp_path / "save.json"
    ran = subprocess.run(
        [sys.executable, "bench/save.py", "--quick", "--json", path, "--directory", tmp_path],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stderr
    results, printed = outcome("save", path), ran.stdout
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


def test_planes(run: Run) -> None:
    results, printed = run("planes")
    ways = {"copy", "split, NumPy", "join, NumPy"}
    if kernel.LIBRARY.exists():
        ways |= {"split, compiled", "join, compiled"}
    assert [row["coding"] for row in results["rows"]] == [
        "exp32",
        "exp16",
        "bytes2",
        "bytes4",
        "bytes8",
    ]
    for row in results["rows"]:
        assert set(row["ms"]) == ways
        assert all(each["median"] > 0 for each in row["ms"].values())
    assert results["versions"]["byte planes"] in ("compiled", "NumPy")
    assert "split, compiled, float32 / copy ≤ 1.3" in printed


def test_codec(run: Run, tmp_path: Path) -> None:
    results, printed = run("codec")
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


def test_memory(run: Run) -> None:
    results, printed = run("memory")
    assert [row["limit_bytes"] for row in results["rows"]] == [8 << 20, 8 << 20, "auto", "auto"]
    for row in results["rows"]:
        assert row["state_bytes"] >= 16 << 20
        assert 0 < row["after_2_bytes"] <= row["peak_bytes"]
        assert row["says_bytes"] > 0
        assert len(row["after_bytes"]) == 3
    assert len(results["bars"]) == 3
    assert "peak extra memory" in printed


def test_auto(run: Run) -> None:
    results, printed = run("auto")
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


def test_many(run: Run) -> None:
    results, printed = run("many")
    rows = {(row["way"], row["tensors"]): row for row in results["rows"]}
    ways = ("torch.save + fsync", "dcp.async_save", "asyncsave, off")
    assert list(rows) == [(way, count) for count in (20, 200) for way in ways]
    for (way, _), row in rows.items():
        assert way in printed
        assert row["saves"] == 2
        assert row["why"] is None
        assert row["blocked_us_per_tensor"] > 0
        assert [sample["done_seconds"] > 0 for sample in row["samples"]] == [True] * 3
    assert [bar["met"] for bar in results["bars"]] == [None, None]  # they are of 20,000


def test_gil(run: Run) -> None:
    results, printed = run("gil")
    names = [row["way"] for row in results["rows"]]
    assert names == ["nothing", "dcp.async_save", "asyncsave, off", "asyncsave, level 1"]
    assert results["bars"]
    assert "asyncsave, level 1" in printed


def test_faults(run: Run) -> None:
    results, printed = run("faults")
    rows = {row["way"].partition(".")[0]: row for row in results["rows"]}
    assert set(rows) == {"torch", "dcp", "asyncsave"}
    assert rows["asyncsave"]["flipped_bit"] == "raises IntegrityError"
    full = rows["asyncsave"]["full_disk"]
    assert full in ("raises DiskFullError, nothing is left", "not tried: needs root")
    assert "IntegrityError" in printed


def test_lora(run: Run) -> None:
    results, printed = run("lora")
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["off", "content", "versions"]
    assert all(row["first"] > 0 and row["on_disk"] >= row["last"] > 0 for row in rows.values())
    assert all(name in printed for name in rows)
    assert len(results["bars"]) == 6


def test_start(run: Run) -> None:
    results, printed = run("start")
    names = [row["name"] for row in results["rows"]]
    assert names[:2] == ["python alone", "import asyncsave"]
    assert all(row["min"] <= row["seconds"] <= row["max"] for row in results["rows"])
    assert all(name in printed for name in names)
    assert len(results["bars"]) == 2


def test_restore(run: Run) -> None:
    results, printed = run("restore")
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == [
        "torch.load",
        "torch.load(mmap=True) + clone",
        MISSING,
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
        assert name in printed
        if row["why"] is not None:
            assert (name, row["why"]) == (MISSING, "safetensors is not installed")
            assert row["cold"] is row["warm"] is None
            continue
        for temperature in ("cold", "warm"):
            spread = row[temperature]
            assert 0 < spread["min"] <= spread["median"] <= spread["max"] < 1000
            assert len(row["seconds"][temperature]) == results["settings"]["rounds"] == 2
        assert row["stored_bytes"] > 0.5 * results["state_bytes"]
    plain, packed = rows["asyncsave.restore, off"], rows["asyncsave.restore, level 1"]
    assert packed["stored_bytes"] < plain["stored_bytes"]
    assert [type(bar["met"]) for bar in results["bars"]] == [bool] * 5
    cold = rows["asyncsave.restore, off"]["cold"]["median"] / rows["torch.load"]["cold"]["median"]
    assert float(results["bars"][0]["measured"]) == pytest.approx(cold, rel=1e-3)
    assert results["bars"][0]["met"] is (cold >= 1.2)


# -- the road -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_a_command(name: str, bench: None) -> None:
    source = (ROOT / "bench" / f"{name}.py").read_text()
    last = ast.unparse(ast.parse(source).body[-1])
    command = f"sys.exit({class_of(name).__name__}().main(sys.argv[1:]))"
    assert last == f"if __name__ == '__main__':\n    {command}"
    assert (
        name in (ROOT / "Makefile").read_text().partition("BENCHES := ")[2].split("\n")[0].split()
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_committed_results_can_be_shown(name: str, bench: None) -> None:
    results = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
    made = class_of(name)()
    for table in made.tables(results):
        assert table.row_count > 0
    judged = {bar.bar: bar.met for bar in made.bars(results)}
    said = {bar["bar"]: bar["met"] for bar in results.get("bars", [])}
    assert len(judged) >= len(said)
    assert all(judged.get(bar, met) is met for bar, met in said.items())


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        ([], "stall.json"),
        (["--saves", "2"], "stall.json"),
        (["--quick"], None),
        (["--ways", "copy"], None),
        (["--quick", "--json", "x"], "x"),
    ],
)
def test_less_than_all_overwrites_no_results(
    arguments: list[str], file: str | None, bench: None
) -> None:
    stall = class_of("stall")()
    stall._parse(arguments)
    assert (stall.options.json and stall.options.json.name) == file


def test_what_was_measured_stays_when_judging_fails(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise TypeError("no such row")

    monkeypatch.setattr(class_of("many"), "bars", fail)
    with pytest.raises(TypeError, match="no such row"):
        run("many")
    assert json.loads((tmp_path / "many.json").read_text())["rows"]


@pytest.mark.parametrize("arguments", [["--width", "65"], ["--saves", "0"], ["--steps", "-1"]])
def test_what_cannot_be_is_refused(
    arguments: list[str], bench: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        class_of("stall")().main(["--quick", *arguments])
    assert arguments[0] in capsys.readouterr().err
