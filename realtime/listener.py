"""What style goes in and what comes out, heard beside a performance by a process of its own.

The audio callback pushes what it played into a ring and waits for nobody; the listener empties the ring at the lowest
priority that there is and leaves what it hears in a mailbox. Where it is too slow, it misses sound and not the stage.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from realtime.bundle import Bundle, check_kind, read_bundle
from realtime.processes import interrupts_held
from realtime.ring import Mailbox, Ring

if TYPE_CHECKING:
    from realtime.recognise import Recogniser

RING_FRAMES = 96_000
REST_S = 0.02
LEVEL_SECONDS = 0.5
"""Time constant of the level that tells playing from a pause."""
SHORTEST_LIFE_S = 2.0
LIVES = 3
"""So many listeners in a row may end within SHORTEST_LIFE_S; then there is none."""
SIDES = 2
SILENT_POWER = 1e-6
"""Mean square, -60 dBFS: what is quieter is a pause."""


@dataclass(frozen=True)
class Heard:
    """The likeliest style of what goes in and of what comes out, and how likely it is; None in a pause."""

    going_in: tuple[str, float] | None
    coming_out: tuple[str, float] | None


def read_recogniser(path: Path) -> Bundle:
    """A model file that recognises styles. Raises BundleError."""
    bundle = read_bundle(path)
    check_kind(bundle, "recognise", "recognises no styles", "give a recogniser to --recognise")
    return bundle


class Ear:
    """A recogniser that hears what goes in and what comes out, side by side. One thread at a time."""

    def __init__(self, recogniser: Recogniser, sample_rate: int) -> None:
        """``sample_rate``: of what it is given, in Hz."""
        self._recogniser, self._states = recogniser, recogniser.silence(SIDES)
        self._hop, self._rate = recogniser.manifest.spectral.hop_samples, recogniser.sample_rate
        self._rest = np.zeros((SIDES, 0), np.float32)
        self._resampler: Any = None
        if sample_rate != self._rate:
            import soxr

            self._resampler = soxr.ResampleStream(sample_rate, self._rate, SIDES, dtype="float32", quality="LQ")
        self.power = np.zeros(SIDES)
        self.probabilities = np.zeros((SIDES, len(recogniser.manifest.styles)), np.float32)

    def hear(self, frames: NDArray[np.float32]) -> bool:
        """frames [n, 2 * channels], inputs and then outputs; whether ``power`` and ``probabilities`` are new."""
        sides = np.stack([part.mean(axis=1) for part in np.split(frames, SIDES, axis=1)])
        sides = np.nan_to_num(sides, posinf=0.0, neginf=0.0)
        if self._resampler is not None:
            sides = self._resampler.resample_chunk(np.ascontiguousarray(sides.T)).reshape(-1, SIDES).T
        self._rest = np.concatenate([self._rest, sides], axis=1)
        whole = self._rest.shape[1] // self._hop * self._hop
        if not whole:
            return False
        audio, self._rest = np.ascontiguousarray(self._rest[:, :whole]), self._rest[:, whole:]
        self.probabilities, _, self._states = self._recogniser.step(audio, self._states)
        kept = np.exp(-whole / (LEVEL_SECONDS * self._rate))
        self.power = kept * self.power + (1.0 - kept) * np.square(audio, dtype=np.float64).mean(axis=1)
        return True


def listener_process(model: Path, ring_name: str, mailbox_name: str, sample_rate: int, parent: int) -> None:
    """A listener's main function; it ends when process ``parent`` does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C
    with contextlib.suppress(OSError, AttributeError):
        os.nice(19)
    from realtime.recognise import Recogniser  # not before: loading it is work too

    ear = Ear(Recogniser(read_bundle(model)), sample_rate)
    ring, mailbox = Ring.attach(ring_name), Mailbox.attach(mailbox_name)
    ring.pop()  # what was played while the model loaded is old
    while os.getppid() == parent:
        frames = ring.pop()
        if len(frames) and ear.hear(frames):
            mailbox.write(np.concatenate([ear.power, ear.probabilities.ravel()]).astype(np.float64))
        time.sleep(REST_S)
    os._exit(0)  # arrays still point into shared memory, and nobody is left to read of it


class Listener:
    """The listener of a performance, for the process that owns it; ``watch`` a few times a second. One thread."""

    def __init__(self, context: SpawnContext, bundle: Bundle, channels: int) -> None:
        """``bundle``: of ``read_recogniser``. Raises OSError where there is no room for shared memory."""
        self._context, self._bundle = context, bundle
        styles = len(bundle.manifest.styles)
        self._ring = Ring.create(RING_FRAMES, SIDES * channels)
        try:
            self._mailbox = Mailbox.create(SIDES * (1 + styles))
        except OSError:
            self._ring.close()
            raise
        self._process: Any = None
        self._sample_rate = 0
        self._started_at, self._short_lives = 0.0, 0

    @property
    def ring_name(self) -> str:
        """Where the audio process puts what it played: frames of inputs and then outputs."""
        return self._ring.name

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def watch(self, sample_rate: int) -> None:
        """Start the process, or another one where it died or the performance has another rate now."""
        if self._process is not None:
            alive = self._process.is_alive()
            if alive and sample_rate == self._sample_rate:
                return
            if not alive:
                lived = time.monotonic() - self._started_at
                self._short_lives = self._short_lives + 1 if lived < SHORTEST_LIFE_S else 0
        if self._short_lives >= LIVES:
            return
        self._end()
        self._sample_rate, self._started_at = sample_rate, time.monotonic()
        self._mailbox.write(np.zeros(self._mailbox.size))
        self._process = self._context.Process(
            target=listener_process,
            args=(self._bundle.path, self._ring.name, self._mailbox.name, sample_rate, os.getpid()),
            name="restyle-listener",
            daemon=True,
        )
        with interrupts_held():
            self._process.start()

    def heard(self) -> Heard:
        """The latest; any moment."""
        values = self._mailbox.read()
        styles = self._bundle.manifest.styles
        said = []
        for power, row in zip(values[:SIDES], values[SIDES:].reshape(SIDES, -1), strict=True):
            number = int(row.argmax())
            playing = power > SILENT_POWER
            said.append((styles[number].label, float(row[number])) if playing else None)
        return Heard(*said)

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(2.0)
            self._process = None

    def close(self) -> None:
        """End the process and remove the shared memory."""
        self._end()
        self._ring.close()
        self._mailbox.close()
