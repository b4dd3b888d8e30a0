"""Controls are snapshots; mixes are weighted sums; levels of styles match."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.bundle import DEFAULT_MODEL, StyleError, blend_vectors, read_bundle
from realtime.controls import (
    MAX_LEVEL_MATCH_DB,
    TARGET_LOUDNESS_LUFS,
    Controls,
    Performer,
    blend_loss_lu,
    db_to_gain,
    level_gain_db,
    mix_controls,
    parse_mix,
    select_mix,
)

MANIFEST = read_bundle(DEFAULT_MODEL).manifest
number = st.floats(-50, 50, width=32, allow_subnormal=False)


@given(st.lists(number, min_size=1, max_size=20), number, number, number, number)
def test_controls_survive_the_mailbox(vector: list[float], a: float, b: float, c: float, d: float) -> None:
    controls = Controls(np.array(vector, np.float32), a, b, c, d)
    again = Controls.unpack(controls.pack())
    np.testing.assert_array_equal(again.style, controls.style)
    assert (again.level_gain_db, again.dry_wet, again.input_gain_db, again.output_gain_db) == (a, b, c, d)


def test_decibels() -> None:
    assert db_to_gain(0.0) == 1.0
    assert db_to_gain(-20.0) == pytest.approx(0.1)
    assert db_to_gain(6.0) == pytest.approx(1.9953, abs=1e-4)


@given(st.floats(-100, 20, allow_subnormal=False))
def test_level_match_meets_the_target_within_bounds(loudness: float) -> None:
    gain = level_gain_db(loudness)
    assert abs(gain) <= MAX_LEVEL_MATCH_DB
    if abs(gain) < MAX_LEVEL_MATCH_DB:
        assert loudness + gain == pytest.approx(TARGET_LOUDNESS_LUFS)


def test_a_blend_is_the_weighted_mean_of_vectors_and_level_gains() -> None:
    one, two = MANIFEST.styles[:2]
    blend = blend_vectors([one, two], [3.0, 1.0])
    np.testing.assert_allclose(blend, 0.75 * np.array(one.vector) + 0.25 * np.array(two.vector), rtol=1e-5, atol=1e-6)
    mixed = mix_controls({one: 0.75, two: 0.25}, {"dry_wet": 1.0, "input_gain_db": 0.0, "output_gain_db": 0.0})
    expected = 0.75 * level_gain_db(one.loudness_lufs) + 0.25 * level_gain_db(two.loudness_lufs)
    assert mixed.level_gain_db == pytest.approx(expected)


def test_a_mix_in_words() -> None:
    mix = parse_mix(MANIFEST, "violin=3, Choir=1")
    assert {style.id: weight for style, weight in mix.items()} == {"violin": 0.75, "choir": 0.25}
    performer = Performer(MANIFEST)
    select_mix(performer, "violin=0.75,choir=0.25")
    assert {style.id: weight for style, weight in performer.mix().items()} == pytest.approx(
        {"violin": 0.75, "choir": 0.25}
    )
    performer.select("flute")
    assert [style.id for style in performer.mix()] == ["flute"]
    select_mix(fresh := Performer(MANIFEST), "flute")
    assert [style.id for style in fresh.mix()] == ["flute"] and not fresh.held


def test_what_a_blend_loses_is_the_sum_of_its_pairs_and_less_for_chords() -> None:
    styles = MANIFEST.styles[:3]
    losses = ((0.0, 2.0, 3.0), (2.0, 0.0, 1.0), (3.0, 1.0, 0.0))
    manifest = replace(MANIFEST, styles=styles, blend_losses_lu=losses)
    a, b, c = styles
    assert blend_loss_lu(manifest, {a: 1.0}) == 0.0
    assert blend_loss_lu(manifest, {a: 0.5, b: 0.5}) == pytest.approx(2.0)
    assert blend_loss_lu(manifest, {a: 0.75, b: 0.25}) == pytest.approx(4 * 0.75 * 0.25 * 2.0)
    third = 1 / 3
    expected = 4 / 9 * (2.0 + 3.0 + 1.0) * (1.0 - 0.8 * (2 / 3 - 0.5))
    assert blend_loss_lu(manifest, {a: third, b: third, c: third}) == pytest.approx(expected)
    learned = replace(c, id="learned")
    assert blend_loss_lu(manifest, {a: 0.5, learned: 0.5}) == pytest.approx(2.0)  # the mean pair
    assert blend_loss_lu(replace(manifest, blend_losses_lu=()), {a: 0.5, b: 0.5}) == 0.0

    performer = Performer(manifest)
    performer.hold(60, a, 100)
    performer.hold(61, b, 100)
    alone = 0.5 * sum(level_gain_db(style.loudness_lufs) for style in (a, b))
    assert performer.controls().level_gain_db == pytest.approx(alone + 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("violin=x", "weight 'x' of 'violin'"),
        ("violin=0", "not a number above zero"),
        ("violin=inf", "not a number above zero"),
        ("violin=1,flut=1", "did you mean flute"),
        ("", "is not in model"),
    ],
)
def test_a_wrong_mix_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(StyleError, match=message):
        parse_mix(MANIFEST, text)


def test_parameters_keep_to_their_range_and_refuse_strangers() -> None:
    performer = Performer(MANIFEST)
    performer.set("output_gain_db", 400.0)
    assert performer.values["output_gain_db"] == 12.0
    performer.set("output_gain_db", float("nan"))
    assert performer.values["output_gain_db"] == 12.0
    with pytest.raises(ValueError, match="'reverb' is none of dry_wet"):
        performer.set("reverb", 1.0)
