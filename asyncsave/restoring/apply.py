"""Apply: carry out a match, all or nothing.

First all stored bytes are read and checked, into new tensors and memory kept for the purpose; then
plain values are replaced, and objects that load by themselves do so, and all of that is put back if
one refuses; only then live tensors are filled.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..available import available_memory
from ..errors import LoadError, MismatchError
from ..format.build import unflatten
from ..format.leaf import Leaf
from ..format.select import completed
from ..format.tree import Node, bulk_indices, has_typed
from ..pages import Bytes
from ..reading.checkpoint import Checkpoint, ChunkId
from ..reading.fill import Fill
from ..state.classes import as_live, has_method
from ..state.values import TORCH
from .fills import fills_of, put
from .live import Target
from .match import Contents, Loading, Match, Place, make_tuples, show
from .new import NewLeaves
from .objects import load_objects
from .tangle import Untangled, contradictions, untangle, value_of
from .wish import Wish

_log = logging.getLogger("asyncsave")


def apply(checkpoint: Checkpoint, match: Match, wish: Wish) -> int:
    """Carry out a match that has no reasons against it; return how many bytes it was.

    Raises:
        MismatchError: values contradict each other, or an object refused; nothing was changed.
        IntegrityError: stored bytes are damaged; nothing was changed.
    """
    untangled = untangle(match.targets)
    leaves = _leaves_to_make(checkpoint.leaves, match, untangled)
    new = NewLeaves(leaves)
    fills = fills_of(untangled.free)
    kept = _read(checkpoint, new, fills)
    bulk = new.values(torch.device("cpu"))
    _refuse_contradictions(checkpoint, untangled, bulk)
    values = _values(checkpoint, match, bulk)
    states = [_state_for(checkpoint, each, bulk) for each in match.objects]
    tuples = make_tuples(checkpoint.path, match, values)
    _synchronize(match.targets)  # what is queued for them must not come after the new values
    pairs = zip(match.edits, values, strict=True)
    edits = [(edit.place, value, edit.name) for edit, value in pairs]
    edits += [(place, new_tuple, "a tuple") for place, new_tuple in tuples]
    with _edited(checkpoint, edits):
        load_objects(checkpoint.path, match, states, wish)
    for target in itertools.chain.from_iterable(untangled.tangled):
        put(target, value_of(target, bulk))
    if fills:
        _fill(checkpoint, untangled.free, fills, kept)
    _synchronize(match.targets)
    filled = [target.leaf for target in untangled.free if target.leaf is not None]
    return sum(leaf.nbytes for leaf in itertools.chain(filled, leaves))


@contextlib.contextmanager
def _edited(
    checkpoint: Checkpoint, edits: Sequence[tuple[Place | Contents, Any, str]]
) -> Iterator[None]:
    """Put values in their places; on an error, here or meanwhile, put back what was there.

    Raises:
        MismatchError: a container refuses one.
    """
    done: list[tuple[Place | Contents, Any]] = []
    try:
        for place, value, name in edits:
            try:
                done.append((place, place.now()))
                place.put(value)
            except Exception as error:
                raise MismatchError(
                    f"{checkpoint.path} does not fit the state:",
                    [f"{show(name)}: {type(place.container).__name__} refuses it: {error!r}"],
                ) from error
        yield
    except BaseException:
        for place, old in reversed(done):
            try:
                place.put_back(old)
            except Exception as error:  # the others are put back all the same
                _log.warning("restore: %s could not be put back: %r", type(old).__name__, error)
        raise


def _leaves_to_make(leaves: Sequence[Leaf], match: Match, untangled: Untangled) -> list[Leaf]:
    """Return the leaves that are not read into live values, by number."""
    nodes = [each.node for each in match.objects] + [edit.node for edit in match.edits]
    wanted = {i for node in nodes for i in bulk_indices(node)}
    for target in itertools.chain.from_iterable(untangled.tangled):
        if target.leaf is not None:
            wanted.add(target.leaf.index)
    return [leaves[i] for i in sorted(wanted)]


def _read(checkpoint: Checkpoint, new: NewLeaves, fills: Sequence[Fill]) -> dict[ChunkId, Bytes]:
    """Read what new leaves need, and check what live values do; return chunks kept for those."""
    if not fills:
        checkpoint.read(new.fills)
        return {}
    # every byte, and what it decodes to, before the first one of the state is changed; the memory
    # beside new and old values is taken only where it is plainly there
    keep_bytes = max(0, available_memory() - new.nbytes) // 2
    return checkpoint.check(fill=new.fills, keep=fills, keep_bytes=keep_bytes)


def _refuse_contradictions(
    checkpoint: Checkpoint, untangled: Untangled, bulk: Mapping[int, Any]
) -> None:
    groups = [group for group in untangled.tangled if len(group) > 1]
    reasons = [why for group in groups for why in contradictions(group, bulk)]
    if reasons:
        raise MismatchError(f"{checkpoint.path} does not fit the state:", reasons)


def _values(checkpoint: Checkpoint, match: Match, bulk: Mapping[int, Any]) -> list[Any]:
    """Return what is to be put in the places of the edits, of the classes that are there now."""
    values, reasons = [], []
    for edit in match.edits:
        try:
            values.append(as_live(edit.live, _built(edit.node, bulk)))
        except LoadError:
            raise
        except Exception as error:
            kind = type(edit.live).__name__
            reasons.append(f"{show(edit.name)}: no {kind} can be made of what was saved: {error!r}")
    if reasons:
        raise MismatchError(f"{checkpoint.path} does not fit the state:", reasons)
    return values


def _state_for(checkpoint: Checkpoint, each: Loading, bulk: Mapping[int, Any]) -> Any:
    """Return what an object is to load, in which values are of the classes that it has now."""
    state = _built(each.node, bulk)
    if not has_typed(each.node) or not has_method(each.into, "state_dict"):
        return state
    try:
        return as_live(each.into.state_dict(), state)
    except LoadError:
        raise
    except Exception as error:
        kind = type(each.into).__name__
        why = f"{show(each.name)}: the state that this {kind} has cannot be made of it: {error!r}"
        raise MismatchError(f"{checkpoint.path} does not fit the state:", [why]) from error


def _built(node: Node, bulk: Mapping[int, Any]) -> Any:
    return unflatten(completed(node), bulk.__getitem__, TORCH)


def _fill(
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    fills: Sequence[Fill],
    kept: dict[ChunkId, Bytes],
) -> None:
    """Decode into the live tensors; every byte was found sound just now."""
    try:
        try:
            checkpoint.read(fills, kept)
        except LoadError:
            # once more: there is no way back to what the tensors were
            checkpoint.read(fills_of(targets))
    except BaseException as error:  # an interrupt, too
        error.add_note(
            f"{checkpoint.path} was sound a moment ago, and the state is partly filled from it"
        )
        raise


def _synchronize(targets: Sequence[Target]) -> None:
    tensors = [target.into for target in targets if isinstance(target.into, torch.Tensor)]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)
