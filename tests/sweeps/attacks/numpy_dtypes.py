"""Texts that NumPy makes dtypes of: of objects, of records, of other sizes, or with a warning."""

from __future__ import annotations

import base64
from functools import partial
from pathlib import Path

from .dtypes import of_tensor
from .forge import Attack, forge

NUMPY = ["|O", "O", "object", "|O8", "|V8", "V8", "f4,f4", "f4,O", "(2,)f4", "(1000000000,)f8"]
NUMPY += [
    "a5",
    "c",
    "a",
    "B",
    "p",
    "Bool",
    "float32",
    "<f3",
    "=f4",
    "f4",
    "|f4",
    "<i16",
    "<U0",
    "|S0",
]
NUMPY += ["<M8[s/3]", "<M8[99999999999s]", "<M8[0s]", "<M8[x]", "<M8[s]//7", "<U99999999999999999"]
NUMPY += [
    "<U-1",
    "{'names':['a'],'formats':['O']}",
    "__class__",
    "[('a','O')]",
    "",
    "T",
    "StringDType()",
]
NUMPY += ["<f4\0", "<f4 ", " <f4", "<b1", ">u1", "\uff1cf4", "<f\u0664"]


def scalar(name: str, size: int, directory: Path) -> None:
    data = base64.b64encode(bytes(size)).decode()
    forge(directory, {"t": "numpy", "dtype": name, "data": data})


ATTACKS = {
    **{f"array {n!r:.40}": Attack(partial(of_tensor, "numpy", n)) for n in NUMPY},
    **{f"scalar {n!r:.40}": Attack(partial(scalar, n, 8)) for n in NUMPY},
    "scalar too long": Attack(partial(scalar, "<f4", 5)),
    "scalar too short": Attack(partial(scalar, "<f4", 0)),
    "characters beyond Unicode": Attack(
        lambda directory: forge(directory, {"t": "numpy", "dtype": "<U1", "data": "/////w=="})
    ),
}
