"""Notes as a language: a tune on a grid of ticks, and the events that a composer reads and writes it in.

A note is four events, in this order: the time since the onset before it, its pitch, how hard it is struck, and how long
it sounds. A time is one or more events of falling size that add up to it; ``end`` stands before and after a tune. All
events are one categorical vocabulary, as in Oore et al., "This time with feeling" (2018, section 3), but on a grid.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property

TICKS_PER_QUARTER = 24
SHIFTS_TICKS = (0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 20, 21, 24, 30, 36, 42, 48, 60, 72, 84, 96)
DURATIONS_TICKS = (1, 2, 3, 4, 6, 8, 9, 12, 15, 16, 18, 20, 21, 24, 30, 36, 42, 48, 60, 72, 84, 96, 120, 144, 192)
VELOCITY_STEP = 8
LONGEST_REST_TICKS = 4 * 96
"""A longer silence inside a tune is read as one of this length."""
END, SHIFT, PITCH, VELOCITY, DURATION = "end", "shift", "pitch", "velocity", "duration"
KINDS = (SHIFT, PITCH, VELOCITY, DURATION)
FOLLOWING = {
    END: (SHIFT, END),
    SHIFT: (SHIFT, PITCH),
    PITCH: (VELOCITY,),
    VELOCITY: (DURATION,),
    DURATION: (SHIFT, END),
}
"""Which kinds may stand after which."""
MAX_TOKENS = 4096


class KeyNameError(ValueError):
    """A key that nobody knows; the text says how keys are written."""


@dataclass(frozen=True)
class Note:
    """One note on the grid; times in ticks, TICKS_PER_QUARTER to the quarter note."""

    start_ticks: int
    duration_ticks: int
    pitch: int  # MIDI number
    velocity: int  # 1..127

    @property
    def end_ticks(self) -> int:
        return self.start_ticks + self.duration_ticks


@dataclass(frozen=True)
class Event:
    """What one token says: its kind and its value in ticks, MIDI numbers or nothing (``end``)."""

    kind: str
    value: int


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model, in the order of its outputs, and the range of pitches that it was trained on.

    ValueError names a token that means nothing, or a kind that is missing.
    """

    ticks_per_quarter: int
    tokens: tuple[str, ...]
    lowest_pitch: int
    highest_pitch: int

    def __post_init__(self) -> None:
        if not 0 < len(self.tokens) <= MAX_TOKENS:
            raise ValueError(f"vocabulary.tokens: {len(self.tokens)} are outside 1..{MAX_TOKENS}")
        if len(set(self.tokens)) != len(self.tokens):
            raise ValueError("vocabulary.tokens: one appears twice")
        if self.ticks_per_quarter != TICKS_PER_QUARTER:
            raise ValueError(f"vocabulary.ticks_per_quarter: must be {TICKS_PER_QUARTER}")
        if not 0 <= self.lowest_pitch <= self.highest_pitch - 11 <= 127 - 11:
            raise ValueError("vocabulary.lowest_pitch, highest_pitch: must span an octave within 0..127")
        for kind in KINDS:
            if not self.of_kind(kind):
                raise ValueError(f"vocabulary.tokens: none is a {kind}")
        if END not in self.tokens:
            raise ValueError("vocabulary.tokens: 'end' is missing")
        if 1 not in self.of_kind(SHIFT) or 0 not in self.of_kind(SHIFT):
            raise ValueError("vocabulary.tokens: 'shift_0' and 'shift_1' are needed")
        if not set(range(self.lowest_pitch, self.highest_pitch + 1)) <= self.of_kind(PITCH).keys():
            raise ValueError("vocabulary.tokens: not every pitch of the range has one")

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """What each token says, in the order of the tokens."""
        return tuple(_event(token) for token in self.tokens)

    @cached_property
    def end(self) -> int:
        """The number of the token that stands before and after a tune."""
        return self.tokens.index(END)

    def of_kind(self, kind: str) -> dict[int, int]:
        """Value -> number of the token, of all tokens of a kind, by rising value."""
        return self._by_kind[kind]

    @cached_property
    def _by_kind(self) -> dict[str, dict[int, int]]:
        found: dict[str, dict[int, int]] = {kind: {} for kind in (END, *KINDS)}
        for number, event in sorted(enumerate(self.events), key=lambda item: item[1].value):
            found[event.kind][event.value] = number
        return found

    def shift_tokens(self, ticks: int) -> list[int]:
        """The tokens of a time since the onset before; LONGEST_REST_TICKS at most."""
        shifts, left = self.of_kind(SHIFT), min(ticks, LONGEST_REST_TICKS)
        if left <= 0:
            return [shifts[0]]
        tokens = []
        for value in sorted(shifts, reverse=True):
            while 0 < value <= left:
                tokens.append(shifts[value])
                left -= value
        return tokens

    def note_tokens(self, note: Note) -> list[int]:
        """The tokens of pitch, velocity and duration, the nearest that there are."""
        velocities, durations = self.of_kind(VELOCITY), self.of_kind(DURATION)
        velocity = min(velocities, key=lambda value: abs(value - note.velocity))
        duration = min(durations, key=lambda value: (abs(value - note.duration_ticks), value))
        return [self.of_kind(PITCH)[note.pitch], velocities[velocity], durations[duration]]

    def encode(self, notes: Iterable[Note]) -> list[int]:
        """The tokens of notes in order of time, without ``end``; the first note's time counts from its own start."""
        tokens, before = [], None
        for note in notes:
            tokens += self.shift_tokens(0 if before is None else note.start_ticks - before)
            tokens += self.note_tokens(note)
            before = note.start_ticks
        return tokens

    def decode(self, tokens: Iterable[int]) -> list[Note]:
        """The notes of tokens, the first at 0; the inverse of ``encode`` for what lies on the grid.

        ValueError where the order of kinds is broken.
        """
        notes: list[Note] = []
        now, pitch, velocity, kind = 0, 0, 0, END
        for token in tokens:
            event = self.events[token]
            if event.kind not in FOLLOWING[kind]:
                raise ValueError(f"{self.tokens[token]}: does not stand after a {kind}")
            kind = event.kind
            if kind == SHIFT:
                now += event.value
            elif kind == PITCH:
                pitch = event.value
            elif kind == VELOCITY:
                velocity = event.value
            elif kind == DURATION:
                notes.append(Note(now, event.value, pitch, velocity))
        return notes


