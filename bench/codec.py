"""How small does each coding make a training state, and how fast?

The script trains a small GPT-2-shaped Transformer itself, with AdamW, on the sources of Python's
standard library: weights and both moments are those of a real run, and so are the bf16 and fp16
kinds, which are the trained fp32 values rounded.

How it is measured. Each kind is cut into chunks of 16 MiB, as the product cuts it. In every round
each coding encodes and decodes each chunk once, first in one thread, then in as many as there are
cores, each with a coder of its own, as the pipeline has (ZipNN with its own threads); the order of
codings is drawn anew in every round. The clock sees coding alone: coders are made and warmed, and
what a library's interface makes necessary, such as a copy because the argument is overwritten, is
done beside it. Every decoded chunk is compared with the original once. GB/s are of the bytes of the
state. Levels above 9 are slow, and are measured on a MiB in 16 pieces from all over, in one thread.

How to read it. One cell is the median, and under it the smallest and the largest value.

    ratio       length of the state by length of what would be stored
    encode      GB/s, in one thread, and in all
    decode      the same

"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from common import RESULTS, Bar, Spread, provenance, show_bars, start, where, write_json
from rich.console import Console
from rich.table import Table
from training import Training

from asyncsave.codec.frame import Decoder, Encoder, coding_for
from asyncsave.pipeline.budget import CHUNK_BYTES

LAYERS, WIDTH, HEADS = 5, 384, 6  # 9 M parameters: three chunks of 16 MiB for each kind in fp32
STEPS = 400
ROUNDS = 5
LEVELS = range(1, 23)
FAST_LEVEL = 9
SAMPLE_PIECES, PIECE_BYTES = 16, 64 << 10
KINDS = ("weights", "exp_avg", "exp_avg_sq")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


# -- the codings --------------------------------------------------------------------------------


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


def codings(levels: Sequence[int]) -> tuple[list[Coding], dict[str, str]]:
    """Return all that can be measured here, and why the others cannot."""
    found = [asyncsave_coding(level) for level in levels]
    found += [asyncsave_coding(1, byte_planes=False), zstd_coding(1), zstd_coding(3)]
    missing = {}
    for name, make in (("ZipNN", zipnn_coding), ("Blosc2, shuffle + zstd 1", blosc2_coding)):
        try:
            found.append(make())
        except ImportError as cause:
            missing[name] = f"cannot be imported: {cause}"
    return found, missing


# -- the state ----------------------------------------------------------------------------------


def trained(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Train, and return every kind in fp32, its tensors end to end as a checkpoint lays them."""
    training = Training(options.layers, options.width, options.heads, batch=2, context=64)
    for _ in range(options.steps):
        training.step()
    parameters = list(training.model.parameters())
    states = [training.optimizer.state[parameter] for parameter in parameters]
    kinds = {"weights": [parameter.detach() for parameter in parameters]}
    kinds |= {name: [state[name] for state in states] for name in KINDS[1:]}
    return {name: torch.cat([each.flatten() for each in kinds[name]]) for name in KINDS}


