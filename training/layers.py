"""Causal streaming layers: one ``forward(x, state) -> (y, state)`` for the whole recording and for one chunk.

Every layer has ``init_state(batch)``, takes and returns its state, hides nothing, and declares
``latency_samples`` (how much later than its input its output stream runs). A state is a frozen dataclass of
tensors, zeros at the start, batch first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from realtime.spectral import SpectralSpec


class ChunkError(ValueError):
    """A chunk that a layer cannot take; whoever calls it must buffer to whole hops."""


def whole_hops(samples: int, hop_samples: int, layer: str) -> int:
    """Number of hops in a chunk; ChunkError if it is not a whole number above zero."""
    if samples == 0 or samples % hop_samples:
        raise ChunkError(
            f"{layer}: got {samples} samples, needs a multiple of {hop_samples}; buffering is the caller's job"
        )
    return samples // hop_samples


@dataclass(frozen=True)
class FramerState:
    history: Tensor  # [batch, signals, window - hop]


class Framer(nn.Module):
    """Overlapping frames of several parallel signals, each frame ending on the newest sample of its hop."""

    latency_samples = 0

    def __init__(self, window_samples: int, hop_samples: int, signals: int) -> None:
        super().__init__()
        self.window_samples, self.hop_samples, self.signals = window_samples, hop_samples, signals

    def init_state(self, batch: int) -> FramerState:
        return FramerState(torch.zeros(batch, self.signals, self.window_samples - self.hop_samples))

    def forward(self, x: Tensor, state: FramerState) -> tuple[Tensor, FramerState]:
        """x [batch, signals, n*hop] -> frames [batch, n, signals, window]."""
        hops = whole_hops(x.shape[-1], self.hop_samples, "Framer")
        per_frame = self.window_samples // self.hop_samples
        full = torch.cat([state.history, x], dim=-1)
        blocks = full.reshape(full.shape[0], self.signals, hops + per_frame - 1, self.hop_samples)
        index = torch.arange(hops, device=x.device)[:, None] + torch.arange(per_frame, device=x.device)
        frames = blocks.index_select(2, index.flatten())
        frames = frames.reshape(-1, self.signals, hops, self.window_samples).transpose(1, 2)
        return frames, FramerState(full[:, :, -(self.window_samples - self.hop_samples) :])


class RealDft(nn.Module):
    """The windowed real DFT of a frame and its inverse, factored in small matrix products (Cooley and Tukey 1965).

    A frame of N = M*M samples, n = M*n1 + n2, k = k1 + M*k2. The first product runs over n1 and needs only
    k1 = 0..M/2 since the frame is real; then the twiddle factors; then one M-point DFT over n2, the same for all k1.
    Bins stay in this order, [k1, re|im, k2]: whoever needs frequencies reads ``frequencies_hz``. The bins of the rows
    k1 = 0 and k1 = M/2 appear twice, as conjugates; ``weights`` is one half there.
    A dense matrix for N = 1024 is 4.2 MB and misses the cache; these are 0.06 MB.
    """

    latency_samples = 0
    window: Tensor  # [n1, n2]
    first: Tensor  # [(2, k1, re|im), n1]
    turn: Tensor  # [2, k1, (re|im, n2)]
    second: Tensor  # [(re|im, n2), (re|im, k2)]
    second_inverse: Tensor
    last: Tensor  # [n1 of the tail, (2, k1, re|im)]
    synthesis_window: Tensor  # [n1 of the tail, n2]

    def __init__(self, spec: SpectralSpec) -> None:
        super().__init__()
        n = spec.analysis_window_samples
        m = round(n**0.5)
        if m * m != n or m % 2:
            raise ValueError(f"analysis_window_samples: must be the square of an even number, got {n}")
        if spec.synthesis_window_samples % m:
            raise ValueError(f"synthesis_window_samples: must be a multiple of {m}")
        self.radix, self.rows = m, m // 2 + 1
        self.tail_rows = spec.synthesis_window_samples // m
        k1, i = np.arange(self.rows), np.arange(m)
        over_n1 = np.exp(-2j * np.pi * np.outer(k1, i) / m)  # [k1, n1]
        twiddle: NDArray[np.complex128] = np.exp(-2j * np.pi * np.outer(k1, i) / n)  # [k1, n2]
        over_n2 = np.exp(-2j * np.pi * np.outer(i, i) / m)  # [n2, k2]
        # Rows (re, im) and then (-im, re): one elementwise product with (cos, cos), (sin, sin) and a sum over the
        # two is the complex product with the twiddle factors.
        plain = np.stack([over_n1.real, over_n1.imag], axis=1)
        turned = np.stack([-over_n1.imag, over_n1.real], axis=1)
        first = np.stack([plain, turned]).reshape(-1, m)  # [(2, k1, ri), n1]
        turn = np.stack([np.tile(part, 2) for part in (twiddle.real, twiddle.imag)])  # [2, k1, (ri, n2)]
        second = np.block([[over_n2.real, over_n2.imag], [-over_n2.imag, over_n2.real]])  # [(ri, n2), (ri, k2)]
        analysis, synthesis = spec.windows()
        counted = np.where((k1 == 0) | (k1 == m // 2), 1.0, 2.0)
        last = np.stack([plain, turned]) * (counted / n)[None, :, None, None]
        last = last.reshape(-1, m).T[-self.tail_rows :]  # [n1 of the tail, (2, k1, ri)]
        for name, value in {
            "window": analysis.reshape(m, m),
            "first": first,
            "turn": turn,
            "second": second,
            "second_inverse": second.T.copy(),
            "last": last,
            "synthesis_window": synthesis.reshape(self.tail_rows, m),
        }.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32), persistent=False)
        bins = (k1[:, None] + m * i) % n
        self.frequencies_hz = np.minimum(bins, n - bins) * spec.sample_rate / n  # [k1, k2]
        self.weights = np.repeat(counted[:, None] / 2, m, axis=1)

    def forward(self, frames: Tensor) -> Tensor:
        """frames [..., window] -> spectra [rows of frames, k1, (re, im) k2]; the leading axes are flattened."""
        m = self.radix
        x = frames.reshape(-1, m, m) * self.window
        inner = torch.matmul(self.first, x).reshape(-1, 2, self.rows, 2 * m)
        return torch.matmul((inner * self.turn).sum(dim=1), self.second)

    def inverse(self, spectra: Tensor) -> Tensor:
        """spectra [r, k1, (re, im) k2] -> the last synthesis-window samples of each windowed frame [r, samples]."""
        inner = torch.matmul(spectra, self.second_inverse)[:, None] * self.turn  # [r, 2, k1, (re, im) n2]
        tail = torch.matmul(self.last, inner.reshape(-1, 4 * self.rows, self.radix))  # [r, n1, n2]
        return (tail * self.synthesis_window).flatten(1)


@dataclass(frozen=True)
class OverlapAddState:
    tail: Tensor  # [batch, hop]


class OverlapAdd(nn.Module):
    """Windowed frames of two hops to a stream, one hop later than the frames' ends."""

    def __init__(self, hop_samples: int) -> None:
        super().__init__()
        self.hop_samples = hop_samples
        self.latency_samples = hop_samples

    def init_state(self, batch: int) -> OverlapAddState:
        return OverlapAddState(torch.zeros(batch, self.hop_samples))

    def forward(self, frames: Tensor, state: OverlapAddState) -> tuple[Tensor, OverlapAddState]:
        """frames [batch, n, 2*hop] -> samples [batch, n*hop]."""
        head, tail = frames[..., : self.hop_samples], frames[..., self.hop_samples :]
        tails = torch.cat([state.tail[:, None], tail], dim=1)
        return (head + tails[:, :-1]).flatten(1), OverlapAddState(tails[:, -1])


