"""The house: which room may know of which, and what is public."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import asyncsave

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / "asyncsave"
MODULES = sorted(path for path in HOUSE.rglob("*.py"))

# Each may import what stands before it, never what stands after it.
ORDER = [
    "_version",
    "errors",
    "dtypes",
    "moment",
    "report",
    "state",
    "snapshot",
    "codec",
    "storage",
    "memory",
    "handle",
    "watchdog",
    "task",
    "workers",
    "stages",
    "background",
    "pipeline",
    "listing",
    "live",
    "leaves",
    "tangle",
    "modules",
    "optimizers",
    "hints",
    "rename",
    "match",
    "apply",
    "restore",
    "single",
    "sample",
    "tune",
    "cadence",
    "signals",
    "saves",
    "turns",
    "checkpointer",
    "distributed",
    "cli",
    "__main__",
    "integrations",
]
PURE = ["state", "codec", "storage/manifest.py"]
UNPURE = {"threading", "os", "time", "asyncio", "pathlib", "io", "socket", "tempfile", "shutil"}
ONLY_IN = {
    "aiofiles": ["storage/filesystem.py"],
    "zstandard": ["codec/zstd.py"],
    "psutil": ["snapshot/available.py"],
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
        return []
    allowed = ORDER[: ORDER.index(room) + 1]
    rooms = [name.split(".")[1] for name in imported if name.startswith("asyncsave.")]
    return [each for each in rooms if each not in allowed]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_in_the_direction_of_the_data(path: Path) -> None:
    assert wrong_arrows(path, imports(path)) == []


def test_a_wrong_arrow_is_noticed() -> None:
    assert wrong_arrows(HOUSE / "state" / "plan.py", ["asyncsave.codec.planes"]) == ["codec"]
    assert wrong_arrows(HOUSE / "codec" / "zstd.py", ["asyncsave.pipeline"]) == ["pipeline"]


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_used_in_its_room_alone(library: str) -> None:
    users = [
        name_of(path)
        for path in MODULES
        if any(name.split(".")[0] == library for name in imports(path))
    ]
    assert users == ONLY_IN[library]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_pure_rooms_have_no_threads_files_or_clock(path: Path) -> None:
    if not name_of(path).startswith(tuple(PURE)) or name_of(path) == "codec/choose.py":
        return  # choose.py has a lock: encoders and the event loop tell it what they measured
    assert UNPURE.isdisjoint(name.split(".")[0] for name in imports(path))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 460, "split it"
    assert ast.get_docstring(ast.parse(text))
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


def test_the_public_names_are_the_documented_ones() -> None:
    documented = {
        *(
            "save",
            "load",
            "restore",
            "verify",
            "checkpoints",
            "CheckpointInfo",
            "Checkpointer",
            "SaveHandle",
            "SaveReport",
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
    init = ast.parse((HOUSE / "__init__.py").read_text())
    assert all(isinstance(n, (ast.Expr, ast.ImportFrom, ast.Assign)) for n in init.body)


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
