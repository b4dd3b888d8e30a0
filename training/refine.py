"""A learned style brought nearer to its clip: the style vector is searched for, the model stays as it is.

Near is what the shipped recogniser says: what a vector plays and what the clip plays are two clouds of its embeddings,
and the distance between two clouds is their energy distance (Szekely and Rizzo, "Energy statistics: a class of
statistics based on distances", 2013, eq. 5), which few excerpts are enough for. The search needs answers of the model
file only, no gradients: CMA-ES (Hansen, "The CMA evolution strategy: a tutorial", 2016), by the package ``cma``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import cma
import numpy as np
import soxr
from numpy.typing import NDArray
from scipy.spatial.distance import cdist, pdist

from realtime.bundle import DEFAULT_RECOGNISER, Bundle, read_bundle
from realtime.learned import LearnedStyle, LearnError, cut_windows, with_vector
from realtime.loudness import reference_playings
from realtime.recognise import Recogniser
from realtime.stream import Stream

HOPS_PER_STEP = 16
POPULATION = 10
EXCERPTS_AT_ONCE = 4  # that all candidates of a generation play, drawn anew each time: none can lean on a few
REGISTERS_HEARD, REGISTERS_UNHEARD = (0, 2, 4), (1, 3)  # of reference_playings: in a search, and for its judgement
FIRST_STEP = 0.3  # of the search, against the size of a vector
SHORTEST_CLIP_S = 8.0
MAX_NUMBER = 1e3


def energy_distance(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Of two clouds [count, dims], two points or more each, without bias: it may lie below zero for one cloud twice."""
    return float(2.0 * cdist(ours, theirs).mean() - pdist(ours).mean() - pdist(theirs).mean())


class _Ear:
    """Embeddings of sounds at the model's rate, in the shipped recogniser."""

    def __init__(self, sample_rate: int) -> None:
        self.sample_rate, self.recogniser = sample_rate, Recogniser(read_bundle(DEFAULT_RECOGNISER))
        self.samples = round(self.recogniser.excerpt_samples * sample_rate / self.recogniser.sample_rate)

    def hear(self, excerpts: NDArray[np.float32]) -> NDArray[np.float32]:
        """Excerpts [count, samples] -> [count, E]."""
        at_rate = soxr.resample(excerpts.T, self.sample_rate, self.recogniser.sample_rate).T
        return self.recogniser.judge(list(at_rate[:, : self.recogniser.excerpt_samples]))[1]


