"""A pulse per period of what is played."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from realtime.spectral import SpectralSpec
from training.layers import Framer, FramerState, fade, neighbours

POLES = 6
CORNER_HZ = 180.0
TAPS = 641
LOWEST_HZ = 30.0


@dataclass(frozen=True)
class PeriodPulsesState:
    swing: FramerState  # [batch, swing|slope, window - hop]
    squared: Tensor  # [batch, 1]: of the period, in samples of a turn by one radian, at the end of the last hop


class PeriodPulses(nn.Module):
    """One pulse per period of the lowest partial, of the same shape at every pitch: all its partials up to a limit.

    A narrow low-pass leaves a swing that is nearly one sinusoid. Slope over swing tells how far the crest is,
    whatever the loudness; a bell of fixed width over that time is the pulse. The delay of the low-pass, 5 ms, is heard
    where the pitch changes and not where the level does, which comes from elsewhere.
    """

    latency_samples = 0
    matrix: Tensor  # [span, (swing|slope, hop)]
    weights: Tensor  # [window]
    fade: Tensor  # [before|after, hop]

    def __init__(self, spec: SpectralSpec, reach_hz: float) -> None:
        """``reach_hz``: where a pulse's spectrum is 4 dB down; at twice that it is 17 dB down."""
        super().__init__()
        hop, window, rate = spec.hop_samples, spec.analysis_window_samples, spec.sample_rate
        taps = min(TAPS, window - hop + 1)
        self.span_samples = taps - 1 + hop
        corner = 2.0 * np.pi * CORNER_HZ / rate
        at, n = corner * np.arange(taps), POLES - 1
        # The first two derivatives of the response of equal poles, t^n exp(-t): neither hears a constant.
        swing = at ** (n - 1) * (n - at) * np.exp(-at)
        slope = at ** (n - 2) * (n * (n - 1) - 2 * n * at + at**2) * np.exp(-at) * corner
        faded = np.ones(taps)
        faded[-(taps // 4) :] = np.cos(0.5 * np.pi * np.arange(taps // 4) / (taps // 4)) ** 2
        responses = faded * np.stack([swing, slope])
        # What the fading left of a constant is taken out again, smoothly: a jump would let high partials through.
        smooth = np.sin(np.pi * np.arange(taps) / taps) ** 2
        responses -= responses.sum(axis=1, keepdims=True) * smooth / smooth.sum()
        responses /= np.abs(np.fft.rfft(responses[0], 8 * taps)).max()
        matrix = np.zeros((self.span_samples, 2, hop))
        for column in range(hop):
            matrix[column : column + taps, :, column] = responses[:, ::-1].T
        weights = np.square(spec.analysis_window())
        self.framer = Framer(window, hop, 2)
        self.sharpness = 2.0 * np.pi * reach_hz / rate / np.sqrt(2.0)
        self.most = (rate / (2.0 * np.pi * LOWEST_HZ)) ** 2
        # Unit power: the square of a bell of height one is worth 1 / (2 sqrt(pi) reach) seconds in each period.
        self.height = np.sqrt(2.0 * np.sqrt(np.pi) * reach_hz * 2.0 * np.pi / rate)
        for name, value in {
            "matrix": matrix.reshape(-1, 2 * hop),
            "weights": weights / weights.sum(),
            "fade": fade(hop),
        }.items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32), persistent=False)

    def init_state(self, batch: int) -> PeriodPulsesState:
        return PeriodPulsesState(self.framer.init_state(batch), torch.zeros(batch, 1))

    def forward(self, frames: Tensor, state: PeriodPulsesState) -> tuple[Tensor, PeriodPulsesState]:
        """frames [batch, n, window] -> pulses of unit power [batch, n*hop], whatever the frames' level."""
        batch, hops = frames.shape[:2]
        moved = torch.matmul(frames[..., -self.span_samples :], self.matrix).reshape(batch, hops, 2, -1)
        moved = moved.transpose(1, 2).flatten(2)  # [batch, swing|slope, n*hop]
        seen, framer = self.framer(moved, state.swing)
        power = torch.matmul(seen.square(), self.weights)  # [batch, n, swing|slope]
        squared = (power[..., 0] / power[..., 1].clamp_min(1e-24)).clamp_max(self.most)
        ends = torch.cat([state.squared, squared], dim=1)
        squared = torch.matmul(neighbours(ends, hops), self.fade).flatten(1)
        early = moved[:, 1] * squared / moved[:, 0].clamp_min(1e-12)  # samples until the crest, infinite in troughs
        bell = torch.exp(-(early * self.sharpness).square())
        return bell * (squared.sqrt().sqrt() * self.height), PeriodPulsesState(framer, ends[:, -1:])
