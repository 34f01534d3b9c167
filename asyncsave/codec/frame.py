"""Chunks to frames and back.

A frame is its parts end to end, one for each byte plane. A part as long as its plane is the
plane's bytes; a shorter one is one zstd frame of the plane, content size in its header; a longer
one does not exist. So a frame is never longer than its chunk, and the lengths of its parts are
all that decoding needs besides the coding id.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from ..format.codings import plane_lengths
from ..format.dtypes import DTYPES
from .kernel import collisions, join, split
from .planes import JOIN_SCRATCH_BYTES, SPLIT_TRANSIENT_BYTES, ByteArray, spread, views
from .zstd import ENTROPY_ONLY, Compressor, Decompressor, compressor_bytes

# Many short pieces, since what compresses (rows never trained, padding) comes in long stretches:
# with 4 of them encoding takes 12.6 ms, with 16 and 64 8.8; 8 to 128 KiB in all make no difference
# (bench/knobs.py sample-pieces, sample-bytes).
_SAMPLE_PIECES: Final = 16
_SAMPLE_BYTES: Final = 32 << 10
# 3 %: decoding a plane costs more than reading the few bytes that less would save.
_SAMPLE_LIMIT_BYTES: Final = _SAMPLE_BYTES * 97 // 100
# Of bytes that entropy coding shrinks by 3 %, Shannon's entropy is 7.76 bits or less; and the
# collision entropy, -log2 of the probability that two bytes are equal, is never above Shannon's.
_LIKELY_EQUAL: Final = 2**-7.76

# So much is moved without letting go of the GIL: 0.4 ms at most; to get it back may take 5.
_HELD_BYTES: Final = 4 << 20


def coding_for(dtype_name: str, byte_planes: bool) -> str:
    """Returns the coding id for elements of a torch dtype.

    Args:
        dtype_name: the dtype's name without `torch.`, as "bfloat16".
        byte_planes: whether to split elements; if not, every dtype is "zstd".

    Returns:
        What to give to `Encoder.encode`, which returns the id to store.
    """
    return DTYPES[dtype_name].coding if byte_planes else "zstd"


class Encoder:
    """Encodes chunks, with a zstd context and scratch that live as long as it. One per thread."""

    __slots__ = ("_compressor", "_entropy_only", "_max_chunk_bytes", "_sample", "_scratch")

    def __init__(self, level: int, max_chunk_bytes: int, byte_planes: bool = True) -> None:
        """Allocates everything that encoding will need.

        Args:
            level: 1 for entropy only, 2 to 22 for zstd's own levels.
            max_chunk_bytes: the longest chunk that will be given, in bytes.
            byte_planes: whether codings of several planes will be given; without, there is no
                scratch for them.

        Raises:
            ValueError: `level` is out of range.
        """
        self._compressor = Compressor(level, max_chunk_bytes)
        self._entropy_only = level == ENTROPY_ONLY
        self._max_chunk_bytes = max_chunk_bytes
        self._scratch = np.empty(_scratch_bytes(max_chunk_bytes, byte_planes), np.uint8)
        self._sample = np.empty((2, _SAMPLE_BYTES), np.uint8)

    def encode(self, raw: ByteArray, coding: str, frame: ByteArray) -> tuple[str, tuple[int, ...]]:
        """Writes the frame of a chunk to the start of `frame`.

        The same chunk, coding and level give the same bytes, whatever was encoded before.

        Args:
            raw: the chunk, contiguous.
            coding: a coding id, see `coding_for`.
            frame: at least as long as `raw`, contiguous, not overlapping it; what lies behind
                the frame is undefined. Aligned to 2 bytes, like `raw`, for full speed.

        Returns:
            The coding id to store: `coding`, with the base that suits its exponents if it has
            one, or "raw" when nothing shrank (then the frame is the chunk). And the stored length
            of each part in bytes; the frame ends where the last one does.

        Raises:
            ValueError: unknown coding, `raw` is not a whole number of elements or longer than
                `max_chunk_bytes`, or `frame` or the scratch is too short for it.
        """
        lengths = plane_lengths(coding, raw.size)
        if raw.size > min(self._max_chunk_bytes, frame.size):
            raise ValueError(f"no room for a chunk of {raw.size} bytes")
        if len(lengths) > 1:
            coding, parts = self._encode_planes(raw, coding, frame, lengths)
        else:
            length = self._compress(raw, frame[: raw.size], True) if coding == "zstd" else 0
            parts = (length or raw.size,)
        if sum(parts) < raw.size:
            return coding, parts
        np.copyto(frame[: raw.size], raw)
        return "raw", (raw.size,)

    def _encode_planes(
        self, raw: ByteArray, coding: str, frame: ByteArray, lengths: tuple[int, ...]
    ) -> tuple[str, tuple[int, ...]]:
        if max(lengths) > self._scratch.size:
            raise ValueError(f"encoder was made without byte planes, and cannot do {coding!r}")
        coding = split(coding, raw, frame[: raw.size], self._scratch)
        parts: list[int] = []
        shrunk = False
        for index, plane in enumerate(views(frame, lengths)):
            # Exponents all but always shrink; a sample is two more waits for the GIL.
            sampled = not (coding.startswith("exp") and index >= len(lengths) - 2)
            length = self._compress(plane, self._scratch[: plane.size], sampled)
            stored = self._scratch[:length] if length else plane
            shrunk = shrunk or length > 0
            if shrunk:
                # Parts move only towards the start, over planes that are already stored.
                _move(stored, frame[sum(parts) :])
            parts.append(stored.size)
        return coding, tuple(parts)

    def _compress(self, plane: ByteArray, out: ByteArray, sampled: bool) -> int:
        """Returns the length of the plane's zstd frame in `out`, or 0 to store it raw."""
        if sampled and plane.size > 2 * _SAMPLE_BYTES and not self._is_worth_it(plane):
            return 0
        return self._compressor.compress_into(plane, out) if plane.size else 0

    def _is_worth_it(self, plane: ByteArray) -> bool:
        """Returns whether a sample of the plane says that it shrinks by some 3 %."""
        piece_bytes = _SAMPLE_BYTES // _SAMPLE_PIECES
        if self._entropy_only:  # counting says it sooner, and without a wait for the GIL
            equal = collisions(plane, _SAMPLE_PIECES, piece_bytes)
            return equal > _LIKELY_EQUAL * _SAMPLE_BYTES**2
        sample, out = self._sample
        pieces = spread(plane, _SAMPLE_PIECES, piece_bytes)
        np.copyto(sample.reshape(_SAMPLE_PIECES, piece_bytes), pieces)
        return self._compressor.compress_into(sample, out[:_SAMPLE_LIMIT_BYTES]) > 0


