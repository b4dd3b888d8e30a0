"""Every figure against sounds whose right answer is known, and the command from folders to JSON."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import mido
import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner, Result

pytest.importorskip("torch")

from export.writer import NamedStyle, write_model
from realtime.bundle import DEFAULT_MODEL, DEMO_CLIP, FIRST_MODEL, Bundle, Card, Source, read_bundle
from realtime.cli import app
from realtime.loudness import SILENT_LUFS, loudness_lufs
from realtime.spectral import SpectralSpec
from training import measures
from training.evaluate import (
    EvaluationError,
    EvaluationOptions,
    by_name,
    evaluate,
    find_overlap,
    read_references,
)
from training.measures import Audio
from training.models import recogniser
from training.models.generator import GeneratorConfig
from training.models.kinds import make_generator
from training.models.recogniser import RecogniserConfig, cut_excerpts, draw_phrase, normalise, split_held_out
from training.phrases import PhraseError
from training.playing import first_and_later, loudest_part
from training.reconstruction import log_mel_distance_db
from training.report import tables

RATE, HOP = 48_000, 128
SMALL = RecogniserConfig(excerpts_per_style=32, passes=16, batch=16, test_phrases_per_style=6)


def harmonic(hz: float, seconds: float, rate: int, falling: float = 1.0, partials: int = 12) -> Audio:
    """A steady tone whose partial k has amplitude k^-falling."""
    time = np.arange(round(seconds * rate)) / rate
    orders = [k for k in range(1, partials + 1) if k * hz < 0.45 * rate]
    phases = 2 * np.pi * np.outer(orders, hz * time) + np.array(orders)[:, None]
    return (0.1 * np.array(orders, float) ** -falling @ np.sin(phases)).astype(np.float32)


def noise(seconds: float, rate: int, level: float = 0.1) -> Audio:
    return (level * np.random.default_rng(1).standard_normal(round(seconds * rate))).astype(np.float32)


def test_pitch_is_kept_by_itself_and_by_another_timbre_and_not_by_another_octave() -> None:
    tune = np.concatenate([harmonic(hz, 0.5, measures.TRACK_RATE) for hz in (196.0, 247.0, 330.0)])
    octave = np.concatenate([harmonic(2 * hz, 0.5, measures.TRACK_RATE) for hz in (196.0, 247.0, 330.0)])
    duller = np.concatenate([harmonic(hz, 0.5, measures.TRACK_RATE, falling=2.0) for hz in (196.0, 247.0, 330.0)])
    track = measures.pitch_track(tune)
    assert track.pitched and track.voiced_share > 0.9 and track.agreement > 0.95
    assert measures.pitch_kept(track, tune) == 1.0
    assert measures.pitch_kept(track, duller) > 0.97
    assert measures.pitch_kept(track, octave) == 0.0
    assert measures.pitch_kept(track, np.zeros_like(tune)) == 0.0


def test_noise_and_silence_have_no_pitch() -> None:
    for audio in (noise(1.0, measures.TRACK_RATE), np.zeros(measures.TRACK_RATE, np.float32)):
        assert not measures.pitch_track(audio).pitched


@pytest.mark.parametrize(
    ("reference", "found", "f1"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 1.0),
        ([1.0, 2.0, 3.0], [1.05, 1.96, 3.2], 2 / 3),
        ([1.0], [0.98, 1.0, 1.02], 0.5),  # one onset is found once only
        ([1.0, 1.04], [1.03, 1.08], 1.0),  # 1.04 must leave 1.03 to 1.0
        ([1.0], [], 0.0),
    ],
)
def test_onset_f1_matches_one_to_one(reference: list[float], found: list[float], f1: float) -> None:
    assert measures.onset_f1(np.array(reference), np.array(found)) == pytest.approx(f1)
    assert measures.onset_f1(np.array(found), np.array(reference)) == pytest.approx(f1)


def test_onsets_are_found_where_notes_start() -> None:
    audio = np.zeros(3 * measures.TRACK_RATE, np.float32)
    starts_s = np.array([0.5, 1.1, 1.9, 2.4])
    decay = np.exp(-np.arange(measures.TRACK_RATE // 2) / 1500).astype(np.float32)
    for start_s in starts_s:
        at = round(start_s * measures.TRACK_RATE)
        audio[at : at + len(decay)] += decay * harmonic(330.0, 0.5, measures.TRACK_RATE)
    assert measures.onset_f1(starts_s, measures.onsets_s(audio)) == 1.0
    assert math.isnan(measures.onset_f1(np.array([]), np.array([])))


def test_chroma_correlation_is_one_for_the_same_notes_and_low_for_others() -> None:
    tune, other = (harmonic(hz, 2.0, measures.TRACK_RATE, partials=2) for hz in (440.0, 622.3))
    heard, sounding = measures.chroma(tune), np.ones(100, bool)
    assert measures.chroma_correlation(heard, heard, sounding) == pytest.approx(1.0)
    assert measures.chroma_correlation(heard, measures.chroma(0.1 * tune), sounding) == pytest.approx(1.0, abs=1e-3)
    assert measures.chroma_correlation(heard, measures.chroma(other), sounding) < 0.2


def test_loudness_correlation_follows_the_curve_not_the_level() -> None:
    time = np.arange(3 * measures.TRACK_RATE) / measures.TRACK_RATE
    swell = (10.0 ** ((np.sin(2 * np.pi * time) - 1.0) * 0.5)).astype(np.float32)
    tone = harmonic(300.0, 3.0, measures.TRACK_RATE)
    assert measures.loudness_correlation(swell * tone, 0.1 * swell * tone) == pytest.approx(1.0, abs=1e-6)
    assert measures.loudness_correlation(swell * tone, (tone / (0.1 + swell)).astype(np.float32)) < -0.9
    assert math.isnan(measures.loudness_correlation(tone[4800:-4800], tone))


@pytest.mark.parametrize("level_db", [-20.0, -40.0, -60.0])
def test_hop_buzz_is_the_level_of_an_injected_comb(level_db: float) -> None:
    music = np.sum([harmonic(hz, 6.0, RATE) for hz in (221.0, 331.0, 440.0)] + [noise(6.0, RATE, 1e-4)], axis=0)
    comb = np.sum([harmonic(RATE / HOP * k, 6.0, RATE, partials=1) for k in range(1, 30)], axis=0)
    comb *= 10.0 ** (level_db / 20.0) * np.sqrt(np.square(music).mean() / np.square(comb).mean())
    assert measures.hop_buzz_db(music, music, HOP) == measures.BUZZ_FLOOR_DB
    total_db = 10.0 * math.log10(1.0 + 10.0 ** (level_db / 10.0))
    assert measures.hop_buzz_db(music, music + comb, HOP) == pytest.approx(level_db - total_db, abs=1.0)
    assert measures.hop_buzz_db(music + comb, 0.5 * (music + comb), HOP) == measures.BUZZ_FLOOR_DB


def test_hop_buzz_that_comes_and_goes_with_the_notes_is_found() -> None:
    time = np.arange(6 * RATE) / RATE
    swell = (0.5 - 0.5 * np.cos(2 * np.pi * 4.0 * time)).astype(np.float32)
    music = (swell * (harmonic(221.0, 6.0, RATE) + noise(6.0, RATE, 1e-4))).astype(np.float32)
    comb = swell * np.sum([harmonic(RATE / HOP * k, 6.0, RATE, partials=1) for k in range(1, 30)], axis=0)
    comb *= np.float32(1e-2 * np.sqrt(np.square(music).mean() / np.square(comb).mean()))
    # A third of its energy lies beside the lines, at the rate of the notes.
    assert measures.hop_buzz_db(music, music + comb, HOP) == pytest.approx(-41.8, abs=1.0)


def test_a_partial_that_glides_over_a_multiple_is_no_hop_buzz() -> None:
    time = np.arange(6 * RATE) / RATE
    around = RATE / HOP * 5
    gliding = np.sin(2 * np.pi * around * time - 24.0 * np.cos(2 * np.pi * 0.5 * time))  # 12 Hz either way
    plain = harmonic(221.0, 6.0, RATE)
    assert measures.hop_buzz_db(plain, (plain + 0.3 * gliding).astype(np.float32), HOP) == measures.BUZZ_FLOOR_DB


@pytest.mark.parametrize("beside_hz", [-3.0, -1.0, 1.5])
def test_a_note_beside_a_multiple_is_no_hop_buzz(beside_hz: float) -> None:
    """However much louder the model makes it, short or long."""
    time = np.arange(6 * RATE) / RATE
    note = np.sin(2 * np.pi * (RATE / HOP * 2 + beside_hz) * time)
    plain = harmonic(221.0, 6.0, RATE)
    for shape in (np.ones_like(time), np.exp(-2.0 * (time % 3.0))):
        before, after = ((plain + gain * shape * note).astype(np.float32) for gain in (0.01, 0.3))
        assert measures.hop_buzz_db(before, after, HOP) == measures.BUZZ_FLOOR_DB


def test_partials_stand_out_of_noise_and_noise_does_not() -> None:
    time_s = np.arange(2 * RATE) / RATE
    pulses = (0.01 * np.cos(2 * np.pi * 220.0 * np.arange(1, 34)[:, None] * time_s).sum(axis=0)).astype(np.float32)
    hiss = noise(2.0, RATE)
    dark = np.cumsum(hiss).astype(np.float32)  # 6 dB an octave
    assert measures.partials_db(hiss, RATE) == pytest.approx(6.3, abs=0.3)
    assert measures.partials_db(dark - dark.mean(), RATE) == pytest.approx(6.3, abs=0.5)
    assert measures.partials_db(pulses, RATE) > 20.0
    assert measures.partials_db(0.01 * pulses, RATE) == pytest.approx(measures.partials_db(pulses, RATE), abs=0.1)
    assert 7.5 < measures.partials_db(pulses + 0.3 * hiss, RATE) < measures.partials_db(pulses, RATE) - 3.0
    assert math.isnan(measures.partials_db(np.zeros(RATE, np.float32), RATE))
    assert math.isnan(measures.partials_db(hiss[:100], RATE))


def test_bands_of_a_steady_tone_hold_still_and_those_of_what_beats_or_hisses_do_not() -> None:
    tone = harmonic(220.0, 2.0, RATE)
    time_s = np.arange(len(tone)) / RATE
    beating = tone * (1.0 + 0.5 * np.sin(2 * np.pi * 6.0 * time_s)).astype(np.float32)
    restruck = tone * np.exp(-20.0 * (time_s % 0.2)).astype(np.float32)
    still, beats, strikes, hisses = (
        measures.flutter_db(audio, RATE) for audio in (tone, beating, restruck, noise(2.0, RATE))
    )
    assert still < 0.1 < 0.5 < beats < strikes
    assert 1.0 < hisses < 5.0
    assert measures.flutter_db(0.01 * beating, RATE) == pytest.approx(beats, abs=0.05)
    assert math.isnan(measures.flutter_db(np.zeros(RATE, np.float32), RATE))
    assert math.isnan(measures.flutter_db(noise(2.0, RATE)[:100], RATE))


def test_noise_alone_is_no_hop_buzz() -> None:
    assert measures.hop_buzz_db(np.zeros(6 * RATE, np.float32), noise(6.0, RATE), HOP) == measures.BUZZ_FLOOR_DB


@pytest.mark.parametrize("depth", [0.1, 0.001])
def test_tone_buzz_is_the_energy_of_the_sidebands(depth: float) -> None:
    time = np.arange(4 * RATE) / RATE
    tone = 0.2 * np.sin(2 * np.pi * 440.0 * time)
    buzzing = tone * (1.0 + depth * np.sin(2 * np.pi * RATE / HOP * time))
    expected = 10.0 * math.log10(depth**2 / 2 / (1.0 + depth**2 / 2))
    assert measures.tone_buzz_db(buzzing.astype(np.float32), 440.0, RATE, HOP) == pytest.approx(expected, abs=1.0)
    assert measures.tone_buzz_db(tone.astype(np.float32), 440.0, RATE, HOP) == measures.BUZZ_FLOOR_DB
    richer = harmonic(440.0, 4.0, RATE, partials=30)
    assert measures.tone_buzz_db(richer, 440.0, RATE, HOP) < -75.0  # what windows leave of partials close by


def test_clicks_are_counted_and_attacks_are_not() -> None:
    smooth = harmonic(220.0, 2.0, RATE)
    assert len(measures.find_clicks(smooth, RATE)) == 0
    assert len(measures.find_clicks(noise(2.0, RATE), RATE)) == 0
    attack = np.concatenate([np.zeros(RATE, np.float32), noise(1.0, RATE)])
    assert len(measures.find_clicks(attack, RATE)) == 0
    clicking = smooth.copy()
    places = np.array([20_000, 45_000, 80_000])
    clicking[places] += 0.05
    assert measures.find_clicks(clicking, RATE) == pytest.approx(places, abs=RATE // 1000)
    assert measures.added_clicks(smooth, clicking, RATE) == 3
    assert measures.added_clicks(clicking, clicking, RATE) == 0


def test_peak_and_loudness_of_a_known_tone_and_of_silence() -> None:
    tone = np.sin(2 * np.pi * 997.0 * np.arange(2 * RATE) / RATE).astype(np.float32)
    assert measures.peak_dbfs(0.1 * tone) == pytest.approx(-20.0, abs=0.01)
    assert loudness_lufs(tone, RATE) == pytest.approx(-3.01, abs=0.1)  # BS.1770-4's own calibration
    assert measures.peak_dbfs(0.0 * tone) == measures.SILENT_DBFS
    assert loudness_lufs(0.0 * tone, RATE) == SILENT_LUFS


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    one, other = (np.zeros(3), np.diag([1.0, 4.0, 9.0])), (np.array([1.0, 2.0, 2.0]), np.diag([4.0, 4.0, 1.0]))
    expected = 9.0 + (1.0 - 2.0) ** 2 + 0.0 + (3.0 - 1.0) ** 2
    assert measures.frechet_distance(one, other) == pytest.approx(expected)
    assert measures.frechet_distance(one, one) == pytest.approx(0.0, abs=1e-9)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    turned = [(turn @ mean, turn @ covariance @ turn.T) for mean, covariance in (one, other)]
    assert measures.frechet_distance(*turned) == pytest.approx(expected)
    few = np.random.default_rng(2).standard_normal((6, 24)).astype(np.float32)
    assert np.linalg.eigvalsh(measures.gaussian_of(few)[1]).min() > 1e-3


def test_static_match_takes_on_the_spectrum_and_keeps_time_and_level() -> None:
    bright = noise(3.0, RATE)
    dull = np.convolve(bright, [0.5, 0.5], "same").astype(np.float32)
    matched = measures.static_match(bright, measures.mean_spectrum(dull, RATE), RATE)
    assert len(matched) == len(bright)
    assert np.sqrt(np.square(matched).mean()) == pytest.approx(np.sqrt(np.square(bright).mean()), rel=1e-3)
    low = slice(20, 1800)
    distance = [
        np.abs(np.log10(measures.mean_spectrum(a, RATE)[low] / measures.mean_spectrum(dull, RATE)[low])).mean()
        for a in (bright, matched)
    ]
    assert distance[1] < 0.3 * distance[0]
    click = np.zeros(RATE, np.float32)
    click[24_000] = 1.0
    assert np.abs(measures.static_match(click, measures.mean_spectrum(dull, RATE), RATE)).argmax() == 24_000


def test_the_loudest_part_is_found() -> None:
    audio = np.full(1000, 0.1, np.float32)
    audio[600:700] = 1.0
    part = loudest_part(audio, 200)
    assert len(part) == 200 and np.count_nonzero(part == 1.0) == 100
    assert len(loudest_part(audio, 5000)) == 1000


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three styles of six notes each: a steady rich tone, a breathy pure one, and one that rings out over noise."""
    folder = tmp_path_factory.mktemp("references")
    rate, seconds = 44_100, 2.5
    hiss, decay = noise(seconds, rate, 0.02), np.exp(-3.0 * np.arange(round(seconds * rate)) / rate).astype(np.float32)
    for note in range(6):
        hz = 180.0 * 2 ** (note * 3 / 12)
        notes = {
            "violin": harmonic(hz, seconds, rate, 0.3),
            "flute": harmonic(hz, seconds, rate, partials=1) + 0.5 * hiss,
            "gong": decay * (harmonic(2.76 * hz, seconds, rate, partials=2) + 3.0 * decay * hiss),
        }
        for style, audio in notes.items():
            (folder / style).mkdir(exist_ok=True)
            soundfile.write(folder / style / f"note{note}.flac", audio, rate)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_the_split_is_by_recording_and_by_content(references: Path, cache: Path) -> None:
    recordings, notes = read_references(references, RATE, cache)
    assert set(recordings) == {"violin", "flute", "gong"} and notes == []
    for group in recordings.values():
        training, held_out = split_held_out(group, 0.25, seed=3)
        assert len(training) == 4 and len(held_out) == 2
        assert {r.audio_sha256 for r in training}.isdisjoint(r.audio_sha256 for r in held_out)
        renamed = [replace(r, name=f"x{r.name}") for r in reversed(group)]
        assert {r.audio_sha256 for r in split_held_out(renamed, 0.25, seed=3)[1]} == {r.audio_sha256 for r in held_out}
        assert split_held_out(group[:1], 0.25, seed=3) == ((), (group[0],))


