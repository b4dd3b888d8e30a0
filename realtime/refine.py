"""A learned style brought nearer to its clip, by taking in some of the model's own styles; the model stays as it is.

The encoder hears one clip, and may place it beside where the styles lie that are known well. Near is what the shipped
recogniser says: what a vector plays and what the clip plays are two clouds of its embeddings, and the distance between
two clouds is their energy distance (Szekely and Rizzo, "Energy statistics: a class of statistics based on distances",
2013, eq. 5), which few excerpts are enough for. The search goes some way towards the styles that bring it nearest, step
by step (Frank and Wolfe, "An algorithm for quadratic programming", 1956): between styles the model has been heard, and
a free search leaves them for what pleases the recogniser alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from realtime.bundle import DEFAULT_RECOGNISER, Bundle, read_bundle
from realtime.learned import LearnedStyle, LearnError, cut_windows, with_vector
from realtime.loudness import reference_playings
from realtime.recognise import Recogniser
from realtime.stream import Stream

HOPS_PER_STEP = 16
VECTORS_AT_ONCE = 4
REGISTERS_HEARD, REGISTERS_UNHEARD = (0, 2, 4, 5, 7, 9), (1, 3, 6, 8)  # of reference_playings: to search, to judge
STEPS = (0.35, 0.25, 0.2, 0.15, 0.12, 0.1)  # how much of other styles each takes in
TAKEN_IN = 2  # of the nearest styles in each step, in equal parts: one alone may be a quirk of the recogniser
SHORTEST_CLIP_S = 8.0


def _between(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Distances of two clouds' points [count, dims], [n, dims] -> [count, n]."""
    one, other = ours.astype(np.float64), theirs.astype(np.float64)
    squares = np.square(one).sum(axis=1)[:, None] + np.square(other).sum(axis=1) - 2.0 * one @ other.T
    return np.sqrt(np.maximum(squares, 0.0))


def energy_distance(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Of two clouds [count, dims], two points or more each, without bias: it may lie below zero for one cloud twice."""
    within = [_between(cloud, cloud).sum() / (len(cloud) * (len(cloud) - 1)) for cloud in (ours, theirs)]
    return float(2.0 * _between(ours, theirs).mean() - sum(within))


class _Ear:
    """Embeddings of sounds at the model's rate, in the shipped recogniser."""

    def __init__(self, sample_rate: int) -> None:
        self.sample_rate, self.recogniser = sample_rate, Recogniser(read_bundle(DEFAULT_RECOGNISER))
        self.samples = round(self.recogniser.excerpt_samples * sample_rate / self.recogniser.sample_rate)

    def hear(self, excerpts: NDArray[np.float32]) -> NDArray[np.float32]:
        """Excerpts [count, samples] -> [count, E]."""
        import soxr

        at_rate = soxr.resample(excerpts.T, self.sample_rate, self.recogniser.sample_rate).T
        return self.recogniser.judge(list(at_rate[:, : self.recogniser.excerpt_samples]))[1]


class _Judge:
    """How far what style vectors play is from a clip, through the very graph that performs."""

    def __init__(
        self, bundle: Bundle, ear: _Ear, playings: Sequence[NDArray[np.float32]], clip: NDArray[np.float32]
    ) -> None:
        """``playings``: each [samples], at least an excerpt long; whole excerpts are played. ``clip``: embeddings."""
        self.bundle, self.ear, self.clip = bundle, ear, clip
        hop = bundle.manifest.spectral.hop_samples * HOPS_PER_STEP
        length = -(-ear.samples // hop) * hop
        self.excerpts = np.concatenate([cut_windows(playing, length) for playing in playings])
        self._streams: dict[int, Stream] = {}

    def distances(self, vectors: NDArray[np.float32], tell: Callable[[], None] = lambda: None) -> NDArray[np.float64]:
        """vectors [count, style_dim] -> the energy distance of each from the clip [count]; ``tell`` at each of them."""
        found: list[float] = []
        for at in range(0, len(vectors), VECTORS_AT_ONCE):
            part = vectors[at : at + VECTORS_AT_ONCE]
            rows = len(part) * len(self.excerpts)
            if rows not in self._streams:
                self._streams[rows] = Stream(self.bundle, rows, HOPS_PER_STEP)
                self._streams[rows].warm_up()
            stream = self._streams[rows]
            stream.reset()
            stream.style[:] = np.repeat(part, len(self.excerpts), axis=0)
            heard = self.ear.hear(stream.play(np.tile(self.excerpts, (len(part), 1)))[:, : self.ear.samples])
            for one in heard.reshape(len(part), len(self.excerpts), -1):
                found.append(energy_distance(one, self.clip))
                tell()
        return np.array(found)


def refine(
    bundle: Bundle,
    learned: LearnedStyle,
    audio: NDArray[np.float32],
    minutes: float = 0.0,
    progress: Callable[[float], None] = lambda _: None,
) -> LearnedStyle:
    """The style with a vector that is nearer to its clip, judged on playing that the search never heard.

    ``audio`` [samples] is the clip at the model's rate. One step is taken in any case, others while there are
    ``minutes`` left for them and they bring it nearer; ``refined`` holds the distance before and after, and the seconds
    spent. A vector that gains nothing stays as it was. ``progress``: share of what may have to be judged.
    Raises LearnError for a clip that is too short.
    """
    rate = bundle.manifest.spectral.sample_rate
    if len(audio) < SHORTEST_CLIP_S * rate:
        raise LearnError(
            f"{learned.clip}: {len(audio) / rate:.1f} s are too short to refine on; "
            f"give a clip of {SHORTEST_CLIP_S:g} s or more, or --refine 0"
        )
    begin, ear, playings = time.monotonic(), _Ear(rate), reference_playings(rate)
    clip = ear.hear(_windows(audio, ear.samples))

    def judge(registers: Sequence[int]) -> _Judge:
        return _Judge(bundle, ear, [playings[register] for register in registers], clip)

    first = np.asarray(learned.style.vector, np.float32)
    best = _search(judge(REGISTERS_HEARD), first, 60.0 * minutes, progress)
    before, after = judge(REGISTERS_UNHEARD).distances(np.stack([first, best])).tolist()
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


def _search(
    judge: _Judge, first: NDArray[np.float32], seconds: float, progress: Callable[[float], None]
) -> NDArray[np.float32]:
    """Where STEPS from ``first`` [style_dim] lead that come nearer: as many as there are ``seconds`` for, or one."""
    known = np.array([style.vector for style in judge.bundle.manifest.styles], np.float32)
    begin, vector, judged = time.monotonic(), first, 0

    def tell() -> None:
        nonlocal judged
        judged += 1
        progress(judged / (len(known) + 1) / (len(STEPS) if seconds else 1))

    for number, share in enumerate(STEPS):
        if number and (time.monotonic() - begin) * (number + 1) / number > seconds:
            break  # there is no time for another
        candidates = np.concatenate([vector[None], vector + share * (known - vector)]).astype(np.float32)
        now, *distances = judge.distances(candidates, tell)
        nearest = [style for style in np.argsort(distances)[:TAKEN_IN] if distances[style] < now]
        if not nearest:
            break
        vector = (vector + share * (known[nearest].mean(axis=0) - vector)).astype(np.float32)
    return vector
