"""A tone at the pitch of what comes in, for styles that sound one note at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from realtime.spectral import SpectralSpec
from training.layers import FLOOR_LEVEL, Envelope, EnvelopeState, Framer, FramerState, fade, neighbours

DECIMATION = 4  # pitch is looked for below an eighth of the sample rate
LAGS = 144  # of that many samples there; 83 Hz at 48 kHz and a decimation of 4
BLOCK = 16  # lags are computed in blocks of so many
NEAR = 0.92  # the first peak nearly as high as the highest is the period
DIP = 0.5  # a peak counts behind the first lag whose correlation is below that
CLEAR = (0.7, 0.85)  # of a correlation: below, what comes in passes; above, the tone stands in its place
LOCKING = 0.05  # of the distance to the input's phase that is made good within a hop
JUMP = 0.04  # of a frequency; one that moves farther within a hop is another note
HARMONICS = 59
TABLE_SAMPLES = 1024
TABLES_PER_OCTAVE = 4
TABLES = 20
FULL_HZ = 322.0  # up to here all harmonics sound, an octave higher half of them, and so on
CERTAIN = 0.3  # of a correlation: a peak below it is none
ARCTANGENT = (0.99999611, -0.33317368, 0.19807815, -0.1323334, 0.07962364, -0.03360419, 0.00681179)
"""Of the odd powers of a number up to one: within 2.5e-7. A graph's own Atan has no kernel on a GPU."""


@dataclass(frozen=True)
class OscillatorState:
    framer: FramerState
    envelope: EnvelopeState
    last: Tensor  # [batch, 4]: the input's phase, its frequency, how clear it is, how far the tone's phase is ahead


def wavetables() -> NDArray[np.float64]:
    """[TABLES, TABLE_SAMPLES + 1] of one period at unit power; each with fewer harmonics than the one before.

    Harmonics fall as a sawtooth's, with phases that keep peaks low (Schroeder, "Synthesis of low-peak-factor signals",
    1970).
    """
    at = 2.0 * np.pi * np.arange(TABLE_SAMPLES + 1)[:, None] / TABLE_SAMPLES
    tables = []
    for number in range(TABLES):
        h = np.arange(1, max(1, int(HARMONICS * 2.0 ** (-number / TABLES_PER_OCTAVE))) + 1)
        wave = (np.sin(at * h + h**2) / h).sum(axis=1)
        tables.append(wave / np.sqrt(np.square(wave[:-1]).mean()))
    return np.stack(tables)


