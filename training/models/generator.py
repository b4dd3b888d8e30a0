"""The style-conditioned causal generators: a body that hears the levels of bands, steered by the style vector.

The usual one sets gains. Four signals are analysed: the input; the input driven hard (odd harmonics); a pulse per
period made from its low end (a full harmonic series even under a dull or pure tone); and noise. All scale with the
input's own level, so silence in is silence out and loudness follows the playing. The body sets one smooth gain curve
per signal and hop; the filtered signals add up to the output. The other one writes the output's spectrum itself.
In some styles a tone may stand in the input's place before all that (``oscillator.py``), and gains may take their time
to rise or to fall (``traits.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from realtime.spectral import SpectralSpec
from training.layers import (
    FLOOR_LEVEL,
    CausalConvolutions,
    ConvolutionsState,
    Envelope,
    EnvelopeState,
    FilterBank,
    FilterBankState,
    Framer,
    FramerState,
    Gru,
    GruState,
    HopLowpass,
    Lstm,
    LstmState,
    Noise,
    NoiseState,
    RealDft,
    whole_hops,
)
from training.models import ANSWERS
from training.models.memory import Memory
from training.models.oscillator import Oscillator, OscillatorState
from training.models.traits import TRAITS, Ballistics, BallisticsState, Traits, apart
from training.models.unet import BANDS_STEP as UNET_STEP
from training.models.unet import UNet, UNetState

SIGNALS = ("input", "driven", "pulses", "noise")
FIRST_GAINS = {"input": 0.0, "driven": -4.0, "pulses": -4.0, "noise": -5.0}  # natural log, before any training
BODIES = ("recurrent", "lstm", "convolutional", "unet")
SCALES = ("mel", "linear")
GAIN_RANGE = (-9.0, 3.5)  # nepers
LANES = 16  # numbers that a processor takes the logarithm of at once, at most


@dataclass(frozen=True)
class GeneratorConfig:
    """Kind and sizes of the generator; the defaults are the shipped model's."""

    answer: str = "gains"  # for the signals; "spectrum": the output's complex one; "autoencoder": from a code alone
    signals: tuple[str, ...] = SIGNALS  # that get gains
    body: str = "recurrent"  # a GRU; or "lstm", "convolutional", "unet"
    scale: str = "mel"  # how bands are spaced, or "linear"
    style_dim: int = 16
    band_count: int = 64
    hidden: int = 192
    drive: float = 8.0
    pulse_sharpness: float = 4.0
    lowpass_taps: int = 64
    lowpass_pole: float = 0.9
    envelope_hops: int = 4
    attack_ms: float = 50.0  # in which gains rise in the styles of ``slow_attack``
    attack_db: float = 7.0  # by which they are held back meanwhile, at most
    release_ms: float = 100.0  # in which they fall in those of ``slow_release``
    code_size: int = 8  # learned numbers per hop of an autoencoder's code, beside pitch, periodicity and level
    code_levels: int = 7  # that each of them can have

    def __post_init__(self) -> None:
        for field, known in (("answer", ANSWERS), ("body", BODIES), ("scale", SCALES)):
            if getattr(self, field) not in known:
                raise ValueError(f"model.{field}: must be one of {', '.join(known)}, got '{getattr(self, field)}'")
        if not self.signals or len(set(self.signals)) != len(self.signals) or not set(self.signals) <= set(SIGNALS):
            raise ValueError(f"model.signals: must be some of {', '.join(SIGNALS)}, each once; got {[*self.signals]}")
        for field in ("style_dim", "band_count", "hidden", "lowpass_taps", "envelope_hops"):
            if getattr(self, field) < 2:
                raise ValueError(f"model.{field}: must be at least 2, got {getattr(self, field)}")
        for field, least, most in (("code_size", 1, 256), ("code_levels", 2, 4096)):
            if not least <= getattr(self, field) <= most:
                raise ValueError(f"model.{field}: must lie between {least} and {most}, got {getattr(self, field)}")
        if self.body == "unet" and self.band_count % UNET_STEP:
            raise ValueError(
                f"model.band_count: must be a multiple of {UNET_STEP} for model.body = 'unet', got {self.band_count}"
            )
        if self.body == "unet" and self.answer != "gains":
            raise ValueError("model.body: 'unet' answers with gains; take another body, or leave model.answer out")
        if not 0.0 < self.lowpass_pole < 1.0:
            raise ValueError(f"model.lowpass_pole: must lie between 0 and 1, got {self.lowpass_pole:g}")
        for field in ("drive", "attack_ms", "attack_db", "release_ms"):
            if not getattr(self, field) > 0.0:
                raise ValueError(f"model.{field}: must be above 0, got {getattr(self, field):g}")


