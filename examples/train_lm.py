"""Train a small language model, kill it in the middle of a save, go on, and compare every bit.

A Transformer of 10 million parameters learns Python, byte by byte, from the standard library's own
sources. `train` is the training script; the lines of it that say ``ckpt`` are asyncsave. The rest
runs that script as a process of its own, three times, and checks what comes out:

    python examples/train_lm.py                  the whole demo, a minute or two on two cores
    python examples/train_lm.py --quick          a tiny model, some ten seconds
    python examples/train_lm.py --train runs/lm  only train, with checkpoints in runs/lm
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import asyncsave

KEEP_LAST = 3


@dataclass(frozen=True, slots=True)
class Job:
    """How large the model is, how long it trains, and how often it saves."""

    layers: int
    width: int
    context: int
    batch: int
    steps: int
    every_steps: int


FULL = Job(layers=6, width=384, context=64, batch=4, steps=64, every_steps=8)
QUICK = Job(layers=2, width=256, context=32, batch=4, steps=48, every_steps=4)


# -- the training script ----------------------------------------------------------------------


class LanguageModel(nn.Module):
    """Predicts the next byte. Input and output embedding are one tensor."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, job.width), nn.Embedding(job.context, job.width)
        layer = nn.TransformerEncoderLayer(
            job.width, job.width // 64, 4 * job.width, batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(job.width)
        self.layers = nn.TransformerEncoder(layer, job.layers, norm, enable_nested_tensor=False)
        self.head = nn.Linear(job.width, 256, bias=False)
        self.head.weight = self.bytes.weight
        nn.init.normal_(self.bytes.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        embedded = self.bytes(text) + self.places(torch.arange(length))
        logits: Tensor = self.head(self.layers(embedded, mask, is_causal=True))
        return logits


class ShuffledText:
    """Pieces of the text in random order. Where it is in that order is part of the state."""

    def __init__(self, job: Job) -> None:
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = np.frombuffer(b"".join(path.read_bytes() for path in sources), np.uint8)
        self.pieces = torch.from_numpy(text.astype(np.int64)).unfold(
            0, job.context + 1, job.context
        )
        self.batch = job.batch
        self.generator = torch.Generator().manual_seed(1)
        self.shuffle()

    def shuffle(self) -> None:
        self.order = torch.randperm(len(self.pieces), generator=self.generator)
        self.position = 0

    def next_batch(self) -> Tensor:
        if self.position + self.batch > len(self.order):
            self.shuffle()
        chosen = self.order[self.position : self.position + self.batch]
        self.position += self.batch
        return self.pieces[chosen]

    def state_dict(self) -> dict[str, Any]:
        generator = self.generator.get_state()
        return {"generator": generator, "order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.order, self.position = state["order"], state["position"]


def train(directory: Path, job: Job) -> None:
    """Train, from the newest checkpoint in ``directory`` if there is one, and report each step."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    model, text = LanguageModel(job), ShuffledText(job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,  # a warm-up over the first tenth, and half a cosine
        lambda n: min((n + 1) / (0.1 * job.steps), 0.5 + 0.5 * math.cos(math.pi * n / job.steps)),
    )
    state = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "text": text,
        "rng": asyncsave.RngState(),  # dropout draws from it
    }
    newest: asyncsave.SaveHandle | None = None  # the save that was begun last

    with asyncsave.Checkpointer(
        directory, every_steps=job.every_steps, keep_last=KEEP_LAST, compression=1
    ) as ckpt:
        start = ckpt.restore(state) or 0
        report("start", step=start)
        for step in range(start + 1, job.steps + 1):
            saving = newest.step if newest is not None and not newest.done() else None
            began = time.perf_counter()

            batch = text.next_batch()
            logits = model(batch[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()

            seconds = time.perf_counter() - began
            handle = ckpt.step(step, state)
            newest = handle or newest
            begun = handle is not None and not handle.done()
            report("step", step=step, loss=loss.item(), seconds=seconds, saving=saving, begun=begun)
    for saved in ckpt.stats.reports:
        report("save", **asdict(saved), ratio=saved.ratio)


def report(event: str, **values: Any) -> None:
    """Print one line of JSON, for the process that started this one."""
    print(json.dumps({"event": event, **values}, default=str), flush=True)


# -- the demo: run it, kill it, go on, compare ------------------------------------------------


@dataclass(slots=True)
class Run:
    """What one training process has reported: where it began, each step, each save."""

    start: int = 0
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    saves: list[dict[str, Any]] = field(default_factory=list)


def run(
    directory: Path, job: Job, title: str, console: Console, kill_from: int | None = None
) -> Run:
    """Train in a process of its own; kill it in the first save in flight from ``kill_from`` on."""
    seen = Run()
    options = ["--train", str(directory), "--job", json.dumps(asdict(job))]
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with (
        Progress(
            TextColumn("{task.description:<14}"),
            *columns,
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as progress,
        subprocess.Popen(
            [sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True
        ) as child,
    ):
        assert child.stdout is not None
        bar = progress.add_task(title, total=job.steps, note="")
        for line in child.stdout:
            values = json.loads(line)
            match values["event"]:
                case "start":
                    seen.start = values["step"]
                case "step":
                    step, note = values["step"], f"loss {values['loss']:.2f}"
                    seen.steps[step] = values
                    progress.update(bar, completed=step, note=note)
                    if not console.is_terminal and step % (job.steps // 4) == 0:
                        console.print(f"{title}: step {step} of {job.steps}, {note}")
                    if kill_from is not None and step >= kill_from and values["begun"]:
                        child.kill()
                        break
                case "save":
                    seen.saves.append(values)
    if child.returncode not in (0, -signal.SIGKILL if kill_from is not None else 0):
        raise SystemExit(f"{title}: the training ended with status {child.returncode}")
    return seen


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Return the names of all leaves in which two states are not the same to the bit."""
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        return [each for key in one for each in differences(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, (list, tuple)) and type(one) is type(other) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [each for i, (a, b) in pairs for each in differences(a, b, f"{name}.{i}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        one, other = one.numpy(), other.numpy()
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        same = alike and one.tobytes() == other.tobytes()
    else:
        same = type(one) is type(other) and repr(one) == repr(other)
    return [] if same else [name.removeprefix(".") or "the state itself"]


def show_costs(console: Console, whole: Run) -> None:
    """Print what each save of the uninterrupted run cost.

    Lost is what was blocked, and what the steps beside which the save ran took beyond the median of
    the steps that had none beside them.
    """
    steps = whole.steps.values()
    usual = statistics.median(each["seconds"] for each in steps if each["saving"] is None)
    table = Table("step", "blocked", "lost", "ratio", "stored", "durable after")
    for column in table.columns:
        column.justify = "right"
    blocked = lost = 0.0
    for save in whole.saves:
        beside = [each["seconds"] - usual for each in steps if each["saving"] == save["step"]]
        this = save["blocked_seconds"] + sum(beside)
        blocked, lost = blocked + save["blocked_seconds"], lost + this
        table.add_row(
            str(save["step"]),
            f"{save['blocked_seconds'] * 1e3:.1f} ms",
            f"{this * 1e3:.0f} ms",
            f"{save['ratio']:.3f}",
            f"{save['stored_bytes'] / 1e6:.1f} MB",
            f"{save['durable_seconds']:.2f} s",
        )
    console.print("\nWhat each save of the uninterrupted run cost", table)
    one = lost / len(whole.saves)
    console.print(
        f"{len(whole.saves)} saves of {whole.saves[-1]['raw_bytes'] / 1e6:.0f} MB in "
        f"{len(whole.steps)} steps of {usual * 1e3:.0f} ms, far more often than trainings save, "
        f"so that there is something to kill. One save cost {one * 1e3:.0f} ms of training time, "
        f"of which {blocked / len(whole.saves) * 1e3:.0f} ms blocked (steps vary: a negative "
        f"figure is noise): {one / (usual * 500):.2%} of it for a save every 500 steps\n"
    )


def demo(job: Job, directory: Path, console: Console) -> int:
    """Run the demo; return the exit status: 0 only if every bit is the same."""
    whole_path, path = directory / "uninterrupted", directory / "interrupted"
    whole = run(whole_path, job, "uninterrupted", console)
    for kill_from in range(job.steps // 2, job.steps, job.every_steps):
        killed = run(path, job, "to be killed", console, kill_from)
        halves = [each.name for each in path.glob(f".step-{max(killed.steps):09d}.*")]
        if halves:
            break  # else the save was durable before the signal came: go on, and kill a later one
    else:
        console.print("[red]No kill hit a save in flight[/]: this disk is too fast for this model")
        return 1
    console.print(f"killed with SIGKILL after step {max(killed.steps)}; left behind: {halves[0]}")
    resumed = run(path, job, "resumed", console)
    console.print(f"resumed from step {resumed.start}, the newest checkpoint that verifies")
    show_costs(console, whole)

    different = differences(asyncsave.load(whole_path), asyncsave.load(path))
    for step, values in resumed.steps.items():
        different += differences(values["loss"], whole.steps[step]["loss"], f"loss of step {step}")
    different += [f"leftover {each.name}" for each in path.glob(".step-*")]
    if different:
        console.print(f"[red]The resumed run differs in {len(different)} places:[/]")
        console.print(*different[:20], sep="\n")
        return 1
    verified = sum(asyncsave.verify(each).stored_bytes for each in (whole_path, path))
    console.print(
        "[green]Bit-identical[/]: parameters, optimizer, scheduler, random generators, data order "
        f"and {len(resumed.steps)} losses. {verified / 1e6:.0f} MB of checkpoints verify."
    )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, kill, resume, and compare every bit.")
    parser.add_argument("--quick", action="store_true", help="a tiny model, some ten seconds")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the checkpoints there")
    parser.add_argument("--train", type=Path, metavar="DIR", help="only train, into this directory")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    job = Job(**chosen.job) if chosen.job else QUICK if chosen.quick else FULL
    if chosen.train is not None:
        train(chosen.train, job)
        return 0
    console = Console()
    if chosen.keep is not None:
        return demo(job, chosen.keep, console)
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=".") as directory:
        return demo(job, Path(directory), console)


if __name__ == "__main__":
    sys.exit(main())
