"""Causal streaming layers: one ``forward(x, state) -> (y, state)`` for the whole recording and for one chunk.

Every layer has ``init_state(batch)``, takes and returns its state, hides nothing, and declares
``latency_samples`` (how much later than its input its output stream runs). A state is a frozen dataclass of
tensors, zeros at the start, batch first.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from realtime.spectral import SpectralSpec

FLOOR_LEVEL = 1e-5  # root mean square; what is this quiet comes out as nothing


class ChunkError(ValueError):
    """A chunk that a layer cannot take; whoever calls it must buffer to whole hops."""


def whole_hops(samples: int, hop_samples: int, layer: str) -> int:
    """Number of hops in a chunk; ChunkError if it is not a whole number above zero."""
    if samples == 0 or samples % hop_samples:
        raise ChunkError(
            f"{layer}: got {samples} samples, needs a multiple of {hop_samples}; buffering is the caller's job"
        )
    return samples // hop_samples


def neighbours(ends: Tensor, hops: int) -> Tensor:
    """What holds at the ends of hops [batch, hops + 1, ...] -> before and after each hop [batch, hops, 2, ...]."""
    index = torch.arange(hops, device=ends.device)[:, None] + torch.arange(2, device=ends.device)
    return ends.index_select(1, index.flatten()).reshape(ends.shape[0], hops, 2, *ends.shape[2:])


def fade(samples: int) -> Tensor:
    """Weights [before|after, samples] of a straight line that arrives with the last sample."""
    ramp = torch.arange(1, samples + 1, dtype=torch.float32) / samples
    return torch.stack([1.0 - ramp, ramp])


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
        if self.signals == 1:  # no order to change
            frames = frames.reshape(-1, hops, 1, self.window_samples)
        else:
            frames = frames.reshape(-1, self.signals, hops, self.window_samples).transpose(1, 2)
        return frames, FramerState(full[:, :, -(self.window_samples - self.hop_samples) :])


class RealDft(nn.Module):
    """The real DFT of a frame and its inverse, factored in small matrix products (Cooley and Tukey 1965).

    A frame of N = M*M samples, n = M*n1 + n2, k = k1 + M*k2. The first product runs over n1 and needs only
    k1 = 0..M/2 since the frame is real; then the twiddle factors; then one M-point DFT over n2, the same for all k1.
    Bins stay in this order, (k1, k2); those of the rows k1 = 0 and k1 = M/2 appear twice, as conjugates.
    A dense matrix for N = 1024 is 4.2 MB and misses the cache; these are 0.06 MB. Only the exported graph runs the
    products. Elsewhere torch's own FFT is faster and has every bin once, in the usual order: ``product_order``,
    ``usual_order`` and ``product_shares`` lead from one to the other.
    """

    latency_samples = 0
    first: Tensor  # [(2, k1, re|im), n1]
    turn: Tensor  # [2, k1, (re|im, n2)]
    second: Tensor  # [re|im, (re|im, n2), k2]
    second_inverse: Tensor  # [(re|im, k2), (re|im, n2)]
    last: Tensor  # [n1 of the tail, (2, k1, re|im)]
    bin_at: Tensor  # [(k1, k2)]: which of the N/2 + 1 bins
    conjugate_at: Tensor  # [(k1, k2)]: -1 where it is the bin's conjugate
    place_of: Tensor  # [bins]: where in (k1, k2)

    def __init__(self, spec: SpectralSpec, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        n = spec.analysis_window_samples
        m = round(n**0.5)
        if m * m != n or m % 2:
            raise ValueError(f"analysis_window_samples: must be the square of an even number, got {n}")
        if spec.hop_samples % m:
            raise ValueError(f"hop_samples: must be a multiple of {m}, got {spec.hop_samples}")
        self.size, self.radix, self.rows = n, m, m // 2 + 1
        self.tail_rows = spec.hop_samples // m
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
        second = np.stack(
            [np.concatenate([over_n2.real, -over_n2.imag]), np.concatenate([over_n2.imag, over_n2.real])]
        )  # [ri, (ri, n2), k2]
        counted = np.where((k1 == 0) | (k1 == m // 2), 1.0, 2.0)
        last = np.stack([plain, turned]) * (counted / n)[None, :, None, None]
        last = last.reshape(-1, m).T[-self.tail_rows :]  # [n1 of the tail, (2, k1, ri)]
        for name, value in {
            "first": first,
            "turn": turn,
            "second": second,
            "second_inverse": second.transpose(0, 2, 1).reshape(2 * m, 2 * m).copy(),
            "last": last,
        }.items():
            self.register_buffer(name, torch.tensor(value, dtype=dtype), persistent=False)
        bins = (k1[:, None] + m * i).reshape(-1)  # up to N - 1
        bin_at = np.minimum(bins, n - bins)  # [(k1, k2)]: which of the N/2 + 1 bins
        self.share_at = 1.0 / np.bincount(bin_at)[bin_at]  # one half where a bin is there twice
        self.register_buffer("bin_at", torch.tensor(bin_at), persistent=False)
        conjugate_at = torch.tensor(np.where(bins > n // 2, -1.0, 1.0), dtype=torch.float32)
        self.register_buffer("conjugate_at", conjugate_at, persistent=False)
        self.register_buffer("place_of", torch.tensor(np.unique(bin_at, return_index=True)[1]), persistent=False)

    def product_order(self, spectra: Tensor) -> Tensor:
        """Complex spectra [..., bins] -> [..., re|im, (k1, k2)]."""
        taken = spectra[..., self.bin_at]
        return torch.stack([taken.real, taken.imag * self.conjugate_at], dim=-2)

    def usual_order(self, spectra: Tensor) -> Tensor:
        """What ``product_order`` gives -> complex spectra [..., bins]."""
        taken = spectra[..., self.place_of]
        return torch.complex(taken[..., 0, :], taken[..., 1, :] * self.conjugate_at[self.place_of])

    def product_shares(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights of the bins' power in a sum [bins, ...] -> of what the products give [(k1, k2), ...]."""
        return (weights[self.bin_at.numpy()].T * self.share_at).T

    def forward(self, frames: Tensor) -> Tensor:
        """frames [..., window] -> spectra [rows of frames, re|im, bins], exported [rows of frames, re|im, k1, k2]."""
        m = self.radix
        if not torch.onnx.is_in_onnx_export():
            bins = torch.fft.rfft(frames.reshape(-1, self.size))
            return torch.stack([bins.real, bins.imag], dim=1)
        inner = torch.matmul(self.first, frames.reshape(-1, m, m)).reshape(-1, 2, self.rows, 2 * m)
        return torch.matmul((inner * self.turn).sum(dim=1, keepdim=True), self.second)

    def inverse(self, spectra: Tensor) -> Tensor:
        """spectra [r, re|im, bins], exported [r, re|im, (k1, k2)] -> the last hop of each frame [r, hop]."""
        m = self.radix
        if not torch.onnx.is_in_onnx_export():
            return torch.fft.irfft(torch.complex(spectra[:, 0], spectra[:, 1]), self.size)[:, -self.tail_rows * m :]
        rows = spectra.reshape(-1, 2, self.rows, m).transpose(1, 2).reshape(-1, 1, self.rows, 2 * m)
        inner = torch.matmul(rows, self.second_inverse) * self.turn  # [r, 2, k1, (re, im) n2]
        return torch.matmul(self.last, inner.reshape(-1, 4 * self.rows, m)).flatten(1)


