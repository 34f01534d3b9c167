"""The format on disk: FORMAT.md suffices to read it, and what was written once stays readable."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asyncsave

from . import numpy_reader
from .make_golden import (
    CHECKPOINTS,
    GOLDEN,
    TORCH_DTYPES,
    Pair,
    Stateful,
    as_numpy,
    chunks,
    codings,
    describe,
    dtypes,
    kinds,
    plain_path,
    raw_tensor,
)

READER = Path(numpy_reader.__file__)
FORMAT_MD = READER.parents[1] / "FORMAT.md"

COMPRESSIONS = {
    "off": "off",
    "level 1": 1,
    "level 6": 6,
    "level 1, no planes": asyncsave.Compression(1, byte_planes=False),
    "level 6, no planes": asyncsave.Compression(6, byte_planes=False),
}

# Never change a line: files in these bytes are on people's disks. A new format adds lines.
SHA256: dict[str, str] = {}


# -- a reader from the document alone ---------------------------------------------------------


def test_the_reader_is_short() -> None:
    assert len(READER.read_text().splitlines()) < 100


def test_the_reader_imports_neither_torch_nor_asyncsave() -> None:
    roots = set()
    for node in ast.walk(ast.parse(READER.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(str(node.module).partition(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"numpy", "xxhash", "zstandard"}


def test_the_reader_runs_without_torch_and_asyncsave() -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['asyncsave'] = None\n"
        f"sys.path.insert(0, {str(READER.parent)!r})\n"
        "import numpy_reader\n"
        f"state = numpy_reader.read({str(GOLDEN / 'tiny')!r})\n"
        "assert state['w'].tolist() == [[0, 1, 2], [3, 4, 5]]\n"
        "assert state['tied'].tolist() == [[1, 4], [2, 5]]\n"
        "assert not {'torch', 'msgspec'} & {k for k, v in sys.modules.items() if v}\n"
    )
    command = [sys.executable, "-I", "-B", "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_the_example_in_the_document_is_the_golden_one() -> None:
    tiny = GOLDEN / "tiny"
    text = FORMAT_MD.read_text()
    blocks = re.findall(r"^```json\n(.+?)\n```$", text, re.DOTALL | re.MULTILINE)
    assert blocks == [(tiny / f"{name}.json").read_text() for name in ("rank-00000", "checkpoint")]
    data = (tiny / "rank-00000.data").read_bytes()
    assert f"\n    {data[:24].hex(' ', 4)}\n" in text
    assert data[24:] == bytes(4096 - 24)


def test_the_exponent_planes_in_the_document() -> None:
    from asyncsave.codec.planes import JOIN_SCRATCH_BYTES, join

    planes = [np.frombuffer(bytes.fromhex(text), np.uint8) for text in ("000100", "0182", "88")]
    raw, scratch = np.empty(6, np.uint8), np.empty(JOIN_SCRATCH_BYTES, np.uint8)
    join("exp16.2", planes, raw, scratch)
    assert torch.from_numpy(raw).view(torch.bfloat16).tolist() == [1.0, -2.0, 0.5]
    text = FORMAT_MD.read_text()
    assert "`3f80 c000 3f00`" in text
    assert "`00 01 00`, `01 82` and `88`" in text
    assert raw.view("<u2").tolist() == [0x3F80, 0xC000, 0x3F00]


def test_the_document_knows_every_node_kind_coding_and_dtype() -> None:
    from asyncsave.codec.planes import CODINGS
    from asyncsave.state import tree

    text = FORMAT_MD.read_text()
    for kind in vars(tree).values():
        if isinstance(kind, type) and kind.__name__.endswith("Node") and hasattr(kind, "t"):
            assert f"`{kind.t}`" in text, kind
    assert {re.sub(r"\.\d+$", ".B", coding) for coding in CODINGS} == {
        *("raw", "zstd", "bytes2", "bytes4", "bytes8", "exp16.B", "exp32.B")
    }
    rows = re.findall(r"^\| (\d+) \| (`.+`.*) \|$", text, re.MULTILINE)
    widths = {name: int(width) for width, names in rows for name in re.findall(r"`(\w+)`", names)}
    for stem in ("uint", "int"):
        widths |= {f"{stem}{i}": 1 for i in range(1, 8)}  # given as a range
    known = {str(dtype).removeprefix("torch."): dtype.itemsize for dtype in TORCH_DTYPES}
    assert {name: widths.get(name) for name in known} == known


# -- both readers agree -----------------------------------------------------------------------


def agree(state: Any, path: Path, **arguments: Any) -> dict[str, Any]:
    """Save ``state``, check what both readers make of it, and return the rank manifest."""
    asyncsave.save(state, path, **arguments).result()
    plain = describe(state)
    assert describe(asyncsave.load(path)) == plain
    assert describe(numpy_reader.read(path)) == as_numpy(plain)
    manifest: dict[str, Any] = json.loads((path / "rank-00000.json").read_bytes())
    return manifest


@pytest.fixture(params=COMPRESSIONS)
def compression(request: pytest.FixtureRequest) -> Any:
    return COMPRESSIONS[request.param]


def test_every_kind_of_value(tmp_path: Path, compression: Any) -> None:
    manifest = agree(kinds(), tmp_path / "a", compression=compression)
    found = set(re.findall(r"'t': '(\w+)'", str(manifest["tree"])))
    assert len(found) == 16, found


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_dtype(tmp_path: Path, compression: Any) -> None:
    raw = np.random.default_rng(3)
    state = {
        "tied": dtypes(),
        "alone": [
            raw_tensor(raw.bytes(n * dtype.itemsize), dtype, (n,))
            if dtype is not torch.bool
            else torch.arange(n) % 2 == 0
            for dtype in TORCH_DTYPES
            for n in (1, 15)
        ],
        "empty": [torch.empty(0, 3, dtype=dtype) for dtype in TORCH_DTYPES],
        "scalar": [
            raw_tensor(raw.bytes(dtype.itemsize), dtype, ())
            for dtype in TORCH_DTYPES
            if dtype is not torch.bool
        ],
    }
    agree(state, tmp_path / "a", compression=compression)


def test_every_coding_and_layout(tmp_path: Path, compression: Any) -> None:
    state = codings()
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    base = torch.arange(60, dtype=torch.int32)
    state |= {
        "image": image,
        "gathered": torch.randn(20, 30)[::2, 1::3],
        "conj": torch.randn(5, 2, dtype=torch.complex64).conj().t(),
        "windows": base.unfold(0, 7, 3),
        "cells": base.view(torch.uint8)[3:90],
        "nan": torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16),
        "bits": torch.randint(-(2**31), 2**31, (9999,)).int().view(torch.float32),
    }
    manifest = agree(state, tmp_path / "a", compression=compression)
    families = {chunk["coding"].partition(".")[0] for chunk in manifest["chunks"]}
    if compression in (1, 6):
        assert families >= {"zstd", "bytes2", "bytes4", "bytes8", "exp16", "exp32"}


def test_many_chunks(tmp_path: Path, compression: Any) -> None:
    state = {
        **chunks(),
        "odd": torch.ones(7, dtype=torch.uint8),
        "random": torch.randn(99_999),
        "doubles": torch.randn(301, 101, dtype=torch.float64).t(),
        "bytes": bytes(range(256)) * 999,
        "same": [b"x" * 70_000] * 2,
    }
    limit = 400_000 if compression == "off" else 3_000_000
    manifest = agree(state, tmp_path / "a", compression=compression, memory_limit=limit)
    assert len(manifest["chunks"]) > 15


def test_more_than_one_chunk_of_16_mib(tmp_path: Path) -> None:
    state = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.randn(5_000_001)}
    manifest = agree(state, tmp_path / "a", compression=1)
    lengths = [chunk["raw_length"] for chunk in manifest["chunks"]]
    assert lengths == [3, 2**24, 20_000_004 - 2**24]


@pytest.mark.parametrize("seed", range(12))
def test_random_trees(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)

    def tensor() -> torch.Tensor:
        dtype = draw.choice([torch.float32, torch.bfloat16, torch.int64, torch.float8_e5m2])
        shape = tuple(draw.choice([0, 1, 2, 5, 17]) for _ in range(draw.randrange(4)))
        count = int(np.prod(shape))
        value = raw_tensor(draw.randbytes(max(1, count) * dtype.itemsize), dtype, shape)
        return value.transpose(0, -1) if shape and draw.random() < 0.5 else value

    def leaf() -> Any:
        return draw.choice(
            [
                tensor,
                lambda: draw.getrandbits(draw.choice([1, 53, 54, 63, 64, 200])) * draw.choice([1, -1]),
                lambda: float(np.frombuffer(draw.randbytes(8), np.float64)[0]),
                lambda: draw.random(),
                lambda: "".join(chr(draw.randrange(0x11_0000)) for _ in range(3)),
                lambda: draw.randbytes(draw.choice([0, 1, 256, 257])),
                lambda: np.frombuffer(draw.randbytes(24), draw.choice(["<f8", ">u2", "S3"])),
                lambda: None,
            ]
        )()

    def node(depth: int) -> Any:
        if depth == 0 or draw.random() < 0.3:
            return leaf()
        items = [node(depth - 1) for _ in range(draw.randrange(5))]
        keys = [draw.choice([i, str(i), (i,), float(i) + 0.5, b"%d" % i]) for i in range(5)]
        return draw.choice(
            [
                items,
                tuple(items),
                dict(zip(keys, items, strict=False)),
                Pair(items, leaf()),
                Stateful(items),
            ]
        )

    state = [node(4) for _ in range(8)]
    agree(state, tmp_path / "a", compression=draw.choice(list(COMPRESSIONS.values())))


def spans(leaves: list[Any]) -> list[tuple[int, int]]:
    """Return for all pairs of leaves the distance of their first bytes, if they share memory."""
    arrays = [leaf.numpy() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return [
        (i, a.ctypes.data - b.ctypes.data)
        for i, a in enumerate(arrays)
        for b in arrays[:i]
        if np.shares_memory(a, b)
    ]


def test_ties_are_overlapping_addresses(tmp_path: Path) -> None:
    w = torch.randn(20, 30)
    array = np.arange(5.0)
    leaves = [w, w.t(), w[3:], w[:, 2], w.detach(), torch.randn(3), w[5:7].view(-1), array, array]
    leaves += [torch.zeros(4).expand(3, 4), w[19], w[:3]]
    asyncsave.save(leaves, tmp_path / "a").result()
    expected = spans(leaves)
    assert len(expected) > 20
    assert spans(asyncsave.load(tmp_path / "a")) == expected
    assert spans(numpy_reader.read(tmp_path / "a")) == expected


def test_unknown_members_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a"
    state = {"x": torch.arange(5), "y": collections_of_everything()}
    asyncsave.save(state, path).result()

    def extend(value: Any) -> Any:
        if isinstance(value, list):
            return [extend(item) for item in value]
        if isinstance(value, dict):
            return {"later": [1], **{k: extend(v) for k, v in value.items()}, "more": {"t": "new"}}
        return value

    rewrite(path, extend, extend)
    assert describe(asyncsave.load(path)) == describe(state)
    assert describe(numpy_reader.read(path)) == as_numpy(describe(state))


def collections_of_everything() -> Any:
    state = kinds()
    return {name: state[name] for name in ("ordered", "tuples", "object", "scalars", "special")}


def rewrite(path: Path, checkpoint: Any, rank: Any) -> None:
    """Edit both JSON files, each as FORMAT.md says they are written."""
    data = json.dumps(rank(json.loads((path / "rank-00000.json").read_bytes()))).encode()
    (path / "rank-00000.json").write_bytes(data)
    record = json.loads((path / "checkpoint.json").read_bytes())
    record.pop("xxh3_128")
    record["ranks"][0] |= {"length": len(data), "xxh3_128": numpy_reader.digest(data)}
    record = checkpoint(record)
    if "xxh3_128" in record:
        record.pop("xxh3_128")
    rest = b'",' + json.dumps(record).encode()[1:]
    head = b'{"xxh3_128":"' + numpy_reader.digest(rest).encode()
    assert len(head) == 45
    (path / "checkpoint.json").write_bytes(head + rest)


def test_another_format_is_told_from_damage(tmp_path: Path) -> None:
    path = tmp_path / "a"
    shutil.copytree(GOLDEN / "tiny", path)
    rewrite(path, lambda record: {"format": 2, "shape": "unknown"}, lambda record: record)
    with pytest.raises(asyncsave.UnsupportedVersionError):
        asyncsave.load(path)
    rewrite_ranks = {"world_size": 2}
    shutil.rmtree(path)
    shutil.copytree(GOLDEN / "tiny", path)

    def two(record: dict[str, Any]) -> dict[str, Any]:
        entry = record["ranks"][0]
        return record | rewrite_ranks | {"ranks": [entry, entry | {"file": "rank-00001.json"}]}

    rewrite(path, two, lambda record: record)
    with pytest.raises(asyncsave.UnsupportedVersionError):
        asyncsave.load(path)


# -- what was written once --------------------------------------------------------------------

golden = pytest.mark.parametrize("name", CHECKPOINTS)


def test_golden_files_are_as_they_were() -> None:
    files = {
        file.relative_to(GOLDEN).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in GOLDEN.rglob("*")
        if file.is_file()
    }
    assert files == SHA256
    assert sum((GOLDEN / name).stat().st_size for name in files) < 300_000


@golden
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_golden_checkpoints_are_read(name: str) -> None:
    plain = json.loads(plain_path(name).read_text())
    assert describe(asyncsave.load(GOLDEN / name)) == plain
    assert describe(numpy_reader.read(GOLDEN / name)) == as_numpy(plain)


@golden
def test_golden_checkpoints_verify(name: str) -> None:
    report = asyncsave.verify(GOLDEN / name)
    assert report.checkpoints == (GOLDEN / name,)


def test_golden_checkpoints_have_every_coding() -> None:
    manifests = [
        json.loads((GOLDEN / name / "rank-00000.json").read_text()) for name in CHECKPOINTS
    ]
    found = [chunk for manifest in manifests for chunk in manifest["chunks"]]
    families = {chunk["coding"].partition(".")[0] for chunk in found}
    assert families == {"raw", "zstd", "bytes2", "bytes4", "bytes8", "exp16", "exp32"}
    exponents = [chunk for chunk in found if chunk["coding"].startswith("exp16")]
    assert {chunk["raw_length"] // 2 % 2 for chunk in exponents} == {0, 1}
    assert max(len(manifest["chunks"]) for manifest in manifests) > 4
    starts = [tensor["shards"][0]["start"] for record in manifests for tensor in record["tensors"]]
    assert any(start % 2 for start in starts)


@golden
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_flipped_bit_raises_or_changes_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a"
    shutil.copytree(GOLDEN / name, path)
    plain = json.loads(plain_path(name).read_text())
    manifest = json.loads((path / "rank-00000.json").read_text())
    pick = random.Random(name)

    def damage(file: str, offset: int) -> bool:
        """Flip one bit; return whether loading raised."""
        with open(path / file, "r+b", buffering=0) as handle:
            handle.seek(offset)
            before = handle.read(1)
            handle.seek(offset)
            handle.write(bytes([before[0] ^ 1 << pick.randrange(8)]))
            try:
                loaded = asyncsave.load(path)
            except asyncsave.LoadError:
                with pytest.raises(ValueError):
                    numpy_reader.read(path)
                return True
            else:
                assert describe(loaded) == plain
                assert describe(numpy_reader.read(path)) == as_numpy(plain)
                return False
            finally:
                handle.seek(offset)
                handle.write(before)

    for file in ("checkpoint.json", "rank-00000.json"):
        for offset in range((path / file).stat().st_size):
            assert damage(file, offset), (file, offset)
    frames = [(chunk["offset"], chunk["length"]) for chunk in manifest["chunks"]]
    for begin, length in frames:
        inside = {0, 1, 4, 8, length - 1, *(pick.randrange(length) for _ in range(8))}
        for offset in sorted(offset for offset in inside if offset < length):
            assert damage("rank-00000.data", begin + offset), (begin, offset)
    size = (path / "rank-00000.data").stat().st_size
    padding = {begin + length for begin, length in frames} | {size - 1}
    used = {offset for begin, length in frames for offset in range(begin, begin + length)}
    for offset in sorted(padding - used)[:3]:
        assert not damage("rank-00000.data", offset), offset
    assert describe(asyncsave.load(path)) == plain
