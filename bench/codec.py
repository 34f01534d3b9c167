"""How small does each coding make a training state, and how fast?

The script trains a small GPT-2-shaped Transformer itself, with AdamW, on the sources of Python's
standard library: weights and both moments are those of a real run, and so are the bf16 and fp16
kinds, which are the trained fp32 values rounded.

How it is measured. Each kind is cut into chunks of 16 MiB, as the product cuts it. In every round
each coding encodes and decodes each chunk once, first in one thread, then in as many as there are
cores, each with a coder of its own, as the pipeline has; the order of codings is drawn anew in
every round. Every decoded chunk is compared with the original once. GB/s are of the bytes of the
state. Levels above 9 are slow, and are measured on the first MiB, in one thread.

How to read it. One cell is the median, and under it the smallest and the largest value.

    ratio       length of the state by length of what would be stored
    encode      GB/s, in one thread, and in all
    decode      the same

"""

from __future__ import annotations

import argparse
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
from common import RESULTS, Bar, Spread, provenance, show_bars, write_json
from rich.console import Console
from rich.table import Table
from training import Training

from asyncsave.codec.frame import Decoder, Encoder, coding_for
from asyncsave.memory import CHUNK_BYTES

LAYERS, WIDTH, HEADS = 5, 384, 6  # 9 M parameters: three chunks of 16 MiB for each kind in fp32
STEPS = 400
ROUNDS = 5
LEVELS = range(1, 23)
FAST_LEVEL = 9
SAMPLE_BYTES = 1 << 20
KINDS = ("weights", "exp_avg", "exp_avg_sq")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


# -- the codings --------------------------------------------------------------------------------


@dataclass(slots=True)
class Coding:
    """A way to code chunks of one dtype.

    Attributes:
        name: its row.
        make: returns (encode, decode) for one thread: bytes to something, and back.
        length: how long that something would be on disk.
        sampled: too slow for whole chunks.
    """

    name: str
    make: Callable[[torch.dtype], tuple[Callable[[Bytes], Any], Callable[[Any, Bytes], None]]]
    length: Callable[[Any], int] = len
    sampled: bool = False


def asyncsave_coding(level: int, byte_planes: bool = True) -> Coding:
    """Return what the product does, with buffers as it has them: one coder for each thread."""

    def make(dtype: torch.dtype) -> tuple[Any, Any]:
        coding = coding_for(str(dtype).removeprefix("torch."), byte_planes)
        encoder, decoder = Encoder(level, CHUNK_BYTES, byte_planes), Decoder(CHUNK_BYTES)
        frame = np.empty(CHUNK_BYTES, np.uint8)

        def encode(raw: Bytes) -> Any:
            stored, parts = encoder.encode(raw, coding, frame)
            return stored, parts, frame[: sum(parts)]

        def decode(coded: Any, out: Bytes) -> None:
            stored, parts, data = coded
            if stored == "raw":
                np.copyto(out, data)
            else:
                decoder.decode(data, stored, parts, out)

        return encode, decode

    name = f"asyncsave, level {level}" + ("" if byte_planes else ", no byte planes")
    return Coding(name, make, lambda coded: sum(coded[1]), sampled=level > FAST_LEVEL)


def zstd_coding(level: int) -> Coding:
    """Return zstd on the bytes as they are, as torch's own checkpoint extension does."""

    def make(_: torch.dtype) -> tuple[Any, Any]:
        compressor = zstandard.ZstdCompressor(level)
        decompressor = zstandard.ZstdDecompressor()

        def decode(coded: bytes, out: Bytes) -> None:
            np.copyto(out, np.frombuffer(decompressor.decompress(coded), np.uint8))

        return lambda raw: compressor.compress(raw.data), decode

    return Coding(f"zstd {level} on raw bytes", make)


def zipnn_coding() -> Coding:
    """Return ZipNN for the dtype, in one thread each."""
    from zipnn import ZipNN

    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

    def make(dtype: torch.dtype) -> tuple[Any, Any]:
        coder = ZipNN(input_format="byte", bytearray_dtype=names[dtype], threads=1)

        def decode(coded: Any, out: Bytes) -> None:
            np.copyto(out, np.frombuffer(coder.decompress(coded), np.uint8))

        # 0.5.4 overwrites what it is given, so it gets a copy, which is inside its time
        return lambda raw: coder.compress(bytearray(raw.data)), decode

    return Coding("ZipNN", make)


