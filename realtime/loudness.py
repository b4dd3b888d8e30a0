"""Loudness as broadcasters measure it: EBU R128, ITU-R BS.1770-4."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from realtime.controls import TARGET_LOUDNESS_LUFS

SILENT_LUFS = -70.0
REGISTER_SPEEDS = (0.5, 0.75, 1.0, 1.5, 2.0)
REGISTER_SECONDS = 6.0


def loudness_lufs(audio: NDArray[np.float32], sample_rate: int) -> float:
    """Integrated loudness of [samples] or [samples, channels], at least 0.4 s, never below SILENT_LUFS."""
    import pyloudnorm  # brings scipy along, which nobody else on stage needs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the logarithm of silence
        measured = float(pyloudnorm.Meter(sample_rate).integrated_loudness(audio.astype(np.float64)))
    return measured if measured > SILENT_LUFS else SILENT_LUFS


def at_common_loudness(audio: NDArray[np.float32], sample_rate: int) -> NDArray[np.float32]:
    """audio [samples], not silent, at the level that styles are matched to."""
    gain_db = TARGET_LOUDNESS_LUFS - loudness_lufs(audio, sample_rate)
    return (audio * 10.0 ** (gain_db / 20.0)).astype(np.float32)


def reference_playings(sample_rate: int) -> list[NDArray[np.float32]]:
    """What styles are matched on: the start of the bundled clip at five tape speeds, an octave down to one up.

    A style is louder in one register than in another; matched over all of them it stands out in none. Each [samples]
    is at the common loudness.
    """
    import soxr

    from realtime.audio import demo_playing

    clip, playings = demo_playing(sample_rate), []
    for speed in REGISTER_SPEEDS:
        start = clip[: round(speed * REGISTER_SECONDS * sample_rate)]
        moved = soxr.resample(start, speed * sample_rate, sample_rate, quality="HQ").astype(np.float32)
        playings.append(at_common_loudness(moved, sample_rate))
    return playings
