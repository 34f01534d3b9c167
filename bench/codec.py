"""How small does each coding make a training state, and how fast?

The script trains a small GPT-2-shaped Transformer itself, with AdamW, on the sources of Python's
standard library: weights and both moments are those of a real run, and so are the bf16 and fp16
kinds, which are the trained fp32 values rounded.

How it is measured. Each kind is cut into chunks of 16 MiB, as the product cuts it. In every round
each coding encodes and decodes each chunk once, first in one thread, then in as many as there are
cores, each with a coder of its own, as the pipeline has (ZipNN with its own threads); the order of
codings is drawn anew in every round. The clock sees coding alone: coders are made and warmed, and
what a library's interface makes necessary, such as a copy because the argument is overwritten, is
done beside it. Every decoded chunk is compared with the original. GB/s are of the bytes of the
state. Levels above 9 are slow, and are measured on a MiB in 16 pieces from all over, in one thread.

How to read it. One cell is the median, and under it the smallest and the largest value.

    ratio       length of the state by length of what would be stored
    encode      GB/s, in one thread, and in all
    decode      the same

"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from codings import Bytes, Coding, codings
from harness import MEDIANS, Bar, Bench, Column, Results, Size, ratio, spread, table
from pictures import draw_codings
from rich.table import Table
from training import Training

from asyncsave.pipeline.budget import CHUNK_BYTES

LEVELS, QUICK_LEVELS = range(1, 23), (1, 3, 22)
SAMPLE_PIECES, PIECE_BYTES = 16, 64 << 10
KINDS = ("weights", "exp_avg", "exp_avg_sq")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FIGURES = ("encode", "decode", "encode_all", "decode_all")
OURS, ZIPNN, ZSTD = "asyncsave, level 1", "ZipNN", "zstd 3 on raw bytes"


# -- the state ----------------------------------------------------------------------------------


def kinds_of(training: Training) -> dict[str, torch.Tensor]:
    """Return every kind in fp32, its tensors end to end as a checkpoint lays them."""
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


class _Coder:
    """One coder, and memory to decode into."""

    def __init__(self, coding: Coding, dtype: torch.dtype, threads: int, longest: int) -> None:
        self.coding = coding
        self.encode, self.decode = coding.make(dtype, threads)
        self.out = np.empty(longest, np.uint8)

    def run(self, chunk: Bytes) -> tuple[float, float, int]:
        """Encode and decode a chunk; return the seconds of both, and the stored bytes."""
        given, out = self.coding.prepare(chunk), self.out[: chunk.size]
        begun = time.perf_counter()
        coded = self.encode(given)
        encoded = time.perf_counter()
        decoded = self.decode(coded, out)
        done = time.perf_counter()
        if not np.array_equal(np.frombuffer(decoded, np.uint8), chunk):
            raise AssertionError(f"{self.coding.name} does not give a chunk back")
        return encoded - begun, done - encoded, self.coding.length(coded)


@dataclass(slots=True)
class Row:
    """A coding of one kind in one dtype, and what was measured: GB/s, by the name of the figure."""

    coding: Coding
    kind: str
    dtype: str
    chunks: list[Bytes]
    ratio: float = 0.0
    speeds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in FIGURES})

    def measure(self, pool: ThreadPoolExecutor, cores: int) -> None:
        """Encode and decode everything once in one thread, and once in all."""
        raw_bytes, stored_bytes = self._in_turn(1, "encode", "decode")
        self.ratio = raw_bytes / stored_bytes
        if self.coding.threads:
            self._in_turn(cores, "encode_all", "decode_all")
        elif not self.coding.sampled:
            self._side_by_side(pool, cores)

    def summary(self) -> dict[str, Any]:
        """Return the figures."""
        return {
            "coding": self.coding.name,
            "kind": self.kind,
            "dtype": self.dtype,
            "sampled": self.coding.sampled,
            "ratio": self.ratio,
            **{name: spread(found) if found else None for name, found in self.speeds.items()},
        }

    def _coder(self, threads: int) -> _Coder:
        longest = max(chunk.size for chunk in self.chunks)
        coder = _Coder(self.coding, DTYPES[self.dtype], threads, longest)
        coder.run(self.chunks[0])  # its memory is warm from here on
        return coder

    def _note(self, nbytes: int, figure: str, seconds: float) -> None:
        self.speeds[figure].append(nbytes / seconds / 1e9)

    def _in_turn(self, threads: int, encode: str, decode: str) -> tuple[int, int]:
        """Note two speeds of one coder over all chunks; return their raw and stored bytes."""
        coder = self._coder(threads)
        turns = [coder.run(chunk) for chunk in self.chunks]
        raw_bytes = sum(chunk.size for chunk in self.chunks)
        self._note(raw_bytes, encode, sum(turn[0] for turn in turns))
        self._note(raw_bytes, decode, sum(turn[1] for turn in turns))
        return raw_bytes, sum(turn[2] for turn in turns)

    def _side_by_side(self, pool: ThreadPoolExecutor, cores: int) -> None:
        """Note the speeds of many threads, each with a coder and a chunk of its own."""
        coders = [self._coder(1) for _ in range(cores)]
        mine = [self.chunks[i % len(self.chunks)] for i in range(cores)]  # all are of one length
        prepared = [self.coding.prepare(chunk) for chunk in mine]
        outs = [coder.out[: chunk.size] for coder, chunk in zip(coders, mine, strict=True)]
        nbytes = sum(chunk.size for chunk in mine)
        begun = time.perf_counter()
        coded = list(pool.map(lambda i: coders[i].encode(prepared[i]), range(cores)))
        encoded = time.perf_counter()
        list(pool.map(lambda i: coders[i].decode(coded[i], outs[i]), range(cores)))
        done = time.perf_counter()
        self._note(nbytes, "encode_all", encoded - begun)
        self._note(nbytes, "decode_all", done - encoded)


def rows_of(kinds: dict[str, torch.Tensor], found: list[Coding]) -> list[Row]:
    """Return a row for every coding of every kind in every dtype."""
    rows = []
    for dtype, torch_dtype in DTYPES.items():
        for kind, values in kinds.items():
            chunks = chunks_of(values, torch_dtype)
            sample = [sample_of(chunks)]
            rows += [Row(c, kind, dtype, sample if c.sampled else chunks) for c in found]
    return rows


class Codec(Bench):
    name = "codec"
    question = "How small does each coding make a training state, and how fast?"
    sizes: ClassVar = {
        "layers": Size(5, quick=1),
        "width": Size(384, quick=64),
        "heads": Size(6, quick=2),  # 9 M parameters: three chunks of 16 MiB for each kind in fp32
        "steps": Size(400, quick=5, help="of training"),
        "rounds": Size(5, quick=1),
    }

    def measure(self) -> Results:
        options = self.options
        training = Training(options.layers, options.width, options.heads, batch=2, context=64)
        for _ in range(options.steps):
            training.step()
        self.say(f"trained {options.steps} steps")
        torch.set_num_threads(1)
        kinds = kinds_of(training)
        found, missing = codings(QUICK_LEVELS if options.quick else LEVELS)
        rows, cores = rows_of(kinds, found), len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(cores) as pool:
            for round_, row in self.turns(rows, options.rounds):
                row.measure(pool, cores)
                self.say(f"{round_}/{options.rounds} {row.coding.name}, {row.kind}, {row.dtype}")
        return {
            "parameters": kinds["weights"].numel(),
            "chunk_bytes": CHUNK_BYTES,
            "rows": [row.summary() for row in rows],
            "missing": missing,
        }

    def bars(self, results: Results) -> list[Bar]:
        rows = {(row["coding"], row["kind"], row["dtype"]): row for row in results["rows"]}

        def worst(theirs: str, dtype: str, figure: str) -> float | None:
            found = [
                ratio(rows[OURS, kind, dtype][figure]["median"], row[figure]["median"])
                for kind in KINDS
                if (row := rows.get((theirs, kind, dtype))) is not None
            ]
            return min((each for each in found if each is not None), default=None)

        longest = max(
            (
                row["ratio"] / rows[OURS, kind, dtype]["ratio"]
                for (coding, kind, dtype), row in rows.items()
                if coding == ZIPNN
            ),
            default=None,
        )
        return [
            Bar.of("stored bytes / ZipNN's", longest, 1.005),
            *(
                Bar.of(
                    f"{figure}, {dtype}, by {theirs}, worst kind",
                    worst(theirs, dtype, figure),
                    least,
                    at_least=True,
                )
                for figure, dtype, theirs, least in (
                    ("encode", "fp32", ZIPNN, 4.0),
                    ("encode", "bf16", ZIPNN, 1.5),
                    ("decode", "fp32", ZIPNN, 1.5),
                    ("decode", "bf16", ZIPNN, 1.0),
                    ("encode", "fp32", ZSTD, 2.0),
                )
            ),
        ]

    def tables(self, results: Results) -> Iterator[Table]:
        columns: dict[str, Column] = {
            "": lambda row: row["coding"] + ("*" if row["sampled"] else ""),
            "ratio": ("ratio", 3),
            "encode, 1 thread": ("encode", 2),
            "encode, all": ("encode_all", 2),
            "decode, 1 thread": ("decode", 2),
            "decode, all": ("decode_all", 2),
        }
        note = (
            f"{results['parameters'] / 1e6:.1f} M parameters after "
            f"{results['settings']['steps']} steps; GB/s: {MEDIANS}\n"
            "* measured on a MiB from all over"
        )
        for name, why in results["missing"].items():
            note += f"\n{name} {why}"
        for place in itertools.product(DTYPES, KINDS):
            rows = [row for row in results["rows"] if (row["dtype"], row["kind"]) == place]
            title = "{1} of a trained state in {0}".format(*place)
            yield table(results, title, columns, note, rows)

    def draw(self, results: Results, path: Path) -> None:
        draw_codings(results, path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(Codec().main(sys.argv[1:]))
