"""Phrases: notes are measured for what they are, tunes are played in tune and in time, pairs are true pairs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import mido
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("torch")

import torch
from typer.testing import CliRunner

from realtime.cli import app
from tests.conftest import TINY_RECOGNISER, tiny_recipe
from training import phrases as phrases_module
from training.augment import make_true_pair, raw_samples, rms
from training.instrument import (
    Instrument,
    articulation,
    build_instrument,
    hertz_to_midi,
    measure,
    midi_to_hertz,
    parse_name,
)
from training.library import ExcerptSampler, Library, Recording, load_library
from training.objectives.restore import RestoreObjective
from training.phrases import (
    LEVEL_DBFS,
    Phrase,
    PhraseBank,
    PhraseError,
    PhraseSampler,
    Rendering,
    TuneNote,
    fit,
    melody_of,
    read_tune,
    render,
    render_phrases,
    shape_phrase,
    split_tunes,
    with_texture,
)
from training.recipe import Recipe, RecipeError, load_recipe
from training.train import RunOptions, TrainingBatches, run_training

RATE = 48_000
CLIPS = Path(__file__).parent / "data"
SCALE = ["C", "Cs", "D", "Ds", "E", "F", "Fs", "G", "Gs", "A", "As", "B"]

RECIPE = f"""{tiny_recipe(0.25)}[phrases]
minutes_per_style = 0.2
phrase_seconds = 4
partners = 2
licence = "CC0-1.0"
attribution = "Anon."
[trainer]
steps = 2
batch_size = 6
validation_every_steps = 2
validation_segments = 1
media_count = 0
"""
EARS = f"""
name = "ears"
{TINY_RECOGNISER}[data]
segment_seconds = 0.5
workers = 0
[augment]
pitch_semitones = 1.0
[phrases]
minutes_per_style = 0.2
phrase_seconds = 4
pair_share = 0.0
phrase_share = 1.0
[trainer]
steps = 1
batch_size = 4
validation_every_steps = 1
"""
STYLE = """
[[style]]
id = "{id}"
label = "{id}"
folder = "{id}"
midi_program = {program}
licence = "CC0-1.0"
attribution = "nobody"
"""
PROGRAMS = {"violin": 40, "guitar": 24, "organ": 19, "drums": 118}


def tone(pitch: float, seconds: float, kind: str, silence: float = 0.0) -> NDArray[np.float32]:
    """One note of eight partials: ``plucked`` starts at once and decays, ``bowed`` rises in 40 ms and stays."""
    time = np.arange(round(seconds * RATE)) / RATE
    hertz = midi_to_hertz(pitch)
    partials = [k for k in range(1, 9) if k * hertz < 20_000]
    if kind == "plucked":
        audio = sum(np.exp(-time * (2.0 + k)) * np.sin(2 * np.pi * k * hertz * time) / k for k in partials)
    else:
        audio = sum(np.sin(2 * np.pi * k * hertz * time + k) / k for k in partials)
        audio = audio * np.minimum(1.0, time / 0.04) * np.minimum(1.0, (seconds - time) / 0.05)
    lead = np.zeros(round(silence * RATE))
    return (0.2 * np.concatenate([lead, np.asarray(audio)])).astype(np.float32)


def write_notes(folder: Path, pitches: list[int], seconds: float, kind: str, silence: float = 0.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for pitch in pitches:
        name = f"note_{SCALE[pitch % 12]}{pitch // 12 - 1}.wav"
        # A float file would hold the time of writing, and the split goes by content.
        soundfile.write(folder / name, tone(pitch, seconds, kind, silence), RATE, subtype="PCM_24")


def write_tune(path: Path, notes: list[tuple[float, float, int]], velocity: int = 90) -> None:
    """A MIDI file of (start in seconds, length, pitch)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    events = sorted(
        [(start, 1, pitch) for start, _, pitch in notes]
        + [(start + length, 0, pitch) for start, length, pitch in notes]
    )
    track = mido.MidiTrack()
    before = 0.0
    for time, on, pitch in events:
        ticks = round((time - before) * 960)  # 480 a beat, two beats a second
        before += ticks / 960
        track.append(mido.Message("note_on" if on else "note_off", note=pitch, velocity=velocity * on, time=ticks))
    file = mido.MidiFile(ticks_per_beat=480)
    file.tracks.append(track)
    file.save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three styles with pitch, one without, and ten tunes."""
    folder = tmp_path_factory.mktemp("place")
    write_notes(folder / "violin", list(range(55, 85, 2)), 1.2, "bowed", silence=0.1)
    write_notes(folder / "guitar", list(range(52, 82, 2)), 1.5, "plucked")
    write_notes(folder / "organ", list(range(48, 84, 3)), 1.0, "bowed")
    (folder / "drums").mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).normal(size=RATE // 2) * np.exp(-np.arange(RATE // 2) / 3000)
        soundfile.write(folder / "drums" / f"hit{number}.wav", 0.3 * noise, RATE)
    random = np.random.default_rng(0)
    for number in range(10):
        pitches = np.clip(67 + np.cumsum(random.integers(-3, 4, 60)), 60, 76)
        write_tune(folder / "midi" / f"tune{number}.mid", [(0.3 * k, 0.28, int(p)) for k, p in enumerate(pitches)])
    (folder / "tiny.toml").write_text(RECIPE + "".join(STYLE.format(id=k, program=v) for k, v in PROGRAMS.items()))
    return folder


def loaded(place: Path, recipe: Recipe) -> Library:
    return load_library(recipe.style, place, recipe.data, RATE, place / "cache")


@pytest.fixture(scope="module")
def bank(place: Path) -> PhraseBank:
    recipe = load_recipe(place / "tiny.toml")
    found = render_phrases(recipe, loaded(place, recipe), place, place / "cache")
    assert found is not None
    return found


def instrument_of(folder: Path, program: int, cache: Path) -> Instrument:
    """All recordings of a folder as an instrument."""
    from training.instrument import MeasuredNotes, measure_all

    text = RECIPE + STYLE.format(id=folder.name, program=program)
    cache.mkdir(exist_ok=True)
    (cache / "one.toml").write_text(text)
    recipe = load_recipe(cache / "one.toml")
    style = load_library(recipe.style, folder.parent, recipe.data, RATE, cache).styles[0]
    recordings: list[Recording] = [*style.train, *style.validation, *style.test]
    manner = articulation(program)
    assert manner is not None
    return build_instrument(folder.name, manner, recordings, measure_all(recordings, MeasuredNotes(cache, RATE)))


def onset_of(audio: NDArray[np.float32]) -> float:
    """Seconds until a sound first comes within 26 dB of its level, looking ahead by no more than a millisecond."""
    block = RATE // 1000
    level = np.sqrt(np.square(audio[: len(audio) // block * block]).reshape(-1, block).mean(axis=1))
    return float(np.argmax(level > 0.05 * level.max())) * block / RATE


def pitch_at(audio: NDArray[np.float32], start: float, seconds: float) -> float:
    """MIDI pitch by pYIN."""
    from training.librosa_once import librosa

    part = audio[round(start * RATE) : round((start + seconds) * RATE)]
    found, voiced, _ = librosa.pyin(part, fmin=60, fmax=2500, sr=RATE, frame_length=4096, center=False)
    assert voiced.any()
    return float(np.median(librosa.hz_to_midi(found[voiced])))


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pitch", "dynamic", "take"),
    [
        ("weresax__a3_f_rr1_cnd.flac", 57, 0.8, 1),
        ("weresax__bb2_p_rr2_cnd.flac", 46, 0.4, 2),
        ("sampler__As2.flac", 46, None, 1),
        ("sampler__C3_2.flac", 48, None, 2),
        ("sampler__F2_v2.flac", 41, None, 2),
        ("sources__102_110.00000.flac", 45, 102 / 127, 1),
        ("forbidden-musi__1318.60-002.flac", hertz_to_midi(1318.60), None, 2),
        ("forbidden-musi__87.270.flac", hertz_to_midi(87.27), None, 1),
        ("piano__32_1406.4373320438249.flac", hertz_to_midi(1406.4373), 32 / 127, 1),
        ("vibraphone_418hz.flac", hertz_to_midi(418), None, 1),
        ("audio__femalevoices_aa2_Fs5.flac", 78, None, 1),
        ("meatbass__eb3_vl4_up.flac", 51, None, 1),
        ("sms-tools__trumpet-A4.flac", 69, None, 1),
        ("q__-1a-Low-B.flac", None, None, 1),
        ("q__riff_0_0.flac", None, None, 1),
        ("bd_808.flac", None, None, 1),
        ("john-garner_bwv1002_mov6.flac", None, None, 1),
    ],
)
def test_names_say_pitch_dynamic_and_take(name: str, pitch: float | None, dynamic: float | None, take: int) -> None:
    found = parse_name(name)
    assert found.pitch == (None if pitch is None else pytest.approx(pitch, abs=0.01))
    assert found.dynamic == (None if dynamic is None else pytest.approx(dynamic))
    assert found.take == take


@given(st.integers(24, 107), st.sampled_from(["", "x__", "a b-c_"]), st.booleans())
def test_any_pitch_survives_its_name(pitch: int, before: str, as_hertz: bool) -> None:
    name = f"{midi_to_hertz(pitch):.4f}" if as_hertz else f"{SCALE[pitch % 12]}{pitch // 12 - 1}"
    assert parse_name(f"{before}{name}.wav").pitch == pytest.approx(pitch, abs=0.01)


@given(st.text(max_size=30).filter(lambda text: "/" not in text and "\0" not in text))
def test_no_name_is_too_strange(name: str) -> None:
    found = parse_name(name)
    assert found.pitch is None or 0 <= found.pitch <= 140


# -- measuring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bowed", "plucked"])
@pytest.mark.parametrize("pitch", [33.0, 45.3, 60.0, 69.21, 80.0, 95.5])
def test_pitch_and_onset_are_measured(kind: str, pitch: float) -> None:
    found = measure(tone(pitch, 1.2, kind, silence=0.15), RATE, named=None)
    assert found.problem == ""
    assert found.pitch == pytest.approx(pitch, abs=0.05)
    late = 0.012 if kind == "bowed" else 0.004  # bowed notes rise in 40 ms
    assert 0.15 <= found.onset / RATE + 0.001 <= 0.15 + late + 0.001
    assert (found.steady_end > found.steady_start) == (kind == "bowed")


def test_what_is_not_one_note_is_left_out_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "guitar"
    write_notes(folder, [52, 55, 59, 64], 1.0, "plucked")
    chord = tone(57, 1.0, "bowed") + tone(64, 1.0, "bowed")
    soundfile.write(folder / "two.wav", chord, RATE)
    soundfile.write(folder / "again.wav", np.concatenate([tone(57, 1.0, "plucked")] * 2), RATE)
    soundfile.write(folder / "long.wav", np.tile(tone(57, 1.0, "bowed"), 25), RATE)
    soundfile.write(folder / "noise.wav", 0.1 * np.random.default_rng(0).normal(size=RATE), RATE)
    soundfile.write(folder / "slide_1.wav", tone(61, 1.0, "plucked"), RATE)
    soundfile.write(folder / "other_G4.wav", tone(62, 1.0, "plucked"), RATE)
    instrument = instrument_of(folder, 24, tmp_path / "cache")
    assert [round(note.pitch) for note in instrument.notes] == [52, 55, 59, 64]
    reasons = {item.path.stem: item.reason for item in instrument.left_out}
    assert set(reasons) == {"two", "again", "long", "noise", "slide_1", "other_G4"}
    assert "struck again" in reasons["again"] and "longer than one note" in reasons["long"]
    assert "by its name" in reasons["slide_1"] and "its name says 67.0" in reasons["other_G4"]


def test_octaves_are_those_that_sound_and_stray_octaves_follow_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "sax"
    folder.mkdir()
    for pitch in (49, 53, 57, 61, 65):  # named an octave too low, as transposing instruments often are
        soundfile.write(folder / f"sax_{SCALE[pitch % 12]}{pitch // 12 - 2}.wav", tone(pitch + 0.2, 1, "bowed"), RATE)
    instrument = instrument_of(folder, 65, tmp_path / "cache")
    assert [note.pitch for note in instrument.notes] == pytest.approx([49.2, 53.2, 57.2, 61.2, 65.2], abs=0.05)


@pytest.mark.parametrize("named", [None, 60.0])
@pytest.mark.parametrize("seed", range(8))
def test_no_sound_is_too_strange(seed: int, named: float | None) -> None:
    random = np.random.default_rng(seed)
    audio = np.zeros(int(random.integers(RATE // 5, RATE)), dtype=np.float32)
    start = int(random.integers(0, len(audio) - 10))
    stop = int(random.integers(start + 1, len(audio)))
    audio[start:stop] = random.normal(size=stop - start) * 0.1
    found = measure(audio, RATE, named)
    assert found.problem or math.isfinite(found.pitch)
    assert 0 <= found.onset < len(audio)


def test_measurements_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_notes(tmp_path / "violin", [60, 64, 67], 0.6, "bowed")
    from training import instrument as module

    first = instrument_of(tmp_path / "violin", 40, tmp_path / "cache")
    notes = module.MeasuredNotes(tmp_path / "cache", RATE)
    recordings = [note.recording for note in first.notes]
    module.measure_all(recordings, notes)
    notes.save()
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured again"))
    again = module.measure_all(recordings, module.MeasuredNotes(tmp_path / "cache", RATE))
    assert again == [note.measured for note in first.notes]


# -- tunes ------------------------------------------------------------------------------------------------------------


def test_a_midi_file_is_read_in_seconds(tmp_path: Path) -> None:
    write_tune(tmp_path / "a.mid", [(0.0, 0.5, 60), (0.5, 0.25, 62), (0.5, 1.0, 48)], velocity=70)
    notes = read_tune(tmp_path / "a.mid")
    assert [(n.start, n.seconds, n.pitch, n.velocity) for n in notes] == [
        (0.0, 0.5, 60, 70),
        (0.5, 1.0, 48, 70),
        (0.5, 0.25, 62, 70),
    ]
    assert [note.pitch for note in melody_of(notes)] == [60, 62]
    for name, content in {"text.mid": b"no", "empty.mid": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read"):
            read_tune(tmp_path / name)


def test_tunes_are_split_by_content(place: Path) -> None:
    paths = sorted((place / "midi").glob("*.mid"))
    parts = split_tunes(paths, 0)
    assert [len(part) for part in parts] == [8, 1, 1]
    assert parts == split_tunes(paths[::-1], 0)
    assert not set(parts[0]) & (set(parts[1]) | set(parts[2]))


@given(st.integers(0, 1000), st.sampled_from(["melody", "thirds", "chords", "written"]))
def test_phrases_stay_within_their_time_and_repeat(seed: int, texture: str) -> None:
    tune = [TuneNote(0.2 * k, 0.2, 60 + (5 * k) % 12, 90) for k in range(100)]
    shaped = shape_phrase(with_texture(tune, texture), 6.0, np.random.default_rng(seed))
    assert shaped == shape_phrase(with_texture(tune, texture), 6.0, np.random.default_rng(seed))
    assert shaped and shaped[0].start == pytest.approx(0.1)
    assert all(note.start + note.seconds <= 5.51 and 1 <= note.velocity <= 127 for note in shaped)
    if texture in ("melody", "written"):
        assert all(a.start + a.seconds <= b.start + 1e-9 for a, b in itertools.pairwise(shaped))
    else:
        assert len({note.start for note in shaped}) < len(shaped)


# -- playing ----------------------------------------------------------------------------------------------------------

NOTES = tuple(TuneNote(0.1 + 0.5 * k, 0.4, pitch, 60 + 10 * k) for k, pitch in enumerate((60, 67, 64, 71, 62)))


@pytest.fixture(scope="module")
def players(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Instrument]:
    cache = tmp_path_factory.mktemp("players")
    return {name: instrument_of(place / name, PROGRAMS[name], cache / name) for name in ("violin", "guitar", "organ")}


@pytest.mark.parametrize("name", ["violin", "guitar", "organ"])
def test_a_phrase_is_in_tune_in_time_and_at_its_level(players: dict[str, Instrument], name: str) -> None:
    audio = render(NOTES, players[name], 3.0, RATE)
    assert audio.dtype == np.float32 and audio.shape == (3 * RATE,)
    for note in NOTES:
        assert pitch_at(audio, note.start + 0.06, 0.3) == pytest.approx(note.pitch, abs=0.3)
        alone = audio[round((note.start - 0.02) * RATE) : round((note.start + note.seconds) * RATE)]
        if note is NOTES[0]:
            assert onset_of(alone) - 0.02 == pytest.approx(0.0, abs=0.005)
    level = 20 * math.log10(float(rms(torch.from_numpy(audio)[None])))
    assert level == pytest.approx(LEVEL_DBFS, abs=0.1)
    assert np.abs(audio).max() <= 0.981


@pytest.mark.parametrize("name", ["violin", "guitar", "organ"])
def test_every_onset_lies_at_its_time(players: dict[str, Instrument], name: str) -> None:
    spaced = [dataclasses.replace(note, start=1.0 + 2.0 * k, seconds=0.3) for k, note in enumerate(NOTES)]
    audio = render(spaced, players[name], 12.0, RATE)
    for note in spaced:
        around = audio[round((note.start - 0.1) * RATE) : round((note.start + 0.25) * RATE)]
        assert onset_of(around) - 0.1 == pytest.approx(0.0, abs=0.005)


def test_two_instruments_play_together(players: dict[str, Instrument]) -> None:
    one, other = (render(NOTES, players[name], 3.0, RATE) for name in ("violin", "guitar"))
    assert float(np.corrcoef(one, other)[0, 1]) < 0.9  # not the same sound
    for note in NOTES:
        place = slice(round((note.start - 0.05) * RATE), round((note.start + 0.1) * RATE))
        assert onset_of(one[place]) == pytest.approx(onset_of(other[place]), abs=0.006)


def test_notes_last_as_long_as_they_are_held_and_no_longer(players: dict[str, Instrument]) -> None:
    """Sustained ones are looped beyond their recording (1.2 s), plucked ones decay; both stop at the note's end."""
    held = [TuneNote(0.1, 3.0, 60, 100)]

    def level(audio: NDArray[np.float32], start: float, stop: float) -> float:
        return float(np.sqrt(np.mean(np.square(audio[round(start * RATE) : round(stop * RATE)]))))

    violin, guitar = (render(held, players[name], 5.0, RATE) for name in ("violin", "guitar"))
    assert level(violin, 2.7, 3.0) == pytest.approx(level(violin, 0.5, 0.8), rel=0.1)
    assert level(guitar, 1.2, 1.5) < 0.2 * level(guitar, 0.2, 0.5)
    short = [TuneNote(0.1, 0.3, 60, 100)]
    for name, release in (("violin", 0.07), ("guitar", 0.2)):
        audio = render(short, players[name], 3.0, RATE)
        assert level(audio, 0.35, 0.39) > 0.05
        assert level(audio, 0.41 + release, 3.0) == 0.0
    harp = dataclasses.replace(players["guitar"], articulation=articulation(46) or pytest.fail())
    assert level(render(short, harp, 3.0, RATE), 0.7, 0.9) > 0.01  # nothing damps it


