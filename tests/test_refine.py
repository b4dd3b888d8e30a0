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
from training.refine import refine

CLIP = Path(__file__).parent.parent / "realtime" / "demo" / "guitar.flac"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(DEFAULT_MODEL)


def test_a_bad_vector_gets_better_on_unheard_parts(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine_module, "WINDOW_HOPS", 96)
    monkeypatch.setattr(refine_module, "HELD_OUT_ROWS", 4)
    audio = read_clip(CLIP, bundle.manifest.spectral.sample_rate)[: 10 * 48_000]
    learned = learn(bundle, CLIP, "guitar again")
    wrong = tuple(np.random.default_rng(0).normal(0.0, 2.0, len(learned.style.vector)).tolist())
    bad = replace(learned, style=replace(learned.style, vector=wrong))
    shares: list[float] = []
    found = refine(bundle, bad, audio, 0.2, progress=lambda share, _: shares.append(share))
    assert found.refined["loss_after"] < found.refined["loss_before"]
    assert found.style.vector != bad.style.vector and found.style.id == bad.style.id
    assert shares == sorted(shares) and shares[0] >= 0.0 and shares[-1] <= 1.0
    assert found.refined["seconds"] >= 12.0


def test_no_time_is_no_change(bundle: Bundle) -> None:
    learned = learn(bundle, CLIP, "guitar again")
    audio = read_clip(CLIP, bundle.manifest.spectral.sample_rate)
    same = refine(bundle, learned, audio, 0.0)
    assert same.style == learned.style
    assert same.refined["loss_after"] == same.refined["loss_before"] > 0.0


def test_a_clip_too_short_for_it_is_refused(bundle: Bundle) -> None:
    learned = learn(bundle, CLIP, "guitar again")
    with pytest.raises(LearnError, match=r"guitar\.flac: 2\.0 s are too short to refine on"):
        refine(bundle, learned, np.ones(2 * 48_000, np.float32), 1.0)
