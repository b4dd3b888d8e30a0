"""How near the sound is to the style, how much of the playing is kept, how clean it is; beside what costs nothing.

Every input goes through every style in the engine that performs. The same figures are taken of the input unchanged, of
one fixed filter per style, and of another model.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realtime.bundle import FIRST_MODEL, Bundle, check_kind, read_bundle
from training import measures
from training.library import (
    LibraryError,
    Recording,
    find_audio,
    load_library,
    read_mono,
)
from training.measures import Audio
from training.models.recogniser import (
    Recogniser,
    RecogniserConfig,
    draw_phrase,
    is_class,
    load_or_train,
    real_excerpts,
)
from training.phrases import find_tunes
from training.playing import (
    Engine,
    Input,
    Measured,
    first_and_later,
    loudest_part,
    mean_of,
    measure,
    read_input,
    rounded,
    share_taken_for,
    taken_for,
)
from training.recipe import DataConfig, StyleEntry
from training.reconstruction import code_figures
from training.sampled import tunes_figures

REAL_PHRASES = 96
WEAK_ACCURACY = 0.6
MODEL, UNCHANGED, STATIC = "model", "unchanged", "static match"

Progress = Callable[[str, int, int], None]
"""Told (what is being done, how much of it is done, how much there is)."""


class EvaluationError(RuntimeError):
    """Inputs, references or models that cannot be evaluated; the text names them and the remedy."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured. ``styles`` empty: all of the model. ``seconds``: how much of each input, its loudest part.

    ``alone``: beside the input unchanged only, which takes half the time. ``tunes``: a folder of MIDI files that the
    references play for themselves, too.
    """

    styles: tuple[str, ...] = ()
    baseline: Path | None = None
    alone: bool = False
    tunes: Path | None = None
    seconds: float = 10.0
    provider: str = "cpu"
    cache: Path = Path(".restyle-cache")
    recogniser: RecogniserConfig = field(default_factory=RecogniserConfig)


@dataclass(frozen=True)
class Example:
    """What the picture shows of one input: names and sounds [samples]: the input, then each style made and real."""

    title: str
    sample_rate: int
    sounds: tuple[tuple[str, Audio], ...]


@dataclass(frozen=True)
class Evaluation:
    """``figures`` are plain values, as the JSON file has them; "voices" are the inputs of one clear pitch at a time."""

    figures: dict[str, Any]
    example: Example


def read_references(
    folder: Path, sample_rate: int, cache: Path, progress: Callable[[int, int], None] | None = None
) -> tuple[dict[str, tuple[Recording, ...]], list[str]]:
    """Recordings of each folder below ``folder``, its name being the style's id, and what was passed over and why.

    Raises EvaluationError where there is nothing.
    """
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: there is no such folder; --references takes one with a folder per style")
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and find_audio(path)]
    if not folders:
        raise EvaluationError(f"{folder}: has no folders with recordings in them; put one there per style")
    entries, notes = [], []
    for path in folders:
        try:
            entries.append(StyleEntry(path.name, path.name, path.name, 0, "unknown", ""))
        except ValueError as error:
            notes.append(f"{path}: {error}")
    try:
        library = load_library(entries, folder, DataConfig(minimum_seconds=0.1), sample_rate, cache, progress)
    except LibraryError as error:
        raise EvaluationError(str(error)) from error
    notes += [f"{skipped.path}: {skipped.reason}" for skipped in library.skipped]
    return {style.id: (*style.train, *style.validation, *style.test) for style in library.styles}, notes


def find_inputs(folder: Path) -> list[Path]:
    """The recordings to restyle: those in a folder, or one file. Raises EvaluationError."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: there is no such folder; --inputs takes one with recordings to restyle")
    found = find_audio(folder)
    if not found:
        raise EvaluationError(f"{folder}: has no recordings; put some there that no model was trained on")
    return found


def by_name(paths: Sequence[Path], inputs: Path) -> dict[str, Path]:
    """Files by their place below ``inputs``, without their suffix where no other one has the same name."""
    folder = inputs if inputs.is_dir() else inputs.parent
    places = [path.relative_to(folder) for path in paths]
    short = [place.with_suffix("").as_posix() for place in places]
    return {
        name if short.count(name) == 1 else place.as_posix(): path
        for name, place, path in zip(short, places, paths, strict=True)
    }


