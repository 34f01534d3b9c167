"""Byte planes: the bytes of one chunk, regrouped so that what compresses lies side by side.

Owns the coding ids and what each of them means; knows nothing of compression. An id goes on disk
and never changes meaning. Elements are little endian. Planes lie end to end, the least
compressible first, so that a plane stored as it is can stay where the split put it.

======= ======= ==========================================================================
id      element planes
======= ======= ==========================================================================
raw     1 byte  the bytes; never compressed
zstd    1 byte  the bytes
exp16.B 2 bytes sign and mantissa, exponents, exponent rests: see below (B = 0 .. 15)
exp32.B 4 bytes the low half as it is (2 bytes an element), then the high half as in exp16.B
bytesN  N bytes plane i is byte i of every element, least significant first (N = 2, 4, 8)
======= ======= ==========================================================================

exp16 is made for bfloat16 and exp32 for IEEE float32, whose high half is a bfloat16. Each half is
rotated left by one bit. Its low byte is then mantissa * 2 + sign: the first plane. Its high byte
is the exponent; to it B is added, modulo 256, which gives s[0] .. s[n-1]. With h = n // 2:

- plane 2 has n - h bytes; byte i < h is (s[n-h+i] mod 16) * 16 + s[i] mod 16; for an odd n the
  last byte is s[h], whole;
- plane 3 has h bytes; byte i is (s[n-h+i] div 16) * 16 + s[i] div 16.

Exponents of one tensor are few, so with the right B nearly all of them lie between two multiples
of 16: plane 3 is nearly constant, and a byte of plane 2 is two whole exponents. For entropy-only
zstd that is half the literals and far fewer accidental matches: the 4 Mi exponents of an fp32
chunk take 2.5 to 3.8 ms and not 7 to 17, and no more bytes. Every coding is a bijection, so no bit
pattern is special.

Speeds in comments are GB/s of chunk, one thread of a shared EPYC server, chunks of 16 MiB. While
training runs Python, each NumPy call may wait a whole switch interval (5 ms) to get the GIL back,
so splitting, which happens beside training, is few calls over whole planes. Joining is not, and
works in blocks. Products stand for left shifts, which NumPy has no SIMD loop for: of bytes they
take twelve times as long, of 2-byte elements twice. Where kernel.c was compiled, that does the same
in one call.
"""

from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..format.codings import LAYOUTS, plane_lengths

ByteArray: TypeAlias = NDArray[np.uint8]
HalfArray: TypeAlias = NDArray[np.uint16]


# Row b: the exponents e, ordered by (e + b) mod 256.
_ROTATIONS: Final = (np.arange(256) - np.arange(16)[:, None]) % 256

SPLIT_TRANSIENT_BYTES: Final = 256 << 10
"""Upper bound of what `split` allocates for the time of a call (the counts of a sample)."""

# 16 MiB of fp32 decode in 9.4, 9.3, 9.8, 10.8 and 11.7 ms with 1 << 18 to 1 << 22; in two threads,
# which wait for each other's GIL after every call, in 10.8, 10.0, 9.8, 9.0, 11.8 (bench/knobs.py
# join).
_JOIN_ELEMENTS: Final = 1 << 20

JOIN_SCRATCH_BYTES: Final = 6 * _JOIN_ELEMENTS
"""Scratch that `join` needs, in bytes, for chunks of any length."""