def _event(token: str) -> Event:
    if token == END:
        return Event(END, 0)
    match = re.fullmatch(rf"({'|'.join(KINDS)})_(\d{{1,3}})", token)
    if match is None:
        raise ValueError(f"vocabulary.tokens: '{token}' means nothing")
    kind, value = match[1], int(match[2])
    low = 1 if kind in (VELOCITY, DURATION) else 0
    if not low <= value <= (127 if kind in (PITCH, VELOCITY) else 960):
        raise ValueError(f"vocabulary.tokens: '{token}' is outside its range")
    return Event(kind, value)


def make_vocabulary(lowest_pitch: int = 0, highest_pitch: int = 127) -> Vocabulary:
    """The vocabulary that models are trained with, for tunes of this range."""
    half = VELOCITY_STEP // 2
    tokens = [END]
    tokens += [f"{SHIFT}_{ticks}" for ticks in SHIFTS_TICKS]
    tokens += [f"{PITCH}_{pitch}" for pitch in range(128)]
    tokens += [f"{VELOCITY}_{at + half}" for at in range(0, 128, VELOCITY_STEP)]
    tokens += [f"{DURATION}_{ticks}" for ticks in DURATIONS_TICKS]
    return Vocabulary(TICKS_PER_QUARTER, tuple(tokens), lowest_pitch, highest_pitch)


TONICS = {"c": 0, "d": 2, "e": 4, "f": 5, "g": 7, "a": 9, "b": 11}
SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "ionian": (0, 2, 4, 5, 7, 9, 11),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "phrygian": (0, 1, 3, 5, 7, 8, 10),
    "lydian": (0, 2, 4, 6, 7, 9, 11),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "aeolian": (0, 2, 3, 5, 7, 8, 10),
    "locrian": (0, 1, 3, 5, 6, 8, 10),
    "harmonic minor": (0, 2, 3, 5, 7, 8, 11),
    "melodic minor": (0, 2, 3, 5, 7, 9, 11),
    "major pentatonic": (0, 2, 4, 7, 9),
    "minor pentatonic": (0, 3, 5, 7, 10),
    "blues": (0, 3, 5, 6, 7, 10),
    "whole tone": (0, 2, 4, 6, 8, 10),
}


def pitch_classes(key: str) -> frozenset[int]:
    """The pitch classes (0 is C) of a key such as 'D dorian', 'F# minor' or 'Bb'; KeyNameError if it is none."""
    match = re.fullmatch(r"\s*([A-Ga-g])(#|b|♯|♭)?\s*(.*?)\s*", key)
    scale = " ".join(match[3].casefold().replace("_", " ").replace("-", " ").split()) or "major" if match else ""
    if match is None or scale not in SCALES:
        near = get_close_matches(scale, SCALES, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise KeyNameError(
            f"'{key}' is no key: {hint}write a tonic, A to G with # or b, and a scale: {', '.join(SCALES)}"
        )
    tonic = TONICS[match[1].casefold()] + {"#": 1, "♯": 1, "b": -1, "♭": -1}.get(match[2], 0)
    return frozenset((tonic + step) % 12 for step in SCALES[scale])


def octaves_into_range(notes: Sequence[Note], lowest_pitch: int, highest_pitch: int) -> int:
    """By how many octaves to move notes so that as many as can be lie in a range, the fewest octaves first."""
    moves = sorted(range(-10, 11), key=abs)
    inside = [sum(lowest_pitch <= note.pitch + 12 * move <= highest_pitch for note in notes) for move in moves]
    return moves[inside.index(max(inside))]