def band_curves(spec: SpectralSpec, bands: NDArray[np.float64]) -> NDArray[np.complex128]:
    """What one neper of gain in each band adds to a filter's log spectrum: level, and in the imaginary part phase.

    ``bands`` [bands, window/2 + 1]: how much of a bin's level each band sets. The phase is the least that goes with
    the level, so nothing comes before its cause and nothing is delayed: the cepstrum of a causal filter whose inverse
    is causal too is causal (Oppenheim and Schafer, "Discrete-Time Signal Processing", the chapter on Hilbert
    transforms). Cepstra are faded out over a quarter of the frame: filters then die away within it.
    """
    size = spec.analysis_window_samples
    cepstra, reach = np.fft.irfft(bands, axis=1), size // 4
    folded = np.zeros_like(cepstra)
    folded[:, :reach] = cepstra[:, :reach] * (2.0 * np.cos(0.5 * np.pi * np.arange(reach) / reach) ** 2)
    folded[:, 0] = cepstra[:, 0]
    return np.fft.rfft(folded, axis=1)


@dataclass(frozen=True)
class FilterBankState:
    response: Tensor  # [batch, signals, re|im, (k1, k2)]: of the filters at the end of the last hop


class FilterBank(nn.Module):
    """The sum of several signals, each through a filter of its own that changes along a line within a hop.

    Minimum-phase filters by overlap-save (Oppenheim and Schafer, "Discrete-Time Signal Processing", section 8.7): the
    last hop of a frame has all the past that it needs, so steady gains are a plain linear filter, without delay and
    without anything at the hop rate. Each hop is filtered as before it and as after it and faded from one to the other.
    """

    latency_samples = 0
    curves: Tensor  # [bands, (level|phase, bins)]
    exported_curves: Tensor  # the same in the order of the products
    combine: Tensor  # [re|im, (signals, re|im of the signal, re|im of the filter)]
    quarter: Tensor  # [re|im, 1]: how far the cosine is turned to give each
    fade: Tensor  # [before|after, hop]

    def __init__(self, spec: SpectralSpec, dft: RealDft, signals: int, bands: NDArray[np.float64]) -> None:
        """``bands`` [bands, window/2 + 1]: shares of each band in a bin's level; columns that add up to one."""
        super().__init__()
        self.hop_samples, self.signals, self.band_count = spec.hop_samples, signals, len(bands)
        self.dft = dft
        curves = band_curves(spec, bands)
        exported_curves = dft.product_order(torch.tensor(curves)).flatten(1)
        product = np.array([[1, 0, 0, -1], [0, 1, 1, 0]])  # of (re, im) x (re, im)
        for name, value in {
            "curves": np.concatenate([curves.real, curves.imag], axis=1),
            "exported_curves": exported_curves,
            "combine": np.tile(product, signals),
            "quarter": np.array([[0.0], [0.5 * np.pi]]),
            "fade": fade(spec.hop_samples),
        }.items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32), persistent=False)

    def init_state(self, batch: int) -> FilterBankState:
        return FilterBankState(torch.zeros(batch, self.signals, 2, len(self.dft.bin_at)))

    def forward(self, spectra: Tensor, gains: Tensor, state: FilterBankState) -> tuple[Tensor, FilterBankState]:
        """Spectra of frames without a window [batch, n, signals, re|im, bins], gains in nepers [batch, n, signals,
        bands] -> audio [batch, n*hop]."""
        batch, hops, bins = gains.shape[0], gains.shape[1], spectra.shape[-1]
        if torch.onnx.is_in_onnx_export():
            level, phase = torch.matmul(gains, self.exported_curves).chunk(2, dim=-1)
            made = torch.cos(phase.unsqueeze(3) - self.quarter) * torch.exp(level).unsqueeze(3)
            # One after the other: to gather pairs first copies all that there is.
            heard = spectra.unsqueeze(4)  # [batch, n, signals, re|im, 1, bins]
            filtered = torch.stack(
                [
                    torch.matmul(self.combine, (heard * part.unsqueeze(3)).reshape(-1, 4 * self.signals, bins))
                    for part in (torch.cat([state.response[:, None], made[:, :-1]], dim=1), made)
                ],
                dim=1,
            )
            last = made[:, -1]
        else:
            with torch.autocast(spectra.device.type, enabled=False):  # phases of a few radians need float32
                level, phase = torch.matmul(gains.float(), self.curves).chunk(2, dim=-1)
                made = torch.polar(torch.exp(level), phase)
                steps = torch.cat([self.dft.usual_order(state.response)[:, None], made], dim=1)
                spectra = torch.complex(spectra[..., 0, :].float(), spectra[..., 1, :].float())
                pairs = [(spectra * part).sum(dim=2) for part in (steps[:, :-1], steps[:, 1:])]
                filtered = torch.view_as_real(torch.stack(pairs, dim=2)).movedim(-1, 3)
                last = self.dft.product_order(steps[:, -1])
        ends = self.dft.inverse(filtered.reshape(-1, 2, bins)).reshape(batch, hops, 2, self.hop_samples)
        return (ends * self.fade).sum(dim=2).flatten(1), FilterBankState(last)


