"""Restore: a checkpoint back into values. ``load``, ``restore`` and ``verify``.

`load` builds new tensors: leaves whose addresses overlap become views of one new storage, so ties
come back as ties.

`restore` fills what is there, all or nothing. It walks the live objects and the checkpoint's tree
side by side and lists every difference before it begins; then it reads all stored bytes against
their checksums, lets objects that load by themselves do so (and puts them back if one refuses), and
only then decodes into the live tensors.
"""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import (
    CheckpointNotFoundError,
    ConfigError,
    FormatError,
    IntegrityError,
    LoadError,
    MismatchError,
    UnsupportedVersionError,
)
from .report import VerifyReport
from .snapshot.snapshotter import INTEGERS, byte_alias
from .state.plan import dtype_name
from .state.tree import (
    DictNode,
    ListNode,
    NamedTupleNode,
    Node,
    ObjectNode,
    OrderedDictNode,
    TensorNode,
    TupleNode,
    bulk_indices,
    children,
    numpy_dtype,
    select,
    unflatten,
)
from .storage.filesystem import FileSystem, LocalFileSystem
from .storage.manifest import TensorRecord, extent_bytes, item_bytes
from .storage.reader import Bytes, Checkpoint, Run, find

_log = logging.getLogger("asyncsave")

PathLike = str | os.PathLike[str]
PassedOver = Callable[[Path, str], None]


def load(
    path: PathLike,
    *,
    keys: str | Sequence[str] | None = None,
    device: str | torch.device = "cpu",
) -> Any:
    """Return the state in a checkpoint as it was saved, in new tensors.

    Args:
        path: a checkpoint, or a run directory: then the newest checkpoint that verifies.
        keys: a glob or a list of globs of fqns (``"model.*"``); only the chunks they need are read.
            Dicts then have only what was asked for, and lists and tuples None in place of the rest.
        device: where tensors go; arrays and plain values stay where they are.

    Returns:
        The tree that was saved. Objects that were saved through ``state_dict()`` are what that
        returned; NamedTuples are of a new type with the same names.

    Raises:
        CheckpointNotFoundError, FormatError, IntegrityError: see `asyncsave.errors`.
        MismatchError: ``keys`` names something that is not there.
    """
    return load_from(LocalFileSystem(), Path(path), keys=keys, device=device)


def restore(path: PathLike, into: Any, *, strict: bool = True) -> int | None:
    """Fill ``into`` from a checkpoint, all or nothing, and return its step.

    Tensors and arrays are filled in place; plain values inside dicts and lists are replaced, and so
    is None by whatever was saved; an empty dict or list takes all that was saved there; objects
    with ``load_state_dict`` have it called, except that plain modules are filled in place, which
    comes to the same and needs no second copy.

    Args:
        path: a checkpoint, or a run directory: then the newest checkpoint that verifies.
        into: a state of the same structure as the one that was saved.
        strict: raise if names are missing on either side; if False, what both have is restored.
            Shapes and dtypes must agree in any case.

    Returns:
        The step, or None if the checkpoint was saved without one.

    Raises:
        MismatchError: the checkpoint does not fit; every difference is listed, nothing was changed.
        CheckpointNotFoundError, FormatError, IntegrityError: see `asyncsave.errors`. Stored bytes
            were all checked before anything was changed.
    """
    return restore_from(LocalFileSystem(), Path(path), into, strict=strict)


def verify(path: PathLike) -> VerifyReport:
    """Read and decode every byte of a checkpoint, or of all those in a run directory.

    Raises:
        IntegrityError, FormatError: the first damage found in each damaged checkpoint; if several
            are damaged, the error is the newest one's and the others are in its notes.
        CheckpointNotFoundError: there is no checkpoint.
    """
    began = time.perf_counter()
    filesystem = LocalFileSystem()
    paths, damage = [], []
    chunks = raw_bytes = stored_bytes = 0
    for each in find(filesystem, Path(path)):
        try:
            with Checkpoint.open(filesystem, each) as checkpoint:
                checkpoint.check(decode=True)
                chunks += len(checkpoint.rank.chunks)
                raw_bytes += sum(chunk.raw_length for chunk in checkpoint.rank.chunks)
                stored_bytes += checkpoint.stored_bytes
            paths.append(each)
        except LoadError as error:
            damage.append((each, error))
    if damage:
        for each, older in damage[1:]:
            damage[0][1].add_note(f"also damaged: {each}: {older}")
        raise damage[0][1]
    seconds = time.perf_counter() - began
    return VerifyReport(tuple(reversed(paths)), chunks, raw_bytes, stored_bytes, seconds)


