"""What does one checkpoint cost a training loop?

One process trains one GPT-2-shaped Transformer (fp32, AdamW) on the sources of Python's standard
library, and saves model and optimizer with one way of saving after the other.

How it is measured. A *cycle* is one save and the training steps that follow, as many for every way,
and more where the save's background is not done by then: a cycle contains the whole save. Every
round has one cycle of each way, and one without a save, in an order that is drawn anew; so drift of
the machine hits all alike. Before each cycle, outside the measured time: the last checkpoint is
deleted, the disks are synced, and one training step is made. The first save of each way, which
allocates what later ones reuse, is reported apart; medians are over the others.

How to read it. One cell is the median, and under it the smallest and the largest value.

    blocked   seconds in the call
    fence     seconds that training then waited before optimizer.step() (only on CUDA)
    lost      seconds of training a checkpoint cost in all: the cycle's time, less as many steps at
              the median step time of the cycles without a save. What it exceeds blocked + fence by
              is the background slowing down the steps. The range in the row "no saving" is the
              noise: smaller differences mean nothing.
    durable   seconds from the call until the background is done. "synced" says what is on the disk
              by then; without the directory, a power cut may still lose the file's name.
    stored    length of the checkpoint's files
    extra     most resident memory during the cycle, beyond what was resident right before the save,
              plus what this way of saving kept from its earlier saves (asyncsave keeps its arena).
              The row "no saving" shows what training's own ups and downs contribute.

Batches are small, so that a step is short and the run too; most of a step is then memory traffic,
as it is in the copies of a save: a step of many tokens loses less.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from common import RESULTS, PeakMemory, Spread, provenance, write_json
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import async_save

import asyncsave
from asyncsave import Checkpointer, SaveHandle, SaveReport

LAYERS, WIDTH, HEADS = 19, 768, 12  # GPT-2's width; 135 M parameters, as vocabulary is only bytes
BATCH, CONTEXT = 1, 64
CUDA_BATCH, CUDA_CONTEXT = 8, 1024
QUICK = {"layers": 2, "width": 64, "heads": 2, "batch": 2, "context": 32, "saves": 2, "steps": 4}
SAVES = 5
WARMUP_STEPS = 8
LEAST_STEPS = 4
SPARE = 1.25  # steps of a cycle, by what the slowest first save took; later ones vary
CYCLE_LIMIT_SECONDS = 300.0
NO_SAVING = "no saving"


# -- the training loop ------------------------------------------------------------------------


class Block(nn.Module):
    """One layer of GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """GPT-2 over bytes; input and output embedding are tied, as GPT-2's are."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions(at))))  # type: ignore[no-any-return]


class Training:
    """The loop that is being held up."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device = torch.device(options.device)
        model = Transformer(options.layers, options.width, options.heads, options.context)
        self.model = model.to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        self.steps = 0
        self._batch, self._context = options.batch, options.context
        self._random = torch.Generator().manual_seed(0)
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = b"".join(path.read_bytes() for path in sources)
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint is of: live objects."""
        return {"model": self.model, "optimizer": self.optimizer}

    @property
    def state_dicts(self) -> dict[str, Any]:
        """The same as plain values."""
        return {name: each.state_dict() for name, each in self.state.items()}

    @property
    def state_bytes(self) -> int:
        """Bytes of all tensors, ties counted once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)

    def step(self) -> None:
        """Make one training step. On CUDA, returns before it is done."""
        starts = torch.randint(
            len(self._text) - self._context - 1, (self._batch,), generator=self._random
        )
        windows = torch.stack([self._text[at : at + self._context + 1] for at in starts.tolist()])
        windows = windows.to(self.device).long()
        logits = self.model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        # here, not after the step: so gradients are resident before a save as they are during one
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1

    def synchronize(self) -> None:
        """Wait until the device has done all steps."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# -- the ways of saving -----------------------------------------------------------------------


class Pending(Protocol):
    """A save in the background: what Future and SaveHandle have in common."""

    def result(self) -> Any: ...
    def add_done_callback(self, callback: Callable[[Any], object], /) -> object: ...


@dataclass(slots=True)
class Way:
    """A way of saving. Here: none at all.

    Attributes:
        name: its row.
        synced: what it has synced when it says it is done.
        directory: where its checkpoints go.
    """

    name: str
    synced: str
    directory: Path

    def open(self) -> None:
        """Make ready, before the first save."""
        self.directory.mkdir()

    def save(self, training: Training) -> Pending:
        """Save; this call is what is timed as blocked."""
        return _done()

    def close(self) -> None:
        """Give everything back."""

    def path(self, training: Training) -> Path:
        """Return a path for the checkpoint of this step."""
        return self.directory / f"checkpoint-{training.steps}"


class TorchSave(Way):
    """``torch.save``, and then all that is needed for the file to survive a power cut."""

    def save(self, training: Training) -> Pending:
        path = self.path(training)
        torch.save(training.state_dicts, path)
        for each in (path, self.directory):
            descriptor = os.open(each, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return _done()


class DistributedCheckpoint(Way):
    """``torch.distributed.checkpoint.async_save`` with its defaults, for a single process."""

    def save(self, training: Training) -> Pending:
        future = async_save(training.state, checkpoint_id=self.path(training))
        assert isinstance(future, Future)
        return future


@dataclass(slots=True)
class AsyncSave(Way):
    """A `Checkpointer` that lives as long as the run."""

    compression: Any = "auto"
    overlap: bool = True
    checkpointer: Checkpointer | None = field(default=None, repr=False)

    def open(self) -> None:
        self.checkpointer = Checkpointer(
            self.directory, compression=self.compression, overlap=self.overlap, signals=()
        )

    def save(self, training: Training) -> Pending:
        assert self.checkpointer is not None
        handle = self.checkpointer.save(training.steps, training.state)
        assert isinstance(handle, SaveHandle)
        return handle

    def close(self) -> None:
        if self.checkpointer is not None:
            self.checkpointer.close()


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


def ways(directory: Path, device: str) -> list[Way]:
    """Return the rows of the table."""
    rows = [
        Way(NO_SAVING, "", directory / "none"),
        TorchSave("torch.save + fsync", "file, directory", directory / "torch"),
        DistributedCheckpoint("dcp.async_save", "files", directory / "dcp"),
        AsyncSave("asyncsave, off", "files, directories", directory / "off", "off"),
        AsyncSave("asyncsave, level 1", "files, directories", directory / "level1", 1),
        AsyncSave("asyncsave, auto", "files, directories", directory / "auto", "auto"),
    ]
    if device == "cuda":
        synced, path = "files, directories", directory / "overlap-off"
        rows.insert(4, AsyncSave("asyncsave, off, overlap=False", synced, path, "off", False))
    return rows


# -- measuring --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cycle:
    """One save and the steps after it, as measured.

    Attributes:
        number: its place among all cycles of the run.
        round: 0 for the first save of each way.
        report: what asyncsave itself says about the save.
    """

    way: str
    number: int
    round: int
    steps: int
    cycle_seconds: float
    blocked_seconds: float
    fence_seconds: float
    durable_seconds: float
    stored_bytes: int
    rss_before_bytes: int
    rss_peak_bytes: int
    rss_after_bytes: int
    report: dict[str, Any] | None

    @property
    def step_seconds(self) -> float:
        return self.cycle_seconds / self.steps


@dataclass(slots=True)
class Row:
    """A way of saving, its cycles, and why it has no more of them."""

    way: Way
    cycles: list[Cycle] = field(default_factory=list)
    why: str | None = None


def measure(way: Way, training: Training, number: int, round_: int, least_steps: int) -> Cycle:
    """Measure one cycle, of ``least_steps`` at least and until the save is done."""
    training.step()
    training.synchronize()
    steps = 0
    ended: list[float] = []
    done = threading.Event()

    def note_end(_: Any) -> None:
        ended.append(time.perf_counter())
        done.set()

    with PeakMemory() as memory:
        began = time.perf_counter()
        pending = way.save(training)
        blocked = time.perf_counter() - began
        pending.add_done_callback(note_end)
        while steps < least_steps or not done.is_set():
            training.step()
            steps += 1
            if time.perf_counter() - began > CYCLE_LIMIT_SECONDS:
                raise TimeoutError(f"not done after {CYCLE_LIMIT_SECONDS:.0f} s")
        training.synchronize()
        seconds = time.perf_counter() - began
    report = pending.result()
    saving = way.name != NO_SAVING
    return Cycle(
        way=way.name,
        number=number,
        round=round_,
        steps=steps,
        cycle_seconds=seconds,
        blocked_seconds=blocked if saving else 0.0,
        fence_seconds=report.fence_seconds if isinstance(report, SaveReport) else 0.0,
        durable_seconds=ended[0] - began if saving else 0.0,
        stored_bytes=_length(way.directory),
        rss_before_bytes=memory.before,
        rss_peak_bytes=memory.peak,
        rss_after_bytes=memory.now(),
        report=_plain(report) if isinstance(report, SaveReport) else None,
    )


def _length(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _plain(report: SaveReport) -> dict[str, Any]:
    return {name: value for name, value in asdict(report).items() if name != "path"}


def settle(way: Way) -> None:
    """Delete what was saved, and leave no dirty pages to the next cycle."""
    for path in way.directory.iterdir() if way.directory.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.startswith("."):  # asyncsave's lock
            path.unlink()
    os.sync()


def run(
    rows: list[Row], training: Training, saves: int, steps_wanted: int | None, log: Console
) -> int:
    """Measure all rounds; return how many steps a cycle had at least."""
    for _ in range(WARMUP_STEPS):
        training.step()
    order, number, steps = random.Random(0), 0, LEAST_STEPS
    for round_ in range(saves + 1):
        for row in order.sample(rows, len(rows)) if round_ else rows:
            if row.why is not None:
                continue
            try:
                if round_ == 0:
                    row.way.open()
                cycle = measure(row.way, training, number, round_, steps)
                row.cycles.append(cycle)
                log.print(
                    f"{round_}/{saves} {row.way.name}: {cycle.steps} steps, "
                    f"{cycle.cycle_seconds:.2f} s, blocked {cycle.blocked_seconds:.3f} s"
                )
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # DCP's own is not an Exception
                row.why = f"{type(error).__name__}: {error}"
                log.print(escape(f"{round_}/{saves} {row.way.name}: {row.why}"))
            number += 1
            settle(row.way)
        if round_ == 0:
            steps = steps_wanted or _steps(rows)
    return steps


def _steps(rows: list[Row]) -> int:
    """Return how many steps hold the slowest save."""
    plain = min(cycle.step_seconds for row in rows for cycle in row.cycles)
    slowest = max(
        (cycle.durable_seconds for row in rows for cycle in row.cycles if row.why is None),
        default=0.0,
    )
    return max(LEAST_STEPS, math.ceil(SPARE * slowest / plain))


# -- results ----------------------------------------------------------------------------------


def summarize(row: Row, plain_step: float) -> dict[str, Any]:
    """Return the row's figures: of the first save, and medians with spread of the others."""
    kept = 0
    extra: dict[int, int] = {}
    for cycle in row.cycles:
        extra[cycle.round] = cycle.rss_peak_bytes - cycle.rss_before_bytes + max(0, kept)
        kept += cycle.rss_after_bytes - cycle.rss_before_bytes

    def figures(cycle: Cycle) -> dict[str, float]:
        return {
            "blocked_seconds": cycle.blocked_seconds,
            "fence_seconds": cycle.fence_seconds,
            "lost_seconds": cycle.cycle_seconds - cycle.steps * plain_step,
            "durable_seconds": cycle.durable_seconds,
            "stored_bytes": cycle.stored_bytes,
            "extra_memory_bytes": extra[cycle.round],
        }

    first = [figures(cycle) for cycle in row.cycles if cycle.round == 0]
    warm = [figures(cycle) for cycle in row.cycles if cycle.round]
    return {
        "name": row.way.name,
        "synced": row.way.synced,
        "why": row.why,
        "saves": len(warm),
        "first": first[0] if first else None,
        "warm": {name: asdict(Spread.of(each[name] for each in warm)) for name in warm[0]}
        if warm
        else None,
    }


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table."""
    settings, machine = results["settings"], results["hardware"]
    table = Table(
        title="What one checkpoint costs a training loop",
        caption=(
            f"{results['state_bytes'] / 1e9:.2f} GB of state on {settings['device']}, "
            f"{settings['saves']} warm saves each; {results['steps_per_cycle']} steps of "
            f"{results['plain_step_seconds']:.3f} s in a cycle\n"
            f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, "
            f"{machine['memory_bytes'] / 2**30:.0f} GiB, {results['filesystem']}, "
            f"torch {results['versions']['torch']}\n"
            "median, and smallest … largest; the range of “no saving” is the noise"
        ),
    )
    table.add_column("")
    for name in ("blocked s", "fence s", "lost s", "durable s"):
        table.add_column(name, justify="right")
    table.add_column("synced")
    for name in ("stored GB", "extra MB", "first:\nblocked s", "first:\nlost s"):
        table.add_column(name, justify="right")
    for row in results["rows"]:
        table.add_row(*_cells(row))
    console.print(table)
    for row in results["rows"]:
        if row["why"] is not None:
            console.print(escape(f"{row['name']}: {row['why']}"))


def _cells(row: dict[str, Any]) -> list[str]:
    first, name = row["first"], row["name"]
    if row["warm"] is None:
        return [name, "failed: see below", *[""] * 8]
    warm = {key: Spread(**value) for key, value in row["warm"].items()}
    lost = warm["lost_seconds"].show()
    extra = warm["extra_memory_bytes"].show(0, 1e6)
    if name == NO_SAVING:
        return [name, "–", "–", lost, "–", "", "–", extra, "–", f"{first['lost_seconds']:.2f}"]
    return [
        name,
        warm["blocked_seconds"].show(3),
        warm["fence_seconds"].show(3),
        lost,
        warm["durable_seconds"].show(),
        row["synced"],
        f"{warm['stored_bytes'].median / 1e9:.3f}",
        extra,
        f"{first['blocked_seconds']:.3f}",
        f"{first['lost_seconds']:.2f}",
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options; those that depend on others are filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, help=f"default: {LAYERS}")
    parser.add_argument("--width", type=int, help=f"default: {WIDTH}")
    parser.add_argument("--heads", type=int, help=f"default: {HEADS}")
    parser.add_argument("--batch", type=int, help=f"default: {BATCH}, on CUDA {CUDA_BATCH}")
    parser.add_argument("--context", type=int, help=f"default: {CONTEXT}, on CUDA {CUDA_CONTEXT}")
    parser.add_argument("--saves", type=int, help=f"warm saves of each way; default: {SAVES}")
    parser.add_argument("--steps", type=int, help="in a cycle; default: as the slowest save needs")
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="default: bench/results/stall.json; quick: none")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    cuda = options.device == "cuda"
    defaults = {
        "layers": LAYERS,
        "width": WIDTH,
        "heads": HEADS,
        "batch": CUDA_BATCH if cuda else BATCH,
        "context": CUDA_CONTEXT if cuda else CONTEXT,
        "saves": SAVES,
    } | (QUICK if options.quick else {})
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in (*defaults, "steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.width % options.heads:
        parser.error("--width must be a multiple of --heads")
    if options.json is None and not options.quick:
        options.json = RESULTS / ("stall-cuda.json" if cuda else "stall.json")
    return options


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    options = parse(arguments)
    # what DCP says on every save of a single process
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no checkpoint stays
    console, log = Console(), Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console = Console(width=150)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".stall-", dir=options.directory) as name:
        directory = Path(name).resolve()
        about = provenance(options.device, directory)
        log.print(f"asyncsave {asyncsave.__version__}, checkpoints on {about['filesystem']}")
        if about["filesystem"] == "tmpfs":
            log.print("tmpfs is memory: choose another --directory to measure a disk")
        training = Training(options)
        rows = [Row(way) for way in ways(directory, options.device)]
        expected = 12 * sum(parameter.numel() for parameter in training.model.parameters())
        available = psutil.virtual_memory().available
        if available < 5 * expected:  # three arenas, one snapshot of DCP, the state itself
            log.print(f"only {available / 1e9:.1f} GB of memory: asyncsave will stage in waves")
        try:
            steps = run(rows, training, options.saves, options.steps, log)
        finally:
            for row in rows:
                row.way.close()
    plain = [c for row in rows if row.way.name == NO_SAVING for c in row.cycles if c.round]
    plain_step = Spread.of(cycle.step_seconds for cycle in plain).median
    results = {
        "benchmark": "stall",
        "question": "What does one checkpoint cost a training loop?",
        **about,
        "settings": {
            key: value for key, value in vars(options).items() if key not in ("json", "directory")
        },
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "state_bytes": training.state_bytes,
        "steps_per_cycle": steps,
        "plain_step_seconds": plain_step,
        "run_seconds": time.perf_counter() - began,
        "rows": [summarize(row, plain_step) for row in rows],
        "cycles": [asdict(cycle) for row in rows for cycle in row.cycles],
    }
    if options.json is not None:
        write_json(options.json, results)
    show(results, console)
    log.print(f"{results['run_seconds']:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