def _move(stored: ByteArray, to: ByteArray) -> None:
    """Copies to the start of `to`, which may overlap; so may both of these ways."""
    if stored.size <= _HELD_BYTES:
        to.data[: stored.size] = stored.data
    else:
        np.copyto(to[: stored.size], stored)


def encoder_bytes(level: int, max_chunk_bytes: int, byte_planes: bool = True) -> int:
    """Returns all that an `Encoder` made with these holds at its peak, in bytes."""
    scratch = _scratch_bytes(max_chunk_bytes, byte_planes)
    compressor = compressor_bytes(level, max_chunk_bytes)
    return compressor + scratch + 2 * _SAMPLE_BYTES + SPLIT_TRANSIENT_BYTES


def _scratch_bytes(max_chunk_bytes: int, byte_planes: bool) -> int:
    # No plane of several is longer than half its chunk.
    return max_chunk_bytes // 2 if byte_planes else 0


class Decoder:
    """Decodes frames, with a zstd context and scratch that live as long as it. One per thread."""

    __slots__ = ("_decompressor", "_join_scratch", "_planes")

    def __init__(self, max_chunk_bytes: int) -> None:
        """Allocates everything that decoding will need.

        Args:
            max_chunk_bytes: the longest chunk that will be asked for, in bytes.
        """
        self._decompressor = Decompressor()
        self._planes = np.empty(max_chunk_bytes, np.uint8)
        self._join_scratch = np.empty(JOIN_SCRATCH_BYTES, np.uint8)

    def decode(self, frame: ByteArray, coding: str, parts: Sequence[int], out: ByteArray) -> None:
        """Writes the chunk that `frame` was made of into `out`.

        Args:
            frame: the frame and nothing behind it, contiguous.
            coding: its coding id.
            parts: the stored length of each part in bytes.
            out: as long as the chunk, contiguous, any alignment; undefined after an error.

        Raises:
            ValueError: the frame does not decode to exactly `out.size` bytes of this coding.
        """
        lengths = plane_lengths(coding, out.size)
        if out.size > self._planes.size:
            raise ValueError(f"a chunk of {out.size} bytes is longer than any should be")
        _check_parts(coding, parts, lengths, frame.size)
        stored = views(frame, parts)
        if len(stored) == 1:
            self._restore(stored[0], out)
            return
        planes = []
        for part, plane in zip(stored, views(self._planes, lengths), strict=True):
            if part.size == plane.size:
                planes.append(part)
            else:
                self._decompressor.decompress_into(part, plane)
                planes.append(plane)
        join(coding, planes, out, self._join_scratch)

    def _restore(self, part: ByteArray, plane: ByteArray) -> None:
        if part.size == plane.size:
            np.copyto(plane, part)
        else:
            self._decompressor.decompress_into(part, plane)


def _check_parts(
    coding: str, parts: Sequence[int], lengths: tuple[int, ...], frame_length: int
) -> None:
    """Raises ValueError unless the parts can be those of such a frame."""
    if len(parts) != len(lengths):
        raise ValueError(f"{coding!r} has {len(lengths)} parts, not {len(parts)}")
    if not all(0 <= part <= length for part, length in zip(parts, lengths, strict=True)):
        raise ValueError(f"parts {tuple(parts)} do not fit planes of {lengths} bytes")
    if coding == "raw" and tuple(parts) != lengths:
        raise ValueError("coding 'raw' is never compressed")
    if sum(parts) != frame_length:
        raise ValueError(f"parts add up to {sum(parts)} bytes, the frame has {frame_length}")
