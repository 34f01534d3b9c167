"""Late: which leaves may be copied while the next forward and backward pass runs; and which are
frozen. Pure.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

_log = logging.getLogger("asyncsave")

_PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


def late_copies(
    values: Sequence[Any],
    objects: Iterable[Any],
    owns: Callable[[torch.Tensor], bool],
    *,
    overlap: bool,
) -> tuple[list[bool], bool]:
    """Return for each leaf whether its copy may go on until the next ``optimizer.step()``.

    Args:
        values: the leaves.
        objects: those whose ``state_dict()`` was called for them.
        owns: says whether a tensor is on a device that copies asynchronously.
        overlap: False: none may.

    Returns:
        That, and whether any leaf is on such a device.
    """
    late = [False] * len(values)
    there = [
        (i, value)
        for i, value in enumerate(values)
        if isinstance(value, torch.Tensor) and owns(value)
    ]
    if overlap and there:
        stepped = {tensor.data_ptr() for each in objects for tensor in _stepped(each)}
        for i, value in there:
            # a tensor of inference mode has no version to compare
            late[i] = not value.is_inference() and value.data_ptr() in stepped
    return late, bool(there)


def frozen(values: Sequence[Any], objects: Sequence[Any]) -> list[bool]:
    """Return for each leaf whether it is not expected to change from one checkpoint to the next.

    So are the parameters of live modules that need no gradient; and those that no optimizer of the
    state has, of modules some of whose parameters one has. (An average has parameters of its own,
    and no optimizer.) It is no more than a guess: what is saved is told by its bytes.
    """
    try:
        places = set(_frozen_places(objects))
    except Exception as error:  # modules and optimizers may be anybody's
        _log.debug("which parameters are frozen is not known: %s", error)
        places = set()
    if not places:
        return [False] * len(values)
    return [_is_plain(value) and value.data_ptr() in places for value in values]


def _frozen_places(objects: Sequence[Any]) -> Iterator[int]:
    optimizers = [each for each in objects if isinstance(each, torch.optim.Optimizer)]
    groups = [group for each in optimizers for group in each.param_groups]
    held = {id(tensor) for group in groups for tensor in group["params"]}
    for module in objects:
        if isinstance(module, torch.nn.Module):
            tensors = list(module.parameters())
            is_trained = any(id(tensor) in held for tensor in tensors)
            for tensor in tensors:
                is_still = not tensor.requires_grad or (is_trained and id(tensor) not in held)
                if is_still and _is_plain(tensor) and tensor.data_ptr():
                    yield tensor.data_ptr()


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN_TENSORS and value.layout is torch.strided


def _stepped(each: Any) -> Iterator[torch.Tensor]:
    """Yield what only ``optimizer.step()`` changes of an object."""
    if isinstance(each, torch.nn.Module):
        yield from (tensor for tensor in each.parameters() if _is_plain(tensor))
    elif isinstance(each, torch.optim.Optimizer):
        for state in each.state.values():
            for value in state.values():
                if _is_plain(value):
                    yield value
