"""Refining: steps towards styles that are known, which never make a style worse, judged on what they did not hear."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from realtime import refine as refine_module
from realtime.audio import demo_playing
from realtime.bundle import DEFAULT_MODEL, Bundle, read_bundle
from realtime.cli import app
from realtime.learned import LearnedStyle, LearnError, learn
from realtime.refine import STEPS, energy_distance, refine
from realtime.stream import Stream

CLIPS = Path(__file__).parent / "data"
SAX = CLIPS / "alto_sax_a3.flac"
HOPS = 16


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def learned(bundle: Bundle) -> LearnedStyle:
    return learn(bundle, SAX, "my sax")


@pytest.fixture(autouse=True)
def few_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine_module, "REGISTERS_HEARD", (2,))
    monkeypatch.setattr(refine_module, "REGISTERS_UNHEARD", (3,))


@pytest.fixture(scope="module")
def trumpet(bundle: Bundle) -> np.ndarray:
    """[samples] of what the model plays as a trumpet: some vector is right for it, and is one of its own."""
    stream = Stream(bundle, 1, HOPS)
    stream.style[:] = np.array(bundle.manifest.style("trumpet").vector)
    samples = HOPS * bundle.manifest.spectral.hop_samples
    return stream.play(demo_playing(bundle.manifest.spectral.sample_rate)[None, : 9 * 48_000 // samples * samples])[0]


def with_numbers(learned: LearnedStyle, vector: np.ndarray) -> LearnedStyle:
    return replace(learned, style=replace(learned.style, vector=tuple(vector.tolist())))


def test_a_step_goes_towards_styles_of_the_model_and_comes_nearer(
    bundle: Bundle, learned: LearnedStyle, trumpet: np.ndarray
) -> None:
    known = {style.id: np.array(style.vector) for style in bundle.manifest.styles}
    begun = 0.5 * (known["drums"] + known["trumpet"])
    wrong = with_numbers(learned, begun)
    found = refine(bundle, wrong, trumpet)
    assert found.refined["distance_after"] < found.refined["distance_before"]
    assert (found.style.id, found.style.program, found.clip) == (wrong.style.id, wrong.style.program, wrong.clip)
    assert found.style.loudness_lufs != wrong.style.loudness_lufs
    towards = begun + (np.array(found.style.vector) - begun) / STEPS[0]
    pairs = {
        (one, other): np.abs(0.5 * (known[one] + known[other]) - towards).max() for one in known for other in known
    }
    nearest = min(pairs, key=lambda pair: pairs[pair])
    assert pairs[nearest] < 1e-4 and "trumpet" in nearest


def test_more_minutes_are_more_steps_and_none_once_nothing_is_nearer(
    bundle: Bundle, learned: LearnedStyle, trumpet: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refine_module, "STEPS", STEPS[:2])
    known = {style.id: np.array(style.vector) for style in bundle.manifest.styles}
    wrong = with_numbers(learned, 0.5 * (known["drums"] + known["trumpet"]))
    shares: list[float] = []
    one, more = refine(bundle, wrong, trumpet), refine(bundle, wrong, trumpet, 5.0, shares.append)
    assert more.refined["distance_after"] < one.refined["distance_after"]
    assert shares == sorted(shares) and 0.5 < shares[-1] <= 1.0
    right = with_numbers(learned, known["trumpet"])
    same = refine(bundle, right, trumpet)
    assert same.style == right.style
    assert same.refined["distance_after"] == same.refined["distance_before"] < one.refined["distance_after"]


def test_clouds_of_one_kind_have_no_distance_and_others_twice_the_gap_of_their_middles() -> None:
    random = np.random.default_rng(0)
    one, same, far = (random.standard_normal((400, 3)).astype(np.float32) + at for at in (0.0, 0.0, 100.0))
    assert abs(energy_distance(one, same)) < 0.05
    assert energy_distance(one, far) == pytest.approx(2 * 100.0 * 3**0.5, rel=0.02)
    two, three = np.array([[0.0], [1.0]], np.float32), np.array([[0.0], [2.0]], np.float32)
    assert energy_distance(two, three) == pytest.approx(2 * (0 + 2 + 1 + 1) / 4 - 1 - 2)


def test_a_clip_too_short_for_it_is_refused(bundle: Bundle, learned: LearnedStyle) -> None:
    with pytest.raises(LearnError, match=r"alto_sax_a3\.flac: 2\.0 s are too short to refine on.*--refine 0"):
        refine(bundle, learned, np.ones(2 * 48_000, np.float32), 1.0)


def test_learn_takes_one_step_unless_it_is_told_otherwise(bundle: Bundle, trumpet: np.ndarray, tmp_path: Path) -> None:
    clip = tmp_path / "trumpet.wav"
    soundfile.write(clip, trumpet, bundle.manifest.spectral.sample_rate, subtype="FLOAT")

    def said(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["learn", str(clip), *arguments])
        return result.exit_code, result.output

    code, printed = said("--name", "one step", "--out", str(tmp_path / "one.style"))
    assert code == 0 and "distance to the clip, on playing that was not searched with: " in printed
    code, printed = said("--name", "as heard", "--refine", "0", "--out", str(tmp_path / "none.style"))
    assert code == 0 and "distance" not in printed
    one, none = (json.loads((tmp_path / f"{name}.style").read_text()) for name in ("one", "none"))
    assert one["refined"]["distance_after"] <= one["refined"]["distance_before"] and none["refined"] == {}
    clip = SAX
    code, printed = said("--name", "short", "--refine", "1", "--out", str(tmp_path / "short.style"))
    assert code == 1 and "too short" in printed and not (tmp_path / "short.style").exists()
    code, _ = said("--name", "short", "--out", str(tmp_path / "short.style"))
    assert code == 0 and json.loads((tmp_path / "short.style").read_text())["refined"] == {}