# -- with any filesystem ----------------------------------------------------------------------


def load_from(
    filesystem: FileSystem,
    path: Path,
    *,
    keys: str | Sequence[str] | None,
    device: str | torch.device,
    passed_over: PassedOver | None = None,
) -> Any:
    """Do what `load` says; tell ``passed_over`` which checkpoints could not be used, and why."""
    where = _device(device)

    def one(checkpoint: Checkpoint) -> Any:
        tree = checkpoint.rank.tree
        if keys is not None:
            tree, unused = select(tree, keys)
            if unused:
                raise MismatchError(
                    f"{checkpoint.path} has nothing that these keys name:",
                    _suggest(checkpoint, unused),
                )
        bulk = _read_new(checkpoint, sorted(set(bulk_indices(tree))), where)
        return unflatten(tree, bulk.__getitem__)

    return _first_sound(filesystem, path, one, passed_over)


def restore_from(
    filesystem: FileSystem,
    path: Path,
    into: Any,
    *,
    strict: bool,
    passed_over: PassedOver | None = None,
) -> int | None:
    """Do what `restore` says; tell ``passed_over`` which checkpoints could not be used, and why."""

    def one(checkpoint: Checkpoint) -> int | None:
        match = _Match(checkpoint, strict)
        match.root(into)
        if match.reasons:
            raise MismatchError(f"{checkpoint.path} does not fit the state:", match.reasons)
        if match.fills:
            checkpoint.check()  # all stored bytes, before the first one of the state is changed
        _apply(checkpoint, match)
        return checkpoint.record.step

    step: int | None = _first_sound(filesystem, path, one, passed_over)
    return step


def _first_sound(
    filesystem: FileSystem,
    path: Path,
    use: Callable[[Checkpoint], Any],
    passed_over: PassedOver | None,
) -> Any:
    """Use the newest checkpoint that is not damaged; raise the newest one's error if all are."""
    errors: list[LoadError] = []
    for each in find(filesystem, path):
        try:
            with Checkpoint.open(filesystem, each) as checkpoint:
                result = use(checkpoint)
        except UnsupportedVersionError:
            raise  # it is sound: going on from an older one would lose work without a word
        except (IntegrityError, FormatError, CheckpointNotFoundError) as error:
            errors.append(error)
            if each != path:
                _log.warning("passed over %s: %s", each, error)
                if passed_over is not None:
                    passed_over(each, str(error))
            continue
        if errors:
            _log.warning("used %s instead", each)
        return result
    for older in errors[1:]:
        errors[0].add_note(f"and the one before: {older}")
    raise errors[0]


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as cause:
        raise ConfigError(f"device={device!r} is not a device: {cause}") from cause


def _suggest(checkpoint: Checkpoint, unused: list[str]) -> list[str]:
    import difflib

    names = [tensor.name for tensor in checkpoint.rank.tensors]
    lines = []
    for key in unused:
        close = difflib.get_close_matches(key, names, 3, 0.5) or names[:3]
        lines.append(f"{key!r}; there are {', '.join(map(repr, close))} …" if close else repr(key))
    return lines


# -- new tensors ------------------------------------------------------------------------------


