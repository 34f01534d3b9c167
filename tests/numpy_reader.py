"""A reader of asyncsave checkpoints that needs neither torch nor asyncsave. Written from FORMAT.md.

`read` returns the saved tree with NumPy arrays in place of tensors: views of one buffer, so that
ties stay ties. Elements of dtypes that NumPy lacks are their bits, as unsigned integers.
"""

import base64
import json
import re
import struct
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import zstandard
from xxhash import xxh3_128_hexdigest as digest

BITS = {"bool": "?", "bfloat16": "<u2", "bits16": "<u2", "complex32": "<u4", "bcomplex32": "<u4"}
BYTE = re.compile(r"u?int[1-7]|bits(8|\dx\d)|float8_\w+|float4_\w+")


def check(condition, what):
    if not condition:
        raise ValueError(f"the checkpoint is damaged, or of another format: {what}")


def read(path):
    first = Path(path, "checkpoint.json").read_bytes()
    check(first[:45] == b'{"xxh3_128":"%s' % digest(first[45:]).encode(), "checkpoint.json")
    checkpoint = json.loads(first)
    check(checkpoint["format"] == checkpoint["world_size"] == 1, "format")
    second = Path(path, "rank-00000.json").read_bytes()
    check(digest(second) == checkpoint["ranks"][0]["xxh3_128"], "rank manifest")
    manifest = json.loads(second)
    data = Path(path, "rank-00000.data").read_bytes()
    chunks = [decode(data, chunk) for chunk in manifest["chunks"]]
    memory = np.concatenate([np.empty(0, "u1"), *chunks])
    return build(manifest["tree"], [tensor(record, memory) for record in manifest["tensors"]])


def decode(data, chunk):
    frame = data[chunk["offset"] : chunk["offset"] + chunk["length"]]
    check(digest(frame) == chunk["xxh3_128"], f"frame at {chunk['offset']}")
    kind, _, base = chunk["coding"].partition(".")
    width = {"raw": 1, "zstd": 1, "exp16": 2, "exp32": 4}.get(kind) or int(kind[-1])
    n, h = chunk["raw_length"] // width, chunk["raw_length"] // width // 2
    lengths = {"exp16": [n, n - h, h], "exp32": [2 * n, n, n - h, h]}.get(kind, [n] * width)
    planes = []
    for length, part in zip(lengths, chunk["parts"], strict=True):
        plane, frame = frame[:part], frame[part:]
        if part < length:
            plane = zstandard.ZstdDecompressor().decompress(plane)
        check(len(plane) == length, "length of a plane")
        planes.append(np.frombuffer(plane, "u1"))
    if base:
        *rest, low, second, third = planes
        head = third % 16 * 16 + second[:h] % 16
        tail = third // 16 * 16 + second[:h] // 16
        high = np.concatenate([head, second[h:], tail]) - np.uint8(int(base))
        halves = high.astype("<u2") << 8 | low
        planes = [*(plane.view("<u2") for plane in rest), halves >> 1 | halves << 15]
    raw = np.stack(planes, axis=-1).reshape(-1).view("u1")
    check(digest(raw.data) == chunk["raw_xxh3_128"], f"chunk at {chunk['offset']}")
    return raw


def tensor(record, memory):
    name, shard = record["dtype"], record["shards"][0]
    dtype = np.dtype("u1" if BYTE.fullmatch(name) else BITS.get(name, name))
    steps = [dtype.itemsize * step for step in shard.get("strides", [])] or None
    array = np.ndarray(record["shape"], dtype, memory, shard["start"], steps)
    return array.tobytes() if record.get("kind") == "bytes" else array


def build(node, bulk):
    if not isinstance(node, dict):
        return node
    form, data = node.get("hex", ""), base64.b64decode(node.get("data", ""))
    keys, values, items = (
        [build(item, bulk) for item in node.get(part, [])] for part in ("keys", "values", "items")
    )
    return {
        "tensor": lambda: bulk[node["i"]],
        "dict": lambda: dict(zip(keys, values, strict=True)),
        "odict": lambda: OrderedDict(zip(keys, values, strict=True)),
        "list": lambda: items,
        "tuple": lambda: tuple(items),
        "namedtuple": lambda: namedtuple(node["name"], node["fields"])(*items),
        "object": lambda: build(node["state"], bulk),
        "int": lambda: int(form, 16),
        "float": lambda: struct.unpack(">d", bytes.fromhex(form))[0],
        "complex": lambda: complex(*struct.unpack(">dd", bytes.fromhex(form))),
        "bytes": lambda: data,
        "str": lambda: data.decode("utf-8", "surrogatepass"),
        "size": lambda: tuple(node["dims"]),
        "numpy": lambda: np.frombuffer(data, node["dtype"])[0],
        "dtype": lambda: node["name"],
        "device": lambda: node["name"],
    }[node["t"]]()