def split(coding: str, raw: ByteArray, out: ByteArray, scratch: ByteArray) -> str:
    """Writes all planes of `raw`, end to end, into `out`.

    Args:
        coding: a coding id; for exp16 and exp32 the base in it is only a place holder.
        raw: the chunk.
        out: as long as `raw`, and not overlapping it.
        scratch: at least half as long as `raw`, aligned to 2 bytes.

    Returns:
        The coding id, with the base that suits these exponents.

    Raises:
        ValueError: see `plane_lengths`.
    """
    planes = views(out, plane_lengths(coding, raw.size))
    kind = coding.partition(".")[0]
    if kind == "exp16":
        base = _split_halves(raw.view("<u2"), out, scratch)
    elif kind == "exp32":
        low = planes[0]
        # A narrowing cast is 18, a strided copy 13, `>> 16` with a cast 9.
        np.copyto(low.view("<u2"), raw.view("<u4"), casting="unsafe")
        # One strided copy (13) makes all that follows contiguous, and SIMD: 4.6 ms up to here and
        # through the shifts, 5.1 when every step reads the 4-byte elements.
        high: HalfArray = scratch[: low.size].view("<u2")
        np.copyto(high, raw.view("<u2")[1::2])
        base = _split_halves(high, out[low.size :], scratch)
    elif kind == "bytes2":
        # 5 to 7; two strided byte copies are 3.5.
        np.copyto(planes[0], raw.view("<u2"), casting="unsafe")
        np.right_shift(raw.view("<u2"), 8, out=planes[1], casting="unsafe")
        return coding
    else:
        # One transposing copy: 3.1 for 4 planes and 2.4 for 8, as fast as one copy for each.
        width = len(planes)
        count = raw.size // width
        np.copyto(out.reshape(width, count), raw.reshape(count, width).T)
        return coding
    return f"{kind}.{base}"


def join(coding: str, planes: Sequence[ByteArray], out: ByteArray, scratch: ByteArray) -> None:
    """Writes the chunk that `split` made `planes` of into `out`: its exact inverse.

    Args:
        coding: the coding id that `split` returned.
        planes: in stored order, of the lengths `plane_lengths` gives; not overlapping `out`.
        out: as long as the chunk; any alignment (an odd address halves the speed).
        scratch: `JOIN_SCRATCH_BYTES`, aligned to 2 bytes.
    """
    base = LAYOUTS[coding].base
    if base is not None:
        _join_floats(planes, base, out.view("<u2"), scratch)
    elif coding == "bytes2":
        elements: HalfArray = out.view("<u2")
        temporary: HalfArray = scratch.view("<u2")
        for start in range(0, elements.size, _JOIN_ELEMENTS):
            block = slice(start, start + _JOIN_ELEMENTS)
            _interleave(planes[0][block], planes[1][block], elements[block], temporary)
    else:
        width = len(planes)
        for index, plane in enumerate(planes):
            np.copyto(out[index::width], plane)


def views(buffer: ByteArray, lengths: Sequence[int]) -> list[ByteArray]:
    """Returns views of `buffer`, end to end from its start, of the given lengths in bytes."""
    result = []
    start = 0
    for length in lengths:
        result.append(buffer[start : start + length])
        start += length
    return result


def spread(buffer: ByteArray, pieces: int, piece_bytes: int) -> ByteArray:
    """Returns a view of pieces spread evenly over `buffer`, of shape (pieces, piece_bytes).

    Of a shorter buffer it is (1, all).
    """
    if buffer.size < pieces * piece_bytes:
        return buffer.reshape(1, buffer.size)
    stride = buffer.size // pieces
    return buffer[: stride * pieces].reshape(pieces, stride)[:, :piece_bytes]


def collisions(plane: ByteArray, pieces: int, piece_bytes: int) -> int:
    """Returns the sum of the squares of how often each byte value occurs in spread pieces."""
    counts = np.bincount(spread(plane, pieces, piece_bytes).ravel(), minlength=256)
    return int(np.square(counts).sum())


def _split_halves(halves: HalfArray, out: ByteArray, scratch: ByteArray) -> int:
    """Splits 2-byte elements at the exponent; returns the base. `scratch` may hold the elements."""
    sign_mantissa, exponents = out[: halves.size], out[halves.size :]
    # Comparing, adding and or-ing contiguous arrays are NumPy's SIMD loops. The exponents' place
    # holds mantissa * 2 (the high byte falls off in the cast) until the exponents are due.
    np.less(halves.view("<i2"), 0, out=sign_mantissa.view(np.bool_))
    np.add(halves, halves, out=exponents, casting="unsafe")
    np.bitwise_or(sign_mantissa, exponents, out=sign_mantissa)
    np.right_shift(halves, 7, out=exponents, casting="unsafe")
    base = _base(exponents)
    np.add(exponents, base, out=exponents)
    half = exponents.size // 2
    first, second, temporary = exponents[:half], exponents[exponents.size - half :], scratch[:half]
    # Swaps first's high nibbles with second's low ones, in place.
    np.right_shift(first, 4, out=temporary)
    np.bitwise_xor(temporary, second, out=temporary)
    np.bitwise_and(temporary, 15, out=temporary)
    np.bitwise_xor(second, temporary, out=second)
    np.multiply(temporary, 16, out=temporary)
    np.bitwise_xor(first, temporary, out=first)
    return base


