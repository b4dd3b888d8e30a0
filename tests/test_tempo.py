"""The tempo that is heard: a performance's notes come to lie where the score has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realtime.notes import Note
from realtime.tempo import Beat, HeardNote, TempoError, follow, quarter_of, ticks_of
from realtime.tunes import Tune, read_tune

TUNES = Path(__file__).parent / "data"
JIG, REEL = (read_tune(TUNES / name) for name in ("sligo_jig.mid", "wind_that_shakes_the_barley.mid"))


def performed(notes: tuple[Note, ...], quarter_s: float, jitter_s: float = 0.0, seed: int = 0) -> list[HeardNote]:
    """Notes as somebody plays them: at a tempo, each onset a little off, a little shorter than written."""
    random = np.random.default_rng(seed)
    heard = []
    for note in notes:
        start_s = 100.0 + note.start_ticks * quarter_s / 24 + jitter_s * random.standard_normal()
        heard.append(HeardNote(start_s, start_s + 0.9 * note.duration_ticks * quarter_s / 24, note.pitch, 80))
    return heard


@given(
    st.lists(st.sampled_from([6, 12, 12, 12, 24, 36, 48]), min_size=6, max_size=40),
    st.floats(0.3, 0.75),
)
def test_intervals_that_are_exact_come_to_lie_on_the_grid(intervals: list[int], quarter_s: float) -> None:
    places = [0, *np.cumsum(intervals).tolist()]
    assert ticks_of([place * quarter_s / 24 for place in places], quarter_s) == places


def followed(notes: tuple[Note, ...], quarter_s: float, seed: int) -> tuple[float, float]:
    """Of an uneven playing: the share of intervals that are heard as written, and how far off the tempo is."""
    beat, found = follow(performed(notes, quarter_s, 0.006, seed))
    level = round(np.log2(beat.quarter_s / quarter_s))  # another level of the same metre is as good
    assert abs(level) <= 1
    heard = np.diff([note.start_ticks for note in found]) * 2.0**level
    share = float(np.mean(heard == np.diff([note.start_ticks for note in notes])))
    return share, abs(beat.quarter_s / (quarter_s * 2.0**level) - 1.0)


@settings(max_examples=40)
@given(st.floats(0.32, 0.6), st.integers(0, 100), st.sampled_from([JIG, REEL]))
def test_a_real_tune_from_100_to_187_quarters_a_minute_is_followed_in_spite_of_uneven_playing(
    quarter_s: float, seed: int, tune: Tune
) -> None:
    """Now and then an onset lies three deviations off; nine in ten intervals are right all the same."""
    share, error = followed(tune.notes[:48], quarter_s, seed)
    assert share > 0.9 and error < 0.03


@pytest.mark.parametrize("tune", [JIG, REEL], ids=["jig", "reel"])
def test_hardly_an_interval_of_an_uneven_playing_is_misheard(tune: Tune) -> None:
    quarters_s = np.linspace(0.32, 0.6, 100)
    shares, errors = zip(*(followed(tune.notes[:48], quarter, n) for n, quarter in enumerate(quarters_s)), strict=True)
    assert np.mean(shares) > 0.99 and np.mean(errors) < 0.005
    good = [share >= 0.95 and error <= 0.02 for share, error in zip(shares, errors, strict=True)]
    assert sum(good) >= 99


@pytest.mark.parametrize("quarter_s", [0.3, 0.4, 0.5])
def test_the_next_beat_is_foretold_within_a_fiftieth_of_a_second(quarter_s: float) -> None:
    notes = REEL.notes[:40]
    beat, found = follow(performed(notes, quarter_s, 0.005, 3))
    scale = beat.quarter_s / quarter_s
    last = found[-1].start_ticks
    after = round(24 / scale)
    wanted_s = 100.0 + (notes[39].start_ticks + 24) * quarter_s / 24
    assert beat.time_s(last + after) == pytest.approx(wanted_s, abs=0.02)


def test_a_tempo_that_moves_is_followed_to_its_end() -> None:
    now, heard = 0.0, []
    for number in range(64):
        interval = 0.20 + 0.05 * number / 63
        heard.append(HeardNote(now, now + 0.15, 60 + number % 5, 80))
        now += interval
    beat, _ = follow(heard)
    assert beat.quarter_s == pytest.approx(0.5, rel=0.07)


def test_chords_are_one_onset() -> None:
    starts = [(0.5 * beat + 0.004 * voice, 60 + 4 * voice) for beat in range(8) for voice in range(3)]
    heard = [HeardNote(start_s, start_s + 0.4, pitch, 80) for start_s, pitch in starts]
    beat, notes = follow(heard)
    assert beat.quarter_s == pytest.approx(0.5, rel=0.01)
    assert sorted({note.start_ticks for note in notes}) == [24 * number for number in range(8)]


@pytest.mark.parametrize("onsets", [[], [1.0], [1.0, 1.01, 2.0], [0.0, 9.0, 18.0]])
def test_too_little_playing_has_no_tempo(onsets: list[float]) -> None:
    with pytest.raises(TempoError):
        quarter_of(onsets)


def test_times_and_places_are_each_other_s_inverse() -> None:
    beat = Beat(10.0, 0.5)
    assert beat.time_s(48) == 11.0 and beat.ticks(11.0) == 48.0 and beat.tempo_bpm == 120.0
