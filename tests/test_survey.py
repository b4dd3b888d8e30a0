"""What ``restyle data`` says of folders of recordings: every fault found, copies of any kind, figures, errors."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from training.cli import data  # noqa: E402
from training.library import clipped_runs  # noqa: E402
from training.survey import (  # noqa: E402
    BAND_CENTRES_HZ,
    Survey,
    SurveyedRecording,
    SurveyError,
    band_levels_db,
    correlation,
    survey_folder,
)

CLIPS = Path(__file__).parent / "data"
RATE = 48_000
app = typer.Typer()
app.command()(data)


def clip(name: str = "alto_sax_a3") -> tuple[NDArray[np.float32], int]:
    audio, rate = soundfile.read(CLIPS / f"{name}.flac")
    return np.asarray(audio, dtype=np.float32), rate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three styles, one of them empty, with one of everything that can be wrong."""
    top = tmp_path_factory.mktemp("survey") / "my [styles]"
    for name in ("sax", "vibraphone", "empty", ".hidden"):
        (top / name).mkdir(parents=True)
    for name in ("alto_sax_a3", "alto_sax_e4"):
        shutil.copy(CLIPS / f"{name}.flac", top / "sax")
    shutil.copy(CLIPS / "vibraphone_418hz.flac", top / "vibraphone")
    shutil.copy(CLIPS / "vibraphone_418hz.flac", top / ".hidden")
    audio, rate = clip()
    integers, _ = soundfile.read(CLIPS / "alto_sax_a3.flac", dtype="int16")
    soundfile.write(top / "sax" / "b_same.wav", integers, rate)
    soundfile.write(top / "vibraphone" / "sax.wav", integers, rate)
    soundfile.write(top / "vibraphone" / "sax.mp3", audio, rate)
    loud = np.stack([np.clip(20 * audio, -1, 1)] * 2, axis=1)
    soundfile.write(top / "sax" / "loud.wav", loud, rate)
    soundfile.write(top / "sax" / "quiet.wav", 0.001 * audio, rate, subtype="PCM_24")
    soundfile.write(top / "sax" / "short.wav", audio[:1000], rate)
    (top / "sax" / "text.wav").write_text("no sound")
    (top / "sax" / "cut.wav").write_bytes((top / "sax" / "b_same.wav").read_bytes()[:50_000])
    (top / "sax" / "notes.txt").write_text("not a recording")
    (top / "midi").mkdir()
    (top / "midi" / "tune.mid").write_bytes(b"no style at all")
    return top


@pytest.fixture(scope="module")
def survey(folder: Path) -> Survey:
    return survey_folder(folder, folder.parent / "cache", RATE)


def found(survey: Survey, name: str) -> SurveyedRecording:
    (one,) = (item for style in survey.styles for item in style.recordings if item.name == name)
    return one


def test_every_fault_is_found_and_named(survey: Survey) -> None:
    assert [style.name for style in survey.styles] == ["empty", "sax", "vibraphone"]
    kinds = {item.name: item.fault.kind for style in survey.styles for item in style.recordings if item.fault}
    assert kinds == {
        "sax/b_same.wav": "copy",
        "vibraphone/sax.wav": "copy",
        "sax/quiet.wav": "silent",
        "sax/short.wav": "short",
        "sax/text.wav": "damaged",
        "sax/cut.wav": "damaged",
    }
    assert found(survey, "vibraphone/sax.wav").remarks() == [f"is a copy of {Path('sax/alto_sax_a3.flac')}"]
    assert "is cut short" in found(survey, "sax/cut.wav").remarks()[0]
    assert [item.name for style in survey.styles for item in style.recordings if item.clipped] == ["sax/loud.wav"]


def test_a_lossy_copy_in_another_style_is_found_and_other_notes_are_not_taken_for_copies(survey: Survey) -> None:
    near = {item.name: item.near_copy for style in survey.styles for item in style.recordings if item.near_copy}
    assert near == {"vibraphone/sax.mp3": "sax/alto_sax_a3.flac"}
    assert found(survey, "vibraphone/sax.mp3").fault is None  # training cannot know it, so it is said here


def test_figures_are_those_of_the_files(survey: Survey) -> None:
    values = json.loads(json.dumps(survey.as_dict(), allow_nan=False))
    sax = values["styles"]["sax"]
    assert sax["recordings"] == 8 and sax["usable"] == 3
    assert sax["minutes"] == pytest.approx(3 * 2.0 / 60, abs=0.001)
    assert sax["sample_rates"] == {"44100": 6} and sax["channels"] == {"1": 5, "2": 1}
    assert sax["formats"] == {"FLAC PCM_16": 2, "WAV PCM_16": 3, "WAV PCM_24": 1}
    assert (sax["clipped"], sax["damaged"], sax["silent"], sax["short"], sax["copies"]) == (1, 2, 1, 1, 1)
    loudness = sax["loudness_lufs"]
    assert -50 < loudness["quietest"] <= loudness["median"] <= loudness["loudest"] < 5
    assert values["styles"]["empty"]["loudness_lufs"] == {"quietest": None, "median": None, "loudest": None}
    assert values["recordings"] == 11 and values["usable"] == 5
    assert values["warnings"][0] == "style 'empty': holds no recordings; fill or remove it"


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, -1.0]), min_size=9, max_size=9), min_size=1, max_size=3))
@settings(deadline=None)
def test_clipped_runs_are_three_or_more_in_a_row(channels: list[list[float]]) -> None:
    audio = np.array(channels, dtype=np.float32).T
    expected = sum(
        full and len(list(run)) >= 3
        for channel in channels
        for full, run in itertools.groupby(channel, lambda value: abs(value) >= 1.0)
    )
    assert clipped_runs(audio, 1.0) == expected


