"""The codec: every coding is a bijection, and bytes from outside can only raise ValueError."""

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncsave.codec.frame import Decoder, Encoder, coding_for, encoder_bytes
from asyncsave.codec.planes import JOIN_SCRATCH_BYTES, ByteArray, join, split, views
from asyncsave.codec.zstd import Decompressor, compressor_bytes
from asyncsave.format.codings import LAYOUTS, plane_lengths

MAX_BYTES = 1 << 20
LEVELS = (1, 2, 6, 19)
# What coding_for can return, and "raw".
GIVEN = ("raw", "zstd", "exp16.0", "exp32.0", "bytes2", "bytes4", "bytes8")
WIDTH = {"raw": 1, "zstd": 1, "exp16": 2, "exp32": 4, "bytes2": 2, "bytes4": 4, "bytes8": 8}

ENCODERS = {level: Encoder(level, MAX_BYTES) for level in LEVELS}
DECODER = Decoder(MAX_BYTES)


def width(coding: str) -> int:
    return WIDTH[coding.partition(".")[0]]


def array(data: bytes) -> ByteArray:
    return np.frombuffer(data, np.uint8)


def encode(encoder: Encoder, raw: ByteArray, coding: str) -> tuple[str, tuple[int, ...], bytes]:
    frame = np.full(raw.size, 0xA5, np.uint8)
    stored_coding, parts = encoder.encode(raw, coding, frame)
    return stored_coding, parts, frame[: sum(parts)].tobytes()


def decode(frame: bytes, coding: str, parts: tuple[int, ...], raw_length: int) -> bytes:
    out = np.full(raw_length, 0x5A, np.uint8)
    DECODER.decode(array(frame), coding, parts, out)
    return out.tobytes()


