"""Ways of saving: the peers, each as its documentation advises, and asyncsave.

A peer that is not installed, or fails, is a row that says so. ``synced`` is what a way has synced
when it says it is done, read from its source. A new way is a subclass of `Way` and a line in
`ways`; how a state is read back is in loads.py.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save
from training import State

from asyncsave import Checkpointer, SaveHandle

NO_SAVING = "no saving"
COPY = "copy into warm memory"
BARE = "bare O_DIRECT write + fsync"
TORCH = "torch.save + fsync"
DCP = "dcp.async_save"
CACHED, PINNED = f"{DCP}, cached stager", f"{DCP}, pinned stager"
OFF, LEVEL_1, AUTO = "asyncsave, off", "asyncsave, level 1", "asyncsave, auto"
PREWARMED = "asyncsave, off, prewarmed"
NO_OVERLAP = "asyncsave, off, overlap=False"

_WRITE_BYTES = 16 << 20


class Pending(Protocol):
    """A save in the background: what Future and SaveHandle have in common."""

    def done(self) -> bool: ...
    def result(self) -> Any: ...
    def add_done_callback(self, callback: Callable[[Any], object], /) -> object: ...


@dataclass(slots=True)
class Way:
    """A way of saving. Here: none at all.

    Attributes:
        name: its row.
        synced: what it has synced when it says it is done.
        directory: where its checkpoints go.
        reference: not a way to save, but what one is compared with.
    """

    name: str
    synced: str = ""
    directory: Path = Path()
    reference: bool = False

    def open(self, state: State) -> None:
        """Make ready, before the first save."""
        self.directory.mkdir(exist_ok=True)

    def save(self, state: State) -> Pending:
        """Save; this call is what is timed as blocked."""
        return _done()

    def close(self) -> None:
        """Give everything back."""

    def path(self, state: State) -> Path:
        """Return a path for the checkpoint of this step."""
        return self.directory / f"checkpoint-{state.steps}"


@dataclass(slots=True)
class Copy(Way):
    """The floor of blocking: the same bytes, copied by torch into memory that was used before."""

    memory: list[torch.Tensor] = field(default_factory=list, repr=False)

    def save(self, state: State) -> Pending:
        with torch.no_grad():
            tensors = state.tensors
            if not self.memory:
                self.memory = [torch.empty_like(each, device="cpu") for each in tensors]
            for copy, tensor in zip(self.memory, tensors, strict=True):
                copy.copy_(tensor)
        return _done()


@dataclass(slots=True)
class BareWrite(Way):
    """The floor of durability: as many bytes from one buffer to one file, no training beside."""

    buffer: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, _WRITE_BYTES), repr=False)

    def open(self, state: State) -> None:
        self.directory.mkdir()
        self.buffer[:] = os.urandom(_WRITE_BYTES)

    def save(self, state: State) -> Pending:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_DIRECT", 0)
        descriptor = os.open(self.path(state), flags)
        try:
            for _ in range(-(-state.state_bytes // _WRITE_BYTES)):
                if os.write(descriptor, self.buffer) != _WRITE_BYTES:
                    raise OSError("the disk took less than it was given")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return _done()


class TorchSave(Way):
    """``torch.save``, and then all that is needed for the file to survive a power cut."""

    def save(self, state: State) -> Pending:
        path = self.path(state)
        torch.save(state.state_dicts, path)
        for each in (path, self.directory):
            descriptor = os.open(each, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return _done()


@dataclass(slots=True)
class DistributedCheckpoint(Way):
    """``torch.distributed.checkpoint.async_save`` for a single process.

    Attributes:
        extension: makes the stream extension that is used, if any.
        staging: options of a stager that lives as long as the run and keeps its memory; None for
            the default, which takes it anew for each save.
    """

    extension: Callable[[], Any] | None = None
    staging: StagingOptions | None = None
    stager: DefaultStager | None = field(default=None, repr=False)

    def open(self, state: State) -> None:
        self.directory.mkdir()
        if self.staging is not None:
            self.stager = DefaultStager(self.staging)

    def save(self, state: State) -> Pending:
        options: dict[str, Any] = {"checkpoint_id": self.path(state)}
        if self.extension is not None:
            options["storage_writer"] = FileSystemWriter(
                self.path(state), _extensions=[self.extension()]
            )
        if self.stager is not None:
            options["async_stager"] = self.stager
        response: Any = async_save(state.state, **options)
        if isinstance(response, Future):
            return response
        # staged in the background: the optimizer must wait for that
        state.guard = lambda: _waited(response.staging_completion)
        future: Future[Any] = response.upload_completion
        return future

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


class TorchSnapshot(Way):
    """``torchsnapshot.Snapshot.async_take``."""

    def save(self, state: State) -> Pending:
        from torchsnapshot import Snapshot

        pending = Snapshot.async_take(str(self.path(state)), state.state)
        waiter = ThreadPoolExecutor(1, "torchsnapshot-wait")
        future: Future[Any] = waiter.submit(pending.wait)
        waiter.shutdown(wait=False)
        return future


@dataclass(slots=True)
class TorchCheckpointing(Way):
    """``torch_checkpointing``: staged in a thread, written by a process of its own.

    Its defaults need CUDA, and O_DIRECT for its unaligned writes is refused here (EINVAL), so that
    is off. The optimizer's step is guarded with ``lock()``, as it advises.
    """

    manager: Any = field(default=None, repr=False)

    def open(self, state: State) -> None:
        from torch_checkpointing import (
            AsyncCheckpointSaverConfig,
            CheckpointManager,
            CheckpointStagerConfig,
        )
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        self.directory.mkdir()
        cuda = state.device.type == "cuda"
        staging = CheckpointStagerConfig(use_pinned_memory=cuda, use_non_blocking_copy=cuda)
        self.manager = CheckpointManager.Config(
            save=AsyncCheckpointSaverConfig(staging_config=staging),
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        ).build()

    def save(self, state: State) -> Pending:
        state.guard = self.manager.lock
        future: Future[Any] = self.manager.save(str(self.path(state)), state.state_dicts)
        return future

    def close(self) -> None:
        if self.manager is not None:
            self.manager.close()


@dataclass(slots=True)
class AsyncSave(Way):
    """A `Checkpointer` that lives as long as the run."""

    compression: Any = "auto"
    overlap: bool = True
    prewarm: bool = False
    reuse: Any = "content"
    checkpointer: Checkpointer | None = field(default=None, repr=False)

    def open(self, state: State) -> None:
        self.checkpointer = Checkpointer(
            self.directory,
            compression=self.compression,
            overlap=self.overlap,
            reuse=self.reuse,
            signals=(),
        )
        if self.prewarm:
            self.checkpointer.prewarm(state.state)

    def save(self, state: State) -> Pending:
        assert self.checkpointer is not None
        handle = self.checkpointer.save(state.steps, state.state)
        assert isinstance(handle, SaveHandle)
        return handle

    def close(self) -> None:
        if self.checkpointer is not None:
            self.checkpointer.close()


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


def _waited(future: Future[Any]) -> contextlib.AbstractContextManager[None]:
    future.result()
    return contextlib.nullcontext()


def _zstandard() -> Any:
    from torch.distributed.checkpoint._extension import ZStandard

    return ZStandard()


def ways(directory: Path, device: str = "cpu", names: Sequence[str] | None = None) -> list[Way]:
    """Return the ways of these names, in that order; by default, all that there are for a device.

    Each has a place of its own in ``directory``.
    """
    every, files = "files, directories", "files"
    cuda = device == "cuda"
    cached = StagingOptions(cuda, False, cuda, cuda)
    found = [
        Way(NO_SAVING, reference=True),
        Copy(COPY, reference=True),
        BareWrite(BARE, "file", reference=True),
        TorchSave(TORCH, "file, directory"),
        DistributedCheckpoint(DCP, files),
        DistributedCheckpoint(f"{DCP}, its ZStandard", files, extension=_zstandard),
        DistributedCheckpoint(PINNED if cuda else CACHED, files, staging=cached),
        TorchSnapshot("torchsnapshot.async_take", "nothing"),
        TorchCheckpointing("torch_checkpointing", "nothing"),
        AsyncSave(OFF, every, compression="off"),
        AsyncSave(LEVEL_1, every, compression=1),
        AsyncSave(AUTO, every, compression="auto"),
        AsyncSave(PREWARMED, every, compression="off", prewarm=True),
    ]
    if cuda:
        found.append(AsyncSave(NO_OVERLAP, every, compression="off", overlap=False))
    for number, way in enumerate(found):
        way.directory = directory / str(number)
    by_name = {way.name: way for way in found}
    return found if names is None else [by_name[name] for name in names]


def settle(way: Way) -> None:
    """Delete what was saved, and leave no dirty pages to the next save."""
    for path in way.directory.iterdir() if way.directory.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.startswith("."):  # asyncsave's lock
            path.unlink()
    os.sync()