def test_clipped_runs_are_counted_in_every_channel() -> None:
    assert clipped_runs(np.array([[1, 0], [1, 1], [1, 1], [0, 1]], np.float32), 1.0) == 2


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_U8", "FLOAT"])
def test_full_scale_is_that_of_the_format(tmp_path: Path, subtype: str) -> None:
    audio, rate = clip()
    (tmp_path / "a").mkdir()
    soundfile.write(tmp_path / "a" / "hot.wav", np.clip(20 * audio, -1, 1), rate, subtype=subtype)
    soundfile.write(tmp_path / "a" / "whole.wav", 0.9 * audio / np.abs(audio).max(), rate, subtype=subtype)
    style = survey_folder(tmp_path, tmp_path / "cache", RATE).styles[0]
    assert {item.name: item.clipped for item in style.recordings} == {"a/hot.wav": True, "a/whole.wav": False}


def test_bands_of_a_sine_by_hand() -> None:
    sine = (0.1 * np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)).astype(np.float32)
    levels = band_levels_db(sine, RATE)
    assert BAND_CENTRES_HZ[levels.argmax()] == pytest.approx(1000.0)
    assert levels.max() == pytest.approx(0.0, abs=0.1)
    assert np.sort(levels)[-4] < -40
    noise = np.random.default_rng(0).normal(0, 0.1, 8 * RATE).astype(np.float32)
    # White: each band has a width of 23 % of its centre, of 24 kHz in all.
    np.testing.assert_allclose(band_levels_db(noise, RATE), 10 * np.log10(0.2316 * BAND_CENTRES_HZ / 24_000), atol=0.5)


@given(st.integers(0, 300), st.sampled_from([0.1, -1.0, 3.0]))
@settings(max_examples=30, deadline=None)
def test_correlation_knows_a_sound_whatever_its_delay_level_and_polarity(delay: int, gain: float) -> None:
    noise = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    later = np.concatenate([np.zeros(delay, np.float32), gain * noise]).astype(np.float32)
    assert correlation(noise, later) == pytest.approx(1.0, abs=1e-4)
    assert correlation(noise, np.random.default_rng(1).normal(size=1000).astype(np.float32)) < 0.3
    assert correlation(noise, 0 * noise) == 0.0


def test_recordings_without_a_folder_of_their_own(tmp_path: Path) -> None:
    shutil.copy(CLIPS / "alto_sax_a3.flac", tmp_path)
    alone = survey_folder(tmp_path, tmp_path / ".cache", RATE)
    assert [style.name for style in alone.styles] == [tmp_path.name]
    (tmp_path / "other").mkdir()
    shutil.copy(CLIPS / "alto_sax_e4.flac", tmp_path / "other")
    both = survey_folder(tmp_path, tmp_path / ".cache", RATE)
    assert {style.name for style in both.styles} == {tmp_path.name, "other"}
    assert f"1 recordings lie in {tmp_path} itself" in both.warnings[-1]


def test_a_folder_with_nothing_in_it_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SurveyError, match=r"no recordings in it or below; put a folder of them per style there"):
        survey_folder(tmp_path, tmp_path / "cache", RATE)
    result = CliRunner().invoke(app, [str(tmp_path / "none")])
    assert result.exit_code == 1 and f"{tmp_path / 'none'}: there is no such folder" in result.stderr
    result = CliRunner().invoke(app, [str(CLIPS / "alto_sax_a3.flac")])
    assert result.exit_code == 1 and "is a file; name the folder" in result.stderr


def test_the_command_prints_a_table_and_writes_figures_and_a_picture(folder: Path, tmp_path: Path) -> None:
    cache = ["--cache", str(folder.parent / "cache")]
    files = ["--json", str(tmp_path / "data.json"), "--plot", str(tmp_path / "data.png")]
    result = CliRunner().invoke(app, [str(folder), *cache, *files], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "vibraphone" in result.stdout and "remark: sax/text.wav: cannot be decoded" in result.stdout
    assert json.loads((tmp_path / "data.json").read_text())["styles"]["sax"]["silent"] == 1
    assert (tmp_path / "data.png").read_bytes().startswith(b"\x89PNG")
    printed = CliRunner().invoke(app, [str(folder), *cache, "--json", "-"])
    assert json.loads(printed.stdout) == json.loads((tmp_path / "data.json").read_text())


def test_a_target_that_cannot_be_written_is_said_first(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, [str(folder), "--plot", str(tmp_path / "none" / "a.png"), "--cache", str(tmp_path)]
    )
    assert result.exit_code == 1 and "cannot write" in result.stderr
    assert list(tmp_path.iterdir()) == []
