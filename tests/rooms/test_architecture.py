"""The house: which room may know of which, and what is public."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest

import asyncsave

ROOT = Path(__file__).parents[2]
HOUSE = ROOT / "asyncsave"
MODULES = sorted(path for path in HOUSE.rglob("*.py"))

GROUND = ["errors", "_version", "pages", "available", "report"]
"""Loose files that know no room: what a save and its memory are told in."""

# A room, the rooms that it may know, and why it may not know the others.
LAYERS: dict[str, tuple[list[str], str]] = {
    "errors": ([], "whoever can fail knows the errors"),
    "_version": ([], "a number"),
    "pages": ([], "memory, of whatever for"),
    "available": ([], "the machine's memory, of whatever for"),
    "report": ([], "plain records, which people print"),
    "format": (["errors"], "FORMAT.md in code: bytes and records, without a disk or a device"),
    "codec": (["errors", "format"], "a chunk's bytes, wherever they come from and go to"),
    "storage": (["errors", "pages", "format"], "files, whatever is in them"),
    "reading": ([*GROUND, "format", "codec", "storage"], "also for those who have no torch"),
    "state": (["errors", "format"], "live values and their names, before anything is copied"),
    "snapshot": (["errors", "pages", "format", "state"], "copies, whatever becomes of them"),
    "pipeline": (
        [*GROUND, "format", "codec", "storage", "state", "snapshot"],
        "one save; what was saved before is none of its business",
    ),
    "saver": (
        [*GROUND, "format", "codec", "storage", "reading", "state", "pipeline"],
        "saves to any path; a run is built of it",
    ),
    "restoring": (
        [*GROUND, "format", "storage", "reading", "state"],
        "nothing of saving: neither snapshots nor pipelines",
    ),
    "tuning": (
        [*GROUND, "format", "codec", "storage", "reading", "state", "snapshot", "pipeline"],
        "measures all that a save is made of",
    ),
    "run": (
        [*GROUND, "format", "codec", "storage", "reading", "pipeline", "restoring"],
        "one training run: it saves and restores, and looks into no state itself",
    ),
    "numpy": (["errors", "storage", "reading"], "a face: it loads where no torch is"),
    "cli": ([], "public names only"),
    "__main__": (["cli"], "the command"),
}
TORCH_FREE = ["errors", "_version", "pages", "available", "report", "format", "codec", "storage"]
TORCH_FREE += ["reading", "numpy"]
"""Below the wall: to read a checkpoint takes no torch."""

PURE = ["format", "codec", "state", "run/retention.py"]
LOADS = ["codec/kernel.py", "format/kinds.py"]
"""Pure but for a beginning: one finds and loads compiled code, one names the types of paths."""
UNPURE = {"threading", "os", "time", "asyncio", "pathlib", "io", "socket", "tempfile", "shutil"}
ONLY_IN = {
    "aiofiles": ["storage/local.py"],
    "zstandard": ["codec/zstd.py"],
    "psutil": ["available.py"],
    "pickle": [],
    "shelve": [],
    "marshal": [],
}


def name_of(path: Path) -> str:
    return str(path.relative_to(HOUSE))


def room_of(path: Path) -> str:
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Return what a module imports, as absolute dotted names."""
    package = ("asyncsave", *path.relative_to(HOUSE).parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [module] if node.module else [f"{module}.{a.name}" for a in node.names]
    return found


def wrong_arrows(path: Path, imported: list[str]) -> list[str]:
    room = room_of(path)
    if room == "__init__":
        return []  # the face: it names what all rooms have
    allowed = [room, *LAYERS[room][0]]
    rooms = [name.split(".")[1] for name in imported if name.startswith("asyncsave.")]
    return [
        each for each in rooms if each not in allowed and not (room == "cli" and is_public(each))
    ]


def is_public(name: str) -> bool:
    return name in asyncsave.__all__


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_in_the_direction_of_the_data(path: Path) -> None:
    assert wrong_arrows(path, imports(path)) == [], LAYERS[room_of(path)][1]


def test_a_wrong_arrow_is_noticed() -> None:
    assert wrong_arrows(HOUSE / "state" / "layout.py", ["asyncsave.codec.planes"]) == ["codec"]
    assert wrong_arrows(HOUSE / "codec" / "zstd.py", ["asyncsave.pipeline.save"]) == ["pipeline"]
    assert wrong_arrows(HOUSE / "cli" / "picture.py", ["asyncsave.report"]) == ["report"]


def test_layers_have_no_circle() -> None:
    seen: list[str] = []
    for room, (known, _) in LAYERS.items():
        assert set(known) <= set(seen)
        seen.append(room)


def test_no_room_has_the_name_of_a_public_function() -> None:
    """Whoever imports a room ``asyncsave.restore`` would hide ``asyncsave.restore()``."""
    assert not {room_of(path) for path in MODULES} & set(asyncsave.__all__)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_torch_below_the_wall(path: Path) -> None:
    if room_of(path) in TORCH_FREE:
        assert "torch" not in {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_used_in_its_room_alone(library: str) -> None:
    users = [
        name_of(path)
        for path in MODULES
        if any(name.split(".")[0] == library for name in imports(path))
    ]
    assert users == ONLY_IN[library]


BEHIND_THE_SEAM = {f"asyncsave.storage.{name}" for name in ("disk", "local", "direct")}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_storage_knows_a_disk(path: Path) -> None:
    """All others have a `Place`, which says in our words what its disk refuses."""
    if room_of(path) != "storage":
        assert BEHIND_THE_SEAM.isdisjoint(imports(path))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_pure_rooms_have_no_threads_files_or_clock(path: Path) -> None:
    if name_of(path).startswith(tuple(PURE)) and name_of(path) not in LOADS:
        assert UNPURE.isdisjoint(name.split(".")[0] for name in imports(path))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "split it"
    assert ast.get_docstring(ast.parse(text))
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


def test_the_public_names_are_the_documented_ones() -> None:
    documented = {
        *(
            "check",
            "register",
            "save",
            "load",
            "restore",
            "verify",
            "checkpoints",
            "CheckpointInfo",
            "Checkpointer",
            "SaveHandle",
            "SaveReport",
            "Saver",
        ),
        *(
            "RestoreReport",
            "VerifyReport",
            "Stats",
            "TuneReport",
            "TuneRow",
            "tune",
            "Compression",
            "RngState",
            "__version__",
        ),
        *("AsyncSaveError", "ConfigError", "StateError", "ClosedError", "BusyError"),
        *("CheckpointExistsError", "SaveError", "StagingError", "WriteError", "DiskFullError"),
        *("CommitError", "LoadError", "CheckpointNotFoundError", "FormatError"),
        *("UnsupportedVersionError", "IntegrityError", "MismatchError"),
    }
    assert set(asyncsave.__all__) == documented
    assert asyncsave.__all__ == sorted(asyncsave.__all__)
    for name in asyncsave.__all__:
        assert getattr(asyncsave, name).__doc__ or name == "__version__"
    assert set(asyncsave._ROOMS) == documented - {"__version__"}
    assert documented <= set(dir(asyncsave))
    typed = re.search(r"if TYPE_CHECKING:\n(.*?)\n\n", (HOUSE / "__init__.py").read_text(), re.S)
    assert typed
    names = {a.name for n in ast.parse(textwrap.dedent(typed[1])).body for a in n.names}  # type: ignore[attr-defined]
    assert names == documented - {"__version__"} | {"numpy"}, "what type checkers see"


def test_the_error_tree_is_as_documented() -> None:
    parents = {
        "ConfigError": ("AsyncSaveError", ValueError),
        "StateError": ("AsyncSaveError", TypeError),
        "ClosedError": ("AsyncSaveError", RuntimeError),
        "BusyError": ("AsyncSaveError", RuntimeError),
        "CheckpointExistsError": ("AsyncSaveError", FileExistsError),
        "SaveError": ("AsyncSaveError", Exception),
        "StagingError": ("SaveError", Exception),
        "WriteError": ("SaveError", Exception),
        "DiskFullError": ("WriteError", Exception),
        "CommitError": ("AsyncSaveError", Exception),
        "LoadError": ("AsyncSaveError", Exception),
        "CheckpointNotFoundError": ("LoadError", FileNotFoundError),
        "FormatError": ("LoadError", ValueError),
        "UnsupportedVersionError": ("FormatError", ValueError),
        "IntegrityError": ("LoadError", Exception),
        "MismatchError": ("LoadError", Exception),
    }
    for name, (parent, builtin) in parents.items():
        error = getattr(asyncsave, name)
        assert error.__bases__[0].__name__ == parent
        assert issubclass(error, builtin)
    assert not issubclass(asyncsave.CommitError, asyncsave.SaveError)