def find_overlap(
    inputs: Sequence[Path],
    models: Sequence[Bundle],
    references: Mapping[str, Sequence[Recording]],
    sample_rate: int,
) -> list[str]:
    """Inputs that were trained on, as 'file: why': by a model, whatever the file's format, or by the recogniser."""
    by_sound = {
        recording.audio_sha256: (style, recording) for style, group in references.items() for recording in group
    }
    by_file = {recording.sha256: (style, recording) for style, group in references.items() for recording in group}
    found = []
    for path in inputs:
        try:
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            sound = hashlib.sha256(read_mono(path, sample_rate).data).hexdigest()
        except (OSError, ValueError):
            continue  # named where the inputs are read
        style, same = by_file.get(sha256) or by_sound.get(sound) or ("", None)
        hashes = {sha256, same.sha256} if same else {sha256}
        trained = [bundle.path.name for bundle in models if hashes & set(bundle.manifest.card.recordings_sha256)]
        if trained:
            found.append(f"{path}: {' and '.join(trained)} was trained on it")
        elif same:
            found.append(f"{path}: is {same.name} of the references of '{style}', which train the recogniser")
    return found


def evaluate(
    model: Path,
    inputs: Path,
    references: Path,
    options: EvaluationOptions = EvaluationOptions(),
    tell: Progress = lambda *_: None,
) -> Evaluation:
    """Every input in every style of the model, measured, beside the baselines.

    Raises EvaluationError, PhraseError for the tunes, and BundleError, StyleError or ProviderError for the model.
    """
    began = time.perf_counter()
    bundle = read_bundle(model)
    check_kind(bundle, "transfer", "does not turn audio into audio, which is what is measured here")
    rate, hop = bundle.manifest.spectral.sample_rate, bundle.manifest.spectral.hop_samples
    styles = tuple(dict.fromkeys(bundle.manifest.style(name).id for name in options.styles)) or tuple(
        style.id for style in bundle.manifest.styles
    )
    other = None if options.alone else _baseline(bundle, options.baseline, styles)
    paths = find_inputs(inputs)
    tunes = find_tunes(options.tunes, "--tunes") if options.tunes else []
    recordings, notes = read_references(
        references, rate, options.cache, lambda done, of: tell("reading references", done, of)
    )
    classes = {style: group for style, group in recordings.items() if is_class(group)}
    notes += [
        f"{references / style}: {len(group)} recordings are too few to recognise it by"
        for style, group in recordings.items()
        if style not in classes
    ]
    _check_styles(styles, recordings, classes, references, bundle)
    overlap = find_overlap(paths, [bundle, *([other] if other else [])], recordings, rate)
    if overlap:
        raise EvaluationError(
            "inputs that were trained on say nothing about others; remove them: " + "; ".join(overlap)
        )
    recogniser = load_or_train(
        classes, options.recogniser, options.cache, lambda done, of: tell("training the recogniser", done, of)
    )
    items = []
    for number, (name, path) in enumerate(by_name(paths, inputs).items()):
        tell("reading inputs", number, len(paths))
        try:
            items.append(read_input(path, name, rate, options.seconds))
        except ValueError as error:
            notes.append(f"{path}: {error}")
    if not items:
        raise EvaluationError(f"{inputs}: no input can be used: {'; '.join(notes)}")

    systems, tones, example = _measure_all(items, styles, bundle, other, recordings, recogniser, options, tell)
    real = {style: measures.gaussian_of(_real_embeddings(recordings[style], recogniser, options)) for style in styles}
    voices = [number for number, item in enumerate(items) if item.pitch.pitched]

    def summary(name: str, numbers: Sequence[int]) -> dict[str, Any]:
        rows, unchanged = (_some(systems[system], numbers) for system in (name, UNCHANGED))
        return _summarise([items[i] for i in numbers], rows, tones.get(name, {}), real, unchanged, recogniser)

    summaries = {}
    for name in systems:
        of_voices = summary(name, voices) if voices else {"mean": None, "styles": None}
        summaries[name] = {
            **summary(name, range(len(items))),
            "mean_of_voices": of_voices["mean"],
            "styles_of_voices": of_voices["styles"],
        }
    accuracy = recogniser.accuracy
    of_recordings = {
        name: {style: mean_of(heard(recording.audio(), rate) for recording in recordings[style]) for style in styles}
        for name, heard in (("partials_db", measures.partials_db), ("flutter_db", measures.flutter_db))
    }
    of_tunes = {}
    if tunes:
        before = {
            style: [_distance([rows[i] for i in some], real[style]) for some in (range(len(items)), voices) if some]
            for style, rows in systems[UNCHANGED].items()
        }
        of_tunes = tunes_figures(
            bundle,
            styles,
            recordings,
            tunes,
            recogniser,
            real,
            before,
            options.seconds,
            options.cache,
            tell,
        )
    figures = {
        "model": bundle.manifest.name,
        "file": bundle.path.name,
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "wall_seconds": round(time.perf_counter() - began, 1),
        "sample_rate": rate,
        "hop_samples": hop,
        "seconds_per_input": options.seconds,
        "recogniser": {
            "accuracy": mean_of(value.excerpts for value in accuracy.values()),
            "phrase_accuracy": mean_of(value.phrases for value in accuracy.values()),
            "styles": {style: _plain(asdict(value)) for style, value in accuracy.items()},
            "weak_styles": [style for style in styles if accuracy[style].phrases < WEAK_ACCURACY],
            "seed": options.recogniser.seed,
        },
        "inputs_used": {
            item.name: _plain(
                {
                    "seconds": len(item.audio) / rate,
                    "pitched": item.pitch.pitched,
                    "voiced_share": item.pitch.voiced_share,
                    "pitch_agreement": item.pitch.agreement,
                    "onsets": len(item.onsets_s),
                    "heard_as": recogniser.styles[int(taken_for(row.judgement, len(recogniser.styles)).argmax())],
                }
            )
            for item, row in zip(items, next(iter(systems[UNCHANGED].values())), strict=True)
        },
        "skipped": notes,
        "recordings": of_recordings,
        **of_tunes,
        **code_figures(bundle, styles, recordings, recogniser, options.provider, options.seconds, tell),
        **summaries[MODEL],
        "baselines": {name: summary for name, summary in summaries.items() if name != MODEL},
    }
    return Evaluation(figures, example)


