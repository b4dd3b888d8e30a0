"""One playing in many renderings: noise at the end of the style vectors, and the critic that says which is best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from realtime.audio import AudioWriter
from realtime.bundle import Bundle, BundleError, read_critic
from realtime.controls import Performer
from realtime.learned import BELOW_LOUDEST_DB
from realtime.processor import Processor
from realtime.render import BLOCK, STEADY_HOPS_PER_STEP, checked_source, restyled
from realtime.stream import make_session


@dataclass(frozen=True)
class Candidate:
    """One rendering: the seed that makes it again, and how near the critic finds it to the style asked for."""

    seed: int
    rating: float


def with_noise(bundle: Bundle, seed: int) -> Bundle:
    """The model with the noise of ``seed`` (0 or above) at the end of every style vector, the same in all of them.

    Raises BundleError for a model without noise.
    """
    dims = bundle.manifest.noise_dims
    if not dims:
        raise BundleError(
            bundle.path,
            "manifest.noise_dims",
            "is 0: this model makes one sound of one playing",
            "leave out --seed and --candidates, or choose a model that makes sound of noise, or train one with "
            'objective = "cycle" and cycle.noise_dims above 0',
        )
    noise = tuple(np.random.default_rng(seed).standard_normal(dims).tolist())
    styles = tuple(replace(style, vector=(*style.vector[:-dims], *noise)) for style in bundle.manifest.styles)
    return replace(bundle, manifest=replace(bundle.manifest, styles=styles))


class Critic:
    """What learned to tell real recordings of each style from what the model makes. One thread at a time."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises BundleError for a model without a critic, or with one that cannot be run."""
        self._path, graph = bundle.path, read_critic(bundle)
        try:
            self._session = make_session(graph)
        except Exception as error:
            raise self._unfit(f"cannot be run: {error}") from None
        self.clip_samples: int = self._session.get_inputs()[0].shape[1]
        """How much it hears at a time, at the model's rate."""

    def _unfit(self, problem: str) -> BundleError:
        return BundleError(self._path, "critic", problem, "export the model again")

    def rate_clips(self, clips: NDArray[np.float32]) -> NDArray[np.float32]:
        """clips [count, clip_samples] -> ratings [count, styles], higher is nearer. Raises BundleError."""
        try:
            ratings = np.asarray(self._session.run(["ratings"], {"audio": clips})[0], np.float32)
        except Exception as error:
            raise self._unfit(f"cannot be run: {error}") from None
        if not np.isfinite(ratings).all():
            raise self._unfit("gives ratings that are no numbers")
        return ratings

    def rate(self, blocks: Iterable[NDArray[np.float32]]) -> NDArray[np.float64]:
        """Blocks [channels, n] of one sound at the model's rate -> ratings [styles], the mean over its clips.

        Pauses are left out, the last clip reaches back from the end, and what is shorter than a clip goes round.
        """
        size = self.clip_samples
        rest, last = np.zeros(0, np.float32), np.zeros(0, np.float32)
        ratings, powers = [], []

        def hear(clip: NDArray[np.float32]) -> None:
            ratings.append(self.rate_clips(clip[None])[0])
            powers.append(float(np.square(clip, dtype=np.float64).mean()))

        for block in blocks:
            rest = np.concatenate([rest, block.mean(axis=0)])
            while len(rest) >= size:
                last, rest = rest[:size], rest[size:]
                hear(last)
        if len(rest):
            hear(np.concatenate([last, rest])[-size:] if len(last) else np.resize(rest, size))
        heard = np.array(powers) >= max(powers) * 10.0 ** (-BELOW_LOUDEST_DB / 10.0)
        return np.mean(np.array(ratings, np.float64)[heard], axis=0)


def rate_candidates(
    bundle: Bundle,
    source: Path,
    target: Path,
    seeds: Sequence[int],
    perform: Callable[[Bundle], Performer],
    provider: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> tuple[Candidate, ...]:
    """``source`` through the engine once for each seed, heard by the model's critic; nothing is kept.

    ``render_file`` of ``with_noise(bundle, seed)`` makes any of them again, at ``target`` say, which is only checked
    here, before long work. ``perform`` says which styles are asked for: a mix is rated by the weighted ratings of its
    styles. ``progress`` is told the share that is done. Raises AudioFileError, BundleError.
    """
    critic, info = Critic(bundle), checked_source(source, target)
    AudioWriter(target, info.sample_rate, info.channels).discard()
    column = {style.id: number for number, style in enumerate(bundle.manifest.styles)}
    processor = Processor(bundle, provider, STEADY_HOPS_PER_STEP)
    processor.prepare(bundle.manifest.spectral.sample_rate, BLOCK, info.channels)
    rated = []
    for number, seed in enumerate(seeds):
        performer = perform(with_noise(bundle, seed))
        processor.controls = performer.controls()
        processor.reset()
        ratings = critic.rate(restyled(processor, info, performer))
        rated.append(Candidate(seed, float(sum(w * ratings[column[s.id]] for s, w in performer.mix().items()))))
        if progress:
            progress((number + 1) / len(seeds))
    return tuple(rated)
