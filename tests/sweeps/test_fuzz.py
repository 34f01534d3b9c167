"""Fuzz: records that are nearly right, under checksums that are right.

Two ways to make them: from the schema, where every field may be odd (hypothesis), and from the
golden checkpoints, with some places of their JSON and bytes of their frames changed (a loop with
fixed seeds). Whatever is made, reading it is an error of ours or gives a value.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import asyncsave
from asyncsave.format.kinds import MADE, PLAIN
from tests import counts
from tests.make_golden import CHECKPOINTS, GOLDEN
from tests.sweeps.attacks.forge import Json, chunk, digest, forge, forge_text, padded, sign_text

SECONDS = 5.0

ODD = [
    *(None, True, 0, 1, -1, 2, 7, 64, 255, 4096, 2**31, 2**32, 2**53, 2**61, 2**62, 2**63, 2**64),
    *(-(2**63), 10**30, 0.5, -0.0, 1e308, "", "0", "x", "..", "/etc/passwd", "\0", "é", "ﬁ"),
    *("float32", "bfloat16", "uint8", "bool", "complex128", "qint8", "bits8", "onnx", "_inductor"),
    *("<f4", ">i8", "|b1", "<U3", "|S5", "<M8[s]", "<m8", "|O", "a5", "torch", "numpy", "bytes"),
    *("raw", "zstd", "bytes2", "bytes8", "exp16.0", "exp32.15", "cpu", "cuda:1", "meta"),
    *("7ff8000000000000", "ffffffffffffffff", "-1f", "AAAA", "//79", "0" * 32, "x" * 5000),
    *([], [0], [1, 2, 3], [2**40] * 3, {}, {"t": "tensor", "i": 0}, {"t": "list", "items": []}),
    *({"t": "dict", "keys": ["a"], "values": [1]}, {"t": "int", "hex": "f" * 5000}),
]


def read_in_every_way(path: Path) -> bool:
    """Read a checkpoint; return whether it loads. Any error that is not ours fails the test."""
    counts.add("hostile")
    began = time.process_time()
    canary = {"x": torch.full((4,), 7), "w": torch.zeros(2, 3), "n": 1}
    untouched = copy.deepcopy(canary)
    loads = True
    try:
        asyncsave.load(path)
    except asyncsave.LoadError:
        loads = False
    for state in (canary, {}):
        try:
            asyncsave.restore(path, state, strict=False)
        except asyncsave.LoadError:
            assert repr(state) == (repr(untouched) if state else "{}")
    for read in (asyncsave.verify, lambda path: asyncsave.load(path, keys=["*a*", "*.0", "x"])):
        with contextlib.suppress(asyncsave.LoadError):
            read(path)
    assert time.process_time() - began < SECONDS
    return loads


# -- from the schema ------------------------------------------------------------------------------

odd = st.one_of(st.sampled_from(ODD), st.integers(-4, 2**65), st.text(max_size=4), st.floats())


@st.composite
def field(draw: st.DrawFn, *sound: Any) -> Any:
    """What is sound in one place, mostly: one of these values, or of what these strategies give."""
    if draw(st.integers(0, 79)) == 79:
        return draw(odd)
    one = draw(st.sampled_from(sound))
    return draw(one) if isinstance(one, st.SearchStrategy) else one


@st.composite
def record(draw: st.DrawFn, **fields: Any) -> Json:
    return {name: draw(field(each)) for name, each in fields.items()}


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


names = st.sampled_from(["a", "b", "x", "ﬁ", "fi", "_a", "class", "é", "a b", "長"])
dtypes = field("float32", "uint8", "bfloat16", "complex64", "bool", "int64", "float8_e5m2")
numpy_dtypes = field("<f4", "<f8", ">i2", "|u1", "<U1", "|S3", "<M8[s]", "<m8", "|b1", "<f2")
small = st.integers(0, 3)
plain_types = st.sampled_from(sorted(PLAIN))
made_types = st.sampled_from(sorted(MADE))

leaves = st.one_of(
    st.sampled_from([None, True, 3, 0.5, "text", 2**60]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=3),
    record(t="tensor", i=field(small)),
    record(t="tensor", i=field(small)),
    record(t="int", hex=field("20000000000001", "-ffffffffffffffffff")),
    record(t="float", hex=field("7ff0000000000000", "fff8000000000001")),
    record(t="complex", hex=field("3ff0000000000000" * 2)),
    record(t="bytes", data=field(st.binary(max_size=9).map(base64_of))),
    record(t="str", data=field("7aCA")),
    record(t="size", dims=field(st.lists(field(small), max_size=3))),
    record(t="dtype", name=dtypes),
    record(t="device", name=field("cpu", "cuda:1")),
    record(t="numpy", dtype=numpy_dtypes, data=field(*[base64_of(bytes(n)) for n in (1, 2, 4, 8)])),
)


def containers(nodes: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    items = st.lists(nodes, max_size=4)
    pairs = st.lists(st.tuples(nodes, nodes), max_size=4)
    keys = {"keys": pairs.map(lambda pairs: [key for key, _ in pairs])}
    values = {"values": pairs.map(lambda pairs: [value for _, value in pairs])}
    return st.one_of(
        record(t="list", items=field(items)),
        record(t="tuple", items=field(items)),
        pairs.map(lambda p: {"t": "dict", "keys": [k for k, _ in p], "values": [v for _, v in p]}),
        record(t="dict", **keys, **values),
        record(t="odict", **keys, **values, metadata=nodes),
        st.lists(st.tuples(names, nodes), max_size=3).flatmap(
            lambda p: record(
                t="namedtuple",
                name=names,
                fields=field([name for name, _ in p]),
                items=field([node for _, node in p]),
            )
        ),
        record(t="object", type=field("os.system"), state=nodes),
        record(t="typed", type=field("os.system"), of=nodes),
        record(t="plain", type=plain_types, of=nodes),
        record(t="plain", type=field("set", "frozenset"), of=record(t="tuple", items=field(items))),
        record(t="made", type=made_types, of=nodes, args=nodes),
        record(t="made", type=field("collections.deque"), of=record(t="list", items=field(items))),
    )


trees = st.recursive(leaves, containers, max_leaves=12)


@st.composite
def tensors(draw: st.DrawFn) -> Json:
    kind = draw(st.sampled_from(["torch", "torch", "numpy", "bytes"]))
    dtype = {"torch": dtypes, "numpy": numpy_dtypes, "bytes": "uint8"}[kind]
    dims = 1 if kind == "bytes" else draw(st.integers(0, 3))
    sizes = st.lists(field(small), min_size=dims, max_size=dims)
    shard = {"start": field(st.integers(0, 8) if kind == "torch" else st.just(80))}
    if kind == "torch" and draw(st.booleans()):
        shard["strides"] = sizes
    made = draw(record(name=names, kind=kind, dtype=dtype, shape=sizes))
    made["shards"] = [draw(record(**shard))]
    if draw(st.integers(0, 9)) == 9:
        made |= draw(record(parameter=True, requires_grad=st.booleans()))
    return made


DATA = bytes(range(200))
SECOND = bytes(99)


@st.composite
def chunks(draw: st.DrawFn) -> list[Json]:
    """Two sound chunks; sometimes with one member that is not."""
    made = [chunk(DATA), chunk(SECOND, offset=4096)]
    if draw(st.integers(0, 9)) == 9:
        made[draw(st.integers(0, 1))] |= {draw(st.sampled_from(sorted(made[0]))): draw(odd)}
    return made


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def from_the_schema(examples: int) -> Any:
    loaded = [0, 0]

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(trees, st.lists(tensors(), min_size=4, max_size=4), chunks())
    def run(scratch: Path, tree: Any, tensors: list[Json], chunks: list[Json]) -> None:
        path = scratch / "schema"
        shutil.rmtree(path, ignore_errors=True)
        forge(path, tree, tensors=tensors, chunks=chunks, data=padded(DATA, SECOND))
        loaded[read_in_every_way(path)] += 1

    return run, loaded


@pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support")
def test_records_of_the_schema(scratch: Path) -> None:
    run, loaded = from_the_schema(400)
    run(scratch)
    assert min(loaded) > 20, loaded  # neither all sound nor all refused


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support")
def test_many_records_of_the_schema(scratch: Path) -> None:
    run, _ = from_the_schema(10_000)
    run(scratch)


# -- from the golden checkpoints ------------------------------------------------------------------


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place in a JSON value: what holds it, and its key there."""
    if isinstance(value, dict):
        for key in value:
            yield value, key
            yield from places(value[key])
    elif isinstance(value, list):
        for i in range(len(value)):
            yield value, i
            yield from places(value[i])