def _baseline(bundle: Bundle, path: Path | None, styles: Sequence[str]) -> Bundle | None:
    """The model to compare with: the one asked for, else the first one that was shipped, if the two can be compared."""
    other, rate = read_bundle(path or FIRST_MODEL), bundle.manifest.spectral.sample_rate
    comparable = other.manifest.spectral.sample_rate == rate and _plays_any(other, styles)
    if path is None:
        return other if comparable and other.graph != bundle.graph else None
    if not comparable:
        its = other.manifest.spectral.sample_rate
        what = f"runs at {its} Hz, {bundle.path} at {rate} Hz" if its != rate else f"plays none of {', '.join(styles)}"
        raise EvaluationError(f"{path}: {what}; choose another baseline")
    return other


def _plays_any(bundle: Bundle, styles: Sequence[str]) -> bool:
    return any(style.id in styles for style in bundle.manifest.styles)


def _check_styles(
    styles: Sequence[str],
    recordings: Mapping[str, Sequence[Recording]],
    classes: Mapping[str, Sequence[Recording]],
    references: Path,
    bundle: Bundle,
) -> None:
    absent = [style for style in styles if style not in recordings]
    few = [style for style in styles if style in recordings and style not in classes]
    others = ",".join(style for style in styles if style in classes)
    if absent or few:
        what = [f"no folder for {', '.join(absent)}"] * bool(absent) + [f"too little of {', '.join(few)}"] * bool(few)
        hint = f", or leave styles out with --styles {others}" if others else ""
        raise EvaluationError(
            f"{references}: has {' and '.join(what)}, which {bundle.path.name} plays; add recordings in folders named "
            f"after the styles{hint}"
        )
    if len(classes) < 2:
        raise EvaluationError(f"{references}: only one style has enough recordings; telling styles apart needs two")