def test_the_recogniser_ignores_level_and_is_the_same_again(references: Path, cache: Path) -> None:
    recordings, _ = read_references(references, RATE, cache)
    phrase, same = (draw_phrase(recordings["violin"], SMALL, np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(phrase, same) and np.any(phrase)
    excerpts = cut_excerpts(phrase)
    assert excerpts.shape == (1, recogniser.EXCERPT_SAMPLES)
    loud, quiet = (normalise(recogniser.mel_power(recogniser.torch.from_numpy(g * excerpts))) for g in (1.0, 0.01))
    assert loud.shape == (1, 1, recogniser.MELS, 151) and float(loud.max()) == 1.0
    assert float((loud - quiet).abs().max()) < 0.05
    first = recogniser.load_or_train(recordings, SMALL, cache)
    told: list[int] = []
    again = recogniser.load_or_train(recordings, SMALL, cache, lambda done, _: told.append(done))
    assert not told and again.accuracy == first.accuracy
    assert np.array_equal(first.judge(excerpts).shares, again.judge(excerpts).shares)
    assert recogniser.cache_key(recordings, SMALL) != recogniser.cache_key(recordings, replace(SMALL, seed=1))
    fewer = {**recordings, "gong": recordings["gong"][1:]}
    assert recogniser.cache_key(recordings, SMALL) != recogniser.cache_key(fewer, SMALL)


def test_phrases_are_learned_far_from_their_pitch_and_tested_near_it(references: Path, cache: Path) -> None:
    recordings, _ = read_references(references, RATE, cache)
    (note,) = (recording for recording in recordings["flute"] if recording.name.endswith("note2.flac"))
    own_hz = 180.0 * 2 ** (2 * 3 / 12)

    def semitones(config: RecogniserConfig) -> list[float]:
        moved = []
        for seed in range(24):
            phrase = draw_phrase([note], config, np.random.default_rng(seed))
            spectrum = np.abs(np.fft.rfft(phrase * np.hanning(len(phrase))))
            moved.append(12.0 * math.log2(spectrum.argmax() / recogniser.EXCERPT_SECONDS / own_hz))
        return moved

    config = RecogniserConfig()
    assert max(map(abs, semitones(config.for_tests))) < config.test_semitones + 0.2
    far = semitones(config)
    assert max(map(abs, far)) < config.semitones + 0.2
    assert min(far) < -6.0 and max(far) > 6.0


def trained_on(path: Path) -> Bundle:
    bundle = read_bundle(FIRST_MODEL)
    card = replace(bundle.manifest.card, recordings_sha256=(hashlib.sha256(path.read_bytes()).hexdigest(),))
    return replace(bundle, manifest=replace(bundle.manifest, card=card))


def test_inputs_that_were_trained_on_are_named_in_whatever_format(
    references: Path, cache: Path, tmp_path: Path
) -> None:
    recordings, _ = read_references(references, RATE, cache)
    note = references / "gong" / "note0.flac"
    copy, fresh = tmp_path / "take.wav", tmp_path / "fresh.wav"
    soundfile.write(copy, soundfile.read(note, dtype="int16")[0], 44_100)
    soundfile.write(fresh, noise(1.0, RATE), RATE)
    (named,) = find_overlap([copy, fresh], [trained_on(note)], recordings, RATE)
    assert named == f"{copy}: first.onnx was trained on it"
    (named,) = find_overlap([copy, fresh], [read_bundle(FIRST_MODEL)], recordings, RATE)
    assert named == f"{copy}: is note0.flac of the references of 'gong', which train the recogniser"
    assert find_overlap([note], [trained_on(note)], {}, RATE) == [f"{note}: first.onnx was trained on it"]
    with pytest.raises(EvaluationError, match=r"take\.wav: is note0\.flac"):
        evaluate(FIRST_MODEL, copy, references, replace(options_of(cache), styles=("violin",)))


def options_of(cache: Path) -> EvaluationOptions:
    return EvaluationOptions(cache=cache, recogniser=SMALL, seconds=2.0)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_inputs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.wav", "a.flac", "b/a.wav", "c.d.wav")]
    assert list(by_name(paths, tmp_path)) == ["a.wav", "a.flac", "b/a", "c.d"]
    assert list(by_name(paths[:1], paths[0])) == ["a"]


def test_what_cannot_be_evaluated_is_named(references: Path, cache: Path, tmp_path: Path) -> None:
    empty, model = tmp_path / "empty", str(FIRST_MODEL)
    empty.mkdir()
    common = ["--cache", cache]
    for arguments, text in (
        ([tmp_path / "no.onnx", "--inputs", DEMO_CLIP, "--references", references], "no.onnx: file: there is no such"),
        ([model, "--inputs", tmp_path / "nowhere", "--references", references], "nowhere: there is no such folder"),
        ([model, "--inputs", empty, "--references", references], "empty: has no recordings"),
        ([model, "--inputs", DEMO_CLIP, "--references", empty], "empty: has no folders with recordings"),
        ([model, "--inputs", DEMO_CLIP, "--references", references], "no folder for trumpet, alto_sax"),
        ([model, "--inputs", DEMO_CLIP, "--references", references, "--styles", "violni"], "did you mean violin"),
        (
            [DEFAULT_MODEL, "--inputs", DEMO_CLIP, "--references", references, "--styles", "harp", "--baseline", model],
            "first.onnx: plays none of harp; choose another baseline",
        ),
        ([model, "--inputs", DEMO_CLIP, "--references", references, "--json", tmp_path / "no" / "f"], "is no folder"),
    ):
        result = run(*arguments, *common)
        assert result.exit_code == 1 and text in " ".join(result.stderr.split()), (text, result.stderr)


def test_the_command_from_folders_to_figures(
    references: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recogniser, "RecogniserConfig", functools.partial(RecogniserConfig, **vars_of(SMALL)))
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "guitar.flac").write_bytes(DEMO_CLIP.read_bytes())
    (inputs / "broken.wav").write_bytes(b"RIFF, but not really")
    written, picture, tunes = tmp_path / "figures.json", tmp_path / "figures.png", tmp_path / "tunes"
    write_scale(tunes / "scale.mid")
    result = run(
        *(FIRST_MODEL, "--inputs", inputs, "--references", references, "--styles", "violin,flute", "--cache", cache),
        *("--seconds", 6, "--json", written, "--plot", picture, "--baseline", FIRST_MODEL, "--tunes", tunes),
    )
    assert result.exit_code == 0, (result.stdout, result.stderr)
    assert "broken.wav: cannot be decoded" in " ".join(result.stderr.split())
    figures = json.loads(written.read_text())
    assert set(figures["recogniser"]["styles"]) == {"violin", "flute", "gong"}
    assert figures["recogniser"]["accuracy"] > 0.6  # three plain timbres
    assert set(figures["baselines"]) == {"first", "unchanged", "static match"}
    assert list(figures["styles"]) == ["violin", "flute"] and list(figures["inputs"]) == ["guitar"]
    for values in (figures["mean"], *figures["styles"].values(), figures["inputs"]["guitar"]):
        for name in ("style_accuracy", "onset_f1"):
            assert 0.0 <= values[name] <= 1.0
        for name in ("chroma_correlation", "loudness_correlation"):
            assert 0.3 < values[name] <= 1.0
        assert values["hop_buzz_db"] < -30.0 and values["clicks_per_minute"] < 60.0
        assert values["silence_peak_dbfs"] < -60.0
    assert figures["mean"]["frechet_ratio"] > 0.0 and figures["mean"]["hop_buzz_tone_db"] < -20.0
    assert abs(figures["styles"]["violin"]["level_difference_lu"]) < 6.0
    assert figures["inputs_used"]["guitar"]["heard_as"] in figures["recogniser"]["styles"]
    unchanged = figures["baselines"]["unchanged"]["mean"]
    assert unchanged["frechet_ratio"] == 1.0 and unchanged["onset_f1"] == 1.0 and unchanged["level_spread_lu"] == 0.0
    for system in (figures, *figures["baselines"].values()):
        assert system["mean_of_voices"] is None or 0.0 <= system["mean_of_voices"]["style_accuracy"] <= 1.0
    assert (figures["mean_of_voices"] is None) == (not figures["inputs_used"]["guitar"]["pitched"])
    assert (figures["mean_of_voices"] is None) == (figures["styles_of_voices"] is None)
    same = figures["baselines"]["first"]["mean"]
    assert same == figures["mean"]  # one engine, one figure
    for shares in figures["taken_for"].values():
        assert sum(shares.values()) == pytest.approx(1.0, abs=0.01)
    for name, title, least in (
        ("partials_db", "How far partials stand out", 5.0),
        ("flutter_db", "How much bands move", 0.0),
    ):
        assert set(figures["recordings"][name]) == {"violin", "flute"}
        assert title in result.stdout and figures["mean"][name] > least
    for values in (figures["mean"], *figures["styles"].values(), figures["inputs"]["guitar"]):
        assert 0.0 <= values["added_strokes_db"] < 1.0
    assert figures["baselines"]["unchanged"]["mean"]["added_strokes_db"] == 0.0
    assert "strokes that the input does not have, dB" in " ".join(result.stdout.split())
    played = figures["tunes"]["styles"]
    assert list(played) == ["violin", "flute"] and "Tunes played on the recordings themselves" in result.stdout
    for style, values in played.items():  # the recordings themselves are nearer than a guitar is
        assert (
            values["style_accuracy"] > 0.6 and 0.0 < values["frechet_ratio"] < figures["styles"][style]["frechet_ratio"]
        )
        assert (values["frechet_ratio_of_voices"] is None) == (figures["mean_of_voices"] is None)
        assert 0.7 < values["onset_f1"] <= 1.0  # of one instrument's playing against the other's
    assert figures["tunes"]["mean"]["frechet_ratio"] == pytest.approx(
        np.mean([values["frechet_ratio"] for values in played.values()]), abs=1e-3
    )
    later = figures["mean"]["style_accuracy_later"]
    assert 0.0 <= figures["mean"]["style_accuracy_first"] <= 1.0 and 0.0 <= later <= 1.0
    assert f"in later ones {later:.0%}" in " ".join(result.stdout.split())
    assert figures["machine"] and figures["date"] and picture.stat().st_size > 20_000
    options = replace(options_of(cache), styles=("violin", "flute"), seconds=6.0, alone=True)
    alone = evaluate(FIRST_MODEL, inputs / "guitar.flac", references, options).figures
    assert set(alone["baselines"]) == {"unchanged"} and "tunes" not in alone
    assert alone["mean"] == figures["mean"]
    both = ("--alone", "--baseline", FIRST_MODEL)
    assert run(FIRST_MODEL, "--inputs", inputs, "--references", references, *both).exit_code == 2


def test_tunes_that_are_not_there_are_named(cache: Path, tmp_path: Path) -> None:
    options = replace(options_of(cache), styles=("violin",), alone=True, tunes=tmp_path / "nowhere")
    with pytest.raises(PhraseError, match=r"--tunes: there is no folder .*nowhere"):
        evaluate(FIRST_MODEL, DEMO_CLIP, tmp_path / "not looked at", options)
    write_scale(tmp_path / "tunes" / "scale.mid")
    hissing = tmp_path / "hissing"
    for style in ("violin", "flute"):
        (hissing / style).mkdir(parents=True)
        for number in range(6):
            hiss = np.random.default_rng([number, len(style)]).standard_normal(2 * RATE)
            soundfile.write(hissing / style / f"{number}.flac", 0.1 * hiss, RATE)
    options = replace(options, tunes=tmp_path / "tunes")
    with pytest.raises(PhraseError, match=r"--tunes: none of the styles violin has 3 recordings of single notes"):
        evaluate(FIRST_MODEL, DEMO_CLIP, hissing, options)


def write_scale(path: Path) -> None:
    """Two octaves up and down, from 185 Hz on."""
    file, track = mido.MidiFile(ticks_per_beat=480), mido.MidiTrack()
    for step in (*range(0, 25, 2), *range(24, -1, -2)):
        track.append(mido.Message("note_on", note=54 + step, velocity=80, time=0))
        track.append(mido.Message("note_off", note=54 + step, velocity=0, time=480))
    file.tracks.append(track)
    path.parent.mkdir(exist_ok=True)
    file.save(path)


def test_the_first_excerpt_of_an_input_is_told_apart_from_later_ones() -> None:
    shares = np.array([[0.0, 0.0], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6], [0.0, 0.0]], np.float32)  # silence at both ends
    heard = recogniser.Judgement(shares, np.zeros((5, 1), np.float32))
    assert first_and_later(heard, 1) == (1.0, 0.5) and first_and_later(heard, 0) == (0.0, 0.5)
    one, none = (recogniser.Judgement(shares[rows], heard.embeddings[rows]) for rows in (slice(0, 2), slice(0, 1)))
    assert first_and_later(one, 1)[0] == 1.0 and math.isnan(first_and_later(one, 1)[1])
    assert all(map(math.isnan, first_and_later(none, 1)))


