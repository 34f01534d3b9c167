"""Changes: what has not changed since an earlier save, as far as torch's version counters tell.

A tensor shares its counter with its views and with what ``detach()`` makes of it, and each
operation in place counts. Writes through ``.data``, NumPy, DLPack, a storage or another library's
kernel do not. So a counter is a hint here, by which leaves are laid out; only who asks for
``reuse="versions"`` has it decide what is saved. Pure: no threads, no files, no clock.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .chunks import Plan
from .flatten import Flat

_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})

_STILL_SAVES = 2
"""A leaf that was the same for so many saves is expected to stay so."""

_WORTH = 8
"""The layout is made anew if that moves an eighth of the state: it writes all of it once more."""

_FIRST_LOOK = 3


def _versions(values: Sequence[Any]) -> list[int | None]:
    """Return the counter of each tensor; None for what has none. HOT (per leaf)."""
    try:
        return [value._version if type(value) in _TENSORS else None for value in values]
    except RuntimeError:  # of inference mode
        return [
            value._version if type(value) in _TENSORS and not value.is_inference() else None
            for value in values
        ]


# -- a hint: how leaves are laid out ---------------------------------------------------------------


@dataclass(slots=True)
class Stillness:
    """Which leaves are expected to stay as they are; it learns from save to save.

    What it says changes seldom, and only if much is to be gained: chunks begin elsewhere then, so
    that the next save writes everything.
    """

    _names: list[str] = field(default_factory=list)
    _marks: list[int | None] = field(default_factory=list)
    _since: list[int] = field(default_factory=list)
    _said: list[bool] = field(default_factory=list)
    _saves: int = 0
    _next_look: int = _FIRST_LOOK

    def note(self, flat: Flat) -> list[bool]:
        """Return for each leaf of a state that is about to be saved whether it is still.

        Args:
            flat: ``frozen`` is what is known of its leaves beforehand.
        """
        marks = _versions(flat.values)
        if flat.names != self._names:
            self._names, self._said = flat.names, flat.frozen
            self._since = [0] * len(marks)
            self._saves, self._next_look = 0, _FIRST_LOOK
        else:
            self._since = [
                count + 1 if new is not None and new == old else 0
                for count, new, old in zip(self._since, marks, self._marks, strict=True)
            ]
        self._marks = marks
        self._saves += 1
        if self._saves >= self._next_look:
            self._next_look = 2 * self._saves
            self._look(flat)
        return self._said

    def _look(self, flat: Flat) -> None:
        found = [count >= _STILL_SAVES for count in self._since]
        total = moved = 0
        for new, old, value in zip(found, self._said, flat.values, strict=True):
            nbytes = value.nbytes if isinstance(value, torch.Tensor) else len(value)
            total += nbytes
            moved += nbytes * (new != old)
        if moved * _WORTH > total:
            self._said = found


# -- what decides: a parameter that nobody trains, and nothing was counted -------------------------


class Stepped:
    """The tensors that some optimizer of this process has stepped since this was made.

    Fused optimizers, and foreach ones on some devices, write without a word to the counters. So
    what they have is never told by these. The hook runs in whichever thread steps.
    """

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}
        self._noted: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        # a bound method would keep this alive for as long as torch is there
        me = weakref.ref(self)

        def hook(optimizer: Any, *_: Any) -> None:
            if (stepped := me()) is not None:
                stepped._note(optimizer)

        self._hook = register_optimizer_step_pre_hook(hook)
        weakref.finalize(self, self._hook.remove)

    def __contains__(self, storage: StorageWeakRef) -> bool:
        return storage.cdata in self._storages

    def _note(self, optimizer: Any) -> None:
        tensors = [each for group in optimizer.param_groups for each in group["params"]]
        if self._noted.get(optimizer) == len(tensors):
            return
        for tensor in tensors:
            if type(tensor) in _TENSORS and tensor.layout is torch.strided:
                storage = StorageWeakRef(tensor.untyped_storage())
                self._storages[storage.cdata] = storage
        self._noted[optimizer] = len(tensors)


class Versions:
    """Parameters of a state's modules as they were at a save: by storage, place and counter.

    Only those that no optimizer has stepped. Buffers are left out, which modules write to with
    kernels that do not count, and so is all else in the state. It keeps no tensor alive; a storage
    is told by a weak reference, so that another one at the same address is another one.
    """

    def __init__(self, flat: Flat, stepped: Stepped) -> None:
        self._storages: list[StorageWeakRef | None] = []
        self._marks: list[Any] = []
        modules = [each for each in flat.objects if isinstance(each, torch.nn.Module)]
        places = {
            tensor.data_ptr()
            for each in modules
            for tensor in each.parameters()
            if type(tensor) in _TENSORS and tensor.layout is torch.strided
        }
        for value, version in zip(flat.values, _versions(flat.values), strict=True):
            storage = mark = None
            is_tensor = version is not None and isinstance(value, torch.Tensor)
            if is_tensor and (place := value.data_ptr()) in places:  # type: ignore[union-attr]
                storage = StorageWeakRef(value.untyped_storage())  # type: ignore[union-attr]
                mark = None if storage in stepped else (storage.cdata, place, version)
            self._storages.append(storage)
            self._marks.append(mark)

    def unchanged(self, then: Versions, plan: Plan) -> Iterable[int]:
        """Yield the numbers of chunks of which nothing has changed since ``then``.

        Args:
            then: of a state that was saved by the same plan.
        """
        marks = zip(plan.layout.source_of, self._marks, then._marks, strict=True)
        changed = {source for source, now, old in marks if now is None or now != old}
        for chunk in plan.chunks:
            if all(piece.source not in changed for piece in chunk.pieces):
                yield chunk.index
