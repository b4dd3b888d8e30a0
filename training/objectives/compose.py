"""Learning to continue tunes: every event foretold from all events before it in its tune.

Segments of a tune follow each other in a row of the batch, and the state goes from one to the next while gradients stop
between them: truncated back-propagation through time (Williams and Peng, "An efficient gradient-based algorithm for
on-line training of recurrent network trajectories", 1990).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from realtime.notes import make_vocabulary
from training.beginning import Beginning
from training.checkpoint import AVERAGE, CheckpointError
from training.models.composer import Composer, ComposerState
from training.objectives.objective import Objective
from training.recipe import Recipe
from training.tunes import IGNORED, NoteBatch

STATE_KEY = "composer_state"
HELD_OUT = ("validation", "test")
"""Splits in the order of the loaders that validation reads."""


class ComposeObjective(Objective):
    """A composer, and a moving average of its weights, if the recipe wants it.

    ``card`` has, besides what every run's has, ``note_counts`` and ``baselines`` of the held-out splits.
    """

    def __init__(self, recipe: Recipe, card: dict[str, Any]) -> None:
        super().__init__(recipe, card)
        self.composer = Composer(recipe.composer, len(make_vocabulary().tokens))
        if self.averaging:
            self.average_composer = copy.deepcopy(self.composer).requires_grad_(False)
        self._carried: ComposerState | None = None
        self._surprise = dict.fromkeys(HELD_OUT, 0.0)
        self._events = dict.fromkeys(HELD_OUT, 0)

    def begin_with(self, beginning: Beginning) -> None:
        """Take over what another run learned; call before training. Raises CheckpointError where it does not fit."""
        ours = self.state_dict()
        for name, value in ours.items():
            found = beginning.weights.get(name.removeprefix(AVERAGE))
            if found is None or found.shape != value.shape:
                raise CheckpointError(
                    f"{beginning.path}: state_dict.{name}: has shape {None if found is None else tuple(found.shape)}, "
                    f"the recipe's model {tuple(value.shape)}; begin with a run of the same [composer], or without one"
                )
            ours[name] = found
        self.load_state_dict(ours)
        self.take_history(beginning)

    def averages(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.average_composer, self.composer)]

    def training_step(self, batch: NoteBatch, batch_idx: int) -> Tensor:
        del batch_idx
        state = self._state_before(batch)
        logits, after = self.composer(batch.tokens, state)
        self._carried = ComposerState(after.hidden.detach(), after.cell.detach())
        loss = surprise(logits, batch.targets).sum() / (batch.targets != IGNORED).sum().clamp_min(1)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.tokens))
        return loss

    def _state_before(self, batch: NoteBatch) -> ComposerState:
        """What each row remembers of its tune so far; zeros where a tune begins."""
        fresh = self.composer.init_state(len(batch.tokens))
        before = self._carried
        if before is None or before.hidden.shape != fresh.hidden.shape:
            before = fresh
        goes_on = (~batch.begins).to(batch.tokens.device)[:, None, None]
        hidden, cell = (value.to(batch.tokens.device) for value in (before.hidden, before.cell))
        return ComposerState(hidden * goes_on, cell * goes_on)

    def validation_step(self, batch: NoteBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        del batch_idx
        split = HELD_OUT[dataloader_idx]
        composer = self.average_composer if self.averaging else self.composer
        start = composer.init_state(len(batch.tokens))
        device = batch.tokens.device
        logits, _ = composer(batch.tokens, ComposerState(start.hidden.to(device), start.cell.to(device)))
        self._surprise[split] += float(surprise(logits, batch.targets).sum())
        self._events[split] += int((batch.targets != IGNORED).sum())

    def on_validation_epoch_end(self) -> None:
        values: dict[str, float] = {}
        for split in HELD_OUT:
            if self._events[split]:
                total = torch.tensor(self._surprise[split], dtype=torch.float64)
                values[f"{split}/loss"] = float(total / self._events[split])
                values[f"{split}/perplexity"] = float((total / self._events[split]).exp())
                values[f"{split}/perplexity_per_note"] = float((total / self.card["note_counts"][split]).exp())
        values |= self.card["baselines"]
        self.log_dict(values, sync_dist=True)
        self.log("validation_loss", values["validation/loss"], prog_bar=True, logger=False, sync_dist=True)
        self.metrics = {name: round(value, 6) for name, value in values.items()}
        self._surprise = dict.fromkeys(HELD_OUT, 0.0)
        self._events = dict.fromkeys(HELD_OUT, 0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._carried is not None:
            checkpoint[STATE_KEY] = {"hidden": self._carried.hidden.cpu(), "cell": self._carried.cell.cpu()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get(STATE_KEY)
        self._carried = ComposerState(state["hidden"], state["cell"]) if state else None


def surprise(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in natural log units: logits [batch, time, vocabulary], targets [batch, time] -> [batch, time].

    Zero where the target is IGNORED.
    """
    return functional.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
