"""Modules: a live module beside the records of its state dict.

Whether they are of the same module, though only one is wrapped; and whether filling what
``state_dict`` returns is all that loading would do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import LoadError
from ..format.build import IMPOSSIBLE, build_keys
from ..format.tree import DictNode, Node, OrderedDictNode
from ..state.values import TORCH

_DICTS = (DictNode, OrderedDictNode)
_PREFIXES = ("_orig_mod.", "module.")

_MOST_WRAPPERS = 8
"""So many of a checkpoint are looked into: each takes a copy of all names, however long."""


def unwrapped(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield ``module``, and what it is a wrapper of: torch.compile's, (D)DP's."""
    yield module
    # not imported: that takes a second, and where it was not, there is no such module
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    compiled = getattr(dynamo, "OptimizedModule", ())
    parallel = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    while isinstance(module, (compiled, *parallel)):
        inner = module._orig_mod if isinstance(module, compiled) else module.module
        assert isinstance(inner, torch.nn.Module)
        module = inner
        yield module


def common_prefix(names: list[str]) -> str | None:
    """Return the prefix of a wrapper that all ``names`` have, if there is one."""
    if names:
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in names):
                return prefix
    return None


def fills_in_place(module: torch.nn.Module, state: dict[str, Any]) -> bool:
    """Whether filling what ``state_dict`` returned is all that ``load_state_dict`` would do.

    Args:
        module: the module.
        state: its ``state_dict()``.
    """
    own = type(module).load_state_dict
    if own is not torch.nn.Module.load_state_dict or "load_state_dict" in vars(module):
        return False
    return all(map(_loads_plainly, module.modules())) and _is_memory_of(module, state)


def loaded_by_torch(module: torch.nn.Module, prefix: str = "") -> Iterator[str]:
    """Yield the names of those tensors that nobody's own code loads, and of no other shape.

    Not what is below a module with a hook or a way of its own, which may make what it likes of all
    that was saved below it.
    """
    own = type(module).load_state_dict
    if own is not torch.nn.Module.load_state_dict or not _loads_plainly(module):
        return
    for name in (*module._parameters, *module._buffers):
        yield prefix + name
    for name, child in module._modules.items():
        if child is not None:
            yield from loaded_by_torch(child, f"{prefix}{name}.")


def _loads_plainly(each: torch.nn.Module) -> bool:
    own = type(each)._load_from_state_dict
    if own is not torch.nn.Module._load_from_state_dict and not own.__module__.startswith(
        "torch.nn."
    ):
        return False
    if type(each).set_extra_state is not torch.nn.Module.set_extra_state:
        return False
    if type(each).state_dict is not torch.nn.Module.state_dict:
        return False
    if "_load_from_state_dict" in vars(each):
        return False
    hooks = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_hooks")
    return not any(getattr(each, name, None) for name in hooks)


def _is_memory_of(module: torch.nn.Module, state: dict[str, Any]) -> bool:
    """Whether every tensor of ``state`` is the memory of a parameter or buffer, not a copy."""
    own = set()
    for each in module.modules():
        for tensor in (*each._parameters.values(), *each._buffers.values()):
            if tensor is not None:
                own.add(_place(tensor))
    return all(isinstance(value, torch.Tensor) and _place(value) in own for value in state.values())


def _place(tensor: torch.Tensor) -> Any:
    # what has no storage to speak of is refused elsewhere, and must only be the same here
    bare = tensor.is_meta or tensor.layout is not torch.strided
    where = None if bare or is_traceable_wrapper_subclass(tensor) else tensor.data_ptr()
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return where, tensor.dtype, tensor.shape, strides, tensor.device


def entries(node: Node) -> dict[Any, Node]:
    """Return what a dict's record holds, by key; nothing for other records."""
    if not isinstance(node, _DICTS):
        return {}
    try:
        made = dict(zip(build_keys(node.keys, TORCH), node.values, strict=True))
    except IMPOSSIBLE as cause:
        if isinstance(cause, LoadError):
            raise
        raise LoadError(f"the checkpoint has a dict with a key that is none: {cause}") from cause
    if len(made) < len(node.keys):
        raise LoadError("the checkpoint has a dict with keys that are the same here")
    return made


def paired(into: torch.nn.Module, node: Node) -> tuple[torch.nn.Module, Any, Node]:
    """Return a module, its state and its records, out of the wrappers that only one side has."""
    first = into.state_dict()
    if not isinstance(first, dict) or not isinstance(node, _DICTS):
        return into, first, node
    for module in unwrapped(into):
        state = first if module is into else module.state_dict()
        for saved in _stripped(node):
            if state.keys() & set(build_keys(saved.keys, TORCH)):
                return module, state, saved
    return into, first, node


def _stripped(node: Any) -> Iterator[Any]:
    """Yield a state dict's node, and without the prefix of a wrapper that all its keys have."""
    yield node
    for _ in range(_MOST_WRAPPERS):
        texts = all(type(key) is str for key in node.keys)
        if not texts or not (prefix := common_prefix(node.keys)):
            return
        metadata = node.metadata if isinstance(node, OrderedDictNode) else None
        keys: list[Any] = [key.removeprefix(prefix) for key in node.keys]
        node = OrderedDictNode(keys, node.values, _stripped_metadata(metadata, prefix))
        yield node


def _stripped_metadata(metadata: Node, prefix: str) -> Node:
    """Return what a wrapper's ``_metadata`` says of the module in it."""
    if not isinstance(metadata, _DICTS):
        return metadata
    pairs = [
        ("" if f"{key}." == prefix else key.removeprefix(prefix), value)
        for key, value in zip(metadata.keys, metadata.values, strict=True)
        if isinstance(key, str) and f"{key}.".startswith(prefix)
    ]
    return DictNode([key for key, _ in pairs], [value for _, value in pairs])