def test_a_loop_does_not_click(players: dict[str, Instrument]) -> None:
    """Where a sustained note is looped, no step is larger than in its recording."""
    audio = render([TuneNote(0.1, 4.0, 62, 100)], players["violin"], 5.0, RATE)
    recorded = np.abs(np.diff(audio[round(0.3 * RATE) : round(0.5 * RATE)], n=2)).max()
    looped = np.abs(np.diff(audio[round(0.5 * RATE) : round(4.0 * RATE)], n=2)).max()
    assert looped < 1.1 * recorded
    block = audio[round(0.3 * RATE) : round(4.0 * RATE)][: 37 * RATE // 10 // 2400 * 2400].reshape(-1, 2400)
    level = np.sqrt(np.mean(np.square(block), axis=1))
    assert level.max() < 1.12 * level.min()


def test_slurred_notes_leave_no_gap(players: dict[str, Instrument]) -> None:
    slurred = [TuneNote(0.1 + 0.3 * k, 0.3, 60 + k, 90) for k in range(6)]
    audio = render(slurred, players["violin"], 3.0, RATE)
    block = audio[round(0.2 * RATE) : round(1.8 * RATE)].reshape(-1, 480)
    level = np.sqrt(np.mean(np.square(block), axis=1))
    assert level.min() > 0.3 * level.max()


def test_velocity_is_loudness_and_takes_differ(players: dict[str, Instrument]) -> None:
    soft_loud = [TuneNote(0.1, 0.4, 64, 40), TuneNote(1.1, 0.4, 64, 100)]
    audio = render(soft_loud, players["violin"], 2.0, RATE)
    quiet, loud = audio[:RATE], audio[RATE:]
    assert np.sqrt(np.mean(quiet**2) / np.mean(loud**2)) == pytest.approx(0.4**1.5, rel=0.02)


def test_dynamics_and_takes_choose_the_recording(tmp_path: Path) -> None:
    folder = tmp_path / "sax"
    folder.mkdir()
    for name, cents in (("p_rr1", 0.0), ("f_rr1", 0.02), ("f_rr2", 0.04)):
        soundfile.write(folder / f"c4_{name}.wav", tone(60 + cents, 0.8, "bowed"), RATE)
    instrument = instrument_of(folder, 65, tmp_path / "cache")
    names = [[instrument.choose(60, dynamic, turn).recording.name for turn in range(3)] for dynamic in (0.4, 0.8)]
    assert names == [["c4_p_rr1.wav"] * 3, ["c4_f_rr1.wav", "c4_f_rr2.wav", "c4_f_rr1.wav"]]


def test_a_tune_is_moved_to_where_all_can_play_it(players: dict[str, Instrument]) -> None:
    low = [TuneNote(0.3 * k, 0.3, 24 + k % 8, 90) for k in range(20)]
    both = [players["violin"], players["organ"]]
    moved = fit(low, both, np.random.default_rng(0))
    assert len(moved) == len(low)
    assert len({new.pitch - old.pitch for new, old in zip(moved, low, strict=True)}) == 1
    assert all(player.can_play(note.pitch) for note in moved for player in both)
    wide = [TuneNote(0.3 * k, 0.3, 10 + 6 * k, 90) for k in range(18)]
    assert fit(wide, both, np.random.default_rng(0)) == ()


# -- the bank ---------------------------------------------------------------------------------------------------------


def test_every_style_with_pitch_has_phrases_and_nothing_held_out_is_in_them(place: Path, bank: PhraseBank) -> None:
    recipe = load_recipe(place / "tiny.toml")
    library = loaded(place, recipe)
    assert [bool(style) for style in bank.renderings] == [True, True, True, False]
    for style, instrument in zip(library.styles, bank.instruments, strict=True):
        if instrument is None:
            continue
        train = {recording.audio_sha256 for recording in style.train}
        assert {note.recording.audio_sha256 for note in instrument.notes} <= train
    train_tunes = {path.name for path in split_tunes(sorted((place / "midi").glob("*.mid")), 0)[0]}
    assert {phrase.tune for phrase in bank.phrases} <= train_tunes
    assert any(len(phrase.players) > 1 for phrase in bank.phrases)
    violin = 0
    for phrase in bank.phrases:
        if violin in phrase.players:  # one note at a time
            assert len({note.start for note in phrase.notes}) == len(phrase.notes)


def test_the_second_time_nothing_is_played_and_damage_is_played_again(
    place: Path, bank: PhraseBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(place / "tiny.toml")
    library = loaded(place, recipe)
    victim = bank.renderings[1][0]
    before = np.array(victim.audio())
    phrases_module._mapped.cache_clear()
    victim.path.write_bytes(victim.path.read_bytes()[:1000])
    assert render_phrases(recipe, library, place, place / "cache") == bank
    assert np.array_equal(np.load(victim.path), before)
    monkeypatch.setattr(phrases_module, "render", lambda *_: pytest.fail("played again"))
    assert render_phrases(recipe, library, place, place / "cache") == bank


def test_pairs_are_aligned_different_and_of_their_style(place: Path, bank: PhraseBank) -> None:
    recipe = load_recipe(place / "tiny.toml")
    library = loaded(place, recipe)
    samplers = [ExcerptSampler(style.train, recipe.data) for style in library.styles]
    batches = TrainingBatches(samplers, recipe, 0, 0, PhraseSampler(bank))
    samples = raw_samples(recipe.segment_samples, recipe.augment)
    rows = pairs = 0
    for step in range(40):
        batch = batches.batch(step)
        assert batch.raw.shape == (6, samples)
        rows += 6
        if batch.paired is None or batch.input_raw is None:
            continue
        assert batch.input_raw.shape == (int(batch.paired.sum()), samples)
        assert 3 not in batch.style[batch.paired].tolist()  # drums play no phrases
        pairs += int(batch.paired.sum())
        for heard, wanted in zip(batch.input_raw, batch.raw[batch.paired], strict=True):
            assert not torch.equal(heard, wanted)
    assert 0.18 < pairs / rows < 0.42  # 0.4 of the three styles in four that can
    for one, other in zip(batches.batch(7), batches.batch(7), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_both_of_a_pair_are_of_one_place_and_one_level(tmp_path: Path) -> None:
    """Two renderings that differ in level alone come out equal, wherever they are cut."""
    noise = np.random.default_rng(0).integers(-8000, 8000, 4 * RATE).astype(np.int16)
    for number, audio in enumerate((noise, noise // 4)):
        np.save(tmp_path / f"{number}.npy", audio)
    one, other = (Rendering(0, 0, tmp_path / f"{number}.npy", len(noise)) for number in range(2))
    sampler = PhraseSampler(PhraseBank(((one,), (other,)), (Phrase(NOTES, 4.0, (0, 1), "a.mid"),), (None, None), ()))
    for seed in range(10):
        heard, wanted = sampler.draw_pair(seed % 2, RATE, np.random.default_rng(seed))
        assert heard == pytest.approx(wanted, abs=2e-4)
        assert 20 * math.log10(float(np.sqrt(np.mean(heard**2)))) == pytest.approx(LEVEL_DBFS, abs=0.2)


def test_all_players_of_a_phrase_begin_together(bank: PhraseBank) -> None:
    for style in bank.renderings:
        for rendering in style:
            second = bank.phrases[rendering.phrase].notes[0].seconds
            first = rendering.audio()[: round((0.1 + min(second, 0.3)) * RATE)].astype(np.float32)
            assert onset_of(first) == pytest.approx(0.1, abs=0.006)


def test_what_pairs_become_is_retuned_alike_and_finite(place: Path, bank: PhraseBank) -> None:
    recipe = load_recipe(place / "tiny.toml")
    config = dataclasses.replace(recipe.augment, silence_chance=0.0)
    samples = raw_samples(recipe.segment_samples, recipe.augment)
    pairs = [PhraseSampler(bank).draw_pair(row % 3, samples, np.random.default_rng(row)) for row in range(8)]
    heard, wanted = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
    random = torch.Generator().manual_seed(1)
    pair = make_true_pair(heard, wanted, recipe.segment_samples, RATE, config, recipe.phrases, random)
    assert pair.input.shape == pair.target.shape == (8, recipe.segment_samples)
    for sound in pair.input, pair.target:
        assert bool(torch.isfinite(sound).all()) and float(sound.abs().max()) <= 1.0
    assert bool((torch.maximum(rms(pair.input), rms(pair.target)) > 10 ** (-43 / 20)).all())


def test_without_the_section_batches_are_those_of_recordings(place: Path) -> None:
    text = (place / "tiny.toml").read_text()
    head, tail = text.split("[phrases]")
    (place / "plain.toml").write_text(head + tail[tail.index("[trainer]") :])
    recipe = load_recipe(place / "plain.toml")
    library = loaded(place, recipe)
    assert render_phrases(recipe, library, place, place / "cache") is None
    samplers = [ExcerptSampler(style.train, recipe.data) for style in library.styles]
    batch = TrainingBatches(samplers, recipe, 0, 0).batch(0)
    assert batch.paired is None and batch.input_raw is None


def test_a_run_with_phrases_learns_from_pairs_and_names_its_tunes(
    place: Path, bank: PhraseBank, tmp_path: Path
) -> None:
    from training.checkpoint import read_checkpoint

    recipe = load_recipe(place / "tiny.toml")
    library = loaded(place, recipe)
    batches = TrainingBatches(
        [ExcerptSampler(style.train, recipe.data) for style in library.styles], recipe, 0, 0, PhraseSampler(bank)
    )
    batch = next(batch for batch in map(batches.batch, range(20)) if batch.paired is not None)
    pair = RestoreObjective(recipe, {}).pair(batch)
    assert pair.input.shape == pair.target.shape == (6, recipe.segment_samples)
    assert bool(torch.isfinite(pair.input).all())
    options = RunOptions(out_folder=tmp_path / "run", accelerator="cpu", devices="1", progress=False)
    result = run_training(recipe, library, options, bank)
    assert result.steps == 2 and math.isfinite(result.metrics["validation/loss"])
    assert read_checkpoint(result.last_checkpoint)["restyle"]["tunes"] == sorted({p.tune for p in bank.phrases})


def test_a_recogniser_learns_from_phrases_and_names_its_tunes(place: Path, bank: PhraseBank, tmp_path: Path) -> None:
    from training.checkpoint import read_checkpoint

    styles = "".join(STYLE.format(id=k, program=v) for k, v in PROGRAMS.items())
    (tmp_path / "ears.toml").write_text(EARS + styles)
    recipe = load_recipe(tmp_path / "ears.toml")
    library, sampler = loaded(place, recipe), PhraseSampler(bank)
    batches = TrainingBatches([ExcerptSampler(s.train, recipe.data) for s in library.styles], recipe, 0, 0, sampler)
    batch = batches.batch(0)
    assert batch.paired is None and batch.raw.shape[0] == 4
    row, style = next((row, style) for row, style in enumerate(batch.style.tolist()) if style in sampler)
    played = np.concatenate([rendering.audio() for rendering in bank.renderings[style]]) / np.float32(32768)
    heard = batch.raw[row].numpy()
    windows = np.lib.stride_tricks.sliding_window_view(played, 64)
    assert (np.abs(windows - heard[6000:6064]).max(axis=1) < 1e-3).any()  # a piece of what was played
    options = RunOptions(out_folder=tmp_path / "run", accelerator="cpu", devices="1", progress=False)
    result = run_training(recipe, library, options, bank)
    assert result.steps == 1 and math.isfinite(result.metrics["validation/accuracy"])
    assert read_checkpoint(result.last_checkpoint)["restyle"]["tunes"] == sorted({p.tune for p in bank.phrases})


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("minutes = 4", "unknown key 'phrases.minutes'"),
        ("minutes_per_style = -1", "phrases.minutes_per_style: must be at least 0"),
        ("pair_share = 0.7\nphrase_share = 0.7", "must not add up to more than 1"),
        ("pair_share = 1.5", "phrases.pair_share: must lie between 0 and 1"),
        ("partners = 0", "phrases.partners: must be at least 1"),
        ("midi_folder = ' '", "phrases.midi_folder: is empty"),
        ("minutes_per_style = 1\nphrase_seconds = 2", "phrases.phrase_seconds: must be at least four times"),
        ("tuning_semitones = 9", "phrases.tuning_semitones: must be at most augment.pitch_semitones"),
    ],
)
def test_recipes_with_mistakes_are_refused(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "a.toml").write_text(f"[phrases]\n{line}\n" + STYLE.format(id="violin", program=40))
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "a.toml")
    assert complaint in str(error.value)


def test_missing_tunes_and_styles_without_notes_are_named(place: Path, tmp_path: Path) -> None:
    recipe = load_recipe(place / "tiny.toml")
    library = loaded(place, recipe)
    with pytest.raises(PhraseError, match="there is no folder"):
        render_phrases(recipe, library, tmp_path, place / "cache")
    (tmp_path / "midi").mkdir()
    with pytest.raises(PhraseError, match=r"no MIDI files in .*midi"):
        render_phrases(recipe, library, tmp_path, place / "cache")
    write_tune(tmp_path / "midi" / "a.mid", [(0.0, 0.5, 60)])
    (tmp_path / "violin").mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).normal(size=RATE)
        soundfile.write(tmp_path / "violin" / f"{number}.wav", 0.1 * noise, RATE)
    (tmp_path / "a.toml").write_text(RECIPE + STYLE.format(id="violin", program=40))
    recipe = load_recipe(tmp_path / "a.toml")
    library = load_library(recipe.style, tmp_path, recipe.data, RATE, tmp_path / "cache")
    with pytest.raises(PhraseError, match=r"none of the styles 'violin' has 3 recordings of single notes"):
        render_phrases(recipe, library, tmp_path, tmp_path / "cache")


def test_the_command_says_what_is_wrong(place: Path, tmp_path: Path) -> None:
    text = (place / "tiny.toml").read_text().replace("[phrases]", '[phrases]\nmidi_folder = "nowhere"')
    (tmp_path / "a.toml").write_text(text)
    arguments = ["train", str(tmp_path / "a.toml"), "--data", str(place), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*arguments, "--cache", str(place / "cache")])
    assert result.exit_code == 1
    assert "phrases.midi_folder: there is no folder" in result.output


def test_real_notes_are_in_tune_with_each_other(tmp_path: Path) -> None:
    """Two saxophone notes and a vibraphone bar: each, played at another pitch, sounds at that pitch."""
    for program, folder, names in ((65, "sax", ("alto_sax_a3", "alto_sax_e4")), (11, "vibes", ("vibraphone_418hz",))):
        (tmp_path / folder).mkdir()
        for name in names:
            audio, rate = soundfile.read(CLIPS / f"{name}.flac", dtype="float32")
            soundfile.write(tmp_path / folder / f"{name}.wav", audio, rate)
        instrument = instrument_of(tmp_path / folder, program, tmp_path / f"cache-{folder}")
        assert len(instrument.notes) == len(names), instrument.left_out
        pitch = round(instrument.notes[0].pitch) + 2
        audio = render([TuneNote(0.1, 1.0, pitch, 90)], instrument, 2.0, RATE)
        assert pitch_at(audio, 0.25, 0.6) == pytest.approx(pitch, abs=0.3)
