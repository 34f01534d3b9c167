"""Optimizers: what can be wrong with a saved one, before it is asked to load.

An optimizer may notice too late, in its next step or never, that its groups have other parameters
or that a parameter's state has another shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..format.leaf import Leaf
from ..format.tree import ListNode, Node, ObjectNode, TensorNode, children

_LIKE_THE_PARAMETER = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "variance"),
        *("square_avg", "grad_avg", "acc_delta", "sum", "ax", "prev", "step_size"),
    }
)
"""State that torch's own optimizers keep in the shape of the parameter."""


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
    saved_params: list[Node] = []
    for i, (group, live) in enumerate(zip(groups.items, optimizer.param_groups, strict=True)):
        saved = dict(children(group)).get("params")
        items = saved.items if isinstance(saved, ListNode) else []
        saved_params.extend(items)
        if len(items) != len(live["params"]):
            reasons.append(
                f"{shown}: parameter group {i} was saved with {len(items)} parameters, "
                f"the optimizer has {len(live['params'])}"
            )
    if reasons:
        return reasons
    params = list(itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups))
    if any(param.is_meta for param in params):
        return [
            f"{shown}: the optimizer's parameters are on the meta device, where its state would be "
            "lost; call to_empty(device=…) on the model first, and make the optimizer from it"
        ]
    if not type(optimizer).__module__.startswith("torch.optim"):
        return []  # who knows what its state means
    by_key = dict(zip(saved_params, params, strict=True)) if _are_keys(saved_params) else {}
    return list(_shape_reasons(by_key, parts.get("state"), leaves, name))


def _are_keys(nodes: Sequence[Node]) -> bool:
    return all(isinstance(node, (int, str)) for node in nodes)


def _shape_reasons(
    params: dict[Any, torch.Tensor], state: Node, leaves: Sequence[Leaf], name: str
) -> Iterator[str]:
    labelled = {str(key): param for key, param in params.items()}
    for label, entries in children(state.state if isinstance(state, ObjectNode) else state):
        param = labelled.get(label)
        if param is None:
            continue
        for entry, node in children(entries):
            if not isinstance(node, TensorNode):
                continue
            shape, own = leaves[node.i].shape, list(param.shape)
            if not _may_be_for(entry, shape, own):
                yield (
                    f"{name}{'.' if name else ''}state.{label}.{entry}: saved with shape {shape}, "
                    f"the parameter that it is for has {own}"
                )


def _may_be_for(entry: str, shape: list[int], own: list[int]) -> bool:
    if entry in _LIKE_THE_PARAMETER:
        return shape == own
    if entry in ("row_var", "col_var"):  # Adafactor's, with one dimension summed up
        return len(shape) == len(own) and all(
            size in (1, whole) for size, whole in zip(shape, own, strict=True)
        )
    return True
