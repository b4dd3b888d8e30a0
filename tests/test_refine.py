"""Refining: a search that never makes a style worse, and says what it gained on what it has not heard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from realtime.bundle import DEFAULT_MODEL, Bundle, read_bundle
from realtime.learned import LearnError, learn, read_clip
from training import refine as refine_module
from training.refine import energy_distance, refine

CLIP = Path(__file__).parent.parent / "realtime" / "demo" / "guitar.flac"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(DEFAULT_MODEL)


def test_a_bad_vector_gets_better_on_unheard_playing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine_module, "POPULATION", 4)
    monkeypatch.setattr(refine_module, "EXCERPTS_AT_ONCE", 2)
    audio = read_clip(CLIP, bundle.manifest.spectral.sample_rate)[: 10 * 48_000]
    learned = learn(bundle, CLIP, "guitar again")
    wrong = tuple(np.random.default_rng(0).normal(0.0, 2.0, len(learned.style.vector)).tolist())
    bad = replace(learned, style=replace(learned.style, vector=wrong))
    shares: list[float] = []
    found = refine(bundle, bad, audio, 0.2, progress=lambda share, _: shares.append(share))
    assert found.refined["distance_after"] < found.refined["distance_before"]
    assert found.style.vector != bad.style.vector and found.style.id == bad.style.id
    assert shares == sorted(shares) and shares[0] >= 0.0 and shares[-1] <= 1.0
    assert found.refined["seconds"] >= 12.0


def test_clouds_of_one_kind_have_no_distance_and_others_twice_the_gap_of_their_middles() -> None:
    random = np.random.default_rng(0)
    one, same, far = (random.standard_normal((400, 3)).astype(np.float32) + at for at in (0.0, 0.0, 100.0))
    assert abs(energy_distance(one, same)) < 0.05
    assert energy_distance(one, far) == pytest.approx(2 * 100.0 * 3**0.5, rel=0.02)
    two, three = np.array([[0.0], [1.0]], np.float32), np.array([[0.0], [2.0]], np.float32)
    assert energy_distance(two, three) == pytest.approx(2 * (0 + 2 + 1 + 1) / 4 - 1 - 2)


def test_the_search_stays_where_styles_are(bundle: Bundle) -> None:
    known = np.array([style.vector for style in bundle.manifest.styles], np.float32)
    middle = known.mean(axis=0)
    usual = float(np.median(np.linalg.norm(known - middle, axis=1)))
    near, far = middle + 0.5 * (known - middle), middle + 5.0 * (known - middle)
    np.testing.assert_allclose(refine_module._among(near, known), near, atol=1e-6)
    kept = refine_module._among(far, known) - middle
    np.testing.assert_allclose(np.linalg.norm(kept, axis=1), usual, rtol=1e-5)
    directions = (kept / usual * ((known - middle) / np.linalg.norm(known - middle, axis=1, keepdims=True))).sum(axis=1)
    np.testing.assert_allclose(directions, 1.0, rtol=1e-5)


def test_no_time_is_no_change(bundle: Bundle) -> None:
    learned = learn(bundle, CLIP, "guitar again")
    audio = read_clip(CLIP, bundle.manifest.spectral.sample_rate)
    same = refine(bundle, learned, audio, 0.0)
    assert same.style == learned.style
    assert same.refined["distance_after"] == same.refined["distance_before"] > 0.0


def test_a_clip_too_short_for_it_is_refused(bundle: Bundle) -> None:
    learned = learn(bundle, CLIP, "guitar again")
    with pytest.raises(LearnError, match=r"guitar\.flac: 2\.0 s are too short to refine on"):
        refine(bundle, learned, np.ones(2 * 48_000, np.float32), 1.0)
