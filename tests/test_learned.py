"""Styles learned from a clip: what is heard, what is written, what is refused, and that a performance can use it."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mido
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from realtime.bundle import DEFAULT_MODEL, Bundle, BundleError, read_bundle, read_encoder
from realtime.cli import app
from realtime.learned import (
    LearnedStyle,
    LearnError,
    add_styles,
    cut_windows,
    free_program,
    hear_windows,
    learn,
    read_clip,
    read_style,
    style_id,
    write_style,
)
from realtime.live import LiveSettings, Performance
from realtime.processor import Processor
from realtime.render import render_samples

CLIPS = Path(__file__).parent / "data"
SAX = CLIPS / "alto_sax_a3.flac"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def learned(bundle: Bundle) -> LearnedStyle:
    return learn(bundle, SAX, "My Sax #2")


def restyle(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def vector_of(bundle: Bundle, clip: Path, gain: float = 1.0) -> np.ndarray:
    audio = read_clip(clip, bundle.manifest.spectral.sample_rate)
    return hear_windows(bundle, gain * audio)[1].mean(axis=0)


def test_a_clip_becomes_a_style_of_this_model(bundle: Bundle, learned: LearnedStyle) -> None:
    style = learned.style
    assert (style.id, style.label, learned.clip, learned.clip_seconds) == ("my_sax_2", "My Sax #2", SAX.name, 2.0)
    assert (learned.model, learned.fingerprint) == (bundle.manifest.name, bundle.manifest.fingerprint)
    assert len(style.vector) == bundle.manifest.style_dim and learned.refined == {}
    assert -60.0 < style.loudness_lufs < 0.0
    assert style.program not in {known.program for known in bundle.manifest.styles}
    assert learn(bundle, SAX, "My Sax #2") == learned


def test_the_encoder_hears_timbre_not_loudness(bundle: Bundle) -> None:
    sax, quiet = vector_of(bundle, SAX), vector_of(bundle, SAX, 0.05)
    sax_too, vibraphone = (
        vector_of(bundle, CLIPS / "alto_sax_e4.flac"),
        vector_of(bundle, CLIPS / "vibraphone_418hz.flac"),
    )
    assert np.abs(quiet - sax).max() < 0.02 * np.abs(sax).max()
    assert np.linalg.norm(sax_too - sax) < 0.7 * np.linalg.norm(vibraphone - sax)


def test_what_is_written_is_read_back_and_joins_the_styles(
    bundle: Bundle, learned: LearnedStyle, tmp_path: Path
) -> None:
    path = tmp_path / "sax.style"
    write_style(path, learned)
    assert read_style(path, bundle.manifest) == learned
    more = add_styles(bundle, [path])
    assert more.manifest.styles == (*bundle.manifest.styles, learned.style)
    assert more.manifest.style("My Sax #2") == learned.style
    with pytest.raises(LearnError, match="there is a style 'my_sax_2' already"):
        add_styles(bundle, [path, path])


def test_two_styles_with_one_program_get_two(bundle: Bundle, learned: LearnedStyle, tmp_path: Path) -> None:
    paths = [tmp_path / "one.style", tmp_path / "two.style"]
    write_style(paths[0], learned)
    write_style(paths[1], replace(learned, style=replace(learned.style, id="other", label="Other")))
    styles = add_styles(bundle, paths).manifest.styles
    assert len({style.program for style in styles}) == len(styles)
    assert styles[-2].program == learned.style.program


def test_a_style_sounds_as_its_vector_says(bundle: Bundle, learned: LearnedStyle, tmp_path: Path) -> None:
    path, out = tmp_path / "sax.style", tmp_path / "out.wav"
    write_style(path, learned)
    assert restyle("render", SAX, out, "--learned", path, "--style", "my_sax_2").exit_code == 0
    other = tmp_path / "other.wav"
    assert restyle("render", SAX, other, "--style", bundle.manifest.styles[0].id).exit_code == 0
    heard, first = (soundfile.read(p, dtype="float32")[0] for p in (out, other))
    assert len(heard) == len(first) and float(np.abs(heard - first).max()) > 0.01


def test_a_program_change_selects_it(bundle: Bundle, learned: LearnedStyle, tmp_path: Path) -> None:
    path, midi = tmp_path / "sax.style", tmp_path / "select.mid"
    write_style(path, learned)
    track = mido.MidiTrack([mido.Message("program_change", program=learned.style.program, time=0)])
    mido.MidiFile(tracks=[track]).save(midi)
    rate = bundle.manifest.spectral.sample_rate
    audio = read_clip(SAX, rate)
    soundfile.write(tmp_path / "in.wav", audio, rate, subtype="FLOAT")
    ways = {"by_program": ("--midi", midi), "by_name": ("--style", "my_sax_2"), "without": ()}
    for name, arguments in ways.items():
        result = restyle("render", tmp_path / "in.wav", tmp_path / f"{name}.wav", "--learned", path, *arguments)
        assert result.exit_code == 0, result.output
    # The program change fades in over eight hops; what the model remembers of those fades with time.
    late = len(audio) // 2
    by_program, by_name, without = (soundfile.read(tmp_path / f"{k}.wav", dtype="float32")[0][late:] for k in ways)
    assert np.linalg.norm(by_program - by_name) < 0.05 * np.linalg.norm(without - by_name)


def test_a_performance_can_start_with_it_and_select_it(learned: LearnedStyle, tmp_path: Path) -> None:
    write_style(tmp_path / "sax.style", learned)
    settings = LiveSettings(DEFAULT_MODEL, learned=(tmp_path / "sax.style",), style="my_sax_2", clip=SAX)
    performance = Performance(settings)
    assert performance.performer.mix() == {learned.style: 1.0}
    performance.performer.select("violin")
    assert performance.performer.style_of_program(learned.style.program) == learned.style


def test_a_learned_style_is_as_loud_as_the_others(bundle: Bundle, learned: LearnedStyle, tmp_path: Path) -> None:
    from realtime.controls import PARAMETERS, TARGET_LOUDNESS_LUFS, mix_controls
    from realtime.loudness import loudness_lufs, reference_playings

    write_style(tmp_path / "sax.style", learned)
    more = add_styles(bundle, [tmp_path / "sax.style"])
    rate = more.manifest.spectral.sample_rate
    processor = Processor(more, hops_per_step=16)
    processor.controls = mix_controls({more.manifest.styles[-1]: 1.0}, {p.id: p.default for p in PARAMETERS})
    processor.prepare(rate, 8192, 1)
    heard = [loudness_lufs(render_samples(processor, clip[None])[0], rate) for clip in reference_playings(rate)]
    assert np.mean(heard) == pytest.approx(TARGET_LOUDNESS_LUFS, abs=0.5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d.update(schema=9), "schema: is 9, this version reads 1"),
        (lambda d: d.update(fingerprint="0" * 16), "was learned for another model"),
        (lambda d: d["style"].update(vector=d["style"]["vector"][:3]), "style.vector: has 3 numbers"),
        (lambda d: d["style"]["vector"].__setitem__(0, math.nan), "style.vector: has a number that is no sane one"),
        (lambda d: d["style"]["vector"].__setitem__(0, 10**400), "style.vector: has a number that is no sane one"),
        (
            lambda d: d["style"].update(label="a\x1b[2Jb"),
            "style.label: is empty, above 200 characters or not printable",
        ),
        (lambda d: d["style"].update(id="x" * 201), "style.id: is empty, above 200 characters or not printable"),
        (lambda d: d["style"].update(program=200), "style.program: 200 is outside 0..127"),
        (lambda d: d["style"].update(id="My Sax"), "style.id: 'My Sax' is not in snake_case"),
        (lambda d: d.update(more=1), "more"),
        (lambda d: d.pop("style"), "style"),
    ],
)
def test_a_style_file_that_cannot_be_used_is_named(
    bundle: Bundle, learned: LearnedStyle, tmp_path: Path, change: Any, problem: str
) -> None:
    data = json.loads(json.dumps(asdict(learned)))
    change(data)
    path = tmp_path / "bad.style"
    path.write_text(json.dumps(data))
    with pytest.raises(LearnError) as caught:
        add_styles(bundle, [path])
    assert str(caught.value).startswith(f"{path}: ") and problem in str(caught.value)
    result = restyle("render", SAX, tmp_path / "out.wav", "--learned", path)
    assert result.exit_code == 1 and not (tmp_path / "out.wav").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1]", b"{", b"null", b"[" * 100_000])
def test_a_file_of_another_kind_is_refused(bundle: Bundle, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.style"
    path.write_bytes(content)
    with pytest.raises(LearnError, match=r"odd\.style: .*; (give a file that|learn the style again)"):
        read_style(path, bundle.manifest)


def test_models_without_a_sound_encoder_cannot_learn(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="encoder: is missing: this model cannot learn styles"):
        learn(replace(bundle, encoder=b""), SAX, "sax")
    for damaged in (b"@", base64.b64encode(b"no graph"), bundle.encoder[: len(bundle.encoder) // 8 * 4]):
        with pytest.raises(BundleError, match="encoder: is damaged"):
            read_encoder(replace(bundle, encoder=damaged))
    with pytest.raises(BundleError, match="encoder input 'audio': is not as it should be"):
        read_encoder(replace(bundle, encoder=base64.b64encode(bundle.graph)))


def test_clips_that_tell_nothing_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    sounds = {
        "silent": np.zeros(48_000),
        "short": np.full(4_800, 0.1),
        "broken": np.full(48_000, np.nan),
    }
    for name, audio in sounds.items():
        soundfile.write(tmp_path / f"{name}.wav", audio.astype(np.float32), 48_000, subtype="FLOAT")
    for name, problem in {
        "silent": "is silent",
        "short": "is 0.10 s long",
        "broken": "holds NaN or infinity",
        "none": "there is no such file",
    }.items():
        result = restyle("learn", tmp_path / f"{name}.wav", "--name", "x", "--out", tmp_path / "x.style")
        assert result.exit_code == 1 and problem in result.output.replace("\n", ""), result.output
        assert not (tmp_path / "x.style").exists()
    with pytest.raises(LearnError, match="name '###': has no letter or digit"):
        style_id("###")
    taken = bundle.manifest.styles[0]
    with pytest.raises(LearnError, match=r"has a style '\w+' already; choose another --name"):
        learn(bundle, SAX, taken.label)
    with pytest.raises(LearnError, match=f"program {taken.program}: selects another style already"):
        learn(bundle, SAX, "sax", taken.program)


def test_a_name_that_means_another_style_already_is_refused(bundle: Bundle) -> None:
    brass = bundle.manifest.style("Trombone")
    assert brass.id != "trombone"
    with pytest.raises(LearnError, match=r"name 'TROMBONE': .* choose another --name"):
        learn(bundle, SAX, "TROMBONE")


def test_names_that_a_terminal_would_obey_are_cleaned(bundle: Bundle) -> None:
    style = learn(bundle, SAX, "red\x1b[31m\nsax").style
    assert style.id == "red_31m_sax" and style.label == "red?[31m?sax"


def test_a_clip_beyond_all_bounds_gives_no_file(tmp_path: Path) -> None:
    loud = tmp_path / "loud.wav"
    soundfile.write(loud, np.full(96_000, 1e30, np.float32), 48_000, subtype="FLOAT")
    result = restyle("learn", loud, "--name", "x", "--out", tmp_path / "x.style")
    assert result.exit_code == 1 and "loud.wav" in result.output.replace("\n", "")
    assert not (tmp_path / "x.style").exists()
    nowhere = restyle("learn", SAX, "--name", "x", "--out", tmp_path / "no" / "x.style")
    assert nowhere.exit_code == 1 and "cannot be written" in nowhere.output.replace("\n", "")


def test_the_command_writes_what_it_says_and_overwrites_nothing(tmp_path: Path) -> None:
    target = tmp_path / "sax.style"
    result = restyle("learn", SAX, "--name", "Sax", "--program", 99, "--out", target, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert told["file"] == str(target) and told["style"]["program"] == 99
    assert json.loads(target.read_text()) == {key: value for key, value in told.items() if key != "file"}
    before = target.read_bytes()
    again = restyle("learn", SAX, "--name", "Sax", "--out", target)
    assert again.exit_code == 1 and "is there already" in again.output.replace("\n", "")
    assert target.read_bytes() == before
    odd = restyle("learn", SAX, "--name", "Sax", "--out", tmp_path / "sax.wav")
    assert odd.exit_code == 1 and "ends in .style" in odd.output.replace("\n", "")


@given(seconds=st.floats(0.1, 4.0), samples=st.integers(1_000, 8_000))
def test_windows_are_whole_and_loud(seconds: float, samples: int) -> None:
    audio = np.sin(np.arange(round(8_000 * seconds))).astype(np.float32)
    audio[len(audio) // 2 :] *= 1e-3
    windows = cut_windows(audio, samples)
    assert windows.shape[1] == samples and len(windows) >= 1
    power = np.square(windows).mean(axis=1)
    assert power.min() >= 0.99e-3 * power.max()


def test_free_programs_are_free(bundle: Bundle) -> None:
    styles = list(bundle.manifest.styles)
    for number in range(40):
        program = free_program(styles)
        assert program not in {style.program for style in styles} and program >= len(styles)
        styles.append(replace(styles[0], id=f"s{number}", program=program))