@dataclass(frozen=True)
class Nothing:
    """The state of a part that this generator does without."""


BodyState = GruState | LstmState | ConvolutionsState | UNetState


@dataclass(frozen=True)
class GeneratorState:
    style: Tensor  # [batch, style_dim]: of the last hop
    oscillator: OscillatorState | Nothing
    framer: FramerState
    envelope: EnvelopeState | Nothing
    noise: NoiseState | Nothing
    made: FramerState | Nothing
    body: BodyState
    ballistics: BallisticsState | Nothing
    bank: FilterBankState


def band_matrix(band_count: int, frequencies_hz: np.ndarray, scale: str = "mel") -> np.ndarray:
    """Triangles [band_count, bins] that add up to one at every frequency, spaced evenly on the scale.

    The lowest and highest band reach to the ends. Mel scale: O'Shaughnessy, Speech Communication, 1987, p. 150.
    """
    if scale == "linear":
        centres = np.linspace(0.0, frequencies_hz.max(), band_count)
        return np.stack([np.interp(frequencies_hz, centres, row) for row in np.eye(band_count)])
    mel = 2595.0 * np.log10(1.0 + frequencies_hz / 700.0)
    centres = np.linspace(mel.min() + 20.0, mel.max(), band_count)
    eye = np.eye(band_count)
    return np.stack([np.interp(mel, centres, row) for row in eye])


def band_measure(spec: SpectralSpec, config: GeneratorConfig) -> np.ndarray:
    """[bins, bands]: the power of a frame's bins -> that of its bands.

    Bands 60 dB under the frame are lost in float32 rounding, which differs from machine to machine: every band hears
    that much of the whole.
    """
    bins_hz = np.fft.rfftfreq(spec.analysis_window_samples, 1.0 / spec.sample_rate)
    matrix = band_matrix(config.band_count, bins_hz, config.scale)
    return (matrix / matrix.sum(axis=1, keepdims=True)).T + 1e-6 / matrix.shape[1]


