"""The style classifier: which style is this second of sound? It tells a generator which way each style lies.

It learns from real recordings only and never from what a generator made, so it learns the styles and not a
generator's faults; those are the critic's. A classifier beside a critic: Choi et al., "StarGAN", 2018, section 3.1.
What it hears is coloured anew each time, so no side can rely on a room, a microphone or a hiss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.models.spectrogram import RelativeMelPower

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


def played_elsewhere(power: Tensor, random: torch.Generator) -> Tensor:
    """Mel power [batch, bands, frames] through a random equaliser, on random hiss: the same shape."""
    batch, bands, _ = power.shape
    knots = _uniform(random, -EQUALISER_DB, EQUALISER_DB, batch, 1, EQUALISER_KNOTS)
    curve = nn.functional.interpolate(knots, size=bands, mode="linear", align_corners=True)
    cutoff = _uniform(random, 0.6, 1.6, batch, 1, 1) * bands
    beyond = (torch.arange(bands, device=power.device) - cutoff).clamp_min(0.0)
    power = power * 10.0 ** ((curve - 1.5 * beyond).transpose(1, 2) / 10.0)
    loudest = power.detach().amax(dim=(1, 2), keepdim=True)
    grain = -torch.log(torch.rand(power.shape, generator=random, device=power.device).clamp_min(1e-6))
    return power + loudest * 10.0 ** (_uniform(random, *FLOOR_DB, batch, 1, 1) / 10.0) * grain


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
    decibels = 10.0 * torch.log10(power.clamp_min(1e-12))
    relative = decibels - decibels.amax(dim=(1, 2), keepdim=True)
    seen = (1.0 + 2.0 * relative / RANGE_DB).clamp_min(-1.0)
    hidden = hidden_stretch(batch, bands, random)[:, :, None] | hidden_stretch(batch, frames, random)[:, None]
    return seen.masked_fill(hidden, -1.0)[:, None]


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

    def forward(self, audio: Tensor, random: torch.Generator) -> Tensor:
        """audio [batch, samples] -> scores [batch, styles]; colours and what is dropped are drawn from ``random``."""
        x = self.convolutions(coloured(self.power(audio), random)).flatten(1, 2)  # [batch, features, places]
        x = torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1)
        kept = torch.rand(x.shape, generator=random, device=x.device) >= DROPOUT
        return self.score(x * kept / (1.0 - DROPOUT))


class StyleClassifier(nn.Module):
    """All resolutions, each with an opinion of its own."""

    def __init__(self, sample_rate: int, styles: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            SpectrogramClassifier(sample_rate, size, bands, styles) for size, bands in RESOLUTIONS
        )

    def forward(self, audio: Tensor, random: torch.Generator) -> Tensor:
        """audio [batch, samples] -> scores [parts, batch, styles]."""
        return torch.stack([part(audio, random) for part in self.parts])


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
