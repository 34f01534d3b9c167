"""Groups: chunks that are stored as they are go to the disk with their neighbours."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import asyncsave
from asyncsave.codec.compression import CompressionSetting
from asyncsave.pipeline.encode import Frame
from asyncsave.pipeline.write import _neighbours
from asyncsave.snapshot.arena import Arena
from asyncsave.state.chunks import Chunk
from tests.doubles.fault_disk import FaultDisk, Faults
from tests.support import SMALL_LIMIT, assert_same, in_small_chunks

CHUNK = 64 << 10


def writes_of(faults: Faults) -> list[tuple[int, int]]:
    return [(each.offset, each.length) for each in faults.operations if each.kind == "write"]


@pytest.mark.parametrize(
    ("compression", "memory_limit", "expected"),
    [
        ("off", SMALL_LIMIT, [4, 4, 4, 3]),  # the last chunk is shorter
        (1, 3 << 20, [1] * 15),  # encoded chunks are not neighbours
        ("off", 3 * CHUNK, None),  # with two slots, who copies waits for each
    ],
)
def test_neighbours_are_written_together(
    tmp_path: Path,
    compression: CompressionSetting,
    memory_limit: int,
    expected: list[int] | None,
) -> None:
    faults = Faults()
    state = in_small_chunks()
    with asyncsave.Checkpointer(
        FaultDisk(faults).at(tmp_path),
        compression=compression,
        memory_limit=memory_limit,
        reuse="off",
        signals=(),
    ) as ckpt:
        for step in (1, 2):
            faults.operations.clear()
            ckpt.save(step, state, block=True)
            writes = writes_of(faults)
            chunks = [-(-length // CHUNK) for _, length in writes]
            assert sum(chunks) == 15
            assert max(chunks) <= 4
            if expected is not None:
                assert chunks == expected
            offset = 0
            for at, length in writes:
                assert at == offset
                assert length % 4096 == 0
                offset += length
            assert_same(ckpt.load(step=step), state)


@given(
    st.lists(st.tuples(st.sampled_from([4096, 4096, 100]), st.integers(0, 7)), max_size=8),
    st.sets(st.integers(0, 7)),
)
def test_runs_lie_end_to_end(wanted: list[tuple[int, int]], other: set[int]) -> None:
    arenas = Arena(4096, 8), Arena(4096, 8)
    slots = [[arena.acquire(i) for i in range(8)] for arena in arenas]
    frames = []
    for at, (length, index) in enumerate(wanted):
        arena, slot = arenas[at in other], slots[at in other][index]
        assert slot is not None
        chunk = Chunk(at, length, "uint8", False, ())
        frames.append(Frame(chunk, arena, slot, length, "raw", (length,), "", ""))
    runs = list(_neighbours(frames))
    assert [frame for run in runs for frame in run] == frames
    for run in runs:
        view = np.frombuffer(run[0].arena.view(run[0].slot, len(run) * 4096), np.uint8)
        for i, frame in enumerate(run):
            assert frame.slot.tensor.data_ptr() == view.ctypes.data + i * 4096
        assert all(frame.length == 4096 for frame in run[:-1])
    for one, two in itertools.pairwise(runs):
        assert not two[0].follows(one[-1])