def _read_new(
    checkpoint: Checkpoint, indices: Sequence[int], device: torch.device
) -> dict[int, Any]:
    """Read these leaves into new memory; leaves that overlap share it, as they did when saved."""
    tensors = checkpoint.rank.tensors
    blocks: list[_Block] = []
    for i in sorted(indices, key=lambda i: tensors[i].shards[0].start):
        start = tensors[i].shards[0].start
        stop = start + extent_bytes(tensors[i])
        if start == stop or not blocks or start >= blocks[-1].stop or blocks[-1].empty:
            blocks.append(_Block(start, stop))
        blocks[-1].stop = max(blocks[-1].stop, stop)
        blocks[-1].members.append(i)
    runs = []
    for block in blocks:
        block.allocate(tensors)
        runs.append(Run(block.start, block.stop - block.start, block.array()))
    checkpoint.read(runs)
    made: dict[int, Any] = {}
    for block in blocks:
        if device.type != "cpu" and all(tensors[i].kind == "torch" for i in block.members):
            block.memory = block.memory.to(device)
        for i in block.members:
            made[i] = block.value(tensors[i])
    return made


class _Block:
    """Memory for addresses that were one piece of memory when they were saved."""

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop
        self.members: list[int] = []
        self.memory = torch.empty(0, dtype=torch.uint8)
        self._pad = 0

    @property
    def empty(self) -> bool:
        return self.start == self.stop

    def allocate(self, tensors: Sequence[TensorRecord]) -> None:
        """Take memory such that every member is aligned to its elements."""
        items = [(tensors[i].shards[0].start, item_bytes(tensors[i])) for i in self.members]
        items = [(start, width) for start, width in items if width <= 16]
        for pad in range(16):
            if all((start - self.start + pad) % width == 0 for start, width in items):
                self._pad = pad
                break
        else:
            raise FormatError("tensors that share memory in the checkpoint are not aligned to it")
        try:
            self.memory = torch.empty(self.stop - self.start + self._pad, dtype=torch.uint8)
        except RuntimeError as cause:
            raise LoadError(
                f"the checkpoint needs {self.stop - self.start} bytes for one tensor: {cause}"
            ) from cause

    def array(self) -> Bytes:
        return self.memory.numpy()[self._pad :]

    def value(self, record: TensorRecord) -> Any:
        """Return the leaf of a record, sharing this memory."""
        offset = self._pad + record.shards[0].start - self.start
        if record.kind == "torch":
            return _tensor(self.memory, offset, record)
        raw = self.memory.numpy()[offset : offset + extent_bytes(record)]
        if record.kind == "bytes":
            return raw.tobytes()
        if raw.size == 0:
            return np.empty(record.shape, numpy_dtype(record.dtype))
        return raw.view(numpy_dtype(record.dtype)).reshape(record.shape)


def _tensor(memory: torch.Tensor, offset: int, record: TensorRecord) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, record.dtype)
    if 0 in record.shape:
        tensor = torch.empty(record.shape, dtype=dtype, device=memory.device)
    else:
        strides = record.shards[0].strides or _row_major(record.shape)
        tensor = torch.empty(0, dtype=dtype, device=memory.device)
        tensor.set_(
            memory.untyped_storage(), offset // tensor.element_size(), record.shape, strides
        )
    if record.parameter:
        return torch.nn.Parameter(tensor, requires_grad=record.requires_grad)
    return tensor.requires_grad_() if record.requires_grad else tensor


