"""CycleGAN: styles without pairs, every direction between them in one generator.

Zhu et al., "Unpaired image-to-image translation using cycle-consistent adversarial networks", 2017: a recording on its
way to another style must deceive that style's critic and, led back, be the recording again; led to its own style it
stays as it is. One generator for all directions, told by a style vector: Choi et al., "StarGAN", 2018, section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.beginning import Beginning
from training.losses import level_l1, pitch_loss
from training.objectives.judges import Fakes, Hearing, hear_judges
from training.objectives.restore import Batch, RestoreObjective
from training.recipe import Recipe

PLAIN_SHARE = 0.25  # of rows without noise, so that none is a choice like any other


class FakePool:
    """Past fakes: the critic then learns from all that the generator does and not from its newest habit alone.

    Shrivastava et al., "Learning from simulated and unsupervised images through adversarial training", 2017, section
    2.3: half of what is asked for comes from the pool, and the new takes its place there.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: list[tuple[Tensor, Tensor]] = []

    def exchange(self, fakes: Fakes, random: torch.Generator) -> Fakes:
        """As many rows as come in, some of them from earlier calls; their gradients end here."""
        rows: list[tuple[Tensor, Tensor]] = []
        for row in zip(fakes.audio.detach(), fakes.style, strict=True):
            if len(self.kept) < self.size:
                self.kept.append(row)
                rows.append(row)
            elif self.size and float(torch.rand((), generator=random)) < 0.5:
                at = int(torch.randint(self.size, (), generator=random))
                rows.append(self.kept[at])
                self.kept[at] = row
            else:
                rows.append(row)
        return Fakes(torch.stack([audio for audio, _ in rows]), torch.stack([style for _, style in rows]))


class CycleObjective(RestoreObjective):
    """Every row goes to another style and back, and to its own; see the module's text.

    With ``cycle.noise_dims``, so many numbers at the end of a style vector are noise: other noise, another rendering.
    """

    def __init__(self, recipe: Recipe, card: dict[str, Any]) -> None:
        super().__init__(recipe, card)
        self.pool = FakePool(recipe.cycle.pool_size)
        self._clear_noise()

    def begin_with(self, beginning: Beginning) -> None:
        """As any run; numbers that are noise here stay zero in the style vectors."""
        super().begin_with(beginning)
        self._clear_noise()

    def _clear_noise(self) -> None:
        with torch.no_grad():
            for table in (self.styles, *([self.average_styles] if self.averaging else [])):
                table.weight[:, self.recipe.model.style_dim - self.recipe.cycle.noise_dims :] = 0.0

    def vectors(self, style: Tensor, random: torch.Generator) -> Tensor:
        """Style vectors [batch, style_dim] of ``style`` [batch], most of them with noise in their last numbers."""
        noise_dims, (rows, dims) = self.recipe.cycle.noise_dims, (len(style), self.recipe.model.style_dim)
        noise = torch.randn(rows, noise_dims, generator=random) * (torch.rand(rows, 1, generator=random) > PLAIN_SHARE)
        known, noise = self.styles(style)[:, : dims - noise_dims], noise.to(style.device)
        return torch.cat([known, noise], dim=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        del batch_idx
        random = torch.Generator().manual_seed(batch.seed + 1)
        own, styles = batch.style, len(self.recipe.style)
        other = (own + torch.randint(1, styles, own.shape, generator=random).to(own.device)) % styles
        real, rate, config = self.pair(batch).target, self.recipe.spectral.sample_rate, self.recipe.cycle
        sizes = self._fft_sizes(random)
        made, _ = self.restore(real, self.vectors(other, random))
        back, _ = self.restore(made, self.vectors(own, random))
        same, _ = self.restore(real, self.vectors(own, random))
        cycle = self.restoration_loss(back, real, sizes).total.mean()
        identity = self.restoration_loss(same, real, sizes).total.mean()
        kept = level_l1(made, real[:, : made.shape[1]], rate).mean()
        total = config.weight * cycle + config.identity_weight * identity + kept
        values = {"loss": total.detach(), "cycle": cycle, "identity": identity, "level": kept}
        if self.recipe.loss.pitch:
            values["pitch"] = pitch_loss(made, real[:, : made.shape[1]], rate).mean()
            total = total + self.recipe.loss.pitch * values["pitch"]
        if self.criticising:
            made_or_past = self.pool.exchange(Fakes(made, other), random)
            judged, said = hear_judges(
                self.judges,
                self.recipe.adversary,
                Hearing(made.float(), real[:, : made.shape[1]], other, own, torch.ones_like(own, dtype=torch.bool)),
                batch.seed + 2,
                made_or_past,
            )
            total, values = total + judged, values | said
        elif self.trainer.world_size > 1:
            total = total + self._untouched()
        self.log("train/loss", values.pop("loss"), prog_bar=True, batch_size=len(own))
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=len(own))
        return total
