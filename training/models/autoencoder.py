"""Audio to a compact code and back, causally: what the decoder plays, it plays from the code and the style alone.

Once per hop the encoder says pitch, periodicity, level and ``code_size`` learned numbers, each one of a few levels, so
the code has an exact bit rate. The decoder, steered by the style vector, sets the gains of two harmonic sources and of
noise at that pitch and level: Engel et al., "DDSP: Differentiable digital signal processing", 2020, section 3, with
filters of least phase in place of amplitudes of partials. A style is changed by decoding in another one.

The encoder computes in float64. Rounding to a level turns any difference into a whole step: torch and onnxruntime
differ by 1e-7 in float32, which would meet a border of levels within seconds; by 1e-15 it does so within years.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from realtime.spectral import SpectralSpec
from training.layers import (
    Envelope,
    FilterBank,
    FilterBankState,
    Framer,
    FramerState,
    Noise,
    NoiseState,
    RealDft,
    fade,
    neighbours,
    whole_hops,
)
from training.models.generator import (
    GAIN_RANGE,
    BodyState,
    GeneratorConfig,
    SteeredBody,
    band_matrix,
    band_measure,
)

LOWEST_PITCH_HZ, PITCHES_PER_OCTAVE, PITCH_LEVELS = 65.0, 100, 512
CANDIDATE_STEP = 4  # every so many pitches one is looked at; those between are where a parabola has its lowest point
HIGHEST_HEARD_HZ = 2000.0  # partials above say little of the pitch
PERIODICITY_LEVELS = 8
LEVEL_LEVELS, LEVEL_STEP_DB = 256, 0.375  # from full scale down; the lowest is silence
FOUND_LEVELS = (PITCH_LEVELS, PERIODICITY_LEVELS, LEVEL_LEVELS)
OCTAVE_COST = 0.05  # by how much an octave lower must have the clearer period
DETUNED_CENTS = (0.0, -9.0, 4.0, 11.0)  # of the oscillators; the last three are the second source, an ensemble
TICKS = 2**22  # to a cycle: phases are whole numbers that float32 holds exactly
NYQUIST_SHARE = 0.01  # amplitude of the partials up there, and so of what is folded back


def code_levels(config: GeneratorConfig) -> tuple[int, ...]:
    """How many levels each number of a hop's code has: pitch, periodicity, level, then the learned ones."""
    return *FOUND_LEVELS, *[config.code_levels] * config.code_size


