"""Which style is this? A recogniser's model file on sound files, in excerpts of three seconds, and on labelled folders.

Numpy and onnxruntime only, as on stage. Excerpts are cut here for training too, so that both mean the same by one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realtime.audio import AUDIO_SUFFIXES, AudioFileError, file_info, read_blocks, resampled
from realtime.bundle import Bundle, BundleError, Manifest, StyleError, check_kind
from realtime.spectral import SpectralSpec
from realtime.stream import make_session

EXCERPT_SECONDS = 3.0
SHORTEST_REST = 1 / 3
"""Of an excerpt: what is left at a recording's end and is shorter is not heard, unless it is all that there is."""
SILENT_DBFS = -60.0
BELOW_LOUDEST_DB = 30.0
"""Excerpts quieter than a recording's loudest by more than this are pauses and tell nothing."""
BLOCK = 65_536
EXCERPTS_AT_ONCE = 8
CALIBRATION_BINS = 15


class RecogniseError(ValueError):
    """Recordings that cannot be recognised or compared; the text names the file or folder and the remedy."""


def excerpt_samples(spec: SpectralSpec) -> int:
    """EXCERPT_SECONDS in whole hops."""
    return max(1, round(EXCERPT_SECONDS * spec.sample_rate / spec.hop_samples)) * spec.hop_samples


def cut_excerpts(blocks: Iterable[NDArray[np.float32]], samples: int) -> Iterator[NDArray[np.float32]]:
    """Blocks [any length] of mono sound -> excerpts [samples], one after the other; the last may be shorter."""
    rest, first = np.zeros(0, np.float32), True
    for block in blocks:
        rest = np.concatenate([rest, block]) if len(rest) else block
        while len(rest) >= samples:
            yield rest[:samples]
            rest, first = rest[samples:], False
    if len(rest) and (first or len(rest) >= SHORTEST_REST * samples):
        yield rest


def after_silence(excerpt: NDArray[np.float32], samples: int) -> NDArray[np.float32]:
    """An excerpt that is too short, with silence before it and none after: [samples] that end as it does."""
    return np.pad(excerpt, (samples - len(excerpt), 0))


def level_dbfs(audio: NDArray[np.float32]) -> float:
    """Root mean square of [samples] in dBFS, not below -200."""
    return 10.0 * float(np.log10(max(float(np.square(audio, dtype=np.float64).mean()), 1e-20)))


def loud_enough(levels_dbfs: Sequence[float]) -> NDArray[np.bool_]:
    """Which excerpts of a recording with these levels tell its style: no silence, no pause."""
    levels = np.array(levels_dbfs, dtype=np.float64)
    return (levels >= SILENT_DBFS) & (levels >= levels.max(initial=-np.inf) - BELOW_LOUDEST_DB)


