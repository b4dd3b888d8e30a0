"""A learned style brought nearer to its clip: the style vector is searched for, the model stays as it is.

The search needs answers of the model file only, no gradients: CMA-ES (Hansen, "The CMA evolution strategy: a tutorial",
2016), by the package ``cma``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import cma
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from realtime.bundle import Bundle
from realtime.learned import LearnedStyle, LearnError, cut_windows, with_vector
from realtime.stream import Stream
from training.augment import hide_style, rms
from training.losses import SpectralLoss
from training.recipe import AugmentConfig, LossConfig

WINDOW_HOPS = 384
HOPS_PER_STEP = 16
POPULATION = 10
ROWS_PER_CANDIDATE = 3
HELD_OUT_SHARE = 0.25
HELD_OUT_ROWS = 12
SHORTEST_CLIP_S = 8.0
LEVEL_DBFS = -20.0  # root mean square of every row
MAX_NUMBER = 1e3
AUDIBLE = 1e-3


@dataclass(frozen=True)
class _Pairs:
    """Excerpts of the clip with their style hidden, and as they are: both [rows, samples]."""

    input: Tensor
    target: Tensor


def _pairs(windows: NDArray[np.float32], sample_rate: int, random: torch.Generator) -> _Pairs:
    target = torch.from_numpy(windows)
    target = target * (10.0 ** (LEVEL_DBFS / 20.0) / rms(target).clamp_min(1e-8))
    return _Pairs(hide_style(target, sample_rate, AugmentConfig(), random), target)


class _Judge:
    """Losses of style vectors on pairs, through the very graph that performs. Streams are made once per size."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.spec = bundle, bundle.manifest.spectral
        self.loss = SpectralLoss(LossConfig(), self.spec.sample_rate)
        self._streams: dict[int, Stream] = {}

    def losses(self, vectors: NDArray[np.float32], pairs: _Pairs) -> NDArray[np.float64]:
        """vectors [count, style_dim] -> mean loss of each over all pairs [count]."""
        count, rows = len(vectors), len(pairs.input)
        if count * rows not in self._streams:
            self._streams[count * rows] = Stream(self.bundle, count * rows, HOPS_PER_STEP)
            self._streams[count * rows].warm_up()
        stream = self._streams[count * rows]
        stream.reset()
        stream.style[:] = np.repeat(vectors, rows, axis=0)
        answer = stream.play(np.tile(pairs.input.numpy(), (count, 1)))
        delay = self.spec.stream_delay_samples
        late = torch.from_numpy(answer[:, delay:])
        wanted = pairs.target[:, : late.shape[1]].repeat(count, 1)
        with torch.inference_mode():
            total = self.loss(late, wanted).total
        return total.reshape(count, rows).mean(dim=1).numpy().astype(np.float64)


def refine(
    bundle: Bundle,
    learned: LearnedStyle,
    audio: NDArray[np.float32],
    minutes: float,
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> LearnedStyle:
    """The style with the best vector found in ``minutes``, judged on the last quarter of the clip, unheard till then.

    ``audio`` [samples] is the clip at the model's rate; ``refined`` holds the loss before and after, and the seconds
    spent. A search that gains nothing leaves the vector as it was. ``progress``: (share of the time, loss).
    Raises LearnError for a clip that is too short.
    """
    rate, hop = bundle.manifest.spectral.sample_rate, bundle.manifest.spectral.hop_samples
    samples = WINDOW_HOPS * hop
    cut = int(len(audio) * (1.0 - HELD_OUT_SHARE))
    if len(audio) < SHORTEST_CLIP_S * rate:
        raise LearnError(
            f"{learned.clip}: {len(audio) / rate:.1f} s are too short to refine on; "
            f"give a clip of {SHORTEST_CLIP_S:g} s or more, or leave out --refine"
        )
    if float(np.abs(audio[cut:]).max()) < AUDIBLE:
        raise LearnError(
            f"{learned.clip}: its last quarter is silent, on which refining is judged; cut the silence off, "
            "or leave out --refine"
        )
    heard, unheard = cut_windows(audio[:cut], samples), cut_windows(audio[cut:], samples)
    random, torch_random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    judge = _Judge(bundle)
    # Several disguises of each excerpt, always the same number, so that one stream serves all.
    final = _pairs(unheard[np.arange(HELD_OUT_ROWS) % len(unheard)], rate, torch_random)
    first = np.asarray(learned.style.vector, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cma's hints to its programmer
        search = cma.CMAEvolutionStrategy(
            first.astype(np.float64),
            0.3 * float(np.sqrt(np.square(first).mean())) or 0.1,
            {"seed": seed + 1, "popsize": POPULATION, "verbose": -9, "bounds": [-MAX_NUMBER, MAX_NUMBER]},
        )
        begin = time.monotonic()
        while (spent := time.monotonic() - begin) < 60.0 * minutes:
            candidates = search.ask()
            rows = random.integers(0, len(heard), ROWS_PER_CANDIDATE)
            found = judge.losses(np.array(candidates, np.float32), _pairs(heard[rows], rate, torch_random))
            search.tell(candidates, found.tolist())
            if progress:
                progress(min(1.0, spent / (60.0 * minutes)), float(found.min()))
    best = np.asarray(search.mean, np.float32)
    before, after = (float(judge.losses(vector[None], final)[0]) for vector in (first, best))
    figures = {
        "loss_before": round(before, 4),
        "loss_after": round(after if after < before else before, 4),
        "seconds": round(time.monotonic() - begin, 1),
    }
    if not after < before:
        return replace(learned, refined=figures)
    return replace(with_vector(bundle, learned, best), refined=figures)
