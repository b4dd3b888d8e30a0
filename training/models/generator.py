"""The style-conditioned causal generator: gains for what comes in and for excitations made from it.

Four signals are analysed: the input; the input driven hard (odd harmonics); a pulse per period made from its low end
(a full harmonic series even under a dull or pure tone); and noise. All scale with the
input's own level, so silence in is silence out and loudness follows the playing. A recurrent body, steered by the
style vector, sets one smooth gain curve per signal and hop; the filtered spectra add up to the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from realtime.spectral import SpectralSpec
from training.layers import (
    CausalFir,
    Envelope,
    EnvelopeState,
    FirState,
    Framer,
    FramerState,
    Gru,
    GruState,
    Noise,
    NoiseState,
    OverlapAdd,
    OverlapAddState,
    RealDft,
    whole_hops,
)

SIGNALS = ("input", "driven", "pulses", "noise")


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of the generator; the defaults are the shipped model's."""

    style_dim: int = 16
    band_count: int = 64
    hidden: int = 192
    drive: float = 8.0
    pulse_sharpness: float = 4.0
    lowpass_taps: int = 128
    lowpass_pole: float = 0.9
    envelope_hops: int = 4

    def __post_init__(self) -> None:
        for field in ("style_dim", "band_count", "hidden", "lowpass_taps", "envelope_hops"):
            if getattr(self, field) < 2:
                raise ValueError(f"model.{field}: must be at least 2, got {getattr(self, field)}")
        if not 0.0 < self.lowpass_pole < 1.0:
            raise ValueError(f"model.lowpass_pole: must lie between 0 and 1, got {self.lowpass_pole:g}")
        if not self.drive > 0.0:
            raise ValueError(f"model.drive: must be above 0, got {self.drive:g}")


@dataclass(frozen=True)
class GeneratorState:
    lowpass: FirState
    envelope: EnvelopeState
    noise: NoiseState
    framer: FramerState
    first: GruState
    second: GruState
    overlap: OverlapAddState


def band_matrix(band_count: int, frequencies_hz: np.ndarray) -> np.ndarray:
    """Triangles [band_count, bins] that add up to one at every frequency, spaced evenly on the mel scale.

    The lowest and highest band reach to the ends. Mel scale: O'Shaughnessy, Speech Communication, 1987, p. 150.
    """
    mel = 2595.0 * np.log10(1.0 + frequencies_hz / 700.0)
    centres = np.linspace(mel.min() + 20.0, mel.max(), band_count)
    eye = np.eye(band_count)
    return np.stack([np.interp(mel, centres, row) for row in eye])


