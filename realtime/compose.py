"""Notes that continue others: a model file of kind ``notes`` in onnxruntime, one event at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from realtime.bundle import Bundle, BundleError, check_kind
from realtime.notes import (
    DURATION,
    FOLLOWING,
    PITCH,
    SHIFT,
    VELOCITY,
    Note,
    Vocabulary,
    octaves_into_range,
)
from realtime.stream import make_session
from realtime.tunes import Tune

CONTEXT_NOTES = 512
"""So many of the last notes before it a continuation has read."""
ENTRY_TICKS = 12
"""A continuation enters on a multiple of this, an eighth note."""


class NoteStream:
    """A notes model in motion: a token in, the logits of the next one out. Not for two threads at a time."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises BundleError for a model that does not make notes."""
        manifest = bundle.manifest
        check_kind(bundle, "notes", "makes no notes", "train one with objective = 'compose'")
        assert manifest.vocabulary is not None, "a checked model of notes has one"
        self.vocabulary: Vocabulary = manifest.vocabulary
        try:
            self._session = make_session(bundle.graph)
        except Exception as error:
            raise BundleError(bundle.path, "graph", f"onnxruntime refuses it: {error}") from None
        self._outputs = ["logits", *(f"next.{state.name}" for state in manifest.states)]
        self._zeros = {f"state.{state.name}": np.zeros((1, *state.shape), np.float32) for state in manifest.states}
        self._states = self._zeros

    def reset(self) -> None:
        """Back to the beginning: every state to zeros."""
        self._states = self._zeros

    def step(self, token: int) -> NDArray[np.float32]:
        """Read one token; the logits [tokens] of what comes next."""
        inputs = {"token": np.array([token], np.int64), **self._states}
        logits, *states = self._session.run(self._outputs, inputs)
        self._states = dict(zip(self._zeros, states, strict=True))
        return np.asarray(logits)[0]


@dataclass(frozen=True)
class Sampling:
    """How freely the next event is drawn. ``top_k`` 0: from all; ``scale``: the pitch classes allowed, None: all.

    ValueError names a field that is wrong.
    """

    temperature: float = 1.0
    top_k: int = 0
    scale: frozenset[int] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 10.0:
            raise ValueError(f"temperature: must lie between 0 (the likeliest event) and 10, got {self.temperature:g}")
        if self.top_k < 0:
            raise ValueError(f"top_k: must not be below 0 (draw from all), got {self.top_k}")

    def draw(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_], random: np.random.Generator) -> int:
        """The number of one of the ``allowed`` tokens [tokens]; at least one must be."""
        scores = np.where(allowed, logits.astype(np.float64), -np.inf)
        if self.temperature == 0.0:
            return int(scores.argmax())
        if 0 < self.top_k < int(allowed.sum()):
            kept = np.argsort(-scores, kind="stable")[: self.top_k]
            scores = np.where(np.isin(np.arange(len(scores)), kept), scores, -np.inf)
        weights = np.exp((scores - scores.max()) / self.temperature)
        return int(random.choice(len(weights), p=weights / weights.sum()))


