"""What an autoencoder's code costs, and what it makes of recordings that it has not heard, in their own style."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from realtime.bundle import Bundle
from training.library import Recording
from training.measures import Audio
from training.models.recogniser import SAMPLE_RATE, Recogniser, cut_excerpts, loud_enough, mel_power
from training.playing import Engine, at_rate, judged, loudest_part, mean_of, rounded, share_taken_for

UNHEARD_RECORDINGS = 12  # of a style, at most, whose reconstruction is measured
FLOOR_DB = 60.0  # below an excerpt's loudest mel band: what is fainter makes no difference


def code_figures(
    bundle: Bundle,
    styles: Sequence[str],
    recordings: Mapping[str, Sequence[Recording]],
    recogniser: Recogniser,
    provider: str,
    seconds: float,
    tell: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """What "code" and "reconstruction" say of an autoencoder; nothing of other models.

    Reconstructed are recordings that its card does not name as heard, each through its own style.
    """
    manifest = bundle.manifest
    if not manifest.code_levels:
        return {}
    engine, heard = Engine(bundle, provider), set(manifest.card.recordings_sha256)
    found: dict[str, dict[str, Any]] = {}
    for number, style in enumerate(styles):
        tell("reconstructing", number, len(styles))
        unheard = [recording for recording in recordings[style] if recording.sha256 not in heard][:UNHEARD_RECORDINGS]
        found[style] = _reconstruction(engine, style, unheard, recogniser, seconds)
    tell("reconstructing", len(styles), len(styles))
    names = ("style_accuracy", "style_accuracy_unchanged", "log_mel_distance_db")
    return {
        "code": {
            "levels": list(manifest.code_levels),
            "numbers_per_second": rounded(manifest.code_numbers_per_second),
            "bits_per_second": rounded(manifest.code_bits_per_second),
        },
        "reconstruction": {
            "styles": found,
            "mean": {name: mean_of(values[name] for values in found.values()) for name in names},
        },
    }


def _reconstruction(
    engine: Engine, style: str, recordings: Sequence[Recording], recogniser: Recogniser, seconds: float
) -> dict[str, Any]:
    """Recordings through their own style: how many, how often they are recognised, before and after, and how far off.

    The recogniser may have learned from some of them, which is why its word on the same excerpts unchanged is given.
    """
    before, after = [], []
    for recording in recordings:
        audio = loudest_part(np.asarray(recording.audio()), round(seconds * engine.rate))
        out, _ = engine.render(audio, style)
        real, made = (cut_excerpts(at_rate(sound, engine.rate, SAMPLE_RATE)) for sound in (audio, out))
        loud = loud_enough(real)
        before.append(real[loud])
        after.append(made[loud])
    reals, mades = (np.concatenate(group) if group else np.zeros((0, 1), np.float32) for group in (before, after))
    values: dict[str, Any] = {"recordings": len(recordings), "excerpts": len(reals)}
    if not len(reals):
        return {**values, "style_accuracy": None, "style_accuracy_unchanged": None, "log_mel_distance_db": None}
    number = recogniser.styles.index(style)
    right = [share_taken_for(judged(recogniser, group), number) for group in (mades, reals)]
    return {
        **values,
        "style_accuracy": rounded(right[0]),
        "style_accuracy_unchanged": rounded(right[1]),
        "log_mel_distance_db": rounded(log_mel_distance_db(reals, mades)),
    }


def log_mel_distance_db(reals: Audio, mades: Audio) -> float:
    """Mean absolute difference of the mel bands of excerpts [count, samples] at SAMPLE_RATE, their levels matched."""
    pictures = []
    for group in (reals, mades):
        level = np.sqrt(np.square(group, dtype=np.float64).mean(axis=1, keepdims=True))
        power = mel_power(torch.from_numpy((group / np.maximum(level, 1e-9)).astype(np.float32))).numpy()
        pictures.append(10.0 * np.log10(power + 1e-12))
    floor = pictures[0].max(axis=(1, 2), keepdims=True) - FLOOR_DB
    real, made = (np.maximum(picture, floor) for picture in pictures)
    return float(np.abs(real - made).mean())