def _row_major(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return strides[::-1]


# -- in place ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Match:
    """A live state beside a checkpoint's tree: what differs, and what is to be done.

    Attributes:
        reasons: the differences that forbid the restore.
        fills: (number of the leaf, live tensor or array to fill).
        objects: (object, its fqn, the records for its ``load_state_dict``).
        values: what to do at the end with the new leaves: replace plain values in containers.
    """

    checkpoint: Checkpoint
    strict: bool
    reasons: list[str] = field(default_factory=list)
    fills: list[tuple[int, torch.Tensor | np.ndarray[Any, Any]]] = field(default_factory=list)
    objects: list[tuple[Any, str, Node]] = field(default_factory=list)
    values: list[tuple[Callable[[Any], None], Node]] = field(default_factory=list)

    def root(self, into: Any) -> None:
        """Match the whole state."""
        self.walk(into, self.checkpoint.rank.tree, "", _refuse)
        if any(put is _refuse for put, _ in self.values):
            self.reasons.append(
                f"the state itself is a {type(into).__name__}, which cannot be filled in place; "
                "pass a dict, or use load()"
            )

    def walk(self, into: Any, node: Node, name: str, replace: Callable[[Any], None]) -> None:
        """Match one value; ``replace`` puts a new one in its place."""
        if callable(getattr(into, "load_state_dict", None)) and not isinstance(into, type):
            self._object(into, node.state if isinstance(node, ObjectNode) else node, name)
            return
        if isinstance(node, ObjectNode):
            node = node.state
        if isinstance(into, (torch.Tensor, np.ndarray)):
            self._bulk(into, node, name)
        elif isinstance(into, dict):
            self._dict(into, node, name)
        elif isinstance(into, (list, tuple)) and not isinstance(into, torch.Size):
            self._sequence(into, node, name, replace)
        elif into is None or (isinstance(into, _PLAIN) and not _is_container(node)):
            self.values.append((replace, node))
        else:
            self.reasons.append(
                f"{_show(name)}: the checkpoint has a {_kind(node)}, "
                f"the state a {type(into).__name__}"
            )

    def _bulk(self, into: torch.Tensor | np.ndarray[Any, Any], node: Node, name: str) -> None:
        if not isinstance(node, TensorNode):
            what = "array" if isinstance(into, np.ndarray) else "tensor"
            self.reasons.append(
                f"{_show(name)}: the state has a{'n' * (what == 'array')} {what}, "
                f"the checkpoint a {_kind(node)}"
            )
            return
        record = self.checkpoint.rank.tensors[node.i]
        if isinstance(into, np.ndarray):
            kind, dtype = "numpy", into.dtype.str
        else:
            kind, dtype = "torch", dtype_name(into.dtype)
        shape = list(into.shape)
        if record.kind != kind:
            self.reasons.append(f"{_show(name)}: saved as {record.kind}, the state has {kind}")
        elif record.shape != shape:
            self.reasons.append(
                f"{_show(name)}: saved with shape {record.shape}, the state has {shape}"
            )
        elif record.dtype != dtype:
            self.reasons.append(
                f"{_show(name)}: saved with dtype {record.dtype}, the state has {dtype}"
            )
        elif isinstance(into, np.ndarray) and not into.flags.writeable:
            self.reasons.append(f"{_show(name)}: the array in the state is read-only")
        elif _overlaps_itself(into):
            self.reasons.append(
                f"{_show(name)}: the tensor in the state has elements that share memory "
                "(expand()); it cannot be filled in place"
            )
        else:
            self.fills.append((node.i, into))

    def _dict(self, into: dict[Any, Any], node: Node, name: str, *, takes_all: bool = True) -> None:
        if not isinstance(node, (DictNode, OrderedDictNode)):
            self.reasons.append(
                f"{_show(name)}: the state has a dict, the checkpoint a {_kind(node)}"
            )
            return
        keys = unflatten(ListNode(node.keys), dict[int, Any]().__getitem__)
        saved = dict(zip(keys, node.values, strict=True))
        prefix = f"{name}." if name else ""
        if not into and takes_all:
            for key, value in saved.items():
                self.values.append((_setter(into, key), value))
            return
        for key, value in into.items():
            if key in saved:
                self.walk(value, saved[key], f"{prefix}{key}", _setter(into, key))
            elif self.strict:
                self.reasons.append(f"{prefix}{key}: missing in the checkpoint")
        if self.strict:
            self.reasons.extend(
                f"{prefix}{key}: unexpected, the state has no such key"
                for key in saved
                if key not in into
            )

    def _sequence(self, into: Any, node: Node, name: str, replace: Callable[[Any], None]) -> None:
        if not isinstance(node, (ListNode, TupleNode, NamedTupleNode)):
            self.reasons.append(
                f"{_show(name)}: the state has a {type(into).__name__}, "
                f"the checkpoint a {_kind(node)}"
            )
            return
        items = node.items
        if isinstance(into, list) and (not into or (_is_plain(into) and not bulk_indices(node))):
            # a list of plain values is a value: a history of losses, say, which has grown
            self.values.append((lambda new: into.__setitem__(slice(None), list(new)), node))
            return
        if len(into) != len(items):
            self.reasons.append(
                f"{_show(name)}: saved with {len(items)} items, the state has {len(into)}"
            )
            return
        prefix = f"{name}." if name else ""
        if isinstance(into, list):
            for i, (value, item) in enumerate(zip(into, items, strict=True)):
                self.walk(value, item, f"{prefix}{i}", _setter(into, i))
            return
        # tuples cannot be changed: what must be replaced in one replaces the tuple
        changed: dict[int, Any] = {}

        def put(i: int) -> Callable[[Any], None]:
            return lambda new: changed.__setitem__(i, new)

        before = len(self.values)
        for i, (value, item) in enumerate(zip(into, items, strict=True)):
            self.walk(value, item, f"{prefix}{i}", put(i))
        if len(self.values) > before:

            def rebuild(_: Any) -> None:
                new = [changed.get(i, value) for i, value in enumerate(into)]
                replace(type(into)(*new) if hasattr(into, "_fields") else type(into)(new))

            self.values.append((replace if replace is _refuse else rebuild, None))

    def _object(self, into: Any, node: Node, name: str) -> None:
        if not isinstance(into, torch.nn.Module):
            if isinstance(into, torch.optim.Optimizer):
                self.reasons.extend(_optimizer_reasons(into, node, name))
            self.objects.append((into, name, node))
            return
        state = into.state_dict()
        if _fills_in_place(into) and all(isinstance(v, torch.Tensor) for v in state.values()):
            self._dict(state, node, name, takes_all=False)
        else:
            self.objects.append((into, name, node))


_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.Size,
    torch.dtype,
    torch.device,
    np.generic,
)


