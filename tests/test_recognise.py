"""Recognising styles with a model file alone: excerpts, probabilities, labelled folders, and beside a performance."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

from realtime.bundle import DEFAULT_MODEL, DEFAULT_RECOGNISER, DEMO_CLIP, BundleError, read_bundle
from realtime.cli import app
from realtime.listener import Ear, Heard, Listener, read_recogniser
from realtime.recognise import (
    Excerpt,
    Recogniser,
    Recognition,
    cut_excerpts,
    evaluate,
    expected_calibration_error,
    loud_enough,
    read_mono,
    recognise_file,
)
from realtime.ring import Ring

CLIPS = Path(__file__).parent / "data"
SAX, VIBRAPHONE = CLIPS / "alto_sax_a3.flac", CLIPS / "vibraphone_418hz.flac"


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    return Recogniser(read_bundle(DEFAULT_RECOGNISER))


def style_of(recogniser: Recogniser, probabilities: NDArray[np.float32]) -> str:
    return recogniser.manifest.styles[int(probabilities.argmax())].id


def run(*arguments: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["recognise", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


# -- excerpts ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 30))
def test_excerpts_are_the_recording_again_whatever_blocks_it_comes_in(sizes: list[int], samples: int) -> None:
    audio = np.arange(1, sum(sizes) + 1, dtype=np.float32)
    blocks = np.split(audio, np.cumsum(sizes)[:-1])
    excerpts = list(cut_excerpts(blocks, samples))
    assert all(len(excerpt) == samples for excerpt in excerpts[:-1])
    joined = np.concatenate([*excerpts, np.zeros(0, np.float32)])
    np.testing.assert_array_equal(joined, audio[: len(joined)])
    assert len(audio) - len(joined) < samples / 3
    assert bool(len(audio)) == bool(excerpts)


def test_pauses_tell_nothing() -> None:
    assert loud_enough([-20.0, -49.0, -51.0, -200.0]).tolist() == [True, True, False, False]
    assert loud_enough([-58.0, -61.0]).tolist() == [True, False]
    assert loud_enough([-90.0]).tolist() == [False] and loud_enough([]).tolist() == []


def test_calibration_error_by_hand() -> None:
    assert expected_calibration_error(np.array([0.8] * 5), np.array([1, 1, 1, 1, 0])) == pytest.approx(0.0)
    # Two bins of two excerpts each: 0.9 sure and half right, 0.5 sure and always right.
    assert expected_calibration_error(np.array([0.9, 0.9, 0.5, 0.5]), np.array([1, 0, 1, 1])) == pytest.approx(0.45)
    assert expected_calibration_error(np.ones(3), np.ones(3, bool)) == 0.0


@given(st.integers(0, 2**31))
def test_whoever_is_right_as_often_as_it_is_sure_has_a_small_calibration_error(seed: int) -> None:
    random = np.random.default_rng(seed)
    confidence = random.uniform(0.2, 1.0, 20_000)
    assert expected_calibration_error(confidence, random.uniform(size=20_000) < confidence) < 0.03
    assert expected_calibration_error(confidence, random.uniform(size=20_000) < confidence - 0.2) > 0.15


def test_confusions_are_counted_per_excerpt_and_pauses_are_not() -> None:
    def heard(*taken: int | None) -> Recognition:
        rows = [None if number is None else np.eye(3, dtype=np.float32)[number] for number in taken]
        excerpts = tuple(Excerpt(3.0 * i, 3.0, row) for i, row in enumerate(rows))
        whole = np.mean([row for row in rows if row is not None], axis=0)
        return Recognition(Path("a.wav"), 3.0 * len(rows), excerpts, whole, np.ones(1, np.float32))

    result = evaluate([(heard(0, 0, 1, None), 0), (heard(2), 1)], ("a", "b", "c"))
    assert result.confusion.tolist() == [[2, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert (result.recordings, result.recordings_right) == (2, 1)
    assert result.accuracy == 0.5 and result.mean_style_accuracy == pytest.approx(1 / 3)
    assert result.calibration_error == pytest.approx(0.5)


# -- the shipped recogniser --------------------------------------------------------------------------------------------


def test_the_shipped_recogniser_is_small_and_knows_the_styles_of_the_shipped_model() -> None:
    manifest = read_bundle(DEFAULT_RECOGNISER).manifest
    assert DEFAULT_RECOGNISER.stat().st_size <= 2_000_000
    assert {style.id for style in read_bundle(DEFAULT_MODEL).manifest.styles} <= {style.id for style in manifest.styles}
    assert manifest.kind == "recognise" and manifest.card.metrics["validation/accuracy"] > 0.8  # chance: 0.06


@pytest.mark.parametrize(("clip", "style"), [(SAX, "alto_sax"), (VIBRAPHONE, "vibraphone")])
def test_real_notes_are_recognised_at_any_level_and_rate(
    recogniser: Recogniser, tmp_path: Path, clip: Path, style: str
) -> None:
    audio, rate = soundfile.read(clip, dtype="float32")
    for name, gain, slow in (("loud.wav", 1.0, 1.0), ("quiet.wav", 0.02, 1.0), ("slow.wav", 1.0, 0.98)):
        soundfile.write(tmp_path / name, gain * audio, round(slow * rate), subtype="FLOAT")
        found = recognise_file(recogniser, tmp_path / name)
        assert style_of(recogniser, found.probabilities) == style
        assert found.probabilities.sum() == pytest.approx(1.0, abs=1e-5)


def test_an_hour_is_heard_as_its_minutes_are(recogniser: Recogniser, tmp_path: Path) -> None:
    audio, rate = soundfile.read(SAX, dtype="float32")
    size = recogniser.excerpt_samples * rate // recogniser.sample_rate
    excerpt = np.resize(audio, size)
    soundfile.write(tmp_path / "long.wav", np.tile(excerpt, 12), rate)
    found = recognise_file(recogniser, tmp_path / "long.wav")
    assert len(found.excerpts) in (12, 13)
    rows = [row.probabilities for row in found.excerpts[:12] if row.probabilities is not None]
    assert len(rows) == 12 and all(style_of(recogniser, row) == style_of(recogniser, rows[0]) for row in rows)


def test_the_command_prints_every_excerpt_and_the_whole(recogniser: Recogniser) -> None:
    text = run(SAX, VIBRAPHONE).output
    assert "Alto saxophone" in text and "Vibraphone" in text and "0.0 to" in text
    values = json.loads(run(SAX, "--json").stdout)
    (found,) = values["files"]
    assert found["style"] == "alto_sax" and values["failed"] == []
    assert set(found["probabilities"]) == {style.id for style in recogniser.manifest.styles}
    assert found["excerpts"][0]["start_seconds"] == 0.0
    assert sum(item["seconds"] for item in found["excerpts"]) == pytest.approx(found["seconds"], abs=1.0)


def test_style_folders_give_confusions_accuracy_and_calibration(tmp_path: Path) -> None:
    for folder, clips in {"alto_sax": ["alto_sax_a3", "alto_sax_e4"], "Vibraphone": ["vibraphone_418hz"]}.items():
        (tmp_path / folder).mkdir()
        for clip in clips:
            audio, rate = soundfile.read(CLIPS / f"{clip}.flac", dtype="float32")
            soundfile.write(tmp_path / folder / f"{clip}.wav", audio, rate)
    (tmp_path / "kazoo").mkdir()
    soundfile.write(tmp_path / "kazoo" / "toot.wav", np.ones(4_800) * 0.1, 48_000)
    plot = tmp_path / "confusions.png"
    values = json.loads(run(tmp_path, "--json", "--plot", plot).stdout)
    assert values["confusion"]["alto_sax"]["alto_sax"] >= 1 and values["recordings"] == 3
    assert values["left_out_folders"] == ["kazoo"] and values["left_out_known"] == 0
    assert 0.0 <= values["expected_calibration_error"] <= 1.0
    assert plot.read_bytes().startswith(b"\x89PNG")
    text = run(tmp_path).output
    assert "expected calibration error" in " ".join(text.split()) and "left out: kazoo" in text


def test_what_cannot_be_recognised_is_named_and_the_rest_is_heard(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silent.wav", np.zeros(48_000), 48_000)
    (tmp_path / "text.wav").write_text("no sound")
    one = run(tmp_path / "silent.wav", tmp_path / "text.wav", SAX, code=1).output
    assert "silent.wav: is silent" in one and "text.wav: is not a sound file" in one and "Alto saxophone" in one
    assert "there is no such file or folder" in run(tmp_path / "none.wav", code=1).output
    (tmp_path / "empty").mkdir()
    assert "has no sound files" in run(tmp_path / "empty", code=1).output
    assert "recognises no styles" in run(SAX, "--model", DEFAULT_MODEL, code=1).output
    assert "draws one folder" in run(SAX, "--plot", tmp_path / "p.png", code=1).output
    assert "choose another file" in run(SAX, "--plot", tmp_path, code=1).output
    assert not list(tmp_path.glob("*.png"))


def test_recognising_never_needs_torch() -> None:
    code = f"import sys; sys.modules['torch'] = None\nfrom realtime.cli import app\napp(['recognise', {str(SAX)!r}])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "Alto saxophone" in result.stdout


# -- beside a performance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
def test_what_goes_in_and_comes_out_is_heard_as_the_files_are(recogniser: Recogniser, channels: int) -> None:
    sides = []
    for clip in (SAX, VIBRAPHONE):
        audio, rate = soundfile.read(clip, dtype="float32", always_2d=True)
        assert rate == 44_100
        sides.append(np.repeat(np.resize(audio.mean(axis=1), 3 * rate)[:, None], channels, axis=1))
    frames = np.concatenate(sides, axis=1)
    ear = Ear(recogniser, 44_100)
    assert sum(ear.hear(block) for block in np.split(frames, range(1_000, len(frames), 1_000))) > 20
    assert [style_of(recogniser, row) for row in ear.probabilities] == ["alto_sax", "vibraphone"]
    assert (ear.power > 1e-6).all()


def test_bad_numbers_and_silence_are_heard_as_silence(recogniser: Recogniser) -> None:
    ear = Ear(recogniser, recogniser.sample_rate)
    frames = np.zeros((48_000, 2), np.float32)
    frames[100:200] = np.nan
    frames[300, 0] = np.inf
    assert ear.hear(frames) and np.isfinite(ear.probabilities).all() and (ear.power == 0.0).all()


def test_a_generator_is_no_recogniser() -> None:
    with pytest.raises(BundleError, match="give a recogniser to --recognise"):
        read_recogniser(DEFAULT_MODEL)


def test_a_listener_that_dies_is_replaced_and_one_that_is_slow_holds_nobody_up(recogniser: Recogniser) -> None:
    rate = recogniser.sample_rate
    sides = [np.concatenate(list(read_mono(clip, rate)))[:rate] for clip in (SAX, VIBRAPHONE)]
    frames = np.stack(sides, axis=1)
    listener = Listener(multiprocessing.get_context("spawn"), read_recogniser(DEFAULT_RECOGNISER), channels=1)
    ring = Ring.attach(listener.ring_name)

    def hear() -> Heard:
        until = time.monotonic() + 60.0
        while time.monotonic() < until:
            listener.watch(rate)
            ring.push(frames[:4_800])
            ring.push(frames[4_800:9_600])
            heard = listener.heard()
            if heard.going_in and heard.coming_out:
                return heard
            time.sleep(0.05)
        raise AssertionError("nothing was heard")

    try:
        assert listener.heard() == Heard(None, None)
        while ring.push(frames):  # nobody empties the ring yet
            pass
        assert ring.dropped
        heard = hear()
        assert heard.going_in and heard.going_in[0] == "Alto saxophone" and 0.0 < heard.going_in[1] <= 1.0
        first = listener.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: (listener.watch(rate), listener.pid)[1] != first)
        assert hear().going_in
    finally:
        ring.close()
        listener.close()


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_performance_says_what_goes_in_and_comes_out(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "realtime.cli", "live", "--clip", str(DEMO_CLIP), "--style", "violin", "--loop"]
    command += ["--seconds", "60", "--recognise"]
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, "shipped"], stdout=pipe, stderr=pipe, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        said = ""
        for line in process.stdout:
            said = line.partition("  hears ")[2]
            if "%" in said:
                process.send_signal(signal.SIGINT)
                break
        process.stdout.read()
        assert process.wait(timeout=30) == 0, process.stderr.read()
    assert " -> " in said and "%" in said
    wrong = subprocess.run([*command, str(DEFAULT_MODEL)], capture_output=True, text=True, check=False, timeout=120)
    assert wrong.returncode == 1 and "recognises no styles" in wrong.stderr
