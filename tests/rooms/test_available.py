"""Available memory: what the kernel will grant, on trees of files and in a control group."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncsave.available import available_memory

MIB = 1 << 20
V1_MOUNT = "cgroup cgroup rw,memory"
V2_MOUNT = "cgroup2 cgroup2 rw,nsdelegate"
V1_DIR, V2_DIR = "sys/fs/cgroup/memory", "sys/fs/cgroup"
NOTHING = "9223372036854771712"


def see(
    root: Path,
    groups: dict[str, dict[str, object]],
    *,
    own: str,
    mounts: str,
    limits: str = "",
    status: str = "",
) -> int:
    """Lay out the files of a process and of groups, by path below ``root``; ask what is free."""
    proc = root / "proc/self"
    files = {"cgroup": own, "mountinfo": mounts, "limits": limits, "status": status}
    for name, text in files.items():
        proc.mkdir(parents=True, exist_ok=True)
        (proc / name).write_text(text)
    for group, contents in groups.items():
        (root / group).mkdir(parents=True, exist_ok=True)
        for name, value in contents.items():
            (root / group / name).write_text(f"{value}\n")
    return available_memory(proc, root)


def mount(kind: str, point: str, top: str = "/") -> str:
    return f"35 31 0:32 {top} /{point} rw,relatime shared:9 master:1 - {kind}\n"


def v1(limit: object, used: object = 0, stat: str = "") -> dict[str, object]:
    return {
        "memory.limit_in_bytes": limit,
        "memory.usage_in_bytes": used,
        "memory.stat": stat,
    }


def v2(limit: object, used: object = 0, stat: str = "", high: object = "max") -> dict[str, object]:
    return {
        "memory.max": limit,
        "memory.current": used,
        "memory.stat": stat,
        "memory.high": high,
    }


def test_a_container_with_its_own_view_of_version_2(tmp_path: Path) -> None:
    groups = {V2_DIR: v2(100 * MIB, 30 * MIB)}
    assert see(tmp_path, groups, own="0::/\n", mounts=mount(V2_MOUNT, V2_DIR)) == 70 * MIB


def test_page_cache_that_can_be_dropped_is_free(tmp_path: Path) -> None:
    stat = (
        f"anon {10 * MIB}\nfile {87 * MIB}\nshmem {5 * MIB}\nfile_dirty {4 * MIB}\n"
        f"file_writeback {1 * MIB}\ninactive_file {60 * MIB}\nactive_file {22 * MIB}\n"
        f"unevictable 0\nslab_reclaimable {2 * MIB}\n"
    )
    groups = {V2_DIR: v2(100 * MIB, 100 * MIB, stat)}
    free = see(tmp_path, groups, own="0::/\n", mounts=mount(V2_MOUNT, V2_DIR))
    assert free == (60 + 22 + 2 - 4 - 1) * MIB


def test_cache_of_version_1_is_counted_with_the_groups_below(tmp_path: Path) -> None:
    stat = (
        f"cache 0\ninactive_file 0\nactive_file 0\ntotal_inactive_file {50 * MIB}\n"
        f"total_active_file {20 * MIB}\ntotal_dirty {8 * MIB}\ntotal_writeback {2 * MIB}\n"
    )
    groups = {V1_DIR: v1(100 * MIB, 90 * MIB, stat)}
    free = see(tmp_path, groups, own="4:memory:/\n", mounts=mount(V1_MOUNT, V1_DIR))
    assert free == (10 + 70 - 10) * MIB


@pytest.mark.parametrize("least", ["", "/job", "/job/step", "/job/step/task"])
@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_on_the_way_up_decides(tmp_path: Path, version: int, least: str) -> None:
    top, make = (V1_DIR, v1) if version == 1 else (V2_DIR, v2)
    groups = {top + path: make(900 * MIB, 100 * MIB) for path in ("", "/job", "/job/step")}
    groups[f"{top}/job/step/task"] = make(NOTHING if version == 1 else "max", 100 * MIB)
    groups[top + least] = make(500 * MIB, 400 * MIB)
    groups[f"{top}/other"] = make(1, 1)
    own = "4:cpu,memory:/job/step/task\n" if version == 1 else "0::/job/step/task\n"
    mounts = mount(V1_MOUNT if version == 1 else V2_MOUNT, top)
    assert see(tmp_path, groups, own=own, mounts=mounts) == 100 * MIB


def test_memory_high_is_a_limit(tmp_path: Path) -> None:
    groups = {V2_DIR: v2(100 * MIB, 30 * MIB, high=50 * MIB)}
    assert see(tmp_path, groups, own="0::/\n", mounts=mount(V2_MOUNT, V2_DIR)) == 20 * MIB


def test_both_versions_at_once(tmp_path: Path) -> None:
    own = "11:pids:/x\n4:memory:/a\n1:name=systemd:/y\n0::/b\n"
    mounts = mount(V1_MOUNT, V1_DIR) + mount(V2_MOUNT, "sys/fs/cgroup/unified")
    groups = {f"{V1_DIR}/a": v1(100 * MIB, 60 * MIB), "sys/fs/cgroup/unified/b": v2(70 * MIB)}
    assert see(tmp_path, groups, own=own, mounts=mounts) == 40 * MIB
    groups["sys/fs/cgroup/unified/b"] = v2(30 * MIB)
    assert see(tmp_path, groups, own=own, mounts=mounts) == 30 * MIB


@pytest.mark.parametrize("below", ["", "/init.scope"])
def test_a_container_that_is_called_by_the_hosts_path(tmp_path: Path, below: str) -> None:
    groups = {V1_DIR + below: v1(100 * MIB, 60 * MIB), V1_DIR: v1(300 * MIB)}
    groups[V1_DIR] = v1(90 * MIB, 60 * MIB)
    own = f"4:memory:/docker/5f1c{below}\n"
    mounts = mount(V1_MOUNT, V1_DIR, "/docker/5f1c") + mount(V1_MOUNT, "other", "/docker/aaaa")
    groups["other"] = v1(1)  # somebody else's, mounted here too
    assert see(tmp_path, groups, own=own, mounts=mounts) == 30 * MIB


def test_what_is_mounted_is_the_own_group_if_nothing_else_fits(tmp_path: Path) -> None:
    groups = {V2_DIR: v2(100 * MIB, 60 * MIB)}
    mounts = mount(V2_MOUNT, V2_DIR, "/docker/5f1c")
    own = "0::/system.slice/docker-5f1c.scope\n"
    assert see(tmp_path, groups, own=own, mounts=mounts) == 40 * MIB
    # a path that is not there below what is mounted: what is above it is
    assert see(tmp_path, groups, own=own, mounts=mount(V2_MOUNT, V2_DIR)) == 40 * MIB


def test_a_mount_point_with_a_space_in_it(tmp_path: Path) -> None:
    groups = {"my groups": v2(100 * MIB)}
    assert see(tmp_path, groups, own="0::/\n", mounts=mount(V2_MOUNT, "my\\040groups")) == 100 * MIB


def test_the_limits_of_the_process_itself(tmp_path: Path) -> None:
    limits = (
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        "Max data size             {}           unlimited            bytes     \n"
        "Max address space         {}           unlimited            bytes     \n"
    )
    status = f"Name:\tpython\nVmSize:\t   {3 << 10} kB\nVmData:\t   {1 << 10} kB\n"
    for data, space, free in [
        (10 * MIB, "unlimited", 9 * MIB),
        ("unlimited", 10 * MIB, 7 * MIB),
        (5 * MIB, 10 * MIB, 4 * MIB),
        (10 * MIB, 2 * MIB, 0),
    ]:
        text = limits.format(data, space)
        assert see(tmp_path, {}, own="", mounts="", limits=text, status=status) == free


def test_more_used_than_allowed_is_nothing_free(tmp_path: Path) -> None:
    groups = {V2_DIR: v2(100 * MIB, 130 * MIB)}
    assert see(tmp_path, groups, own="0::/\n", mounts=mount(V2_MOUNT, V2_DIR)) == 0


def test_without_limits_it_is_what_the_machine_has(tmp_path: Path) -> None:
    groups = {V2_DIR: v2("max"), V1_DIR: v1(NOTHING)}
    own, mounts = "4:memory:/\n0::/\n", mount(V1_MOUNT, V1_DIR) + mount(V2_MOUNT, V2_DIR)
    assert see(tmp_path, groups, own=own, mounts=mounts) > 100 * MIB
    assert available_memory(tmp_path / "nothing", tmp_path) > 100 * MIB
    assert available_memory() > 0


WORDS = st.sampled_from(
    ["max", "-1", "1e9", "", "\0", "/", "..", " - ", "::", "0::/", "\\777", "٣", "9" * 40, "\n"]
)
GARBAGE = st.lists(st.one_of(WORDS, st.text(max_size=6)), max_size=6).map("".join)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(GARBAGE, min_size=8, max_size=8), sound=st.sets(st.integers(0, 7)))
def test_no_file_can_raise(tmp_path: Path, texts: list[str], sound: set[int]) -> None:
    good = ["0::/a\n", mount(V2_MOUNT, V2_DIR), "", "", "9000000", "8000000", "x 1", "max"]
    texts = [good[i] if i in sound else text for i, text in enumerate(texts)]
    texts = [text.encode(errors="replace").decode() for text in texts]
    own, mounts, limits, status, *group = texts
    names = ["memory.max", "memory.current", "memory.stat", "memory.high"]
    groups: dict[str, dict[str, object]] = {f"{V2_DIR}/a": dict(zip(names, group, strict=True))}
    free = see(tmp_path, groups, own=own, mounts=mounts, limits=limits, status=status)
    assert free >= 0


def test_a_file_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    groups = {V2_DIR: v2(100 * MIB, 30 * MIB), f"{V2_DIR}/a": {}}
    (tmp_path / V2_DIR / "a" / "memory.max").mkdir(parents=True)
    assert see(tmp_path, groups, own="0::/a\n", mounts=mount(V2_MOUNT, V2_DIR)) == 70 * MIB


# -- a control group of the kernel's --------------------------------------------------------------


def group_parents() -> Iterator[tuple[Path, str]]:
    """Yield directories in which a group that limits memory may be made, and the limit's file."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            yield Path("/sys/fs/cgroup/memory") / path.lstrip("/"), "memory.limit_in_bytes"
        elif not controllers:
            yield Path("/sys/fs/cgroup") / path.lstrip("/"), "memory.max"
    yield Path("/sys/fs/cgroup"), "memory.max"