@dataclass(frozen=True)
class FirState:
    history: Tensor  # [batch, channels, taps - 1]


class CausalFir(nn.Module):
    """A fixed causal filter per channel, with unit gain at zero frequency: the one-pole low-pass, cut to its taps."""

    latency_samples = 0
    kernel: Tensor  # [channels, 1, taps]

    def __init__(self, channels: int, taps: int, pole: float) -> None:
        super().__init__()
        self.channels, self.taps = channels, taps
        response = pole ** np.arange(taps)
        kernel = torch.tensor((response / response.sum())[::-1].copy(), dtype=torch.float32)
        self.register_buffer("kernel", kernel.expand(channels, 1, taps).clone(), persistent=False)

    def init_state(self, batch: int) -> FirState:
        return FirState(torch.zeros(batch, self.channels, self.taps - 1))

    def forward(self, x: Tensor, state: FirState) -> tuple[Tensor, FirState]:
        """x [batch, channels, time] -> the same shape."""
        full = torch.cat([state.history, x], dim=-1)
        y = torch.nn.functional.conv1d(full, self.kernel, groups=self.channels)
        return y, FirState(full[:, :, -(self.taps - 1) :])


@dataclass(frozen=True)
class EnvelopeState:
    energy: Tensor  # [batch, channels, hops - 1]: mean squares of the last hops
    level: Tensor  # [batch, channels, 1]: the envelope at the end of the last hop