class SteeredBody(nn.Module):
    """What every generator has: a body that a style vector steers."""

    def __init__(self, config: GeneratorConfig, inputs: int, outputs: int) -> None:
        """``inputs``: how many numbers the body hears per hop."""
        super().__init__()
        self.config, hidden = config, config.hidden
        if config.body == "unet":
            self.body = UNet(config.band_count, 2, outputs // config.band_count, config.style_dim)
            return
        self.enter = nn.Linear(inputs, hidden)
        bodies = {"recurrent": lambda: Gru(hidden, hidden), "lstm": lambda: Lstm(hidden, hidden)}
        self.body = bodies.get(config.body, lambda: CausalConvolutions(hidden))()
        self.steer = nn.Linear(config.style_dim, 2 * 2 * hidden)
        self.leave = nn.Linear(hidden, outputs)
        with torch.no_grad():
            self.steer.bias.copy_(torch.tensor([1.0, 0.0] * 2).repeat_interleave(hidden))
            self.leave.weight.mul_(0.1)

    def through_body(self, entered: Tensor, style: Tensor, state: BodyState) -> tuple[Tensor, BodyState]:
        """What entered [n, batch, hidden], style [batch, style_dim] -> [batch, n, outputs]."""
        scale1, shift1, scale2, shift2 = self.steer(style).chunk(4, dim=-1)
        x = nn.functional.leaky_relu(entered * scale1 + shift1, 0.1)
        y, state = self.body(x, state)
        x = nn.functional.leaky_relu((x + y) * scale2 + shift2, 0.1)
        return self.leave(x).transpose(0, 1), state


class ListeningBody(SteeredBody):
    """A steered body that hears the band levels of the windowed input."""

    window: Tensor  # [window]
    measure: Tensor  # [bins, bands]
    exported_measure: Tensor  # [(k1, k2), bands]
    normalise: Tensor  # [bands + 1, bands]

    def __init__(self, spec: SpectralSpec, config: GeneratorConfig, inputs: int, outputs: int) -> None:
        """``inputs``: how many more numbers the body hears per hop besides the levels."""
        bands = config.band_count
        super().__init__(config, bands + 1 + inputs, outputs)
        self.spec = spec
        self.framer = Framer(spec.analysis_window_samples, spec.hop_samples, 1)
        self.dft = RealDft(spec)
        measure = band_measure(spec, config)
        # Levels of the bands against their mean, and the mean, both brought to about unit size.
        normalise = np.concatenate([0.4 * (np.eye(bands) - 1.0 / bands), np.full((1, bands), 0.15 / bands)])
        for name, value in {
            "window": spec.analysis_window(),
            "measure": measure,
            "exported_measure": self.dft.product_shares(measure),
            "normalise": normalise,
        }.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32), persistent=False)

    def steered(
        self, heard: Tensor, style: Tensor, state: BodyState, more: Tensor | None = None
    ) -> tuple[Tensor, BodyState]:
        """Spectra of the windowed input [batch, n, re|im, bins], ``more`` [batch, n, inputs] -> [batch, n, outputs]."""
        power = heard.square().sum(dim=2)  # [batch, n, bins]
        # A floor, not a sum: onnxruntime takes the addition of so small a number for none at all and drops it.
        measure = self.exported_measure if torch.onnx.is_in_onnx_export() else self.measure
        levels = torch.log(torch.matmul(power, measure).clamp_min(1e-9))
        if isinstance(self.body, UNet):
            assert isinstance(state, UNetState) and more is None
            picture = torch.matmul(levels, self.normalise.T)  # [batch, n, bands + 1]
            mean = picture[..., -1:] + 0.6
            made, state = self.body(torch.stack([picture[..., :-1], mean.expand_as(levels)], dim=1), style, state)
            return made.transpose(1, 2).flatten(2), state
        bands = self.config.band_count
        x = nn.functional.linear(
            levels.transpose(0, 1),  # [n, batch, bands]
            torch.matmul(self.enter.weight[:, : bands + 1], self.normalise),
            self.enter.bias + 0.6 * self.enter.weight[:, bands],
        )
        if more is not None:
            x = x + nn.functional.linear(more.transpose(0, 1), self.enter.weight[:, bands + 1 :])
        return self.through_body(x, style, state)


