"""Optimizers: what can be wrong with a saved one, before it is asked to load.

An optimizer may notice too late, in its next step or never, that its groups have other parameters
or that a parameter's state has another shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..format.leaf import Leaf
from ..format.tree import ListNode, Node, TensorNode, children, unwrapped
from .exact import is_stock
from .live import can_cast, dtype_name

_LIKE_THE_PARAMETER = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "variance"),
        *("square_avg", "grad_avg", "acc_delta", "sum", "ax", "prev", "step_size"),
    }
)
"""State that torch's own optimizers keep in the shape and dtype of the parameter."""

_SUMMED_UP = frozenset({"row_var", "col_var"})
"""Adafactor's, of the parameter's dtype, and with one dimension summed up."""

_OF_ITS_DTYPE = _LIKE_THE_PARAMETER | _SUMMED_UP


def optimizer_reasons(
    optimizer: torch.optim.Optimizer, node: Node, leaves: Sequence[Leaf], name: str
) -> list[str]:
    """Return the differences between an optimizer and a saved one that forbid to load it."""
    parts = dict(children(node))
    groups = parts.get("param_groups")
    shown = name or "the state itself"
    if not isinstance(groups, ListNode):
        return [f"{shown}: the state has an optimizer, the checkpoint has no param_groups there"]
    if len(groups.items) != len(optimizer.param_groups):
        return [
            f"{shown}: saved with {len(groups.items)} parameter groups, "
            f"the optimizer has {len(optimizer.param_groups)}"
        ]
    reasons = []
    for i, (group, live) in enumerate(zip(groups.items, optimizer.param_groups, strict=True)):
        count = len(_saved_params(group))
        if count != len(live["params"]):
            reasons.append(
                f"{shown}: parameter group {i} was saved with {count} parameters, "
                f"the optimizer has {len(live['params'])}"
            )
    if reasons:
        return reasons
    if any(param.is_meta for group in optimizer.param_groups for param in group["params"]):
        return [
            f"{shown}: the optimizer's parameters are on the meta device, where its state would be "
            "lost; call to_empty(device=…) on the model first, and make the optimizer from it"
        ]
    return [
        f"{name}{'.' if name else ''}state.{label}.{entry}: saved with shape {leaf.shape}, "
        f"the parameter that it is for has {list(param.shape)}"
        for label, entry, leaf, param in _entries(optimizer, node, leaves)
        if _is_torchs(optimizer) and not _may_be_for(entry, leaf.shape, list(param.shape))
    ]


def state_casts(
    optimizer: torch.optim.Optimizer, node: Node, leaves: Sequence[Leaf], cast: bool
) -> dict[tuple[str, str], tuple[str, torch.Tensor]]:
    """Return which floating state was saved with another dtype than the optimizer has it in.

    Only of those that torch's own ``load_state_dict`` loads: whoever else loads knows what it is.

    Args:
        node: records that `optimizer_reasons` has nothing against.
        cast: it may be converted.

    Returns:
        The saved dtype, and a tensor of the other one, by parameter and entry.
    """
    casts = {}
    for label, entry, leaf, param in _entries(optimizer, node, leaves):
        own, saved = _like(optimizer, param, entry, cast), leaf.dtype.name
        if own is not None and saved != dtype_name(own) and can_cast(saved, own):
            casts[label, entry] = saved, own
    return casts if is_stock(optimizer) else {}


def _like(
    optimizer: torch.optim.Optimizer, param: torch.Tensor, entry: str, cast: bool
) -> torch.Tensor | None:
    """Return a tensor of the dtype in which an optimizer keeps an entry, if that is known."""
    if entry == "step":
        return None  # a number, whatever holds it
    now = optimizer.state.get(param)
    own = now.get(entry) if isinstance(now, dict) else None
    if isinstance(own, torch.Tensor):
        return own
    # torch's steps fail where a moment is not of the parameter's dtype; others may want it to be
    # another, and are given what torch makes of it only if that was asked for
    follows = entry in _OF_ITS_DTYPE if _is_torchs(optimizer) else cast
    return param if follows else None


def _is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch has made an optimizer: of others, who knows what their state means."""
    return type(optimizer).__module__.startswith("torch.optim")


def _saved_params(group: Node) -> list[Node]:
    saved = dict(children(group)).get("params")
    return saved.items if isinstance(saved, ListNode) else []


def _entries(
    optimizer: torch.optim.Optimizer, node: Node, leaves: Sequence[Leaf]
) -> Iterator[tuple[str, str, Leaf, torch.Tensor]]:
    """Yield the tensors of a saved state: a parameter's name, the entry's, leaf, parameter."""
    parts = dict(children(node))
    state, groups = parts.get("state"), parts["param_groups"]
    keys = [key for _, group in children(groups) for key in _saved_params(group)]
    if not all(isinstance(key, (int, str)) for key in keys):
        return
    params = [param for group in optimizer.param_groups for param in group["params"]]
    labelled = dict(zip(map(str, keys), params, strict=True))
    for label, entries in children(unwrapped(state)):
        for entry, each in children(entries):
            if isinstance(each, TensorNode) and label in labelled:
                yield label, entry, leaves[each.i], labelled[label]


def _may_be_for(entry: str, shape: list[int], own: list[int]) -> bool:
    if entry in _LIKE_THE_PARAMETER:
        return shape == own
    if entry in _SUMMED_UP:
        return len(shape) == len(own) and all(
            size in (1, whole) for size, whole in zip(shape, own, strict=True)
        )
    return True