def chunks_of(values: torch.Tensor, dtype: torch.dtype) -> list[Bytes]:
    """Return the bytes of a kind in a dtype, in chunks of equal length, 16 MiB at most."""
    whole = values.to(dtype).view(torch.uint8).numpy()
    count = -(-whole.size // CHUNK_BYTES)
    length = whole.size // count // 4096 * 4096
    return [whole[i * length : (i + 1) * length].copy() for i in range(count)]


def sample_of(chunks: list[Bytes]) -> Bytes:
    """Return pieces from all over the chunks, end to end."""
    whole = np.concatenate(chunks)
    stride = max(PIECE_BYTES, whole.size // SAMPLE_PIECES // PIECE_BYTES * PIECE_BYTES)
    return np.concatenate(
        [whole[i * stride :][:PIECE_BYTES] for i in range(SAMPLE_PIECES) if i * stride < whole.size]
    )


# -- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Turn:
    """What coding one chunk took."""

    encode_seconds: float
    decode_seconds: float
    stored_bytes: int


class _Coder:
    """One coder, and memory to decode into."""

    def __init__(self, coding: Coding, dtype: torch.dtype, threads: int, longest: int) -> None:
        self.coding = coding
        self.encode, self.decode = coding.make(dtype, threads)
        self.out = np.empty(longest, np.uint8)

    def run(self, chunk: Bytes, *, check: bool = False) -> _Turn:
        """Encode and decode a chunk; compare, if asked for, what comes back."""
        given, out = self.coding.prepare(chunk), self.out[: chunk.size]
        begun = time.perf_counter()
        coded = self.encode(given)
        encoded = time.perf_counter()
        decoded = self.decode(coded, out)
        done = time.perf_counter()
        if check and not np.array_equal(np.frombuffer(decoded, np.uint8), chunk):
            raise AssertionError(f"{self.coding.name} does not give a chunk back")
        return _Turn(encoded - begun, done - encoded, self.coding.length(coded))


@dataclass(slots=True)
class Row:
    """A coding of one kind in one dtype, and what was measured: GB/s."""

    coding: Coding
    kind: str
    dtype: str
    chunks: list[Bytes]
    ratio: float = 0.0
    encode: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    encode_all: list[float] = field(default_factory=list)
    decode_all: list[float] = field(default_factory=list)

    def measure(self, pool: ThreadPoolExecutor, cores: int) -> None:
        """Encode and decode everything once in one thread, and once in all."""
        raw_bytes = sum(chunk.size for chunk in self.chunks)
        longest = max(chunk.size for chunk in self.chunks)
        one = _Coder(self.coding, DTYPES[self.dtype], 1, longest)
        for chunk in self.chunks if not self.encode else self.chunks[:1]:
            one.run(chunk, check=True)  # its memory is warm from here on
        turns = [one.run(chunk) for chunk in self.chunks]
        self.ratio = raw_bytes / sum(turn.stored_bytes for turn in turns)
        self.encode.append(raw_bytes / sum(turn.encode_seconds for turn in turns) / 1e9)
        self.decode.append(raw_bytes / sum(turn.decode_seconds for turn in turns) / 1e9)
        if self.coding.sampled:
            return
        if self.coding.threads:
            all_ = _Coder(self.coding, DTYPES[self.dtype], cores, longest)
            all_.run(self.chunks[0])
            turns = [all_.run(chunk) for chunk in self.chunks]
            self.encode_all.append(raw_bytes / sum(turn.encode_seconds for turn in turns) / 1e9)
            self.decode_all.append(raw_bytes / sum(turn.decode_seconds for turn in turns) / 1e9)
            return
        # each thread has a coder and a chunk of its own, as long as the others'
        coders = [_Coder(self.coding, DTYPES[self.dtype], 1, longest) for _ in range(cores)]
        mine = [self.chunks[i % len(self.chunks)] for i in range(cores)]
        for coder, chunk in zip(coders, mine, strict=True):
            coder.run(chunk)
        prepared = [self.coding.prepare(chunk) for chunk in mine]
        nbytes = sum(chunk.size for chunk in mine)
        begun = time.perf_counter()
        coded = list(pool.map(lambda i: coders[i].encode(prepared[i]), range(cores)))
        encoded = time.perf_counter()
        outs = [coder.out[: chunk.size] for coder, chunk in zip(coders, mine, strict=True)]
        list(pool.map(lambda i: coders[i].decode(coded[i], outs[i]), range(cores)))
        self.encode_all.append(nbytes / (encoded - begun) / 1e9)
        self.decode_all.append(nbytes / (time.perf_counter() - encoded) / 1e9)

    def summary(self) -> dict[str, Any]:
        """Return the figures."""
        speeds = {
            name: asdict(Spread.of(getattr(self, name))) if getattr(self, name) else None
            for name in ("encode", "decode", "encode_all", "decode_all")
        }
        return {
            "coding": self.coding.name,
            "kind": self.kind,
            "dtype": self.dtype,
            "sampled": self.coding.sampled,
            "ratio": self.ratio,
            **speeds,
        }


def measure(
    kinds: dict[str, torch.Tensor], found: list[Coding], rounds: int, log: Console
) -> list[Row]:
    """Measure all rounds of all rows."""
    rows = []
    for dtype, torch_dtype in DTYPES.items():
        for kind, values in kinds.items():
            chunks = chunks_of(values, torch_dtype)
            sample = [sample_of(chunks)]
            rows += [Row(c, kind, dtype, sample if c.sampled else chunks) for c in found]
    cores = len(os.sched_getaffinity(0))
    order = random.Random(0)
    with ThreadPoolExecutor(cores) as pool:
        for round_ in range(rounds):
            begun = time.perf_counter()
            for row in order.sample(rows, len(rows)):
                row.measure(pool, cores)
            log.print(f"round {round_ + 1}/{rounds}: {time.perf_counter() - begun:.0f} s")
    return rows


# -- results ------------------------------------------------------------------------------------


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """Return what the project promises, and what was measured: of the worst kind each."""
    found = {(row["coding"], row["kind"], row["dtype"]): row for row in rows}

    def of(coding: str, kind: str, dtype: str) -> dict[str, Any]:
        return found[coding, kind, dtype]

    def worst(ours: str, theirs: str, dtype: str, figure: str) -> float:
        pairs = [(of(ours, kind, dtype), of(theirs, kind, dtype)) for kind in KINDS]
        return float(min(a[figure]["median"] / b[figure]["median"] for a, b in pairs))

    ours, result = "asyncsave, level 1", []
    if any(row["coding"] == "ZipNN" for row in rows):
        longest = max(
            of("ZipNN", kind, dtype)["ratio"] / of(ours, kind, dtype)["ratio"]
            for kind in KINDS
            for dtype in DTYPES
        )
        result = [Bar.of("stored bytes / ZipNN's", longest, 1.005)]
        for figure, dtype, least in (
            ("encode", "fp32", 2.0),
            ("encode", "bf16", 0.9),
            ("decode", "fp32", 1.2),
        ):
            times = worst(ours, "ZipNN", dtype, figure)
            result.append(
                Bar.of(f"{figure}, {dtype}, by ZipNN, worst kind", times, least, at_least=True)
            )
    zstd = worst(ours, "zstd 3 on raw bytes", "fp32", "encode")
    return [
        *result,
        Bar.of("encode, fp32, by zstd 3 on raw bytes, worst kind", zstd, 2.0, at_least=True),
    ]


def show(results: dict[str, Any], console: Console) -> None:
    """Print a table for each dtype and kind."""
    for dtype, kind in itertools.product(DTYPES, KINDS):
        table = Table(
            title=f"{kind} of a trained state in {dtype}",
            caption=(
                f"{where(results)}\n{results['parameters'] / 1e6:.1f} M parameters after "
                f"{results['settings']['steps']} steps; GB/s: median, least and most\n"
                "* measured on a MiB from all over"
            ),
        )
        for name in ("", "ratio", "encode, 1 thread", "all", "decode, 1 thread", "all"):
            table.add_column(name, justify="right" if name else "left")
        for row in results["rows"]:
            if (row["dtype"], row["kind"]) == (dtype, kind):
                table.add_row(
                    row["coding"] + ("*" if row["sampled"] else ""),
                    f"{row['ratio']:.3f}",
                    *(
                        "–" if row[figure] is None else Spread(**row[figure]).show()
                        for figure in ("encode", "encode_all", "decode", "decode_all")
                    ),
                )
        for name, why in results["missing"].items():
            table.add_row(name, why)
        console.print(table)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw ratio against encode speed for every coding, one panel for each kind in fp32."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, len(KINDS))
    for kind, panel in zip(KINDS, panels, strict=True):
        rows = [r for r in results["rows"] if (r["kind"], r["dtype"]) == (kind, "fp32")]
        ours = [r for r in rows if r["coding"].removeprefix("asyncsave, level ").isdigit()]
        # of other bytes, so of other ratios: a line of their own
        for sampled, style in ((False, ".-"), (True, ".:")):
            line = [r for r in ours if r["sampled"] is sampled]
            panel.plot(
                [r["encode"]["median"] for r in line],
                [r["ratio"] for r in line],
                style,
                color="tab:blue",
                label="asyncsave, by level" + (", of a sample" if sampled else ""),
            )
        for row in ours:
            level = row["coding"].rpartition(" ")[2]
            if level in ("1", "4", "6", "9", "12", "15", "19", "22"):
                place = (row["encode"]["median"], row["ratio"])
                panel.annotate(level, place, (3, 4), textcoords="offset points", color="tab:blue")
        markers = dict(zip([r["coding"] for r in rows if r not in ours], "sD^vPX", strict=False))
        for row in rows:
            if row not in ours:
                marker, place = markers[row["coding"]], (row["encode"]["median"], row["ratio"])
                panel.plot(*place, marker, label=row["coding"], markersize=7)
        panel.set(xscale="log", xlabel="encode, GB/s, one thread", title=f"{kind}, fp32")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ratio")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> int:
    """Train, measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="default: bench/results/codec.json; quick: none")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all")
    options = parser.parse_args(arguments)
    if options.quick:
        options.layers, options.width, options.heads = 1, 64, 2
        options.steps, options.rounds = 5, 1
    elif options.json is None:
        options.json = RESULTS / "codec.json"
    console, log = start(150)
    kinds = trained(options)
    log.print(f"trained {options.steps} steps")
    torch.set_num_threads(1)
    found, missing = codings([1, 3, 22] if options.quick else LEVELS)
    rows = [row.summary() for row in measure(kinds, found, options.rounds, log)]
    results = {
        "benchmark": "codec",
        "question": "How small does each coding make a training state, and how fast?",
        **provenance("cpu", Path()),
        "settings": {key: value for key, value in vars(options).items() if key != "json"},
        "parameters": kinds["weights"].numel(),
        "chunk_bytes": CHUNK_BYTES,
        "rows": rows,
        "missing": missing,
    }
    judged = bars(rows)
    results["bars"] = [asdict(bar) for bar in judged]
    if options.json is not None:
        write_json(options.json, results)
        try:
            draw(results, options.json.with_suffix(".png"))
        except ImportError as cause:
            log.print(f"no picture: {cause}")
    show(results, console)
    show_bars(judged, console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
