"""The compiled kernel against its definition in NumPy: the same bytes, for everything there is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import build_kernel
from asyncsave.codec import kernel, planes
from asyncsave.codec.planes import JOIN_SCRATCH_BYTES, ByteArray
from asyncsave.format.codings import LAYOUTS, plane_lengths

ROOT = Path(__file__).parents[2]
PLANED = ("exp16.0", "exp32.0", "bytes2", "bytes4", "bytes8")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> kernel.Kernel:
    library = tmp_path_factory.mktemp("kernel") / "_kernel.so"
    if not build_kernel.compile_to(library):
        pytest.skip("no C compiler here")
    return kernel.Kernel(library)


def at(address: int, nbytes: int) -> ByteArray:
    """Return memory that begins ``address`` bytes behind a multiple of 64."""
    memory = np.empty(nbytes + 192, np.uint8)
    start = (-memory.ctypes.data) % 64 + address
    return memory[start : start + nbytes]


def filled(kind: int, nbytes: int, seed: int) -> ByteArray:
    """Return bytes of one of several kinds."""
    random = np.random.default_rng(seed)
    if kind == 0:
        return random.integers(0, 256, nbytes, np.uint8)
    if kind == 1:  # weights: few exponents
        floats = (random.standard_normal(nbytes // 4 + 1) * 0.02).astype("<f4")
        return floats.view(np.uint8)[:nbytes]
    if kind == 2:  # NaN, infinity, zeros and subnormal numbers of both signs
        some = np.array([0x7FC00001, 0xFF800000, 0, 0x80000000, 1, 0x80000001, 0x7F7FFFFF], "<u4")
        return random.choice(some, nbytes // 4 + 1).view(np.uint8)[:nbytes]
    return np.full(nbytes, seed % 256, np.uint8)


def compare(compiled: kernel.Kernel, coding: str, count: int, kind: int, seed: int) -> None:
    """Assert that both split and join alike, at addresses that come of ``seed``."""
    random = np.random.default_rng(seed)
    nbytes = count * LAYOUTS[coding].element_bytes
    raw = at(int(random.integers(64)), nbytes)
    raw[:] = filled(kind, nbytes, seed)
    scratch = np.empty(nbytes // 2 + 2, np.uint8)
    join_scratch = np.empty(JOIN_SCRATCH_BYTES, np.uint8)
    expected, found = np.empty(nbytes, np.uint8), at(int(random.integers(64)), nbytes)
    stored = planes.split(coding, raw.copy(), expected, scratch)
    assert compiled.split(coding, raw, found, scratch) == stored
    assert np.array_equal(expected, found)
    parts = []
    for view in planes.views(found, plane_lengths(stored, nbytes)):
        part = at(int(random.integers(64)), view.size)
        part[:] = view
        parts.append(part)
    back = at(int(random.integers(64)), nbytes)
    compiled.join(stored, parts, back, join_scratch)
    assert np.array_equal(back, raw)


@given(
    coding=st.sampled_from(PLANED),
    count=st.one_of(st.integers(0, 300), st.integers(16_000, 17_000)),
    kind=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=300, deadline=None)
def test_both_make_the_same_of_anything(
    compiled: kernel.Kernel, coding: str, count: int, kind: int, seed: int
) -> None:
    compare(compiled, coding, count, kind, seed)


@pytest.mark.parametrize("coding", PLANED)
def test_every_short_length_and_every_alignment(compiled: kernel.Kernel, coding: str) -> None:
    for count in range(130):
        compare(compiled, coding, count, 0, count)
    for seed in range(64):
        compare(compiled, coding, 4099, 1, seed)


@pytest.mark.parametrize("coding", ["exp16.0", "exp32.0"])
def test_every_bit_pattern_of_a_half(compiled: kernel.Kernel, coding: str) -> None:
    halves = np.arange(1 << 16, dtype="<u2")
    raw = halves if coding == "exp16.0" else (halves.astype("<u4") << 16 | halves[::-1])
    out, back = np.empty(raw.nbytes, np.uint8), np.empty(raw.nbytes, np.uint8)
    bytes_ = np.ascontiguousarray(raw).view(np.uint8)
    stored = compiled.split(coding, bytes_, out, out)
    compiled.join(stored, planes.views(out, plane_lengths(stored, raw.nbytes)), back, out)
    assert np.array_equal(back, bytes_)


@pytest.mark.parametrize("base", range(16))
def test_every_base_is_joined(compiled: kernel.Kernel, base: int) -> None:
    """A reader joins what any base was added to, also one that this writer would not choose."""
    coding = f"exp32.{base}"
    parts = planes.views(filled(0, 4004, base), plane_lengths(coding, 4004))
    expected, found = np.empty(4004, np.uint8), np.empty(4004, np.uint8)
    planes.join(coding, parts, expected, np.empty(JOIN_SCRATCH_BYTES, np.uint8))
    compiled.join(coding, parts, found, found)
    assert np.array_equal(expected, found)


@given(st.integers(0, 70_000), st.integers(0, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_both_count_alike(compiled: kernel.Kernel, nbytes: int, kind: int, seed: int) -> None:
    plane = filled(kind, nbytes, seed)
    assert compiled.collisions(plane, 16, 2048) == planes.collisions(plane, 16, 2048)


def test_lengths_are_checked_before_the_call(compiled: kernel.Kernel) -> None:
    raw, out = np.zeros(400, np.uint8), np.zeros(400, np.uint8)
    for coding in PLANED:
        with pytest.raises(ValueError, match="do not fill"):
            compiled.split(coding, raw, out[:-8], raw)
        parts = planes.views(out, plane_lengths(coding, 400))
        with pytest.raises(ValueError, match="are not"):
            compiled.join(coding, [*parts[:-1], parts[-1][:-1]], raw, raw)
        with pytest.raises(ValueError, match="are not"):
            compiled.join(coding, parts[:-1], raw, raw)
        with pytest.raises(ValueError, match="one behind the other"):
            compiled.split(coding, np.zeros(800, np.uint8)[::2], out, raw)
    with pytest.raises(ValueError, match="whole number"):
        compiled.split("exp32.0", raw[:399], out[:399], raw)
    with pytest.raises(ValueError, match="unknown coding"):
        compiled.split("exp32.99", raw, out, raw)


def test_which_one_runs() -> None:
    program = "from asyncsave.codec import kernel; print(kernel.NAME)"

    def name(**env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **env},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert name(ASYNCSAVE_KERNEL="numpy") == "NumPy"
    assert name(ASYNCSAVE_KERNEL="") == ("compiled" if kernel.LIBRARY.exists() else "NumPy")


def test_what_runs_without_a_compiler_passes_the_codecs_tests() -> None:
    """`make test-slow` has it read damaged and hostile files as well."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/rooms/test_codec.py"],
        env={**os.environ, "ASYNCSAVE_KERNEL": "numpy"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout[-3000:]


SANITIZED = """
import sys
import pytest
from asyncsave.codec import kernel
from tests.rooms.test_kernel import PLANED, compare
compiled = kernel.Kernel(sys.argv[1])
for coding in PLANED:
    for count in [*range(70), 2047, 2048, 2049, 4095, 4096, 4097, 16_383, 16_384, 16_385]:
        compare(compiled, coding, count, count % 4, count)
print("sound")
"""


@needs_compiler
def test_no_byte_is_touched_beside_the_chunk(tmp_path: Path) -> None:
    """Under AddressSanitizer and UndefinedBehaviorSanitizer."""
    library = tmp_path / "_kernel.so"
    flags = [*build_kernel.FLAGS, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if not build_kernel.compile_to(library, [*flags, "-DASYNCSAVE_ONE_CPU"]):
        pytest.skip("this compiler has no sanitizers")
    runtime = subprocess.run(
        ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("this compiler's sanitizers cannot be loaded into a program")
    env = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library)],
        env={**os.environ, **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (0, "sound\n"), done.stderr[-3000:]
