"""Plans: what is laid beside what."""

from __future__ import annotations

from pathlib import Path

import torch

import asyncsave
from asyncsave.state.flatten import flatten
from asyncsave.state.layout import Layouts


def adam(count: int, scale: float = 1e-3) -> dict[str, dict[str, torch.Tensor]]:
    """Return moments as an optimizer has them: two of different magnitude for every parameter."""
    return {
        str(i): {
            "exp_avg": torch.randn(60_000) * scale,
            "exp_avg_sq": torch.randn(60_000).square() * scale**2,
        }
        for i in range(count)
    }


def test_likes_are_side_by_side() -> None:
    flat = flatten(adam(3))
    layout = Layouts().of(flat)
    order = sorted(range(6), key=lambda i: layout.placements[i].start)
    assert [flat.names[i] for i in order] == [
        *("0.exp_avg", "1.exp_avg", "2.exp_avg"),
        *("0.exp_avg_sq", "1.exp_avg_sq", "2.exp_avg_sq"),
    ]


def test_likes_side_by_side_are_smaller(tmp_path: Path) -> None:
    state = adam(20)
    # the same numbers, under names that leave them as they are: one of each in turns
    values = [value for pair in state.values() for value in pair.values()]
    mixed = {f"{i:02}": value for i, value in enumerate(values)}
    stored = [
        asyncsave.save(each, tmp_path / name, compression=1).result().stored_bytes
        for name, each in (("likes", state), ("mixed", mixed))
    ]
    assert stored[0] < 0.99 * stored[1]
