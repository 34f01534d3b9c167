"""Leaf: a value with bulk in a checkpoint, as validation has found it: all that is known of it."""

from __future__ import annotations

import msgspec

from .dtypes import Dtype


class Leaf(msgspec.Struct, frozen=True, gc=False):
    """A tensor, an array or a long bytes value of a checkpoint.

    Made by `checked.py` alone: what it says was checked, and is not asked of the records again.

    Attributes:
        index: its number in its rank's manifest, which is the ``i`` of a TensorNode.
        name: its fqn.
        kind: ``torch``, ``numpy`` or ``bytes``: what the value was.
        dtype: the row of its dtype: name, element size, NumPy's name.
        shape: its sizes.
        strides: the step of each dimension, in elements; None: elements lie in row-major order.
        start: the address of its first element, in bytes, in its rank's address space.
        stop: the address behind its last element; ``start`` if it is empty.
        requires_grad: as in torch.
        parameter: it was a ``torch.nn.Parameter``.
        rank: whose address space it lies in.
    """

    index: int
    name: str
    kind: str
    dtype: Dtype
    shape: list[int]
    strides: list[int] | None
    start: int
    stop: int
    requires_grad: bool = False
    parameter: bool = False
    rank: int = 0

    @property
    def nbytes(self) -> int:
        """How many bytes of address space it reaches over; 0 if it is empty."""
        return self.stop - self.start
