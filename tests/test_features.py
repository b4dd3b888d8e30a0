"""Features against hand-computed values and other implementations; the frame clock, statistics, bars and the cache."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

torch = pytest.importorskip("torch")

import scipy.fft  # noqa: E402

import training.features  # noqa: E402
from realtime.cli import app  # noqa: E402
from training.features import (  # noqa: E402
    FeatureCache,
    FeatureConfig,
    FeatureError,
    Features,
    Preparation,
    Statistics,
    bar_frames,
    describe,
    frame_centres,
    frame_count,
    power_spectrogram,
    prepare,
    split_bars,
)
from training.library import _mapped, load_library  # noqa: E402
from training.librosa_once import librosa  # noqa: E402
from training.recipe import DataConfig, StyleEntry  # noqa: E402

CLIPS = Path(__file__).parent / "data"
Audio = NDArray[np.float32]


def clip(name: str = "alto_sax_a3") -> tuple[Audio, int]:
    audio, rate = soundfile.read(CLIPS / f"{name}.flac")
    return np.asarray(audio, dtype=np.float32), rate


def config_at(sample_rate: int, **fields: Any) -> FeatureConfig:
    return FeatureConfig(preparation=Preparation(sample_rate), **fields)


def sine(hertz: float, seconds: float, rate: int, amplitude: float = 1.0) -> Audio:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def same(one: Features, other: Features) -> bool:
    names = ("mel", "mfcc", "chroma", "onset_strength", "beat_frames", "tempo_bpm")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names) and np.array_equal(
        one.statistics.mean, other.statistics.mean
    )


def test_eighty_frames_a_second_at_44_100_hz_by_hand() -> None:
    hop = config_at(44_100).hop
    assert hop == Fraction(2205, 4)  # 551.25
    assert frame_centres(6, hop).tolist() == [0, 551, 1103, 1654, 2205, 2756]
    assert frame_centres(1, hop, 80 * 3600).tolist() == [44_100 * 3600]  # an hour later: not a sample off
    assert config_at(48_000).hop == 600


@given(
    st.integers(8000, 192_000),
    st.fractions(1, 1000, max_denominator=1001),
    st.integers(0, 10**9),
    st.integers(1, 50),
)
@settings(deadline=None)
def test_no_frame_is_more_than_half_a_sample_off(rate: int, fps: Fraction, start: int, count: int) -> None:
    hop = rate / fps
    centres = frame_centres(count, hop, start).tolist()
    assert all(abs(centre - (start + k) * hop) <= Fraction(1, 2) for k, centre in enumerate(centres))
    samples = start % 10**7
    frames = frame_count(samples, hop)
    assert (frames - 1) * hop <= samples < frames * hop
    assert frame_centres(1, hop, frames - 1)[0] <= samples


def test_clicks_of_a_minute_stay_on_their_frames() -> None:
    rate, seconds = 44_100, 60
    audio = np.zeros((1, rate * seconds), np.float32)
    audio[0, ::rate] = 1.0
    energy = power_spectrogram(audio, 512, config_at(rate).hop).sum(axis=1)[0]
    heard = np.flatnonzero(energy > 0.99 * energy.max())
    assert heard.tolist() == [80 * second for second in range(seconds)]


def test_a_whole_hop_is_what_librosa_computes() -> None:
    audio, rate = clip()
    assert rate == 44_100
    config = config_at(rate, frames_per_second=100)
    theirs = librosa.stft(audio, n_fft=2048, hop_length=441)
    ours = power_spectrogram(audio[None], 2048, config.hop)
    np.testing.assert_allclose(ours[0], np.abs(theirs) ** 2, rtol=1e-3, atol=1e-5)
    features = describe(audio, rate, config)
    mel = librosa.feature.melspectrogram(y=audio, sr=rate, n_fft=2048, hop_length=441, n_mels=80, fmin=30)
    decibels = 10.0 * np.log10(np.maximum(mel, 1e-10))
    np.testing.assert_allclose(features.mel_db[0], decibels, atol=0.05)
    by_dct = np.asarray(scipy.fft.dct(decibels, axis=0, norm="ortho"))[:20]
    np.testing.assert_allclose(features.mfcc[0], by_dct, atol=0.5)
    assert features.mel.shape == (1, 80, len(audio) // 441 + 1)
    assert features.onset_strength.shape == features.mel.shape[2:]


def test_a_sine_has_the_band_and_the_level_that_a_hann_window_gives_it() -> None:
    rate = 48_000
    power = power_spectrogram(sine(1500.0, 0.5, rate)[None], 2048, Fraction(600))
    assert power[0, :, 20].argmax() == 64  # 1500 / 48,000 * 2048
    assert power[0, 64, 20] == pytest.approx((2048 / 4) ** 2, rel=1e-3)  # half the sum of the window


@pytest.mark.parametrize(("name", "pitch_class"), [("alto_sax_a3", 9), ("alto_sax_e4", 4), ("vibraphone_418hz", 8)])
def test_chroma_names_the_note(name: str, pitch_class: int) -> None:
    audio, rate = clip(name)
    chroma = describe(audio, rate, config_at(rate)).chroma[0]
    loud = chroma[:, 8:60]
    assert (loud.argmax(axis=0) == pitch_class).mean() > 0.9
    assert loud.max() == pytest.approx(1.0)


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_an_onset_is_strongest_where_a_note_begins(rate: int) -> None:
    audio, own = clip("vibraphone_418hz")
    note = prepare(audio, own, Preparation(rate))[0]
    begins = int(np.argmax(np.abs(note) > 0.1 * np.abs(note).max()))
    sound = np.concatenate([np.zeros(rate, np.float32), note[begins:]])
    strength = describe(sound, rate, config_at(rate)).onset_strength
    assert abs(int(strength.argmax()) - 80) <= 1


def test_standardised_means_zero_mean_and_unit_variance_and_the_way_back() -> None:
    audio, rate = clip()
    features = describe(audio, rate, config_at(rate))
    np.testing.assert_allclose(features.mel.mean(axis=(0, 2)), 0.0, atol=1e-4)
    np.testing.assert_allclose(features.mel.std(axis=(0, 2)), 1.0, atol=1e-4)
    mel_db = features.mel_db
    assert mel_db.max() > mel_db.min() + 60.0
    np.testing.assert_allclose(features.statistics.standardise(mel_db), features.mel, atol=1e-4)
    silent = describe(np.zeros(rate, np.float32), rate, config_at(rate))
    assert not silent.mel.any() and np.allclose(silent.mel_db, -100.0)
    assert not silent.onset_strength.any() and silent.tempo_bpm == 0.0 and len(silent.beat_frames) == 0


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
    st.floats(0.01, 100.0),
)
@settings(max_examples=50, deadline=None)
def test_merged_statistics_are_those_of_everything_at_once(lengths: list[int], seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    parts = [random.normal(random.uniform(-90, 0), scale, (2, 3, length)) for length in lengths]
    merged = Statistics.merge([Statistics.of(part) for part in parts])
    whole = np.concatenate(parts, axis=2)
    np.testing.assert_allclose(merged.mean, whole.mean(axis=(0, 2)), rtol=1e-9)
    np.testing.assert_allclose(merged.deviation, whole.std(axis=(0, 2)), rtol=1e-6, atol=1e-9)
    assert merged.frames == 2 * sum(lengths)


def test_statistics_of_nothing_are_an_error() -> None:
    with pytest.raises(FeatureError, match="at least one recording"):
        Statistics.merge([])


def test_crop_channels_and_rate() -> None:
    rate = 44_100
    left, right = sine(440.0, 2.0, rate, 0.5), sine(440.0, 2.0, rate, 0.1)
    stereo = np.stack([left, right])
    mono = prepare(stereo, rate, Preparation(rate))
    np.testing.assert_allclose(mono, 0.5 * (left + right)[None], atol=1e-6)
    np.testing.assert_array_equal(prepare(left, rate, Preparation(rate, channels=2)), np.stack([left, left]))
    np.testing.assert_array_equal(prepare(stereo, rate, Preparation(rate, channels=2)), stereo)
    part = prepare(left, rate, Preparation(rate, start_seconds=0.5, seconds=0.25))
    np.testing.assert_array_equal(part[0], left[22_050:33_075])
    resampled = prepare(stereo, rate, Preparation(48_000, channels=2))
    assert resampled.shape == (2, 96_000)
    np.testing.assert_allclose(resampled[0, 4800:-4800], sine(440.0, 2.0, 48_000, 0.5)[4800:-4800], atol=1e-3)


def test_peak_and_loudness_by_hand() -> None:
    rate = 48_000
    tone = sine(997.0, 3.0, rate, 0.2)
    peak = prepare(tone, rate, Preparation(normalise="peak", peak_dbfs=-6.0))
    assert np.abs(peak).max() == pytest.approx(10 ** (-6 / 20), rel=1e-4)
    # BS.1770: a sine at 997 Hz and full scale has -3.01 LKFS in one channel, 0 in two.
    settings = Preparation(normalise="loudness", loudness_lufs=-23.0)
    assert np.abs(prepare(tone, rate, settings)).max() == pytest.approx(10 ** ((-23 + 3.01) / 20), rel=0.01)
    both = prepare(tone, rate, replace(settings, channels=2))
    assert np.abs(both).max() == pytest.approx(10 ** (-23 / 20), rel=0.01)
    # A click far above the rest holds the level down.
    tone[1000] = 1.0
    held = prepare(tone, rate, replace(settings, loudness_lufs=-3.0))
    assert np.abs(held).max() == pytest.approx(10 ** (-1 / 20), rel=1e-4)
    silence = np.zeros(rate, np.float32)
    assert not prepare(silence, rate, settings).any()
    with pytest.raises(FeatureError, match="use normalise = 'peak'"):
        prepare(tone[:10_000], rate, settings)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Preparation(sample_rate=0), "sample_rate: must be at least 8000"),
        (lambda: Preparation(channels=3), "channels: must be 1 or 2"),
        (lambda: Preparation(seconds=0.0), "seconds: must be above zero"),
        (lambda: Preparation(start_seconds=float("nan")), "start_seconds"),
        (lambda: Preparation(normalise="rms"), "normalise: must be none, peak or loudness"),  # pyright: ignore
        (lambda: Preparation(loudness_lufs=-80.0), "loudness_lufs"),
        (lambda: FeatureConfig(frames_per_second=0), "frames_per_second: must lie between 1 and"),
        (lambda: FeatureConfig(frames_per_second=float("inf")), "frames_per_second"),
        (lambda: FeatureConfig(window_samples=63), "window_samples: must be even"),
        (lambda: FeatureConfig(mfcc_count=81), "mfcc_count"),
        (lambda: FeatureConfig(highest_hz=30_000.0), "lowest_hz, highest_hz"),
        (lambda: prepare(np.ones(100, np.float32), 48_000, Preparation(start_seconds=1.0)), "crop less"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_the_field(make: Any, complaint: str) -> None:
    with pytest.raises(FeatureError, match=complaint):
        make()


def bar_music(rate: int, begins_seconds: float, bars: int) -> Audio:
    """A real note on every beat of 120 a minute, the first of each four louder, and two quiet ones before."""
    audio, own = clip("vibraphone_418hz")
    note = prepare(audio, own, Preparation(rate))[0]
    note = note[int(np.argmax(np.abs(note) > 0.1 * np.abs(note).max())) :][: rate // 3]
    out = np.zeros(round((begins_seconds + 2.0 * bars + 1.0) * rate), np.float32)
    for beat in range(-1, 4 * bars + 1):
        at = round((begins_seconds + 0.5 * beat) * rate)
        out[at : at + len(note)] += note * (1.0 if beat % 4 == 0 else 0.25)
    return out


@pytest.mark.parametrize(("rate", "begins"), [(44_100, 1.1), (48_000, 1.6)])
def test_bars_begin_where_the_accents_are(rate: int, begins: float) -> None:
    music = bar_music(rate, begins, 8)
    config = config_at(rate)
    features = describe(music, rate, config)
    assert features.tempo_bpm == pytest.approx(120.0, rel=0.03)
    seconds = bar_frames(features, 4) / 80.0
    assert len(seconds) >= 7
    off = (seconds - begins + 1.0) % 2.0 - 1.0
    assert np.abs(off).max() < 0.05
    bars = split_bars(music, rate, features, config)
    assert len(bars) == len(seconds) - 1
    assert all(abs(len(bar) / rate - 2.0) < 0.05 for bar in bars)
    start = round(float(seconds[0]) * rate)
    joined = np.concatenate(bars)
    np.testing.assert_array_equal(joined, music[start : start + len(joined)])


def test_what_has_too_few_beats_has_no_bars() -> None:
    audio, rate = clip()
    features = replace(describe(audio, rate, config_at(rate)), beat_frames=np.arange(0, 80, 20))
    assert len(bar_frames(features, 4)) == 0
    assert bar_frames(features, 2).size in (0, 2)
    assert split_bars(audio, rate, features, config_at(rate)) == []


@pytest.mark.parametrize("samples", [1, 300, 700])
def test_the_shortest_sounds_have_features_too(samples: int) -> None:
    features = describe(np.full(samples, 0.5, np.float32), 48_000, FeatureConfig())
    assert features.mel.shape == (1, 80, samples // 600 + 1)
    assert np.isfinite(features.mel).all() and np.isfinite(features.mfcc).all()


@pytest.fixture
def music() -> tuple[Audio, int]:
    audio, rate = clip()
    return audio[: rate // 2], rate


def test_the_cache_computes_once_and_tells_everything_apart(
    tmp_path: Path, music: tuple[Audio, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    audio, rate = music
    cache = FeatureCache(tmp_path)
    config = FeatureConfig()
    first = cache.of_audio(audio, rate, config)
    assert same(first, describe(audio, rate, config))
    changed = [
        replace(config, frames_per_second=50),
        replace(config, mel_bands=64),
        replace(config, tuning_semitones=0.5),
        replace(config, preparation=replace(config.preparation, normalise="peak")),
    ]
    paths = [cache.path("a", rate, 1, each) for each in (config, *changed)]
    paths += [cache.path("b", rate, 1, config), cache.path("a", 48_000, 1, config), cache.path("a", rate, 2, config)]
    assert len(set(paths)) == len(paths)
    assert cache.path("a", rate, 1, replace(config, frames_per_second=80.0)) == paths[0]
    monkeypatch.setattr(training.features, "FEATURES_VERSION", 10**6)
    assert cache.path("a", rate, 1, config) not in paths
    monkeypatch.undo()

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(training.features, "describe", refuse)
    assert same(cache.of_audio(audio, rate, config), first)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_recording_of_the_library_needs_no_second_decoding(tmp_path: Path) -> None:
    (tmp_path / "sax").mkdir()
    audio, rate = clip()
    soundfile.write(tmp_path / "sax" / "a.wav", audio, rate)
    entry = StyleEntry("sax", "sax", "sax", 0, "CC0-1.0", "")
    library = load_library([entry], tmp_path, DataConfig(), 48_000, tmp_path / "cache")
    recording = library.styles[0].train[0]
    cache = FeatureCache(tmp_path / "features")
    first = cache.of_recording(recording, FeatureConfig())
    recording.cache_path.unlink()
    _mapped.cache_clear()
    assert same(cache.of_recording(recording, FeatureConfig()), first)


def test_a_damaged_file_is_made_anew(tmp_path: Path, music: tuple[Audio, int]) -> None:
    audio, rate = music
    cache = FeatureCache(tmp_path)
    config = FeatureConfig(mel_bands=20)
    first = cache.of_audio(audio, rate, config)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    flipped = [bytes([*whole[:at], whole[at] ^ 255, *whole[at + 1 :]]) for at in random.integers(0, len(whole), 6)]
    for damaged in (b"", b"not an archive", whole[:100], whole[: len(whole) // 2], whole[:-1], *flipped):
        path.write_bytes(damaged)
        assert same(cache.of_audio(audio, rate, config), first)
        assert same(cache.of_audio(audio, rate, config), first)
    other = cache.of_audio(audio, rate, FeatureConfig(mel_bands=21))
    (path_of_other,) = set(tmp_path.iterdir()) - {path}
    path.write_bytes(path_of_other.read_bytes())  # whole, but of other settings
    assert other.mel.shape[1] == 21 and cache.of_audio(audio, rate, config).mel.shape[1] == 20


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, music: tuple[Audio, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    audio, rate = music

    def fail(file: Any, **_: object) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("training.features.np.savez", fail)
    with pytest.raises(OSError, match="No space left"):
        FeatureCache(tmp_path).of_audio(audio, rate, FeatureConfig())
    assert list(tmp_path.iterdir()) == []


def test_channels_are_described_each_on_its_own() -> None:
    audio, rate = clip()
    other, _ = clip("alto_sax_e4")
    length = min(len(audio), len(other))
    stereo = np.stack([audio[:length], other[:length]])
    config = FeatureConfig(preparation=Preparation(rate, channels=2))
    both = describe(stereo, rate, config)
    for channel, expected in itertools.product((0, 1), ("mfcc", "chroma")):
        alone = describe(stereo[channel], rate, config_at(rate))
        np.testing.assert_allclose(getattr(both, expected)[channel], getattr(alone, expected)[0], atol=1e-3)


# -- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["features", *(str(argument) for argument in arguments)])


def test_the_command_standardises_a_folder_by_the_statistics_of_all_of_it(tmp_path: Path) -> None:
    recordings, out = tmp_path / "recordings", tmp_path / "out"
    (recordings / "sax").mkdir(parents=True)
    shutil.copy(CLIPS / "alto_sax_a3.flac", recordings / "sax")
    audio, rate = bar_music(48_000, 1.6, 6), 48_000
    soundfile.write(recordings / "music.wav", audio, rate, subtype="FLOAT")
    (recordings / "broken.wav").write_bytes(b"RIFF and no more")
    options = ["--frames-per-second", "59.94", "--bars", "--cache", tmp_path / "cache"]
    result = command(recordings, out, *options, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    files = [np.load(out / name) for name in ("music.wav.npz", "sax/alto_sax_a3.flac.npz")]
    together = np.concatenate([file["mel"][0] for file in files], axis=1)
    moving = files[0]["mel_deviation"] > 1e-3
    assert together.shape[1] == said["frames"]
    np.testing.assert_allclose(together[moving].mean(axis=1), 0.0, atol=1e-3)
    np.testing.assert_allclose(together[moving].std(axis=1), 1.0, atol=1e-3)
    statistics = np.load(out / "statistics.npz")
    np.testing.assert_array_equal(statistics["mel_mean"], files[1]["mel_mean"])
    assert statistics["frames_per_second"].tolist() == [2997, 50]
    assert len(said["remarks"]) == 1 and "broken.wav" in said["remarks"][0]
    pieces = [soundfile.read(path)[0] for path in sorted((out / "music.wav.bars").iterdir())]
    assert len(pieces) == said["files"][0]["bars"] > 1
    assert all(abs(len(piece) / rate - 2.0) < 0.05 for piece in pieces)
    joined = np.concatenate(pieces).astype(np.float32)
    assert joined.tobytes() in audio.tobytes()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "nowhere: there is no such file or folder"),
        (["empty"], "empty: holds no recordings"),
        (["clip.flac", "--mfcc", "90"], "mfcc_count: must lie between 1 and mel_bands"),
        (["clip.flac", "--seconds", "0"], "seconds: must be above zero"),
        (["clip.flac", "--start-seconds", "60"], "start_seconds: 60 s lie behind the end of a recording of 2 s"),
        (["clip.flac", "--frames-per-second", "1/0"], "is no number"),
        (["clip.flac", "--normalise", "loud"], "must be none, peak, loudness"),
    ],
)
def test_the_command_names_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copy(CLIPS / "alto_sax_a3.flac", tmp_path / "clip.flac")
    result = command(arguments[0], "out", *arguments[1:])
    assert result.exit_code in (1, 2) and text in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_bars_of_an_earlier_run_are_gone_and_no_output_is_an_input(tmp_path: Path) -> None:
    (tmp_path / "recordings").mkdir()
    soundfile.write(tmp_path / "recordings" / "music.wav", bar_music(48_000, 1.6, 6), 48_000)
    out, cache = tmp_path / "out", ["--cache", tmp_path / "cache", "--json"]
    assert command(tmp_path / "recordings", out, "--bars", "--beats-per-bar", "2", *cache).exit_code == 0
    fewer = command(tmp_path / "recordings", out, "--bars", *cache)
    assert len(list((out / "music.wav.bars").iterdir())) == json.loads(fewer.stdout)["files"][0]["bars"]
    inside = command(tmp_path, out, "--bars", *cache)
    assert inside.exit_code == 1 and "choose a folder elsewhere" in " ".join(inside.output.split())
    file = command(tmp_path / "recordings", tmp_path / "recordings" / "music.wav", *cache)
    assert file.exit_code == 1 and "is a file; name a folder" in " ".join(file.output.split())