def weights(count: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(0, 0.02, count).astype(np.float32)


def bf16(values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> ByteArray:
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def compressible_bytes() -> st.SearchStrategy[bytes]:
    """Arbitrary bytes, short ones repeated so that zstd finds something."""
    return st.builds(
        lambda data, times: data * times, st.binary(max_size=300), st.sampled_from((1, 1, 40))
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("coding", GIVEN)
@given(data=compressible_bytes(), offset=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_round_trip(coding: str, level: int, data: bytes, offset: int) -> None:
    raw = array(data[: len(data) // width(coding) * width(coding)])
    stored_coding, parts, frame = encode(ENCODERS[level], raw, coding)
    assert len(frame) <= raw.size
    out = np.zeros(raw.size + offset, np.uint8)[offset:]
    DECODER.decode(array(frame), stored_coding, parts, out)
    assert out.tobytes() == raw.tobytes()


@pytest.mark.parametrize("coding", sorted(LAYOUTS))
@pytest.mark.parametrize("count", (0, 1, 2, 3, 262_143, 262_147))
def test_split_and_join_are_inverse(coding: str, count: int) -> None:
    raw = np.random.default_rng(count).integers(0, 256, count * width(coding), np.uint8)
    out, scratch = np.empty(raw.size, np.uint8), np.empty(raw.size // 2 + 2, np.uint8)
    stored_coding = split(coding, raw, out, scratch)
    planes = views(out, plane_lengths(stored_coding, raw.size))
    back = np.empty(raw.size + 1, np.uint8)[1:]
    join(stored_coding, planes, back, np.empty(JOIN_SCRATCH_BYTES, np.uint8))
    np.testing.assert_array_equal(back, raw)


@pytest.mark.parametrize("count", (1, 2, 5, 1000))
@pytest.mark.parametrize("kind", ("exp16", "exp32"))
def test_float_planes_are_as_documented(kind: str, count: int) -> None:
    raw = np.random.default_rng(1).integers(0, 256, count * WIDTH[kind], np.uint8)
    out = np.empty(raw.size, np.uint8)
    coding = split(f"{kind}.0", raw, out, np.empty(raw.size, np.uint8))
    base, half = int(coding.partition(".")[2]), count // 2
    *low, sign_mantissa, exponents, rests = views(out, plane_lengths(coding, raw.size))
    halves = [int(x) for x in raw.view("<u2")[WIDTH[kind] // 2 - 1 :: WIDTH[kind] // 2]]
    rotated = [(x << 1 | x >> 15) & 0xFFFF for x in halves]
    s = [((x >> 8) + base) % 256 for x in rotated]
    assert sign_mantissa.tolist() == [x & 255 for x in rotated]
    mixed = [s[count - half + i] % 16 * 16 + s[i] % 16 for i in range(half)]
    assert exponents.tolist() == mixed + ([s[half]] if count % 2 else [])
    assert rests.tolist() == [s[count - half + i] // 16 * 16 + s[i] // 16 for i in range(half)]
    if low:
        assert low[0].tobytes() == raw.view("<u2")[0::2].tobytes()


def test_special_floats_keep_every_bit() -> None:
    patterns = np.array(
        [0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFA5A5A5, 1, 0x80000001],
        np.uint32,
    )
    raw = np.tile(patterns, 4096).view(np.uint8)
    for coding in ("exp32.0", "exp16.0", "bytes4"):
        stored_coding, parts, frame = encode(ENCODERS[1], raw, coding)
        assert sum(parts) < raw.size
        assert decode(frame, stored_coding, parts, raw.size) == raw.tobytes()


def test_float_weights_shrink_by_their_exponents_only() -> None:
    raw = weights(MAX_BYTES // 4).view(np.uint8)
    coding, parts, frame = encode(ENCODERS[1], raw, "exp32.0")
    lengths = plane_lengths(coding, raw.size)
    assert parts[:2] == lengths[:2]
    assert all(part < length for part, length in zip(parts[2:], lengths[2:], strict=True))
    assert raw.size / len(frame) > 1.19
    raw = bf16(weights(MAX_BYTES // 2))
    _, parts, frame = encode(ENCODERS[1], raw, "exp16.0")
    assert parts[0] == raw.size // 2
    assert raw.size / len(frame) > 1.48


@pytest.mark.parametrize("scale", 2.0 ** np.arange(-20, 20, 3))
def test_ratio_does_not_depend_on_the_scale(scale: float) -> None:
    raw = (weights(1 << 16) * np.float32(scale)).view(np.uint8)
    _, _, frame = encode(ENCODERS[1], raw, "exp32.0")
    assert raw.size / len(frame) > 1.185


@pytest.mark.parametrize("coding", GIVEN)
def test_random_bytes_are_stored_as_they_are(coding: str) -> None:
    raw = np.random.default_rng(2).integers(0, 256, MAX_BYTES, np.uint8)
    stored_coding, parts, frame = encode(ENCODERS[1], raw, coding)
    assert (stored_coding, parts, frame) == ("raw", (raw.size,), raw.tobytes())
    assert decode(frame, "raw", parts, raw.size) == raw.tobytes()


def test_low_plane_that_shrinks_moves_the_raw_one_behind_it() -> None:
    raw = weights(MAX_BYTES // 4).view(np.uint32)
    low_zero = (raw & np.uint32(0xFFFF0000)).view(np.uint8)
    coding, parts, frame = encode(ENCODERS[1], low_zero, "exp32.0")
    assert parts[0] < 1000
    assert parts[1] == raw.size
    assert decode(frame, coding, parts, low_zero.size) == low_zero.tobytes()
    # One that shrinks by less than the next plane's length: source and destination overlap.
    slightly = raw & ~np.uint32(0x3000)
    coding, parts, frame = encode(ENCODERS[1], slightly.view(np.uint8), "exp32.0")
    assert raw.size < parts[0] < 2 * raw.size
    assert parts[1] == raw.size
    assert decode(frame, coding, parts, low_zero.size) == slightly.tobytes()


def test_sample_sees_rows_that_were_never_trained() -> None:
    raw = np.random.default_rng(3).integers(0, 256, MAX_BYTES, np.uint8)
    raw[MAX_BYTES // 2 : MAX_BYTES * 3 // 4] = 0
    _, parts, _ = encode(ENCODERS[1], raw, "zstd")
    assert parts[0] < raw.size * 0.8


@pytest.mark.parametrize("level", LEVELS)
def test_a_used_encoder_gives_the_bytes_of_a_fresh_one(level: int) -> None:
    random = np.random.default_rng(4)
    chunks = [
        (weights(1 << 16).view(np.uint8), "exp32.0"),
        (random.integers(0, 256, 100_000, np.uint8), "zstd"),
        (np.zeros(0, np.uint8), "exp16.0"),
        (np.arange(30_000, dtype=np.int64).view(np.uint8), "bytes8"),
        (bf16(weights(77_777)), "exp16.0"),
        (weights(1 << 16, seed=1).view(np.uint8), "exp32.0"),
    ]
    used = ENCODERS[level]
    for raw, coding in chunks:
        assert encode(used, raw, coding) == encode(Encoder(level, MAX_BYTES), raw, coding)


@pytest.mark.parametrize("level", LEVELS)
def test_parts_are_plain_zstd(level: int) -> None:
    raw = np.arange(50_000, dtype=np.int32).view(np.uint8)
    coding, parts, frame = encode(ENCODERS[level], raw, "bytes4")
    planes = raw.reshape(-1, 4).T
    for part, stored, plane in zip(parts, views(array(frame), parts), planes, strict=True):
        if part < plane.size:
            assert zstandard.ZstdDecompressor().decompress(stored.tobytes()) == plane.tobytes()
            parameters = zstandard.get_frame_parameters(stored.tobytes())
            assert parameters.content_size == plane.size
            assert not parameters.has_checksum
    assert coding == "bytes4"
    assert parts[2] < 1000


# Frames that lie.

PLANE = (bf16(weights(100_000))[1::2] << 1).astype(np.uint8)


def zstd_frame(plane: bytes = PLANE.tobytes(), **options: object) -> bytes:
    return bytes(zstandard.ZstdCompressor(**options).compress(plane))  # type: ignore[arg-type]


def with_content_size(size: int) -> bytes:
    """Returns a frame of PLANE whose header says another content size."""
    frame = bytearray(zstd_frame())
    assert frame[4] == 0b1010_0000  # single segment, 4 bytes of content size
    frame[5:9] = size.to_bytes(4, "little")
    return bytes(frame)


SKIPPABLE = b"\x50\x2a\x4d\x18" + PLANE.size.to_bytes(4, "little") + PLANE.tobytes()


def huge_window() -> bytes:
    """Returns a frame with the right content size, and a window of 2 GiB."""
    empty_last_block = b"\x01\x00\x00"
    return (
        b"\x28\xb5\x2f\xfd\x80"
        + bytes([21 << 3])
        + PLANE.size.to_bytes(4, "little")
        + (empty_last_block)
    )


LIES = {
    "empty": b"",
    "short": b"\x28\xb5",
    "no zstd": b"x" * 100,
    "promises more": with_content_size(PLANE.size + 1),
    "promises less": with_content_size(PLANE.size - 1),
    "promises nothing": zstd_frame(write_content_size=False),
    "holds less": zstd_frame(PLANE[:-1].tobytes()),
    "holds more": zstd_frame(PLANE.tobytes() + b"x"),
    "trailing byte": zstd_frame() + b"\0",
    "two frames": zstd_frame(PLANE[:50_000].tobytes()) + zstd_frame(PLANE[50_000:].tobytes()),
    "empty frame behind": zstd_frame() + zstd_frame(b""),
    "skippable frame behind": zstd_frame() + SKIPPABLE[:4] + bytes(4),
    "skippable frame": SKIPPABLE,
    "huge window": huge_window(),
    "bad checksum": zstd_frame(write_checksum=True)[:-1] + b"\0",
    "checksum cut off": zstd_frame(write_checksum=True)[:-4],
    "only empty blocks": zstd_frame()[:9] + bytes(3) * 1000 + b"\x01\x00\x00",
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_zstd_frames_raise(lie: str) -> None:
    with pytest.raises(ValueError, match="zstd frame"):
        Decompressor().decompress_into(array(LIES[lie]), np.empty(PLANE.size, np.uint8))


def test_frame_that_lies_about_its_content_raises_where_the_plane_agrees() -> None:
    for size in (PLANE.size - 1, PLANE.size + 1):
        with pytest.raises(ValueError, match="zstd frame"):
            Decompressor().decompress_into(array(with_content_size(size)), np.empty(size, np.uint8))


def test_every_truncation_raises() -> None:
    frame = zstd_frame(PLANE[:2000].tobytes())
    decompressor = Decompressor()
    for length in range(len(frame)):
        with pytest.raises(ValueError, match="zstd frame"):
            decompressor.decompress_into(array(frame[:length]), np.empty(2000, np.uint8))


def test_flipped_bits_raise_or_fill_the_plane_and_the_decoder_lives_on() -> None:
    frame = np.frombuffer(zstd_frame(PLANE[:2000].tobytes(), write_checksum=True), np.uint8)
    decompressor = Decompressor()
    out = np.empty(2000, np.uint8)
    for bit in range(frame.size * 8):
        flipped = frame.copy()
        flipped[bit // 8] ^= np.uint8(1 << bit % 8)
        try:
            decompressor.decompress_into(flipped, out)
        except ValueError:
            continue
        # Bits that zstd does not use, as the one that is reserved for experiments.
        assert out.tobytes() == PLANE[:2000].tobytes()
    decompressor.decompress_into(frame, out)
    assert out.tobytes() == PLANE[:2000].tobytes()


@given(data=st.binary(max_size=200), coding=st.sampled_from(sorted(LAYOUTS)), cut=st.data())
@settings(max_examples=200, deadline=None)
def test_arbitrary_frames_decode_or_raise(data: bytes, coding: str, cut: st.DataObject) -> None:
    count = len(plane_lengths(coding, 0))
    parts = tuple(cut.draw(st.lists(st.integers(-2, 200), min_size=count, max_size=count)))
    raw_length = cut.draw(st.integers(0, 50)) * width(coding)
    try:
        decode(data, coding, parts, raw_length)
    except ValueError:
        return
    assert sum(parts) == len(data) <= raw_length


@pytest.mark.parametrize(
    "parts",
    [(), (8,), (8, 4, 4), (4, 4, 4, 4), (9, 4, 2, 2), (8, 4, 2, 3), (8, 5, 2, 2), (-1, 4, 2, 2)],
)
def test_parts_that_lie_raise(parts: tuple[int, ...]) -> None:
    frame = np.zeros(max(sum(parts), 0), np.uint8)
    with pytest.raises(ValueError, match=r"part|frame"):
        DECODER.decode(frame, "exp32.0", parts, np.empty(16, np.uint8))


def test_parts_that_do_not_add_up_raise() -> None:
    with pytest.raises(ValueError, match="add up"):
        DECODER.decode(np.zeros(17, np.uint8), "exp32.0", (8, 4, 2, 2), np.empty(16, np.uint8))


def test_raw_is_never_compressed() -> None:
    part = zstd_frame()
    with pytest.raises(ValueError, match="never compressed"):
        decode(part, "raw", (len(part),), PLANE.size)


def test_bad_arguments_raise() -> None:
    with pytest.raises(ValueError, match="unknown coding"):
        plane_lengths("exp64.0", 8)
    for coding in ("exp16", "exp32.16", "exp32.01"):
        with pytest.raises(ValueError, match="unknown coding"):
            plane_lengths(coding, 8)
    with pytest.raises(ValueError, match="whole number"):
        plane_lengths("bytes8", 12)
    with pytest.raises(ValueError, match="whole number"):
        plane_lengths("raw", -1)
    for level in (0, 23, -1):
        with pytest.raises(ValueError, match="level"):
            Encoder(level, MAX_BYTES)
    with pytest.raises(ValueError, match="no room"):
        ENCODERS[1].encode(np.zeros(MAX_BYTES + 1, np.uint8), "zstd", np.empty(2 * MAX_BYTES, "u1"))
    with pytest.raises(ValueError, match="no room"):
        ENCODERS[1].encode(np.zeros(10, np.uint8), "zstd", np.empty(9, np.uint8))
    with pytest.raises(ValueError, match="without byte planes"):
        Encoder(1, MAX_BYTES, False).encode(np.zeros(8, np.uint8), "bytes8", np.empty(8, np.uint8))
    with pytest.raises(ValueError, match="longer than any"):
        DECODER.decode(array(b""), "raw", (0,), np.empty(MAX_BYTES + 1, np.uint8))


def test_memory_is_counted() -> None:
    assert encoder_bytes(1, 16 << 20) < 10 << 20
    assert encoder_bytes(1, 16 << 20, byte_planes=False) < 3 << 19
    assert encoder_bytes(19, 16 << 20) > 64 << 20
    assert compressor_bytes(19, 1 << 20) < compressor_bytes(19, 16 << 20)


@pytest.mark.parametrize(
    ("dtype_name", "coding"),
    [
        ("bfloat16", "exp16.0"),
        ("float32", "exp32.0"),
        ("complex64", "exp32.0"),
        ("float16", "bytes2"),
        ("complex32", "bytes2"),
        ("int32", "bytes4"),
        ("float64", "bytes8"),
        ("complex128", "bytes8"),
        ("bool", "zstd"),
        ("float8_e4m3fn", "zstd"),
    ],
)
def test_coding_for(dtype_name: str, coding: str) -> None:
    assert coding_for(dtype_name, True) == coding
    assert coding_for(dtype_name, False) == "zstd"