class PitchFinder(nn.Module):
    """The period of the newest 43 ms, as one of PITCH_LEVELS pitches, and how unlike itself the sound is after it.

    The cumulative mean normalised difference of de Cheveigné and Kawahara, "YIN", 2002, eq. 8, from the autocorrelation
    of a windowed frame over that of the window (Boersma, "Accurate short-term analysis", 1993, eq. 9), with Boersma's
    cost of octaves (eq. 26) in place of a threshold. Behind a low-pass, at an eighth of the rate at 48 kHz.
    """

    latency_samples = 0
    lowpass: Tensor  # [taps - 1 + hop, hop / decimation]
    transform: Tensor  # [window, (re|im, bins)]
    differences: Tensor  # [bins, (difference|its mean so far, candidates with one more at each end)]
    cost: Tensor  # [candidates]

    def __init__(self, spec: SpectralSpec) -> None:
        super().__init__()
        decimation = 1
        while spec.sample_rate / (2 * decimation) >= 5500 and spec.hop_samples % (2 * decimation) == 0:
            decimation *= 2
        rate, step = spec.sample_rate / decimation, spec.hop_samples // decimation
        window = round(0.0427 * rate / step) * step
        self.framer = Framer(window, step, 1)

        taps = min(12 * decimation, spec.analysis_window_samples - spec.hop_samples)
        place = np.arange(taps) - (taps - 1) / 2
        response = np.sinc(place * 0.5 / decimation) * np.hamming(taps)
        self.span_samples = taps - 1 + spec.hop_samples
        lowpass = np.zeros((self.span_samples, step))
        for column in range(step):
            end = (column + 1) * decimation - 1
            lowpass[end : end + taps, column] = response[::-1] / response.sum()

        places = np.arange(-CANDIDATE_STEP, PITCH_LEVELS + CANDIDATE_STEP, CANDIDATE_STEP)
        lags = rate * 2.0 ** (-places / PITCHES_PER_OCTAVE) / LOWEST_PITCH_HZ
        size = 16 * math.ceil((window + lags.max()) / 16)  # no lag runs round
        bins_hz = np.fft.rfftfreq(size, 1.0 / rate)
        bins_hz = bins_hz[bins_hz <= HIGHEST_HEARD_HZ]
        taper = np.hanning(window + 1)[1:]
        spectra = np.exp(-2j * np.pi * np.outer(np.arange(window), bins_hz / rate)) * taper[:, None]
        dull = 2.0 / (1.0 + (bins_hz / 1500.0) ** 4)
        dull[0] *= 0.5
        # Autocorrelation at every lag on a grid that is fine enough to be summed over.
        grid = np.arange(0.0, lags.max() + 0.25, 0.25)
        shape = np.abs(np.fft.fft(taper, 8 * size)) ** 2
        turns = np.outer(np.fft.fftfreq(8 * size), grid)
        shape_at = (shape @ np.cos(2.0 * np.pi * turns)) / shape.sum()
        alike = np.cos(2.0 * np.pi * np.outer(bins_hz / rate, grid)) / shape_at
        difference = dull[:, None] * (1.0 - alike)
        mean = np.cumsum(difference, axis=1) / np.maximum(np.arange(len(grid)), 1)
        at = [np.stack([np.interp(lags, grid, row) for row in rows]) for rows in (difference, mean)]
        for name, value in {
            "lowpass": lowpass,
            "transform": np.concatenate([spectra.real, spectra.imag], axis=1),
            "differences": np.concatenate(at, axis=1),
            "cost": OCTAVE_COST * np.log2(lags[1:-1] / lags.min()),
        }.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64), persistent=False)

    def init_state(self, batch: int) -> FramerState:
        return self.framer.init_state(batch)

    def forward(self, frames: Tensor, state: FramerState) -> tuple[Tensor, Tensor, FramerState]:
        """frames [batch, n, window], float64 -> number of the pitch, difference after a period [batch, n]; state."""
        dull = torch.matmul(frames[..., -self.span_samples :], self.lowpass).float().flatten(1)
        recent, state = self.framer(dull[:, None], state)
        real, imaginary = torch.matmul(recent[:, :, 0].double(), self.transform).chunk(2, dim=-1)
        difference, mean = torch.matmul(real.square() + imaginary.square(), self.differences).chunk(2, dim=-1)
        unlike = difference.clamp_min(0.0) / mean.clamp_min(1e-20)
        best = torch.argmin(unlike[..., 1:-1] + self.cost, dim=-1, keepdim=True)
        lower, here, higher = unlike.gather(-1, best + torch.arange(3, device=best.device)).unbind(-1)
        bend = (lower - 2.0 * here + higher).clamp_min(1e-9)
        beside = (0.5 * (lower - higher) / bend).nan_to_num().clamp(-0.5, 0.5)  # what is no number must still name one
        pitch = torch.round(CANDIDATE_STEP * (best[..., 0] + beside)).clamp(0.0, PITCH_LEVELS - 1.0)
        return pitch.long(), here, state


@dataclass(frozen=True)
class OscillatorState:
    phase: Tensor  # [batch, oscillators], ticks
    step: Tensor  # [batch, oscillators], half ticks per sample at the end of the last hop
    leak: Tensor  # [batch, 1]


