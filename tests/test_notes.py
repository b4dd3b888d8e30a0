"""Notes as a language, and tunes in MIDI files: what is written can be read again, and damage is one clear error."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import mido
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.midi import MidiError
from realtime.notes import (
    DURATIONS_TICKS,
    LONGEST_REST_TICKS,
    SCALES,
    VELOCITY_STEP,
    KeyNameError,
    Note,
    Vocabulary,
    make_vocabulary,
    octaves_into_range,
    pitch_classes,
)
from realtime.tunes import Tune, read_tune, write_tune

TUNES = Path(__file__).parent / "data"
SLIGO_JIG = TUNES / "sligo_jig.mid"
WORDS = make_vocabulary()

on_the_grid = st.lists(
    st.tuples(
        st.integers(0, LONGEST_REST_TICKS),
        st.sampled_from(DURATIONS_TICKS),
        st.integers(0, 127),
        st.sampled_from(range(4, 128, VELOCITY_STEP)),
    ),
    min_size=1,
    max_size=30,
)


def melody(steps: list[tuple[int, int, int, int]]) -> list[Note]:
    """Notes from (time since the onset before, duration, pitch, velocity), the first at 0."""
    notes, now = [], 0
    for number, (shift, duration, pitch, velocity) in enumerate(steps):
        now += shift if number else 0
        notes.append(Note(now, duration, pitch, velocity))
    return notes


@given(on_the_grid)
def test_what_lies_on_the_grid_survives_encoding(steps: list[tuple[int, int, int, int]]) -> None:
    notes = melody(steps)
    tokens = WORDS.encode(notes)
    assert WORDS.decode(tokens) == notes
    assert WORDS.decode([WORDS.end, *tokens, WORDS.end]) == notes


@given(st.integers(0, 10_000))
def test_a_time_is_events_of_falling_size_that_add_up_to_it(ticks: int) -> None:
    values = [WORDS.events[token].value for token in WORDS.shift_tokens(ticks)]
    assert sum(values) == min(ticks, LONGEST_REST_TICKS)
    assert values == sorted(values, reverse=True)


@given(st.integers(1, 127), st.integers(1, 5_000))
def test_what_has_no_event_of_its_own_becomes_the_nearest(velocity: int, duration: int) -> None:
    note = WORDS.decode(WORDS.encode([Note(0, duration, 60, velocity)]))[0]
    assert abs(note.velocity - velocity) <= VELOCITY_STEP / 2
    assert all(abs(note.duration_ticks - duration) <= abs(other - duration) for other in DURATIONS_TICKS)


def test_events_out_of_order_are_refused() -> None:
    shift, pitch, velocity, duration = WORDS.encode([Note(0, 12, 60, 84)])
    for wrong in ([pitch], [shift, velocity], [shift, pitch, duration], [shift, pitch, velocity, duration, pitch]):
        with pytest.raises(ValueError, match="does not stand after"):
            WORDS.decode(wrong)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tokens": (*WORDS.tokens, "pitch_60")}, "appears twice"),
        ({"tokens": (*WORDS.tokens, "loud")}, "'loud' means nothing"),
        ({"tokens": (*WORDS.tokens, "velocity_128")}, "'velocity_128' is outside"),
        ({"tokens": tuple(token for token in WORDS.tokens if "velocity" not in token)}, "none is a velocity"),
        ({"tokens": WORDS.tokens[1:]}, "'end' is missing"),
        ({"tokens": tuple(token for token in WORDS.tokens if token != "pitch_64")}, "not every pitch"),
        ({"lowest_pitch": 120, "highest_pitch": 127}, "an octave"),
        ({"ticks_per_quarter": 480}, "ticks_per_quarter: must be 24"),
    ],
)
def test_a_vocabulary_that_could_not_speak_is_refused(change: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(WORDS, **change)  # pyright: ignore[reportArgumentType]


def test_keys_are_read_as_musicians_write_them() -> None:
    assert pitch_classes("D dorian") == pitch_classes("C") == pitch_classes("a minor") == {0, 2, 4, 5, 7, 9, 11}
    assert pitch_classes("F# major") == pitch_classes("Gb Major") == pitch_classes("f♯")
    assert pitch_classes("E harmonic-minor") == {4, 6, 7, 9, 11, 0, 3}
    for tonic in "ABCDEFG":
        for scale in SCALES:
            assert len(pitch_classes(f"{tonic} {scale}")) == len(SCALES[scale])


@pytest.mark.parametrize(("key", "hint"), [("H major", "write a tonic"), ("D dorain", "did you mean dorian"), ("", "")])
def test_an_unknown_key_says_how_keys_are_written(key: str, hint: str) -> None:
    with pytest.raises(KeyNameError, match=f"'{re.escape(key)}' is no key: .*{hint}"):
        pitch_classes(key)


def test_a_tune_out_of_range_is_moved_by_whole_octaves() -> None:
    bass = [Note(at, 1, pitch, 64) for at, pitch in enumerate((28, 33, 35, 40))]
    assert octaves_into_range(bass, 48, 84) == 2
    assert octaves_into_range(bass, 20, 84) == 0
    assert octaves_into_range([dataclasses.replace(note, pitch=note.pitch + 72) for note in bass], 48, 88) == -2


def test_a_real_tune_keeps_its_tempo_metre_and_notes() -> None:
    tune = read_tune(SLIGO_JIG)
    assert (tune.tempo_bpm, tune.metre, tune.bar_ticks, len(tune.notes)) == (160.0, (6, 8), 72, 174)
    assert [(note.start_ticks, note.duration_ticks, note.pitch) for note in tune.notes[:4]] == [
        (0, 6, 74),
        (6, 6, 73),
        (12, 12, 71),
        (24, 12, 64),
    ]
    assert 36.0 < tune.seconds < 36.5


@given(on_the_grid, st.floats(20.0, 300.0), st.sampled_from([(4, 4), (6, 8), (3, 4), (7, 8)]))
def test_a_tune_that_was_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[int, int, int, int]],
    tempo_bpm: float,
    metre: tuple[int, int],
) -> None:
    path = tmp_path_factory.mktemp("tune") / "tune.mid"
    # A pitch that begins again before its end would be two notes in one: each has a pitch of its own here.
    notes = [dataclasses.replace(note, pitch=number) for number, note in enumerate(melody(steps))]
    write_tune(path, Tune(tuple(notes), tempo_bpm, metre, 40))
    again = read_tune(path)
    assert again.notes == tuple(notes)
    assert again.metre == metre and again.program == 40
    assert again.tempo_bpm == pytest.approx(tempo_bpm, rel=1e-4)


def test_a_pitch_that_begins_again_ends_first(tmp_path: Path) -> None:
    path = tmp_path / "tune.mid"
    write_tune(path, Tune((Note(0, 48, 60, 90), Note(24, 12, 60, 90))))
    assert read_tune(path).notes == (Note(0, 24, 60, 90), Note(24, 12, 60, 90))


def damaged(kind: str, folder: Path) -> Path:
    path = folder / "tune.mid"
    data = SLIGO_JIG.read_bytes()
    match kind:
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "text":
            path.write_text("not a tune\n")
        case "empty":
            path.write_bytes(b"")
        case "film":
            path.write_bytes(data[:12] + b"\xe8\x28" + data[14:])
        case "silent":
            mido.MidiFile(tracks=[mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=500_000)])]).save(path)
        case "drums":
            notes = [mido.Message("note_on", channel=9, note=36), mido.Message("note_off", channel=9, note=36, time=9)]
            mido.MidiFile(tracks=[mido.MidiTrack(notes)]).save(path)
        case "several":
            mido.MidiFile(type=2, tracks=mido.MidiFile(SLIGO_JIG).tracks).save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("missing", "there is no such file"),
        ("cut", "is not a standard MIDI file"),
        ("text", "is not a standard MIDI file"),
        ("empty", "is not a standard MIDI file"),
        ("film", "counts time in frames of film"),
        ("several", "several tunes in one"),
        ("silent", "holds no notes"),
        ("drums", "holds no notes"),
    ],
)
def test_a_file_that_holds_no_tune_is_one_clear_error(tmp_path: Path, kind: str, text: str) -> None:
    path = damaged(kind, tmp_path)
    with pytest.raises(MidiError, match=f"{re.escape(str(path))}: .*{text}"):
        read_tune(path)


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "tune.mid"
    path.write_bytes(SLIGO_JIG.read_bytes()[:60] + data)
    try:
        assert read_tune(path).notes
    except MidiError as error:
        assert str(path) in str(error)


def test_a_vocabulary_is_the_same_for_all_models() -> None:
    assert make_vocabulary(40, 90).tokens == WORDS.tokens
    assert isinstance(WORDS, Vocabulary) and len(WORDS.tokens) == 1 + 22 + 128 + 16 + 25
