"""Tensors: the bytes of one, as they are. Pure: no threads, no files, no clock."""

from __future__ import annotations

import torch

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The dtype of the same width, in bytes, whose copies are plain moves."""


def byte_alias(tensor: torch.Tensor, offset: int, nbytes: int) -> torch.Tensor:
    """Return ``nbytes`` of a tensor's storage from byte ``offset``, as uint8, sharing memory."""
    alias = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), offset, (nbytes,), (1,))
