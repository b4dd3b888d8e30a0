"""Learning to recognise styles: excerpts of recordings in, their style out, calibrated on recordings held out.

Excerpts are coloured anew each time (tape speed, equaliser, hiss, stretches hidden), so that the style is learned and
not a room or a microphone. What a recording is validated on is what ``restyle recognise`` makes of it.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from realtime.recognise import (
    after_silence,
    cut_excerpts,
    excerpt_samples,
    expected_calibration_error,
    level_dbfs,
    loud_enough,
)
from training.layers import on_device
from training.library import Library, Recording
from training.models.classifier import LABEL_SMOOTHING, attacked
from training.models.recogniser_judge import heard_elsewhere
from training.models.streaming_recogniser import RANGE_DB, Recognition, StreamingRecogniser
from training.objectives.objective import Objective
from training.objectives.restore import Batch, in_batches
from training.recipe import Recipe

EARLIEST_SHARE = 1 / 12  # of an excerpt: from here on a style may have to be known
TEMPERATURES = (0.1, 10.0)


def at_speeds(audio: Tensor, semitones: Tensor, samples: int) -> Tensor:
    """Pitch and speed together, as a tape does: [batch, raw], [batch] -> [batch, samples], from the first sample on.

    By straight lines between samples: what that dulls and mirrors lies above the bands that are looked at.
    """
    sizes = (samples * 2.0 ** (semitones / 12.0)).round().int().tolist()
    moved = [
        nn.functional.interpolate(row[None, None, :size], size=samples, mode="linear", align_corners=True)[0]
        for row, size in zip(audio, sizes, strict=True)
    ]
    return torch.cat(moved)


def decision_hops(hops: int, random: np.random.Generator) -> list[int]:
    """When an excerpt's style should be known: at its end, and at two moments before, so that little sound will do."""
    middle = max(1, hops // 2)
    early, late = random.integers(round(EARLIEST_SHARE * hops), middle), random.integers(middle, max(middle + 1, hops))
    return [int(early), min(int(late), hops - 1), hops - 1]


def fit_temperature(scores: NDArray[np.float32], style: NDArray[np.int64]) -> float:
    """By what to divide scores [count, styles] for the least cross entropy against styles [count]."""
    logits, target = torch.from_numpy(scores).double(), torch.from_numpy(style)

    def loss(log_temperature: float) -> float:
        return float(nn.functional.cross_entropy(logits / math.exp(log_temperature), target))

    low, high = (math.log(value) for value in TEMPERATURES)
    return math.exp(float(minimize_scalar(loss, bounds=(low, high), method="bounded").x))  # pyright: ignore[reportAttributeAccessIssue]


def recording_excerpts(recording: Recording, samples: int, most: int) -> list[NDArray[np.float32]]:
    """The excerpts [samples] that ``restyle recognise`` would count, at most so many, spread over the recording."""
    found = list(cut_excerpts([np.asarray(recording.audio())], samples))
    loud = loud_enough([level_dbfs(excerpt) for excerpt in found])
    found = [excerpt for excerpt, is_loud in zip(found, loud, strict=True) if is_loud]
    chosen = np.unique(np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int))
    return [after_silence(found[i], samples) for i in chosen.tolist()]


class RecogniseObjective(Objective):
    """The streaming recogniser, and a moving average of its weights if the recipe wants it."""

    def __init__(self, recipe: Recipe, card: dict[str, Any]) -> None:
        super().__init__(recipe, card)
        self.recogniser = StreamingRecogniser(recipe.spectral, recipe.recogniser, len(recipe.style))
        if self.averaging:
            self.average_recogniser = copy.deepcopy(self.recogniser).requires_grad_(False)
        self._heard: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    def validation_batches(library: Library, recipe: Recipe) -> list[Batch]:
        """Excerpts of held-out recordings as they are, up to ``trainer.validation_segments`` of each."""
        samples = excerpt_samples(recipe.spectral)
        rows = [
            (excerpt, number)
            for number, style in enumerate(library.styles)
            for recording in style.validation
            for excerpt in recording_excerpts(recording, samples, recipe.trainer.validation_segments)
        ]
        return in_batches(rows, recipe.trainer.batch_size)

    def hear(self, raw: Tensor, random: torch.Generator | None = None, style: Tensor | None = None) -> Recognition:
        """Recordings [batch, raw samples] -> what is said after each hop; coloured where there is a ``random``.

        And made to mislead about its ``style`` [batch], if there is one and the recipe says by how much.
        """
        net = self.average_recogniser if self.averaging and random is None else self.recogniser
        state = on_device(net.init_state(len(raw)), raw.device)
        if random is None:
            power, _ = net.listen(raw, state.framer)
            return net.recognise(net.relate(power, state.peak)[0], state)[0]
        with torch.no_grad():
            # Two draws make a triangle: small changes are the rule.
            spread = torch.rand(2, len(raw), generator=random, device=raw.device).sum(dim=0) - 1.0
            played = at_speeds(raw, self.recipe.augment.pitch_semitones * spread, self.recipe.segment_samples)
            power, _ = net.listen(played, state.framer)
            seen = heard_elsewhere(net, power, state.peak, random)
        attack_db = self.recipe.augment.attack_db
        if style is not None and attack_db:
            most = attack_db / RANGE_DB
            seen = attacked(lambda x: net.recognise(x, state)[0].scores[:, -1], seen, style, most, random)
        return net.recognise(seen, state)[0]

    # -- Lightning ----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        del batch_idx
        random = torch.Generator(device=batch.raw.device).manual_seed(batch.seed)
        scores = self.hear(batch.raw, random, batch.style).scores
        moments = decision_hops(scores.shape[1], np.random.default_rng(batch.seed))
        said = scores[:, moments].flatten(0, 1)
        style = batch.style.repeat_interleave(len(moments))
        loss = nn.functional.cross_entropy(said, style, label_smoothing=LABEL_SMOOTHING)
        right = (scores[:, -1].argmax(dim=1) == batch.style).float().mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.style))
        self.log("train/accuracy", right, prog_bar=True, batch_size=len(batch.style))
        return loss

    def averages(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.average_recogniser, self.recogniser)]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        del batch_idx
        self._heard.append((self.hear(batch.raw).scores[:, -1].float().cpu(), batch.style.cpu()))

    def on_validation_epoch_end(self) -> None:
        scores = torch.cat([scores for scores, _ in self._heard])
        style = torch.cat([style for _, style in self._heard])
        temperature = fit_temperature(scores.numpy(), style.numpy())
        for net in (self.recogniser, *((self.average_recogniser,) if self.averaging else ())):
            net.temperature.fill_(temperature)
        probabilities = torch.softmax(scores / temperature, dim=1)
        right = probabilities.argmax(dim=1) == style
        values = {
            "validation/loss": float(nn.functional.cross_entropy(scores / temperature, style)),
            "validation/accuracy": float(right.float().mean()),
            "validation/expected_calibration_error": expected_calibration_error(
                probabilities.amax(dim=1).numpy(), right.numpy()
            ),
            "validation/temperature": temperature,
        }
        for row, entry in enumerate(self.recipe.style):
            if bool((style == row).any()):
                values[f"validation/style/{entry.id}"] = float(right[style == row].float().mean())
        self.log_dict(values, sync_dist=True)
        self.log("validation_loss", values["validation/loss"], prog_bar=True, logger=False, sync_dist=True)
        self.metrics = {name: round(value, 6) for name, value in values.items()}
        self._heard = []