def mutate(value: Any, pick: random.Random) -> None:
    """Change one place of a JSON value."""
    found = list(places(value))
    holder, key = pick.choice(found)
    old = holder[key]
    new = copy.deepcopy(pick.choice(ODD))
    match pick.randrange(6):
        case 0 if isinstance(old, int):
            new = old + pick.choice([-1, 1, 4096, -old, old])
        case 1:
            other, there = pick.choice(found)
            new = copy.deepcopy(other[there])
        case 2 if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(old))
            return
        case 3:
            del holder[key]
            return
        case 4 if isinstance(old, str) and old:
            at = pick.randrange(len(old))
            new = old[:at] + pick.choice("0x\0_é.") + old[at + 1 :]
    holder[key] = new


def mutants(name: str, seed: int, path: Path) -> None:
    """Write a mutation of a golden checkpoint: records, frames, or both; and sign it."""
    pick = random.Random(f"{name} {seed}")
    rank = json.loads((GOLDEN / name / "rank-00000.json").read_bytes())
    data = bytearray((GOLDEN / name / "rank-00000.data").read_bytes())
    if rank["chunks"] and pick.random() < 0.4:
        frame = pick.choice(rank["chunks"])
        start, stop = frame["offset"], frame["offset"] + frame["length"]
        for _ in range(pick.choice([1, 1, 4])):
            data[pick.randrange(start, min(stop, start + 64))] = pick.randrange(256)
        frame["xxh3_128"] = digest(bytes(data[start:stop]))
        if frame["coding"] == "raw":
            frame["raw_xxh3_128"] = frame["xxh3_128"]
    else:
        for _ in range(pick.choice([1, 1, 1, 2, 4])):
            mutate(rank, pick)
    forge_text(path, json.dumps(rank), bytes(data))
    if pick.random() < 0.1:
        text = (path / "checkpoint.json").read_text()
        first = json.loads(text)
        del first["xxh3_128"]
        mutate(first, pick)
        sign_text(path, json.dumps(first))


def run_mutants(scratch: Path, seeds: range) -> list[int]:
    loaded = [0, 0]
    for name in CHECKPOINTS:
        for seed in seeds:
            path = scratch / "mutant"
            mutants(name, seed, path)
            loaded[read_in_every_way(path)] += 1
            shutil.rmtree(path)
    return loaded


@pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support")
def test_mutated_golden_checkpoints(scratch: Path) -> None:
    loaded = run_mutants(scratch, range(50))
    assert min(loaded) > 20, loaded


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support")
def test_many_mutated_golden_checkpoints(scratch: Path) -> None:
    run_mutants(scratch, range(50, 4000))