def expected_calibration_error(confidence: NDArray[Any], right: NDArray[Any]) -> float:
    """How far confidence [count] is from the share that is right [count], in the mean over bins of confidence.

    Naeini, Cooper and Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning", 2015; with fifteen
    bins of one width as Guo et al., "On calibration of modern neural networks", 2017, section 2.
    """
    bins = np.minimum((np.asarray(confidence) * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=np.asarray(confidence, dtype=np.float64) - np.asarray(right, dtype=np.float64))
    return float(np.abs(gaps).sum() / max(1, len(bins)))


class Recogniser:
    """A recogniser's graph: audio and states in, probabilities, embedding and states out. One thread at a time."""

    def __init__(self, bundle: Bundle, provider: str = "cpu") -> None:
        """Raises BundleError for a model of another kind or a graph that cannot be loaded, and ProviderError."""
        manifest = bundle.manifest
        check_kind(bundle, "recognise", "recognises no styles", "give a recogniser's file")
        self.manifest, self.path = manifest, bundle.path
        try:
            self._session = make_session(bundle.graph, provider)
        except RuntimeError as error:
            raise BundleError(bundle.path, "graph", f"onnxruntime refuses it: {error}") from None
        self._outputs = ["probabilities", "embedding", *(f"next.{state.name}" for state in manifest.states)]

    @property
    def sample_rate(self) -> int:
        return self.manifest.spectral.sample_rate

    @property
    def excerpt_samples(self) -> int:
        """Length of an excerpt."""
        return excerpt_samples(self.manifest.spectral)

    def silence(self, channels: int) -> dict[str, NDArray[np.float32]]:
        """The states [channels, ...] before anything was heard, by the name of their input."""
        return {f"state.{state.name}": np.zeros((channels, *state.shape), np.float32) for state in self.manifest.states}

    def step(
        self, audio: NDArray[np.float32], states: dict[str, NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        """audio [channels, n*hop] -> probabilities [channels, styles] and embedding [channels, E] after it; states.

        Raises BundleError for a graph that cannot be run.
        """
        try:
            probabilities, embedding, *after = self._session.run(self._outputs, {"audio": audio, **states})
        except Exception as error:
            raise BundleError(self.path, "graph", f"cannot be run: {error}", "export the model again") from None
        return (
            np.asarray(probabilities),
            np.asarray(embedding),
            {name: np.asarray(value) for name, value in zip(states, after, strict=True)},
        )

    def judge(self, excerpts: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Excerpts [up to excerpt_samples] -> probabilities [count, styles] and embeddings [count, E], each afresh."""
        padded = np.stack([after_silence(excerpt, self.excerpt_samples) for excerpt in excerpts])
        probabilities, embeddings, _ = self.step(padded, self.silence(len(padded)))
        return probabilities, embeddings


@dataclass(frozen=True)
class Excerpt:
    """One excerpt of a recording; ``probabilities`` [styles], or None where it is a pause."""

    start_seconds: float
    seconds: float
    probabilities: NDArray[np.float32] | None


@dataclass(frozen=True)
class Recognition:
    """What was made of a recording: of each excerpt, and of the whole.

    ``probabilities`` [styles] are the mean over the excerpts that are no pauses, ``embedding`` [E] has length 1.
    """

    path: Path
    seconds: float
    excerpts: tuple[Excerpt, ...]
    probabilities: NDArray[np.float32]
    embedding: NDArray[np.float32]


def read_mono(path: Path, sample_rate: int) -> Iterator[NDArray[np.float32]]:
    """Blocks [samples] of a sound file in mono, at this rate, in constant memory. Raises AudioFileError."""
    info = file_info(path)
    blocks = (block.mean(axis=0, keepdims=True) for block in read_blocks(path, BLOCK))
    for block in resampled(blocks, info.sample_rate, sample_rate, 1):
        if not np.isfinite(block).all():
            raise AudioFileError(f"{path}: holds NaN or infinity; repair it first")
        yield block[0]


def recognise_file(recogniser: Recogniser, path: Path) -> Recognition:
    """Hear a sound file. Raises AudioFileError, RecogniseError for one that is silent, and BundleError."""
    levels: list[float] = []
    sizes: list[int] = []
    heard: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    waiting: list[NDArray[np.float32]] = []
    for excerpt in cut_excerpts(read_mono(path, recogniser.sample_rate), recogniser.excerpt_samples):
        levels.append(level_dbfs(excerpt))
        sizes.append(len(excerpt))
        waiting.append(excerpt)
        if len(waiting) == EXCERPTS_AT_ONCE:
            heard.append(recogniser.judge(waiting))
            waiting = []
    if waiting:
        heard.append(recogniser.judge(waiting))
    loud = loud_enough(levels)
    if not loud.any():
        raise RecogniseError(f"{path}: is silent (never above {SILENT_DBFS:g} dBFS); give a recording with sound")
    probabilities, embeddings = (np.concatenate(parts) for parts in zip(*heard, strict=True))
    rate = recogniser.sample_rate
    starts = np.cumsum([0, *sizes]) / rate
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-9)
    middle = unit[loud].mean(axis=0)
    return Recognition(
        path,
        float(starts[-1]),
        tuple(
            Excerpt(float(start), size / rate, row if is_loud else None)
            for start, size, row, is_loud in zip(starts[:-1], sizes, probabilities, loud, strict=True)
        ),
        probabilities[loud].mean(axis=0),
        middle / max(float(np.linalg.norm(middle)), 1e-9),
    )


def find_recordings(folder: Path) -> list[Path]:
    """All sound files below a folder, in a fixed order; hidden ones, and those in hidden folders, are passed over."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in AUDIO_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def plan_recordings(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, and all recordings of folders. Raises RecogniseError for what is neither, or is empty."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = find_recordings(path)
            if not inside:
                raise RecogniseError(f"{path}: has no sound files ({', '.join(AUDIO_SUFFIXES)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise RecogniseError(f"{path}: there is no such file or folder; check the path")
    return list(dict.fromkeys(found))


def file_sha256(path: Path) -> str:
    """Of the file's bytes. Raises AudioFileError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AudioFileError(f"{path}: cannot be read ({error.strerror})") from None


@dataclass(frozen=True)
class Labelled:
    """Recordings of a folder of style folders, each with the number of its style, and what was left out."""

    recordings: tuple[tuple[Path, int], ...]
    known: int  # left out: the recogniser learned from them
    foreign: tuple[str, ...]  # folders that are no style of the recogniser


def find_labelled(folder: Path, manifest: Manifest, with_known: bool) -> Labelled | None:
    """The recordings of style folders in ``folder``, those that the recogniser learned from only ``with_known``.

    None where no folder in it is named as a style is. Raises RecogniseError where none is left.
    """
    ids = [style.id for style in manifest.styles]
    found: list[tuple[Path, int]] = []
    foreign: list[str] = []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        recordings = find_recordings(inner)
        if not recordings:
            continue
        try:
            number = ids.index(manifest.style(inner.name).id)
        except StyleError:
            foreign.append(inner.name)
            continue
        found += [(path, number) for path in recordings]
    if not found:
        return None
    learned_from = frozenset() if with_known else frozenset(manifest.card.recordings_sha256)
    kept = tuple((path, number) for path, number in found if not learned_from or file_sha256(path) not in learned_from)
    if not kept:
        raise RecogniseError(
            f"{folder}: the recogniser learned from every recording in it; give others, or --with-known"
        )
    return Labelled(kept, len(found) - len(kept), tuple(foreign))


@dataclass(frozen=True)
class Evaluation:
    """How a recogniser fares on labelled recordings; excerpts that are pauses do not count.

    ``confusion`` [styles, styles] counts excerpts, rows what they are, columns what they were taken for.
    """

    styles: tuple[str, ...]
    confusion: NDArray[np.int64]
    confidence: NDArray[np.float64]  # [excerpts]
    right: NDArray[np.bool_]  # [excerpts]
    recordings: int
    recordings_right: int

    @property
    def accuracy(self) -> float:
        """Share of excerpts that are recognised."""
        return float(self.right.mean())

    @property
    def mean_style_accuracy(self) -> float:
        """The same per style, in the mean over the styles that there are."""
        counts = self.confusion.sum(axis=1)
        return float(np.mean(self.confusion.diagonal()[counts > 0] / counts[counts > 0]))

    @property
    def calibration_error(self) -> float:
        return expected_calibration_error(self.confidence, self.right)


def evaluate(recognitions: Sequence[tuple[Recognition, int]], styles: Sequence[str]) -> Evaluation:
    """Recordings with the numbers of their styles -> how many were recognised, and how sure of it."""
    confusion = np.zeros((len(styles), len(styles)), dtype=np.int64)
    confidence: list[float] = []
    right: list[bool] = []
    whole = 0
    for recognition, number in recognitions:
        whole += int(recognition.probabilities.argmax()) == number
        for excerpt in recognition.excerpts:
            if excerpt.probabilities is not None:
                taken = int(excerpt.probabilities.argmax())
                confusion[number, taken] += 1
                confidence.append(float(excerpt.probabilities[taken]))
                right.append(taken == number)
    return Evaluation(
        tuple(styles), confusion, np.array(confidence), np.array(right, dtype=bool), len(recognitions), whole
    )


def recognise_all(
    recogniser: Recogniser, paths: Sequence[Path], progress: Callable[[int, int], None] | None = None
) -> tuple[dict[Path, Recognition], list[str]]:
    """Each recording by its path, and why others could not be heard. ``progress`` is told (files done, in all)."""
    found: dict[Path, Recognition] = {}
    failed: list[str] = []
    for number, path in enumerate(paths):
        try:
            found[path] = recognise_file(recogniser, path)
        except (AudioFileError, RecogniseError) as error:
            failed.append(str(error))
        if progress:
            progress(number + 1, len(paths))
    return found, failed
