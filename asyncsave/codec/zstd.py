"""The zstd side of the codec: one plane to one zstd frame and back.

The only importer of zstandard. Both directions go from one given buffer to another: nothing the
size of a plane is allocated, and bytes from outside cannot make zstd allocate.
"""

from typing import Final

import zstandard

from .planes import ByteArray

ENTROPY_ONLY: Final = 1
"""The level that skips match finding, and leaves only Huffman coding."""

MAX_LEVEL: Final = 22

# RFC 8878: every zstd frame starts so, and no block of one holds more than 128 KiB.
_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_BLOCK_BYTES: Final = 128 << 10
_BLOCK_RLE: Final = 1
_BLOCK_RESERVED: Final = 3

# A chunk is 16 MiB at most, so a larger window only asks for memory.
_MAX_WINDOW_BYTES: Final = 16 << 20


class Compressor:
    """A zstd context, used for plane after plane. Belongs to one thread: sharing it corrupts."""

    __slots__ = ("_compressor",)

    def __init__(self, level: int, max_bytes: int) -> None:
        """Prepares a context.

        Args:
            level: 1 for entropy only, 2 to 22 for zstd's own levels.
            max_bytes: the longest source that will be given, in bytes.

        Raises:
            ValueError: `level` is out of range.
        """
        if not ENTROPY_ONLY <= level <= MAX_LEVEL:
            raise ValueError(f"zstd level {level} is not between {ENTROPY_ONLY} and {MAX_LEVEL}")
        parameters = _parameters(level, max_bytes)
        self._compressor = zstandard.ZstdCompressor(compression_params=parameters)

    def compress_into(self, source: ByteArray, out: ByteArray) -> int:
        """Compresses `source` to one zstd frame at the start of `out`. Releases the GIL.

        Args:
            source: at least one byte, contiguous.
            out: not overlapping `source`; what lies behind the frame is undefined.

        Returns:
            The frame's length in bytes, or 0 when it is not shorter than `out`: then the content
            of `out` is undefined.
        """
        # Not compress(): as fast, but it allocates compressBound(source) anew for each plane.
        # The size makes zstd write the content size, and lets it shrink its tables for a sample.
        with self._compressor.stream_reader(source.data, size=source.size) as reader:
            length = int(reader.readinto(out.data))
        return length if length < out.size else 0


def compressor_bytes(level: int, max_bytes: int) -> int:
    """Return what zstd holds at its peak, in bytes, of a `Compressor` made with these."""
    parameters = _parameters(level, max_bytes)
    # The estimate is for one-shot use; streaming adds a buffer of window and block on the way in,
    # and of compressBound(block) on the way out.
    return (
        parameters.estimated_compression_context_size()
        + (1 << parameters.window_log)
        + 2 * _BLOCK_BYTES
        + (_BLOCK_BYTES >> 8)
    )


class Decompressor:
    """A zstd context for decoding, reused from frame to frame. Belongs to one thread."""

    __slots__ = ("_decompressor",)

    def __init__(self) -> None:
        """Prepares a context."""
        self._decompressor = zstandard.ZstdDecompressor()

    def decompress_into(self, frame: ByteArray, out: ByteArray) -> None:
        """Decodes one zstd frame so that it fills `out` exactly. Releases the GIL.

        Memory does not depend on the bytes: the frame is measured and found whole before it is
        decoded, so zstd decodes straight into `out` and needs no window of its own.

        Args:
            frame: one whole frame and nothing behind it, contiguous.
            out: as long as the decoded plane; undefined after an error.

        Raises:
            ValueError: `frame` is not exactly one valid frame of exactly this content size.
        """
        try:
            _check_frame(frame, out.size)
            # decompress() and a copy: 1.6 GB/s; this: 1.8.
            with self._decompressor.stream_reader(frame.data) as reader:
                length = reader.readinto(out.data)
        except zstandard.ZstdError as error:
            raise ValueError(f"bad zstd frame: {error}") from error
        if length != out.size:
            raise ValueError(f"zstd frame decodes to {length} bytes, not {out.size}")


def _parameters(level: int, max_bytes: int) -> zstandard.ZstdCompressionParameters:
    if level != ENTROPY_ONLY:
        return zstandard.ZstdCompressionParameters.from_level(
            level,
            source_size=max_bytes,
            write_content_size=True,
            write_checksum=False,
            write_dict_id=False,
        )
    # Exponents repeat in frequency, not in sequence: tables too small to find a match in make
    # FAST smaller and three times faster than zstd's own level 1. Its negative levels skip
    # matches too, but switch Huffman coding off.
    return zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST,
        window_log=17,
        hash_log=6,
        chain_log=6,
        search_log=1,
        min_match=7,
        target_length=0,
        write_content_size=True,
        write_checksum=False,
        write_dict_id=False,
    )


def _check_frame(frame: ByteArray, content_bytes: int) -> None:
    """Raises ValueError unless `frame` is, by its headers, one whole frame of that content."""
    # A skippable frame has another magic, and would be skipped in silence.
    if frame[:4].tobytes() != _MAGIC:
        raise ValueError("not a zstd frame")
    header = zstandard.get_frame_parameters(frame.data)
    if header.content_size != content_bytes:
        raise ValueError("zstd frame promises another length than its plane has")
    if header.window_size > max(content_bytes, _MAX_WINDOW_BYTES):
        raise ValueError(f"zstd frame wants a window of {header.window_size} bytes")
    # zstandard cannot tell where a frame ended, and silently ignores what follows.
    position = zstandard.frame_header_size(frame.data)
    last = False
    while not last:
        block = int.from_bytes(frame[position : position + 3].tobytes(), "little")
        last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
        if position + 3 > frame.size or kind == _BLOCK_RESERVED or length > _BLOCK_BYTES:
            raise ValueError("zstd frame is cut short or broken")
        if not length and not last:  # a hole in a file is millions of these
            raise ValueError("zstd frame has an empty block before its end")
        position += 3 + (1 if kind == _BLOCK_RLE else length)
    if position + 4 * header.has_checksum != frame.size:
        raise ValueError("zstd frame is cut short, or more follows it")