class Generator(nn.Module):
    """audio and style in, audio out, one hop of ``stream_delay_samples`` later; see the module's text."""

    measure: Tensor  # [bins, bands]
    spread: Tensor  # [bands, bins]

    def __init__(self, spec: SpectralSpec, config: GeneratorConfig) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        self.latency_samples = spec.stream_delay_samples
        hop, hidden = spec.hop_samples, config.hidden
        self.lowpass = CausalFir(1, config.lowpass_taps, config.lowpass_pole)
        self.envelope = Envelope(2, hop, config.envelope_hops)
        self.noise = Noise(hop)
        self.framer = Framer(spec.analysis_window_samples, hop, len(SIGNALS))
        self.dft = RealDft(spec)
        self.overlap = OverlapAdd(hop)
        bands = band_matrix(config.band_count, self.dft.frequencies_hz.reshape(-1))  # [bands, bins]
        weighted = bands * self.dft.weights.reshape(-1)
        measure = (weighted / weighted.sum(axis=1, keepdims=True)).T
        self.register_buffer("measure", torch.tensor(measure, dtype=torch.float32), persistent=False)
        self.register_buffer("spread", torch.tensor(bands, dtype=torch.float32), persistent=False)
        self.enter = nn.Linear(config.band_count + 1, hidden)
        self.first = Gru(hidden, hidden)
        self.second = Gru(hidden, hidden)
        self.steer = nn.Linear(config.style_dim, 2 * 3 * hidden)
        self.leave = nn.Linear(hidden, len(SIGNALS) * config.band_count)
        with torch.no_grad():
            self.leave.weight.mul_(0.1)
            self.leave.bias.copy_(torch.tensor([0.0, -4.0, -4.0, -5.0]).repeat_interleave(config.band_count))

    def init_state(self, batch: int) -> GeneratorState:
        return GeneratorState(
            lowpass=self.lowpass.init_state(batch),
            envelope=self.envelope.init_state(batch),
            noise=self.noise.init_state(batch),
            framer=self.framer.init_state(batch),
            first=self.first.init_state(batch),
            second=self.second.init_state(batch),
            overlap=self.overlap.init_state(batch),
        )

    def _signals(self, audio: Tensor, state: GeneratorState) -> tuple[Tensor, FirState, EnvelopeState, NoiseState]:
        """audio [batch, time] -> the signals to be filtered [batch, signals, time]."""
        low, lowpass = self.lowpass(audio[:, None], state.lowpass)
        level, envelope = self.envelope(torch.cat([audio[:, None], low], dim=1), state.envelope)
        noise, counter = self.noise(audio, state.noise)
        whole_level, low_level = level[:, 0], level[:, 1]
        driven = whole_level * torch.tanh(self.config.drive * audio / whole_level)
        height = (low[:, 0] / (1.5 * low_level)).clamp(-1.2, 1.2)
        pulses = low_level * torch.exp(self.config.pulse_sharpness * (height - 1.0))
        # The floor of the level must not make noise out of silence.
        audible = (whole_level - 1e-5).clamp_min(0.0)
        signals = torch.stack([audio, driven, pulses, audible * noise], dim=1)
        return signals, lowpass, envelope, counter

    def forward(self, audio: Tensor, style: Tensor, state: GeneratorState) -> tuple[Tensor, GeneratorState]:
        """audio [batch, n*hop], style [batch, style_dim] -> audio [batch, n*hop] and the state after it."""
        hops = whole_hops(audio.shape[-1], self.spec.hop_samples, "Generator")
        batch, bands, m, rows = audio.shape[0], self.config.band_count, self.dft.radix, self.dft.rows
        signals, lowpass, envelope, counter = self._signals(audio, state)
        frames, framer = self.framer(signals, state.framer)
        spectra = self.dft(frames).reshape(-1, len(SIGNALS), rows, 2, m)  # [batch*n, signals, k1, re|im, k2]

        power = spectra[:, 0].square().sum(dim=2).flatten(1)
        # Bands 60 dB under the frame are lost in float32 rounding, which differs from machine to machine.
        floor = 1e-6 * power.mean(dim=-1, keepdim=True)
        levels = torch.log((torch.matmul(power, self.measure) + floor).clamp_min(1e-9))  # [batch*n, bands]
        mean = levels.mean(dim=-1, keepdim=True)
        heard = torch.cat([(levels - mean) * 0.4, (mean + 4.0) * 0.15], dim=-1)
        scale1, shift1, scale2, shift2, scale3, shift3 = self.steer(style).chunk(6, dim=-1)
        x = self.enter(heard.reshape(batch, hops, bands + 1).transpose(0, 1))  # [n, batch, hidden]
        x = torch.nn.functional.leaky_relu(x * (1 + scale1) + shift1, 0.1)
        y, first = self.first(x, state.first)
        x = x + y * (1 + scale2) + shift2
        y, second = self.second(x, state.second)
        x = torch.nn.functional.leaky_relu((x + y) * (1 + scale3) + shift3, 0.1)
        curves = self.leave(x).clamp(-9.0, 3.5).transpose(0, 1).reshape(-1, len(SIGNALS), bands)
        gains = torch.exp(torch.matmul(curves, self.spread)).reshape(-1, len(SIGNALS), rows, 1, m)
        mixed = (spectra * gains).sum(dim=1).reshape(-1, rows, 2 * m)

        tails = self.dft.inverse(mixed).reshape(batch, hops, -1)
        out, overlap = self.overlap(tails, state.overlap)
        return out, GeneratorState(lowpass, envelope, counter, framer, first, second, overlap)