class Oscillator(nn.Module):
    """In some styles, a tone of the input's pitch and loudness in the input's place, where its pitch is clear.

    What an instrument plays wavers partial by partial and hisses between them, which no gains on it take away; a tone
    does not. The period is the first peak of the normalised correlation of the newest samples with those before that is
    nearly as high as the highest (McLeod and Wyvill, "A smarter way to find pitch", 2005). Its phase follows that of
    the input's fundamental slowly, so that the same comes out on every machine, and nothing is delayed.
    """

    latency_samples = 0
    kernel: Tensor  # [1, 1, 2 * DECIMATION]
    span: Tensor  # [samples, LAGS]: which samples the energy of a lag is of
    rows_at: Tensor  # which blocks of samples each block of lags is compared with
    weights: Tensor  # [samples]
    time: Tensor  # [samples], in samples before the newest
    quarter: Tensor  # [re|im, 1]: how far the cosine is turned to give each
    ranks: Tensor  # [LAGS]: a number of its own for each lag, the first the highest
    bend: Tensor  # [before|peak|after, shift's numerator|its denominator|height]
    powers: Tensor  # [len(ARCTANGENT)]
    arctangent: Tensor  # [len(ARCTANGENT), 1], in turns
    tables: Tensor  # [TABLES * (TABLE_SAMPLES + 1)]
    fade: Tensor  # [before|after, hop]

    def __init__(self, spec: SpectralSpec, envelope_hops: int) -> None:
        super().__init__()
        window, hop = spec.analysis_window_samples, spec.hop_samples
        self.hop_samples, self.sample_rate, self.samples = hop, spec.sample_rate, window // DECIMATION - 1
        self.newest = self.samples - LAGS + 1
        if self.newest < LAGS // 2:
            raise ValueError(f"style.oscillator: needs an analysis window of 1024 samples or more, got {window}")
        self.framer = Framer(window, hop, 1)
        self.envelope = Envelope(spec.analysis_window(), hop, envelope_hops * hop)
        rising = np.arange(1.0, DECIMATION + 1.0)
        triangle = np.concatenate([rising, rising[::-1]]) / (2.0 * rising.sum())
        at, lag = np.arange(self.samples)[:, None], np.arange(LAGS)
        blocks, self.compared = LAGS // BLOCK, self.newest + BLOCK
        # Lag BLOCK*a + b starts LAGS - 1 - BLOCK*a - b samples after the oldest: rows for a, columns for b.
        rows_at = (blocks - 1 - np.arange(blocks))[:, None] + np.arange(self.compared // BLOCK)
        for name, value in {
            "kernel": triangle[None, None],
            "span": (at >= LAGS - 1 - lag) & (at < self.samples - lag),
            "weights": np.sin(np.pi * (np.arange(self.samples) + 0.5) / self.samples) ** 2,
            "time": np.arange(self.samples) - (self.samples - 1.0),
            "quarter": np.array([[0.0], [0.5 * np.pi]]),
            "ranks": np.append(np.arange(LAGS - 1, 0, -1), 0),  # the last one has no neighbour
            "bend": np.array([[0.5, 1.0, 0.0], [0.0, -2.0, 1.0], [-0.5, 1.0, 0.0]]),
            "powers": np.arange(len(ARCTANGENT)),
            "arctangent": np.array(ARCTANGENT)[:, None] / (2.0 * np.pi),
            "tables": wavetables().flatten(),
            "fade": fade(hop),
        }.items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32), persistent=False)
        self.register_buffer("rows_at", torch.as_tensor(rows_at.flatten()), persistent=False)

    def init_state(self, batch: int) -> OscillatorState:
        return OscillatorState(self.framer.init_state(batch), self.envelope.init_state(batch), torch.zeros(batch, 4))

    def periods(self, low: Tensor) -> tuple[Tensor, Tensor]:
        """Decimated frames [batch, n, samples] -> frequency in periods per sample, how clear it is [batch, n, 1]."""
        shape = low.shape[:2]
        samples = nn.functional.pad(low, (0, 1)).reshape(*shape, -1, BLOCK)
        rows = samples.index_select(2, self.rows_at).reshape(*shape, -1, self.compared)
        # Column b begins b samples later: copies one after the other, read in lines that are a sample longer than one.
        newest = nn.functional.pad(low[..., -self.newest :], (BLOCK - 1, BLOCK + 1))
        line = newest.shape[-1] + 1
        copies = newest[:, :, None].expand(-1, -1, BLOCK + 1, -1).reshape(*shape, -1)[..., : BLOCK * line]
        columns = copies.reshape(*shape, BLOCK, line)[..., : self.compared]
        alike = torch.matmul(rows, columns.transpose(2, 3)).flatten(2)  # [batch, n, LAGS]
        energy = torch.matmul(low.square(), self.span)
        alike = alike * (energy * energy[..., :1]).clamp_min(1e-13).rsqrt()
        alike = alike * (alike < DIP).float().cumsum(dim=-1).clamp_max(1.0)  # nothing before the first dip
        height = (NEAR * alike.amax(dim=-1, keepdim=True)).clamp_min(CERTAIN)
        peak = (alike >= nn.functional.max_pool1d(alike, 3, 1, 1)) & (alike > height)
        ranked = peak.float() * self.ranks
        first = ranked.argmax(dim=-1, keepdim=True).clamp(1, LAGS - 2)
        found = (ranked.amax(dim=-1, keepdim=True) > 0.0).float()
        around = alike.gather(2, first + torch.arange(-1, 2, device=low.device))
        over, under, clear = torch.matmul(around, self.bend).chunk(3, dim=-1)
        lag = first + (over / under.clamp_max(-1e-6)).clamp(-0.5, 0.5)
        return found / lag, clear * found

    def turns(self, imaginary: Tensor, real: Tensor) -> Tensor:
        """Angles of complex numbers [..., 1], from -0.5 to 0.5 of a turn [..., 1]."""
        high, wide = imaginary.abs(), real.abs()
        ratio = torch.minimum(high, wide) / torch.maximum(high, wide).clamp_min(1e-20)
        turns = torch.matmul(ratio.square().pow(self.powers), self.arctangent) * ratio
        turns = torch.where(high > wide, 0.25 - turns, turns)
        turns = torch.where(real < 0.0, 0.5 - turns, turns)
        return torch.where(imaginary < 0.0, -turns, turns)

    def forward(self, audio: Tensor, share: Tensor, state: OscillatorState) -> tuple[Tensor, OscillatorState]:
        """audio [batch, n*hop], how much the style has of the tone [batch, 1] -> audio [batch, n*hop] and the state
        after it."""
        frames, framer = self.framer(audio[:, None], state.framer)
        frames = frames.squeeze(2)
        batch, hops = frames.shape[:2]
        level, envelope = self.envelope(frames, state.envelope)
        low = nn.functional.conv1d(frames.reshape(batch * hops, 1, -1), self.kernel, stride=DECIMATION)
        low = low.reshape(batch, hops, self.samples)
        frequency, clear = self.periods(low)
        turns = (2.0 * np.pi * frequency * self.time)[:, :, None]
        waves = torch.cos(turns - self.quarter)  # [batch, n, re|im, samples]
        real, imaginary = torch.matmul(waves, (low * self.weights)[..., None]).chunk(2, dim=2)
        phase = self.turns(-imaginary, real)[..., 0]
        voiced = ((clear - CLEAR[0]) / (CLEAR[1] - CLEAR[0])).clamp(0.0, 1.0)
        now = torch.cat([phase, frequency / DECIMATION, voiced], dim=-1)
        ends = torch.cat([state.last[:, None, :3], now], dim=1)  # [batch, n + 1, 3]
        phase, frequency, voiced = ends.chunk(3, dim=-1)
        turned, before, after = phase[:, 1:] - phase[:, :-1], frequency[:, :-1], frequency[:, 1:]
        expected = 0.5 * self.hop_samples * (before + after)
        strayed = turned - expected
        strayed = strayed - strayed.round()
        same = ((after - before).abs() < JUMP * after).float()
        ahead = self._ahead(strayed * same, state.last[:, None, 3:])  # [batch, n + 1, 1]
        moved = expected + strayed + ahead[:, 1:] - ahead[:, :-1]
        at = phase[:, :-1] + ahead[:, :-1] + moved * self.fade[1]  # [batch, n, hop]
        tone = self._read(at - at.floor(), after).flatten(1) * (level - FLOOR_LEVEL).clamp_min(0.0)
        heard = torch.matmul(neighbours(voiced[..., 0], hops), self.fade).flatten(1)
        heard = heard * share
        last = torch.cat([ends[:, -1], ahead[:, -1]], dim=1)
        return audio + heard * (tone - audio), OscillatorState(framer, envelope, last)

    def _ahead(self, strayed: Tensor, last: Tensor) -> Tensor:
        """How far the tone's phase is ahead of the input's, the last one first: [batch, n, 1] -> [batch, n + 1, 1].

        In turns. It keeps its pace where the input's phase strays, and comes back to it slowly: a one-pole filter, as
        one product, since a graph has no loops.
        """
        hops = torch.arange(strayed.shape[1], device=strayed.device)
        apart = hops[:, None] - hops + 1.0
        kept = (1.0 - LOCKING) ** apart.clamp_min(0.0)
        # Not as a product of matrices: what is no number yet to come must not reach what has been.
        new = torch.where(apart > 0.0, kept * strayed.transpose(1, 2), 0.0).sum(dim=2, keepdim=True)
        return torch.cat([last, (1.0 - LOCKING) ** (hops + 1.0)[:, None] * last - new], dim=1)

    def _read(self, at: Tensor, frequency: Tensor) -> Tensor:
        """Where in the period [batch, n, hop], frequency [batch, n, 1] per sample -> samples [batch, n, hop]."""
        octave = (frequency * (self.sample_rate / FULL_HZ)).clamp_min(1.0).log2()
        table = (TABLES_PER_OCTAVE * octave).clamp_max(TABLES - 1.0).floor()
        place = at * TABLE_SAMPLES
        whole = place.floor().clamp_max(TABLE_SAMPLES - 1.0)
        first = table * (TABLE_SAMPLES + 1) + whole
        first = torch.where(first >= 0.0, first, 0.0).long()  # what is no number is at no place
        low, high = (self.tables.index_select(0, index.flatten()).reshape(at.shape) for index in (first, first + 1))
        return low + (high - low) * (place - whole)
