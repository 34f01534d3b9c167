"""Chunks: a layout, cut.

    source a       source b           c  d  e  (sources of one group side by side)
    ├────────────┼──────────────────┼──┼──┼─┤
    ├─ chunk 0 ──────┼─ chunk 1 ─────┼─ 2 ──┤   each at most chunk_bytes long

A chunk is a slice of one large tensor, or many small tensors, or both, and nothing is wasted: a
group has as many chunks as its bytes need. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from .layout import Group, Layout
from .sources import Source

ALIGNMENT = 16
"""Every chunk length is cut at a multiple of this, the largest element size of torch, in bytes."""


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Bytes ``start`` to ``stop`` of a source, at ``offset`` in its chunk."""

    source: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Unit of encode, checksum and write.

    Attributes:
        index: its number in address order.
        nbytes: length, in bytes.
        dtype: name of the torch dtype of its elements, which decides the coding.
        late: may be staged until the fence; otherwise before ``save`` returns.
        pieces: what it is made of, in order, without gaps.
    """

    index: int
    nbytes: int
    dtype: str
    late: bool
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout and its chunks, in address order, none longer than ``chunk_bytes``."""

    layout: Layout
    chunks: tuple[Chunk, ...]
    chunk_bytes: int

    @classmethod
    def cut(cls, layout: Layout, chunk_bytes: int) -> Plan:
        """Cut a layout into chunks of at most ``chunk_bytes``, a multiple of ALIGNMENT."""
        chunks: list[Chunk] = []
        for group in layout.groups:
            for pieces in _pieces(group, layout.sources, chunk_bytes):
                last = pieces[-1]
                nbytes = last.offset + last.stop - last.start
                chunks.append(Chunk(len(chunks), nbytes, group.dtype, group.late, tuple(pieces)))
        return cls(layout, tuple(chunks), chunk_bytes)


def _pieces(group: Group, sources: tuple[Source, ...], chunk_bytes: int) -> Iterator[list[Piece]]:
    """Yield what each chunk of a group is made of."""
    pieces: list[Piece] = []
    filled = 0
    for i in group.sources:
        nbytes, done = sources[i].nbytes, 0
        while done < nbytes:
            take = min(nbytes - done, chunk_bytes - filled)
            pieces.append(Piece(i, done, done + take, filled))
            done += take
            filled += take
            if filled == chunk_bytes:
                yield pieces
                pieces, filled = [], 0
    if pieces:
        yield pieces
