"""The graph in a process of its own, so that the audio callback never hangs on it.

The audio process writes a hop into shared memory, waits a little, and plays the dry signal where no answer comes. Two
workers are loaded: when the one that serves dies or hangs, the other takes over at the next hop.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
import warnings
from dataclasses import dataclass
from multiprocessing import shared_memory
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from realtime.bundle import Bundle, Manifest, read_bundle
from realtime.privileges import be_urgent, lock_memory
from realtime.processes import await_message, start_process
from realtime.ring import Shared, new_memory, shared_view

if TYPE_CHECKING:
    from realtime.ensemble import Parts

_ASKED, _DONE, _RESET, _SERVING, _FAILED, _CHANNELS, _SAMPLES, _STYLE_DIM, _READY = range(9)  # the last of each slot
_WORDS = 16
_PROBLEM, _LOST = 1, 2  # of _FAILED: what the graph raised, or no memory of what came before
_TEXT_BYTES = 512
SLOTS = 2
HANG_S = 0.5
SHORTEST_LIFE_S = 1.0
START_TIMEOUT_S = 60.0
PATIENCE_SHARE = 0.8
"""Of the time that there is for a hop, how much the audio callback waits for it."""


class LateError(RuntimeError):
    """A hop whose answer did not come in time."""


class Exchange(Shared):
    """Where one hop goes out and comes back: numbers that say how far both sides are, and the arrays they exchange.

    ``asked`` is written by the audio process alone, ``done`` by the worker that serves, ``serving`` by their parent.
    """

    def __init__(self, memory: shared_memory.SharedMemory, owner: bool) -> None:
        super().__init__(memory, owner)
        self.words: NDArray[np.int64] = shared_view(memory, np.int64, _WORDS)
        channels, samples, dim = (int(self.words[i]) for i in (_CHANNELS, _SAMPLES, _STYLE_DIM))
        at = 8 * _WORDS
        self.text: NDArray[np.uint8] = shared_view(memory, np.uint8, _TEXT_BYTES, at)
        at += _TEXT_BYTES

        def array(width: int) -> NDArray[np.float32]:
            nonlocal at
            start, at = at, at + 4 * channels * width
            return shared_view(memory, np.float32, channels * width, start).reshape(channels, width)

        self.audio, self.style, self.answer = array(samples), array(dim), array(samples)

    @classmethod
    def create(cls, channels: int, step_samples: int, style_dim: int) -> Self:
        size = 8 * _WORDS + _TEXT_BYTES + 4 * channels * (2 * step_samples + style_dim)
        memory = new_memory(size)
        words = shared_view(memory, np.int64, _WORDS)
        words[:] = 0
        words[_CHANNELS], words[_SAMPLES], words[_STYLE_DIM] = channels, step_samples, style_dim
        del words
        return cls(memory, owner=True)

    @property
    def waiting(self) -> int | None:
        """The number of the hop that has no answer yet, if there is one."""
        asked = int(self.words[_ASKED])
        return asked if int(self.words[_DONE]) != asked else None


@dataclass(frozen=True)
class Link:
    """What a process needs to take part; the semaphores only wake, the exchange says what is true."""

    exchange_name: str
    asks: tuple[Any, ...]  # one semaphore per worker
    answered: Any


class RemoteStream:
    """A ``Stream`` whose graph runs in a worker: the same attributes, and a ``step`` that may raise LateError.

    After a late hop the worker is given nothing until it has finished, then a reset. Audio thread only.
    """

    def __init__(self, manifest: Manifest, link: Link, deferred: bool = False) -> None:
        """``deferred``: an answer is fetched one step later, so that nobody waits, and the delay grows by a step."""
        self.manifest, self._link, self._deferred = manifest, link, deferred
        self._exchange = Exchange.attach(link.exchange_name)
        self._words = self._exchange.words
        self.channels, self.step_samples = self._exchange.audio.shape
        self.delay_samples = manifest.stream_delay_samples + (self.step_samples if deferred else 0)
        self.audio: NDArray[np.float32] = np.zeros_like(self._exchange.audio)
        self.style: NDArray[np.float32] = np.zeros_like(self._exchange.style)
        self.audio_out: NDArray[np.float32] = np.zeros_like(self.audio)
        self.timeout_s = PATIENCE_SHARE * self.step_samples / manifest.spectral.sample_rate
        self._asked = int(self._words[_ASKED])
        self._open = False  # an answer is on its way that belongs to this stream
        self._lost = False  # the last answer came too late to be of use
        self._reset_wanted, self._asked_fresh = True, False

    @property
    def ready(self) -> bool:
        """Whether the worker that serves has loaded its model."""
        return bool(self._words[_READY + int(self._words[_SERVING])])

    def reset(self) -> None:
        """Back to silence, from the next step on."""
        self.audio_out[:] = 0.0
        if not (self._open and self._asked_fresh):  # otherwise what is on its way starts from silence already
            self._reset_wanted = True

    def step(self) -> NDArray[np.float32]:
        """Like ``Stream.step``. Raises LateError, or RuntimeError with what the graph raised."""
        if self._deferred:
            if self._open:
                try:
                    self._fetch()
                except LateError:
                    raise
                except RuntimeError:  # of the hop before; this one is none the worse
                    self._ask()
                    raise
            elif not self._lost:
                self.audio_out[:] = 0.0
            self._ask()
            if self._lost:
                self._lost = False
                raise LateError
        else:
            self._ask()
            self._fetch()
        return self.audio_out

    def _ask(self) -> None:
        words, exchange = self._words, self._exchange
        if int(words[_DONE]) != self._asked:
            raise LateError
        exchange.audio[:] = self.audio
        exchange.style[:] = self.style
        words[_RESET] = self._asked_fresh = self._reset_wanted
        self._reset_wanted = False
        self._asked += 1
        words[_ASKED] = self._asked
        self._open = True
        self._link.asks[int(words[_SERVING])].release()

    def _fetch(self) -> None:
        words, answered = self._words, self._link.answered
        until = time.perf_counter() + self.timeout_s
        self._open = False
        while int(words[_DONE]) != self._asked:
            if not answered.acquire(True, max(0.0, until - time.perf_counter())):
                self._lost = True
                raise LateError
        answered.acquire(False)
        if words[_FAILED] == _LOST:  # its worker died: as when it had not answered at all
            self._lost = True
            raise LateError
        if words[_FAILED]:
            raise RuntimeError(bytes(self._exchange.text).rstrip(b"\0").decode("utf-8", "replace"))
        self.audio_out[:] = self._exchange.answer

    def close(self) -> None:
        """Let go of the shared memory; no other call may follow."""
        self._words = np.zeros(0, np.int64)
        self._exchange.close()


def worker_process(model: Path, parts: Parts, provider: str, link: Link, slot: int, parent: int, pipe: Any) -> None:
    """A worker's main function; it says ('ready', '') or ('error', text), and ends when process ``parent`` does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exchange = Exchange.attach(link.exchange_name)
    words = exchange.words
    try:
        from realtime.ensemble import join, make_stream

        channels, samples = exchange.audio.shape
        bundle = join(read_bundle(model), parts)
        stream = make_stream(bundle, channels, samples // bundle.manifest.spectral.hop_samples, provider)
        stream.warm_up()
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(("error", str(error)))
        del words
        exchange.close()
        return
    warnings.simplefilter("ignore", RuntimeWarning)
    gc.collect()
    gc.freeze()
    gc.disable()
    if provider == "cpu":  # the libraries of a GPU are gigabytes
        lock_memory()
    be_urgent()
    with contextlib.suppress(OSError):
        pipe.send(("ready", ""))
    words[_READY + slot] = 1
    ask, answered, fresh = link.asks[slot], link.answered, True
    while True:
        if not ask.acquire(True, 0.5) and os.getppid() != parent:
            os._exit(0)  # arrays still point into shared memory, and nobody is left to read of it
        asked = int(words[_ASKED])
        if int(words[_SERVING]) != slot or int(words[_DONE]) == asked:
            continue
        answer, problem = exchange.answer, ""
        try:
            if words[_RESET]:
                stream.reset()
                fresh = False
            if not fresh:
                stream.audio[:], stream.style[:] = exchange.audio, exchange.style
                answer = stream.step()
        except Exception as error:
            fresh, problem = True, f"{type(error).__name__}: {error}"
        if int(words[_SERVING]) != slot:
            fresh = True  # it took so long that the other one serves now
            continue
        if problem:
            exchange.text[:] = np.frombuffer(problem.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0"), np.uint8)
        exchange.answer[:] = answer
        # What the graph remembered is lost with the worker that served before, or in the step that failed.
        words[_FAILED] = _PROBLEM if problem else _LOST if fresh else 0
        words[_DONE] = asked
        answered.release()


@dataclass
class _Worker:
    process: Any
    pipe: Any
    started_at: float


class Workers:
    """The workers of a performance, for the process that owns it; ``watch`` a few times a second. One thread."""

    def __init__(
        self, context: SpawnContext, model: Path, parts: Parts, provider: str, bundle: Bundle, channels: int
    ) -> None:
        """``bundle`` is what ``model`` and ``parts`` give, read already."""
        self._context, self._model, self._parts, self._provider = context, model, parts, provider
        manifest = bundle.manifest
        self.exchange = Exchange.create(channels, manifest.spectral.hop_samples, manifest.style_dim)
        self.link = Link(self.exchange.name, tuple(context.Semaphore(0) for _ in range(SLOTS)), context.Semaphore(0))
        self.restarts = 0
        self._workers: list[_Worker | None] = [None] * SLOTS
        self._waiting: tuple[int | None, float] = (None, 0.0)  # a hop without an answer, and since when

    @property
    def serving(self) -> int:
        """The slot that answers."""
        return int(self.exchange.words[_SERVING])

    @property
    def pids(self) -> tuple[int | None, ...]:
        """Of each slot's process."""
        return tuple(worker.process.pid if worker else None for worker in self._workers)

    def start(self, slot: int) -> None:
        """Start a worker; it is ready a second or so later."""
        self.exchange.words[_READY + slot] = 0
        arguments = (self._model, self._parts, self._provider, self.link, slot, os.getpid())
        process, pipe = start_process(self._context, worker_process, arguments, f"restyle-graph-{slot}")
        self._workers[slot] = _Worker(process, pipe, time.monotonic())

    def await_ready(self, stop: threading.Event) -> str:
        """Wait until the first worker can serve; what went wrong, or nothing. Raises StoppedError at ``stop``."""
        worker = self._workers[self.serving]
        assert worker is not None
        try:
            if not await_message(worker.pipe, START_TIMEOUT_S, stop):
                return f"the model did not load within {START_TIMEOUT_S:g} s"
            kind, text = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(1.0)
            return f"the process of the graph died (exit code {worker.process.exitcode})"
        return text if kind == "error" else ""

    def watch(self) -> list[str]:
        """Replace what has died, pass on from what hangs; what happened, in words."""
        events: list[str] = []
        serving, now = self.serving, time.monotonic()
        waiting = self.exchange.waiting
        if waiting != self._waiting[0]:
            self._waiting = (waiting, now)
        hangs = waiting is not None and now - self._waiting[1] > HANG_S
        for slot, worker in enumerate(self._workers):
            if worker is None:
                continue
            died = not worker.process.is_alive()
            if not died and not (hangs and slot == serving and self._is_ready(slot)):
                continue
            if now - worker.started_at < SHORTEST_LIFE_S:  # what dies at once is not started without end
                continue
            if not died:
                worker.process.kill()
                worker.process.join(1.0)
            events.append(f"the graph's process {'died' if died else 'hung'} (exit code {worker.process.exitcode})")
            self.restarts += 1
            if slot == serving:
                self.exchange.words[_SERVING] = other = 1 - slot
                self._waiting = (None, now)
                if self._workers[other] is None:
                    self.start(other)
                self.link.asks[other].release()
            worker.pipe.close()
            self.start(slot)
        return events

    def _is_ready(self, slot: int) -> bool:
        return bool(self.exchange.words[_READY + slot])

    def start_spare(self) -> None:
        """Load the second worker, once the first one serves."""
        spare = 1 - self.serving
        if self._workers[spare] is None:
            self.start(spare)

    def close(self) -> None:
        """End every worker and remove the shared memory."""
        for worker in self._workers:
            if worker is not None:
                worker.process.kill()
                worker.process.join(2.0)
                worker.pipe.close()
        self._workers = [None] * SLOTS
        self.exchange.close()