def blosc2_coding() -> Coding:
    """Return Blosc2 with its byte shuffle and zstd 1."""
    import blosc2

    def make(dtype: torch.dtype) -> tuple[Any, Any]:
        cparams = {
            "codec": blosc2.Codec.ZSTD,
            "clevel": 1,
            "typesize": dtype.itemsize,
            "filters": [blosc2.Filter.SHUFFLE],
            "filters_meta": [0],
            "nthreads": 1,
        }

        def decode(coded: bytes, out: Bytes) -> None:
            blosc2.decompress2(coded, dst=out, nthreads=1)

        return lambda raw: blosc2.compress2(raw, **cparams), decode

    return Coding("Blosc2, shuffle + zstd 1", make)


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


# -- measuring ----------------------------------------------------------------------------------


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
        dtype = DTYPES[self.dtype]
        coders = [self.coding.make(dtype) for _ in range(cores)]
        out = np.empty(max(chunk.size for chunk in self.chunks), np.uint8)
        outs = [out, *(np.empty_like(out) for _ in coders[1:])]
        raw_bytes = sum(chunk.size for chunk in self.chunks)
        encoding = decoding = stored_bytes = 0.0
        for chunk in self.chunks:
            encode, decode = coders[0]
            begun = time.perf_counter()
            coded = encode(chunk)
            encoded = time.perf_counter()
            decode(coded, out[: chunk.size])
            decoding += time.perf_counter() - encoded
            encoding += encoded - begun
            stored_bytes += self.coding.length(coded)
            if not self.encode and not np.array_equal(out[: chunk.size], chunk):
                raise AssertionError(f"{self.coding.name} does not give {self.kind} back")
        self.ratio = raw_bytes / stored_bytes
        self.encode.append(raw_bytes / encoding / 1e9)
        self.decode.append(raw_bytes / decoding / 1e9)
        if self.coding.sampled:
            return

        both: list[Any] = [None] * cores

        def forth(i: int) -> None:  # each thread has a chunk of its own, as long as the others'
            both[i] = coders[i][0](self.chunks[i % len(self.chunks)])

        def back(i: int) -> None:
            coders[i][1](both[i], outs[i][: self.chunks[i % len(self.chunks)].size])

        nbytes = sum(self.chunks[i % len(self.chunks)].size for i in range(cores))
        for job, found in ((forth, self.encode_all), (back, self.decode_all)):
            begun = time.perf_counter()
            list(pool.map(job, range(cores)))
            found.append(nbytes / (time.perf_counter() - begun) / 1e9)

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
            sample = [chunks[0][:SAMPLE_BYTES]]
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
    """Print a table for each dtype."""
    machine = results["hardware"]
    for dtype in DTYPES:
        table = Table(
            title=f"Codings of a trained state in {dtype}",
            caption=(
                f"{machine['cpu']}, {machine['cores']} cores; {results['parameters'] / 1e6:.1f} M "
                f"parameters after {results['settings']['steps']} steps; GB/s in one thread and in "
                "all: median, and smallest … largest\n* measured on the first MiB"
            ),
        )
        table.add_column("")
        for kind in KINDS:
            table.add_column(f"{kind}\nratio", justify="right")
        for name in ("encode\n1 thread", "encode\nall", "decode\n1 thread", "decode\nall"):
            table.add_column(f"weights\n{name}", justify="right")
        rows = [row for row in results["rows"] if row["dtype"] == dtype]
        for name in dict.fromkeys(row["coding"] for row in rows):
            mine = {row["kind"]: row for row in rows if row["coding"] == name}
            weights = mine["weights"]
            table.add_row(
                name + ("*" if weights["sampled"] else ""),
                *(f"{mine[kind]['ratio']:.3f}" for kind in KINDS),
                *(
                    "–" if weights[figure] is None else Spread(**weights[figure]).show()
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
        panel.plot(
            [r["encode"]["median"] for r in ours],
            [r["ratio"] for r in ours],
            ".-",
            color="tab:blue",
            label="asyncsave, by level",
        )
        for row in ours:
            level = row["coding"].rpartition(" ")[2]
            if level in ("1", "2", "3", "6", "9", "12", "15", "19", "22"):
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
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
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
    console, log = Console(), Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console = Console(width=150)
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
