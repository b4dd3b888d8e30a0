"""Recordings to styles: decoding, cache, splits, what is left out, and what is drawn."""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

from training.library import (  # noqa: E402
    ExcerptSampler,
    Library,
    LibraryError,
    Recording,
    load_library,
    read_mono,
    split_recordings,
    split_sizes,
)
from training.recipe import DataConfig, StyleEntry  # noqa: E402

CLIPS = Path(__file__).parent / "data"
RATE = 48_000


def entry(name: str) -> StyleEntry:
    return StyleEntry(name, name, name, 0, "CC0-1.0", "")


def clip(name: str = "alto_sax_a3") -> tuple[NDArray[np.float32], int]:
    audio, rate = soundfile.read(CLIPS / f"{name}.flac")
    return np.asarray(audio, dtype=np.float32), rate


def pitch_hz(audio: NDArray[np.float32], rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio)), 1 << 19))
    return float(np.argmax(spectrum) * rate / (1 << 19))


def load(folder: Path, *names: str, config: DataConfig | None = None) -> Library:
    return load_library([entry(name) for name in names], folder, config or DataConfig(), RATE, folder / "cache")


def many_notes(folder: Path, count: int) -> None:
    """``count`` different recordings: pieces of a real note."""
    folder.mkdir(parents=True)
    audio, rate = clip()
    for number in range(count):
        soundfile.write(folder / f"note{number:02}.wav", audio[number * 100 : number * 100 + rate], rate)


def fake(sha256: str) -> Recording:
    return Recording(Path(sha256), sha256, sha256, sha256, Path(sha256), RATE, RATE)


@given(st.integers(0, 2000))
def test_split_sizes_add_up_and_from_three_on_none_is_empty(count: int) -> None:
    sizes = split_sizes(count)
    assert sum(sizes) == count
    assert min(sizes) >= (1 if count >= 3 else 0)
    assert sizes[0] >= sizes[1] >= sizes[2]


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(0, (0, 0, 0)), (1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (9, (7, 1, 1)), (10, (8, 1, 1)), (75, (59, 8, 8))],
)
def test_split_sizes_are_eight_to_one_to_one(count: int, sizes: tuple[int, int, int]) -> None:
    assert split_sizes(count) == sizes


@given(st.sets(st.integers(0, 10**6), max_size=40), st.integers(0, 5), st.randoms(use_true_random=False))
def test_splits_share_nothing_and_depend_on_content_alone(ids: set[int], seed: int, order: random.Random) -> None:
    recordings = [fake(hashlib.sha256(str(i).encode()).hexdigest()) for i in ids]
    splits = split_recordings(recordings, seed)
    named = [recording.sha256 for split in splits for recording in split]
    assert sorted(named) == sorted(recording.sha256 for recording in recordings)
    assert tuple(len(split) for split in splits) == split_sizes(len(recordings))
    shuffled = list(recordings)
    order.shuffle(shuffled)
    assert split_recordings(shuffled, seed) == splits


def test_another_seed_is_another_split() -> None:
    recordings = [fake(hashlib.sha256(str(i).encode()).hexdigest()) for i in range(40)]
    assert split_recordings(recordings, 0)[1] != split_recordings(recordings, 1)[1]


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
@pytest.mark.parametrize("rate", [22_050, 44_100, 48_000, 96_000])
def test_any_format_and_rate_keeps_length_and_pitch(tmp_path: Path, suffix: str, rate: int) -> None:
    if suffix == "mp3" and rate > 48_000:
        pytest.skip("MP3 ends at 48 kHz")
    import soxr

    audio, own = clip()
    audio = np.asarray(soxr.resample(audio, own, rate)).clip(-1, 1)
    stereo = np.stack([audio, 0.5 * audio], axis=1)
    path = tmp_path / f"note.{suffix}"
    soundfile.write(path, stereo, rate)
    mono = read_mono(path, RATE)
    assert mono.dtype == np.float32
    assert mono.ndim == 1
    assert abs(len(mono) - 2 * RATE) <= (2400 if suffix == "mp3" else 2)  # MP3 pads to its frames
    assert abs(pitch_hz(mono, RATE) - 440.0) < 0.5
    # Mean of a signal and half of it: three quarters.
    assert np.sqrt(np.mean(mono**2)) == pytest.approx(0.75 * np.sqrt(np.mean(audio**2)), rel=0.02)


def test_unreadable_files_are_named_skipped_and_counted(tmp_path: Path) -> None:
    audio, rate = clip()
    style = tmp_path / "sax"
    many_notes(style, 3)
    (style / "text.wav").write_text("this is no sound")
    (style / "empty.flac").write_bytes(b"")
    soundfile.write(style / "nothing.wav", np.zeros(0, np.float32), rate)
    soundfile.write(style / "short.wav", audio[:1000], rate)
    soundfile.write(style / "silent.wav", np.zeros(rate, np.float32), rate)
    broken = audio.copy()
    broken[500] = np.nan
    soundfile.write(style / "nan.wav", broken, rate, subtype="FLOAT")
    whole = (CLIPS / "alto_sax_e4.flac").read_bytes()
    (style / "cut.flac").write_bytes(whole[:300])
    (style / "notes.txt").write_text("not a recording, not mentioned")

    library = load(tmp_path, "sax")
    reasons = {item.path.name: item.reason for item in library.skipped}
    expected = {"text.wav", "empty.flac", "nothing.wav", "short.wav", "silent.wav", "nan.wav", "cut.flac"}
    assert set(reasons) == expected
    assert "is too short (0.023 s, at least 0.2 s are needed)" in reasons["short.wav"]
    assert "is silent" in reasons["silent.wav"]
    assert "NaN" in reasons["nan.wav"]
    assert "is empty" in reasons["nothing.wav"]
    assert all("cannot be decoded" in reasons[name] for name in ("text.wav", "empty.flac", "cut.flac"))
    style_recordings = library.styles[0]
    assert [len(style_recordings.split(name)) for name in ("train", "validation", "test")] == [1, 1, 1]


