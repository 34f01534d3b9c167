"""Runner: each attack in a forked process of its own, watched, bounded, and timed.

``python -m tests.sweeps.attacks.runner DIRECTORY`` prints one line of JSON for each attack. The
child has an audit hook that notes what is opened, run and imported, a limit of address space, and
an alarm: an attack that gets a process killed is a line that says so.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import asyncsave
import tests.sweeps.attacks

from .forge import Attack, forge, tensor

ADDRESS_SPACE = 6 << 30
ALARM_SECONDS = 60
QUIET = {"forge", "runner"}

# What a process does that runs, loads or starts something. "compile" and "exec" are NamedTuples
# being made: which code it was is checked.
DEEDS = ("compile", "exec", "import", "marshal", "pickle", "subprocess", "os.", "socket", "ctypes")
HARMLESS = ("os.listdir", "os.scandir")


def attacks() -> Iterator[tuple[str, Attack]]:
    """Yield every attack and its name."""
    for module in pkgutil.iter_modules(tests.sweeps.attacks.__path__):
        if module.name not in QUIET:
            found = importlib.import_module(f"tests.sweeps.attacks.{module.name}")
            for variant, attack in found.ATTACKS.items():
                yield f"{module.name}: {variant}", attack


class Watch:
    """An audit hook. It cannot be taken off again, so it is put on in a process that ends."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.deeds: list[str] = []
        self.looks = False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.looks:
            return
        if event == "open" and not isinstance(arguments[0], int):
            path = os.fsdecode(arguments[0])
            if path.startswith("/proc/self/fd/"):  # what is open already, opened in another way
                path = os.readlink(path)
            self.opened.append(path)
        elif event.startswith(DEEDS) and event not in HARMLESS:
            what = arguments[0] if arguments else ""
            if event == "compile" and isinstance(what, (bytes, bytearray)):
                what = bytes(what).decode()
            # a string that is evaluated was compiled before, and noted as that
            if event != "exec" or what.co_filename != "<string>":
                self.deeds.append(f"{event} {what!s:.9999}")


def canary() -> dict[str, Any]:
    """Return a live state that no attack may change by half."""
    return {"x": torch.full((4,), 7, dtype=torch.uint8), "n": 1, "later": [1, 2]}


def ways(path: Path, state: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    return {
        "load": lambda: asyncsave.load(path),
        "restore": lambda: asyncsave.restore(path, state),
        "keys": lambda: asyncsave.load(path, keys="x"),
        "verify": lambda: asyncsave.verify(path),
    }


def attempt(path: Path) -> dict[str, Any]:
    """Read the checkpoint in every way; return what happened."""
    warnings.simplefilter("error")
    state = canary()
    watch = Watch()
    peak = 0
    found: dict[str, Any] = {}
    for name, way in ways(path, state).items():
        before = memory()
        began = time.process_time()
        error: BaseException | None = None
        watch.looks = True
        try:
            way()
        except BaseException as caught:
            error = caught
        watch.looks = False
        peak = max(peak, memory("VmHWM") - before)
        found[name] = {
            "seconds": time.process_time() - began,
            "error": None if error is None else type(error).__name__,
            "ours": error is None or isinstance(error, asyncsave.LoadError),
            "text": str(error),
            "trace": "".join(traceback.format_exception(error)[-4:])[-2000:] if error else "",
        }
        if name == "restore" and error is not None:
            found["unchanged"] = repr(state) == repr(canary())
    return found | {
        "megabytes": peak / 1e6,
        "opened": sorted(set(watch.opened)),
        "deeds": sorted(set(watch.deeds)),
    }


def memory(what: str = "VmRSS") -> int:
    """Return bytes of this process, from the system; the peak counts from the last VmRSS."""
    if what == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{what}:")).split()[1]) * 1024


def in_child(path: Path) -> dict[str, Any]:
    """Run `attempt` in a fork."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        try:
            signal.alarm(ALARM_SECONDS)
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + ADDRESS_SPACE
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with os.fdopen(sink, "w") as out:
                json.dump(attempt(path), out)
        finally:
            os._exit(0)
    os.close(sink)
    with os.fdopen(source) as answers:
        text = answers.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"died": os.waitstatus_to_exitcode(status)}


def main(scratch: Path, only: str = "") -> None:
    repr(canary())
    forge(scratch / "warm", {"t": "dict", "keys": ["a"], "values": [1]}, tensors=[tensor((0,))])
    for way in ways(scratch / "warm", canary()).values():
        with contextlib.suppress(asyncsave.LoadError):
            way()  # so that what is imported late is imported now
    gc.collect()
    gc.freeze()  # or each child would look through all of torch
    for name, attack in attacks():
        if only not in name:
            continue
        path = scratch / "attack" / "checkpoint"
        path.parent.mkdir()
        attack.build(path)
        print(json.dumps({"name": name, **in_child(path)}), flush=True)
        shutil.rmtree(path.parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
