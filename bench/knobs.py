"""Which values do the product's tuned constants want?

Each knob is one constant, in the table `KNOBS`. Its values are tried by a process each, which
imports the product as if the value stood in its source; so what follows from the constant follows
from the value, too. The processes take turns, in an order that is drawn anew in every round, one at
a time; the first round warms them and is not counted. What is read is in readings.py, and is the
better the smaller: seconds, where it does not say another thing.

How to read it. One cell is the median, and under it the smallest and the largest value. The value
with a star is the one that ships. A value is called better or worse if it was so in every round,
compared with the shipped value in that round, and by 2 % in the median. All else is noise.

    python bench/knobs.py                every knob
    python bench/knobs.py group chunk    these; bench/results/knobs.json keeps what it has of others
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, ClassVar

from harness import Bench, Column, Results, Size, cell, process, spread, table
from rich.table import Table

K, M = 1 << 10, 1 << 20
LEAST_ROUNDS = 5  # in fewer, one value is always better by chance
LEAST_DIFFERENCE = 0.02
AS_IT_IS = "as it is"
Reading = dict[str, float]


@dataclass(frozen=True, slots=True)
class Knob:
    """A constant, and what there is to know about it.

    Attributes:
        at: "module:NAME", a constant; "module:function()", what a function returns; or
            "module:function(parameter)", what it takes a parameter for, whatever it is given.
        values: what is tried, beside the value that ships.
        reading: what is read, a function in readings.py.
        note: what else a reader of the figures must know.
        by_numpy: the byte planes are NumPy's, not the compiled ones.
    """

    at: str
    values: Sequence[Any]
    reading: str
    note: str = ""
    by_numpy: bool = False


_BUDGET, _ENCODE = "asyncsave.pipeline.budget", "asyncsave.pipeline.encode"
_CHOOSE, _DIRECT = "asyncsave.pipeline.choose", "asyncsave.storage.direct"
_NEW, _FRAME = "asyncsave.restoring.new", "asyncsave.codec.frame"

KNOBS = {
    "chunk": Knob(f"{_BUDGET}:CHUNK_BYTES", (M, 4 * M, 8 * M, 16 * M, 32 * M, 64 * M), "saves"),
    "slots": Knob(f"{_BUDGET}:_PREFERRED_SLOTS", (2, 4, 8, 16), "saves_in_little_memory"),
    "around": Knob(
        f"{_BUDGET}:_HEAP_RESERVE_BYTES",
        (M, 2 * M, 3 * M, 4 * M),
        "memory_beyond_the_limit",
        "the least one that is never beyond the limit is wanted",
    ),
    "encoders": Knob(f"{_BUDGET}:encoder_threads()", (1, 2, 3, 4), "encoded_beside_python"),
    "group": Knob(f"{_ENCODE}:GROUP_CHUNKS", (1, 2, 4, 8, 16), "saves_beside_python"),
    "ahead": Knob(f"{_CHOOSE}:LEAST_WRITES", (1, 2, 4, 8), "chosen"),
    "probe": Knob(f"{_CHOOSE}:PROBE_BYTES", (256 * K, M, 4 * M, 16 * M), "chosen"),
    "margin": Knob(f"{_CHOOSE}:_MARGIN", (0.8, 0.9, 1.0), "chosen"),
    "caution": Knob(f"{_CHOOSE}:_CAUTION", (1.0, 1.25, 1.5), "chosen"),
    "fade": Knob(f"{_CHOOSE}:_FADE", (0.5, 0.85, 0.95), "chosen"),
    "sync-fade": Knob(f"{_CHOOSE}:_SYNC_FADE", (0.25, 0.5, 0.85), "chosen"),
    "readers": Knob("asyncsave.reading.workers:reader_threads()", (1, 2, 3, 4, 8), "reads"),
    "direct": Knob(
        f"{_DIRECT}:_LEAST_BYTES", (64 * K, 256 * K, 512 * K, M, 4 * M), "reads_in_pieces"
    ),
    "detour": Knob(f"{_DIRECT}:_DETOUR_BYTES", (M, 2 * M, 4 * M, 8 * M, 16 * M), "reads"),
    "huge": Knob("asyncsave.pages:pages(huge)", (False, True), "first_save_and_reads"),
    "small": Knob(f"{_NEW}:SMALL_BYTES", (0, K, 4 * K, 16 * K, 64 * K), "many_leaves"),
    "together": Knob(f"{_NEW}:BATCH_BYTES", (64 * K, M, 4 * M, 16 * M), "many_leaves"),
    "join": Knob(
        "asyncsave.codec.planes:_JOIN_ELEMENTS",
        [K << i for i in range(8, 13)],
        "codes",
        "where there is no compiler",
        by_numpy=True,
    ),
    "sample-pieces": Knob(f"{_FRAME}:_SAMPLE_PIECES", (4, 16, 64), "codes"),
    "sample-bytes": Knob(f"{_FRAME}:_SAMPLE_BYTES", (8 * K, 32 * K, 128 * K), "codes"),
}


# -- the source, edited -------------------------------------------------------------------------


def parts(at: str) -> tuple[str, str, str | None]:
    """Return the module, the name, and what is in the brackets; None where there are none."""
    module, _, name = at.partition(":")
    name, bracket, parameter = name.partition("(")
    return module, name, parameter.removesuffix(")") if bracket else None


def edited(source: bytes, at: str, value: Any) -> ast.Module:
    """Return a module's code with a value in place of what stands there.

    Raises:
        LookupError: there is no such thing at the top of the module.
    """
    module, name, parameter = parts(at)
    tree, new = ast.parse(source), ast.parse(repr(value), mode="eval").body
    for node in tree.body:
        match node, parameter:
            case ast.Assign(targets=[ast.Name(id=found)]), None if found == name:
                node.value = new
            case ast.AnnAssign(target=ast.Name(id=found)), None if found == name:
                node.value = new
            case ast.FunctionDef(name=found), "" if found == name:
                node.body = [ast.Return(new)]
            case ast.FunctionDef(name=found, args=taken), str() if found == name and parameter in [
                arg.arg for arg in taken.args + taken.kwonlyargs
            ]:
                node.body.insert(0, ast.Assign([ast.Name(parameter, ast.Store())], new))
            case _:
                continue
        return ast.fix_missing_locations(tree)
    raise LookupError(f"{at}: {module} has nothing of that name at its top")


class Edit(importlib.abc.MetaPathFinder):
    """Imports one module as if a value stood in its source."""

    def __init__(self, at: str, value: Any) -> None:
        self._at, self._value = at, value
        self._module = parts(at)[0]
        if self._module in sys.modules:
            raise RuntimeError(f"{self._module} is imported already: too late to turn {at}")

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        assert spec.origin is not None
        return importlib.util.spec_from_file_location(
            name, spec.origin, loader=_Loader(name, spec.origin, self._at, self._value)
        )


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, at: str, value: Any) -> None:
        super().__init__(name, path)
        self._at, self._value = at, value

    def get_code(self, fullname: str) -> CodeType:  # never from a cache, nor into one
        tree = edited(self.get_data(self.path), self._at, self._value)
        return compile(tree, self.path, "exec", dont_inherit=True)


def shipped(at: str) -> Any:
    """Return the value that ships; AS_IT_IS for a parameter, which callers give."""
    module, name, parameter = parts(at)
    found = getattr(importlib.import_module(module), name)
    if parameter:
        return AS_IT_IS
    return found if parameter is None else found()


# -- one value's process ------------------------------------------------------------------------

_read: Callable[[], Reading]


def begin(knob: Knob, value: Any, directory: Path, quick: bool) -> None:
    """Turn a knob, and make ready what is read; None: leave it as it is."""
    global _read
    if knob.by_numpy:
        os.environ["ASYNCSAVE_KERNEL"] = "numpy"
    if value is not None:
        sys.meta_path.insert(0, Edit(knob.at, value))
    directory.mkdir()
    _read = getattr(importlib.import_module("readings"), knob.reading)(directory, quick)


def read() -> Reading:
    """Return one reading."""
    return _read()


# -- results ------------------------------------------------------------------------------------


def judge(value: str, found: list[Reading], others: list[Reading]) -> list[str]:
    """Say in what a value was better or worse than the shipped one, in every round."""
    said = []
    for figure in found[0]:
        pairs = [(one[figure], other[figure]) for one, other in zip(found, others, strict=True)]
        one, other = (statistics.median(side) for side in zip(*pairs, strict=True))
        always = all(a < b for a, b in pairs) or all(a > b for a, b in pairs)
        if always and abs(one - other) > LEAST_DIFFERENCE * abs(other):
            what = "better" if one < other else "worse"
            said.append(f"{value} is {what} in {figure!r}: {one:.4g}, not {other:.4g}")
    return said


def shown(value: Any) -> str:
    """Return a value as people write it."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= K:
        return f"{value // M} MiB" if value % M == 0 else f"{value // K} KiB"
    return str(value)