def test_copies_count_once_whatever_their_name_or_format(tmp_path: Path) -> None:
    many_notes(tmp_path / "sax", 4)
    original = tmp_path / "sax" / "note00.wav"
    shutil.copy(original, tmp_path / "sax" / "zz_copy.wav")
    audio, rate = soundfile.read(original, dtype="int16")
    soundfile.write(tmp_path / "sax" / "zz_as_flac.flac", audio, rate)
    # The same recording under another style would sit in that style's own split.
    (tmp_path / "horn").mkdir()
    shutil.copy(original, tmp_path / "horn" / "other_name.wav")
    shutil.copy(CLIPS / "alto_sax_e4.flac", tmp_path / "horn" / "own.flac")

    library = load(tmp_path, "sax", "horn")
    copies = {item.path.name: item.reason for item in library.skipped}
    assert set(copies) == {"zz_copy.wav", "zz_as_flac.flac", "other_name.wav"}
    assert all(reason == f"is a copy of {original}" for reason in copies.values())
    everything = [r.audio_sha256 for s in library.styles for n in ("train", "validation", "test") for r in s.split(n)]
    assert len(everything) == len(set(everything)) == 5


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    many_notes(tmp_path / "sax", 12)
    described = load(tmp_path, "sax").describe()["sax"]
    assert [len(described[name]) for name in ("train", "validation", "test")] == [10, 1, 1]
    for item in (item for split in described.values() for item in split):
        content = (tmp_path / "sax" / item["name"]).read_bytes()
        assert item["sha256"] == hashlib.sha256(content).hexdigest()
        assert item["seconds"] == 1.0


def test_the_second_run_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many_notes(tmp_path / "sax", 3)
    first = load(tmp_path, "sax")

    def refuse(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("training.library.read_mono", refuse)
    assert load(tmp_path, "sax") == first


def test_a_changed_file_or_a_damaged_cache_is_decoded_again(tmp_path: Path) -> None:
    many_notes(tmp_path / "sax", 3)
    before = load(tmp_path, "sax").styles[0]
    recording = before.train[0]
    recording.cache_path.write_bytes(recording.cache_path.read_bytes()[:500])
    (tmp_path / "cache" / f"index-{RATE}.json").write_text((tmp_path / "cache" / f"index-{RATE}.json").read_text())
    assert load(tmp_path, "sax").styles[0] == before
    assert len(np.load(recording.cache_path)) == recording.samples == RATE
    (tmp_path / "cache" / f"index-{RATE}.json").write_text("{ not json")
    assert load(tmp_path, "sax").styles[0] == before
    audio, rate = clip("alto_sax_e4")
    soundfile.write(recording.path, audio, rate)
    after = load(tmp_path, "sax").styles[0]
    assert after != before


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_recordings_warn(tmp_path: Path, count: int) -> None:
    many_notes(tmp_path / "sax", count)
    library = load(tmp_path, "sax")
    assert tuple(len(library.styles[0].split(name)) for name in ("train", "validation", "test")) == split_sizes(count)
    assert len(library.warnings) == (1 if count < 3 else 0)
    assert all(f"only {count} usable" in warning for warning in library.warnings)


def test_missing_empty_and_useless_folders_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match=r"style 'sax': there is no folder .*sax; create it, or point --data"):
        load(tmp_path, "sax")
    (tmp_path / "sax").mkdir()
    with pytest.raises(LibraryError, match=r"style 'sax': no recordings in .*sax; put files there"):
        load(tmp_path, "sax")
    (tmp_path / "sax" / "text.wav").write_text("no sound")
    with pytest.raises(LibraryError, match=r"none of the recordings in .*sax can be used \(text\.wav cannot be dec"):
        load(tmp_path, "sax")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), samples=st.integers(1, 3 * RATE))
def test_excerpts_have_their_length_hold_sound_and_repeat(sampler: ExcerptSampler, seed: int, samples: int) -> None:
    excerpt = sampler.draw(samples, np.random.default_rng(seed))
    assert excerpt.shape == (samples,)
    assert excerpt.dtype == np.float32
    assert np.isfinite(excerpt).all()
    assert np.abs(excerpt).max() <= 1.5
    if samples > RATE // 2:
        assert 10 * np.log10(np.mean(excerpt**2)) > -50.0
    assert np.array_equal(excerpt, sampler.draw(samples, np.random.default_rng(seed)))


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> ExcerptSampler:
    folder = tmp_path_factory.mktemp("sampler")
    (folder / "mixed").mkdir()
    for path in CLIPS.glob("*.flac"):
        shutil.copy(path, folder / "mixed")
    audio, rate = clip()
    # Mostly silence: drawing must find the sound.
    sparse = np.concatenate([np.zeros(12 * rate, np.float32), audio])
    soundfile.write(folder / "mixed" / "sparse.wav", sparse, rate)
    style = load(folder, "mixed").styles[0]
    return ExcerptSampler([*style.train, *style.validation, *style.test], DataConfig())


def test_an_excerpt_joins_several_notes(sampler: ExcerptSampler) -> None:
    excerpt = sampler.draw(20 * RATE, np.random.default_rng(1))
    pitches = [pitch_hz(part, RATE) for part in excerpt.reshape(40, -1) if np.sqrt(np.mean(part**2)) > 0.01]
    found = {round(p) for p in pitches}
    assert {440, 660, 418} & found >= {440, 418}
