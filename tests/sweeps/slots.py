"""What an error or an interrupt must not lose: the memory that saves share."""

from __future__ import annotations

from asyncsave import Checkpointer


def all_free(ckpt: Checkpointer) -> bool:
    """Whether nobody has a slot or a frame, now that no save is in flight.

    Private, since nothing public says so: with one that is lost a save still succeeds, in waves;
    only when all are lost does it hang.
    """
    return all(arena.free == arena.count for arena in ckpt._pipeline._memory.arenas)
