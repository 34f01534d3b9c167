"""Refusals: what to do about a value that cannot be saved. Pure."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ..format.files import MAX_DIMS
from ..format.tree import MAX_ONE_HASH


def type_name(value: Any) -> str:
    """Return what a value is, as messages say it."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def is_distributed(value: torch.Tensor) -> bool:
    """Whether a tensor is one rank's part of one of several ranks."""
    names = {kind.__name__ for kind in type(value).__mro__}
    return bool(names & {"DTensor", "ShardedTensor"})


def hint_for(value: Any) -> str:
    """Return what to do about a value that is no tensor."""
    if isinstance(value, memoryview):
        return "pass bytes(value)"
    if isinstance(value, np.ndarray):
        return "pass numpy.asarray(value), or what it is made of"
    if isinstance(value, np.random.BitGenerator):
        return "save the numpy.random.Generator that draws from it, or its .state"
    if callable(value):
        return "code is never saved: leave it out and make it anew when you load"
    return (
        "give it state_dict() and load_state_dict(), say with asyncsave.register() how it is "
        "saved, or save what it is made of; nothing is ever pickled"
    )


def tensor_refusal(value: torch.Tensor) -> tuple[str, str]:
    """Return what a tensor is that cannot be saved, and what to do about it."""
    name = type_name(value)
    if is_distributed(value):
        return name, (
            "it is one rank's part of a tensor, and many ranks cannot be saved yet; save "
            "value.full_tensor(), or value.to_local() on each rank to a path of its own"
        )
    if torch.nn.parameter.is_lazy(value):
        return name, "it has no shape yet: run the module once before it is saved"
    if value.is_meta:
        return f"{name} on the meta device", "it has no data: materialise it before saving"
    if value.layout is not torch.strided:
        return f"{name} of layout {value.layout}", "save value.to_dense(), or what it is made of"
    if value.is_quantized:
        scheme = f"{name} of {value.dtype}, {value.qscheme()}"
        return scheme, "save value.int_repr(), its scale and its zero point"
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"{name}, a tensor subclass", (
            "say with asyncsave.register() how it is saved, or save the plain tensors that it is "
            "made of, value.as_subclass(torch.Tensor) say"
        )
    if value.dim() > MAX_DIMS:
        return f"{name} of {value.dim()} dimensions", (
            f"a checkpoint allows {MAX_DIMS}; save value.flatten() and its shape"
        )
    return f"{name} of {value.dtype}", (
        "this version of asyncsave does not know the dtype; save value.view(dtype) with one of the "
        "same width, torch.int16 say"
    )


def one_hash(value: Iterable[Any]) -> tuple[int, int] | None:
    """Return how many keys (or items of a set) have the same hash, and that, if too many do."""
    hashes = [hash(key) for key in value]
    if len(set(hashes)) + MAX_ONE_HASH > len(hashes):
        return None
    (most, count), *_ = collections.Counter(hashes).most_common(1)
    return (count, most) if count > MAX_ONE_HASH else None