class Knobs(Bench):
    name = "knobs"
    question = "Which values do the product's tuned constants want?"
    sizes: ClassVar = {"rounds": Size(7, quick=1)}

    def __init__(self) -> None:
        super().__init__()
        self._places = 0

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("names", nargs="*", help=f"of knobs: {', '.join(KNOBS)}; default: all")

    def check(self) -> str | None:
        unknown = [name for name in self.options.names if name not in KNOBS]
        self.options.names = self.options.names or list(KNOBS)
        return f"no such knobs: {', '.join(unknown)}" if unknown else None

    def measure(self) -> Results:
        knobs = {}
        for name in self.options.names:
            try:
                knobs[name] = self._turn(name, KNOBS[name])
            except BrokenProcessPool:  # those that were measured stay
                self.say(f"{name}: a process ended before it had an answer")
        rows = [{"name": name, "verdict": knob["verdict"]} for name, knob in knobs.items()]
        return {"rows": rows, "knobs": knobs}

    def _turn(self, name: str, knob: Knob) -> dict[str, Any]:
        """Try all values of a knob."""
        ships, rounds = shipped(knob.at), self.options.rounds
        values = list(knob.values) if ships in knob.values else [ships, *knob.values]
        if self.options.quick:
            values = [ships, *(value for value in values if value != ships)][:2]
        labels = [shown(value) + (" *" if value == ships else "") for value in values]
        readings: list[list[Reading]] = [[] for _ in values]
        with contextlib.ExitStack() as stack:
            processes = [
                stack.enter_context(self._process(knob, None if value == ships else value))
                for value in values
            ]
            for round_, i in self.turns(range(len(values)), rounds, first=0):
                found = processes[i].submit(read).result()
                figures = ", ".join(f"{figure} {each:.4g}" for figure, each in found.items())
                self.say(f"{round_}/{rounds} {name} {labels[i]}: {figures}")
                if round_:
                    readings[i].append(found)
        rows = [
            {
                "value": label,
                "figures": {figure: spread(each[figure] for each in found) for figure in found[0]},
                "readings": found,
            }
            for label, found in zip(labels, readings, strict=True)
        ]
        verdict = self._verdict(labels, readings, readings[values.index(ships)])
        return {"at": knob.at, "note": knob.note, "verdict": verdict, "rows": rows}

    def _process(self, knob: Knob, value: Any) -> ProcessPoolExecutor:
        """Return a process with a value; None: the one that ships."""
        self._places += 1
        directory = self.directory / str(self._places)
        return process(begin, knob, value, directory, self.options.quick)

    def _verdict(
        self, labels: list[str], readings: list[list[Reading]], shipped: list[Reading]
    ) -> str:
        if self.options.rounds < LEAST_ROUNDS:
            return f"fewer than {LEAST_ROUNDS} rounds say nothing"
        said = [judge(label, found, shipped) for label, found in zip(labels, readings, strict=True)]
        return "; ".join(itertools.chain(*said)) or "makes no difference within the noise"

    def write(self, results: Results, path: Path) -> None:
        """Write the JSON file; what it says of other knobs stays, with where that is from."""
        about = ("time", "commit", "versions", "hardware", "filesystem")
        for knob in results["knobs"].values():
            knob.update({name: results[name] for name in about})
        known = json.loads(path.read_text())["knobs"] if path.exists() else {}
        super().write({**results, "knobs": known | results["knobs"]}, path)

    def tables(self, results: Results) -> Iterator[Table]:
        for name, knob in results["knobs"].items():
            columns: dict[str, Column] = {"": "value"}
            columns |= {figure: _figure(figure) for figure in knob["rows"][0]["figures"]}
            note = "\n".join(filter(None, (knob["note"], knob["verdict"].replace("; ", "\n"))))
            yield table(results, f"{name}: {knob['at']}", columns, note, knob["rows"])


def _figure(name: str) -> Callable[[Any], str]:
    return lambda row: cell(row["figures"][name], 4)


if __name__ == "__main__":
    sys.exit(Knobs().main(sys.argv[1:]))
