"""The `asyncsave` command. Uses nothing of asyncsave but its public names."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import asyncsave

from .picture import draw, show

app = typer.Typer(
    help="Checkpoints for PyTorch: which compression suits them, and are they sound?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_LEVELS = re.compile(r"([0-9]{1,2})(?:-([0-9]{1,2}))?")

PathArgument = Annotated[Path, typer.Argument(help="A checkpoint, or the directory of a run.")]


def _output(path: Path | None) -> Path | None:
    """Return where to write, if that can be done; said before anything is measured for it."""
    if path is None:
        return None
    try:
        path.stat()
        can_be = os.access(path, os.W_OK) and not path.is_dir()
    except FileNotFoundError:
        can_be = os.access(path.parent, os.W_OK | os.X_OK)
    except OSError as cause:
        raise typer.BadParameter(f"{path}: {cause.strerror}") from cause
    if not can_be:
        raise typer.BadParameter(f"{path} cannot be written: give a file in a directory of yours")
    return path


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        Console().print(asyncsave.__version__)
        raise typer.Exit


@app.command()
def tune(
    path: PathArgument,
    directory: Annotated[
        Path | None, typer.Option(help="Where checkpoints will go; default: where PATH is.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long to measure, about.")] = 30.0,
    levels: Annotated[
        str | None, typer.Option(help="Which to compare, as 0,1,3-6; default: all, 0 to 22.")
    ] = None,
    every_row: Annotated[
        bool, typer.Option("--all", help="Show every level, not only those to choose from.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw it there, as PNG.", callback=_output)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures there.", callback=_output)
    ] = None,
) -> None:
    """Measure every compression level on these bytes, these cores and this disk."""
    console = Console()
    with _told(), _progress() as tell:
        report = asyncsave.tune(
            path,
            directory=directory,
            levels=None if levels is None else _parse_levels(levels),
            seconds=seconds,
            progress=tell,
        )
    console.print(escape(report.recommendation), highlight=False)
    show(report, console, every_row=every_row)
    try:
        if json_file is not None:
            json_file.write_text(_figures(report))
        if picture is not None:
            draw(report, picture)
    except OSError as cause:
        _fail(f"cannot write {cause.filename}: {cause.strerror}")
    except ImportError as cause:
        _fail(f"--picture needs matplotlib ({cause}): pip install matplotlib")


def _figures(report: asyncsave.TuneReport) -> str:
    found = dataclasses.asdict(report) | {
        "directory": str(report.directory),
        "best": report.best,
        "smallest": report.smallest,
        "recommendation": report.recommendation,
    }
    return json.dumps(found, indent=1) + "\n"


@app.command()
def verify(path: PathArgument) -> None:
    """Read every byte of a checkpoint, or of all those of a run. Exit status 1: one is damaged."""
    console = Console()
    with _told(), Console(stderr=True).status(f"reading {escape(str(path))}"):
        report = asyncsave.verify(path)
    count = len(report.paths)
    for each in report.paths:
        console.print(escape(str(each)), highlight=False)
    takes = f"; restore would take {report.newest.name}" if count > 1 else ""
    console.print(
        f"{count} of {count} checkpoint{'s are' if count > 1 else ' is'} sound{takes}. Read "
        f"{_size(report.stored_bytes)} in {report.chunks} chunks, decoded to "
        f"{_size(report.raw_bytes)}, in {report.seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes} bytes"


def _parse_levels(text: str) -> list[int]:
    levels: list[int] = []
    for part in text.split(","):
        match = _LEVELS.fullmatch(part.strip())
        if match is None:
            raise typer.BadParameter(f"{part!r} is not a level, nor a range as 3-6")
        levels += range(int(match[1]), int(match[2] or match[1]) + 1)
    return levels


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda done, what: progress.update(task, completed=done, description=what)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Print what asyncsave raises as the help it is, without a traceback."""
    try:
        yield
    except asyncsave.ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    except asyncsave.AsyncSaveError as error:
        _fail("\n".join([str(error), *getattr(error, "__notes__", [])]))


def _fail(text: str) -> None:
    Console(stderr=True).print(escape(text), style="red", highlight=False, soft_wrap=True)
    raise typer.Exit(1)
