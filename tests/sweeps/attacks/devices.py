"""Names of devices that torch parses."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .forge import Attack, forge


def build(name: str, directory: Path) -> None:
    forge(directory, {"t": "device", "name": name})


BROKEN = [
    "",
    "cuda:",
    "cuda:-1",
    "cuda:1:2",
    "cuda:99999999999",
    "cpu:x",
    "a\0b",
    "cuda:0x1",
]
BROKEN += ["/dev/sda", "cuda:01", "CPU", " cpu", "cpu\n", "x" * 1_000_000]

ATTACKS = {
    **{f"{name!r:.30}": Attack(partial(build, name)) for name in BROKEN},
    # well formed: another torch may know it, and to go on from an older checkpoint would lose work
    "gpu": Attack(partial(build, "gpu"), "UnsupportedVersionError"),
    # a device is only a name: that this machine has none such is no fault of the checkpoint
    **{name: Attack(partial(build, name), None) for name in ("cuda:7", "meta", "xla:1")},
}