def _refuse(_: Any) -> None:
    raise AssertionError("unreachable: a root that must be replaced is a reason")


def _setter(container: Any, key: Any) -> Callable[[Any], None]:
    return lambda new: container.__setitem__(key, new)


def _show(name: str) -> str:
    return name or "the state itself"


def _is_container(node: Node) -> bool:
    return isinstance(node, (DictNode, OrderedDictNode, ListNode, TupleNode, NamedTupleNode))


def _kind(node: Node) -> str:
    return {
        DictNode: "dict",
        OrderedDictNode: "dict",
        ListNode: "list",
        TupleNode: "tuple",
        NamedTupleNode: "NamedTuple",
        TensorNode: "tensor",
        type(None): "None",
    }.get(type(node), "plain value")


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return not isinstance(value, (torch.Tensor, np.ndarray)) and not hasattr(value, "state_dict")


def _overlaps_itself(into: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    return isinstance(into, torch.Tensor) and any(
        stride == 0 and size > 1 for size, stride in zip(into.shape, into.stride(), strict=True)
    )


def _fills_in_place(module: torch.nn.Module) -> bool:
    """Whether ``load_state_dict`` of a module does nothing but fill what ``state_dict`` returns."""
    if type(module).load_state_dict is not torch.nn.Module.load_state_dict:
        return False
    for each in module.modules():
        own = type(each)._load_from_state_dict
        if own is not torch.nn.Module._load_from_state_dict and not own.__module__.startswith(
            "torch.nn."
        ):
            return False
        if type(each).set_extra_state is not torch.nn.Module.set_extra_state:
            return False
        if type(each).state_dict is not torch.nn.Module.state_dict:
            return False
        hooks = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_hooks")
        if any(getattr(each, name, None) for name in hooks):
            return False
    return True


def _optimizer_reasons(optimizer: torch.optim.Optimizer, node: Node, name: str) -> list[str]:
    """Compare parameter groups, whose mismatch an optimizer may notice too late."""
    parts = dict(children(node))
    groups = parts.get("param_groups")
    if not isinstance(groups, ListNode):
        return [
            f"{_show(name)}: the state has an optimizer, the checkpoint has no param_groups there"
        ]
    if len(groups.items) != len(optimizer.param_groups):
        return [
            f"{_show(name)}: saved with {len(groups.items)} parameter groups, "
            f"the optimizer has {len(optimizer.param_groups)}"
        ]
    reasons = []
    for i, (group, live) in enumerate(zip(groups.items, optimizer.param_groups, strict=True)):
        saved = dict(children(group)).get("params")
        count = len(saved.items) if isinstance(saved, ListNode) else 0
        if count != len(live["params"]):
            reasons.append(
                f"{_show(name)}: parameter group {i} was saved with {count} parameters, "
                f"the optimizer has {len(live['params'])}"
            )
    return reasons


def _apply(checkpoint: Checkpoint, match: _Match) -> None:
    """Carry out a match that has no reasons against it."""
    nodes = [node for _, _, node in match.objects] + [node for _, node in match.values]
    indices = sorted({i for node in nodes for i in bulk_indices(node)})
    bulk = _read_new(checkpoint, indices, torch.device("cpu"))
    new_values = [(put, unflatten(node, bulk.__getitem__)) for put, node in match.values]
    _load_objects(match, [unflatten(node, bulk.__getitem__) for _, _, node in match.objects])
    tensors = checkpoint.rank.tensors
    checkpoint.read([_fill(tensors[i], into) for i, into in match.fills])
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    for put, value in new_values:
        put(value)


def _load_objects(match: _Match, states: list[Any]) -> None:
    """Call every ``load_state_dict``; when one refuses, put back those before it."""
    before: list[tuple[Any, Any]] = []
    for (each, name, _), state in zip(match.objects, states, strict=True):
        try:
            # optimizers replace their tensors, others may write into them
            old = each.state_dict() if callable(getattr(each, "state_dict", None)) else None
            if not isinstance(each, torch.optim.Optimizer):
                old = copy.deepcopy(old)
            before.append((each, old))
            if isinstance(each, torch.nn.Module):
                each.load_state_dict(state, strict=match.strict)
            else:
                each.load_state_dict(state)
        except Exception as cause:
            for done, old in before:
                if old is not None:
                    done.load_state_dict(old)
            reason = f"{_show(name)}: {type(each).__name__}.load_state_dict refused: {cause}"
            raise MismatchError(
                f"{match.checkpoint.path} does not fit the state:", [reason]
            ) from cause


def _fill(record: TensorRecord, into: torch.Tensor | np.ndarray[Any, Any]) -> Run:
    """Return the run that fills a live tensor or array: in its own memory, if that fits."""
    start, nbytes = record.shards[0].start, extent_bytes(record)
    if isinstance(into, np.ndarray):
        if into.flags.c_contiguous:
            return Run(start, nbytes, into.reshape(-1).view(np.uint8) if nbytes else _empty())
        return _detour(record, start, nbytes, lambda new: np.copyto(into, new))
    strides = record.shards[0].strides
    same = into.is_contiguous() if strides is None else list(into.stride()) == strides
    if same and into.is_cpu and not into.is_conj() and not into.is_neg():
        offset = int(into.storage_offset()) * into.element_size()
        return Run(start, nbytes, byte_alias(into, offset, nbytes).numpy() if nbytes else _empty())

    def put(new: torch.Tensor) -> None:
        as_integers = INTEGERS.get(into.element_size())
        with torch.no_grad():
            if as_integers is None or into.is_conj() or into.is_neg():
                into.copy_(new)
            else:
                into.view(as_integers).copy_(new.view(as_integers))

    return _detour(record, start, nbytes, put)


def _empty() -> Bytes:
    return np.empty(0, np.uint8)


def _detour(record: TensorRecord, start: int, nbytes: int, put: Callable[[Any], None]) -> Run:
    """Return a run that fills memory of its own, and then puts it where it belongs."""
    block = _Block(start, start + nbytes)

    def memory() -> Bytes:
        block.memory = torch.empty(nbytes, dtype=torch.uint8)
        return block.array()

    def finish() -> None:
        put(block.value(record).detach() if record.kind == "torch" else block.value(record))
        block.memory = torch.empty(0, dtype=torch.uint8)

    return Run(start, nbytes, memory, finish)
