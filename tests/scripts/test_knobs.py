"""The knobs turn: every constant of the table is there, and another value takes its place."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts.conftest import Run

pytestmark = pytest.mark.xdist_group("scripts")

SOURCE = '''
"""A tiny product."""
SIZE: int = 4 << 10
HALF = SIZE // 2

def threads() -> int:
    return 3

def take(nbytes, *, huge=False):
    """Take memory."""
    return nbytes, huge
'''


@pytest.fixture
def knobs(bench: None) -> ModuleType:
    return importlib.import_module("knobs")


def test_every_knob_is_there(knobs: Any) -> None:
    readings = importlib.import_module("readings")
    for name, knob in knobs.KNOBS.items():
        module, attribute, _ = knobs.parts(knob.at)
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"{name}: there is no {module}"
        assert spec.origin is not None
        assert hasattr(importlib.import_module(module), attribute), f"{name}: {knob.at}"
        assert callable(getattr(readings, knob.reading))
        for value in knob.values:
            knobs.edited(Path(spec.origin).read_bytes(), knob.at, value)
        assert knobs.shipped(knob.at) in (*knob.values, knobs.AS_IT_IS), f"{name}: {knob.at}"


@pytest.mark.parametrize(
    ("at", "value", "expected"),
    [
        ("SIZE", 10, (10, 5, 3, (1, True))),
        ("HALF", 1, (4096, 1, 3, (1, True))),
        ("threads()", 8, (4096, 2048, 8, (1, True))),
        ("take(huge)", False, (4096, 2048, 3, (1, False))),
    ],
)
def test_a_value_stands_in_the_source(
    at: str,
    value: Any,
    expected: Any,
    knobs: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "tiny_product.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("tiny_product", None)
    edit = knobs.Edit(f"tiny_product:{at}", value)
    monkeypatch.setattr(sys, "meta_path", [edit, *sys.meta_path])
    tiny: Any = importlib.import_module("tiny_product")
    assert (tiny.SIZE, tiny.HALF, tiny.threads(), tiny.take(1, huge=True)) == expected
    with pytest.raises(RuntimeError, match="too late"):
        knobs.Edit(f"tiny_product:{at}", value)
    assert not (tmp_path / "__pycache__").exists()  # where it would be taken for the source's


@pytest.mark.parametrize("at", ["LENGTH", "SIZE()", "threads", "take(large)", "Take(huge)"])
def test_what_is_not_there_is_refused(at: str, knobs: Any) -> None:
    with pytest.raises(LookupError, match="nothing of that name"):
        knobs.edited(SOURCE.encode(), f"tiny_product:{at}", 1)


def test_verdicts(knobs: Any) -> None:
    def readings(*seconds: float) -> list[dict[str, float]]:
        return [{"save": each} for each in seconds]

    shipped = readings(1.0, 2.0, 3.0, 4.0, 5.0)
    slower = knobs.judge("8", readings(1.1, 2.1, 3.1, 4.1, 5.1), shipped)
    assert slower == ["8 is worse in 'save': 3.1, not 3"]
    assert knobs.judge("8", readings(0.9, 1.9, 2.9, 3.9, 4.9), shipped) == [
        "8 is better in 'save': 2.9, not 3"
    ]
    assert knobs.judge("8", readings(1.1, 2.1, 3.1, 4.1, 4.9), shipped) == []  # not in every round
    assert knobs.judge("8", readings(1.01, 2.01, 3.01, 4.01, 5.01), shipped) == []  # by too little
    assert knobs.judge("4", shipped, shipped) == []


def test_a_knob(run: Run, tmp_path: Path) -> None:
    old = {"knobs": {"detour": {"verdict": "of an earlier run"}, "direct": {"verdict": "replaced"}}}
    (tmp_path / "knobs.json").write_text(json.dumps(old))
    results, printed = run("knobs", "direct")
    assert results["rows"] == [{"name": "direct", "verdict": "fewer than 5 rounds say nothing"}]
    assert results["knobs"]["detour"] == old["knobs"]["detour"]
    found = results["knobs"]["direct"]
    assert found["at"] == "asyncsave.storage.direct:_LEAST_BYTES"
    assert found["commit"] == results["commit"]
    assert [row["value"] for row in found["rows"]] == ["512 KiB *", "64 KiB"]
    for row in found["rows"]:
        assert set(row["figures"]) == {f"{kib} KiB" for kib in (64, 256, 512, 1024, 2048)}
        assert len(row["readings"]) == results["settings"]["rounds"] == 1
    assert "512 KiB *" in printed


def test_every_reading_reads(knobs: Any, child: ProcessPoolExecutor, tmp_path: Path) -> None:
    """In one process for all, in which no knob is turned."""
    for reading in sorted({knob.reading for knob in knobs.KNOBS.values()}):
        knob = knobs.Knob("", (), reading)
        child.submit(knobs.begin, knob, None, tmp_path / reading, True).result()
        found = child.submit(knobs.read).result()
        assert found, reading
        assert all(math.isfinite(figure) for figure in found.values()), reading