class Oscillators(nn.Module):
    """Pulse trains at a pitch that changes along lines: one, and a detuned ensemble; root mean square one each.

    A pulse train is the sum of all partials, each weaker than the last by the same ratio (Moorer, "The synthesis of
    complex audio spectra by means of discrete summation formulas", 1976, eq. 1), which leaves NYQUIST_SHARE at half the
    rate. Phases are counted in whole ticks, so they are the same after hours and however the hops come.
    """

    latency_samples = 0
    steps: Tensor  # [pitches, oscillators], whole numbers
    leaks: Tensor  # [pitches, 1]: one minus the ratio of partials
    rise: Tensor  # [2, hop]: ticks so far for each half tick before and after a hop
    fade: Tensor  # [before|after, hop]
    mix: Tensor  # [sources, oscillators]

    def __init__(self, spec: SpectralSpec) -> None:
        super().__init__()
        hop, rate = spec.hop_samples, spec.sample_rate
        self.hop_samples = hop
        hertz = LOWEST_PITCH_HZ * 2.0 ** (np.arange(PITCH_LEVELS) / PITCHES_PER_OCTAVE)
        detuned = hertz[:, None] * 2.0 ** (np.array(DETUNED_CENTS) / 1200.0)
        leaks = 1.0 - np.exp(math.log(NYQUIST_SHARE) * hertz / (0.5 * rate))
        sample = np.arange(1, hop + 1)
        after = sample * (sample + 1) / hop
        ensemble = np.arange(len(DETUNED_CENTS)) > 0
        for name, value, dtype in (
            ("steps", np.round(detuned / rate * TICKS / 2.0), torch.float64),
            ("leaks", leaks[:, None], torch.float32),
            ("rise", np.stack([2.0 * sample - after, after]), torch.float64),
            ("fade", fade(hop).numpy(), torch.float32),
            ("mix", np.stack([~ensemble, ensemble / np.sqrt(ensemble.sum())]), torch.float32),
        ):
            self.register_buffer(name, torch.tensor(value, dtype=dtype), persistent=False)

    @property
    def sources(self) -> int:
        return len(self.mix)

    def init_state(self, batch: int) -> OscillatorState:
        count = len(DETUNED_CENTS)
        return OscillatorState(torch.zeros(batch, count), torch.zeros(batch, count), torch.zeros(batch, 1))

    def forward(self, pitch: Tensor, state: OscillatorState) -> tuple[Tensor, OscillatorState]:
        """pitch [batch, n], numbers of pitches at hop ends -> pulses [batch, sources, n*hop]."""
        hops = pitch.shape[1]
        # Sums of whole numbers below 2**53 are exact in float64, in any order.
        ends = torch.cat([state.step.double()[:, None], nn.functional.embedding(pitch, self.steps)], dim=1)
        pairs = neighbours(ends, hops).transpose(2, 3)  # [batch, n, oscillators, before|after]
        within = torch.matmul(pairs, self.rise)  # [batch, n, oscillators, hop]
        reached = state.phase.double()[:, None] + torch.cumsum(within[..., -1], dim=1)
        reached = reached - TICKS * torch.floor(reached / TICKS)
        starts = torch.cat([state.phase.double()[:, None], reached[:, :-1]], dim=1)
        turns = (starts[..., None] + within) / TICKS
        phase = (turns - torch.floor(turns)).float()

        leaks = torch.cat([state.leak[:, None], nn.functional.embedding(pitch, self.leaks)], dim=1)
        leak = torch.matmul(neighbours(leaks, hops).transpose(2, 3), self.fade).clamp_min(1e-4)  # [batch, n, 1, hop]
        ratio = 1.0 - leak
        half = torch.sin(math.pi * phase).square()
        pulses = (leak + 2.0 * ratio * half) / (leak.square() + 4.0 * ratio * half) - 1.0
        pulses = pulses * (2.0 * leak * (1.0 + ratio)).sqrt() / ratio
        mixed = torch.matmul(self.mix, pulses).transpose(1, 2).flatten(2)
        return mixed, OscillatorState(reached[:, -1].float(), ends[:, -1].float(), leaks[:, -1])


