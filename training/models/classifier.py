"""The style classifier: which style is this second of sound? It tells a generator which way each style lies.

It learns from real recordings only and never from what a generator made, so it learns the styles and not a
generator's faults; those are the critic's. A classifier beside a critic: Choi et al., "StarGAN", 2018, section 3.1.
What it hears is coloured anew each time, so no side can rely on a room, a microphone or a hiss. It learns beside the
generator, or before it from thousands of phrases laid from recordings, and then stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from training.augment import at_places
from training.library import Recording
from training.models import recogniser
from training.models.recogniser import RecogniserConfig, draw_phrase, in_a_room
from training.models.spectrogram import RelativeMelPower
from training.models.teaching import Lesson, known_phrases, learn, taught_once

RESOLUTIONS = ((1024, 64), (4096, 112), (2048, 80))  # FFT size, mel bands
CHANNELS = (24, 48, 64, 80)
NORM_GROUPS = 8
EQUALISER_DB, EQUALISER_KNOTS = 6.0, 8  # gains up to so much at so many places, evenly over the bands
FLOOR_DB = (-75.0, -30.0)  # hiss, against the loudest place
RANGE_DB = 60.0  # what lies further below the loudest place is not heard
HIDDEN_SHARE = 0.15  # of the bands in one stretch, and of the frames in another, at most
DROPOUT = 0.2
LABEL_SMOOTHING = 0.05


def _uniform(random: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=random, device=random.device)


def played_elsewhere(power: Tensor, random: torch.Generator, equaliser_db: float = EQUALISER_DB) -> Tensor:
    """Mel power [batch, bands, frames] through a random equaliser, on random hiss: the same shape."""
    batch, bands, _ = power.shape
    knots = _uniform(random, -equaliser_db, equaliser_db, batch, 1, EQUALISER_KNOTS)
    curve = nn.functional.interpolate(knots, size=bands, mode="linear", align_corners=True)
    cutoff = _uniform(random, 0.6, 1.6, batch, 1, 1) * bands
    beyond = (torch.arange(bands, device=power.device) - cutoff).clamp_min(0.0)
    power = power * 10.0 ** ((curve - 1.5 * beyond).transpose(1, 2) / 10.0)
    loudest = power.detach().amax(dim=(1, 2), keepdim=True)
    grain = -torch.log(torch.rand(power.shape, generator=random, device=power.device).clamp_min(1e-6))
    return power + loudest * 10.0 ** (_uniform(random, *FLOOR_DB, batch, 1, 1) / 10.0) * grain


def at_other_speeds(audio: Tensor, semitones: float, random: torch.Generator) -> Tensor:
    """audio [batch, samples], each row at another tape speed, up to so much slower or faster: [batch, fewer samples].

    Straight lines between samples are enough for ears that hear hiss with everything.
    """
    batch, samples = audio.shape
    speeds = 2.0 ** (_uniform(random, -semitones, semitones, batch, 1) / 12.0)
    heard = int((samples - 1) / 2.0 ** (semitones / 12.0))
    spare = samples - 1 - (heard - 1) * speeds
    place = _uniform(random, 0.0, 1.0, batch, 1) * spare + torch.arange(heard, device=audio.device) * speeds
    return at_places(audio, place)


def hidden_stretch(batch: int, count: int, random: torch.Generator) -> Tensor:
    """[batch, count]: true in one stretch of each row, of up to HIDDEN_SHARE of it.

    So that every part of a sound has to tell its style (Park et al., "SpecAugment", 2019).
    """
    width = _uniform(random, 0.0, HIDDEN_SHARE * count, batch, 1)
    start = _uniform(random, 0.0, 1.0, batch, 1) * (count - width)
    place = torch.arange(count, device=random.device)
    return (place >= start) & (place < start + width)


def coloured(power: Tensor, random: torch.Generator) -> Tensor:
    """Mel power [batch, bands, frames] as if played elsewhere -> [batch, 1, bands, frames].

    The result is in RANGE_DB below the loudest place: 1 there, -1 at the lowest that is heard. A stretch of bands and
    one of frames are silenced.
    """
    batch, bands, frames = power.shape
    power = played_elsewhere(power, random)
    # Against the loudest place first, so that the logarithm's floor lies below RANGE_DB however quiet all of it is.
    power = power / power.detach().amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    decibels = 10.0 * torch.log10(power.clamp_min(1e-12))
    relative = decibels - decibels.amax(dim=(1, 2), keepdim=True)
    seen = (1.0 + 2.0 * relative / RANGE_DB).clamp_min(-1.0)
    hidden = hidden_stretch(batch, bands, random)[:, :, None] | hidden_stretch(batch, frames, random)[:, None]
    return seen.masked_fill(hidden, -1.0)[:, None]


class Opinion(NamedTuple):
    """What the parts of a classifier that were asked say, and their numbers: ``undropped`` are scores as well, of the
    same colours, with no feature dropped."""

    scores: Tensor  # [parts, batch, styles]
    undropped: Tensor  # [parts, batch, styles]
    parts: tuple[int, ...]


class SpectrogramClassifier(nn.Module):
    """One resolution: convolutions over bands and frames, mean and highest over time, one score per style."""

    def __init__(self, sample_rate: int, fft_size: int, bands: int, styles: int) -> None:
        super().__init__()
        self.power = RelativeMelPower(sample_rate, fft_size, bands)
        layers: list[nn.Module] = []
        channels, height = 1, self.power.band_count
        for width in CHANNELS:
            layers += [
                nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(NORM_GROUPS, width),
                nn.LeakyReLU(0.1),
            ]
            channels, height = width, (height + 1) // 2
        self.convolutions = nn.Sequential(*layers)
        self.score = nn.Linear(2 * channels * height, styles)

    def forward(self, audio: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """audio [batch, samples] -> scores [batch, styles], some features dropped and none, as in ``Opinion``.

        Colours and what is dropped are drawn from ``random``.
        """
        return self.judge_seen(coloured(self.power(audio), random), random)

    def judge_seen(self, seen: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """What ``coloured`` made [batch, 1, bands, frames] -> as ``forward``."""
        x = self.convolutions(seen).flatten(1, 2)  # [batch, features, places]
        x = torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1)
        kept = torch.rand(x.shape, generator=random, device=x.device) >= DROPOUT
        return self.score(x * kept / (1.0 - DROPOUT)), self.score(x)


class StyleClassifier(nn.Module):
    """All resolutions, each with an opinion of its own, of one voice or of several that learned apart.

    What pleases one voice by a quirk does not please the next: of several, each resolution has one drawn each time.
    """

    def __init__(self, sample_rate: int, styles: int, voices: int = 1) -> None:
        super().__init__()
        self.voices = voices
        self.parts = nn.ModuleList(
            SpectrogramClassifier(sample_rate, size, bands, styles)
            for _ in range(voices)
            for size, bands in RESOLUTIONS
        )

    def forward(self, audio: Tensor, random: torch.Generator) -> Opinion:
        """audio [batch, samples] -> what one part for each resolution says of it."""
        count = len(RESOLUTIONS)
        drawn = [0] * count
        if self.voices > 1:
            drawn = torch.randint(self.voices, (count,), generator=random, device=random.device).tolist()
        parts = tuple(voice * count + at for at, voice in enumerate(drawn))
        scores, undropped = zip(*(self.parts[part](audio, random) for part in parts), strict=True)
        return Opinion(torch.stack(scores), torch.stack(undropped), parts)


def in_chorus(classifiers: Sequence[StyleClassifier], sample_rate: int, styles: int) -> StyleClassifier:
    """One classifier with the voices of all of them."""
    chorus = StyleClassifier(sample_rate, styles, sum(one.voices for one in classifiers))
    parts = [part for one in classifiers for part in one.parts]
    for ours, theirs in zip(chorus.parts, parts, strict=True):
        ours.load_state_dict(theirs.state_dict())
    return chorus


def style_loss(scores: Tensor, style: Tensor) -> Tensor:
    """Cross entropy of scores [parts, batch, styles] against the style meant [batch]: one value per row [batch]."""
    parts = scores.shape[0]
    losses = nn.functional.cross_entropy(
        scores.flatten(0, 1), style.repeat(parts), reduction="none", label_smoothing=LABEL_SMOOTHING
    )
    return losses.unflatten(0, (parts, -1)).mean(dim=0)


def hit_rate(scores: Tensor, style: Tensor) -> Tensor:
    """Share of scores [parts, batch, styles] that are highest for the style meant [batch]."""
    return (scores.argmax(dim=-1) == style).float().mean()


@dataclass(frozen=True, kw_only=True)
class Pretraining(Lesson):
    """How a classifier learns before a run."""

    attack_db: float = 0.0  # each place may be turned up or down by so much, the way that misleads most


def pretrain_classifier(
    styles: Sequence[tuple[Sequence[Recording], Sequence[Recording]]],
    sample_rate: int,
    config: Pretraining,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[StyleClassifier, float]:
    """A classifier of ``styles``, each the recordings that it learns from and others to test it on.

    With it, the share of test phrases that its parts take for their style, in the mean of parts and styles; NaN
    without recordings to test on.
    """
    random = np.random.default_rng([config.seed, 11])
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        classifier = StyleClassifier(sample_rate, len(styles))
    parts: list[SpectrogramClassifier] = list(classifier.parts)  # pyright: ignore[reportAssignmentType]
    pools, target = _laid_phrases(
        parts, [learned_from for learned_from, _ in styles], sample_rate, config, random, progress
    )
    steps = config.passes * config.rounds(len(target))
    for number, part in enumerate(parts):
        told = progress and (
            lambda done, at=number: progress("training the classifier", at * steps + done, steps * len(parts))
        )
        _teach(part, pools.pop(0), target, config, generator, told)
    colours = torch.Generator().manual_seed(config.seed)

    def known(phrases: Tensor, style: Tensor) -> Tensor:
        return hit_rate(classifier(phrases, colours).scores, style)

    return classifier, known_phrases([unheard for _, unheard in styles], sample_rate, config, random, known)


def _laid_phrases(
    parts: Sequence[SpectrogramClassifier],
    styles: Sequence[Sequence[Recording]],
    sample_rate: int,
    config: Pretraining,
    random: np.random.Generator,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[list[Tensor], Tensor]:
    """Phrases as each part hears them, mel power [phrases, bands, frames], and their styles [phrases]."""
    drawing = RecogniserConfig(seed=config.seed, room_chance=config.room_chance)
    pools: list[list[Tensor]] = [[] for _ in parts]
    labels: list[int] = []
    for _ in range(config.phrases_per_style):
        for label, recordings in enumerate(styles):
            phrase = draw_phrase(recordings, drawing, random, sample_rate)
            if random.uniform() < config.room_chance:
                phrase = in_a_room(phrase, random, sample_rate)
            for part, pool in zip(parts, pools, strict=True):
                pool.append(part.power(torch.from_numpy(phrase)[None]).half())
            labels.append(label)
            if progress and len(labels) % 16 == 0:
                progress("laying phrases for the classifier", len(labels), config.phrases_per_style * len(styles))
    return [torch.cat(pools.pop(0)) for _ in parts], torch.tensor(labels)  # each freed before the next


def _teach(
    part: SpectrogramClassifier,
    powers: Tensor,
    target: Tensor,
    config: Pretraining,
    generator: torch.Generator,
    progress: Callable[[int], None] | None,
) -> None:
    """Train one part on mel power [phrases, bands, frames] of the styles ``target`` [phrases]."""

    def loss_of(power: Tensor, rows: Tensor) -> Tensor:
        seen = coloured(power, generator)
        if config.attack_db:
            most = 2.0 * config.attack_db / RANGE_DB
            seen = attacked(lambda x: part.judge_seen(x, generator)[0], seen, target[rows], most, generator)
        scores, _ = part.judge_seen(seen, generator)
        return style_loss(scores[None], target[rows]).mean()

    learn(part, powers, config, loss_of, generator, progress)


def attacked(
    judge: Callable[[Tensor], Tensor], seen: Tensor, style: Tensor, most: float, generator: torch.Generator
) -> Tensor:
    """``seen`` with every place up to ``most`` off, so that ``judge`` is misled: one step from a random place.

    ``judge`` says scores [batch, styles] of what is seen. One that learned so cannot be pleased by quirks too small to
    hear, and the way that it points to a style leads through sounds that others take for it, too (Wong, Rice
    and Kolter, "Fast is better than free", 2020; Santurkar et al., "Image synthesis with a single (robust) classifier",
    2019).
    """
    offset = _uniform(generator, -most, most, *seen.shape).requires_grad_()
    (slope,) = torch.autograd.grad(style_loss(judge(seen + offset)[None], style).sum(), offset)
    return seen + (offset.detach() + 1.25 * most * slope.sign()).clamp(-most, most)


def load_or_pretrain(
    styles: Sequence[tuple[Sequence[Recording], Sequence[Recording]]],
    sample_rate: int,
    lessons: Sequence[Pretraining],
    cache_folder: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[StyleClassifier, float]:
    """What ``pretrain_classifier`` makes, from the cache if it was made before of the same recordings by this code.

    One voice for each of ``lessons``; the share is the mean of theirs.
    """
    pretrained: list[tuple[StyleClassifier, float]] = []
    for voice, config in enumerate(lessons):
        of = f" {voice + 1} of {len(lessons)}" if len(lessons) > 1 else ""
        told = progress and (lambda what, done, total, of=of: progress(what + of, done, total))
        pretrained.append(_load_or_pretrain_voice(styles, sample_rate, config, cache_folder, told))
    known = float(np.mean([share for _, share in pretrained]))
    return in_chorus([one for one, _ in pretrained], sample_rate, len(styles)), known


def _load_or_pretrain_voice(
    styles: Sequence[tuple[Sequence[Recording], Sequence[Recording]]],
    sample_rate: int,
    config: Pretraining,
    cache_folder: Path,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[StyleClassifier, float]:
    content = [[[recording.audio_sha256 for recording in group] for group in style] for style in styles]
    return taught_once(
        cache_folder,
        "classifier",
        ((__file__, str(recogniser.__file__)), [repr(config), sample_rate, content]),
        lambda: StyleClassifier(sample_rate, len(styles)),
        lambda: pretrain_classifier(styles, sample_rate, config, progress),
    )
