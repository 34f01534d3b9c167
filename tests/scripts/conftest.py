"""Runs the scripts of bench/ in this process."""

from __future__ import annotations

import gc
import importlib
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

Outcome = tuple[dict[str, Any], str]
"""What a benchmark wrote, and what it printed."""


class Run(Protocol):
    def __call__(self, name: str, *arguments: str) -> Outcome: ...


@pytest.fixture(scope="package")
def child() -> Iterator[ProcessPoolExecutor]:
    """Start one process for all that wants one of its own: each takes seconds to import torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        patch.setenv("OMP_NUM_THREADS", "1")
        with importlib.import_module("harness").process() as child:
            child.submit(int).result()
            yield child


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, child: ProcessPoolExecutor) -> Iterator[None]:
    """Let bench/ be imported, and put back what its scripts set."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # several threads that wait for each other are slow where others use the cores
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # benchmarks collect garbage before each reading: it is not sought in all that is loaded
    for module in ("ways", "torch._dynamo"):
        importlib.import_module(module)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def class_of(name: str) -> Any:
    """Return a script's benchmark."""
    module = importlib.import_module(name)
    return next(
        each
        for each in vars(module).values()
        if isinstance(each, type) and getattr(each, "name", None) == name
    )


@pytest.fixture
def run(
    bench: None,
    child: ProcessPoolExecutor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run a benchmark on a tiny state; it leaves no checkpoint."""

    def run(name: str, *arguments: str) -> Outcome:
        path = tmp_path / f"{name}.json"
        common = ["--quick", "--json", str(path), "--directory", str(tmp_path)]
        made = class_of(name)()
        made._shared = child
        assert made.main([*common, *arguments]) == 0
        return outcome(name, path), capsys.readouterr().out

    return run


def outcome(name: str, path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text())
    assert set(results["versions"]) == {"asyncsave", "torch", "python", "system", "byte planes"}
    assert results["hardware"]["cpu"]
    assert results["hardware"]["cores"] >= 1
    assert results["hardware"]["memory_bytes"] > 0
    assert results["filesystem"] != "unknown"
    assert results["command"][:3] == ["python", f"bench/{name}.py", "--quick"]
    assert "commit" in results
    assert results["benchmark"] == name
    assert results["question"]
    assert results["settings"]["quick"] is True
    assert results["run_seconds"] > 0
    for bar in results["bars"]:
        assert set(bar) == {"bar", "measured", "met"}
    assert not [each for each in path.parent.iterdir() if each.is_dir()]  # no checkpoint stays
    return results