class Encoder(nn.Module):
    """The learned numbers of the code: what the spectrum looks like whatever its level, in a few levels each.

    Finite scalar quantisation, gradients straight through: Mentzer et al., "Finite scalar quantization", 2023, section
    3.1, with levels at the ends of the range too. Everything in float64; see the module's text.
    """

    latency_samples = 0
    window: Tensor  # [window]
    measure: Tensor  # [bins, bands]
    exported_measure: Tensor  # [(k1, k2), bands]

    def __init__(self, spec: SpectralSpec, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.dft = RealDft(spec, torch.float64)
        measure = band_measure(spec, config)
        for name, value in {
            "window": spec.analysis_window(),
            "measure": measure,
            "exported_measure": self.dft.product_shares(measure),
        }.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64), persistent=False)
        self.enter = nn.Linear(config.band_count, config.hidden, dtype=torch.float64)
        self.leave = nn.Linear(config.hidden, config.code_size, dtype=torch.float64)

    def forward(self, frames: Tensor) -> Tensor:
        """frames [batch, n, window], float64 -> numbers from -1 to 1 [batch, n, code_size], float64."""
        spectra = self.dft(frames * self.window)
        power = spectra.square().sum(dim=1).reshape(*frames.shape[:2], -1)
        measure = self.exported_measure if torch.onnx.is_in_onnx_export() else self.measure
        levels = torch.log(torch.matmul(power, measure).clamp_min(1e-12))
        shape = 0.4 * (levels - levels.mean(dim=-1, keepdim=True))
        said = torch.tanh(self.leave(torch.relu(self.enter(shape))))
        half = 0.5 * (self.config.code_levels - 1)
        chosen = torch.round((said + 1.0) * half) / half - 1.0
        if not said.requires_grad:
            return chosen
        return said + (chosen - said).detach()


@dataclass(frozen=True)
class AutoencoderState:
    framer: FramerState
    finder: FramerState
    body: BodyState
    oscillators: OscillatorState
    level: Tensor  # [batch, 1]: at the end of the last hop
    noise: NoiseState
    made: FramerState
    bank: FilterBankState


@dataclass(frozen=True)
class _Code:
    """What the decoder is given of n hops."""

    pitch: Tensor  # [batch, n], numbers of pitches
    level: Tensor  # [batch, n], numbers of levels
    heard: Tensor  # [batch, n, numbers]: all of the code, each number from -1 to 1, as the body hears it