def _measure_all(
    items: Sequence[Input],
    styles: Sequence[str],
    bundle: Bundle,
    other: Bundle | None,
    recordings: Mapping[str, Sequence[Recording]],
    recogniser: Recogniser,
    options: EvaluationOptions,
    tell: Progress,
) -> tuple[dict[str, dict[str, list[Measured]]], dict[str, dict[str, float]], Example]:
    """system -> style -> one Measured per input; system -> style -> buzz of tones; and one input's sounds to show."""
    rate, hop = bundle.manifest.spectral.sample_rate, bundle.manifest.spectral.hop_samples
    engines = {MODEL: Engine(bundle, options.provider)}
    if other is not None:
        engines[other.path.stem if other.path.stem != MODEL else "baseline"] = Engine(other, options.provider)
    played = {
        name: [style for style in styles if any(style == known.id for known in engine.bundle.manifest.styles)]
        for name, engine in engines.items()
    }
    plain = (UNCHANGED,) if options.alone else (UNCHANGED, STATIC)
    systems: dict[str, dict[str, list[Measured]]] = {
        name: {style: [] for style in played.get(name, styles)} for name in (*engines, *plain)
    }
    spectra = {
        style: np.mean([measures.mean_spectrum(np.asarray(r.audio()), rate) for r in recordings[style]], axis=0)
        for style in systems.get(STATIC, ())
    }
    quiet = np.zeros(0, np.float32)
    shown = next((item for item in items if item.pitch.pitched), items[0])
    sounds: list[tuple[str, Audio]] = [("input", shown.audio)]
    done, in_all = 0, len(items) * len(styles)
    for item in items:
        unchanged = measure(item, item.audio, quiet, rate, hop, recogniser)
        for style in styles:
            tell("rendering and measuring", done, in_all)
            for name, engine in engines.items():
                if style in played[name]:
                    out, after = engine.render(item.audio, style)
                    systems[name][style].append(measure(item, out, after, rate, hop, recogniser))
                    if item is shown and name == MODEL:
                        real = _real_playing(recordings[style], len(item.audio))
                        sounds += [(style, out), (f"{style}, real", real)]
            if STATIC in systems:
                matched = measures.static_match(item.audio, spectra[style], rate)
                systems[STATIC][style].append(measure(item, matched, quiet, rate, hop, recogniser))
            systems[UNCHANGED][style].append(unchanged)
            done += 1
    tell("rendering and measuring", done, in_all)
    tones = {name: {style: engine.tone_buzz_db(style) for style in played[name]} for name, engine in engines.items()}
    return systems, tones, Example(shown.name, rate, tuple(sounds))


def _real_playing(recordings: Sequence[Recording], samples: int) -> Audio:
    """[up to samples] of a style as it is: its longest recordings, one after the other."""
    found: list[Audio] = []
    for recording in sorted(recordings, key=lambda r: r.seconds, reverse=True):
        found.append(loudest_part(np.asarray(recording.audio()), samples - sum(map(len, found))))
        if sum(map(len, found)) >= samples:
            break
    return np.concatenate(found)


def _real_embeddings(
    recordings: Sequence[Recording], recogniser: Recogniser, options: EvaluationOptions
) -> NDArray[np.float32]:
    """[count, EMBEDDING] of a style's recordings, as they are and laid into phrases, in equal parts."""
    random = np.random.default_rng(options.recogniser.seed)
    excerpts = real_excerpts(recordings)
    rows = random.permutation(len(excerpts))[:REAL_PHRASES]
    phrases = np.stack([draw_phrase(recordings, options.recogniser, random) for _ in range(REAL_PHRASES)])
    return recogniser.judge(np.concatenate([excerpts[rows], phrases])).embeddings