def test_log_mel_distance_hears_an_equaliser_and_no_level() -> None:
    sound = np.stack([harmonic(hz, 3.0, recogniser.SAMPLE_RATE) for hz in (220.0, 330.0)])
    assert log_mel_distance_db(sound, 0.1 * sound) < 0.01
    duller = np.stack([harmonic(hz, 3.0, recogniser.SAMPLE_RATE, falling=2.0) for hz in (220.0, 330.0)])
    assert 1.0 < log_mel_distance_db(sound, duller) < log_mel_distance_db(sound, np.zeros_like(sound)) <= 60.0


def test_an_autoencoder_is_measured_by_its_code_and_what_it_makes_of_unheard_recordings(
    references: Path, cache: Path, tmp_path: Path
) -> None:
    recogniser.torch.manual_seed(0)
    config = GeneratorConfig(answer="autoencoder", style_dim=4, band_count=12, hidden=16, code_size=2, code_levels=4)
    styles = [NamedStyle(name, name, i, np.eye(4, dtype=np.float32)[i]) for i, name in enumerate(("violin", "flute"))]
    notes = [(references / "violin" / f"note{i}.flac").read_bytes() for i in range(6)]
    heard = tuple(hashlib.sha256(note).hexdigest() for note in notes[:4])
    card = Card("", "restore", "", "2026-01-01", 0, 0.0, (Source("violin", "CC0-1.0", "nobody", 1, 0.1),), {}, heard)
    model = tmp_path / "code.onnx"
    spec = SpectralSpec()
    write_model(make_generator(spec, config).eval(), spec, styles, card, model, "code", verify_hops=50)
    figures = evaluate(model, DEMO_CLIP, references, options_of(cache)).figures
    assert figures["code"] == {
        "levels": [512, 8, 256, 4, 4],
        "numbers_per_second": 1875.0,
        "bits_per_second": 375.0 * 24,
    }
    made = figures["reconstruction"]
    assert {style: values["recordings"] for style, values in made["styles"].items()} == {"violin": 2, "flute": 6}
    for values in (made["mean"], *made["styles"].values()):
        assert 0.0 <= values["style_accuracy"] <= 1.0 and 0.0 < values["log_mel_distance_db"] <= 60.0
        assert values["style_accuracy_unchanged"] > 0.5  # three plain timbres
    (shown,) = [table for table in tables(figures) if "9.0 kbit (1,875 numbers) a second" in str(table.title)]
    assert shown.row_count == 3
    plain = {name: value for name, value in figures.items() if name not in ("code", "reconstruction")}
    assert [str(table.title) for table in tables(plain)] == [str(table.title) for table in tables(figures)[:-1]]


def vars_of(config: RecogniserConfig) -> dict[str, float]:
    return {name: value for name, value in vars(config).items() if name != "seed"}
