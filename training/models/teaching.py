"""How classifiers and listeners learn before a run: from phrases, in passes over stretches of them, once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from training.library import Recording, replace_file
from training.models.recogniser import RecogniserConfig, draw_phrase

log = logging.getLogger(__name__)
Judge = TypeVar("Judge", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """How many phrases of each style, how often they are heard, and from which seed."""

    phrases_per_style: int
    passes: int = 12
    batch: int = 32
    learning_rate: float = 3e-3
    shortest_share: float = 0.3  # of a phrase that is heard at a time, at least
    room_chance: float = 0.35
    test_phrases_per_style: int = 16
    seed: int = 0

    def rounds(self, phrases: int) -> int:
        """Steps of one pass over so many phrases."""
        return max(1, phrases // self.batch)


def learn(
    weights: nn.Module,
    powers: Tensor,
    lesson: Lesson,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    generator: torch.Generator,
    progress: Callable[[int], None] | None,
) -> None:
    """Train ``weights`` on mel power [phrases, bands, frames]; ``progress`` is told how many steps are done.

    ``loss_of``: stretches of some phrases [batch, bands, frames], and which phrases these are [batch] -> a number.
    """
    rounds, done = lesson.rounds(len(powers)), 0
    optimiser = torch.optim.AdamW(weights.parameters(), lesson.learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lesson.learning_rate, total_steps=lesson.passes * rounds)
    for _ in range(lesson.passes):
        order = torch.randperm(len(powers), generator=generator)
        for rows in order.tensor_split(rounds):
            share = lesson.shortest_share + (1.0 - lesson.shortest_share) * float(torch.rand(1, generator=generator))
            frames = round(share * powers.shape[-1])
            start = int(torch.randint(powers.shape[-1] - frames + 1, (), generator=generator))
            loss = loss_of(powers[rows, :, start : start + frames].float(), rows)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            done += 1
            if progress and done % 8 == 0:
                progress(done)


def known_phrases(
    unheard: Sequence[Sequence[Recording]],
    sample_rate: int,
    lesson: Lesson,
    random: np.random.Generator,
    known: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """The mean, over styles, of what ``known`` says of phrases of recordings that were not learned from.

    ``unheard``: those of each style; NaN where there are none. ``known``: phrases [count, samples], style [count] -> a
    share.
    """
    drawing = RecogniserConfig(seed=lesson.seed).for_tests
    shares: list[float] = []
    for label, recordings in enumerate(unheard):
        if not recordings:
            continue
        count = lesson.test_phrases_per_style
        phrases = np.stack([draw_phrase(recordings, drawing, random, sample_rate) for _ in range(count)])
        with torch.no_grad():
            shares.append(float(known(torch.from_numpy(phrases), torch.full((count,), label))))
    return float(np.mean(shares)) if shares else float("nan")


def taught_once(
    cache_folder: Path,
    name: str,
    depends_on: tuple[Sequence[str], Any],
    blank: Callable[[], Judge],
    teach: Callable[[], tuple[Judge, float]],
) -> tuple[Judge, float]:
    """What ``teach`` makes, a judge and what it knows, from the cache if it was made before by the same code.

    ``name``: of the kind; ``depends_on``: files of code, this one aside, and plain values; ``blank``: a judge of the
    same shape that has learned nothing.
    """
    files, values = depends_on
    code = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in (*files, __file__)]
    key = hashlib.sha256(json.dumps([code, values]).encode()).hexdigest()[:24]
    path = cache_folder / f"{name}-{key}.pt"
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        judge = blank()
        judge.load_state_dict(stored["weights"])
        return judge, float(stored["known"])
    except Exception as error:  # torch raises many kinds for damaged files; whatever cannot be read is made again
        log.debug("no usable %s at %s: %s", name, path, error)
    judge, known = teach()
    cache_folder.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: torch.save({"weights": judge.state_dict(), "known": known}, file))
    return judge, known
