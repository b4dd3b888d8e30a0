"""Recordings to styles: decoding, cache, splits, what is left out, and what is drawn."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import example, given, settings
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


def everything(library: Library) -> list[Recording]:
    splits = ("train", "validation", "test")
    return [recording for style in library.styles for split in splits for recording in style.split(split)]


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


FORMATS_AND_RATES = [
    (suffix, rate)
    for suffix in ("wav", "flac", "ogg", "mp3", "aiff")
    for rate in (22_050, 44_100, 48_000, 96_000)
    if suffix != "mp3" or rate <= 48_000  # where MP3 ends
]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("suffix", "rate"), FORMATS_AND_RATES)
def test_any_format_and_rate_keeps_length_pitch_and_level(
    tmp_path: Path, suffix: str, rate: int, channels: int
) -> None:
    audio, own = clip()
    audio = np.asarray(soxr.resample(audio, own, rate)).clip(-1, 1)
    path = tmp_path / f"note.{suffix}"
    soundfile.write(path, audio if channels == 1 else np.stack([audio, 0.5 * audio], axis=1), rate)
    mono = read_mono(path, RATE)
    assert mono.dtype == np.float32
    assert mono.ndim == 1
    assert abs(len(mono) - 2 * RATE) <= (2400 if suffix == "mp3" else 1)  # MP3 pads to its frames
    assert abs(pitch_hz(mono, RATE) - 440.0) < 0.5
    # Mean of a signal and half of it: three quarters.
    share = 1.0 if channels == 1 else 0.75
    assert np.sqrt(np.mean(mono**2)) == pytest.approx(share * np.sqrt(np.mean(audio**2)), rel=0.02)


def test_what_needs_no_conversion_is_the_file_sample_by_sample(tmp_path: Path) -> None:
    audio = np.random.default_rng(0).uniform(-1, 1, RATE).astype(np.float32)
    soundfile.write(tmp_path / "float.wav", audio, RATE, subtype="FLOAT")
    assert np.array_equal(read_mono(tmp_path / "float.wav", RATE), audio)
    soundfile.write(tmp_path / "six.wav", np.stack([audio] * 6, axis=1), RATE, subtype="FLOAT")
    assert np.allclose(read_mono(tmp_path / "six.wav", RATE), audio, atol=1e-6)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "aiff"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_file_cut_short_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    audio, rate = clip()
    path = tmp_path / f"note.{suffix}"
    soundfile.write(path, audio, rate)
    whole = path.read_bytes()
    path.write_bytes(whole[: round(share * len(whole))])
    with pytest.raises(ValueError, match=r"is cut short: its end is missing|cannot be decoded"):
        read_mono(path, RATE)


@pytest.mark.parametrize("claimed", [0x7FFF_F000, 0xFFFF_FFFF])
def test_a_wav_that_was_written_to_a_pipe_is_whole(tmp_path: Path, claimed: int) -> None:
    audio, rate = clip()
    path = tmp_path / "streamed.wav"
    soundfile.write(path, audio, rate)
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = claimed.to_bytes(4, "little")  # what sox and ffmpeg write when they cannot go back
    path.write_bytes(content)
    assert len(read_mono(path, rate)) == len(audio)


def test_damage_that_leaves_no_sound_to_trust_is_named(tmp_path: Path) -> None:
    audio, rate = clip()
    for value, complaint in ((np.inf, "NaN or infinity"), (3e38, r"far above full scale \(peak 3e\+38")):
        broken = audio.copy()
        broken[1000] = value
        soundfile.write(tmp_path / "broken.wav", broken, rate, subtype="FLOAT")
        with pytest.raises(ValueError, match=complaint):
            read_mono(tmp_path / "broken.wav", RATE)
    # Integers written as floats; a take a little over full scale is no mistake.
    soundfile.write(tmp_path / "integers.wav", 32_768 * audio, rate, subtype="FLOAT")
    with pytest.raises(ValueError, match="scale it down"):
        read_mono(tmp_path / "integers.wav", RATE)
    soundfile.write(tmp_path / "hot.wav", 4 * audio, rate, subtype="FLOAT")
    assert np.abs(read_mono(tmp_path / "hot.wav", rate)).max() == pytest.approx(4 * np.abs(audio).max())


def test_hidden_files_and_folders_are_passed_over_and_capitals_are_not(tmp_path: Path) -> None:
    many_notes(tmp_path / "sax", 4)
    (tmp_path / "sax" / ".trash").mkdir()
    (tmp_path / "sax" / "Session 1" / "é").mkdir(parents=True)
    (tmp_path / "sax" / "folder.wav").mkdir()
    for number, name in enumerate((".trash/note.wav", "._note.wav", "Session 1/é/NOTE.WAV", "plain.wav")):
        (tmp_path / "sax" / f"note0{number}.wav").rename(tmp_path / "sax" / name)
    library = load(tmp_path, "sax")
    assert {r.name for r in everything(library)} == {"Session 1/é/NOTE.WAV", "plain.wav"}
    assert library.skipped == ()


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
    (style / "half.flac").write_bytes(whole[: len(whole) // 2])
    (style / "half.wav").write_bytes((style / "note00.wav").read_bytes()[:50_000])
    (style / "notes.txt").write_text("not a recording, not mentioned")

    library = load(tmp_path, "sax")
    reasons = {item.path.name: item.reason for item in library.skipped}
    expected = {"text.wav", "empty.flac", "nothing.wav", "short.wav", "silent.wav", "nan.wav", "cut.flac"}
    expected |= {"half.flac", "half.wav"}
    assert set(reasons) == expected
    assert "is too short (0.023 s, at least 0.2 s are needed)" in reasons["short.wav"]
    assert "is silent" in reasons["silent.wav"]
    assert "NaN" in reasons["nan.wav"]
    assert "is empty" in reasons["nothing.wav"]
    assert all("cannot be decoded" in reasons[name] for name in ("text.wav", "empty.flac", "cut.flac", "half.flac"))
    assert "is cut short" in reasons["half.wav"]
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
    hashes = [recording.audio_sha256 for recording in everything(library)]
    assert len(hashes) == len(set(hashes)) == 5


def test_copies_decoded_at_the_same_moment_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many_notes(tmp_path / "sax", 3)
    for number in range(12):
        shutil.copy(tmp_path / "sax" / "note00.wav", tmp_path / "sax" / f"zz_copy{number}.wav")
    save = np.save

    def slowly(*arguments: Any) -> None:
        save(*arguments)
        time.sleep(0.02)

    monkeypatch.setattr("training.library.np.save", slowly)
    library = load(tmp_path, "sax")
    assert len(library.skipped) == 12
    assert sorted(r.name for r in everything(library)) == ["note00.wav", "note01.wav", "note02.wav"]
    assert all(np.array_equal(np.load(r.cache_path), read_mono(r.path, RATE)) for r in everything(library))
    left = {path.name for path in (tmp_path / "cache").iterdir()} - {r.cache_path.name for r in everything(library)}
    assert left == {f"index-{RATE}.json"}  # nothing half written


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

    monkeypatch.setattr("training.library.read_recording", refuse)
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


INDEXES: list[tuple[str, Any]] = [
    ("a list", []),
    ("no files", {"version": 1}),
    ("files of nothing", {"version": 1, "files": None}),
    ("a list of files", {"version": 1, "files": ["x"]}),
    ("another version", {"version": 0, "files": {}}),
]
ENTRIES: list[tuple[str, Any]] = [
    ("too short", [1]),
    ("no list", {}),
    ("wrong types", ["x", "y", "z", None]),
    ("a path", ["../../x", "y", 3, 0.0]),
    ("nothing", None),
]


def wrong_entries(entry: object) -> Callable[[dict[str, Any]], object]:
    return lambda good: {**good, "files": dict.fromkeys(good["files"], entry)}


@pytest.mark.parametrize(
    "damage",
    [lambda _, index=index: index for _, index in INDEXES] + [wrong_entries(entry) for _, entry in ENTRIES],
    ids=[f"index: {name}" for name, _ in INDEXES] + [f"entries: {name}" for name, _ in ENTRIES],
)
def test_an_index_that_makes_no_sense_is_decoded_and_written_again(
    tmp_path: Path, damage: Callable[[dict[str, Any]], object]
) -> None:
    many_notes(tmp_path / "sax", 3)
    before = load(tmp_path, "sax")
    path = tmp_path / "cache" / f"index-{RATE}.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(damage(good)))
    assert load(tmp_path, "sax") == before
    assert json.loads(path.read_text()) == good


@pytest.mark.parametrize("kept", [0, 60, -1, "zeros"])
def test_a_cached_recording_that_is_not_whole_is_decoded_again(tmp_path: Path, kept: int | str) -> None:
    many_notes(tmp_path / "sax", 3)
    recording = load(tmp_path, "sax").styles[0].train[0]
    whole = recording.cache_path.read_bytes()
    # A new name, as a later process would see it: this one may still have the old file mapped.
    recording.cache_path.unlink()
    recording.cache_path.write_bytes(bytes(len(whole)) if isinstance(kept, str) else whole[:kept])
    again = load(tmp_path, "sax").styles[0].train[0]
    assert again == recording
    assert again.cache_path.read_bytes() == whole


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
    for number in range(4):
        soundfile.write(tmp_path / "sax" / f"silent{number}.wav", np.zeros(RATE), RATE)
    with pytest.raises(LibraryError, match=r"\(silent0\.wav is silent .*; \.\.\.\); replace them"):
        load(tmp_path, "sax")
    for number in range(4):
        (tmp_path / "sax" / f"silent{number}.wav").unlink()
    with pytest.raises(LibraryError, match=r"none of the recordings in .*sax can be used \(text\.wav cannot be dec"):
        load(tmp_path, "sax")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), samples=st.integers(1, 3 * RATE))
@example(seed=57, samples=24_001)
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


@pytest.mark.parametrize("seed", range(8))
def test_the_sound_in_a_long_silence_is_found(tmp_path: Path, seed: int) -> None:
    audio, rate = clip()
    (tmp_path / "sax").mkdir()
    silence = np.zeros(60 * rate, np.float32)
    soundfile.write(tmp_path / "sax" / "sparse.flac", np.concatenate([silence, audio[: rate // 2], silence]), rate)
    sparse = ExcerptSampler(load(tmp_path, "sax").styles[0].train, DataConfig())
    excerpt = sparse.draw(2 * RATE, np.random.default_rng(seed))
    assert np.sqrt(np.mean(excerpt**2)) > 10 ** (-50 / 20)
    assert np.array_equal(excerpt, sparse.draw(2 * RATE, np.random.default_rng(seed)))


def test_an_onset_keeps_its_attack_and_a_cut_gets_a_soft_edge(tmp_path: Path) -> None:
    (tmp_path / "tone").mkdir()
    soundfile.write(tmp_path / "tone" / "tone.wav", np.full(RATE // 2, 0.5), RATE, subtype="FLOAT")
    config = DataConfig(piece_seconds=(1.0, 1.0), gap_chance=1.0, gap_seconds=(0.1, 0.1))
    sampler = ExcerptSampler(load(tmp_path, "tone").styles[0].train, config)
    excerpt = sampler.draw(RATE, np.random.default_rng(0))
    fade = round(config.fade_seconds * RATE)
    assert (excerpt[: RATE // 2 - fade] == 0.5).all()  # from the very first sample
    falling = excerpt[RATE // 2 - fade : RATE // 2]
    assert (np.diff(falling) < 0).all()
    assert falling[-1] < 0.01
    assert not excerpt[RATE // 2 : RATE * 6 // 10].any()  # the gap
    assert (excerpt[RATE * 6 // 10 : RATE - 1] == 0.5).all()  # and again from its onset
