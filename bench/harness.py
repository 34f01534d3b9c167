"""The road of every benchmark: from the command line to tables, bars, JSON and pictures.

A new question is a new file, bench/NAME.py: its docstring says how it is measured and how to read
it, and a `Bench` holds what is its own.

    class Fold(Bench):
        name = "fold"
        question = "How long does it take to fold a state?"
        sizes: ClassVar = {"rounds": Size(5, quick=1)}

        def measure(self) -> Results:
            seconds = [fold() for _ in range(self.options.rounds)]
            return {"rows": [{"name": "by hand", "seconds": spread(seconds)}]}

        def bars(self, results: Results) -> list[Bar]:
            return [Bar.of("by hand, s", results["rows"][0]["seconds"]["median"], 1.0)]

        def tables(self, results: Results) -> Iterator[Table]:
            yield table(results, "Folding", {"": "name", "s": ("seconds", 2)}, MEDIANS)

    if __name__ == "__main__":
        sys.exit(Fold().main(sys.argv[1:]))
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import signal
import statistics
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, TypeVar

from machine import ROOT, provenance
from rich.console import Console
from rich.table import Table
from rich.text import Text

RESULTS = ROOT / "bench" / "results"
MEDIANS = "median, and smallest … largest"
WIDTH = 150  # of tables, where there is no terminal

Results = dict[str, Any]
"""What is written as JSON."""

Spread = dict[str, float]
"""A median and the range it is from: "median", "min", "max"."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


# -- figures ----------------------------------------------------------------------------------


def spread(values: Iterable[float]) -> Spread:
    """Summarize at least one value."""
    found = list(values)
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def cell(found: Spread | float | None, digits: int = 2, scale: float = 1.0) -> str:
    """Return a figure; of a spread the median, and under it the range; a dash for None."""
    if found is None:
        return "–"
    if isinstance(found, (int, float)):
        return f"{found / scale:.{digits}f}"
    median, low, high = (cell(found[name], digits, scale) for name in ("median", "min", "max"))
    return f"{median}\n[dim]{low} … {high}[/dim]"


def ratio(one: float | None, other: float | None) -> float | None:
    """Return the ratio of two measured times; None of one that is less than nothing, by noise."""
    return None if one is None or other is None or other <= 0 else one / other


Column = str | tuple[str, int] | tuple[str, int, float] | Callable[[Any], str]
"""What a row has in a column: a text, by its key; a figure, by its key, `cell`'s digits and scale;
or whatever a function makes of the row. Texts, and the column without a name, stand on the left."""


def table(
    results: Results,
    title: str,
    columns: Mapping[str, Column],
    note: str,
    rows: Iterable[Any] | None = None,
) -> Table:
    """Return a table with a line for each of ``results["rows"]``, or of ``rows``.

    Args:
        note: what the reader must know; the machine is said above it.
    """
    machine = results["hardware"]
    where = (
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {results['filesystem']}, "
        f"torch {results['versions']['torch']}"
    )
    made = Table(title=title, caption=f"{where}\n{note}")
    for name, column in columns.items():
        text = isinstance(column, str) or not name
        made.add_column(name, justify="left" if text else "right")
    for row in results["rows"] if rows is None else rows:
        made.add_row(*(_shown(row, column) for column in columns.values()))
    return made


