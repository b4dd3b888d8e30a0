"""Which style is this, heard so far? A causal CNN with softmax on mel spectrograms, hop by hop, that can run live.

Two mel spectrograms, one of long frames (pitch and partials) and one of short ones (attacks), are taken against the
loudest place of the last seconds; convolutions hear them; what they find is summed up over the same seconds, louder
places counting more. All of that is in the state, so a performance and a recording cut into excerpts are one thing.

It learns apart from ``recogniser.py``, which judges generators and must never hear what they were trained with; it may
teach them itself (``recogniser_judge.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from realtime.spectral import SpectralSpec
from training.layers import Framer, FramerState, RealDft, whole_hops
from training.librosa_once import librosa

FRAMES_PER_HOP = 2
SHORT_SHARE = 4  # short frames are so many times shorter than long ones
RANGE_DB = 60.0  # what lies further below the loudest place is room and hiss
RANGE_POWER = 10.0 ** (RANGE_DB / 10.0)
SILENCE_POWER = 1e-9  # mean power of a band; what is never louder is silence


@dataclass(frozen=True)
class StreamingRecogniserConfig:
    """Sizes of the recogniser; the defaults are the shipped one's."""

    band_count: int = 64
    lowest_hz: float = 40.0
    highest_hz: float = 12_000.0  # what lies above tells sources and codecs apart, not styles
    channels: tuple[int, int, int, int] = (24, 48, 80, 112)
    feature_count: int = 128
    embedding_dim: int = 48
    window_seconds: float = 3.0  # over which it makes up its mind
    dropout: float = 0.3

    def __post_init__(self) -> None:
        at = "recogniser."
        for name, least in (("band_count", 16), ("feature_count", 2), ("embedding_dim", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{at}{name}: must be at least {least}, got {getattr(self, name)}")
        if any(count < 1 for count in self.channels):
            raise ValueError(f"{at}channels: must be at least 1 each, got {list(self.channels)}")
        if not 0.0 < self.lowest_hz < self.highest_hz:
            raise ValueError(
                f"{at}lowest_hz, {at}highest_hz: must rise from above zero, got {self.lowest_hz:g} and "
                f"{self.highest_hz:g}"
            )
        if not 0.0 < self.window_seconds <= 60.0:
            raise ValueError(f"{at}window_seconds: must lie between 0 and 60, got {self.window_seconds:g}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"{at}dropout: must lie between 0 and 1, 1 not included; got {self.dropout:g}")

    def check_spec(self, spec: SpectralSpec) -> None:
        """ValueError where the recogniser cannot have this geometry."""
        long, hop = spec.analysis_window_samples, spec.hop_samples
        roots = [math.isqrt(size) for size in (long, long // SHORT_SHARE)]
        if roots[0] ** 2 != long or roots[1] ** 2 * SHORT_SHARE != long or roots[1] % 2:
            raise ValueError(
                f"spectral.analysis_window_samples: must be the square of a multiple of 4 (4096, 1024), got {long}"
            )
        if hop % (FRAMES_PER_HOP * roots[0]) or long % (hop // FRAMES_PER_HOP):
            raise ValueError(
                f"spectral.hop_samples: must be a multiple of {FRAMES_PER_HOP * roots[0]} and half of it a divisor of "
                f"{long}, got {hop}"
            )
        if self.highest_hz > spec.sample_rate / 2:
            raise ValueError(
                f"recogniser.highest_hz: must be at most half the sample rate of {spec.sample_rate}, "
                f"got {self.highest_hz:g}"
            )


def mel_weights(sample_rate: int, fft_size: int, config: StreamingRecogniserConfig) -> NDArray[np.float64]:
    """[bins, bands]: triangles on the mel scale that each add up to one."""
    hertz = librosa.mel_frequencies(n_mels=config.band_count + 2, fmin=config.lowest_hz, fmax=config.highest_hz)
    bins = np.fft.rfftfreq(fft_size, 1.0 / sample_rate)[:, None]
    # No slope is narrower than a bin: short frames would leave low bands empty.
    slopes, centres = np.maximum(np.diff(hertz), bins[1, 0]), hertz[1:-1]
    weights = np.minimum(1.0 - (centres - bins) / slopes[:-1], 1.0 - (bins - centres) / slopes[1:]).clip(min=0.0)
    return weights / weights.sum(axis=0)


class MelPower(nn.Module):
    """Power in mel bands of frames under a Hann window, against that of a full-scale sine."""

    window: Tensor
    weights: Tensor  # [bins, bands]
    exported_weights: Tensor  # [(k1, k2), bands]: in the order of the products of the exported transform

    def __init__(self, spec: SpectralSpec, config: StreamingRecogniserConfig) -> None:
        super().__init__()
        self.size = spec.analysis_window_samples
        self.dft = RealDft(spec)
        window = torch.hann_window(self.size)
        weights = mel_weights(spec.sample_rate, self.size, config) / float(window.sum()) ** 2
        self.register_buffer("window", window, persistent=False)
        for name, value in {"weights": weights, "exported_weights": self.dft.product_shares(weights)}.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """frames [batch, n, 1, at least size], of which the newest samples count -> power [batch, bands, n]."""
        batch, count = frames.shape[0], frames.shape[1]
        heard = frames[:, :, 0, -self.size :] * self.window
        if torch.onnx.is_in_onnx_export():
            power, weights = self.dft(heard).square().sum(dim=1).flatten(1), self.exported_weights
        else:
            bins = torch.view_as_real(torch.fft.rfft(heard.flatten(0, 1)))  # the same, with fewer copies
            power, weights = bins.square().sum(dim=2), self.weights
        return torch.matmul(power, weights).reshape(batch, count, -1).transpose(1, 2)


class CausalConvolution(nn.Module):
    """Convolution of 3 bands by 3 frames, stride 2 over bands; time is causal, what it needs of the past is its state.

    Batch normalisation: Ioffe and Szegedy, 2015. Once trained it is one more factor and summand per channel.
    """

    def __init__(self, inputs: int, outputs: int, band_count: int, stride: int) -> None:
        """``band_count`` comes in, half of it goes out; ``stride`` over frames is 1 or 2."""
        super().__init__()
        self.inputs, self.band_count, self.past_frames = inputs, band_count, 3 - stride
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride=(2, stride), padding=(1, 0), bias=False)
        self.normalise = nn.BatchNorm2d(outputs)

    def init_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.inputs, self.band_count, self.past_frames)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """x [batch, inputs, bands, frames], past [batch, inputs, bands, past frames] -> [batch, outputs, ...]."""
        heard = torch.cat([past, x], dim=3)
        return torch.relu(self.normalise(self.convolution(heard))), heard[:, :, :, -self.past_frames :]


@dataclass(frozen=True)
class StreamingRecogniserState:
    framer: FramerState
    peak: Tensor  # [batch, frames of the window - 1]: the loudest band of each
    first: Tensor  # what each convolution still needs
    second: Tensor
    third: Tensor
    fourth: Tensor
    found: Tensor  # [batch, features + 1, hops of the window - 1]: features times how loud their hop is, and that


@dataclass(frozen=True)
class Recognition:
    """After each hop: ``scores`` [batch, n, styles] before the softmax, ``embedding`` [batch, n, embedding_dim]."""

    scores: Tensor
    embedding: Tensor


class StreamingRecogniser(nn.Module):
    """audio in, probabilities of styles and an embedding out, after every hop; see the module's text."""

    latency_samples = 0
    temperature: Tensor  # []

    def __init__(self, spec: SpectralSpec, config: StreamingRecogniserConfig, styles: int) -> None:
        """Raises ValueError where ``spec`` does not suit; see ``StreamingRecogniserConfig.check_spec``."""
        super().__init__()
        config.check_spec(spec)
        self.spec, self.config = spec, config
        self.window_hops = max(2, round(config.window_seconds * spec.sample_rate / spec.hop_samples))
        stride = spec.hop_samples // FRAMES_PER_HOP
        self.framer = Framer(spec.analysis_window_samples, stride, 1)
        short = replace(
            spec,
            hop_samples=spec.analysis_window_samples // SHORT_SHARE // 2,
            synthesis_window_samples=spec.analysis_window_samples // SHORT_SHARE // 2,
            analysis_window_samples=spec.analysis_window_samples // SHORT_SHARE,
        )
        self.mels = nn.ModuleList(MelPower(each, config) for each in (spec, short))
        layers: list[CausalConvolution] = []
        inputs, bands = len(self.mels), config.band_count
        for outputs, over_time in zip(config.channels, (1, FRAMES_PER_HOP, 1, 1), strict=True):
            layers.append(CausalConvolution(inputs, outputs, bands, over_time))
            inputs, bands = outputs, (bands + 1) // 2
        self.first, self.second, self.third, self.fourth = layers
        self.gather = nn.Sequential(
            nn.Conv1d(inputs * bands, config.feature_count, 1, bias=False), nn.BatchNorm1d(config.feature_count)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.embed = nn.Linear(2 * config.feature_count, config.embedding_dim)
        self.classify = nn.Linear(config.embedding_dim, styles)
        # Guo et al., "On calibration of modern neural networks", 2017, section 4.2; fitted to held-out recordings.
        self.register_buffer("temperature", torch.ones(()))

    def init_state(self, batch: int) -> StreamingRecogniserState:
        frames, hops = FRAMES_PER_HOP * self.window_hops - 1, self.window_hops - 1
        return StreamingRecogniserState(
            framer=self.framer.init_state(batch),
            peak=torch.zeros(batch, frames),
            first=self.first.init_state(batch),
            second=self.second.init_state(batch),
            third=self.third.init_state(batch),
            fourth=self.fourth.init_state(batch),
            found=torch.zeros(batch, self.config.feature_count + 1, hops),
        )

    def forward(
        self, audio: Tensor, state: StreamingRecogniserState
    ) -> tuple[tuple[Tensor, Tensor], StreamingRecogniserState]:
        """audio [batch, n*hop] -> probabilities [batch, n, styles], embedding [batch, n, embedding_dim]; the state."""
        power, framer = self.listen(audio, state.framer)
        seen, peak = self.relate(power, state.peak)
        said, state = self.recognise(seen, replace(state, framer=framer, peak=peak))
        return (torch.softmax(said.scores / self.temperature, dim=-1), said.embedding), state

    def listen(self, audio: Tensor, state: FramerState) -> tuple[Tensor, FramerState]:
        """audio [batch, n*hop] -> mel power [batch, long|short, bands, frames]."""
        whole_hops(audio.shape[-1], self.spec.hop_samples, "StreamingRecogniser")
        frames, state = self.framer(audio[:, None], state)
        return torch.stack([mel(frames) for mel in self.mels], dim=1), state

    def relate(self, power: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Mel power against the loudest place of the last seconds: 1 there, 0 from 60 dB below on; the same shape."""
        peaks = torch.cat([state, power.amax(dim=(1, 2))], dim=1)
        loudest = nn.functional.max_pool1d(peaks[:, None], FRAMES_PER_HOP * self.window_hops, stride=1)
        share = power / loudest[:, :, None].clamp_min(SILENCE_POWER)
        # One is added to a large number, and not a small one to a share: onnxruntime drops what is that small.
        seen = torch.log(RANGE_POWER * share + 1.0) / math.log(RANGE_POWER + 1.0)
        return seen, peaks[:, -state.shape[1] :]

    def recognise(self, seen: Tensor, state: StreamingRecogniserState) -> tuple[Recognition, StreamingRecogniserState]:
        """What ``relate`` gives -> what is said of it, and the state but for the parts of ``listen`` and ``relate``."""
        audible = seen.amax(dim=(1, 2)).unflatten(1, (-1, FRAMES_PER_HOP)).amax(dim=2)  # [batch, n]
        x, first = self.first(seen, state.first)
        x, second = self.second(x, state.second)
        x, third = self.third(x, state.third)
        x, fourth = self.fourth(x, state.fourth)
        found = torch.relu(self.gather(x.flatten(1, 2))) * audible[:, None]  # [batch, features, n]
        found = torch.cat([state.found, torch.cat([found, audible[:, None]], dim=1)], dim=2)
        sums = nn.functional.avg_pool1d(found, self.window_hops, stride=1)
        mean = sums[:, :-1] / sums[:, -1:].clamp_min(1e-4)
        highest = nn.functional.max_pool1d(found[:, :-1], self.window_hops, stride=1)
        summary = torch.cat([mean, highest], dim=1).transpose(1, 2)  # [batch, n, 2 * features]
        embedding = self.embed(self.dropout(summary))
        found = found[:, :, -state.found.shape[2] :]
        state = StreamingRecogniserState(state.framer, state.peak, first, second, third, fourth, found)
        return Recognition(self.classify(embedding), embedding), state