class Envelope(nn.Module):
    """Root-mean-square level over the last hops, straight lines between hop ends."""

    latency_samples = 0
    ramp: Tensor  # [hop]
    average: Tensor  # [channels, 1, hops]

    def __init__(self, channels: int, hop_samples: int, hops: int) -> None:
        super().__init__()
        self.channels, self.hop_samples, self.hops = channels, hop_samples, hops
        ramp = (torch.arange(hop_samples, dtype=torch.float32) + 1) / hop_samples
        self.register_buffer("ramp", ramp, persistent=False)
        self.register_buffer("average", torch.full((channels, 1, hops), 1 / hops), persistent=False)

    def init_state(self, batch: int) -> EnvelopeState:
        return EnvelopeState(torch.zeros(batch, self.channels, self.hops - 1), torch.zeros(batch, self.channels, 1))

    def forward(self, x: Tensor, state: EnvelopeState) -> tuple[Tensor, EnvelopeState]:
        """x [batch, channels, n*hop] -> level [batch, channels, n*hop], never below 1e-5."""
        count = whole_hops(x.shape[-1], self.hop_samples, "Envelope")
        energy = x.reshape(-1, self.channels, count, self.hop_samples).square().mean(-1)
        energies = torch.cat([state.energy, energy], dim=-1)
        mean = torch.nn.functional.conv1d(energies, self.average, groups=self.channels)
        # A floor, not a sum: onnxruntime takes the addition of so small a number for none at all and drops it.
        now = mean.clamp_min(1e-10).sqrt()
        ends = torch.cat([state.level, now], dim=-1)
        start, stop = ends[..., :-1, None], ends[..., 1:, None]
        level = (start + (stop - start) * self.ramp).flatten(2).clamp_min(1e-5)
        return level, EnvelopeState(energies[..., -(self.hops - 1) :], ends[..., -1:])


@dataclass(frozen=True)
class NoiseState:
    count: Tensor  # [batch, 1]: hops since the start, a whole number


class Noise(nn.Module):
    """White noise in [-1, 1), the same on every machine: a hash of (hop number, lane) in whole numbers.

    Squares and sums modulo two primes; every intermediate stays below 2**24, so float32 is exact everywhere.
    The same for every row of a batch; repeats after 16.7 million hops (12 hours at 48 kHz).
    """

    latency_samples = 0
    primes = (4093, 4091)
    factor: Tensor  # [hop]
    offset: Tensor  # [hop]

    def __init__(self, hop_samples: int) -> None:
        super().__init__()
        self.hop_samples = hop_samples
        lanes = np.random.default_rng(4093).integers(1, self.primes[0], size=(2, hop_samples))
        self.register_buffer("factor", torch.tensor(lanes[0], dtype=torch.float32), persistent=False)
        self.register_buffer("offset", torch.tensor(lanes[1], dtype=torch.float32), persistent=False)

    def init_state(self, batch: int) -> NoiseState:
        return NoiseState(torch.zeros(batch, 1))

    def forward(self, like: Tensor, state: NoiseState) -> tuple[Tensor, NoiseState]:
        """like [batch, n*hop] gives the length -> noise [batch, n*hop]."""
        hops = whole_hops(like.shape[-1], self.hop_samples, "Noise")
        p, q = float(self.primes[0]), float(self.primes[1])
        steps = torch.arange(hops, dtype=like.dtype, device=like.device)
        count = torch.fmod(state.count + steps, p * q)[..., None]  # [batch, n, 1]
        first = torch.fmod(torch.fmod(count, p) * self.factor + self.offset, p)
        second = torch.fmod(first * first + torch.fmod(count, q), q)
        third = torch.fmod(second * second + first, p)
        fourth = torch.fmod(third * third + second, q)
        noise = (fourth * (2 / q) - 1).flatten(1)
        return noise, NoiseState(torch.fmod(state.count + hops, p * q))


@dataclass(frozen=True)
class GruState:
    hidden: Tensor  # [batch, hidden]


class Gru(nn.Module):
    """A gated recurrent unit over frames (Cho et al. 2014). Time comes first, as the ONNX operator has it."""

    latency_samples = 0

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.cell = nn.GRU(inputs, hidden)

    def init_state(self, batch: int) -> GruState:
        return GruState(torch.zeros(batch, self.hidden))

    def forward(self, x: Tensor, state: GruState) -> tuple[Tensor, GruState]:
        """x [n, batch, inputs] -> [n, batch, hidden]."""
        if torch.onnx.is_in_onnx_export():
            return self._as_onnx_operator(x, state)
        y, hidden = self.cell(x, state.hidden[None])
        return y, GruState(hidden[0])

    def _as_onnx_operator(self, x: Tensor, state: GruState) -> tuple[Tensor, GruState]:
        """The ONNX GRU operator itself: tracing nn.GRU would fix the number of frames to that of the example."""
        h = self.hidden

        def zrn(t: Tensor) -> Tensor:  # torch orders the gates r, z, n; ONNX z, r, n
            return torch.cat([t[h : 2 * h], t[:h], t[2 * h :]])[None]

        cell = self.cell
        input_weight, hidden_weight, input_bias, hidden_bias = cell.all_weights[0]
        bias = torch.cat([zrn(input_bias), zrn(hidden_bias)], dim=1)
        frames, batch = x.shape[0], x.shape[1]
        y, last = torch.onnx.ops.symbolic_multi_out(
            "GRU",
            [x, zrn(input_weight), zrn(hidden_weight), bias, None, state.hidden[None]],
            attrs={"hidden_size": h, "linear_before_reset": 1},
            dtypes=[torch.float32, torch.float32],
            shapes=[[frames, 1, batch, h], [1, batch, h]],
            version=17,
        )
        return y[:, 0], GruState(last[0])
