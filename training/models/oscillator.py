"""A tone at the pitch of what comes in, for styles that sound one note at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from realtime.spectral import SpectralSpec
from training.layers import FLOOR_LEVEL, Envelope, EnvelopeState, Framer, FramerState, fade

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
SMALLEST = 1e-20  # a length that is none


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
    angles: Tensor  # [samples, 1]: of a wave of one period per sample, 0 at the newest
    quarter: Tensor  # [1, re|im]: how far the cosine is turned to give the real part, and the imaginary one turned over
    ranks: Tensor  # [LAGS]: a number of its own for each lag, the first the highest
    bend: Tensor  # [before|peak|after, shift's numerator|its denominator|height]
    powers: Tensor  # [len(ARCTANGENT)]
    arctangent: Tensor  # [len(ARCTANGENT), 1], in turns
    tables: Tensor  # [TABLES * TABLE_SAMPLES, value|difference to the next]
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
        tables = wavetables()
        for name, value in {
            "kernel": triangle[None, None],
            "span": (at >= LAGS - 1 - lag) & (at < self.samples - lag),
            "weights": np.sin(np.pi * (np.arange(self.samples) + 0.5) / self.samples) ** 2,
            "angles": 2.0 * np.pi * (np.arange(self.samples)[:, None] - (self.samples - 1.0)),
            "quarter": np.array([[0.0, 0.5 * np.pi]]),
            "ranks": np.append(np.arange(LAGS - 1, 0, -1), 0),  # the last one has no neighbour
            "bend": np.array([[0.5, 1.0, 0.0], [0.0, -2.0, 1.0], [-0.5, 1.0, 0.0]]),
            "powers": np.arange(len(ARCTANGENT)),
            "arctangent": np.array(ARCTANGENT)[:, None] / np.pi,
            "tables": np.stack([tables[:, :-1], np.diff(tables)], axis=2).reshape(-1, 2),
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
        alike = alike / (energy * energy[..., :1]).clamp_min(1e-13).sqrt()
        alike = alike * (alike < DIP).float().cumsum(dim=-1).clamp_max(1.0)  # nothing before the first dip
        height = (NEAR * alike.amax(dim=-1, keepdim=True)).clamp_min(CERTAIN)
        peak = alike >= torch.maximum(nn.functional.max_pool1d(alike, 3, 1, 1), height)
        ranked = peak.float() * self.ranks
        first = ranked.argmax(dim=-1, keepdim=True).clamp(1, LAGS - 2)
        found = ranked.amax(dim=-1, keepdim=True).sign()
        around = alike.gather(2, first + torch.arange(-1, 2, device=low.device))
        over, under, clear = torch.matmul(around, self.bend).chunk(3, dim=-1)
        lag = first + (over / under.clamp_max(-1e-6)).clamp(-0.5, 0.5)
        return found / lag, clear * found

    def turns(self, parts: Tensor) -> Tensor:
        """Angles of complex numbers [..., re|im], from -0.5 to 0.5 of a turn [..., 1]."""
        length = parts.square().sum(dim=-1, keepdim=True).sqrt()
        real, imaginary = parts.chunk(2, dim=-1)
        half = imaginary / (length + real.abs()).clamp_min(SMALLEST)  # the tangent of half the angle, within one
        turns = torch.matmul(half.square().pow(self.powers), self.arctangent) * half
        behind = torch.where(imaginary < 0.0, -0.5, 0.5) - turns
        return torch.where(real < 0.0, behind, turns)

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
        waves = torch.cos(self.angles * frequency[..., None] + self.quarter)  # [batch, n, samples, re|im]
        phase = self.turns(torch.matmul((low * self.weights)[:, :, None], waves).squeeze(2))
        frequency = frequency / DECIMATION
        voiced = ((clear - CLEAR[0]) / (CLEAR[1] - CLEAR[0])).clamp(0.0, 1.0)
        now = torch.cat([phase, frequency, voiced], dim=-1)
        before = torch.cat([state.last[:, None, :3], now[:, :-1]], dim=1)
        phase, frequency_before, heard = before.chunk(3, dim=-1)
        turned, changed, more = (now - before).chunk(3, dim=-1)
        expected = 0.5 * self.hop_samples * (frequency_before + frequency)
        strayed = turned - expected
        strayed = strayed - strayed.round()
        same = (changed.abs() < JUMP * frequency).float()
        ahead = self._ahead(strayed * same, state.last[:, None, 3:])  # [batch, n + 1, 1]
        moved = expected + strayed + ahead[:, 1:] - ahead[:, :-1]
        at = phase + ahead[:, :-1] + moved * self.fade[1]  # [batch, n, hop]
        tone = self._read(at - at.floor(), frequency).flatten(1) * (level - FLOOR_LEVEL).clamp_min(0.0)
        heard = (heard + more * self.fade[1]).flatten(1) * share
        last = torch.cat([now[:, -1], ahead[:, -1]], dim=1)
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
        above = (frequency * (self.sample_rate / FULL_HZ)).clamp_min(1.0).log()  # in nepers, where octaves have ln 2
        table = (above * (TABLES_PER_OCTAVE / np.log(2.0))).clamp_max(TABLES - 1.0).floor()
        place = at * TABLE_SAMPLES
        whole = place.floor().clamp_max(TABLE_SAMPLES - 1.0)
        first = table * TABLE_SAMPLES + whole
        first = torch.where(first >= 0.0, first, 0.0).long()  # what is no number is at no place
        value, difference = nn.functional.embedding(first, self.tables).unbind(dim=-1)
        return value + difference * (place - whole)
