"""Ways of saving a training's state: the peers, each as its documentation advises, and asyncsave.

A peer that is not installed, or fails, is a row that says so. ``synced`` is what a way has synced
when it says it is done, read from its source.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save
from training import Training

from asyncsave import Checkpointer, SaveHandle

NO_SAVING = "no saving"
COPY = "copy into warm memory"
BARE = "bare O_DIRECT write + fsync"
DCP = "dcp.async_save"
OFF, LEVEL_1, AUTO = "asyncsave, off", "asyncsave, level 1", "asyncsave, auto"
PREWARMED = "asyncsave, off, prewarmed"
NO_OVERLAP = "asyncsave, off, overlap=False"
PINNED = "dcp.async_save, pinned stager"

_WRITE_BYTES = 16 << 20


class Pending(Protocol):
    """A save in the background: what Future and SaveHandle have in common."""

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
    synced: str
    directory: Path
    reference: bool = False

    def open(self, training: Training) -> None:
        """Make ready, before the first save."""
        self.directory.mkdir()

    def save(self, training: Training) -> Pending:
        """Save; this call is what is timed as blocked."""
        return _done()

    def close(self) -> None:
        """Give everything back."""

    def path(self, training: Training) -> Path:
        """Return a path for the checkpoint of this step."""
        return self.directory / f"checkpoint-{training.steps}"


@dataclass(slots=True)
class Copy(Way):
    """The floor of blocking: the same bytes, copied by torch into memory that was used before."""

    memory: list[torch.Tensor] = field(default_factory=list, repr=False)

    def save(self, training: Training) -> Pending:
        with torch.no_grad():
            tensors = training.tensors
            if not self.memory:
                self.memory = [torch.empty_like(each, device="cpu") for each in tensors]
            for copy, tensor in zip(self.memory, tensors, strict=True):
                copy.copy_(tensor)
        return _done()


@dataclass(slots=True)
class BareWrite(Way):
    """The floor of durability: as many bytes from one buffer to one file, no training beside."""

    buffer: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, _WRITE_BYTES), repr=False)

    def open(self, training: Training) -> None:
        self.directory.mkdir()
        self.buffer[:] = os.urandom(_WRITE_BYTES)

    def save(self, training: Training) -> Pending:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_DIRECT", 0)
        descriptor = os.open(self.path(training), flags)
        try:
            for _ in range(-(-training.state_bytes // _WRITE_BYTES)):
                if os.write(descriptor, self.buffer) != _WRITE_BYTES:
                    raise OSError("the disk took less than it was given")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return _done()


class TorchSave(Way):
    """``torch.save``, and then all that is needed for the file to survive a power cut."""

    def save(self, training: Training) -> Pending:
        path = self.path(training)
        torch.save(training.state_dicts, path)
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

    def open(self, training: Training) -> None:
        self.directory.mkdir()
        if self.staging is not None:
            self.stager = DefaultStager(self.staging)

    def save(self, training: Training) -> Pending:
        options: dict[str, Any] = {"checkpoint_id": self.path(training)}
        if self.extension is not None:
            options["storage_writer"] = FileSystemWriter(
                self.path(training), _extensions=[self.extension()]
            )
        if self.stager is not None:
            options["async_stager"] = self.stager
        response: Any = async_save(training.state, **options)
        if isinstance(response, Future):
            return response
        # staged in the background: the optimizer must wait for that
        training.guard = lambda: _waited(response.staging_completion)
        future: Future[Any] = response.upload_completion
        return future

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


class TorchSnapshot(Way):
    """``torchsnapshot.Snapshot.async_take``."""

    def save(self, training: Training) -> Pending:
        from torchsnapshot import Snapshot

        pending = Snapshot.async_take(str(self.path(training)), training.state)
        future: Future[None] = Future()

        def wait() -> None:
            try:
                pending.wait()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        threading.Thread(target=wait, name="torchsnapshot-wait").start()
        return future


@dataclass(slots=True)
class TorchCheckpointing(Way):
    """``torch_checkpointing``: staged in a thread, written by a process of its own.

    Its defaults need CUDA, and O_DIRECT for its unaligned writes is refused here (EINVAL), so that
    is off. The optimizer's step is guarded with ``lock()``, as it advises.
    """

    manager: Any = field(default=None, repr=False)

    def open(self, training: Training) -> None:
        from torch_checkpointing import (
            AsyncCheckpointSaverConfig,
            CheckpointManager,
            CheckpointStagerConfig,
        )
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        self.directory.mkdir()
        cuda = training.device.type == "cuda"
        staging = CheckpointStagerConfig(use_pinned_memory=cuda, use_non_blocking_copy=cuda)
        self.manager = CheckpointManager.Config(
            save=AsyncCheckpointSaverConfig(staging_config=staging),
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        ).build()

    def save(self, training: Training) -> Pending:
        training.guard = self.manager.lock
        future: Future[Any] = self.manager.save(str(self.path(training)), training.state_dicts)
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
    checkpointer: Checkpointer | None = field(default=None, repr=False)

    def open(self, training: Training) -> None:
        self.checkpointer = Checkpointer(
            self.directory, compression=self.compression, overlap=self.overlap, signals=()
        )
        if self.prewarm:
            self.checkpointer.prewarm(training.state)

    def save(self, training: Training) -> Pending:
        assert self.checkpointer is not None
        handle = self.checkpointer.save(training.steps, training.state)
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


def ways(directory: Path, device: str, wanted: list[str] | None = None) -> list[Way]:
    """Return the rows of the table: all, or those whose name contains one of ``wanted``."""
    all_, files = "files, directories", "files"
    cuda = device == "cuda"
    names = iter(range(100))

    def place() -> Path:
        return directory / str(next(names))

    cached = StagingOptions(cuda, False, cuda, cuda)
    rows: list[Way] = [
        Way(NO_SAVING, "", place(), reference=True),
        Copy(COPY, "", place(), reference=True),
        BareWrite(BARE, "file", place(), reference=True),
        TorchSave("torch.save + fsync", "file, directory", place()),
        DistributedCheckpoint(DCP, files, place()),
        DistributedCheckpoint(f"{DCP}, its ZStandard", files, place(), extension=_zstandard),
        DistributedCheckpoint(
            PINNED if cuda else f"{DCP}, cached stager", files, place(), staging=cached
        ),
        TorchSnapshot("torchsnapshot.async_take", "nothing", place()),
        TorchCheckpointing("torch_checkpointing", "nothing", place()),
        AsyncSave(OFF, all_, place(), compression="off"),
        AsyncSave(LEVEL_1, all_, place(), compression=1),
        AsyncSave(AUTO, all_, place(), compression="auto"),
    ]
    if cuda:
        rows.append(AsyncSave(NO_OVERLAP, all_, place(), compression="off", overlap=False))
    return [row for row in rows if wanted is None or any(each in row.name for each in wanted)]


def prewarmed(directory: Path) -> Way:
    """Return what has all memory before its first save."""
    return AsyncSave(PREWARMED, "files, directories", directory, compression="off", prewarm=True)


def settle(way: Way) -> None:
    """Delete what was saved, and leave no dirty pages to the next cycle."""
    for path in way.directory.iterdir() if way.directory.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.startswith("."):  # asyncsave's lock
            path.unlink()
    os.sync()