class Autoencoder(SteeredBody):
    """audio and style in, audio out, without delay, through a code; see the module's text."""

    amplitudes: Tensor  # [levels, 1]

    def __init__(self, spec: SpectralSpec, config: GeneratorConfig) -> None:
        hop, window, bands = spec.hop_samples, spec.analysis_window_samples, config.band_count
        numbers = len(code_levels(config))
        signals = 3
        super().__init__(config, numbers, signals * bands)
        self.spec, self.latency_samples = spec, spec.stream_delay_samples
        self.framer = Framer(window, hop, 1)
        self.finder = PitchFinder(spec)
        self.envelope = Envelope(spec.analysis_window(), hop, config.envelope_hops * hop)
        self.encoder = Encoder(spec, config)
        self.oscillators = Oscillators(spec)
        self.noise = Noise(hop)
        self.made = Framer(window, hop, signals)
        matrix = band_matrix(bands, np.fft.rfftfreq(window, 1.0 / spec.sample_rate), config.scale)
        self.dft = RealDft(spec)
        self.bank = FilterBank(spec, self.dft, signals, matrix)
        amplitudes = 10.0 ** (LEVEL_STEP_DB * (np.arange(LEVEL_LEVELS) - LEVEL_LEVELS + 1) / 20.0)
        amplitudes[0] = 0.0
        self.register_buffer("amplitudes", torch.tensor(amplitudes[:, None], dtype=torch.float32), persistent=False)
        with torch.no_grad():
            tilt = torch.linspace(0.0, -4.0, bands)
            self.leave.bias.copy_(torch.cat([tilt - 0.5, tilt - 2.0, tilt - 3.0]))

    @property
    def code_levels(self) -> tuple[int, ...]:
        """How many levels each number of a hop's code has."""
        return code_levels(self.config)

    def init_state(self, batch: int) -> AutoencoderState:
        return AutoencoderState(
            framer=self.framer.init_state(batch),
            finder=self.finder.init_state(batch),
            body=self.body.init_state(batch),
            oscillators=self.oscillators.init_state(batch),
            level=torch.zeros(batch, 1),
            noise=self.noise.init_state(batch),
            made=self.made.init_state(batch),
            bank=self.bank.init_state(batch),
        )

    def encode(self, audio: Tensor, state: AutoencoderState) -> tuple[_Code, FramerState, FramerState]:
        """audio [batch, n*hop] -> its code, and the states of framer and finder after it."""
        frames, framer = self.framer(audio[:, None], state.framer)
        frames = frames[:, :, 0].double()
        pitch, unlike, finder = self.finder(frames, state.finder)
        decibels = (10.0 / math.log(10.0)) * torch.log(self.envelope.energy(frames).clamp_min(1e-12))
        # What is no number must still name a level.
        level = torch.round(decibels / LEVEL_STEP_DB + (LEVEL_LEVELS - 1)).nan_to_num().clamp(0.0, LEVEL_LEVELS - 1.0)
        periodicity = torch.round(unlike.clamp(0.0, 1.0) * (PERIODICITY_LEVELS - 1))
        found = [
            number * (2.0 / (levels - 1)) - 1.0
            for number, levels in zip((pitch.double(), periodicity, level), FOUND_LEVELS, strict=True)
        ]
        heard = torch.cat([torch.stack(found, dim=-1), self.encoder(frames)], dim=-1).float()
        return _Code(pitch, level.long(), heard), framer, finder

    def decide(self, heard: Tensor, style: Tensor, state: BodyState) -> tuple[Tensor, BodyState]:
        """The code [batch, n, numbers] -> gains in nepers at hop ends [batch, n, signals, bands]."""
        decided, state = self.through_body(self.enter(heard.transpose(0, 1)), style, state)
        return decided.clamp(*GAIN_RANGE).unflatten(2, (-1, self.config.band_count)), state

    def gains(self, audio: Tensor, style: Tensor, state: AutoencoderState) -> Tensor:
        """audio [batch, n*hop], style [batch, style_dim] -> only what ``decide`` gives [batch, n, signals, bands]."""
        return self.decide(self.encode(audio, state)[0].heard, style, state.body)[0]

    def forward(self, audio: Tensor, style: Tensor, state: AutoencoderState) -> tuple[Tensor, AutoencoderState]:
        """audio [batch, n*hop], style [batch, style_dim] -> audio [batch, n*hop] and the state after it."""
        hops = whole_hops(audio.shape[-1], self.spec.hop_samples, "Autoencoder")
        batch = audio.shape[0]
        code, framer, finder = self.encode(audio, state)
        gains, body = self.decide(code.heard, style, state.body)

        pulses, oscillators = self.oscillators(code.pitch, state.oscillators)
        white, noise = self.noise(audio, state.noise)
        levels = torch.cat([state.level[:, None], nn.functional.embedding(code.level, self.amplitudes)], dim=1)
        level = torch.matmul(neighbours(levels, hops).transpose(2, 3), self.oscillators.fade).flatten(1)
        made, made_state = self.made(torch.cat([pulses, white[:, None]], dim=1) * level[:, None], state.made)
        spectra = self.dft(made).reshape(batch, hops, made.shape[2], 2, -1)
        out, bank = self.bank(spectra, gains, state.bank)
        return out, AutoencoderState(framer, finder, body, oscillators, levels[:, -1], noise, made_state, bank)