def _shown(row: Any, column: Column) -> str:
    if isinstance(column, str):
        return str(row[column])
    if isinstance(column, tuple):
        return cell(row[column[0]], *column[1:])
    return column(row)


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure should be, what it is, and whether that will do; None: it was not measured."""

    bar: str
    measured: str
    met: bool | None

    @classmethod
    def of(cls, what: str, measured: float | None, limit: float, *, at_least: bool = False) -> Bar:
        """Return the bar that ``measured`` is at most ``limit``, or at least."""
        bar = f"{what} {'≥' if at_least else '≤'} {limit:g}"
        if measured is None:
            return cls(bar, "–", None)
        met = measured >= limit if at_least else measured <= limit
        return cls(bar, f"{measured:.4g}", met)


# -- the road ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Size:
    """An option that takes a positive number.

    Attributes:
        full: its default.
        quick: the same with ``--quick``.
        cuda: the same with ``--device cuda``; None: ``full``.
    """

    full: float
    quick: float
    help: str = ""
    cuda: float | None = None

    def default(self, options: argparse.Namespace) -> float:
        """Return what it is where nobody has said it."""
        if options.quick:
            return self.quick
        cuda = getattr(options, "device", "cpu") == "cuda"
        return self.cuda if cuda and self.cuda is not None else self.full


class Bench(ABC):
    """One question. A subclass says what is asked, and how it is measured and shown.

    Class attributes:
        name: of the script, and of the file under bench/results.
        question: in one line.
        sizes: its options that are numbers, by name.

    Attributes, from `measure` on:
        options: those of the command line; where nothing was said, what `sizes` says.
        directory: an empty one, on the disk to measure; it is removed when all is measured.
    """

    name: ClassVar[str]
    question: ClassVar[str]
    sizes: ClassVar[dict[str, Size]] = {}

    def __init__(self) -> None:
        self.options = argparse.Namespace()
        self.directory = Path()
        self._stack = contextlib.ExitStack()
        self._shared: ProcessPoolExecutor | None = None
        self._progress = Console(stderr=True, highlight=False, markup=False)

    # what a benchmark says of itself

    def add_options(self, parser: argparse.ArgumentParser) -> None:  # noqa: B027 - few have others
        """Add options that are no `sizes`."""

    def check(self) -> str | None:
        """Return what is wrong with the options, if anything is."""
        return None

    def file(self) -> str | None:
        """Return the file under bench/results that is written where ``--json`` names none."""
        return None if self.options.quick else f"{self.name}.json"

    @abstractmethod
    def measure(self) -> Results:
        """Measure; return what is to be written beside the machine, the settings and the bars."""

    def bars(self, results: Results) -> list[Bar]:
        """Return what the project promises, and what was measured."""
        return []

    @abstractmethod
    def tables(self, results: Results) -> Iterator[Table]:
        """Yield what is printed; why a row has no figures, its "why", is printed below."""

    def draw(self, results: Results, path: Path) -> None:  # noqa: B027 - few have pictures
        """Draw pictures beside the JSON file at ``path``; ImportError where nothing draws."""

    def write(self, results: Results, path: Path) -> None:
        """Write the JSON file."""
        path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")

    # what it is given

    def say(self, text: str) -> None:
        """Say how far it is."""
        self._progress.print(text, soft_wrap=True)

    def turns(self, items: Sequence[_T], rounds: int, first: int = 1) -> Iterator[tuple[int, _T]]:
        """Yield every item in every round, from ``first`` to ``rounds``, with the round's number.

        The order is drawn anew in each, so that drift of the machine hits all alike.
        """
        order = random.Random(0)
        for round_ in range(first, rounds + 1):
            for item in order.sample(items, len(items)):
                yield round_, item

    def apart(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call a module's function in a process of its own; with ``--quick``, in one for all calls.

        Arguments and result are pickled. BrokenProcessPool: the process has died of it.
        """
        if not self.options.quick:
            with process() as own:
                return own.submit(function, *args, **kwargs).result()
        if self._shared is None:
            self._shared = self._stack.enter_context(process())
        return self._shared.submit(function, *args, **kwargs).result()

    def main(self, arguments: Sequence[str]) -> int:
        """Measure, judge, write, draw and print; return the exit status."""
        self._parse(arguments)
        options, began = self.options, time.perf_counter()
        with (
            _interruptible(),
            tempfile.TemporaryDirectory(prefix=f".{self.name}-", dir=options.directory) as name,
            self._stack,
        ):
            self.directory = Path(name).resolve()
            command = ["python", f"bench/{self.name}.py", *map(str, arguments)]
            about = provenance(command, getattr(options, "device", "cpu"), self.directory)
            self.say(f"checkpoints on {about['filesystem']}")
            if about["filesystem"] == "tmpfs":
                self.say("tmpfs is memory: choose another --directory to measure a disk")
            unsaid = ("directory", "json")
            results = {
                "benchmark": self.name,
                "question": self.question,
                **about,
                "settings": {key: each for key, each in vars(options).items() if key not in unsaid},
                **self.measure(),
            }
        results["run_seconds"] = time.perf_counter() - began
        self._finish(results)
        return 0

    def _parse(self, arguments: Sequence[str]) -> None:
        description = (sys.modules[type(self).__module__].__doc__ or "").partition("\n")[0]
        parser = argparse.ArgumentParser(prog=f"bench/{self.name}.py", description=description)
        for name, size in self.sizes.items():
            default = f"default: {size.full:g}"
            what = f"{size.help}; {default}" if size.help else default
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(size.full), help=what)
        self.add_options(parser)
        place = "on the disk to measure"
        parser.add_argument("--directory", type=Path, default=Path(), help=place)
        kept = f"default: bench/results/{self.name}.json; of less than all: none"
        parser.add_argument("--json", type=Path, help=kept)
        parser.add_argument("--quick", action="store_true", help="tiny: does it run at all")
        options = self.options = parser.parse_args(arguments)
        for name, size in self.sizes.items():
            if getattr(options, name) is None:
                setattr(options, name, size.default(options))
            if getattr(options, name) <= 0:
                parser.error(f"--{name.replace('_', '-')} must be more than 0")
        wrong = self.check()
        if wrong is not None:
            parser.error(wrong)
        file = self.file()
        if options.json is None and file is not None:
            options.json = RESULTS / file

    def _finish(self, results: Results) -> None:
        path, bars = self.options.json, []
        try:
            bars = self.bars(results)
        finally:  # whatever is made of it, what was measured stays
            results["bars"] = [asdict(bar) for bar in bars]
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.write(results, path)
        if path is not None:
            try:
                self.draw(results, path)
            except ImportError as cause:
                self.say(f"no picture: {cause}")
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)
        for each in self.tables(results):
            console.print(each)
        for row in results["rows"]:
            if row.get("why") is not None:
                console.print(Text(f"{row['name']}: {row['why']}"))
        if bars:
            met = {True: "yes", False: "[bold]no[/bold]", None: "not measured"}
            judged = Table("bar", "measured", "met")
            for bar in bars:
                judged.add_row(bar.bar, bar.measured, met[bar.met])
            console.print(judged)
        self.say(f"{results['run_seconds']:.0f} s in all")


def process(prepare: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """Return one new process, which starts with ``prepare(*arguments)`` and with no memory of this.

    It makes one call after the other, and ends when the result is left as a context.
    """
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, spawn, initializer=prepare or _quiet, initargs=arguments)


def _quiet() -> None:
    # what DCP says on every save of a single process
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM end this as Ctrl+C does, so that no temporary checkpoint stays."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with warnings.catch_warnings():
            _quiet()
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
