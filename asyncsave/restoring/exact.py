"""Exact: what an optimizer has after loading is, to the bit, what was saved.

torch's ``Optimizer.load_state_dict`` converts state to the dtype of its parameter without a word,
so that float32 moments of a bfloat16 parameter lose the bits for which they are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

_HOOKS = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")


def is_stock(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch's own ``load_state_dict`` is all that loads an optimizer."""
    return _loads_as_torch_does(optimizer) and not _has_hooks(optimizer)


def _loads_as_torch_does(optimizer: torch.optim.Optimizer) -> bool:
    own = type(optimizer).load_state_dict
    return own is torch.optim.Optimizer.load_state_dict and "load_state_dict" not in vars(optimizer)


def _has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    return any(getattr(optimizer, name, None) for name in _HOOKS)


def make_exact(
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    casts: Mapping[tuple[str, str], torch.dtype],
) -> None:
    """Put what was saved in place of what ``load_state_dict(saved)`` has made of it.

    Args:
        casts: the dtypes of what is to be converted, by the parameter's name in ``saved`` and that
            of the entry.
    """
    for label, now, old in _pairs(optimizer, saved):
        for entry in now.keys() & old.keys():
            now[entry] = _exact(entry, now[entry], old[entry], casts.get((label, entry)))


def converted(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> list[str]:
    """Return which entries of a state that was loaded are of another floating dtype than saved."""
    return [
        f"state.{label}.{entry}"
        for label, now, old in _pairs(optimizer, saved)
        for entry in old
        if entry in now and _is_converted(now[entry], old[entry])
    ]


def way_back(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return what brings an optimizer back to what it is now.

    Loading replaces state and groups, and writes into none of the old ones: these are put back, and
    so is what a subclass keeps beside them.
    """
    before = dict(vars(optimizer))
    old = None if is_stock(optimizer) else optimizer.state_dict()

    def back() -> None:
        try:
            if old is not None:  # an own way to load, or a hook, may keep more elsewhere
                optimizer.load_state_dict(old)
        finally:
            if _loads_as_torch_does(optimizer):
                vars(optimizer).update(before)
        if old is not None:
            make_exact(optimizer, old, {})

    return back


def _pairs(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]
) -> Iterator[tuple[str, dict[Any, Any], dict[Any, Any]]]:
    """Yield the name of a parameter in ``saved``, what the optimizer has for it, what was saved."""
    state = saved.get("state")
    names = [name for group in saved["param_groups"] for name in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for name, param in zip(names, params, strict=False):
        old = state.get(name) if isinstance(state, dict) else None
        now = optimizer.state.get(param)
        if isinstance(old, dict) and isinstance(now, dict):
            yield str(name), now, old


def _exact(key: Any, now: Any, saved: Any, dtype: torch.dtype | None = None) -> Any:
    """Return what was saved, on the device where it is now; as it is now where that is no copy."""
    if isinstance(now, torch.Tensor) and isinstance(saved, torch.Tensor):
        dtype = dtype or saved.dtype
        # how a step is kept, and where, depends on fused and capturable: torch has seen to that
        if key == "step" or now.dtype == dtype or now.shape != saved.shape:
            return now
        return saved.to(now.device, dtype)
    if isinstance(now, dict) and isinstance(saved, dict):
        return {k: _exact(k, v, saved[k]) if k in saved else v for k, v in now.items()}
    if type(now) is type(saved) and type(now) in (list, tuple) and len(now) == len(saved):
        return type(now)(_exact(None, *each) for each in zip(now, saved, strict=True))
    return saved if isinstance(saved, str) else now  # of a text, torch makes that of a generator


def _is_converted(now: Any, saved: Any) -> bool:
    return (
        isinstance(now, torch.Tensor)
        and isinstance(saved, torch.Tensor)
        and now.dtype != saved.dtype
        and now.is_floating_point()
        and saved.is_floating_point()
    )
