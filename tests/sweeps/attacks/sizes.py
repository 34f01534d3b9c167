"""Tensors that claim to be huge: to overflow a product, or to be allocated before a check."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from .forge import TENSOR, Attack, chunk, forge, padded, tensor

RECORDS: dict[str, dict[str, Any]] = {
    "2^62": tensor((2**62,)),
    "2^61": tensor((2**61,)),
    "2^64 wraps to 0": tensor((2**32, 2**32)),
    "2^64 + 4 wraps to 4": tensor((2**64 + 4,)),
    "product wraps to 4": tensor((2**33, 2**31 + 1, 4)),
    "elements wrap": tensor((2**61,), dtype="float64"),
    "negative": tensor((-4,)),
    "negative twice": tensor((-2, -2)),
    "one more": tensor((5,)),
    "start beyond": tensor((4,), 1),
    "start huge": tensor((4,), 2**63),
    "start negative": tensor((4,), -4),
    "strides huge": tensor((2, 2), strides=[2**61, 1]),
    "strides beyond": tensor((2, 2), strides=[3, 1]),
    "strides negative": tensor((2, 2), 3, strides=[-2, -1]),
    "strides too few": tensor((2, 2), strides=[1]),
    "strides too many": tensor((2, 2), strides=[2, 1, 1]),
    "65 dimensions": tensor((1,) * 65),
    "a million dimensions": tensor((1,) * 1_000_000),
    "numpy text": tensor((1,), kind="numpy", dtype="<U500000000"),
    "bytes of two dimensions": tensor((2, 2), kind="bytes"),
    "bytes with strides": tensor((2,), kind="bytes", strides=[1]),
    "no shard": tensor() | {"shards": []},
    "two shards": tensor() | {"shards": [{"start": 0}] * 2},
    "shard elsewhere": tensor() | {"shards": [{"start": 0, "offsets": [1]}]},
    "shard of other shape": tensor() | {"shards": [{"start": 0, "shape": [2**40]}]},
    "integers that want gradients": tensor(requires_grad=True),
    "array that wants gradients": tensor(dtype="<f4", shape=(1,), kind="numpy", requires_grad=True),
    "array that is a parameter": tensor(dtype="<f4", shape=(1,), kind="numpy", parameter=True),
}


def build(record: dict[str, Any], directory: Path) -> None:
    data = b"abcd"
    forge(directory, TENSOR, tensors=[record], chunks=[chunk(data)], data=padded(data))


ATTACKS = {name: Attack(partial(build, record)) for name, record in RECORDS.items()}
