"""Playing that nobody recorded: audible, varied, at the usual levels, and the same again from the same seed."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor  # noqa: E402

from training.augment import rms  # noqa: E402
from training.invented import CONTROL_HZ, HIGHEST_NOTE, LOWEST_NOTE, _loudness, _pitch, invent_playing  # noqa: E402
from training.losses import clear_periods  # noqa: E402
from training.recipe import AugmentConfig  # noqa: E402

RATE = 48_000


def playing(rows: int, samples: int, seed: int = 0, config: AugmentConfig | None = None) -> Tensor:
    return invent_playing(rows, samples, RATE, config or AugmentConfig(), torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(4_000, 60_000))
@settings(max_examples=15, deadline=None)
def test_any_length_is_played_within_full_scale_and_the_levels_asked_for(seed: int, rows: int, samples: int) -> None:
    made = playing(rows, samples, seed)
    assert made.shape == (rows, samples) and bool(made.isfinite().all())
    assert float(made.abs().max()) <= 0.99 + 1e-6
    assert float(rms(made).max()) <= 10.0 ** (-12.0 / 20.0) + 1e-6


def test_the_level_is_the_one_drawn_where_peaks_leave_room() -> None:
    made = playing(40, 24_000, config=AugmentConfig(level_dbfs=(-30.0, -30.0)))
    decibels = 20.0 * rms(made).log10()
    assert float(decibels.max()) == pytest.approx(-30.0, abs=0.01)
    assert float((decibels < -30.1).float().mean()) < 0.2


def test_a_seed_is_one_playing_and_rows_and_seeds_differ() -> None:
    made = playing(3, 24_000, 5)
    assert torch.equal(made, playing(3, 24_000, 5))
    alike = torch.nn.functional.normalize(torch.cat([made, playing(3, 24_000, 6)]))
    assert float((alike @ alike.T - torch.eye(6)).abs().max()) < 0.5


def test_nearly_all_of_it_has_a_pitch_and_some_of_it_glides() -> None:
    made = playing(60, RATE, 1)
    clear = clear_periods(made, RATE)[2].mean(dim=1)[:, 0]  # how clear a row's period is, on average
    assert float((clear > 0.3).float().mean()) > 0.9
    random = torch.Generator().manual_seed(2)
    seconds = torch.arange(600) / CONTROL_HZ
    hertz = _pitch(torch.zeros(40, 600, dtype=torch.long), seconds, random)
    note = 69.0 + 12.0 * torch.log2(hertz / 440.0)
    within = note.amax(dim=1) - note.amin(dim=1)  # of one held note, in semitones
    assert float(within.min()) < 0.3 and 0.5 < float(within.median()) < 4.0 and float(within.max()) < 8.0
    assert float(note.min()) > LOWEST_NOTE - 20.0 and float(note.max()) < HIGHEST_NOTE + 20.0


def test_some_notes_are_held_and_some_die_away() -> None:
    random = torch.Generator().manual_seed(3)
    age = torch.arange(400)[None].expand(80, -1) / CONTROL_HZ
    loud = _loudness(torch.zeros(80, 400, dtype=torch.long), age, age[0], random)
    left = loud[:, -1] / loud.amax(dim=1)
    assert 0.2 < float((left < 0.3).float().mean()) < 0.7
    assert 0.2 < float((left > 0.5).float().mean())
