"""Sound out of noise: an LSTM that hears a few random numbers per hop and plays an instrument of its own with them.

What comes in are random signs times a level. Signs are white noise of exactly known level: sums of a hop's signs are
the random numbers, the signs themselves the breath and the strokes, and the level is how loud it plays. Nothing in is
nothing out. Two voices and the noise are filtered with gains that the LSTM sets every hop and a style vector steers.

An LSTM that makes music from random numbers, against a discriminator: Mogren, "C-RNN-GAN", 2016. Harmonic and noise
sources under learned filters: Engel et al., "DDSP", 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import i0e
from scipy.stats import norm
from torch import Tensor, nn

from realtime.spectral import SpectralSpec
from training.layers import (
    FilterBank,
    FilterBankState,
    Framer,
    FramerState,
    Lstm,
    LstmState,
    RealDft,
    fade,
    neighbours,
    whole_hops,
)
from training.models.generator import GeneratorConfig, band_matrix

VOICES = 2
FIRST_GAINS = (-1.5, -1.5, -3.0)  # natural log, of the voices and of the noise, before any training
LOWEST_NOTE, NOTES = 24, 85  # MIDI numbers: C1 to C8
NOTES_PER_SECOND = 1.2  # that each voice begins, in the mean, besides those that begin with the sound
WANDERING, KEPT = 6, 3  # random numbers that are new every hop; that are kept for a note, per voice
DECAYS_HOPS = (8.0, 40.0, 200.0)  # how a note's age is told
LONGEST_AGE_HOPS = 4096.0
LEAST_LEVEL = 1e-5  # below it is silence
PULSE_WIDTH_HZ = 4000.0  # at which the partials of a voice have fallen by 4.3 dB
MOST_SHARPNESS = 2000.0  # below 90 Hz, so that rounding stays small on the slopes of a pulse
PHASE_STEPS = 2**16  # to a turn: phases are added up without rounding, so after hours they are still exact
BEND_TURNS = 0.2


@dataclass(frozen=True)
class NoisePlayerState:
    level: Tensor  # [batch, 1]: of the last hop
    kept: Tensor  # [batch, voices, KEPT + 1]: the random numbers of each voice's note, and which note it is
    age: Tensor  # [batch, voices]: of that note in hops
    phase: Tensor  # [batch, voices]: in turns, at the end of the last hop
    bend: Tensor  # [batch, voices]: how far each voice is ahead of its phase, in turns
    body: LstmState
    made: FramerState
    bank: FilterBankState


def note_table(spec: SpectralSpec) -> np.ndarray:
    """[notes, (turns per hop, sharpness, mean, gain)] of pulses exp(sharpness * (cos - 1)) at the notes' pitches.

    Sharpness grows with the period, so that all but the lowest notes have one spectral envelope, a bell of
    PULSE_WIDTH_HZ, and none has partials above half the sample rate; mean and gain bring them to zero mean and unit
    power (von Mises).
    """
    hertz = 440.0 * 2.0 ** ((LOWEST_NOTE + np.arange(NOTES) - 69) / 12.0)
    turns = np.round(hertz * spec.hop_seconds * PHASE_STEPS) / PHASE_STEPS
    sharpness = np.minimum(np.square(PULSE_WIDTH_HZ / hertz), MOST_SHARPNESS)
    mean = i0e(sharpness)
    return np.stack([turns, sharpness, mean, (i0e(2.0 * sharpness) - mean**2) ** -0.5], axis=1)


def last_strike(struck: Tensor) -> Tensor:
    """Zeros and ones [batch, voices, n] -> the place of the last one at or before each [batch, voices, n]; -1: none."""
    at = torch.arange(struck.shape[2], dtype=struck.dtype, device=struck.device)
    if not torch.onnx.is_in_onnx_export():
        return torch.where(struck > 0.0, at, -1.0).cummax(dim=2).values
    # ONNX has no running maximum: the last one is that with as many ones up to it. Square in n, which is then small.
    count = struck.cumsum(dim=2)
    here = (count[:, :, :, None] == count[:, :, None]).to(struck.dtype) * struck[:, :, None]
    return (here * (at + 1.0)).sum(dim=3) - 1.0


class NoisePlayer(nn.Module):
    """Random signs times a level and a style vector in, sound out, without delay; see the module's text."""

    directions: Tensor  # [hop, random numbers]
    notes: Tensor  # [NOTES, 4]; see note_table
    fade: Tensor  # [before|after, hop]

    def __init__(self, spec: SpectralSpec, config: GeneratorConfig) -> None:
        """Of ``config`` it takes ``style_dim``, ``band_count``, ``scale`` and ``hidden``."""
        super().__init__()
        hop, window, hidden = spec.hop_samples, spec.analysis_window_samples, config.hidden
        self.spec, self.config, self.latency_samples = spec, config, spec.stream_delay_samples
        numbers = VOICES * (1 + KEPT) + WANDERING
        random = np.random.default_rng(4099)
        directions = np.linalg.qr(random.standard_normal((hop, numbers)))[0]  # columns of length one: variance one
        for name, value in {"directions": directions, "notes": note_table(spec), "fade": fade(hop)}.items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32), persistent=False)
        self.strike_above = float(norm.isf(NOTES_PER_SECOND * spec.hop_seconds))
        self.choose = nn.Linear(config.style_dim, NOTES)
        self.enter = nn.Linear(WANDERING + 1 + VOICES * (KEPT + 2 + len(DECAYS_HOPS)), hidden)
        self.body = Lstm(hidden, hidden)
        self.steer = nn.Linear(config.style_dim, 2 * 2 * hidden)
        self.leave = nn.Linear(hidden, (VOICES + 1) * config.band_count + VOICES)
        self.made = Framer(window, hop, VOICES + 1)
        self.dft = RealDft(spec)
        bins_hz = np.fft.rfftfreq(window, 1.0 / spec.sample_rate)
        bands = band_matrix(config.band_count, bins_hz, config.scale)
        self.bank = FilterBank(spec, self.dft, VOICES + 1, bands)
        with torch.no_grad():
            self.steer.bias.copy_(torch.tensor([1.0, 0.0] * 2).repeat_interleave(hidden))
            self.leave.weight.mul_(0.1)
            first = torch.tensor(FIRST_GAINS).repeat_interleave(config.band_count)
            self.leave.bias.copy_(torch.cat([first, torch.zeros(VOICES)]))

    def init_state(self, batch: int) -> NoisePlayerState:
        voices = torch.zeros(batch, VOICES)
        return NoisePlayerState(
            level=torch.zeros(batch, 1),
            kept=torch.zeros(batch, VOICES, KEPT + 1),
            age=voices,
            phase=voices.clone(),
            bend=voices.clone(),
            body=self.body.init_state(batch),
            made=self.made.init_state(batch),
            bank=self.bank.init_state(batch),
        )

    def note_scores(self, style: Tensor) -> Tensor:
        """style [batch, style_dim] -> how likely each note is, as logits [batch, NOTES]."""
        return self.choose(style)

    def forward(self, audio: Tensor, style: Tensor, state: NoisePlayerState) -> tuple[Tensor, NoisePlayerState]:
        """audio [batch, n*hop], signs times a level in 0..1; style [batch, style_dim] -> audio [batch, n*hop]."""
        hop = self.spec.hop_samples
        hops, batch = whole_hops(audio.shape[-1], hop, "NoisePlayer"), audio.shape[0]
        blocks = audio.reshape(batch, hops, hop)
        level = blocks.abs().mean(dim=2, keepdim=True)
        numbers = torch.matmul(blocks, self.directions) / level.clamp_min(LEAST_LEVEL)
        chance, wandering, fresh = numbers.split([VOICES, WANDERING, VOICES * KEPT], dim=2)
        levels = torch.cat([state.level[:, None], level], dim=1)
        begins = (levels[:, :-1] < LEAST_LEVEL) & (level >= LEAST_LEVEL)
        struck = ((chance > self.strike_above) | begins).to(audio.dtype).transpose(1, 2)  # [batch, voices, n]

        fresh = fresh.reshape(batch, hops, VOICES, KEPT).transpose(1, 2)
        kept, age = self._hold(fresh, struck, style, state)
        turns, sharpness, mean, gain = nn.functional.embedding(kept[..., KEPT].long(), self.notes)[
            :, :, :, None
        ].unbind(dim=4)  # each [batch, voices, n, 1]
        gains, bend, body = self._decide(wandering, level, struck, kept, age, style, state)

        turned = state.phase.double()[:, :, None] + turns[..., 0].double().cumsum(dim=2)
        ends = torch.fmod(turned, 1.0).float()
        phase = torch.cat([state.phase[:, :, None], ends], dim=2)[:, :, :-1, None]
        bends = torch.cat([state.bend[:, None], bend], dim=1)  # [batch, n + 1, voices]
        ahead = torch.matmul(neighbours(bends, hops).permute(0, 3, 1, 2), self.fade)  # [batch, voices, n, hop]
        place = phase + turns * self.fade[1]
        # Near a pulse, where rounding would be heard, numbers are small.
        half_turn = math.pi * (place - place.round() + ahead)
        pulses = (torch.exp(-2.0 * sharpness * torch.sin(half_turn).square()) - mean) * gain
        voices = pulses.flatten(2) * audio.abs()[:, None]

        frames, made = self.made(torch.cat([voices, audio[:, None]], dim=1), state.made)
        spectra = self.dft(frames).reshape(batch, hops, VOICES + 1, 2, -1)
        out, bank = self.bank(spectra, gains, state.bank)
        after = NoisePlayerState(
            level[:, -1], kept[:, :, -1], age[:, :, -1], ends[:, :, -1], bends[:, -1], body, made, bank
        )
        return out, after

    def _hold(self, fresh: Tensor, struck: Tensor, style: Tensor, state: NoisePlayerState) -> tuple[Tensor, Tensor]:
        """Random numbers [batch, voices, n, KEPT], strikes [batch, voices, n] -> what each voice's note keeps [batch,
        voices, n, KEPT + 1] and its age [batch, voices, n]."""
        likely = torch.softmax(self.note_scores(style), dim=1).cumsum(dim=1)
        share = 0.5 + 0.5 * torch.erf(fresh[..., :1] * 0.5**0.5)  # uniform, for the inverse of the distribution
        note = (share > likely[:, None, None, :-1]).to(fresh.dtype).sum(dim=3, keepdim=True)
        at = torch.arange(fresh.shape[2], dtype=fresh.dtype, device=fresh.device)
        last = last_strike(struck)
        values = torch.cat([fresh, note], dim=3)
        held = values.gather(2, last.clamp_min(0.0).long()[..., None].expand_as(values))
        none = last < 0.0
        kept = torch.where(none[..., None], state.kept[:, :, None], held)
        age = torch.where(none, state.age[:, :, None] + 1.0 + at, at - last)
        return kept, age.clamp_max(LONGEST_AGE_HOPS)

    def _decide(
        self,
        wandering: Tensor,
        level: Tensor,
        struck: Tensor,
        kept: Tensor,
        age: Tensor,
        style: Tensor,
        state: NoisePlayerState,
    ) -> tuple[Tensor, Tensor, LstmState]:
        """What the LSTM hears, hop by hop -> gains in nepers [batch, n, signals, bands], bends [batch, n, voices]."""
        decays = [torch.exp(age / -hops) for hops in DECAYS_HOPS]
        numbers = torch.cat([kept[..., :KEPT], kept[..., KEPT:] / 24.0 - 1.5], dim=3)
        notes = torch.cat([numbers, torch.stack([struck, *decays], dim=3)], dim=3)
        heard = torch.cat([wandering, level, notes.transpose(1, 2).flatten(2)], dim=2)
        scale1, shift1, scale2, shift2 = self.steer(style).chunk(4, dim=-1)
        x = nn.functional.leaky_relu(self.enter(heard.transpose(0, 1)) * scale1 + shift1, 0.1)
        y, body = self.body(x, state.body)
        x = nn.functional.leaky_relu((x + y) * scale2 + shift2, 0.1)
        decided = self.leave(x).transpose(0, 1)
        gains = decided[..., :-VOICES].clamp(-9.0, 3.5).unflatten(2, (VOICES + 1, self.config.band_count))
        return gains, BEND_TURNS * torch.tanh(decided[..., -VOICES:]), body
