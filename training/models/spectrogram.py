"""Mel spectrograms as small networks hear them: the same at every level, with a floor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.losses import mel_matrix

SILENCE_POWER = 1e-9  # mean square; -90 dBFS
FLOOR_BELOW_MEAN = 1e-5  # -50 dB: what lies below is room and hiss, not timbre


class RelativeMelPower(nn.Module):
    """Mel power over the mean power of the whole excerpt, so that loudness is not heard."""

    window: Tensor
    matrix: Tensor  # [bands, bins]

    def __init__(self, sample_rate: int, fft_size: int, bands: int) -> None:
        super().__init__()
        self.fft_size = fft_size
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)
        self.register_buffer("matrix", mel_matrix(sample_rate, fft_size, bands), persistent=False)

    @property
    def band_count(self) -> int:
        """Bands that hold at least one bin; narrow ones at low frequencies are left out."""
        return self.matrix.shape[0]

    def forward(self, audio: Tensor) -> Tensor:
        """audio [batch, samples] -> [batch, bands, frames]; hop is a quarter of ``fft_size``."""
        spectrum = torch.stft(
            audio,
            self.fft_size,
            self.fft_size // 4,
            window=self.window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        power = (spectrum.real.square() + spectrum.imag.square()) / self.window.sum().square()
        mel = torch.matmul(self.matrix, power)
        return mel / mel.mean(dim=(1, 2), keepdim=True).clamp_min(SILENCE_POWER / mel.shape[1])


class RelativeMel(RelativeMelPower):
    """Natural log of it."""

    def forward(self, audio: Tensor) -> Tensor:
        """audio [batch, samples] -> [batch, 1, bands, frames], about zero mean."""
        return (0.25 * torch.log(super().forward(audio) + FLOOR_BELOW_MEAN) + 1.0)[:, None]
