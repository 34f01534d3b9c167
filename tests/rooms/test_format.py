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
import typing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import asyncsave
from asyncsave.format.dtypes import DTYPES
from asyncsave.format.leaf import Leaf
from asyncsave.reading.checkpoint import Checkpoint
from asyncsave.reading.groups import grouped
from asyncsave.storage.place import place_of
from tests import numpy_reader
from tests.make_golden import (
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

# As sha256sum prints it. Never change a line: files like these are on people's disks. A new format
# adds lines.
SHA256 = """\
4065c2154bd992b9f75c15df0a12a69264e69f1d392417ab9a403d9bc0038420  chunks/checkpoint.json
531498432e7ea7208528edccaefb5f1d1e52b08ad16e99e79357a6f68980f0ab  chunks/rank-00000.data
f507c35791c9fc03d2352d80c89c652940ab28812d0f398188751206d669c5fe  chunks/rank-00000.json
97b65c83f405a720ecd1d46fc93c3243432006d914080c80f97f927709ff821b  chunks.plain.json
eb95e5d30cbb41633d88aebd4457f0867290e30aab284aeca21171f82bd6be2d  codings-1/checkpoint.json
5676349c61810377b34bd2d5b0df66409ee848f2a6aee3972080b49bcbdef59e  codings-1/rank-00000.data
9ab43d2c81903e374c054b91d90c869de5c101bb05dea8fefaa7ab4404d14919  codings-1/rank-00000.json
f4ebce424b9447a4cb7d43d1ac3e7b633faccc70eb86a218e8ef67cd78591d0a  codings-6/checkpoint.json
5cf647c82ae6d5c1cbe6105779952bb271b25562b898a7c36a9e9254c929a6da  codings-6/rank-00000.data
d925f68df4d330702269f1cf5c67bf6e874bd833e5f44f5b13aaa308f0b1ab76  codings-6/rank-00000.json
71a8506894bdf392b6425643d63edc60d2f4363f7a2af6824b2d6414fd620b91  codings-6-bytes/checkpoint.json
bc9dadc4d5f4a8bc7f697d29302ac039dabd093d8c01db3ff488b6dde8e2f9e3  codings-6-bytes/rank-00000.data
3dc8b22b2d3a18d8b3ef0aea13cd286c94c3736780d27f3fe8239825c6f2e9c6  codings-6-bytes/rank-00000.json
61fd103381c64c1671f40469556731ca45a6ef75b6a5c8f040642f3e54213d39  codings.plain.json
489db68260905ef36b0f010a6e62a61a89814d464b853f57f0fb9fb20fd70a24  dtypes/checkpoint.json
55c2a79ee210d1a51566d8561b9c74e271427f7d8191b4e575a083a821e3ef91  dtypes/rank-00000.data
bd2b9b2e01d76992cdaa1e552c3dbc8ab9fc719d6441bccfa94c453bb9f5dbfd  dtypes/rank-00000.json
98fc9222822675efc3f6ba2d7951e653f4e525af460b49cbcd931762930513ff  dtypes.plain.json
635a489a8bdd41e3515f68ef43ae95fe1552b0148d2c3efbc25531cb3d0d1211  kinds/checkpoint.json
a93b723417047db8aa2aac3253b09e77befd085af1ac8c9e72dc193132c51035  kinds/rank-00000.data
b2f66a7294d50d09a2c6d4d252084cda9d444779fbe3ee2ceb803fde1893cdbd  kinds/rank-00000.json
88be8243ff61847e7a67673f12243464a5cc13950088fe6c5e3e30c9b238bea6  kinds.plain.json
cb0b98c0363bfdb55e69b2b271d1b915f6642cad3c06b339102569d25ce5b5f9  tiny/checkpoint.json
0a3b09bf9ca02aa12ba7d98237ec74bf6912cca777696085ba12c7d2409f27b5  tiny/rank-00000.data
183dc90828d73224865153da5cddce7d1184d89ec6d8aa095b11dad1535a77f4  tiny/rank-00000.json
1923f6a64b3ae5fd752ae0c463583bd9454a77cff2f3ff3e361f5d4ef5419577  tiny.plain.json
"""


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
    from asyncsave.format.codings import LAYOUTS
    from asyncsave.format.kinds import MADE, PLAIN
    from asyncsave.format.records import RankRecord

    text = FORMAT_MD.read_text()
    nodes = typing.get_args(typing.get_type_hints(RankRecord)["tree"])
    tags = [node.__struct_config__.tag for node in nodes if hasattr(node, "__struct_config__")]
    assert len(tags) == 19
    for name in (*PLAIN, *MADE):
        assert re.search(rf"^\| .*`{re.escape(name)}`.* \|$", text, re.MULTILINE), name
    for tag in tags:
        assert re.search(rf"^\| .*`{tag}`.* \|.*\|.*\|$", text, re.MULTILINE), tag
    assert {re.sub(r"\.\d+$", ".B", coding) for coding in LAYOUTS} == {
        *("raw", "zstd", "bytes2", "bytes4", "bytes8", "exp16.B", "exp32.B")
    }
    rows = re.findall(r"^\| (\d+) \| (`.+`.*) \|$", text, re.MULTILINE)
    widths = {name: int(width) for width, names in rows for name in re.findall(r"`(\w+)`", names)}
    for stem in ("uint", "int"):
        widths |= {f"{stem}{i}": 1 for i in range(1, 8)}  # given as a range
    assert widths == {name: dtype.nbytes for name, dtype in DTYPES.items()}
    assert all(
        DTYPES[str(dtype).removeprefix("torch.")].nbytes == dtype.itemsize for dtype in TORCH_DTYPES
    )


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


@pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support")
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
                lambda: (
                    draw.getrandbits(draw.choice([1, 53, 54, 63, 64, 200])) * draw.choice([1, -1])
                ),
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


def rewrite(path: Path, checkpoint: Any, rank: Any) -> None:
    """Edit the records in both JSON files; lengths and digests are made right again."""
    data = json.dumps(rank(json.loads((path / "rank-00000.json").read_bytes()))).encode()
    (path / "rank-00000.json").write_bytes(data)
    record = json.loads((path / "checkpoint.json").read_bytes())
    del record["xxh3_128"]
    record["ranks"][0] |= {"length": len(data), "xxh3_128": numpy_reader.digest(data)}
    rest = b'",' + json.dumps(checkpoint(record)).encode()[1:]
    head = b'{"xxh3_128":"' + numpy_reader.digest(rest).encode()
    (path / "checkpoint.json").write_bytes(head + rest)


def test_unknown_members_are_ignored(tmp_path: Path) -> None:
    state = {"x": torch.arange(5), "y": kinds()}
    asyncsave.save(state, tmp_path / "a").result()

    def extend(value: Any) -> Any:
        if isinstance(value, list):
            return [extend(item) for item in value]
        if isinstance(value, dict):
            return {"later": [1], **{k: extend(v) for k, v in value.items()}, "more": {"t": "new"}}
        return value

    rewrite(tmp_path / "a", lambda record: record | {"ranks": extend(record["ranks"])}, extend)
    assert describe(asyncsave.load(tmp_path / "a")) == describe(state)
    assert describe(numpy_reader.read(tmp_path / "a")) == as_numpy(describe(state))


def _of_two_ranks(record: dict[str, Any]) -> dict[str, Any]:
    (entry,) = record["ranks"]
    return record | {"world_size": 2, "ranks": [entry, entry | {"file": "rank-00001.json"}]}


@pytest.mark.parametrize(
    "change", [lambda record: {"format": 2, "ranks": "elsewhere"}, _of_two_ranks], ids=["2", "two"]
)
def test_what_is_newer_is_told_from_damage(tmp_path: Path, change: Any) -> None:
    shutil.copytree(GOLDEN / "tiny", tmp_path / "a")
    rewrite(tmp_path / "a", change, lambda record: record)
    with pytest.raises(asyncsave.UnsupportedVersionError):
        asyncsave.load(tmp_path / "a")


# -- what validation knows --------------------------------------------------------------------


def leaves(path: Path) -> dict[str, Leaf]:
    with Checkpoint.open(place_of(path)) as checkpoint:
        assert [leaf.index for leaf in checkpoint.leaves] == list(range(len(checkpoint.leaves)))
        return {leaf.name: leaf for leaf in checkpoint.leaves}


def test_a_leaf_says_all_of_a_value(tmp_path: Path) -> None:
    base = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    state = {
        "base": torch.nn.Parameter(base, requires_grad=False),
        "turned": base.t()[1:],
        "array": np.zeros((2, 2), ">i4"),
        "text": np.array(["ab", "c"]),
        "long": bytes(300),
        "empty": torch.ones(0, 3),
        "one": torch.tensor(1.0, requires_grad=True),
    }
    asyncsave.save(state, tmp_path / "a").result()
    found = leaves(tmp_path / "a")
    whole, turned = found["base"], found["turned"]
    assert (whole.kind, whole.dtype, whole.shape) == ("torch", DTYPES["bfloat16"], [2, 3])
    assert (whole.strides, whole.nbytes, whole.parameter) == (None, 12, True)
    assert (turned.shape, turned.strides, turned.parameter) == ([2, 2], [1, 3], False)
    assert (turned.start - whole.start, turned.stop) == (2, whole.stop)
    array, text = found["array"], found["text"]
    assert (array.kind, array.dtype.name, array.nbytes) == ("numpy", ">i4", 16)
    assert (text.dtype.numpy, text.dtype.nbytes, text.nbytes) == ("<U2", 8, 16)
    long = found["long"]
    assert (long.kind, long.dtype.name, long.nbytes) == ("bytes", "uint8", 300)
    assert (found["empty"].start, found["empty"].nbytes) == (found["empty"].stop, 0)
    assert found["one"].requires_grad
    assert {leaf.rank for leaf in found.values()} == {0}


def test_leaves_of_two_ranks_have_addresses_of_their_own(tmp_path: Path) -> None:
    asyncsave.save({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "a").result()
    (a, b) = leaves(tmp_path / "a").values()
    elsewhere = msgspec.structs.replace(a, rank=1, start=0, stop=32)
    first, second, third = grouped([elsewhere, a, b])
    assert [group.members for group in (first, second, third)] == [(a,), (b,), (elsewhere,)]
    assert (third.rank, third.start, third.stop) == (1, 0, 32)


# -- what was written once --------------------------------------------------------------------

golden = pytest.mark.parametrize("name", CHECKPOINTS)


def test_golden_files_are_as_they_were() -> None:
    files = {
        file.relative_to(GOLDEN).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in GOLDEN.rglob("*")
        if file.is_file()
    }
    assert files == {line[66:]: line[:64] for line in SHA256.splitlines()}
    assert sum((GOLDEN / name).stat().st_size for name in files) < 300_000


@golden
@pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support")
def test_golden_checkpoints_are_read(name: str) -> None:
    plain = json.loads(plain_path(name).read_text())
    assert describe(asyncsave.load(GOLDEN / name)) == plain
    assert describe(numpy_reader.read(GOLDEN / name)) == as_numpy(plain)


@golden
def test_golden_checkpoints_verify(name: str) -> None:
    report = asyncsave.verify(GOLDEN / name)
    assert report.paths == (GOLDEN / name,)


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
@pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support")
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