def _base(exponents: ByteArray) -> int:
    """Returns what to add so that sampled exponents share as few high nibbles as can be."""
    counts = np.bincount(spread(exponents, 16, 1024).ravel(), minlength=256)
    shares = counts[_ROTATIONS].reshape(16, 16, 16).sum(axis=2)
    # The likelier two exponents have the same high nibble, the more constant that plane is.
    return int(np.square(shares).sum(axis=1).argmax())


def _join_floats(
    planes: Sequence[ByteArray], base: int, out: HalfArray, scratch: ByteArray
) -> None:
    """Writes elements of one half (exp16) or two (exp32, `planes` starts with the low ones)."""
    *low, sign_mantissa, exponents, rests = planes
    halves: HalfArray = scratch[2 * _JOIN_ELEMENTS :].view("<u2")
    high, temporary = halves[:_JOIN_ELEMENTS], halves[_JOIN_ELEMENTS:]
    for start, block in _exponent_blocks(exponents, rests, base, scratch[: 2 * _JOIN_ELEMENTS]):
        stop = start + block.size
        target = high[: block.size] if low else out[start:stop]
        _interleave(sign_mantissa[start:stop], block, target, temporary)
        _rotate_right(target, temporary)
        if low:
            # A widening cast and a strided copy: 1.7 ms a chunk; two strided copies are 2.4.
            np.copyto(out.view("<u4")[start:stop], low[0].view("<u2")[start:stop])
            np.copyto(out[2 * start + 1 : 2 * stop : 2], target)


def _exponent_blocks(
    exponents: ByteArray, rests: ByteArray, base: int, scratch: ByteArray
) -> Iterator[tuple[int, ByteArray]]:
    """Yields blocks of whole exponents, valid until the next one, and where each starts."""
    half = rests.size
    for start in range(0, half, _JOIN_ELEMENTS // 2):
        stop = min(start + _JOIN_ELEMENTS // 2, half)
        count = stop - start
        mixed, rest = exponents[start:stop], rests[start:stop]
        first, second, temporary, _ = scratch.reshape(4, -1)[:, :count]
        np.right_shift(mixed, 4, out=temporary)
        np.bitwise_xor(temporary, rest, out=temporary)
        np.bitwise_and(temporary, 15, out=temporary)
        np.bitwise_xor(rest, temporary, out=second)
        np.multiply(temporary, 16, out=temporary)
        np.bitwise_xor(mixed, temporary, out=first)
        np.subtract(first, base, out=first)
        np.subtract(second, base, out=second)
        yield start, first
        yield exponents.size + start, second
    if exponents.size > half:
        yield half, np.subtract(exponents[half:], base)


def _interleave(low: ByteArray, high: ByteArray, out: HalfArray, scratch: HalfArray) -> None:
    """Sets each element of `out` to high * 256 + low: 5; two strided byte copies are 3.3."""
    # Widening first and then multiplying in place is faster than one product that widens.
    temporary = scratch[: low.size]
    np.copyto(out, high)
    np.multiply(out, 256, out=out)
    np.copyto(temporary, low)
    np.bitwise_or(out, temporary, out=out)


def _rotate_right(halves: HalfArray, scratch: HalfArray) -> None:
    """Rotates each element right by one bit, in place."""
    temporary = scratch[: halves.size]
    np.multiply(halves, 1 << 15, out=temporary)
    np.right_shift(halves, 1, out=halves)
    np.bitwise_or(halves, temporary, out=halves)
