"""Kinds: torch's further types, taken apart into plainer ones and made again.

What FORMAT.md lists under their names is said in format/kinds.py; here is how torch does it. The
tensors that one is made of share its memory where torch lets them, so that they are filled in place
when a state is restored. Pure: no threads, no files, no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import LoadError

LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
FORMATS = {
    str(value): value for value in vars(torch).values() if isinstance(value, torch.memory_format)
}

_COMPRESSED: dict[Any, tuple[str, str]] = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}

Parts = tuple[str, Any, Any]
"""The name of a type, what a value of it is made of, and the rest."""


def tensor_parts(value: torch.Tensor) -> Parts | None:
    """Return what a tensor is made of that is no plain strided memory; None: nothing is known.

    The rest is ``(requires_grad, is a Parameter)``.
    """
    if value.is_meta:
        return None
    args = (value.requires_grad, isinstance(value, torch.nn.Parameter))
    value = value.detach()
    if value.layout is torch.sparse_coo:
        of = {
            "indices": value._indices(),
            "values": value._values(),
            "size": value.size(),
            "is_coalesced": value.is_coalesced(),
        }
        return "torch.sparse_coo", of, args
    if value.layout in _COMPRESSED:
        of = {
            "compressed_indices": getattr(value, _COMPRESSED[value.layout][0])(),
            "plain_indices": getattr(value, _COMPRESSED[value.layout][1])(),
            "values": value.values(),
            "size": value.size(),
        }
        return str(value.layout), of, args
    if value.is_nested:
        return _nested_parts(value, args)
    if value.is_quantized and type(value) is torch.Tensor:
        return _quantized_parts(value, args)
    return None


def _nested_parts(value: Any, args: Any) -> Parts:
    if value.layout is torch.jagged:
        of = {
            "values": value.values(),
            "offsets": value.offsets(),
            "lengths": value.lengths(),
            "ragged_dim": value._ragged_idx,
        }
        return "torch.jagged", of, args
    return "torch.nested", list(value.unbind()), args


_QUANTIZED = frozenset({torch.quint8, torch.qint8, torch.qint32})


def _quantized_parts(value: torch.Tensor, args: Any) -> Parts | None:
    if value.dtype not in _QUANTIZED:
        return None
    if value.qscheme() == torch.per_tensor_affine:
        of: Any = {
            "int_repr": value.int_repr(),
            "scale": value.q_scale(),
            "zero_point": value.q_zero_point(),
        }
        return "torch.per_tensor_affine", of, args
    if value.qscheme() == torch.per_channel_affine:
        of = {
            "int_repr": value.int_repr(),
            "scales": value.q_per_channel_scales(),
            "zero_points": value.q_per_channel_zero_points(),
            "axis": value.q_per_channel_axis(),
        }
        return "torch.per_channel_affine", of, args
    return None


def wrapper_parts(value: Any) -> dict[str, Any]:
    """Return what a traceable subclass is made of, by what ``__tensor_flatten__`` says."""
    names, context = value.__tensor_flatten__()
    return {
        "tensors": {name: getattr(value, name) for name in names},
        "context": context,
        "size": value.size(),
        "stride": tuple(value.stride()),
        "requires_grad": value.requires_grad,
        "parameter": isinstance(value, torch.nn.Parameter),
    }


def is_wrapper(value: Any) -> bool:
    """Whether a tensor is a traceable subclass: it is made of other tensors, and says of which."""
    return not value.is_nested and is_traceable_wrapper_subclass(value)


def plain_memory(value: torch.Tensor) -> torch.Tensor | None:
    """Return the plain tensor that one of a subclass is, if it is no more than that.

    None: the subclass has a mind of its own, or attributes beside its memory.
    """
    own = type(value)
    if (
        own.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        or torch.nn.parameter.is_lazy(value)
        or vars(value).keys() - {"_is_param"}
    ):
        return None
    bare = value.detach().as_subclass(torch.Tensor)
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(bare, requires_grad=value.requires_grad)
    return bare.requires_grad_(value.requires_grad) if value.requires_grad else bare


# -- made again -----------------------------------------------------------------------------------


def made(name: str, of: Any, args: Any) -> Any:
    """Return the value of one of torch's types, of its name, its parts, and the rest.

    Raises:
        LoadError: this torch, or this machine, has none of it.
        ValueError, TypeError, RuntimeError, LookupError: it cannot be.
    """
    if name == "torch.layout":
        return _named(LAYOUTS, of)
    if name == "torch.memory_format":
        return _named(FORMATS, of)
    if name == "torch.Generator":
        return _generator(of)
    requires_grad, is_parameter = args
    with torch.inference_mode(False):
        value = _MAKERS[name](of)
    if is_parameter:
        return torch.nn.Parameter(value, requires_grad=bool(requires_grad))
    return value.requires_grad_() if requires_grad else value


def _named(known: dict[str, Any], name: Any) -> Any:
    if name not in known:
        raise LoadError(f"the checkpoint names {name!r:.80}, which this torch does not know")
    return known[name]


def _generator(of: Any) -> torch.Generator:
    if not isinstance(of["device"], torch.device):
        raise TypeError("a generator on what is no device")
    try:
        made = torch.Generator(of["device"])
    except RuntimeError as cause:
        raise LoadError(
            f"the checkpoint has a torch.Generator of the device {of['device']}, which is not "
            "here; load without it, with keys="
        ) from cause
    made.set_state(_tensor(of["state"]).cpu())
    return made


def _sparse_coo(of: Any) -> torch.Tensor:
    indices = _tensor(of["indices"])
    if indices.dtype is not torch.int64:
        raise TypeError(f"indices of {indices.dtype}")
    return torch.sparse_coo_tensor(
        indices,
        _tensor(of["values"]),
        of["size"],
        is_coalesced=of["is_coalesced"] is True,
        check_invariants=True,
    )


def _compressed(layout: torch.layout) -> Callable[[Any], torch.Tensor]:
    def made(of: Any) -> torch.Tensor:
        return torch.sparse_compressed_tensor(
            _tensor(of["compressed_indices"]),
            _tensor(of["plain_indices"]),
            _tensor(of["values"]),
            of["size"],
            layout=layout,
            check_invariants=True,
        )

    return made


def _per_tensor(of: Any) -> Any:
    return torch._make_per_tensor_quantized_tensor(
        _tensor(of["int_repr"]), of["scale"], of["zero_point"]
    )


def _per_channel(of: Any) -> Any:
    ints, axis = _tensor(of["int_repr"]), of["axis"]
    scales, zero_points = _tensor(of["scales"]), _tensor(of["zero_points"])
    if type(axis) is not int or not 0 <= axis < ints.dim():
        raise ValueError(f"the axis {axis!r:.20} of a tensor of {ints.dim()} dimensions")
    if scales.shape != (ints.shape[axis],) or zero_points.shape != scales.shape:
        raise ValueError("not one scale and zero point for each channel")
    return torch._make_per_channel_quantized_tensor(ints, scales, zero_points, axis)


def _nested(of: Any) -> Any:
    return torch.nested.nested_tensor([_tensor(item) for item in of])


def _jagged(of: Any) -> Any:
    values, offsets, dim = _tensor(of["values"]), _tensor(of["offsets"]), of["ragged_dim"]
    lengths = None if of["lengths"] is None else _tensor(of["lengths"])
    if type(dim) is not int or not 1 <= dim <= values.dim():
        raise ValueError(f"the ragged dimension {dim!r:.20}")
    # torch believes these, and would read beyond the values
    marks = offsets if lengths is None else torch.stack([offsets[:-1], offsets[:-1] + lengths])
    if offsets.dim() != 1 or not offsets.numel() or offsets.is_floating_point():
        raise ValueError("the offsets of a jagged tensor")
    if bool((offsets.diff() < 0).any()) or int(marks.min()) < 0:
        raise ValueError("the offsets of a jagged tensor, which go back")
    if int(marks.max()) > values.shape[dim - 1]:
        raise ValueError("the offsets of a jagged tensor, which go beyond its values")
    return torch.nested.nested_tensor_from_jagged(values, offsets, lengths, jagged_dim=dim)


def _tensor(value: Any) -> torch.Tensor:
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(f"a {type(value).__name__} in place of a tensor")
    return value.detach()  # type: ignore[no-any-return]


_MAKERS: dict[str, Callable[[Any], Any]] = {
    "torch.sparse_coo": _sparse_coo,
    **{str(layout): _compressed(layout) for layout in _COMPRESSED},
    "torch.per_tensor_affine": _per_tensor,
    "torch.per_channel_affine": _per_channel,
    "torch.nested": _nested,
    "torch.jagged": _jagged,
}
