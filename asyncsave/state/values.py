"""Values: torch's side of the names in a checkpoint, its dtypes, sizes and devices.

The format's rooms know the names alone (format/dtypes.py, format/tree.py). Pure: no threads, no
files, no clock.
"""

from __future__ import annotations

import torch

from ..errors import UnsupportedVersionError
from ..format.tree import Values
from .classes import typed
from .kinds import made

# Not getattr(torch, …): torch imports modules, and warns, when it is asked for some names.
TORCH_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
"""Those of this torch, by name; some cannot be the dtype of what is saved, see format/dtypes.py."""


def torch_dtype(name: str, what: str) -> torch.dtype:
    """Return the dtype of a name that the format knows.

    Args:
        what: what is of that dtype, for the error.

    Raises:
        UnsupportedVersionError: this torch has none of that name.
    """
    if name not in TORCH_DTYPES:
        raise UnsupportedVersionError(
            f"{what} has dtype {name}, which this torch does not know: install a newer one"
        )
    return TORCH_DTYPES[name]


def _dtype(name: str) -> torch.dtype:
    return torch_dtype(name, "a value of the checkpoint")


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as cause:
        raise UnsupportedVersionError(
            f"the checkpoint names the device {name}, which this torch does not know: install "
            "or import what knows it"
        ) from cause


TORCH = Values(size=torch.Size, dtype=_dtype, device=_device, made=made, typed=typed)
"""Makes the plain values that are torch's own; UnsupportedVersionError for names it has not."""