@contextlib.contextmanager
def limited_group(nbytes: int) -> Iterator[Path]:
    """Make a control group of so much memory; skip the test where none can be made."""
    why = "there are no control groups here"
    for parent, limit in group_parents():
        group = parent / f"asyncsave-test-{uuid.uuid4().hex[:8]}"
        try:
            group.mkdir()
        except OSError as error:
            why = f"no control group can be made here: {error}"
            continue
        try:
            (group / limit).write_text(str(nbytes))
        except OSError as error:
            why = f"memory cannot be limited here: {error}"
            group.rmdir()
            continue
        try:
            yield group
        finally:
            group.rmdir()  # its one process has ended
        return
    pytest.skip(why)


IN_GROUP = """
import os, sys, torch, asyncsave
from asyncsave.available import available_memory
print(available_memory(), flush=True)
state = {f"w{i}": torch.ones(8 << 20) for i in range(int(sys.argv[2]))}        # each of 32 MiB
with open(sys.argv[1] + "/cache", "wb") as file:                               # fills the cache
    for _ in range(600):
        file.write(bytes(1 << 20))
    os.fsync(file.fileno())
before = available_memory()
with asyncsave.Checkpointer(sys.argv[1] + "/run", compression="off") as ckpt:
    for step in range(2):
        report = ckpt.save(step, state, block=True).result()
print(before, report.peak_memory_bytes)
"""


def test_a_save_in_a_group_with_its_page_cache_full(tmp_path: Path) -> None:
    """The state, Python and the whole snapshot are more than the group may have."""
    with limited_group(800 * MIB) as group:
        enter = 'echo $$ > "$0" && exec "$@"'
        script = [sys.executable, "-c", IN_GROUP, str(tmp_path), "11"]
        run = subprocess.run(
            ["sh", "-c", enter, str(group / "cgroup.procs"), *script],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
    (tmp_path / "cache").unlink()
    assert run.returncode == 0, f"{run.returncode}: {run.stderr}"
    first, before, peak = map(int, run.stdout.split())
    assert first < 800 * MIB
    assert 10 * MIB < peak <= before < 400 * MIB
