"""How the processes of a performance are started."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess

STOP_INTERVAL_S = 0.1


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits: a process started meanwhile never hears it, and no call to a JACK server breaks off halfway."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StoppedError(RuntimeError):
    """Somebody asked for an end before what is waited for had come."""


def await_message(pipe: Connection, seconds: float, stop: threading.Event) -> bool:
    """Whether there is something to receive within that time. Raises StoppedError once ``stop`` is set."""
    until = time.monotonic() + seconds
    while not pipe.poll(max(0.0, min(STOP_INTERVAL_S, until - time.monotonic()))):
        if stop.is_set():
            raise StoppedError("stopped before it began")
        if time.monotonic() >= until:
            return False
    return True


def start_process(
    context: SpawnContext, target: Callable[..., None], arguments: tuple[object, ...], name: str, daemon: bool = True
) -> tuple[SpawnProcess, Connection]:
    """A running process that never hears Ctrl-C, and a pipe to it; its function gets the other end as last argument."""
    pipe, theirs = context.Pipe()
    process = context.Process(target=target, args=(*arguments, theirs), name=name, daemon=daemon)
    with interrupts_held():
        process.start()
    theirs.close()
    return process, pipe