def _summarise(
    items: Sequence[Input],
    rows: Mapping[str, Sequence[Measured]],
    tones: Mapping[str, float],
    real: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    unchanged: Mapping[str, Sequence[Measured]],
    recogniser: Recogniser,
) -> dict[str, Any]:
    """Plain values of one system: per style, per input, in the mean, and what its excerpts are taken for."""
    numbers = {style: recogniser.styles.index(style) for style in rows}
    middles = [mean_of(group[i].loudness_lufs for group in rows.values()) or 0.0 for i in range(len(items))]
    styles: dict[str, dict[str, float | None]] = {}
    confusions: dict[str, dict[str, float]] = {}
    for style, group in rows.items():
        distance, before = (_distance(some, real[style]) for some in (group, unchanged[style]))
        apart = [first_and_later(row.judgement, numbers[style]) for row in group]
        level = mean_of(row.loudness_lufs - middle for row, middle in zip(group, middles, strict=True))
        styles[style] = {
            **_averages(group, [share_taken_for(row.judgement, numbers[style]) for row in group]),
            "style_accuracy_first": mean_of(first for first, _ in apart),
            "style_accuracy_later": mean_of(later for _, later in apart),
            "frechet_distance": rounded(distance),
            "frechet_ratio": rounded(distance / before),
            "hop_buzz_tone_db": rounded(tones[style]) if style in tones else None,
            "level_difference_lu": level,
        }
        heard = [taken_for(row.judgement, len(recogniser.styles)) for row in group]
        confusions[style] = dict(zip(recogniser.styles, np.round(np.mean(heard, axis=0), 4).tolist(), strict=True))
    spreads = [_spread([group[i].loudness_lufs for group in rows.values()]) for i in range(len(items))]
    worst = {"hop_buzz_worst_db", "silence_peak_dbfs"}
    mean = {
        name: max((value for style in styles.values() if (value := style[name]) is not None), default=None)
        if name in worst
        else mean_of(style[name] for style in styles.values())
        for name in next(iter(styles.values()))
        if name != "level_difference_lu"
    }
    return {
        "mean": {**mean, "level_spread_lu": mean_of(spreads)},
        "styles": styles,
        "inputs": {
            item.name: {
                **_averages(
                    [group[i] for group in rows.values()],
                    [share_taken_for(group[i].judgement, numbers[style]) for style, group in rows.items()],
                ),
                "level_spread_lu": rounded(spreads[i]),
            }
            for i, item in enumerate(items)
        },
        "taken_for": confusions,
    }


def _some(rows: Mapping[str, Sequence[Measured]], numbers: Sequence[int]) -> dict[str, list[Measured]]:
    """The rows of some of the inputs."""
    return {style: [group[i] for i in numbers] for style, group in rows.items()}


def _distance(rows: Sequence[Measured], real: tuple[NDArray[np.float64], NDArray[np.float64]]) -> float:
    """Fréchet distance of all excerpts of an output to the real ones; NaN for a single one, which has no spread."""
    embeddings = np.concatenate([row.judgement.embeddings for row in rows])
    return measures.frechet_distance(measures.gaussian_of(embeddings), real) if len(embeddings) > 1 else math.nan


def _averages(group: Sequence[Measured], accuracies: Sequence[float]) -> dict[str, float | None]:
    return {
        "style_accuracy": mean_of(accuracies),
        "pitch_kept": mean_of(row.pitch_kept for row in group),
        "onset_f1": mean_of(row.onset_f1 for row in group),
        "chroma_correlation": mean_of(row.chroma_correlation for row in group),
        "loudness_correlation": mean_of(row.loudness_correlation for row in group),
        "hop_buzz_db": mean_of(row.hop_buzz_db for row in group),
        "hop_buzz_worst_db": rounded(max(row.hop_buzz_db for row in group)),
        "partials_db": mean_of(row.partials_db for row in group),
        "flutter_db": mean_of(row.flutter_db for row in group),
        "added_strokes_db": mean_of(row.added_strokes_db for row in group),
        "clicks_per_minute": rounded(60.0 * sum(row.clicks for row in group) / sum(row.seconds for row in group)),
        "silence_peak_dbfs": rounded(max(row.silence_peak_dbfs for row in group)),
    }


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: rounded(value) if isinstance(value, float) else value for name, value in values.items()}
