"""What a critic and a classifier of styles say of what was made: losses for the generator, and their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training.models.classifier import Opinion, StyleClassifier, at_other_speeds, hit_rate, style_loss
from training.models.critic import Critic, Verdict, critic_loss, deception_loss, feature_loss
from training.objectives.likeness import StyleMemory
from training.recipe import AdversaryConfig

AUDIBLE_RMS = 1e-4  # quieter rows tell a judge nothing


class Hearing(NamedTuple):
    """What the judges hear, rows side by side."""

    made: Tensor  # [batch, samples], with a gradient
    real: Tensor  # [batch, samples]: the recording that each row came from
    style: Tensor  # [batch]: what each row was to become, as a row of the style table
    real_style: Tensor  # [batch]: what the recording is
    crossed: Tensor  # [batch]: rows where the two differ


def _frozen(judge: nn.Module, *args: Any) -> Any:
    """What ``judge`` says with weights that this judgement cannot move: one step then teaches both, each its own."""
    weights = {name: value.detach() for name, value in judge.named_parameters()}
    return torch.func.functional_call(judge, weights, args)


def missing_style(scores: Tensor, style: Tensor, exponent: float) -> Tensor:
    """How far scores [parts, batch, styles] are from the style meant [batch], one value per row [batch].

    Exponent 0 is cross entropy, which urges on most what is hopeless, a drum that should be a flute, say. Towards 1
    it becomes the share that is not believed, which urges on what is in doubt. Zhang and Sabuncu, "Generalized cross
    entropy loss for training deep neural networks with noisy labels", 2018, eq. 6.
    """
    if not exponent:
        return style_loss(scores, style)
    meant = style[:, None].expand(scores.shape[0], -1, 1)
    believed = torch.log_softmax(scores, dim=-1).gather(-1, meant)[..., 0]
    return ((1.0 - (exponent * believed).exp()) / exponent).mean(dim=0)


class Fakes(NamedTuple):
    """What was made, for a critic to learn from: audio [rows, samples], the style meant [rows]."""

    audio: Tensor
    style: Tensor


def _audible(audio: Tensor) -> Tensor:
    """Which rows [batch, samples] are loud enough to tell a judge something: [batch]."""
    return audio.square().mean(dim=1).sqrt() > AUDIBLE_RMS


def critic_lesson(
    critic: Critic, config: AdversaryConfig, heard: Hearing, fakes: Fakes | None = None
) -> tuple[Tensor, Verdict]:
    """What the critic loses on what is heard, one value per row [batch], and what it says of the recordings.

    ``fakes`` as for ``hear_judges``.
    """
    fakes = fakes or Fakes(heard.made.detach(), heard.style)
    verdict = critic(heard.real)
    learning = critic_loss(verdict, heard.real_style, critic(fakes.audio), fakes.style, config.loss)
    return learning * (_audible(heard.real) & _audible(heard.made.detach())), verdict


@dataclass(frozen=True)
class Judges:
    """Who hears a step: a critic, and those who know styles, if there are any."""

    critic: Critic
    classifier: StyleClassifier | None = None
    style_judges: Sequence[nn.Module] = ()
    """Recognisers and listeners: audio and a random generator in, scores out; they stay as they are."""
    memory: StyleMemory | None = None
    """Of how styles sounded to them in earlier steps."""

    @property
    def know_styles(self) -> bool:
        return self.classifier is not None or bool(self.style_judges)

    def name_style(self, audio: Tensor, random: torch.Generator) -> Opinion:
        """What is said of audio [batch, samples], by weights that this cannot move; each style judge is one part."""
        opinions: list[Opinion] = []
        if self.classifier is not None:
            opinions.append(_frozen(self.classifier, audio, random))
        for number, judge in enumerate(self.style_judges):
            scores = judge(audio, random)[None]
            opinions.append(Opinion(scores, scores, (-1 - number,)))
        scores, undropped, parts = zip(*opinions, strict=True)
        return Opinion(torch.cat(scores), torch.cat(undropped), tuple(chain.from_iterable(parts)))


def hear_judges(
    judges: Judges, config: AdversaryConfig, heard: Hearing, seed: int, fakes: Fakes | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of what the judges lose and what the generator loses before them; and figures to log.

    ``fakes``, as many rows as are heard, are what the critic learns from in place of what was made just now. Where the
    judges have a memory, likeness to all of a style's recordings counts too.
    """
    critic, classifier, memory = judges.critic, judges.classifier, judges.memory
    made, real = heard.made, heard.real
    real_heard, made_heard = _audible(real), _audible(made.detach())
    both = real_heard & made_heard
    learning, verdict = critic_lesson(critic, config, heard, fakes)
    judged: Verdict = _frozen(critic, made)
    deceiving = deception_loss(judged, heard.style, config.loss)
    total = learning.mean() + config.weight * (deceiving * made_heard).mean()
    values = {"critic": learning[both].mean(), "deception": deceiving[made_heard].mean()} if both.any() else {}
    if config.feature_weight:
        features = feature_loss(judged, verdict)
        total = total + config.feature_weight * (features * (both & ~heard.crossed)).mean()
    if judges.know_styles:
        random = torch.Generator(device=made.device).manual_seed(seed)
        if config.speed_semitones:
            made, real = (at_other_speeds(audio, config.speed_semitones, random) for audio in (made, real))
        if classifier is not None and not config.pretraining_phrases:
            known = classifier(real, random).scores
            total = total + (style_loss(known, heard.real_style) * real_heard).mean()
            if both.any():
                values["style_known"] = hit_rate(known[:, both], heard.real_style[both])
        opinion = judges.name_style(made, random)
        taken = opinion.scores
        missing = missing_style(taken, heard.style, config.style_exponent)
        total = total + config.style_weight * (missing * made_heard).mean()
        if memory is not None:
            with torch.no_grad():
                of_real = judges.name_style(real, random)
            memory.hear_real(of_real, heard.real_style, real_heard)
            unlike = memory.unlikeness(opinion, heard.style, made_heard)
            total = total + config.likeness_weight * unlike.mean()
            values["unlikeness"] = unlike.detach().mean()
        if both.any():
            values["style_missing"] = missing[both].mean()
            values["style_taken"] = hit_rate(taken[:, both], heard.style[both])
    return total, values
