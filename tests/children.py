"""Children: test programs in processes of their own, forked from one that has imported torch.

To import torch takes longer than most programs here run. So one process, the nursery, does it once,
and forks a child for every program. The child is an interpreter like any other: it runs the program
as ``__main__``, its exit handlers, and its end. The nursery's own helper is gone by then, so the
child is inherited by the process of the tests (which asks to be who inherits orphans), and that
waits for it and kills it like a child of its own.

Programs that measure what a process takes, or what is imported when, start a process themselves.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_MESSAGE_BYTES = 1 << 20


class Child:
    """A program that runs; like ``subprocess.Popen`` with both streams as text."""

    def __init__(self, pid: int, stdout: int, stderr: int) -> None:
        self.pid = pid
        self.stdout: IO[str] = open(stdout)  # noqa: SIM115
        self.stderr: IO[str] = open(stderr)  # noqa: SIM115
        self.returncode: int | None = None
        self._exit = os.pidfd_open(pid)

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Read both streams to their end, and wait for the child's."""
        streams = {self.stdout.fileno(): b"", self.stderr.fileno(): b""}
        deadline, order = time.monotonic() + timeout, list(streams)
        while order:
            ready, _, _ = select.select(order, [], [], max(0, deadline - time.monotonic()))
            if not ready:
                self._give_up(timeout)
            for each in ready:
                some = os.read(each, 1 << 16)
                streams[each] += some
                if not some:
                    order.remove(each)
        self.wait(timeout)
        out, err = (each.decode() for each in streams.values())
        self.close()
        return out, err

    def wait(self, timeout: float = 60) -> int:
        """Wait for its end; return its status, negative for a signal."""
        if self.returncode is None:
            if not select.select([self._exit], [], [], timeout)[0]:
                self._give_up(timeout)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def close(self) -> None:
        """Let go of its streams."""
        self.stdout.close()
        self.stderr.close()
        if self._exit >= 0:
            os.close(self._exit)
            self._exit = -1

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self.close()

    def _give_up(self, timeout: float) -> None:
        self.kill()
        self.wait()
        self.close()
        raise TimeoutError(f"the child did not end within {timeout} seconds")


def kept() -> tuple[set[str], set[str]]:
    """Return the descriptor and the process that stay until the tests end, by number."""
    return {str(door.fileno()) for door, _ in _nurseries}, {str(pid) for _, pid in _nurseries}


def start(
    program: str, *arguments: object, warn: str = "error", env: dict[str, str] | None = None
) -> Child:
    """Start a program, as ``python -c program arguments…`` in the project's root would.

    Args:
        warn: the filter of warnings, as with ``python -W``.
        env: more environment.
    """
    request = {
        "program": program,
        "arguments": [str(each) for each in arguments],
        "warn": warn,
        "env": env or {},
    }
    out, err = os.pipe(), os.pipe()
    nursery = _nursery()
    socket.send_fds(nursery, [json.dumps(request).encode()], [out[1], err[1]])
    os.close(out[1])
    os.close(err[1])
    pid = int(nursery.recv(_MESSAGE_BYTES))
    return Child(pid, out[0], err[0])


def run(
    program: str,
    *arguments: object,
    warn: str = "error",
    env: dict[str, str] | None = None,
    timeout: float = 60,
) -> subprocess.CompletedProcess[str]:
    """`start` a program and wait for its end; return its status and what it printed."""
    child = start(program, *arguments, warn=warn, env=env)
    out, err = child.communicate(timeout)
    assert child.returncode is not None
    return subprocess.CompletedProcess(["python", "-c", program], child.returncode, out, err)


_nurseries: list[tuple[socket.socket, int]] = []


@functools.cache
def _nursery() -> socket.socket:
    """Start the nursery, once; return the socket to it."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.children", str(its.fileno())]
    process = subprocess.Popen(command, cwd=ROOT, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)
    its.close()
    _nurseries.append((ours, process.pid))

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _serve(door: socket.socket) -> dict[str, Any] | None:
    """Fork a child for every request; return the request, in the child. None: there are no more."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(door, _MESSAGE_BYTES, 2)
        if not message:
            return None
        answer, tell = os.pipe()
        helper = os.fork()
        if helper == 0:
            child = os.fork()
            if child:
                os.write(tell, str(child).encode())
                os._exit(0)
            os.close(answer)
            os.close(tell)
            for to, descriptor in enumerate(descriptors, 1):
                os.dup2(descriptor, to)
                os.close(descriptor)
            door.close()
            request: dict[str, Any] = json.loads(message)
            return request
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(helper, 0)  # from here on the child is the tests', who may wait for it
        door.send(os.read(answer, 100))
        os.close(answer)
        os.close(tell)


def _become(request: dict[str, Any]) -> types.ModuleType:
    """Make this process one that has just been started with a program."""
    os.environ.update(request["env"])
    sys.argv = ["-c", *request["arguments"]]
    warnings.resetwarnings()
    warnings.simplefilter(request["warn"])
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    return main


if __name__ == "__main__":
    import torch  # noqa: F401

    import asyncsave

    for name in asyncsave.__all__:
        getattr(asyncsave, name)
    gc.freeze()  # or a child's collections would copy all that they look at
    warnings.simplefilter("ignore", DeprecationWarning)  # NumPy's threads are no danger to a fork
    found = _serve(socket.socket(fileno=int(sys.argv[1])))
    if found is not None:
        exec(compile(found["program"], "<string>", "exec"), _become(found).__dict__)
