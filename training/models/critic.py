"""The adversary: does this sound like a real recording of that style?

Multi-resolution spectrogram discriminators after Jang et al., "UnivNet", 2021, section 2.3, with one output per style
as Choi et al., "StarGAN v2", 2020, section 3.1. Real recordings of the other styles count as false here too (Reed et
al., "Generative adversarial text to image synthesis", 2016, section 4.2), so the critic must know the style and not
only tell real from made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from training.models.spectrogram import RelativeMel

RESOLUTIONS = ((512, 48), (2048, 96))  # FFT size, mel bands
CHANNELS = (24, 48, 64, 96)


@dataclass(frozen=True)
class Verdict:
    """What a critic says: a score per style and place in time, and its layers' outputs, for each resolution."""

    scores: tuple[Tensor, ...]  # [batch, styles, places]
    features: tuple[tuple[Tensor, ...], ...]


class SpectrogramCritic(nn.Module):
    """One resolution: strided convolutions over bands and frames, then one score per style and place in time."""

    def __init__(self, sample_rate: int, fft_size: int, bands: int, styles: int) -> None:
        super().__init__()
        self.mel = RelativeMel(sample_rate, fft_size, bands)
        layers, channels, height = [], 1, self.mel.band_count
        for width in CHANNELS:
            layers.append(weight_norm(nn.Conv2d(channels, width, 3, stride=2, padding=1)))
            channels, height = width, (height + 1) // 2
        self.layers = nn.ModuleList(layers)
        self.gather = weight_norm(nn.Conv2d(channels, channels, (height, 3), padding=(0, 1)))
        self.score = nn.Conv1d(channels, styles, 1)

    def forward(self, audio: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """audio [batch, samples] -> scores [batch, styles, places] and the layers' outputs."""
        x = self.mel(audio)
        heard = []
        for layer in self.layers:
            x = nn.functional.leaky_relu(layer(x), 0.2)
            heard.append(x)
        x = nn.functional.leaky_relu(self.gather(x), 0.2)[:, :, 0]
        return self.score(x), (*heard, x)


class Critic(nn.Module):
    """All resolutions."""

    def __init__(self, sample_rate: int, styles: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(SpectrogramCritic(sample_rate, size, bands, styles) for size, bands in RESOLUTIONS)

    def forward(self, audio: Tensor) -> Verdict:
        """audio [batch, samples] -> what each part says of it."""
        said = [part(audio) for part in self.parts]
        return Verdict(tuple(scores for scores, _ in said), tuple(features for _, features in said))


class Ratings(nn.Module):
    """A trained critic as a listener: how real each clip sounds in each style. Takes the critic's weight norm away."""

    def __init__(self, critic: Critic) -> None:
        super().__init__()
        for module in list(critic.modules()):
            if is_parametrized(module, "weight"):
                remove_parametrizations(module, "weight")
        self.critic = critic

    def forward(self, audio: Tensor) -> Tensor:
        """audio [clips, samples] -> [clips, styles], the mean score over places and resolutions; higher is nearer."""
        return torch.stack([scores.mean(dim=2) for scores in self.critic(audio).scores]).mean(dim=0)


def _of_style(scores: Tensor, style: Tensor) -> Tensor:
    """Scores [batch, styles, places] -> those of each row's own style [batch, places]."""
    return scores[torch.arange(len(style), device=style.device), style]


@dataclass(frozen=True)
class AdversarialLoss:
    """What scores cost: ``true`` of what should be taken for real, ``false`` of what should not, both for the critic,
    and ``deceiving`` of what a generator made. Each takes and gives scores of any shape."""

    true: Callable[[Tensor], Tensor]
    false: Callable[[Tensor], Tensor]
    deceiving: Callable[[Tensor], Tensor]


COSTS = {
    # Lim and Ye, "Geometric GAN", 2017, eq. 11.
    "hinge": AdversarialLoss(lambda s: torch.relu(1.0 - s), lambda s: torch.relu(1.0 + s), lambda s: -s),
    # Mao et al., "Least squares generative adversarial networks", 2017, eq. 9: 0 is false, 1 is true.
    "least_squares": AdversarialLoss(lambda s: (s - 1.0).square(), torch.square, lambda s: (s - 1.0).square()),
    # Binary cross entropy of scores as logits, the generator's without saturation: Goodfellow et al., "Generative
    # adversarial nets", 2014, section 3.
    "bce": AdversarialLoss(
        lambda s: nn.functional.softplus(-s), nn.functional.softplus, lambda s: nn.functional.softplus(-s)
    ),
}


def critic_loss(real: Verdict, real_style: Tensor, made: Verdict, made_style: Tensor, kind: str = "hinge") -> Tensor:
    """What the critic lowers over real and made sounds: one value per row [batch]; ``kind`` in COSTS.

    A real recording should be true for its style and false for all others, a made one false for the style meant.
    """
    cost, losses = COSTS[kind], []
    for heard, faked in zip(real.scores, made.scores, strict=True):
        own = cost.true(_of_style(heard, real_style))
        others = cost.false(heard)
        others = (others.sum(dim=1) - _of_style(others, real_style)) / max(1, heard.shape[1] - 1)
        fake = cost.false(_of_style(faked, made_style))
        losses.append((own + others + fake).mean(dim=1))
    return torch.stack(losses).mean(dim=0)


def deception_loss(made: Verdict, style: Tensor, kind: str = "hinge") -> Tensor:
    """What a generator lowers to be taken for a real sound of the style meant: one value per row [batch]."""
    cost = COSTS[kind].deceiving
    return torch.stack([cost(_of_style(scores, style)).mean(dim=1) for scores in made.scores]).mean(dim=0)


def feature_loss(made: Verdict, real: Verdict) -> Tensor:
    """Mean distance of the layers' outputs, each against its own size: one value per row [batch].

    Feature matching: Kumar et al., "MelGAN", 2019, eq. 4.
    """
    distances = []
    for ours, theirs in zip(made.features, real.features, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            size = b.detach().abs().mean().clamp_min(1e-3)
            distances.append((a - b.detach()).abs().flatten(1).mean(dim=1) / size)
    return torch.stack(distances).mean(dim=0)
