"""Ways of coding a chunk: the product's, and those it is compared with.

A new one is a function that returns a `Coding`, and a line in `codings`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zstandard

from asyncsave.codec.frame import Decoder, Encoder, coding_for
from asyncsave.pipeline.budget import CHUNK_BYTES

FAST_LEVEL = 9

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


Encode = Callable[[Any], Any]
Decode = Callable[[Any, Bytes], Any]


@dataclass(slots=True)
class Coding:
    """A way to code chunks of one dtype.

    Attributes:
        name: its row.
        make: for a dtype and a number of threads, returns (encode, decode): from what `prepare`
            gave to something, and from that to bytes, in the array that is given or in its own.
        length: how long that something would be on disk.
        prepare: what is done to a chunk before, not measured.
        threads: it has threads of its own, instead of being called by many.
        sampled: too slow for whole chunks.
    """

    name: str
    make: Callable[[torch.dtype, int], tuple[Encode, Decode]]
    length: Callable[[Any], int] = len
    prepare: Callable[[Bytes], Any] = lambda raw: raw
    threads: bool = False
    sampled: bool = False


def asyncsave_coding(level: int, byte_planes: bool = True) -> Coding:
    """Return what the product does, with buffers as it has them: one coder for each thread."""

    def make(dtype: torch.dtype, _: int) -> tuple[Encode, Decode]:
        coding = coding_for(str(dtype).removeprefix("torch."), byte_planes)
        encoder, decoder = Encoder(level, CHUNK_BYTES, byte_planes), Decoder(CHUNK_BYTES)
        frame = np.empty(CHUNK_BYTES, np.uint8)

        def encode(raw: Bytes) -> Any:
            stored, parts = encoder.encode(raw, coding, frame)
            return stored, parts, frame[: sum(parts)]

        def decode(coded: Any, out: Bytes) -> Bytes:
            stored, parts, data = coded
            if stored == "raw":
                np.copyto(out, data)
            else:
                decoder.decode(data, stored, parts, out)
            return out

        return encode, decode

    name = f"asyncsave, level {level}" + ("" if byte_planes else ", no byte planes")
    return Coding(name, make, lambda coded: sum(coded[1]), sampled=level > FAST_LEVEL)


def zstd_coding(level: int) -> Coding:
    """Return zstd on the bytes as they are, as torch's own checkpoint extension does."""

    def make(_: torch.dtype, __: int) -> tuple[Encode, Decode]:
        compressor = zstandard.ZstdCompressor(level)
        decompressor = zstandard.ZstdDecompressor()
        return (
            lambda raw: compressor.compress(raw.data),
            lambda coded, _: decompressor.decompress(coded),
        )

    return Coding(f"zstd {level} on raw bytes", make)


def zipnn_coding() -> Coding:
    """Return ZipNN for the dtype."""
    with warnings.catch_warnings(action="ignore"):  # of what it uses of torch
        from zipnn import ZipNN

    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

    def make(dtype: torch.dtype, threads: int) -> tuple[Encode, Decode]:
        coder = ZipNN(input_format="byte", bytearray_dtype=names[dtype], threads=threads)
        return coder.compress, lambda coded, _: coder.decompress(coded)

    # 0.5.4 overwrites what it is given
    return Coding("ZipNN", make, prepare=lambda raw: bytearray(raw.data), threads=True)


def blosc2_coding() -> Coding:
    """Return Blosc2 with its byte shuffle and zstd 1."""
    import blosc2

    def make(dtype: torch.dtype, threads: int) -> tuple[Encode, Decode]:
        cparams = {
            "codec": blosc2.Codec.ZSTD,
            "clevel": 1,
            "typesize": dtype.itemsize,
            "filters": [blosc2.Filter.SHUFFLE],
            "filters_meta": [0],
            "nthreads": threads,
        }

        def decode(coded: bytes, out: Bytes) -> Bytes:
            blosc2.decompress2(coded, dst=out, nthreads=threads)
            return out

        return lambda raw: blosc2.compress2(raw, **cparams), decode

    return Coding("Blosc2, shuffle + zstd 1", make, threads=True)


def openzl_coding() -> Coding:
    """Return OpenZL with its own nodes for floats: exponents entropy-coded, the rest as it is."""
    import openzl.ext as zl

    nodes = {
        torch.float32: zl.nodes.Float32Deconstruct,
        torch.bfloat16: zl.nodes.BFloat16Deconstruct,
        torch.float16: zl.nodes.Float16Deconstruct,
    }

    def make(dtype: torch.dtype, _: int) -> tuple[Encode, Decode]:
        compressor, coder, decoder = zl.Compressor(), zl.CCtx(), zl.DCtx()
        # a half's sign and fraction are 11 bits in two bytes: stored, they would eat what is saved
        rest = zl.graphs.Entropy() if dtype == torch.float16 else zl.graphs.Store()
        entropy = zl.graphs.Entropy()(compressor)
        graph = nodes[dtype]()(compressor, sign_frac=rest(compressor), exponent=entropy)
        compressor.set_parameter(zl.CParam.FormatVersion, zl.MAX_FORMAT_VERSION)
        compressor.select_starting_graph(graph)
        elements = np.dtype(f"<u{dtype.itemsize}")

        def encode(raw: Bytes) -> Any:
            coder.ref_compressor(compressor)
            return coder.compress([zl.Input(zl.Type.Numeric, raw.view(elements))])

        def decode(coded: bytes, _: Bytes) -> Any:
            (output,) = decoder.decompress(coded)
            return output.content.as_nparray()

        return encode, decode

    return Coding("OpenZL, float deconstruct", make)


def codings(levels: Sequence[int]) -> tuple[list[Coding], dict[str, str]]:
    """Return all that can be measured here, and why the others cannot."""
    found = [asyncsave_coding(level) for level in levels]
    found += [asyncsave_coding(1, byte_planes=False), zstd_coding(1), zstd_coding(3)]
    missing = {}
    for name, make in (
        ("ZipNN", zipnn_coding),
        ("Blosc2, shuffle + zstd 1", blosc2_coding),
        ("OpenZL, float deconstruct", openzl_coding),
    ):
        try:
            found.append(make())
        except ImportError as cause:
            missing[name] = f"cannot be imported: {cause}"
    return found, missing