class Generator(ListeningBody):
    """audio and style in, audio out, without delay; see the module's text."""

    def __init__(self, spec: SpectralSpec, config: GeneratorConfig, traits: Collection[str] = ()) -> None:
        """``traits``: those of TRAITS that some styles have; ``fit_traits`` says which."""
        super().__init__(spec, config, 0, len(config.signals) * config.band_count)
        slow = (config.attack_ms / 1000.0, config.attack_db, config.release_ms / 1000.0)
        settles = {"slow_attack", "slow_release"} & set(traits)
        self.traits = Traits(config.style_dim)
        self.memory = Memory(config.style_dim, config.hidden) if config.body == "recurrent" else None
        self.oscillator = Oscillator(spec, config.envelope_hops) if "oscillator" in traits else None
        self.ballistics = Ballistics(spec.hop_seconds, *slow) if settles else None
        hop, window = spec.hop_samples, spec.analysis_window_samples
        self.lowpass = HopLowpass(hop, config.lowpass_taps, config.lowpass_pole)
        if self.lowpass.span_samples > window:
            raise ValueError(f"model.lowpass_taps: must be at most {window - hop + 1}, got {config.lowpass_taps}")
        self.envelope = Envelope(spec.analysis_window(), hop, config.envelope_hops * hop)
        self.noise = Noise(hop)
        made = len(config.signals) - ("input" in config.signals)
        self.made = Framer(window, hop, made) if made else None
        matrix = band_matrix(config.band_count, np.fft.rfftfreq(window, 1.0 / spec.sample_rate), config.scale)
        self.bank = FilterBank(spec, self.dft, len(config.signals), matrix)
        self.latency_samples = spec.stream_delay_samples
        self.gain_count = len(config.signals) * config.band_count
        with torch.no_grad():
            first = torch.tensor([FIRST_GAINS[name] for name in config.signals])
            if isinstance(self.body, UNet):
                assert self.body.leave.bias is not None
                self.body.leave.bias.copy_(first)
            else:
                self.leave.bias.copy_(first.repeat_interleave(config.band_count))

    def fit_traits(self, vectors: Tensor, wanted: Mapping[str, Sequence[bool]]) -> None:
        """Which of the styles of these ``vectors`` [styles, style_dim] have a trait, for each that any of them has."""
        self.traits.fit(vectors, wanted)

    def fit_memory(self, vectors: Tensor, playing: Tensor) -> None:
        """Find out what the body usually remembers in the styles of these ``vectors`` [styles, style_dim] while it
        plays this, [playings, n*hop]."""
        if self.memory is not None:
            usual = [self.usual_memory(audio.expand(len(vectors), -1), vectors) for audio in playing]
            self.memory.usual.fit(vectors, torch.stack(usual).mean(dim=0))

    def init_state(self, batch: int) -> GeneratorState:
        return GeneratorState(
            style=torch.zeros(batch, self.config.style_dim),
            oscillator=self.oscillator.init_state(batch) if self.oscillator else Nothing(),
            framer=self.framer.init_state(batch),
            envelope=self.envelope.init_state(batch) if self.made else Nothing(),
            noise=self.noise.init_state(batch) if self.made else Nothing(),
            made=self.made.init_state(batch) if self.made else Nothing(),
            body=self.body.init_state(batch),
            ballistics=self.ballistics.init_state(batch, self.gain_count) if self.ballistics else Nothing(),
            bank=self.bank.init_state(batch),
        )

    def _excite(
        self, audio: Tensor, frames: Tensor, low: Tensor, envelope: EnvelopeState, noise: NoiseState
    ) -> tuple[Tensor, EnvelopeState, NoiseState]:
        """audio and its low end [batch, time], frames [batch, n, window] -> what is made [batch, made, time]."""
        level, envelope = self.envelope(frames, envelope)
        level = level[:, None]
        white, noise = self.noise(audio, noise)
        scaled = torch.stack([audio, low], dim=1) / level
        sharpness = self.config.pulse_sharpness
        driven = torch.tanh(self.config.drive * scaled[:, :1])
        pulses = torch.exp((scaled[:, 1:] * (sharpness / 1.5)).clamp_max(sharpness)) * np.exp(-sharpness)
        # The floor of the level must not make noise out of silence.
        audible = (level - FLOOR_LEVEL).clamp_min(0.0)
        known = {"driven": driven, "pulses": pulses, "noise": white[:, None]}
        made = torch.cat([known[name] for name in self.config.signals if name in known], dim=1)
        return made * audible, envelope, noise

    def forward(self, audio: Tensor, style: Tensor, state: GeneratorState) -> tuple[Tensor, GeneratorState]:
        """audio [batch, n*hop], style [batch, style_dim] -> audio [batch, n*hop] and the state after it."""
        hops = whole_hops(audio.shape[-1], self.spec.hop_samples, "Generator")
        batch, signals = audio.shape[0], self.config.signals
        oscillates, attack, release = self.traits(style).chunk(len(TRAITS), dim=1)
        audio, oscillator = self._source(audio, oscillates, state)
        frames, framer = self.framer(audio[:, None], state.framer)  # [batch, n, 1, window]
        envelope, noise, made_state = state.envelope, state.noise, state.made
        heard = [frames * self.window] + [frames] * ("input" in signals)
        if self.made is not None:
            assert not isinstance(envelope, Nothing) and not isinstance(noise, Nothing)
            assert isinstance(made_state, FramerState)
            low = self.lowpass(frames[:, :, 0])
            excitations, envelope, noise = self._excite(audio, frames[:, :, 0], low, envelope, noise)
            made, made_state = self.made(excitations, made_state)
            heard.append(made)
        spectra = self.dft(torch.cat(heard, dim=2))
        measured, spectra = spectra.reshape(batch, hops, len(signals) + 1, 2, -1).split([1, len(signals)], dim=2)

        moved = apart(style, state.style)
        gains, body = self.decide(measured[:, :, 0], style, self._remembered(style, moved, state))
        gains, ballistics = self._settle(gains, heard[0], attack, release, moved, state)
        out, bank = self.bank(spectra, gains, state.bank)
        return out, GeneratorState(style, oscillator, framer, envelope, noise, made_state, body, ballistics, bank)

    def _source(self, audio: Tensor, share: Tensor, state: GeneratorState) -> tuple[Tensor, OscillatorState | Nothing]:
        """What the styles hear [batch, n*hop]."""
        if self.oscillator is None:
            return audio, state.oscillator
        assert isinstance(state.oscillator, OscillatorState)
        return self.oscillator(audio, share, state.oscillator)

    def _remembered(self, style: Tensor, moved: Tensor, state: GeneratorState) -> BodyState:
        """What the body remembers when the style is ``moved`` [batch, 1] from the one before."""
        if self.memory is None or not isinstance(state.body, GruState):
            return state.body
        return GruState(self.memory(state.body.hidden, style, state.style, moved))

    def _settle(
        self, gains: Tensor, windowed: Tensor, attack: Tensor, release: Tensor, moved: Tensor, state: GeneratorState
    ) -> tuple[Tensor, BallisticsState | Nothing]:
        """Gains [batch, n, signals, bands] in the time that styles give; ``windowed`` are frames [batch, n, 1, window],
        the others as ``Ballistics`` takes them."""
        if self.ballistics is None:
            return gains, state.ballistics
        assert isinstance(state.ballistics, BallisticsState)
        power = windowed.square().mean(dim=3).clamp_min(FLOOR_LEVEL**2)  # [batch, n, 1]
        # The logarithm of a lone number differs in its last bit from that of one among many.
        level = 0.5 * torch.log(power.expand(-1, -1, LANES))[..., :1]
        settled, ballistics = self.ballistics(gains.flatten(2), level, attack, release, moved, state.ballistics)
        return settled.unflatten(2, (-1, self.config.band_count)), ballistics

    def decide(self, heard: Tensor, style: Tensor, state: BodyState) -> tuple[Tensor, BodyState]:
        """Spectra of the windowed input [batch, n, re|im, bins] -> gains in nepers at hop ends [batch, n, signals,
        bands]."""
        decided, state = self.steered(heard, style, state)
        return decided.clamp(*GAIN_RANGE).unflatten(2, (-1, self.config.band_count)), state

    def gains(self, audio: Tensor, style: Tensor, state: GeneratorState) -> Tensor:
        """audio [batch, n*hop], style [batch, style_dim] -> only its gains, in nepers [batch, n, signals, bands]."""
        oscillates, attack, release = self.traits(style).chunk(len(TRAITS), dim=1)
        windowed, heard = self._heard(audio, oscillates, state)
        moved = apart(style, state.style)
        decided, _ = self.decide(heard, style, self._remembered(style, moved, state))
        return self._settle(decided, windowed, attack, release, moved, state)[0]

    def _heard(self, audio: Tensor, oscillates: Tensor, state: GeneratorState) -> tuple[Tensor, Tensor]:
        """audio [batch, n*hop] -> windowed frames [batch, n, 1, window], their spectra [batch, n, re|im, bins]."""
        audio, _ = self._source(audio, oscillates, state)
        frames, _ = self.framer(audio[:, None], state.framer)
        windowed = frames * self.window
        return windowed, self.dft(windowed).reshape(audio.shape[0], frames.shape[1], 2, -1)

    def usual_memory(self, audio: Tensor, style: Tensor) -> Tensor:
        """audio [batch, n*hop], style [batch, style_dim] -> what the body remembers in the mean while it plays this,
        the more the louder it is [batch, hidden]. Of a recurrent body alone."""
        state = self.init_state(len(audio))
        windowed, heard = self._heard(audio, self.traits(style)[:, :1], state)
        remembered: list[Tensor] = []
        hook = self.body.register_forward_hook(lambda _body, _heard, made: remembered.append(made[0]))
        self.decide(heard, style, state.body)
        hook.remove()
        level = windowed[:, :, 0].square().mean(dim=2).sqrt()  # [batch, n]
        return torch.einsum("nbh,bn->bh", remembered[0], level / level.sum(dim=1, keepdim=True))


