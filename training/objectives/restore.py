"""The default objective: hide the style of a recording, learn to restore it, causally.

Pairs come from unpaired recordings, so any folder of recordings is a style. What the model learns to answer a dull
or distorted input with is what it later answers another instrument with.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Sequence
from itertools import chain, count
from typing import Any, NamedTuple

import numpy as np
import soxr
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from torch import Tensor, nn

from training.augment import Pair, bend_pitch, make_pair, make_true_pair, steady_tones
from training.beginning import Beginning, widened
from training.checkpoint import AVERAGE, CheckpointError, fit_traits, new_generator
from training.layers import detached, on_device
from training.losses import LossTerms, SpectralLoss, level_l1, onset_loss, pitch_loss, stroke_loss
from training.models import recogniser
from training.models.classifier import StyleClassifier
from training.models.critic import Critic
from training.models.encoder import StyleEncoder
from training.models.generator import SpectrumGenerator
from training.models.noise_player import NoisePlayer
from training.models.recogniser import Recogniser
from training.objectives.judges import Hearing, Judges, critic_lesson, hear_judges
from training.objectives.likeness import StyleMemory
from training.objectives.objective import Objective
from training.recipe import Recipe

log = logging.getLogger(__name__)

TONE_ROWS, TONE_SECONDS = 4, 0.4
JUDGES = ("critic.", "classifier.")
AS_IS_SHARE = 0.5  # of crossed rows: on stage nothing is disguised
TOGETHER_SHARE = 0.3  # of those
GLIDE_SHARE = 0.5  # of crossed rows, where the recipe has glides: most recordings are notes, and singers glide
SEGMENT_SEEDS = 1_000_003  # from the draws of one segment to those of the next, where each has its own
STYLE_ROWS = ("styles.weight", ".score.weight", ".score.bias")  # names of weights that have one row per style end so
OPTIONAL_PARTS = ("encoder.", f"{AVERAGE}encoder.", *JUDGES)  # a recipe may bring them into a run or leave them out


class Batch(NamedTuple):
    """Recordings as they are; the objective makes its pairs from them on the device."""

    raw: Tensor  # [batch, raw samples], float32
    style: Tensor  # [batch], row of the style table
    seed: int  # of everything random that happens to this batch
    paired: Tensor | None = None  # [batch], rows whose input is another rendering of the same phrase
    input_raw: Tensor | None = None  # [paired rows, raw samples], in the order of those rows
    segment: int = 0  # of the excerpt, which this step learns from


def in_batches(rows: Sequence[tuple[NDArray[np.float32], int]], size: int) -> list[Batch]:
    """Recordings [samples] and their styles, ``size`` at a time, in this order."""
    return [
        Batch(
            torch.from_numpy(np.stack([raw for raw, _ in rows[start : start + size]])),
            torch.tensor([number for _, number in rows[start : start + size]]),
            start,
        )
        for start in range(0, len(rows), size)
    ]


@dataclasses.dataclass(frozen=True)
class _Excerpt:
    """What the segments of one excerpt share, and what the model remembers after the last of them."""

    seed: int
    pair: Pair  # of the whole excerpt
    state: Any  # None before the first segment


class RestoreObjective(Objective):
    """Generator, table of style vectors, hiding and losses; a moving average of the weights, if the recipe wants it.

    So are a style encoder, which hears from a recording what the table knows by name, and two judges: a critic and a
    classifier of styles. Some rows of each batch are to become another style, where only they can say how near it came.
    """

    def __init__(self, recipe: Recipe, card: dict[str, Any]) -> None:
        """``card``: plain values for the model card that the recipe does not know (splits, hashes)."""
        super().__init__(recipe, card)
        self.generator = new_generator(recipe)
        self.styles = nn.Embedding(len(recipe.style), recipe.model.style_dim)  # starts as normal, variance 1
        rate = recipe.spectral.sample_rate
        if recipe.encoder.share:
            self.encoder = StyleEncoder(rate, recipe.model.style_dim)
        if recipe.adversary.weight:
            self.critic = Critic(rate, len(recipe.style))
        if recipe.adversary.classifies:
            self.classifier = StyleClassifier(rate, len(recipe.style), recipe.adversary.classifiers)
            self.classifier.requires_grad_(not recipe.adversary.pretraining_phrases)
        if self.averaging:
            self.average_generator = copy.deepcopy(self.generator).requires_grad_(False)
            self.average_styles = copy.deepcopy(self.styles).requires_grad_(False)
            if recipe.encoder.share:
                self.average_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.loss = SpectralLoss(recipe.loss, recipe.spectral.sample_rate)
        self.memory = StyleMemory() if recipe.adversary.likeness_weight else None
        self._heard: list[tuple[Tensor, LossTerms, Tensor]] = []
        self._media: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._excerpt: _Excerpt | None = None
        self.style_judges: tuple[nn.Module, ...] = ()
        """Recognisers and listeners: they judge style beside the classifier, and stay as they are."""
        self.witness: Recogniser | None = None
        """Says at each validation which style it hears; it never teaches."""
        self.testified: list[Tensor] = []

    def begin_with(self, beginning: Beginning) -> None:
        """Take over what another run learned; call before training. Raises CheckpointError where weights do not fit.

        Styles are matched by id. A new one begins in the middle of all that there were, optional parts as they are. A
        narrower generator is widened.
        """
        ours = self.state_dict()
        narrow = beginning.weights.get("generator.leave.weight")
        hidden, wider = 0 if narrow is None else narrow.shape[-1], self.recipe.model.hidden
        ids = [style["id"] for style in beginning.card["styles"]]
        rows = [ids.index(style.id) if style.id in ids else None for style in self.recipe.style]
        for name, value in ours.items():
            plain = name.removeprefix(AVERAGE)
            found = beginning.weights.get(plain)
            if found is None and plain.startswith(OPTIONAL_PARTS):
                continue
            if found is not None and plain.endswith(STYLE_ROWS):
                found = torch.stack([found.mean(dim=0) if row is None else found[row] for row in rows])
            if found is not None and 0 < hidden < wider:
                found = widened(plain, found, value, hidden, wider)
            if found is None or found.shape != value.shape:
                raise CheckpointError(
                    f"{beginning.path}: state_dict.{plain}: has shape {None if found is None else tuple(found.shape)}, "
                    f"the recipe's model {tuple(value.shape)}; begin with a run of the same [model], or without one"
                )
            ours[name] = found
        self.load_state_dict(ours)
        self.take_history(beginning)

    # -- one pass -----------------------------------------------------------------------------------------------

    def pair(self, batch: Batch, validation: bool = False) -> Pair:
        """Input and target [batch, excerpt samples]; in validation nothing is left unchanged or silent."""
        config = self.recipe.augment
        if validation:
            config = dataclasses.replace(config, identity_chance=0.0, silence_chance=0.0)
        random = torch.Generator(device=batch.raw.device).manual_seed(batch.seed)
        samples, rate = self.recipe.excerpt_samples, self.recipe.spectral.sample_rate
        if batch.paired is None or batch.input_raw is None:
            return make_pair(batch.raw, samples, rate, config, random)
        result = Pair(*(torch.empty(len(batch.raw), samples, device=batch.raw.device) for _ in range(2)))
        wanted, alone = batch.raw[batch.paired], batch.raw[~batch.paired]
        true = make_true_pair(batch.input_raw, wanted, samples, rate, config, self.recipe.phrases, random)
        result.input[batch.paired], result.target[batch.paired] = true.input, true.target
        if len(alone):
            pseudo = make_pair(alone, samples, rate, config, random)
            result.input[~batch.paired], result.target[~batch.paired] = pseudo.input, pseudo.target
        return result

    def restore(self, audio: Tensor, vectors: Tensor, averaged: bool = False, state: Any = None) -> tuple[Tensor, Any]:
        """audio [batch, samples], style vectors [batch, style_dim] -> audio [batch, samples - latency], aligned.

        Goes on from ``state``, the start if None, and gives the state after it.
        """
        generator = self.average_generator if averaged else self.generator
        fit_traits(generator, (self.average_styles if averaged else self.styles).weight, self.recipe)
        if state is None:
            state = on_device(generator.init_state(audio.shape[0]), audio.device)
        answer, state = generator(audio, vectors, state)
        return answer[:, generator.latency_samples :], state

    def _segment(self, batch: Batch) -> tuple[Pair, Any]:
        """Input and target of the batch's segment, and what the model remembers of those before it.

        Truncated back-propagation through time (Williams and Peng, "An efficient gradient-based algorithm for on-line
        training of recurrent network trajectories", 1990): the state goes on from segment to segment, gradients do not.
        """
        if not batch.segment or self._excerpt is None or self._excerpt.seed != batch.seed:
            self._excerpt = _Excerpt(batch.seed, self.pair(batch), None)
        at = batch.segment * self.recipe.segment_samples
        here = slice(at, at + self.recipe.segment_samples)
        pair = self._excerpt.pair
        return Pair(pair.input[:, here], pair.target[:, here]), self._excerpt.state

    def _remembered(self, batch: Batch, crossed: Tensor, vectors: Tensor, drawn: Tensor) -> Any:
        """What the model remembers of the segments before; ``drawn``: the random state at which they were heard.

        Where styles switch, as if they had been of this segment's style, too: a run that goes on does so once.
        """
        assert self._excerpt is not None
        past, pair = slice(0, batch.segment * self.recipe.segment_samples), self._excerpt.pair
        random = torch.Generator()
        random.set_state(drawn)
        heard = self._heard_on_stage(Pair(pair.input[:, past], pair.target[:, past]), crossed, random)
        with torch.no_grad():
            return detached(self.restore(heard, vectors.detach())[1])

    def restoration_loss(self, answer: Tensor, target: Tensor, fft_sizes: tuple[int, ...] | None = None) -> LossTerms:
        """Losses of an answer [batch, samples - latency] against the target [batch, samples]."""
        with torch.autocast(answer.device.type, enabled=False):  # logs of small numbers need float32
            return self.loss(answer.float(), target[:, : answer.shape[1]], fft_sizes)

    def _fft_sizes(self, random: torch.Generator) -> tuple[int, ...]:
        """Those that the loss looks at in this step."""
        sizes, count = self.recipe.loss.fft_sizes, self.recipe.loss.fft_sizes_per_step
        if not count:
            return sizes
        return tuple(sizes[i] for i in torch.randperm(len(sizes), generator=random)[:count].tolist())

    # -- Lightning ----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        for judge in self.style_judges:  # no weights of the run's own, so that no checkpoint has them
            judge.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        del batch_idx
        pair, state = self._segment(batch)
        switched = batch.segment * SEGMENT_SEEDS if self.recipe.adversary.switching else 0
        random = torch.Generator().manual_seed(batch.seed + 1 + switched)
        style, crossed, told_by = self._crossed(batch.style, random)
        vectors, anchor = self._style_vectors(batch.raw, batch.style, style, told_by)
        vectors, blended = self._blended(vectors, crossed, random)
        drawn = random.get_state()
        heard = self._heard_on_stage(pair, crossed, random)
        if state is None and batch.segment:  # the run goes on within an excerpt
            state = self._remembered(batch, crossed, vectors, drawn)
        with torch.set_grad_enabled(not self.critic_leads):
            answer, state = self.restore(heard, vectors, state=state)
        assert self._excerpt is not None
        self._excerpt = dataclasses.replace(self._excerpt, state=detached(state))
        made = answer.float()
        hearing = Hearing(made, pair.target[:, : made.shape[1]], style, batch.style, crossed)
        if blended.any():
            hearing = Hearing(*(rows[~blended] for rows in hearing))
        if self.critic_leads:
            return self._critic_alone(hearing)
        result = self.restoration_loss(answer[~crossed], pair.target[~crossed], self._fft_sizes(random))
        played, rate = heard[:, : answer.shape[1]], self.recipe.spectral.sample_rate
        kept = level_l1(made, played, rate)
        total = (result.total.sum() + (kept * crossed).sum()) / len(style) + anchor
        if self.recipe.loss.pitch:
            drift = pitch_loss(made, played, rate).mean()
            total = total + self.recipe.loss.pitch * drift
            self.log("train/pitch", drift, batch_size=len(style))
        if self.recipe.loss.onsets:
            blurred = onset_loss(made, played, rate).mean()
            total = total + self.recipe.loss.onsets * blurred
            self.log("train/onsets", blurred, batch_size=len(style))
        if self.recipe.loss.strokes:
            struck = stroke_loss(made, played, rate).mean()
            total = total + self.recipe.loss.strokes * struck
            self.log("train/strokes", struck, batch_size=len(style))
        if self.recipe.loss.steadiness:
            unsteady = self.unsteadiness(vectors[:TONE_ROWS], batch.seed)
            total = total + self.recipe.loss.steadiness * unsteady
            self.log("train/unsteadiness", unsteady, batch_size=TONE_ROWS)
        values = {"loss": result.total.mean()} | {name: value.mean() for name, value in result.terms.items()}
        if self.criticising:
            judged, said = hear_judges(self.judges, self.recipe.adversary, hearing, batch.seed + 2)
            total, values = total + judged, values | said
        elif self.trainer.world_size > 1:
            total = total + self._untouched()
        size = len(batch.style)
        self.log("train/loss", values.pop("loss"), prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=size)
        return total

    def _critic_alone(self, hearing: Hearing) -> Tensor:
        """The critic's loss alone, on what the generator made as it stands."""
        total = critic_lesson(self.critic, self.recipe.adversary, hearing)[0].mean()
        if self.trainer.world_size > 1:  # processes that wait for the other weights would hang
            total = total + torch.stack([0.0 * p.sum() for p in self.parameters() if p.requires_grad]).sum()
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(hearing.style))
        return total

    def _heard_on_stage(self, pair: Pair, crossed: Tensor, random: torch.Generator) -> Tensor:
        """What comes in [batch, samples]: of crossed rows half hear recordings as they are, of those some hear two.

        And some hear what glides, if the recipe wants it.
        """
        as_is, both = torch.rand(2, len(crossed), generator=random).to(crossed.device)
        as_is = crossed & (as_is < AS_IS_SHARE)
        both = as_is & (both < TOGETHER_SHARE)
        together = 0.5 * (pair.target + pair.target.roll(1, dims=0))
        heard = torch.where(both[:, None], together, torch.where(as_is[:, None], pair.target, pair.input))
        semitones = self.recipe.augment.glide_semitones
        if semitones:
            glides = crossed & (torch.rand(len(crossed), generator=random) < GLIDE_SHARE).to(crossed.device)
            bent = bend_pitch(heard[glides], self.recipe.spectral.sample_rate, semitones, random)
            heard = heard.index_put((glides,), bent)
        return heard

    def unsteadiness(self, vectors: Tensor, seed: int) -> Tensor:
        """How far gains stray from their mean, in natural log units, while tones in these styles stand still."""
        generator, rate = self.generator, self.recipe.spectral.sample_rate
        assert not isinstance(generator, SpectrumGenerator | NoisePlayer), (
            "the recipe asks for steady gains of a generator that has none"
        )
        random = torch.Generator(device=vectors.device).manual_seed(seed)
        hop = self.recipe.spectral.hop_samples
        samples = round(TONE_SECONDS * rate / hop) * hop
        tones = steady_tones(len(vectors), samples, rate, random)
        gains = generator.gains(tones, vectors, on_device(generator.init_state(len(vectors)), tones.device))
        late = gains[:, gains.shape[1] // 2 :].float()
        return (late - late.mean(dim=1, keepdim=True)).abs().mean()

    @property
    def criticising(self) -> bool:
        """Whether the critic takes part in this step."""
        config = self.recipe.adversary
        return bool(config.weight) and self.global_step >= config.start_step

    @property
    def judges(self) -> Judges:
        """Those of this run."""
        classifier = self.classifier if self.recipe.adversary.classifies else None
        return Judges(self.critic, classifier, self.style_judges, self.memory)

    @property
    def critic_leads(self) -> bool:
        """Whether the critic learns alone in this step."""
        config = self.recipe.adversary
        return self.criticising and self.global_step < config.start_step + config.head_start_steps

    def _untouched(self) -> Tensor:
        """Zero, with a gradient of zero for what has no part in this step: processes that wait for it would hang."""
        idle = [module for name, module in self.named_children() if f"{name}." in JUDGES]
        return torch.stack([0.0 * p.sum() for module in idle for p in module.parameters()] or [torch.zeros(())]).sum()

    def _crossed(self, style: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Which style each row is to become; which rows that makes crossed; and whose recording tells it: all [batch].

        A crossed row becomes another style than its recording's. The encoder hears the style from the row of
        that number, which is another row where the style is; -1: the table knows it.
        """
        rows, config = torch.arange(len(style)), self.recipe.encoder
        drawn = torch.rand(style.shape, generator=random)
        told = drawn < config.share
        own, crossed = style.cpu(), torch.zeros(style.shape, dtype=torch.bool)
        wanted, told_by = own, torch.where(told, rows, -1)
        if self.criticising:
            crossed = torch.rand(style.shape, generator=random) < self.recipe.adversary.cross_share
            crossed |= ~torch.isin(own, torch.tensor(self.recipe.performed))
            crossed[0] = False  # so that the losses of what is restored have a row in every step
            weights = torch.tensor([self.recipe.style[row].cross_weight for row in self.recipe.performed])
            other = self._other(own, weights, random)
            donor = torch.randint(len(rows), style.shape, generator=random)
            told = (drawn < config.crossed_share) & (own[donor] != own)
            told &= torch.isin(own[donor], torch.tensor(self.recipe.performed))
            wanted = torch.where(crossed, torch.where(told, own[donor], other), own)
            told_by = torch.where(crossed, torch.where(told, donor, -1), told_by)
        return wanted.to(style.device), crossed.to(style.device), told_by.to(style.device)

    def _other(self, own: Tensor, weights: Tensor, random: torch.Generator) -> Tensor:
        """A style that is performed, for each of ``own`` [batch] another than itself: [batch], on the CPU.

        Drawn by ``weights`` [performed styles].
        """
        performed = torch.tensor(self.recipe.performed)
        chances = torch.where(own[:, None] == performed, 0.0, weights)
        return performed[torch.multinomial(chances, 1, generator=random)[:, 0]]

    def _style_vectors(self, raw: Tensor, own: Tensor, style: Tensor, told_by: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [batch, style_dim] of ``style``, some heard, and the loss that keeps what is heard near the table.

        ``own`` [batch]: the styles of the recordings ``raw``.
        """
        known = self.styles(style)
        if not self.recipe.encoder.share:
            return known, known.new_zeros(())
        heard = self.encoder(raw)
        distance = (heard - self.styles(own).detach()).square().mean()
        vectors = torch.where((told_by >= 0)[:, None], heard[told_by.clamp_min(0)], known)
        return vectors, self.recipe.encoder.anchor_weight * distance

    def _blended(self, vectors: Tensor, crossed: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Some crossed rows' vectors [batch, style_dim] mixed with those of two other rows, and which: [batch].

        No judge knows what they should sound like, but they are to be as loud as what is played: on stage styles are
        blended.
        """
        share = self.recipe.adversary.blend_share
        if not share:
            return vectors, torch.zeros_like(crossed)
        blended = crossed & (torch.rand(len(crossed), generator=random) < share).to(crossed.device)
        weights = -torch.rand(3, len(crossed), 1, generator=random).clamp_min(1e-6).log().to(vectors.device)
        mixed = sum(weight * vectors.roll(by, dims=0) for by, weight in enumerate(weights / weights.sum(dim=0)))
        return torch.where(blended[:, None], mixed, vectors), blended

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Generator and judges are clipped each by itself: a loud judge must not quieten the generator."""
        del gradient_clip_algorithm
        for group in optimizer.param_groups if gradient_clip_val else ():
            torch.nn.utils.clip_grad_norm_(group["params"], float(gradient_clip_val or 0.0))

    def averages(self) -> list[tuple[nn.Module, nn.Module]]:
        pairs: list[tuple[nn.Module, nn.Module]] = [
            (self.average_generator, self.generator),
            (self.average_styles, self.styles),
        ]
        return [*pairs, (self.average_encoder, self.encoder)] if self.recipe.encoder.share else pairs

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        del batch_idx
        pair = self.pair(batch, validation=True)
        styles = self.average_styles if self.averaging else self.styles
        answer, _ = self.restore(pair.input, styles(batch.style), averaged=self.averaging)
        result = self.restoration_loss(answer, pair.target)
        unchanged = self.restoration_loss(pair.input[:, : answer.shape[1]], pair.target).total
        self._heard.append((batch.style, result, unchanged))
        if self.witness is not None:
            self.testified.append(self._recognised(batch, pair.target))
        self.keep_media(batch.style, pair.input, answer, pair.target)

    def _recognised(self, batch: Batch, played: Tensor) -> Tensor:
        """Which excerpts, laid from recordings [batch, samples] in another style, the witness takes for it: 0 or 1."""
        together = min(len(played), math.ceil(recogniser.EXCERPT_SECONDS / self.recipe.data.segment_seconds))
        groups = len(played) // together
        random = torch.Generator().manual_seed(batch.seed)
        own, alike = batch.style.cpu()[: groups * together : together], torch.ones(len(self.recipe.performed))
        wanted = self._other(own, alike, random).to(batch.style.device)
        vectors = (self.average_styles if self.averaging else self.styles)(wanted.repeat_interleave(together))
        answer, _ = self.restore(played[: groups * together], vectors, averaged=self.averaging)
        return self.taken_for(wanted, answer.reshape(groups, -1))

    def taken_for(self, wanted: Tensor, answer: Tensor) -> Tensor:
        """Which audio [batch, samples] the witness takes for the styles ``wanted`` [batch]: [batch], 0 or 1."""
        assert self.witness is not None
        rate = self.recipe.spectral.sample_rate
        made = soxr.resample(answer.float().cpu().numpy().T, rate, recogniser.SAMPLE_RATE).T
        # One second is told less surely than three: what is short is repeated.
        missing = max(0, recogniser.EXCERPT_SAMPLES - made.shape[1])
        excerpts = np.pad(made, ((0, 0), (0, missing)), mode="wrap")[:, : recogniser.EXCERPT_SAMPLES]
        shares = self.witness.judge(np.ascontiguousarray(excerpts, dtype=np.float32)).shares
        ids = [self.witness.styles.index(self.recipe.style[row].id) for row in wanted.tolist()]
        return torch.from_numpy((shares.argmax(axis=1) == np.array(ids)).astype(np.float32))

    def on_validation_epoch_end(self) -> None:
        styles = torch.cat([style for style, _, _ in self._heard])
        totals = torch.cat([result.total for _, result, _ in self._heard])
        values = {"validation/loss": totals.mean()}
        values["validation/unchanged"] = torch.cat([unchanged for _, _, unchanged in self._heard]).mean()
        for name in self._heard[0][1].terms:
            values[f"validation/{name}"] = torch.cat([result.terms[name] for _, result, _ in self._heard]).mean()
        self.close_validation(values, styles, totals)
        self._heard = []

    def close_validation(self, values: dict[str, Tensor], styles: Tensor, losses: Tensor) -> None:
        """Log ``values``, the ``losses`` [rows] of each of the ``styles`` [rows], what the witness said, and media."""
        for row, style in enumerate(self.recipe.style):
            if bool((styles == row).any()):
                values[f"validation/style/{style.id}"] = losses[styles == row].mean()
        if self.testified:
            values["validation/style_recognised"] = torch.cat(self.testified).mean().to(self.device)
        self.log_dict(values, sync_dist=True)
        self.log("validation_loss", losses.mean(), prog_bar=True, logger=False, sync_dist=True)
        self.metrics = {name: round(float(value), 6) for name, value in values.items()}
        self._show_media()
        self.testified, self._media = [], {}

    def keep_media(self, styles: Tensor, *sounds: Tensor) -> None:
        """Of ``sounds`` [rows, samples], three of each row, the first of each of the ``styles`` [rows], to be shown."""
        for row, style in enumerate(styles.tolist()):
            if style not in self._media and len(self._media) < self.recipe.trainer.media_count:
                first, second, third = (sound[row].cpu() for sound in sounds)
                self._media[style] = (first, second, third)

    def parameter_groups(self, names: Sequence[str]) -> list[list[str]]:
        """All but the judges', then each judge's, if there is one."""
        [learned] = super().parameter_groups(names)
        judges = [[name for name in learned if name.startswith(judge)] for judge in JUDGES]
        return [[name for name in learned if not name.startswith(JUDGES)], *(group for group in judges if group)]

    def learning_rates(self) -> tuple[float, ...]:
        """Of each group of weights that there can be; the generator's first, then the judges'."""
        return self.recipe.optimiser.learning_rate, *[self.recipe.adversary.learning_rate] * len(JUDGES)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._fit_optional_parts(checkpoint)
        super().on_load_checkpoint(checkpoint)

    def _fit_optional_parts(self, checkpoint: dict[str, Any]) -> None:
        """Give ``checkpoint`` the optional parts that this recipe adds, as they start; take out those it leaves out."""
        ours, theirs = self.state_dict(), checkpoint["state_dict"]
        if ours.keys() == theirs.keys():
            return
        optimiser = checkpoint["optimizer_states"][0]
        numbered = {name: i for i, name in enumerate(chain.from_iterable(self.parameter_groups(list(theirs))))}
        for name in [name for name in theirs if name not in ours and name.startswith(OPTIONAL_PARTS)]:
            del theirs[name]
        theirs.update({n: ours[n] for n in ours if n not in theirs and n.startswith(OPTIONAL_PARTS)})
        groups = self.parameter_groups(list(ours))
        states = {i: optimiser["state"].get(numbered.get(name)) for i, name in enumerate(chain.from_iterable(groups))}
        optimiser["state"] = {i: state for i, state in states.items() if state is not None}
        number, plain = count(), optimiser["param_groups"][0]
        optimiser["param_groups"] = [
            {
                **plain,
                "initial_lr": rate,
                "lr": rate * plain["lr"] / plain["initial_lr"],
                "params": [next(number) for _ in names],
            }
            for names, rate in zip(groups, self.learning_rates(), strict=False)
        ]

    # -- TensorBoard --------------------------------------------------------------------------------------------

    def _show_media(self) -> None:
        if not isinstance(self.logger, TensorBoardLogger) or not self.trainer.is_global_zero:
            return
        board, rate = self.logger.experiment, self.recipe.spectral.sample_rate
        for style, sounds in self._media.items():
            name = self.recipe.style[style].id
            for title, sound in zip(("input", "output", "target"), sounds, strict=True):
                board.add_audio(f"{name}/{title}", sound.clamp(-1, 1)[None], self.global_step, sample_rate=rate)
            board.add_figure(f"{name}/spectrograms", spectrogram_figure(sounds, rate), self.global_step)


def spectrogram_figure(sounds: tuple[Tensor, ...], sample_rate: int) -> Any:
    """Input, output and target [samples] below each other, in dB over time and frequency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots(len(sounds), 1, sharex=True)
    window = torch.hann_window(1024)
    for axis, sound, title in zip(np.atleast_1d(axes), sounds, ("input", "output", "target"), strict=True):
        spectrum = torch.stft(sound.float(), 1024, 256, window=window, return_complex=True, pad_mode="constant")
        decibels = 20.0 * torch.log10(spectrum.abs() / 256.0 + 1e-6)
        seconds = len(sound) / sample_rate
        axis.imshow(
            decibels.numpy(),
            origin="lower",
            aspect="auto",
            vmin=-100,
            vmax=0,
            extent=(0, seconds, 0, sample_rate / 2e3),
        )
        axis.set(title=title, ylabel="kHz")
    axes[-1].set_xlabel("s")
    return figure
