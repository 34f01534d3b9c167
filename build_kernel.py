"""Builds asyncsave/codec/kernel.c for a wheel or an editable install, if there is a compiler.

Without one, or where it fails, the wheel has no compiled code, and NumPy does the same work.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CODEC = Path(__file__).parent / "asyncsave" / "codec"
FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"]


class KernelHook(BuildHookInterface[Any]):
    """Called by hatchling before it collects the files of a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and let the wheel be one for this machine if that went well."""
        library = CODEC / "_kernel.so"
        if not compile_to(library):
            library.unlink(missing_ok=True)
            self.app.display_warning("asyncsave: no C compiler, so NumPy splits and joins planes")
            return
        build_data["artifacts"].append(str(library.relative_to(self.root)))
        build_data["pure_python"] = False
        # no part of Python's own interface is used: one wheel serves all versions
        machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{machine}"


def compile_to(library: Path, flags: list[str] = FLAGS) -> bool:
    """Compile the kernel; return whether that went well. Nothing is left where it did not."""
    compiler = next(filter(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")), None)
    if compiler is None:
        return False
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        made = Path(directory) / library.name
        for variant in ([], ["-DASYNCSAVE_ONE_CPU"]):  # an older compiler, or another linker
            command = [compiler, *flags, *variant, "-o", str(made), str(CODEC / "kernel.c")]
            done = subprocess.run(command, capture_output=True, check=False)
            if done.returncode == 0:
                os.replace(made, library)
                return True
    return False
