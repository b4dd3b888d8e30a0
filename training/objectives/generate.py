"""Sound from noise: a generator that hears random numbers alone against judges that know real recordings of each style.

Generative adversarial networks (Goodfellow et al., 2014), recurrent as Mogren, "C-RNN-GAN", 2016, by truncated
back-propagation through time (Williams and Peng, 1990): state goes on from segment to segment, gradients do not. The
judges are those of the other objectives, told the style (Mirza and Osindero, "Conditional generative adversarial
nets", 2014). Three plain losses help them: statistics of mel bands, level, and how likely each note is. The last is
learned from recordings by maximum likelihood, since spectra say little about which way a pitch should move (Turian and
Henry, "I'm sorry for your loss: spectrally-based audio distances are bad at pitch", 2020).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.layers import detached, on_device
from training.losses import HIGHEST_PITCH_HZ, clear_periods
from training.models.noise_player import LOWEST_NOTE, NOTES, NoisePlayer
from training.models.spectrogram import RelativeMel
from training.objectives.judges import Hearing, hear_judges
from training.objectives.restore import Batch, RestoreObjective
from training.recipe import Recipe

STATISTICS_FFT, STATISTICS_BANDS = 2048, 64
LEVEL_AT_FULL = 0.1  # root mean square of what is made at full intensity
INTENSITIES = (0.1, 1.0)
REST_SECONDS = (0.05, 0.4)
FLOOR_RMS = 1e-4


def noise_excerpt(rows: int, hops: int, rest_chance: float, hop_seconds: float, seed: int) -> Tensor:
    """Levels [rows, hops] of noise for training: an intensity for each row, and in some a rest, often at the start."""
    random = np.random.default_rng([3, seed])
    levels = np.repeat(random.uniform(*INTENSITIES, (rows, 1)), hops, axis=1)
    for row in np.flatnonzero(random.random(rows) < rest_chance):
        length = round(random.uniform(*REST_SECONDS) / hop_seconds)
        start = max(0, int(random.integers(-hops, hops)))
        levels[row, start : start + length] = 0.0
    return torch.from_numpy(levels.astype(np.float32))


def mel_statistics(mel: Tensor) -> Tensor:
    """Log mel bands [batch, 1, bands, frames] -> mean, spread and mean change of each over time [batch, 3*bands]."""
    mel = mel[:, 0]
    change = (mel[:, :, 1:] - mel[:, :, :-1]).abs().mean(dim=2)
    return torch.cat([mel.mean(dim=2), mel.std(dim=2), 2.0 * change], dim=1)


def note_loss(scores: Tensor, audio: Tensor, sample_rate: int) -> Tensor:
    """Cross entropy of scores [batch, NOTES] against the notes that recordings [batch, samples] clearly play."""
    period, _, weight = clear_periods(audio, sample_rate)
    hertz = sample_rate / (period + round(sample_rate / HIGHEST_PITCH_HZ)).float()
    note = (69.0 + 12.0 * torch.log2(hertz / 440.0)).round().long() - LOWEST_NOTE
    known = torch.log_softmax(scores, dim=1).gather(1, note[..., 0].clamp(0, NOTES - 1))
    return -(known * weight[..., 0]).sum() / weight.sum().clamp_min(1.0)


class GenerateObjective(RestoreObjective):
    """What is trained is a ``NoisePlayer``; see the module's text."""

    generator: NoisePlayer

    def __init__(self, recipe: Recipe, card: dict[str, Any]) -> None:
        super().__init__(recipe, card)
        self.mel = RelativeMel(recipe.spectral.sample_rate, STATISTICS_FFT, STATISTICS_BANDS)
        self._carried: tuple[int, Any] | None = None
        self._distances: list[tuple[Tensor, Tensor]] = []

    def noise(self, batch: Batch) -> Tensor:
        """Random signs times levels for the batch's segment [batch, segment samples]."""
        spec, rows = self.recipe.spectral, len(batch.style)
        hops = self.recipe.excerpt_samples // spec.hop_samples
        levels = noise_excerpt(rows, hops, self.recipe.generate.rest_chance, spec.hop_seconds, batch.seed)
        here = self._here(batch)
        random = torch.Generator().manual_seed(batch.seed + 3 + batch.segment)
        signs = 2.0 * torch.randint(2, (rows, here.stop - here.start), generator=random) - 1.0
        levels = levels.repeat_interleave(spec.hop_samples, dim=1)[:, here]
        return (levels * signs).to(batch.raw.device)

    def _here(self, batch: Batch) -> slice:
        at = batch.segment * self.recipe.segment_samples
        return slice(at, at + self.recipe.segment_samples)

    def play(self, noise: Tensor, vectors: Tensor, averaged: bool = False, state: Any = None) -> tuple[Tensor, Any]:
        """Noise [batch, samples], style vectors [batch, style_dim] -> audio [batch, samples] and the state after it."""
        player = self.average_generator if averaged else self.generator
        if state is None:
            state = on_device(player.init_state(len(noise)), noise.device)
        return player(noise, vectors, state)

    def statistics_distance(self, made: Tensor, real: Tensor) -> Tensor:
        """Mean difference of the mel statistics of audio [batch, samples], both: [batch]."""
        return (mel_statistics(self.mel(made)) - mel_statistics(self.mel(real)).detach()).abs().mean(dim=1)

    # -- Lightning ----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        del batch_idx
        config, size = self.recipe.generate, len(batch.style)
        carried = self._carried
        state = carried[1] if batch.segment and carried is not None and carried[0] == batch.seed else None
        noise, real = self.noise(batch), batch.raw[:, self._here(batch)]
        vectors = self.styles(batch.style)
        made, state = self.play(noise, vectors, state=state)
        self._carried = batch.seed, detached(state)
        made = made.float()
        level = made.square().mean(dim=1).clamp_min(FLOOR_RMS**2).sqrt()
        wanted = (LEVEL_AT_FULL * noise.square().mean(dim=1).sqrt()).clamp_min(FLOOR_RMS)
        values = {
            "statistics": self.statistics_distance(made, real).mean(),
            "notes": note_loss(self.generator.note_scores(vectors), real, self.recipe.spectral.sample_rate),
            "level": (level.log() - wanted.log()).abs().mean(),
        }
        total = (
            config.statistics_weight * values["statistics"]
            + config.notes_weight * values["notes"]
            + config.level_weight * values["level"]
        )
        if self.criticising:
            # No row is a rendering of the recording beside it: all count as crossed.
            hearing = Hearing(made, real, batch.style, batch.style, torch.ones_like(batch.style, dtype=torch.bool))
            judged, said = hear_judges(self.judges, self.recipe.adversary, hearing, batch.seed + 2)
            total, values = total + judged, values | said
        elif self.trainer.world_size > 1:
            total = total + self._untouched()
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=size)
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        del batch_idx
        batch = batch._replace(segment=0)
        noise, real = self.noise(batch), batch.raw[:, self._here(batch)]
        styles = self.average_styles if self.averaging else self.styles
        made, _ = self.play(noise, styles(batch.style), averaged=self.averaging)
        self._distances.append((batch.style.cpu(), self.statistics_distance(made, real).cpu()))
        if self.witness is not None:
            self.testified.append(self.taken_for(batch.style, made))
        self.keep_media(batch.style, noise, made, real)

    def on_validation_epoch_end(self) -> None:
        style = torch.cat([style for style, _ in self._distances])
        distance = torch.cat([distance for _, distance in self._distances])
        self.close_validation({"validation/statistics": distance.mean()}, style, distance)
        self._distances = []
