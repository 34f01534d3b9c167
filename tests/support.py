"""What several tests need: bit-exact comparison, and waiting for what another thread does."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.sweeps.attacks.forge import sign_text


def bits(tensor: torch.Tensor) -> bytes:
    """Return a tensor's elements in row-major order, as bytes."""
    if tensor.numel() == 0:
        return b""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg()
    if not flat.is_contiguous():
        width = flat.element_size()
        if width < 16:
            flat = flat.view(
                {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
            )
        flat = flat.contiguous()
    raw = torch.empty(0, dtype=torch.uint8)
    raw.set_(
        flat.untyped_storage(),
        int(flat.storage_offset()) * flat.element_size(),
        (flat.numel() * flat.element_size(),),
        (1,),
    )
    return raw.numpy().tobytes()


def assert_same(one: Any, other: Any, where: str = "state") -> None:
    """Assert that two trees are the same in structure, types, and every bit."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor), where
        assert (one.dtype, one.shape) == (other.dtype, other.shape), where
        assert one.requires_grad == other.requires_grad, where
        assert type(one) is type(other), where
        assert bits(one) == bits(other), f"{where}: bits differ"
    elif isinstance(one, np.ndarray):
        assert isinstance(other, np.ndarray), where
        assert (one.dtype.str, one.shape) == (other.dtype.str, other.shape), where
        assert one.tobytes() == other.tobytes(), f"{where}: bits differ"
    elif isinstance(one, np.generic):
        assert type(one) is type(other), where
        assert one.tobytes() == other.tobytes(), where
    elif isinstance(one, float):
        assert type(other) is float, where
        assert struct.pack("d", one) == struct.pack("d", other), where
    elif isinstance(one, complex):
        assert type(other) is complex, where
        assert struct.pack("dd", one.real, one.imag) == struct.pack("dd", other.real, other.imag)
    elif isinstance(one, dict):
        assert type(one) is type(other), where
        assert [(type(k), k) for k in one] == [(type(k), k) for k in other], where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)) and not isinstance(one, torch.Size):
        if hasattr(one, "_fields"):
            assert type(one).__name__ == type(other).__name__, where
            assert one._fields == other._fields, where
        else:
            assert type(one) is type(other), where
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}.{i}")
    else:
        assert type(one) is type(other), where
        assert one == other, where


SMALL_LIMIT = 1_260_000
"""A ``memory_limit`` with which `in_small_chunks` has a slot for each of its chunks at once."""


def in_small_chunks() -> dict[str, torch.Tensor]:
    """Return a state of 15 chunks of 64 KiB, the last of them shorter, without compression.

    Each type begins a chunk of its own, so memory for all of the state goes furthest where chunks
    are shortest.
    """
    others = (torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    return {
        "w": torch.randn(8 << 14),
        **{str(each): torch.ones((64 << 10) // each.itemsize, dtype=each) for each in others},
        "last": torch.randn(20_000).half(),
    }


def make_newer(checkpoint: Path) -> None:
    """Make a checkpoint one of format 2, which nobody knows yet."""
    record = json.loads((checkpoint / "checkpoint.json").read_bytes())
    del record["xxh3_128"]
    sign_text(checkpoint, json.dumps(record | {"format": 2}))


def at_once(count: int, act: Callable[[], Any]) -> list[Any]:
    """Let so many threads begin to act together; return what each returned, or what it raised."""
    barrier, outcomes = threading.Barrier(count), []

    def run() -> None:
        barrier.wait()
        try:
            outcomes.append(act())
        except BaseException as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Return whether ``condition()`` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
