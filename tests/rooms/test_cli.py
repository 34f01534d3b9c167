"""The `asyncsave` command, as somebody at a terminal uses it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import asyncsave
from asyncsave.cli import app


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    asyncsave.save({"w": torch.randn(1 << 20)}, tmp_path / "a", compression=1).result()
    return tmp_path / "a"


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(each) for each in arguments])


def module(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "asyncsave", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_tune(checkpoint: Path, tmp_path: Path) -> None:
    figures = tmp_path / "tune.json"
    ran = run("tune", checkpoint, "--levels", "0-1,3", "--seconds", 2, "--json", figures)
    assert ran.exit_code == 0, ran.output
    assert "best here" in ran.stdout
    assert "Use compression=" in ran.stdout
    found = json.loads(figures.read_text())
    assert [row["level"] for row in found["rows"]] == [0, 1, 3]
    assert found["recommendation"].split()[1] in ran.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "tune.json"]


@pytest.mark.parametrize("option", ["--json", "--picture"])
def test_where_nothing_can_be_written_is_said_before_anything_is_measured(
    checkpoint: Path, tmp_path: Path, option: str
) -> None:
    for path in (tmp_path, tmp_path / "nothing" / "x", checkpoint / ("x" * 300)):
        ran = run("tune", checkpoint, "--seconds", 100, option, path)
        assert ran.exit_code == 2, ran.output
        assert isinstance(ran.exception, SystemExit)
        assert option in ran.stderr


def test_what_cannot_be_written_after_all_is_no_traceback(checkpoint: Path) -> None:
    ran = run("tune", checkpoint, "--levels", 0, "--seconds", 0.1, "--json", "/proc/x")
    assert ran.exit_code == 1
    assert "cannot write /proc/x" in ran.stderr
    assert "Use compression" in ran.stdout, "what was measured is shown all the same"


def test_a_directory_is_named_as_it_is_called(tmp_path: Path) -> None:
    """Rich takes what is in brackets for a colour, or for nothing."""
    directory = tmp_path / "runs[lr]" / "x[/]"
    asyncsave.save({"w": torch.randn(1 << 10)}, directory / "a").result()
    ran = run("tune", directory / "a", "--levels", 0, "--seconds", 0.1)
    assert ran.exit_code == 0, ran.output
    assert "runs[lr]/x[/]" in ran.stdout.replace("\n", "").replace(" ", "")
    assert run("verify", directory / "a").exit_code == 0


def test_tune_draws(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "tune.png"
    arguments = ("tune", checkpoint, "--levels", "0,1", "--seconds", 1, "--picture", picture)
    if importlib.util.find_spec("matplotlib"):
        ended = module(*arguments)  # matplotlib keeps its fonts open
        assert ended.returncode == 0, ended.stderr
        assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ran = run(*arguments)
    assert ran.exit_code == 1
    assert "pip install matplotlib" in ran.stderr


@pytest.mark.parametrize("levels", ["x", "23", "3-", ""])
def test_levels_that_cannot_be(checkpoint: Path, levels: str) -> None:
    ran = run("tune", checkpoint, "--levels", levels)
    assert ran.exit_code == 2
    assert "Traceback" not in ran.output


def test_verify(checkpoint: Path) -> None:
    ran = run("verify", checkpoint)
    assert ran.exit_code == 0
    assert "1 of 1 checkpoint is sound" in ran.stdout
    data = bytearray((checkpoint / "rank-00000.data").read_bytes())
    data[100] ^= 1
    (checkpoint / "rank-00000.data").write_bytes(data)
    ran = run("verify", checkpoint)
    assert ran.exit_code == 1
    assert "is damaged" in ran.stderr
    assert "Traceback" not in ran.output


def test_as_a_module(tmp_path: Path) -> None:
    assert module("--version").stdout.strip() == asyncsave.__version__
    ended = module("verify", tmp_path / "nothing")
    assert ended.returncode == 1
    assert "there is no checkpoint at" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_importing_asyncsave_imports_no_terminal_library() -> None:
    text = (
        "import sys, asyncsave\n"
        "print([name for name in ('typer', 'rich', 'matplotlib') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