class Continuation(Iterator[Note]):
    """Notes without end that continue others, the first of them at ``entry_ticks``; one thread at a time.

    The same notes, sampling and random seed give the same continuation.
    """

    def __init__(
        self, stream: NoteStream, notes: Sequence[Note], entry_ticks: int, sampling: Sampling, random_seed: int
    ) -> None:
        """``notes``: in order of time, at least one, the last beginning before ``entry_ticks``."""
        self._stream, self._sampling = stream, sampling
        self._random = np.random.default_rng(random_seed)
        self._vocabulary = vocabulary = stream.vocabulary
        self._octaves = octaves_into_range(notes, vocabulary.lowest_pitch, vocabulary.highest_pitch)
        self._masks = {kind: self._tokens_of(vocabulary.of_kind(kind).values()) for kind in FOLLOWING}
        self._pitches = {
            pitch: token
            for pitch, token in vocabulary.of_kind(PITCH).items()
            if vocabulary.lowest_pitch <= pitch <= vocabulary.highest_pitch
            and 0 <= pitch - 12 * self._octaves <= 127
            and (sampling.scale is None or pitch % 12 in sampling.scale)
        }
        self._now = notes[-1].start_ticks
        self._begun: set[int] = set()
        stream.reset()
        read = [replace(note, pitch=min(127, max(0, note.pitch + 12 * self._octaves))) for note in notes]
        tokens = [vocabulary.end, *vocabulary.encode(read[-CONTEXT_NOTES:])]
        self._forced = vocabulary.shift_tokens(entry_ticks - self._now)
        self._rest_ticks = entry_ticks - self._now - sum(vocabulary.events[token].value for token in self._forced)
        for token in tokens:
            self._logits = stream.step(token)

    def _tokens_of(self, numbers: Iterable[int]) -> NDArray[np.bool_]:
        mask = np.zeros(len(self._vocabulary.tokens), dtype=bool)
        mask[list(numbers)] = True
        return mask

    def __next__(self) -> Note:
        """The next note, in order of time; its length is the model's, also where its pitch begins again before."""
        if self._forced:
            for token in self._forced:
                self._say(token)
            self._now += self._rest_ticks  # of a silence longer than the model reads
            self._forced = []
        else:
            self._shift()
        free = [token for pitch, token in self._pitches.items() if pitch not in self._begun]
        pitch = self._draw(self._tokens_of(free))
        self._begun.add(pitch)
        velocity = self._draw(self._masks[VELOCITY])
        duration = self._draw(self._masks[DURATION])
        return Note(self._now, duration, pitch - 12 * self._octaves, velocity)

    def _shift(self) -> None:
        """Go on to the next onset: times of falling size, a pitch after them."""
        vocabulary = self._vocabulary
        shifts = vocabulary.of_kind(SHIFT)
        allowed = self._masks[SHIFT].copy()
        allowed[shifts[0]] = len(self._begun) < len(self._pitches)
        passed = 0
        while True:
            token = self._sampling.draw(self._logits, allowed, self._random)
            event = vocabulary.events[token]
            if event.kind == PITCH:  # drawn again, by itself: what else was allowed here is then over
                return
            self._say(token)
            passed += event.value
            if event.value == 0:
                return
            smaller = [number for value, number in shifts.items() if 0 < value < event.value]
            allowed = self._tokens_of([*smaller, *self._pitches.values()])

    def _draw(self, allowed: NDArray[np.bool_]) -> int:
        """Draw an event, let the model read it; its value."""
        token = self._sampling.draw(self._logits, allowed, self._random)
        self._say(token)
        return self._vocabulary.events[token].value

    def _say(self, token: int) -> None:
        event = self._vocabulary.events[token]
        if event.kind == SHIFT and event.value:
            self._now += event.value
            self._begun = set()
        self._logits = self._stream.step(token)


def entry_after(notes: Sequence[Note], grid_ticks: int = ENTRY_TICKS) -> int:
    """The first place on the grid where all notes have ended."""
    return -(-max(note.end_ticks for note in notes) // grid_ticks) * grid_ticks


def compose_bars(stream: NoteStream, seed: Tune, bars: int, sampling: Sampling, random_seed: int) -> Tune:
    """``bars`` bars that continue the seed in its tempo and metre, from where its last note has ended."""
    entry = entry_after(seed.notes)
    end = entry + bars * seed.bar_ticks
    notes: list[Note] = []
    for note in Continuation(stream, seed.notes, entry, sampling, random_seed):
        if note.start_ticks >= end:
            break
        notes.append(replace(note, duration_ticks=min(note.duration_ticks, end - note.start_ticks)))
    return replace(seed, notes=tuple(notes))