@dataclass(frozen=True)
class SpectrumState:
    framer: FramerState
    body: BodyState
    tail: FramerState  # what the last frame still has to give


class SpectrumGenerator(ListeningBody):
    """The output's complex spectrum from that of the input, in frames of the synthesis window, overlapped and added.

    Direct regression of spectra: Williamson, Wang and Wang, "Complex ratio masking", 2016, section III, without the
    mask. Works on the same levels and with the same body as the usual generator.
    """

    to_bins: Tensor  # [synthesis window, (re|im, bins)]
    to_samples: Tensor  # [(re|im, bins), synthesis window]

    def __init__(self, spec: SpectralSpec, config: GeneratorConfig) -> None:
        size = spec.synthesis_window_samples
        super().__init__(spec, config, size + 2, size + 2)
        self.latency_samples = spec.stream_delay_samples
        window = np.sin(np.pi * (np.arange(size) + 0.5) / size)
        bins = np.fft.rfft(np.eye(size) * window, norm="ortho")
        to_bins = np.concatenate([bins.real, bins.imag], axis=1)
        rows = np.concatenate([np.eye(size // 2 + 1), 1j * np.eye(size // 2 + 1)])
        to_samples = np.fft.irfft(rows, size, norm="ortho") * window
        for name, value in {"to_bins": to_bins, "to_samples": to_samples}.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32), persistent=False)

    def init_state(self, batch: int) -> SpectrumState:
        tail = FramerState(torch.zeros(batch, 1, self.spec.stream_delay_samples))
        return SpectrumState(self.framer.init_state(batch), self.body.init_state(batch), tail)

    def forward(self, audio: Tensor, style: Tensor, state: SpectrumState) -> tuple[Tensor, SpectrumState]:
        """audio [batch, n*hop], style [batch, style_dim] -> audio [batch, n*hop] and the state after it."""
        hop, size = self.spec.hop_samples, self.spec.synthesis_window_samples
        hops = whole_hops(audio.shape[-1], hop, "SpectrumGenerator")
        frames, framer = self.framer(audio[:, None], state.framer)
        heard = self.dft(frames * self.window).reshape(audio.shape[0], hops, 2, -1)
        recent = frames[:, :, 0, -size:]
        level = recent.square().mean(dim=-1, keepdim=True).clamp_min(FLOOR_LEVEL**2).sqrt()
        spectra, body = self.steered(heard, style, state.body, torch.matmul(recent / level, self.to_bins))
        made = torch.matmul(spectra, self.to_samples) * (level - FLOOR_LEVEL).clamp_min(0.0)
        tails = torch.cat([state.tail.history, made[:, :, hop:]], dim=1)
        out = (made[:, :, :hop] + tails[:, :-1]).flatten(1)
        return out, SpectrumState(framer, body, FramerState(tails[:, -1:]))