class HopLowpass(nn.Module):
    """The newest hop of each frame through a one-pole low-pass, its response cut to ``taps``; unit gain at 0 Hz.

    The frame holds all the past that the filter needs, so there is no state, and a hop is one small matrix product.
    """

    latency_samples = 0
    matrix: Tensor  # [taps - 1 + hop, hop]

    def __init__(self, hop_samples: int, taps: int, pole: float) -> None:
        super().__init__()
        self.span_samples = taps - 1 + hop_samples
        response = pole ** np.arange(taps)
        response /= response.sum()
        matrix = np.zeros((self.span_samples, hop_samples))
        for column in range(hop_samples):
            matrix[column : column + taps, column] = response[::-1]
        self.register_buffer("matrix", torch.tensor(matrix, dtype=torch.float32), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """frames [batch, n, window] -> samples [batch, n*hop]."""
        return torch.matmul(frames[..., -self.span_samples :], self.matrix).flatten(1)


@dataclass(frozen=True)
class EnvelopeState:
    level: Tensor  # [batch, 1]: the envelope at the end of the last hop


class Envelope(nn.Module):
    """Root-mean-square level at the end of each hop, straight lines in between.

    Measured under a smooth window, so that a steady tone has a steady level, or over the last samples alone where
    those, taken at half their energy, are louder: an attack is not late.
    """

    latency_samples = 0
    fade: Tensor  # [before|after, hop]
    weights: Tensor  # [window, smooth|fast]

    def __init__(self, window: NDArray[np.float64], hop_samples: int, fast_samples: int) -> None:
        """``window`` [samples of a frame] weighs amplitudes; ``fast_samples`` are the last ones, for attacks."""
        super().__init__()
        self.hop_samples = hop_samples
        smooth = np.square(window) / np.square(window).sum()
        fast = 0.5 * (np.arange(len(window)) >= len(window) - fast_samples) / fast_samples
        self.register_buffer("fade", fade(hop_samples), persistent=False)
        weights = torch.tensor(np.stack([smooth, fast], axis=1), dtype=torch.float32)
        self.register_buffer("weights", weights, persistent=False)

    def init_state(self, batch: int) -> EnvelopeState:
        return EnvelopeState(torch.zeros(batch, 1))

    def energy(self, frames: Tensor) -> Tensor:
        """frames [batch, n, window] -> mean square at the end of each hop [batch, n], in the frames' precision."""
        return torch.matmul(frames.square(), self.weights.to(frames.dtype)).amax(dim=-1)

    def forward(self, frames: Tensor, state: EnvelopeState) -> tuple[Tensor, EnvelopeState]:
        """frames [batch, n, window] -> level [batch, n*hop], never below FLOOR_LEVEL."""
        energy = self.energy(frames)
        # A floor, not a sum: onnxruntime takes the addition of so small a number for none at all and drops it.
        ends = torch.cat([state.level, energy.clamp_min(FLOOR_LEVEL**2).sqrt()], dim=1)
        level = torch.matmul(neighbours(ends, frames.shape[1]), self.fade).flatten(1).clamp_min(FLOOR_LEVEL)
        return level, EnvelopeState(ends[:, -1:])


@dataclass(frozen=True)
class NoiseState:
    count: Tensor  # [batch, 1]: hops since the start, a whole number


class Noise(nn.Module):
    """White noise in [-1, 1), the same on every machine and for every row of a batch.

    A hop is a row of a table of values times a row of a table of signs. Their lengths have no common divisor, so the
    stream repeats after the product of both (43 s at 48 kHz and a hop of 128), and the signs hide any shorter period.
    """

    latency_samples = 0
    value_rows, sign_rows = 127, 128
    values: Tensor  # [value rows, hop]
    signs: Tensor  # [sign rows, hop]

    def __init__(self, hop_samples: int) -> None:
        super().__init__()
        self.hop_samples = hop_samples
        random = np.random.default_rng(4093)
        values = random.uniform(-1.0, 1.0, (self.value_rows, hop_samples))
        signs = random.choice([-1.0, 1.0], (self.sign_rows, hop_samples))
        self.register_buffer("values", torch.tensor(values, dtype=torch.float32), persistent=False)
        self.register_buffer("signs", torch.tensor(signs, dtype=torch.float32), persistent=False)

    @property
    def period_hops(self) -> int:
        return self.value_rows * self.sign_rows

    def init_state(self, batch: int) -> NoiseState:
        return NoiseState(torch.zeros(batch, 1))

    def forward(self, like: Tensor, state: NoiseState) -> tuple[Tensor, NoiseState]:
        """like [batch, n*hop] gives the length -> noise [batch, n*hop]."""
        hops = whole_hops(like.shape[-1], self.hop_samples, "Noise")
        number = state.count + torch.arange(hops, dtype=like.dtype, device=like.device)
        value = torch.nn.functional.embedding(torch.fmod(number, float(self.value_rows)).long(), self.values)
        sign = torch.nn.functional.embedding(torch.fmod(number, float(self.sign_rows)).long(), self.signs)
        return (value * sign).flatten(1), NoiseState(torch.fmod(state.count + hops, float(self.period_hops)))


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


@dataclass(frozen=True)
class LstmState:
    hidden: Tensor  # [batch, hidden]
    cell: Tensor  # [batch, hidden]


class Lstm(nn.Module):
    """A long short-term memory over frames (Hochreiter and Schmidhuber 1997, with forget gates). Time comes first."""

    latency_samples = 0

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.cell = nn.LSTM(inputs, hidden)

    def init_state(self, batch: int) -> LstmState:
        return LstmState(torch.zeros(batch, self.hidden), torch.zeros(batch, self.hidden))

    def forward(self, x: Tensor, state: LstmState) -> tuple[Tensor, LstmState]:
        """x [n, batch, inputs] -> [n, batch, hidden]."""
        if torch.onnx.is_in_onnx_export():
            return self._as_onnx_operator(x, state)
        y, (hidden, cell) = self.cell(x, (state.hidden[None], state.cell[None]))
        return y, LstmState(hidden[0], cell[0])

    def _as_onnx_operator(self, x: Tensor, state: LstmState) -> tuple[Tensor, LstmState]:
        """The ONNX LSTM operator itself, as for ``Gru``."""
        h = self.hidden

        def iofc(t: Tensor) -> Tensor:  # torch orders the gates i, f, g, o; ONNX i, o, f, c
            return torch.cat([t[:h], t[3 * h :], t[h : 3 * h]])[None]

        input_weight, hidden_weight, input_bias, hidden_bias = self.cell.all_weights[0]
        bias = torch.cat([iofc(input_bias), iofc(hidden_bias)], dim=1)
        frames, batch = x.shape[0], x.shape[1]
        y, last, cell = torch.onnx.ops.symbolic_multi_out(
            "LSTM",
            [x, iofc(input_weight), iofc(hidden_weight), bias, None, state.hidden[None], state.cell[None]],
            attrs={"hidden_size": h},
            dtypes=[torch.float32, torch.float32, torch.float32],
            shapes=[[frames, 1, batch, h], [1, batch, h], [1, batch, h]],
            version=14,
        )
        return y[:, 0], LstmState(last[0], cell[0])


@dataclass(frozen=True)
class ConvolutionsState:
    past: Tensor  # [batch, channels, frames]: what each convolution still needs, one after the other


class CausalConvolutions(nn.Module):
    """Dilated convolutions over frames, each added to what it heard, in place of a recurrent unit.

    Van den Oord et al., "WaveNet", 2016, section 2.1. Time comes first, as for ``Gru``.
    """

    latency_samples = 0

    def __init__(self, channels: int, dilations: tuple[int, ...] = (1, 2, 4, 8, 16, 32)) -> None:
        super().__init__()
        self.channels, self.dilations = channels, dilations
        self.convolutions = nn.ModuleList(nn.Conv1d(channels, channels, 2, dilation=d) for d in dilations)

    def init_state(self, batch: int) -> ConvolutionsState:
        return ConvolutionsState(torch.zeros(batch, self.channels, sum(self.dilations)))

    def forward(self, x: Tensor, state: ConvolutionsState) -> tuple[Tensor, ConvolutionsState]:
        """x [n, batch, channels] -> [n, batch, channels]."""
        x, kept = x.permute(1, 2, 0), []
        pasts = state.past.split(self.dilations, dim=2)
        for convolution, past, dilation in zip(self.convolutions, pasts, self.dilations, strict=True):
            heard = torch.cat([past, x], dim=2)
            kept.append(heard[:, :, -dilation:])
            x = x + nn.functional.leaky_relu(convolution(heard), 0.1)
        return x.permute(2, 0, 1), ConvolutionsState(torch.cat(kept, dim=2))


def on_device(state: Any, device: torch.device) -> Any:
    """A copy of a state dataclass (nested or not) with its tensors on ``device``."""
    if isinstance(state, Tensor):
        return state.to(device)
    return type(state)(**{item.name: on_device(getattr(state, item.name), device) for item in fields(state)})


def detached(state: Any) -> Any:
    """A copy of a state dataclass (nested or not) that gradients do not pass."""
    if isinstance(state, Tensor):
        return state.detach()
    return type(state)(**{item.name: detached(getattr(state, item.name)) for item in fields(state)})
