"""Loudness as broadcasters measure it: EBU R128, ITU-R BS.1770-4."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from realtime.bundle import BOWED_CLIP, DEMO_CLIP, Bundle
from realtime.controls import TARGET_LOUDNESS_LUFS

SILENT_LUFS = -70.0
REGISTER_SPEEDS = (0.5, 0.75, 1.0, 1.5, 2.0)
REGISTER_SECONDS = 6.0
ROWS_AT_ONCE, HOPS_PER_STEP = 16, 16


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


def reference_playings(sample_rate: int, speeds: Sequence[float] = REGISTER_SPEEDS) -> list[NDArray[np.float32]]:
    """What styles are matched on: a plucked and then a bowed clip, each at five tape speeds, an octave down to one up.

    A style is louder in one register than in another, and one that is struck is louder on what is plucked than on what
    is held; matched over all of them it stands out in none. Each [samples] is at the common loudness.
    """
    import soxr

    from realtime.audio import demo_playing

    playings = []
    for clip in (DEMO_CLIP, BOWED_CLIP):
        playing = demo_playing(sample_rate, clip)
        for speed in speeds:
            start = playing[: round(speed * REGISTER_SECONDS * sample_rate)]
            moved = soxr.resample(start, speed * sample_rate, sample_rate, quality="HQ").astype(np.float32)
            playings.append(at_common_loudness(moved, sample_rate))
    return playings


def styles_loudness_lufs(
    bundle: Bundle, vectors: Sequence[NDArray[np.float32]], playings: Sequence[NDArray[np.float32]]
) -> NDArray[np.float64]:
    """[vectors, playings]: how loud each of the same playings, of one length, is in each style.

    Through the stream that performs, ROWS_AT_ONCE renderings side by side. Raises BundleError.
    """
    from realtime.stream import Stream  # brings onnxruntime along, which loudness alone does without

    renderings = [(vector, playing) for vector in vectors for playing in playings]
    rows = min(ROWS_AT_ONCE, len(renderings))
    stream = Stream(bundle, rows, HOPS_PER_STEP)
    stream.warm_up()
    loudness: list[float] = []
    for at in range(0, len(renderings), rows):
        part = renderings[at : at + rows]
        filled = [part[row % len(part)] for row in range(rows)]
        stream.style[:] = np.stack([vector for vector, _ in filled])
        stream.reset()
        made = stream.play(np.stack([playing for _, playing in filled]))
        loudness += [loudness_lufs(out, bundle.manifest.spectral.sample_rate) for out in made[: len(part)]]
    return np.reshape(loudness, (len(vectors), len(playings)))
