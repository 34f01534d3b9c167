"""What does a run write, and wait for, of which most never changes?

A LoRA run trains small matrices beside a frozen base. Each way saves it so many times, with one
step of AdamW before each save, in a process of its own; then all checkpoints but the last are
removed, and the last is verified and compared with the live weights.

How to read it. "first" and "later" are bytes that were written, manifests included; "on disk" is
what the system says that the run's directory takes (its blocks, a linked file counted once).
Blocked is of the saves after the second, when memory is warm and there is something to share; one
cell is the median, and under it the smallest and the largest value.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from harness import MEDIANS, Bar, Bench, Column, Results, Size, cell, spread, table
from rich.table import Table

import asyncsave

WAYS = ("off", "content", "versions")
RANK = 8


class Model(torch.nn.Module):
    """Frozen square matrices, and two small trained ones beside each."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        linear = torch.nn.Linear
        self.base = torch.nn.ModuleList(linear(width, width) for _ in range(layers))
        self.down = torch.nn.ModuleList(linear(width, RANK, bias=False) for _ in range(layers))
        self.up = torch.nn.ModuleList(linear(RANK, width, bias=False) for _ in range(layers))
        self.base.requires_grad_(False)


def turn(reuse: Any, layers: int, width: int, saves: int, directory: Path) -> dict[str, Any]:
    """Save a run; return what it took."""
    torch.manual_seed(0)
    model = Model(layers, width)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    state = {"model": model, "optimizer": optimizer}
    run = directory / str(reuse)
    with asyncsave.Checkpointer(run, compression="off", reuse=reuse) as ckpt:
        for step in range(1, saves + 1):
            for each in trained:
                each.grad = torch.randn_like(each)
            optimizer.step()
            ckpt.save(step, state, block=True)
        reports = ckpt.stats.reports
    on_disk = allocated(run)
    for step in range(1, saves):
        shutil.rmtree(run / f"step-{step:09d}")
    asyncsave.verify(run)
    loaded = asyncsave.load(run)["model"]
    same = all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    last = allocated(run)
    shutil.rmtree(run)
    return {
        "raw": reports[0].raw_bytes,
        "first": reports[0].stored_bytes,
        "later": max(report.stored_bytes for report in reports[1:]),
        "written": sum(report.stored_bytes for report in reports),
        "on_disk": on_disk,
        "last": last,
        "same": same,
        "blocked": [report.blocked_seconds for report in reports[2:]],
        "durable": [report.durable_seconds for report in reports[2:]],
    }


def allocated(directory: Path) -> int:
    """Return how many bytes a directory takes on its disk; what has two names is counted once."""
    found = {}
    for path in directory.rglob("*"):
        about = path.stat()
        found[about.st_dev, about.st_ino] = about.st_blocks * 512
    return sum(found.values())


class LoRA(Bench):
    name = "lora"
    question = "What does a run write, and wait for, of which most never changes?"
    sizes: ClassVar = {
        "layers": Size(15, quick=2),
        "width": Size(4096, quick=64),
        "saves": Size(5, quick=3),
        "rounds": Size(3, quick=1),
    }

    def measure(self) -> Results:
        options = self.options
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
        for round_, name in self.turns(list(WAYS), options.rounds):
            size = options.layers, options.width, options.saves
            one = self.apart(turn, name, *size, self.directory)
            if not one.pop("same"):
                raise RuntimeError(f"{name}: what was loaded is not what was saved")
            blocked = ", ".join(f"{each:.4f}" for each in one["blocked"])
            self.say(f"{round_}/{options.rounds} {name}: later {one['later']}, blocked {blocked}")
            found[name].append(one)
        rows = [
            {
                "name": name,
                **{key: turns[0][key] for key in turns[0] if key not in ("blocked", "durable")},
                "blocked_seconds": spread(each for one in turns for each in one["blocked"]),
                "durable_seconds": spread(each for one in turns for each in one["durable"]),
            }
            for name, turns in found.items()
        ]
        return {"rows": rows}

    def bars(self, results: Results) -> list[Bar]:
        rows = {row["name"]: row for row in results["rows"]}
        bars = []
        for name in ("content", "versions"):
            row = rows[name]
            changed = row["written"] - row["first"]
            disk = row["on_disk"] / (row["first"] + changed)
            bars += [
                Bar.of(
                    f"{name}: a later save's bytes / the first's", row["later"] / row["first"], 0.02
                ),
                Bar.of(f"{name}: on disk / the first and what changed", disk, 1.05),
            ]
        ratio = {
            name: rows[name]["blocked_seconds"]["median"] / rows["off"]["blocked_seconds"]["median"]
            for name in ("content", "versions")
        }
        return [
            *bars,
            Bar.of("content: blocked / off", ratio["content"], 1.1),
            Bar.of("versions: blocked / off", ratio["versions"], 0.1),
        ]

    def tables(self, results: Results) -> Iterator[Table]:
        def mega(name: str) -> Any:
            return lambda row: f"{row[name] / 1e6:.2f}"

        columns: dict[str, Column] = {
            "reuse": "name",
            "first, MB": mega("first"),
            "later, MB": mega("later"),
            "on disk, MB": mega("on_disk"),
            "last alone, MB": mega("last"),
            "blocked, s": lambda row: cell(row["blocked_seconds"], 4),
            "durable, s": lambda row: cell(row["durable_seconds"], 3),
        }
        raw = results["rows"][0]["raw"] / 1e9
        yield table(results, "A LoRA run", columns, f"{raw:.2f} GB of state; {MEDIANS}")


if __name__ == "__main__":
    sys.exit(LoRA().main(sys.argv[1:]))
