"""Recordings to restyle, the engine that plays them in a style, and what is measured of what it plays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from numpy.typing import NDArray

from realtime.bundle import Bundle
from realtime.controls import Performer
from realtime.loudness import loudness_lufs
from realtime.processor import Processor
from realtime.render import BLOCK, STEADY_HOPS_PER_STEP, render_samples
from training import measures
from training.library import read_mono
from training.losses import stroke_loss
from training.measures import Audio
from training.models.recogniser import SAMPLE_RATE, Judgement, Recogniser, cut_excerpts, loud_enough

SILENCE_SECONDS = 3.0
TAIL_SECONDS = 1.0  # of that silence, in which what was played may ring out
FADE_SECONDS = 0.01
SHORTEST_INPUT_SECONDS = 1.0
TONES_HZ, TONE_SECONDS = (220.0, 440.0), 4.0


@dataclass(frozen=True)
class Input:
    """One recording to restyle: the stretch of it that is used, and its tracks, taken once."""

    name: str
    audio: Audio  # [samples] at the model's rate
    tracked: Audio  # [samples] at measures.TRACK_RATE
    pitch: measures.PitchTrack
    onsets_s: NDArray[np.float64]
    chroma: NDArray[np.float32]
    sounding: NDArray[np.bool_]  # [frames]
    loud: NDArray[np.bool_]  # [excerpts]


@dataclass(frozen=True)
class Measured:
    """All figures of one output, apart from those that need its target style. NaN: cannot be said."""

    pitch_kept: float
    onset_f1: float
    chroma_correlation: float
    loudness_correlation: float
    hop_buzz_db: float
    partials_db: float
    flutter_db: float
    added_strokes_db: float
    clicks: int
    silence_peak_dbfs: float
    loudness_lufs: float
    judgement: Judgement  # of the excerpts that are loud in the input; shares of zero where the output is silent
    seconds: float


def loudest_part(audio: Audio, samples: int) -> Audio:
    """The stretch of [samples] with the most energy, [up to ``samples``], ended without a click."""
    if len(audio) > samples:
        energy = np.concatenate([[0.0], np.cumsum(np.square(audio, dtype=np.float64))])
        start = int(np.argmax(energy[samples:] - energy[:-samples]))
        audio = audio[start : start + samples]
    return audio.copy()


def read_input(path: Path, name: str, sample_rate: int, seconds: float) -> Input:
    """Decode, cut and track one input. Raises ValueError that says what is wrong with the file."""
    audio = loudest_part(read_mono(path, sample_rate), round(seconds * sample_rate))
    if len(audio) < SHORTEST_INPUT_SECONDS * sample_rate:
        raise ValueError(f"is too short ({len(audio) / sample_rate:.2f} s, at least {SHORTEST_INPUT_SECONDS:g} s)")
    if measures.peak_dbfs(audio) < -60.0:
        raise ValueError("is silent")
    fade = round(FADE_SECONDS * sample_rate)
    audio[:fade] *= np.linspace(0.0, 1.0, fade, dtype=np.float32)
    audio[-fade:] *= np.linspace(1.0, 0.0, fade, dtype=np.float32)
    tracked = at_rate(audio, sample_rate, measures.TRACK_RATE)
    return Input(
        name,
        audio,
        tracked,
        measures.pitch_track(tracked),
        measures.onsets_s(tracked),
        measures.chroma(tracked),
        measures.level_db(tracked) >= -measures.SOUNDING_DB,
        loud_enough(cut_excerpts(at_rate(audio, sample_rate, SAMPLE_RATE))),
    )


def at_rate(audio: Audio, old: int, new: int) -> Audio:
    return audio if old == new else soxr.resample(audio, old, new, quality="HQ")


class Engine:
    """A model in the engine that performs, in larger steps: many inputs, one style after the other."""

    def __init__(self, bundle: Bundle, provider: str) -> None:
        self.bundle, self.rate = bundle, bundle.manifest.spectral.sample_rate
        self.processor = Processor(bundle, provider, hops_per_step=STEADY_HOPS_PER_STEP)
        self.processor.prepare(self.rate, BLOCK, channels=1)

    def tone_buzz_db(self, style: str) -> float:
        """What the hop rate adds to steady tones in this style, the worst of two, in dB relative to the output."""
        hop, found = self.bundle.manifest.spectral.hop_samples, []
        time_s = np.arange(round(TONE_SECONDS * self.rate)) / self.rate
        for tone_hz in TONES_HZ:
            out, _ = self.render((0.2 * np.sin(2.0 * np.pi * tone_hz * time_s)).astype(np.float32), style)
            found.append(measures.tone_buzz_db(out[self.rate // 2 :], tone_hz, self.rate, hop))
        return max(found)

    def render(self, audio: Audio, style: str) -> tuple[Audio, Audio]:
        """[samples] in a style, aligned to the input, and what sounds in the silence after it."""
        performer = Performer(self.bundle.manifest)
        performer.select(style)
        self.processor.controls = performer.controls()
        self.processor.reset()
        silence = np.zeros(round(SILENCE_SECONDS * self.rate), np.float32)
        out = render_samples(self.processor, np.concatenate([audio, silence])[None])[0]
        return out[: len(audio)], out[len(audio) + round(TAIL_SECONDS * self.rate) :]


def measure(
    item: Input, out: Audio, after: Audio, sample_rate: int, hop_samples: int, recogniser: Recogniser
) -> Measured:
    """All figures of one output [samples] and of what sounded after it [samples], both at ``sample_rate``."""
    tracked = at_rate(out, sample_rate, measures.TRACK_RATE)
    excerpts = cut_excerpts(at_rate(out, sample_rate, SAMPLE_RATE))[item.loud]
    return Measured(
        measures.pitch_kept(item.pitch, tracked) if item.pitch.pitched else math.nan,
        measures.onset_f1(item.onsets_s, measures.onsets_s(tracked)),
        measures.chroma_correlation(item.chroma, measures.chroma(tracked), item.sounding),
        measures.loudness_correlation(item.tracked, tracked),
        measures.hop_buzz_db(item.audio, out, hop_samples),
        measures.partials_db(out, sample_rate),
        measures.flutter_db(out, sample_rate),
        added_strokes_db(item.audio, out, sample_rate),
        measures.added_clicks(item.audio, out, sample_rate),
        measures.peak_dbfs(after),
        loudness_lufs(out, sample_rate),
        judged(recogniser, excerpts),
        len(out) / sample_rate,
    )


def added_strokes_db(reference: Audio, found: Audio, sample_rate: int) -> float:
    """How far what is struck stands out in ``found`` where nothing begins in ``reference``, in dB in the mean.

    Both [samples]. What training can ask for as ``loss.strokes``: held playing that is struck anew with every turn of a
    vibrato has 0.2 and more, held playing that stays held 0.01 and less.
    """
    heard, made = (torch.from_numpy(np.ascontiguousarray(side, dtype=np.float32))[None] for side in (reference, found))
    with torch.no_grad():
        return float(stroke_loss(made, heard, sample_rate))


def judged(recogniser: Recogniser, excerpts: NDArray[np.float32]) -> Judgement:
    """What the recogniser makes of excerpts [count, samples]; shares of zero where nothing is heard."""
    judgement = recogniser.judge(excerpts)
    judgement.shares[np.abs(excerpts).max(axis=1) < 1e-4] = 0.0
    return judgement


def taken_for(judgement: Judgement, classes: int) -> NDArray[np.float64]:
    """Share of excerpts taken for each class [classes]; silent ones are taken for none."""
    shares = judgement.shares
    heard = shares.sum(axis=1) > 0.0
    return np.bincount(shares.argmax(axis=1)[heard], minlength=classes) / len(shares)


def share_taken_for(judgement: Judgement, number: int) -> float:
    return float(taken_for(judgement, judgement.shares.shape[1])[number])


def first_and_later(judgement: Judgement, number: int) -> tuple[float, float]:
    """Whether the first excerpt that sounds is taken for the class, and the share of the later ones; NaN without any.

    A model that remembers only how playing begins is better at first.
    """
    right = [float(row.argmax() == number) for row in judgement.shares if row.sum() > 0.0]
    return right[0] if right else math.nan, float(np.mean(right[1:])) if right[1:] else math.nan


def mean_of(values: Any) -> float | None:
    """Mean of the numbers among ``values``, None without any."""
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    return rounded(sum(known) / len(known)) if known else None


def rounded(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None
