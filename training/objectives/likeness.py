"""Are the sounds made in a style spread as the style's recordings are, and not only each taken for one of them?

A classifier is content with the clearest case of a style, made again and again. The energy distance (Szekely and Rizzo,
"Energy statistics", 2013, section 2.1) between its scores of what is made and those of recordings is zero only where
both are spread alike: each sound is drawn to the recordings and away from what was made before.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from training.models.classifier import Opinion

KEPT = 24
"""Sounds of each style that each part of the classifier remembers, recordings and made ones each."""
ENOUGH = 6
"""Fewer say nothing about how they are spread."""


class StyleMemory:
    """How each part of a classifier scored each style's last sounds. In no checkpoint: it fills within some steps."""

    def __init__(self) -> None:
        self._real: dict[tuple[int, int], deque[Tensor]] = {}  # by part and style
        self._made: dict[tuple[int, int], deque[Tensor]] = {}

    def hear_real(self, opinion: Opinion, style: Tensor, audible: Tensor) -> None:
        """Remember what is said of recordings of ``style`` [batch], where ``audible`` [batch]."""
        self._remember(self._real, opinion, style, audible)

    def unlikeness(self, opinion: Opinion, style: Tensor, audible: Tensor) -> Tensor:
        """What each made sound adds to the energy distance of its style, against the spread of the recordings [batch].

        Zero where too little is remembered. What is said is remembered afterwards.
        """
        losses: list[Tensor] = []
        for row, (number, heard) in enumerate(zip(style.tolist(), audible.tolist(), strict=True)):
            said = zip(opinion.parts, opinion.undropped[:, row], strict=True)
            terms = [self._term(part, number, scores) for part, scores in said] if heard else []
            known = [term for term in terms if term is not None]
            losses.append(torch.stack(known).mean() if known else opinion.undropped.new_zeros(()))
        self._remember(self._made, opinion, style, audible)
        return torch.stack(losses)

    def _term(self, part: int, style: int, scores: Tensor) -> Tensor | None:
        real, made = self._real.get((part, style), ()), self._made.get((part, style), ())
        if min(len(real), len(made)) < ENOUGH:
            return None
        recordings, before = torch.stack(tuple(real)), torch.stack(tuple(made))
        spread = torch.pdist(recordings).mean().clamp_min(1e-3)
        return ((scores - recordings).norm(dim=1).mean() - (scores - before).norm(dim=1).mean()) / spread

    def _remember(
        self, kept: dict[tuple[int, int], deque[Tensor]], opinion: Opinion, style: Tensor, audible: Tensor
    ) -> None:
        for part, rows in zip(opinion.parts, opinion.undropped.detach(), strict=True):
            for number, heard, scores in zip(style.tolist(), audible.tolist(), rows, strict=True):
                if heard:
                    kept.setdefault((part, number), deque(maxlen=KEPT)).append(scores)
