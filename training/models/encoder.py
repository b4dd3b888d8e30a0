"""The style encoder: seconds of audio in, a style vector out; trained with the generator that reads the vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.models.spectrogram import RelativeMel

CLIP_SAMPLES = 61_440  # 1.28 s at 48 kHz: what an exported encoder hears at a time, as long as in training
FFT_SIZE, BANDS = 1024, 64
CHANNELS = (32, 48, 64)


class StyleEncoder(nn.Module):
    """Convolutions over a mel spectrogram, then mean and spread over time: the same whatever is played when.

    Mean and spread: statistics pooling, Snyder et al., "X-vectors", 2018, section 2.1.
    """

    def __init__(self, sample_rate: int, style_dim: int) -> None:
        super().__init__()
        self.sample_rate = sample_rate
        self.mel = RelativeMel(sample_rate, FFT_SIZE, BANDS)
        layers, channels, height = [], 1, self.mel.band_count
        for width in CHANNELS:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
            channels, height = width, (height + 1) // 2
        self.convolutions = nn.Sequential(*layers)
        self.leave = nn.Sequential(nn.Linear(2 * channels * height, 128), nn.LeakyReLU(0.2), nn.Linear(128, style_dim))

    def forward(self, audio: Tensor) -> Tensor:
        """audio [batch, samples], a second or more -> style vectors [batch, style_dim]."""
        x = self.convolutions(self.mel(audio)).flatten(1, 2)  # [batch, features, places]
        # A floor, not a sum: the root of zero has no gradient.
        spread = x.var(dim=2, unbiased=False).clamp_min(1e-6).sqrt()
        return self.leave(torch.cat([x.mean(dim=2), spread], dim=1))