class _Judge:
    """How far what style vectors play is from a clip, through the very graph that performs."""

    def __init__(self, bundle: Bundle, ear: _Ear, playings: Sequence[NDArray[np.float32]]) -> None:
        """``playings``: each [samples], at least an excerpt long; whole excerpts are played."""
        self.bundle, self.ear = bundle, ear
        hop = bundle.manifest.spectral.hop_samples * HOPS_PER_STEP
        length = -(-ear.samples // hop) * hop
        self.excerpts = np.concatenate([cut_windows(playing, length) for playing in playings])
        self._streams: dict[int, Stream] = {}

    def distances(
        self, vectors: NDArray[np.float32], clip: NDArray[np.float32], chosen: Sequence[int] | None = None
    ) -> NDArray[np.float64]:
        """vectors [count, style_dim], embeddings of the clip [n, E] -> the energy distance of each [count].

        They play the ``chosen`` of the excerpts, or all.
        """
        audio = self.excerpts if chosen is None else self.excerpts[list(chosen)]
        count, rows = len(vectors), len(audio)
        if count * rows not in self._streams:
            self._streams[count * rows] = Stream(self.bundle, count * rows, HOPS_PER_STEP)
            self._streams[count * rows].warm_up()
        stream = self._streams[count * rows]
        stream.reset()
        stream.style[:] = np.repeat(vectors, rows, axis=0)
        heard = self.ear.hear(stream.play(np.tile(audio, (count, 1)))[:, : self.ear.samples])
        return np.array([energy_distance(one, clip) for one in heard.reshape(count, rows, -1)])


def refine(
    bundle: Bundle,
    learned: LearnedStyle,
    audio: NDArray[np.float32],
    minutes: float,
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> LearnedStyle:
    """The style with the best vector found in ``minutes``, judged on playing that the search never heard.

    ``audio`` [samples] is the clip at the model's rate; ``refined`` holds the distance before and after, and the
    seconds spent. The search begins at the nearest of the learned vector, the model's own styles, and what lies halfway
    to each; one that gains nothing leaves the vector as it was. ``progress``: (share of the time, distance).
    Raises LearnError for a clip that is too short.
    """
    rate = bundle.manifest.spectral.sample_rate
    if len(audio) < SHORTEST_CLIP_S * rate:
        raise LearnError(
            f"{learned.clip}: {len(audio) / rate:.1f} s are too short to refine on; "
            f"give a clip of {SHORTEST_CLIP_S:g} s or more, or leave out --refine"
        )
    ear, playings = _Ear(rate), reference_playings(rate)

    def judge(registers: Sequence[int]) -> _Judge:
        return _Judge(bundle, ear, [playings[register] for register in registers])

    clip = ear.hear(_windows(audio, ear.samples))
    first = np.asarray(learned.style.vector, np.float32)
    begin, best = time.monotonic(), first
    if minutes > 0.0:
        best = _search(judge(REGISTERS_HEARD), first, clip, 60.0 * minutes, seed, progress)
    before, after = judge(REGISTERS_UNHEARD).distances(np.stack([first, best]), clip).tolist()
    figures = {
        "distance_before": round(before, 4),
        "distance_after": round(min(before, after), 4),
        "seconds": round(time.monotonic() - begin, 1),
    }
    if not after < before:
        return replace(learned, refined=figures)
    return replace(with_vector(bundle, learned, best), refined=figures)


def _windows(audio: NDArray[np.float32], samples: int) -> NDArray[np.float32]:
    """Loud windows, two at least: a cloud has more than one point."""
    windows = cut_windows(audio, samples)
    return windows if len(windows) > 1 else np.concatenate([windows, np.roll(windows, samples // 3, axis=1)])


def _among(vectors: NDArray[np.float32], known: NDArray[np.float32]) -> NDArray[np.float32]:
    """vectors [count, style_dim], those farther from the middle of the ``known`` ones than they usually are, as far.

    Where no style was ever learned, what the recogniser finds near is a quirk of it.
    """
    middle = known.mean(axis=0)
    usual = np.median(np.linalg.norm(known - middle, axis=1))
    away = np.linalg.norm(vectors - middle, axis=1, keepdims=True)
    return (middle + (vectors - middle) * np.minimum(1.0, usual / np.maximum(away, 1e-9))).astype(np.float32)


def _search(
    judge: _Judge,
    first: NDArray[np.float32],
    clip: NDArray[np.float32],
    seconds: float,
    seed: int,
    progress: Callable[[float, float], None] | None,
) -> NDArray[np.float32]:
    """Of where the search began, where it is when the time is over, and the middle of both: the nearest."""
    begin, random = time.monotonic(), np.random.default_rng(seed)
    known = np.array([style.vector for style in judge.bundle.manifest.styles], np.float32)
    starts = np.concatenate([first[None], known, 0.5 * (first + known)])
    excerpts = len(judge.excerpts)

    def some() -> list[int]:
        return random.choice(excerpts, min(EXCERPTS_AT_ONCE, excerpts), replace=False).tolist()

    def judged(vectors: NDArray[np.float32], chosen: list[int]) -> NDArray[np.float64]:
        found = judge.distances(vectors, clip, chosen)
        if progress:
            progress(min(1.0, (time.monotonic() - begin) / seconds), float(found.min()))
        return found

    chosen = some()
    parts = [starts[at : at + POPULATION] for at in range(0, len(starts), POPULATION)]
    start = starts[int(np.concatenate([judged(part, chosen) for part in parts]).argmin())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cma's hints to its programmer
        search = cma.CMAEvolutionStrategy(
            start.astype(np.float64),
            FIRST_STEP * float(np.sqrt(np.square(start).mean())) or 0.1,
            {"seed": seed + 1, "popsize": POPULATION, "verbose": -9, "bounds": [-MAX_NUMBER, MAX_NUMBER]},
        )
        while time.monotonic() - begin < seconds:
            candidates = search.ask()
            search.tell(candidates, judged(_among(np.array(candidates, np.float32), known), some()).tolist())
    end = _among(np.asarray(search.mean, np.float32)[None], known)[0]
    finalists = np.stack([first, start, end, 0.5 * (first + end)])
    return finalists[int(judge.distances(finalists, clip).argmin())]
