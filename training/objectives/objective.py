"""What every objective does around its losses: time, averages, steps that are no good, and the checkpoint's card."""

from __future__ import annotations

import dataclasses
import logging
import math
import platform
import time
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule
from torch import nn

from training.beginning import Beginning
from training.checkpoint import AVERAGE, CHECKPOINT_FORMAT, CHECKPOINT_KEY, CheckpointError
from training.recipe import OptimiserConfig, Recipe

log = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 20


class TrainingError(RuntimeError):
    """A run that cannot start or cannot go on; the text names the remedy."""


def learning_rate_factor(step: int, steps: int, config: OptimiserConfig) -> float:
    """Share of the full rate at ``step``: a straight rise, then half a cosine down to the final fraction."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return config.final_fraction + (1.0 - config.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))


def content_sha256(listed: dict[str, Any]) -> str:
    """What a recording or a tune in a card is known by: its sound, whatever its format; a tune by its file."""
    return listed.get("audio_sha256", listed["sha256"])


class Objective(LightningModule):
    """The frame of a run; what is learned, from what and by which loss is for the classes made of it."""

    def __init__(self, recipe: Recipe, card: dict[str, Any]) -> None:
        """``card``: plain values for the model card that the recipe does not know (splits, hashes)."""
        super().__init__()
        self.recipe, self.card = recipe, card
        self.averaging = recipe.trainer.average_decay > 0
        self.metrics: dict[str, float] = {}
        self._skipped_steps = 0  # in a row
        self._wall_seconds_before = 0.0
        self._started = time.monotonic()

    def averages(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """Pairs of a module and the one whose moving average it is; asked for where the recipe wants averages."""
        raise NotImplementedError

    def begin_with(self, beginning: Beginning) -> None:
        """Take over what another run learned; call before training. Raises CheckpointError where that cannot be."""
        raise CheckpointError(
            f"{beginning.path}: objective '{self.recipe.objective}' begins with no other run; leave out --from"
        )

    def take_history(self, beginning: Beginning) -> None:
        """Let the card name what ``beginning`` heard."""
        kept = ("styles", "recordings", "tunes", "steps", "wall_seconds", "began_with")
        self.card["began_with"] = {name: beginning.card[name] for name in kept if name in beginning.card}
        self.remember_recordings(beginning.card.get("recordings", {}))

    def parameter_groups(self, names: Sequence[str]) -> list[list[str]]:
        """Which weights are learned together, from the names of all: those that are no averages."""
        return [[name for name in names if not name.startswith(AVERAGE)]]

    def learning_rates(self) -> tuple[float, ...]:
        """Of each group of weights that there can be."""
        return (self.recipe.optimiser.learning_rate,)

    def configure_optimizers(self) -> Any:
        config, steps = self.recipe.optimiser, self.recipe.trainer.steps
        weights = dict(self.named_parameters())
        groups = [
            {"params": [weights[name] for name in names], "lr": rate}
            for names, rate in zip(self.parameter_groups(list(weights)), self.learning_rates(), strict=False)
        ]
        optimiser = torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate_factor(step, steps, config))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def wall_seconds(self) -> float:
        """Time spent training, over all runs that led here."""
        return self._wall_seconds_before + time.monotonic() - self._started

    def on_train_start(self) -> None:
        self._started = time.monotonic()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step without finite gradients is passed over; many in a row end the run while the weights are sound."""
        del optimizer
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            self._skipped_steps = 0
            return
        self._skipped_steps += 1
        log.warning("step %d: the gradient is not finite, the step is skipped", self.global_step)
        for parameter in self.parameters():
            parameter.grad = None  # zeros would still let momentum and weight decay move the weights
        if self._skipped_steps >= MAX_SKIPPED_STEPS:
            raise TrainingError(
                f"no finite gradient in {MAX_SKIPPED_STEPS} steps in a row; the last checkpoint is sound: "
                "lower optimiser.learning_rate and run again"
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.averaging:
            # Short averages first, so that the start is forgotten.
            step = self.global_step
            decay = min(self.recipe.trainer.average_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for ours, theirs in self.averages():
                    values = theirs.state_dict()
                    for name, average in ours.state_dict().items():
                        if average.is_floating_point():
                            average.lerp_(values[name].to(average.dtype), 1.0 - decay)
                        else:
                            average.copy_(values[name])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = {
            "format": CHECKPOINT_FORMAT,
            "recipe": self.recipe.as_dict(),
            "objective": self.recipe.objective,
            "styles": [dataclasses.asdict(style) for style in self.recipe.style],
            **self.card,
            "steps": int(self.global_step),
            "wall_seconds": round(self.wall_seconds, 1),
            "metrics": dict(self.metrics),
            "versions": {
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "lightning": str(lightning.__version__),
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        card, ours, theirs = checkpoint[CHECKPOINT_KEY], self.state_dict(), checkpoint["state_dict"]
        shapes = {name: tuple(value.shape) for name, value in ours.items()}
        found = {name: tuple(value.shape) for name, value in theirs.items()}
        if shapes != found:
            wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
            raise CheckpointError(
                f"{self.trainer.ckpt_path}: state_dict.{wrong[0]}: has shape {found.get(wrong[0])}, "
                f"this version's model {shapes.get(wrong[0])}; start anew with --fresh"
            )
        self._wall_seconds_before = float(card["wall_seconds"])
        self.metrics = dict(card["metrics"])
        if "began_with" in card:
            self.card["began_with"] = card["began_with"]
        self.remember_recordings(card.get("recordings", {}))
        # What is stored would bring back the old rates and decay where the recipe names new ones.
        config = self.recipe.optimiser
        for schedule, state in zip(checkpoint["lr_schedulers"], checkpoint["optimizer_states"], strict=True):
            schedule["base_lrs"] = list(self.learning_rates()[: len(state["param_groups"])])
            for group in state["param_groups"]:
                group.update(betas=config.betas, weight_decay=config.weight_decay)

    def remember_recordings(self, earlier: dict[str, Any]) -> None:
        """What earlier runs trained on stays listed as such, also where folders have changed since."""
        for style, now in self.card.get("recordings", {}).items():
            listed = {content_sha256(item) for item in now["train"]}
            heard = [item for item in earlier.get(style, {}).get("train", []) if content_sha256(item) not in listed]
            now["train"] = [*now["train"], *heard]
            unheard = {content_sha256(item) for split in ("validation", "test") for item in now[split]}
            count = sum(content_sha256(item) in unheard for item in heard)
            if count:
                log.warning(
                    "style '%s': its folder has changed; %d recordings now held out were trained on before, "
                    "so its figures flatter: start anew with --fresh to have true ones",
                    style,
                    count,
                )
