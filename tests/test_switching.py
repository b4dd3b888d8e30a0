"""Any style to any style at any moment, by MIDI: no click, no gap, one level; through the shipped model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import soundfile
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from realtime.bundle import DEFAULT_MODEL, DEMO_CLIP, read_bundle
from realtime.controls import Performer, level_gain_db
from realtime.loudness import REGISTER_SPEEDS, loudness_lufs, reference_playings, styles_loudness_lufs
from realtime.midi import Message, MidiMap, apply
from realtime.processor import FADE_HOPS, Processor

BUNDLE = read_bundle(DEFAULT_MODEL)
HOP, RATE = BUNDLE.manifest.spectral.hop_samples, BUNDLE.manifest.spectral.sample_rate
STYLES = [style.id for style in BUNDLE.manifest.styles]
FIRST_NOTE = MidiMap().first_note
GUITAR = np.asarray(soundfile.read(DEMO_CLIP, dtype="float32", start=RATE // 4, frames=4 * RATE)[0], np.float32)


def play(audio: NDArray[np.float32], moments: dict[int, list[Message]], hops_per_step: int = 1) -> NDArray[np.float32]:
    """What MIDI messages at these hops make of audio [samples]."""
    performer, midi_map = Performer(BUNDLE.manifest), MidiMap()
    processor = Processor(BUNDLE, hops_per_step=hops_per_step)
    step, out = HOP * hops_per_step, []
    for message in moments.get(0, []):
        apply(message, performer, midi_map)
    processor.controls = performer.controls()
    processor.prepare(RATE, step, 1)
    for at in range(0, len(audio) // step * step, step):
        for message in moments.get(at // HOP, []) if at else []:
            apply(message, performer, midi_map)
            processor.controls = performer.controls()
        out.append(processor.process(audio[None, at : at + step]).copy()[0])
    return np.concatenate(out)


def program(style: str) -> Message:
    return Message("program_change", 0, (BUNDLE.manifest.style(style).program,))


def chord(styles: list[str], velocity: int = 100) -> list[Message]:
    return [Message("note_on", 0, (FIRST_NOTE + STYLES.index(style), velocity)) for style in styles]


def largest_step(audio: NDArray[np.float32]) -> float:
    return float(np.abs(np.diff(audio)).max())


@settings(max_examples=9, deadline=None)
@given(pair=st.lists(st.sampled_from(STYLES), min_size=2, max_size=2, unique=True), at=st.integers(40, 200))
@example(pair=["flute", "harpsichord"], at=184)  # before the loudest pluck: where what a body remembers tells most
@example(pair=["brass", "alto_sax"], at=182)
@example(pair=["drums", "harpsichord"], at=178)
def test_from_any_style_to_any_other_at_any_moment_nothing_clicks_or_stops(pair: list[str], at: int) -> None:
    audio = GUITAR[: 300 * HOP]
    one, other = (play(audio, {0: [program(style)]}) for style in pair)
    switched = play(audio, {0: [program(pair[0])], at: [program(pair[1])]})
    around = slice((at - 4) * HOP, (at + 2 * FADE_HOPS) * HOP)
    usual = max(largest_step(one), largest_step(other))  # a style steps as it likes, here or a little later
    assert largest_step(switched[around]) <= 1.25 * usual + 2.0 / (FADE_HOPS * HOP)

    def floor(sound: NDArray[np.float32]) -> float:
        """The quietest 20 ms while it fades."""
        return min(float(np.sqrt(np.mean(part**2))) for part in np.array_split(sound[around], 3))

    assert floor(switched) > 0.2 * min(floor(one), floor(other))


def test_every_style_is_as_loud_as_the_others_on_what_is_plucked_and_on_what_is_bowed() -> None:
    styles = BUNDLE.manifest.styles
    vectors = [np.asarray(style.vector, np.float32) for style in styles]
    gains_db = np.array([[level_gain_db(style.loudness_lufs)] for style in styles])
    levels = styles_loudness_lufs(BUNDLE, vectors, reference_playings(RATE)) + gains_db
    plucked_and_bowed = np.split(levels, [len(REGISTER_SPEEDS)], axis=1)
    for playing in plucked_and_bowed:
        level = playing.mean(axis=1)
        assert np.abs(level - level.mean()).max() < 1.0, dict(
            zip(STYLES, np.round(level - level.mean(), 1), strict=True)
        )


def test_chords_of_five_and_morphs_sound_as_loud_as_single_styles() -> None:
    alone = {style: loudness_lufs(play(GUITAR, {0: [program(style)]}, 16), RATE) for style in STYLES}
    usual = float(np.mean(list(alone.values())))
    chords = [STYLES[i:] + STYLES[:i] for i in (0, 3, 6, 9, 12)]
    levels = [loudness_lufs(play(GUITAR, {0: chord(styles[::3][:5])}, 16), RATE) for styles in chords]
    pairs = list(itertools.pairwise(STYLES[::3]))
    for one, other in pairs:
        second = Message("control_change", 0, (3, BUNDLE.manifest.style(other).program))
        for value in (32, 64, 96):
            morph = Message("control_change", 0, (1, value))
            levels.append(loudness_lufs(play(GUITAR, {0: [program(one), second, morph]}, 16), RATE))
    differences = np.abs(np.array(levels) - usual)
    assert np.median(differences) < 1.0 and differences.max() < 2.0, np.round(levels, 1)


@pytest.mark.parametrize("kind", ["programs", "chords", "morph"])
def test_twenty_changes_a_second_never_click_nor_stop_and_stay_as_loud(kind: str) -> None:
    audio, every = GUITAR[: 600 * HOP], round(RATE / HOP / 20)
    moments: dict[int, list[Message]] = {0: [program(STYLES[0])]}
    held: list[str] = []
    for number, hop in enumerate(range(every, 600, every)):
        style = STYLES[number * 5 % len(STYLES)]
        if kind == "programs":
            moments[hop] = [program(style)]
        elif kind == "chords":
            released = [Message("note_off", 0, (FIRST_NOTE + STYLES.index(s), 0)) for s in held]
            held = [STYLES[(number * 5 + i * 3) % len(STYLES)] for i in range(5)]
            moments[hop] = released + chord(held)
        else:
            moments[hop] = [Message("control_change", 0, (1, number * 29 % 128))]
    changing, steady = play(audio, moments), [play(audio, {0: [program(style)]}, 8) for style in STYLES]
    assert largest_step(changing) <= 1.25 * max(map(largest_step, steady))
    windows = len(audio) // (RATE // 50)  # of 20 ms

    def levels(sound: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.array(
            [float(np.sqrt(np.mean(part**2))) for part in np.array_split(sound[FADE_HOPS * HOP :], windows)]
        )

    # Files are played eight hops at a time, so later by seven; a gap would be quieter than any style for longer.
    quietest = np.min([levels(np.roll(sound, -7 * HOP)) for sound in steady], axis=0)
    assert (levels(changing) > 0.2 * np.minimum(quietest, np.roll(quietest, 1))).all()
    usual = float(np.mean([loudness_lufs(sound, RATE) for sound in steady]))
    assert loudness_lufs(changing, RATE) == pytest.approx(usual, abs=1.0)
