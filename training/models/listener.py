"""Listeners: small networks that learned from playing which style is played, and judge what a generator makes.

A recogniser of ``recognise.toml`` learned from recordings, most of them single notes, and knows three in four phrases
that a sampler plays on those very notes; a listener learns from such phrases and from notes laid into others, and knows
all of them, and nine in ten phrases of recordings that it never heard. Each hears through another ear: what pleases one
by a quirk does not please the next. It learns before a run, from real recordings alone, and then stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.library import Recording
from training.losses import mel_matrix
from training.models import classifier, recogniser
from training.models.classifier import LABEL_SMOOTHING, hit_rate, played_elsewhere
from training.models.recogniser import EXCERPT_SECONDS, RecogniserConfig, draw_phrase, in_a_room, normalise
from training.models.recogniser_judge import COLOURED_SHARE
from training.models.teaching import Lesson, known_phrases, learn, taught_once
from training.phrases import PhraseSampler

CHANNELS = (16, 32, 64, 96)
EMBEDDING = 24  # so few that it cannot know its recordings by heart
DROPOUT = 0.3
EQUALISER_DB = 9.0  # a generator learns filters soonest; they must not pass for a style
LOUDEST = 1e4  # place of a phrase in half precision, so that the quietest that is heard is told exactly enough
PLAYED_SHARE = 0.4  # of what it learns from is played by the sampler, the rest laid from recordings
PLAYED_SEMITONES = 5.0  # tape speed of what the sampler plays, both ways


@dataclass(frozen=True)
class Ear:
    """What a listener hears of a sound: mel bands of frames of ``fft_size`` samples every ``hop_samples``."""

    fft_size: int
    hop_samples: int
    band_count: int
    highest_hz: float


EARS = (Ear(4096, 960, 96, 14_000.0), Ear(1024, 480, 48, 10_000.0), Ear(2048, 720, 80, 16_000.0))
"""Of the first listener, the second and so on; after the last one they begin again. For 48 kHz."""


@dataclass(frozen=True, kw_only=True)
class ListeningLesson(Lesson):
    """How a listener learns, and by which ear."""

    ear: Ear


class StyleListener(nn.Module):
    """Convolutions over bands and frames, mean and highest over time, a small embedding, one score per style."""

    window: Tensor
    matrix: Tensor  # [bands, bins]

    def __init__(self, sample_rate: int, styles: int, ear: Ear) -> None:
        super().__init__()
        self.ear = ear
        matrix = mel_matrix(sample_rate, ear.fft_size, ear.band_count, min(ear.highest_hz, sample_rate / 2.0))
        self.register_buffer("window", torch.hann_window(ear.fft_size), persistent=False)
        self.register_buffer("matrix", matrix, persistent=False)
        layers: list[nn.Module] = []
        channels, height = 1, len(matrix)
        for width, stride in zip(CHANNELS, (2, 2, 2, (2, 1)), strict=True):
            convolution = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            channels, height = width, (height + 1) // 2
        self.convolutions = nn.Sequential(*layers)
        self.embed = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(2 * channels * height, EMBEDDING))
        self.score = nn.Linear(EMBEDDING, styles)

    def power(self, audio: Tensor) -> Tensor:
        """audio [batch, samples] -> mel power [batch, bands, frames]."""
        spectrum = torch.stft(
            audio,
            self.ear.fft_size,
            self.ear.hop_samples,
            window=self.window,
            pad_mode="constant",
            return_complex=True,
        )
        return torch.matmul(self.matrix, spectrum.real.square() + spectrum.imag.square())

    def judge_power(self, power: Tensor) -> Tensor:
        """Mel power [batch, bands, frames], at any level -> scores [batch, styles]."""
        x = self.convolutions(normalise(power)).flatten(1, 2)
        return self.score(self.embed(torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1)))

    def forward(self, audio: Tensor, random: torch.Generator) -> Tensor:
        """audio [batch, samples] -> scores [batch, styles]; most rows are heard as if played elsewhere."""
        power = self.power(audio)
        coloured = torch.rand(len(power), 1, 1, generator=random, device=power.device) < COLOURED_SHARE
        return self.judge_power(torch.where(coloured, played_elsewhere(power, random, EQUALISER_DB), power))


@dataclass(frozen=True)
class Material:
    """What a style is learned from: recordings, phrases played on their notes, if there are any; and what tests it."""

    row: int  # of the style, in ``phrases``
    recordings: Sequence[Recording]
    unheard: Sequence[Recording]
    phrases: PhraseSampler | None = None

    def draw(self, lesson: ListeningLesson, random: np.random.Generator, sample_rate: int) -> NDArray[np.float32]:
        """[EXCERPT_SECONDS] to learn from."""
        samples = round(EXCERPT_SECONDS * sample_rate)
        if self.phrases is not None and self.row in self.phrases and random.uniform() < PLAYED_SHARE:
            speed = 2.0 ** (random.uniform(-PLAYED_SEMITONES, PLAYED_SEMITONES) / 12.0)
            played = self.phrases.draw(self.row, round(samples * speed), random)
            place = np.linspace(0.0, len(played) - 1.0, samples)
            # Straight lines between samples are enough for ears that hear hiss with everything.
            phrase = np.interp(place, np.arange(len(played)), played).astype(np.float32)
        else:
            phrase = draw_phrase(self.recordings, RecogniserConfig(), random, sample_rate)
        if random.uniform() < lesson.room_chance:
            phrase = in_a_room(phrase, random, sample_rate)
        return phrase


def teach(
    styles: Sequence[Material],
    sample_rate: int,
    lesson: ListeningLesson,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[StyleListener, float]:
    """A listener of ``styles``, and the share of phrases of unheard recordings that it takes for their style.

    The share is the mean of the styles; NaN without recordings to test on.
    """
    random = np.random.default_rng([lesson.seed, 13])
    generator = torch.Generator().manual_seed(lesson.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lesson.seed)
        listener = StyleListener(sample_rate, len(styles), lesson.ear)
        heard: list[Tensor] = []
        count = lesson.phrases_per_style * len(styles)
        for number in range(count):
            phrase = styles[number % len(styles)].draw(lesson, random, sample_rate)
            power = listener.power(torch.from_numpy(phrase)[None])
            heard.append((power * (LOUDEST / power.amax().clamp_min(1e-12))).half())
            if progress and number % 16 == 15:
                progress("laying phrases for a listener", number + 1, count)
        labels = torch.arange(count) % len(styles)
        steps = lesson.passes * lesson.rounds(count)
        told = progress and (lambda done: progress("training a listener", done, steps))

        def loss_of(power: Tensor, rows: Tensor) -> Tensor:
            scores = listener.judge_power(played_elsewhere(power, generator, EQUALISER_DB))
            return nn.functional.cross_entropy(scores, labels[rows], label_smoothing=LABEL_SMOOTHING)

        learn(listener, torch.cat(heard), lesson, loss_of, generator, told)
    listener.eval().requires_grad_(False)

    def known(phrases: Tensor, style: Tensor) -> Tensor:
        return hit_rate(listener.judge_power(listener.power(phrases)), style)

    return listener, known_phrases([style.unheard for style in styles], sample_rate, lesson, random, known)


def load_or_teach(
    styles: Sequence[Material],
    sample_rate: int,
    lesson: ListeningLesson,
    cache_folder: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[StyleListener, float]:
    """What ``teach`` makes, from the cache if it was made before of the same sounds by this code."""
    content = [
        [
            [[recording.audio_sha256 for recording in group] for group in (style.recordings, style.unheard)],
            style.phrases.names(style.row) if style.phrases is not None else [],
        ]
        for style in styles
    ]
    listener, known = taught_once(
        cache_folder,
        "listener",
        ((__file__, str(classifier.__file__), str(recogniser.__file__)), [repr(lesson), sample_rate, content]),
        lambda: StyleListener(sample_rate, len(styles), lesson.ear),
        lambda: teach(styles, sample_rate, lesson, progress),
    )
    return listener.eval().requires_grad_(False), known
