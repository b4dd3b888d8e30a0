"""The style-conditioned causal generator: gains for what comes in and for excitations made from it.

Four signals are analysed: the input; the input driven hard (odd harmonics); a pulse per period made from its low end
(a full harmonic series even under a dull or pure tone); and noise. All scale with the
input's own level, so silence in is silence out and loudness follows the playing. A recurrent body, steered by the
style vector, sets one smooth gain curve per signal and hop; the filtered signals add up to the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from realtime.spectral import SpectralSpec
from training.layers import (
    Envelope,
    EnvelopeState,
    FilterBank,
    FilterBankState,
    Framer,
    FramerState,
    Gru,
    GruState,
    HopLowpass,
    Noise,
    NoiseState,
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
    lowpass_taps: int = 64
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
    framer: FramerState
    envelope: EnvelopeState
    noise: NoiseState
    made: FramerState
    body: GruState
    bank: FilterBankState


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

    window: Tensor  # [window]
    measure: Tensor  # [bins, bands]
    normalise: Tensor  # [bands + 1, bands]

    def __init__(self, spec: SpectralSpec, config: GeneratorConfig) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        hop, window, hidden, bands = spec.hop_samples, spec.analysis_window_samples, config.hidden, config.band_count
        self.framer = Framer(window, hop, 1)
        self.lowpass = HopLowpass(hop, config.lowpass_taps, config.lowpass_pole)
        if self.lowpass.span_samples > window:
            raise ValueError(f"model.lowpass_taps: must be at most {window - hop + 1}, got {config.lowpass_taps}")
        analysis = spec.analysis_window()
        self.envelope = Envelope(analysis, hop, config.envelope_hops * hop)
        self.noise = Noise(hop)
        self.made = Framer(window, hop, len(SIGNALS) - 1)
        self.dft = RealDft(spec)
        matrix = band_matrix(bands, np.fft.rfftfreq(window, 1.0 / spec.sample_rate))
        self.bank = FilterBank(spec, self.dft, len(SIGNALS), matrix)
        self.latency_samples = self.bank.latency_samples
        weighted = band_matrix(bands, self.dft.frequencies_hz.reshape(-1)) * self.dft.weights.reshape(-1)
        # Bands 60 dB under the frame are lost in float32 rounding, which differs from machine to machine: every band
        # hears that much of the whole.
        measure = (weighted / weighted.sum(axis=1, keepdims=True)).T + 1e-6 / weighted.shape[1]
        # Levels of the bands against their mean, and the mean, both brought to about unit size.
        normalise = np.concatenate([0.4 * (np.eye(bands) - 1.0 / bands), np.full((1, bands), 0.15 / bands)])
        for name, value in {"window": analysis, "measure": measure, "normalise": normalise}.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32), persistent=False)
        self.enter = nn.Linear(bands + 1, hidden)
        self.body = Gru(hidden, hidden)
        self.steer = nn.Linear(config.style_dim, 2 * 2 * hidden)
        self.leave = nn.Linear(hidden, len(SIGNALS) * bands)
        with torch.no_grad():
            self.steer.bias.copy_(torch.tensor([1.0, 0.0] * 2).repeat_interleave(hidden))
            self.leave.weight.mul_(0.1)
            self.leave.bias.copy_(torch.tensor([0.0, -4.0, -4.0, -5.0]).repeat_interleave(bands))

    def init_state(self, batch: int) -> GeneratorState:
        return GeneratorState(
            framer=self.framer.init_state(batch),
            envelope=self.envelope.init_state(batch),
            noise=self.noise.init_state(batch),
            made=self.made.init_state(batch),
            body=self.body.init_state(batch),
            bank=self.bank.init_state(batch),
        )

    def _excite(
        self, audio: Tensor, frames: Tensor, low: Tensor, envelope: EnvelopeState, noise: NoiseState
    ) -> tuple[Tensor, EnvelopeState, NoiseState]:
        """audio and its low end [batch, time], frames [batch, n, window] -> what is made [batch, signals - 1, time]."""
        level, envelope = self.envelope(frames, envelope)
        level = level[:, None]
        white, noise = self.noise(audio, noise)
        scaled = torch.stack([audio, low], dim=1) / level
        driven = torch.tanh(self.config.drive * scaled[:, :1])
        pulses = torch.exp((scaled[:, 1:] * (self.config.pulse_sharpness / 1.5)).clamp_max(self.config.pulse_sharpness))
        # The floor of the level must not make noise out of silence.
        audible = (level - 1e-5).clamp_min(0.0)
        made = torch.cat([driven, pulses * np.exp(-self.config.pulse_sharpness), white[:, None]], dim=1)
        return made * audible, envelope, noise

    def forward(self, audio: Tensor, style: Tensor, state: GeneratorState) -> tuple[Tensor, GeneratorState]:
        """audio [batch, n*hop], style [batch, style_dim] -> audio [batch, n*hop] and the state after it."""
        hops = whole_hops(audio.shape[-1], self.spec.hop_samples, "Generator")
        batch, signals = audio.shape[0], len(SIGNALS)
        frames, framer = self.framer(audio[:, None], state.framer)  # [batch, n, 1, window]
        low = self.lowpass(frames[:, :, 0])
        excitations, envelope, noise = self._excite(audio, frames[:, :, 0], low, state.envelope, state.noise)
        made, made_state = self.made(excitations, state.made)
        spectra = self.dft(torch.cat([frames * self.window, frames, made], dim=2))
        heard, spectra = spectra.reshape(batch, hops, signals + 1, 2, -1).split([1, signals], dim=2)

        gains, body = self.decide(heard[:, :, 0], style, state.body)
        out, bank = self.bank(spectra, gains, state.bank)
        return out, GeneratorState(framer, envelope, noise, made_state, body, bank)

    def decide(self, heard: Tensor, style: Tensor, state: GruState) -> tuple[Tensor, GruState]:
        """Spectra of the windowed input [batch, n, re|im, bins] -> gains at hop ends [batch, n, signals, bands]."""
        batch, hops = heard.shape[:2]
        power = heard.square().sum(dim=2)  # [batch, n, bins]
        # A floor, not a sum: onnxruntime takes the addition of so small a number for none at all and drops it.
        levels = torch.log(torch.matmul(power, self.measure).clamp_min(1e-9))
        scale1, shift1, scale2, shift2 = self.steer(style).chunk(4, dim=-1)
        x = torch.nn.functional.linear(
            levels.transpose(0, 1),  # [n, batch, bands]
            torch.matmul(self.enter.weight, self.normalise),
            self.enter.bias + 0.6 * self.enter.weight[:, -1],
        )
        x = torch.nn.functional.leaky_relu(x * scale1 + shift1, 0.1)
        y, body = self.body(x, state)
        x = torch.nn.functional.leaky_relu((x + y) * scale2 + shift2, 0.1)
        gains = torch.exp(self.leave(x).clamp(-9.0, 3.5)).transpose(0, 1)
        return gains.reshape(batch, hops, len(SIGNALS), self.config.band_count), body
