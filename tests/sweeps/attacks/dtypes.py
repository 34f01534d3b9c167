"""Names of dtypes that are looked up, and find another thing: an attribute, a module, an object."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .forge import TENSOR, Attack, chunk, forge, padded, tensor

DATA = bytes(64)

# torch imports some of its modules, and warns of some of its names, when they are asked for
TORCH = ["__class__", "__builtins__", "load", "onnx", "_inductor", "_dynamo", "_export", "has_mps"]
TORCH += ["has_cuda", "float31", "os", "nn", "Tensor", "dtype", "qint8x", "complex512"]
NOT_EVEN_NAMES = ["", "a.b", "float32 ", "torch.float32", "nn.Linear", "float32\0", "x" * 100_000]
QUANTIZED = ["quint8", "qint8", "qint32", "quint4x2", "quint2x4"]


def node(name: str, directory: Path) -> None:
    forge(directory, {"t": "dtype", "name": name})


def of_tensor(kind: str, name: str, directory: Path) -> None:
    records = [tensor((1,), dtype=name, kind=kind)]
    forge(directory, TENSOR, tensors=records, chunks=[chunk(DATA)], data=padded(DATA))


ATTACKS = {
    **{f"value {n!r:.20}": Attack(partial(node, n), "UnsupportedVersionError") for n in TORCH},
    **{f"value {n!r:.20}": Attack(partial(node, n)) for n in NOT_EVEN_NAMES},
    **{f"value {n!r:.20}": Attack(partial(node, n), None) for n in QUANTIZED},
    **{
        f"tensor {n!r:.20}": Attack(partial(of_tensor, "torch", n), "UnsupportedVersionError")
        for n in [*TORCH, *QUANTIZED]
    },
    **{f"tensor {n!r:.20}": Attack(partial(of_tensor, "torch", n)) for n in NOT_EVEN_NAMES},
    "array of torch's": Attack(partial(of_tensor, "numpy", "bfloat16")),
    "tensor of NumPy's": Attack(partial(of_tensor, "torch", "<f4")),
    "bytes of floats": Attack(partial(of_tensor, "bytes", "float32")),
    "unknown kind": Attack(partial(of_tensor, "pickle", "float32")),
}
