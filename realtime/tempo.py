"""The tempo of a playing from its onsets: where the notes of a performance lie on the grid, and when the next tick is.

Intervals between onsets are clustered and the clusters vote for each other by whole ratios, as in Dixon, "Automatic
extraction of tempo and beat from expressive performances", Journal of New Music Research 30(1), 2001, section 3. Which
level is the quarter note is decided by a preferred tempo (Parncutt, "A perceptual model of pulse salience", 1994).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from realtime.notes import TICKS_PER_QUARTER, Note

CHORD_S = 0.03
"""Onsets nearer to each other are one."""
LONGEST_INTERVAL_S = 2.5
CLUSTER_WIDTH_S = 0.025
SLOWEST_QUARTER_S, FASTEST_QUARTER_S = 1.2, 0.2
PREFERRED_QUARTER_S, PREFERENCE_OCTAVES = 0.4, 0.6
LATEST_ONSETS = 64
GRID_TICKS = (4, 6, 8, 12, 16, 18, 24, 30, 36, 42, 48)
"""Intervals that a player means, up to two quarters; longer ones are multiples of 12."""
MEMORY_TICKS = 4 * TICKS_PER_QUARTER
"""Onsets so long ago weigh half: a player's tempo moves."""


class TempoError(ValueError):
    """Too few onsets to say anything."""


@dataclass(frozen=True)
class HeardNote:
    """One note of a performance; times in seconds on any clock."""

    start_s: float
    end_s: float
    pitch: int
    velocity: int


@dataclass(frozen=True)
class Beat:
    """Where the grid lies in time: tick 0 at ``origin_s``, a quarter note every ``quarter_s``."""

    origin_s: float
    quarter_s: float

    @property
    def tempo_bpm(self) -> float:
        return 60.0 / self.quarter_s

    def time_s(self, ticks: float) -> float:
        """When a tick of the grid is."""
        return self.origin_s + ticks * self.quarter_s / TICKS_PER_QUARTER

    def ticks(self, time_s: float) -> float:
        """Which place of the grid a time is; not rounded."""
        return (time_s - self.origin_s) / self.quarter_s * TICKS_PER_QUARTER


def quarter_of(onsets_s: Sequence[float]) -> float:
    """The quarter note's length in seconds of a playing with these onsets, in order. TempoError if fewer than three."""
    onsets = _without_chords(onsets_s)[-LATEST_ONSETS:]
    if len(onsets) < 3:
        raise TempoError(f"a tempo needs three onsets, there are {len(onsets)}")
    intervals = sorted(
        later - earlier for earlier, later in itertools.combinations(onsets, 2) if later - earlier <= LONGEST_INTERVAL_S
    )
    if not intervals:
        raise TempoError(f"no two onsets lie within {LONGEST_INTERVAL_S:g} s")
    clusters = _clusters(intervals)
    best, quarter = -1.0, 0.0
    for mean, _ in clusters:
        # A player may sound no quarter notes at all, so the half and the double of a heard interval stand too.
        for candidate in (mean / 2, mean, 2 * mean):
            if FASTEST_QUARTER_S <= candidate <= SLOWEST_QUARTER_S:
                preference = math.log2(candidate / PREFERRED_QUARTER_S) / PREFERENCE_OCTAVES
                score = _votes(candidate, clusters) * math.exp(-0.5 * preference**2)
                if score > best:
                    best, quarter = score, candidate
    if not quarter:  # all notes are longer or shorter than any quarter
        quarter = intervals[0]
        while quarter > SLOWEST_QUARTER_S:
            quarter /= 2
        while quarter < FASTEST_QUARTER_S:
            quarter *= 2
    return quarter


def _without_chords(onsets_s: Sequence[float]) -> list[float]:
    alone: list[float] = []
    for onset in onsets_s:
        if not alone or onset - alone[-1] >= CHORD_S:
            alone.append(onset)
    return alone


def _clusters(intervals: Sequence[float]) -> list[tuple[float, int]]:
    """Mean and size of groups of like intervals, which come in rising order."""
    groups: list[list[float]] = []
    for interval in intervals:
        if groups and interval - sum(groups[-1]) / len(groups[-1]) < CLUSTER_WIDTH_S:
            groups[-1].append(interval)
        else:
            groups.append([interval])
    return [(sum(group) / len(group), len(group)) for group in groups]


def _votes(period: float, clusters: Sequence[tuple[float, int]]) -> float:
    """What clusters say for a period: those that are a whole multiple or part of it, the simpler the ratio the more."""
    total = 0.0
    for mean, size in clusters:
        longer, shorter = max(mean, period), min(mean, period)
        ratio = round(longer / shorter)
        if abs(longer - ratio * shorter) < CLUSTER_WIDTH_S:
            total += size * (6 - ratio if ratio <= 4 else 1 if ratio <= 8 else 0)
    return total


def ticks_of(onsets_s: Sequence[float], quarter_s: float) -> list[int]:
    """The place of each onset on the grid, the first at 0: every interval as the nearest that a player means."""
    places, last_s = [], None
    now = 0
    for onset in onsets_s:
        if last_s is None:
            last_s = onset
        elif onset - last_s >= CHORD_S:
            exact = (onset - last_s) / quarter_s * TICKS_PER_QUARTER
            if exact > GRID_TICKS[-1]:
                now += 12 * round(exact / 12)
            else:
                now += min(GRID_TICKS, key=lambda ticks: abs(ticks - exact))
            last_s = onset
        places.append(now)
    return places


def follow(heard: Sequence[HeardNote]) -> tuple[Beat, list[Note]]:
    """The beat that a playing ends in, and its notes on that beat's grid; ``heard`` in order of their starts.

    The quarter is found from all intervals, then a line is laid through the onsets, the late ones counting most.
    Raises TempoError.
    """
    onsets = [note.start_s for note in heard]
    quarter = quarter_of(onsets)
    places = ticks_of(onsets, quarter)
    for _ in range(2):  # better intervals give better places
        beat = _line(onsets, places)
        places = ticks_of(onsets, beat.quarter_s)
    beat = _line(onsets, places)
    tick_s = beat.quarter_s / TICKS_PER_QUARTER
    notes = [
        Note(place, max(1, round((note.end_s - note.start_s) / tick_s)), note.pitch, note.velocity)
        for place, note in zip(places, heard, strict=True)
    ]
    return beat, sorted(notes, key=lambda note: (note.start_ticks, note.pitch))


def _line(onsets_s: Sequence[float], places: Sequence[int]) -> Beat:
    """Weighted least squares of onset times over their places."""
    ticks = np.asarray(places, dtype=np.float64)
    weights = 0.5 ** ((ticks[-1] - ticks) / MEMORY_TICKS)
    slope, origin = np.polyfit(ticks, np.asarray(onsets_s), 1, w=np.sqrt(weights))
    return Beat(float(origin), float(slope) * TICKS_PER_QUARTER)
