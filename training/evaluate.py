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
import soxr
import torch
from numpy.typing import NDArray

from realtime.bundle import FIRST_MODEL, Bundle, check_kind, read_bundle
from realtime.controls import Performer
from realtime.loudness import loudness_lufs
from realtime.processor import Processor
from realtime.render import BLOCK, STEADY_HOPS_PER_STEP, render_samples
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
    SAMPLE_RATE,
    Judgement,
    Recogniser,
    RecogniserConfig,
    cut_excerpts,
    draw_phrase,
    is_class,
    load_or_train,
    loud_enough,
    mel_power,
    real_excerpts,
)
from training.recipe import DataConfig, StyleEntry

SILENCE_SECONDS = 3.0
TAIL_SECONDS = 1.0  # of that silence, in which what was played may ring out
FADE_SECONDS = 0.01
SHORTEST_INPUT_SECONDS = 1.0
REAL_PHRASES = 96
UNHEARD_RECORDINGS = 12  # of a style, at most, whose reconstruction is measured
WEAK_ACCURACY = 0.6
FLOOR_DB = 60.0  # below an excerpt's loudest mel band: what is fainter makes no difference
TONES_HZ, TONE_SECONDS = (220.0, 440.0), 4.0
MODEL, UNCHANGED, STATIC = "model", "unchanged", "static match"

Progress = Callable[[str, int, int], None]
"""Told (what is being done, how much of it is done, how much there is)."""


class EvaluationError(RuntimeError):
    """Inputs, references or models that cannot be evaluated; the text names them and the remedy."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured. ``styles`` empty: all of the model. ``seconds``: how much of each input, its loudest part.

    ``alone``: beside the input unchanged only, which takes half the time.
    """

    styles: tuple[str, ...] = ()
    baseline: Path | None = None
    alone: bool = False
    seconds: float = 10.0
    provider: str = "cpu"
    cache: Path = Path(".restyle-cache")
    recogniser: RecogniserConfig = field(default_factory=RecogniserConfig)


@dataclass(frozen=True)
class Input:
    """One recording to restyle: the stretch of it that is used, and its tracks, taken once."""

    path: Path
    audio: Audio  # [samples] at the model's rate
    tracked: Audio  # [samples] at measures.TRACK_RATE
    pitch: measures.PitchTrack
    onsets_s: NDArray[np.float64]
    chroma: NDArray[np.float32]
    sounding: NDArray[np.bool_]  # [frames]
    loud: NDArray[np.bool_]  # [excerpts]

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class Measured:
    """All figures of one output, apart from those that need its target style. NaN: cannot be said."""

    pitch_kept: float
    onset_f1: float
    chroma_correlation: float
    loudness_correlation: float
    hop_buzz_db: float
    clicks: int
    silence_peak_dbfs: float
    loudness_lufs: float
    judgement: Judgement  # of the excerpts that are loud in the input; shares of zero where the output is silent
    seconds: float


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


def loudest_part(audio: Audio, samples: int) -> Audio:
    """The stretch of [samples] with the most energy, [up to ``samples``], ended without a click."""
    if len(audio) > samples:
        energy = np.concatenate([[0.0], np.cumsum(np.square(audio, dtype=np.float64))])
        start = int(np.argmax(energy[samples:] - energy[:-samples]))
        audio = audio[start : start + samples]
    return audio.copy()


def read_input(path: Path, sample_rate: int, seconds: float) -> Input:
    """Decode, cut and track one input. Raises ValueError that says what is wrong with the file."""
    audio = loudest_part(read_mono(path, sample_rate), round(seconds * sample_rate))
    if len(audio) < SHORTEST_INPUT_SECONDS * sample_rate:
        raise ValueError(f"is too short ({len(audio) / sample_rate:.2f} s, at least {SHORTEST_INPUT_SECONDS:g} s)")
    if measures.peak_dbfs(audio) < -60.0:
        raise ValueError("is silent")
    fade = round(FADE_SECONDS * sample_rate)
    audio[:fade] *= np.linspace(0.0, 1.0, fade, dtype=np.float32)
    audio[-fade:] *= np.linspace(1.0, 0.0, fade, dtype=np.float32)
    tracked = _at_rate(audio, sample_rate, measures.TRACK_RATE)
    return Input(
        path,
        audio,
        tracked,
        measures.pitch_track(tracked),
        measures.onsets_s(tracked),
        measures.chroma(tracked),
        measures.level_db(tracked) >= -measures.SOUNDING_DB,
        loud_enough(cut_excerpts(_at_rate(audio, sample_rate, SAMPLE_RATE))),
    )


def _at_rate(audio: Audio, old: int, new: int) -> Audio:
    return audio if old == new else soxr.resample(audio, old, new, quality="HQ")


class Engine:
    """A model in the engine that performs, in larger steps: many inputs, one style after the other."""

    def __init__(self, bundle: Bundle, provider: str) -> None:
        self.bundle, self.rate = bundle, bundle.manifest.spectral.sample_rate
        self.processor = Processor(bundle, provider, hops_per_step=STEADY_HOPS_PER_STEP)
        self.processor.prepare(self.rate, BLOCK, channels=1)

    def tone_buzz_db(self, style: str) -> float:
        """What the hop rate adds to steady tones in this style, the worst of two, in dB relative to the output."""
        hop, found = self.bundle.manifest.spectral.hop_samples, []
        time_s = np.arange(round(TONE_SECONDS * self.rate)) / self.rate
        for tone_hz in TONES_HZ:
            out, _ = self.render((0.2 * np.sin(2.0 * np.pi * tone_hz * time_s)).astype(np.float32), style)
            found.append(measures.tone_buzz_db(out[self.rate // 2 :], tone_hz, self.rate, hop))
        return max(found)

    def render(self, audio: Audio, style: str) -> tuple[Audio, Audio]:
        """[samples] in a style, aligned to the input, and what sounds in the silence after it."""
        performer = Performer(self.bundle.manifest)
        performer.select(style)
        self.processor.controls = performer.controls()
        self.processor.reset()
        silence = np.zeros(round(SILENCE_SECONDS * self.rate), np.float32)
        out = render_samples(self.processor, np.concatenate([audio, silence])[None])[0]
        return out[: len(audio)], out[len(audio) + round(TAIL_SECONDS * self.rate) :]


def measure(
    item: Input, out: Audio, after: Audio, sample_rate: int, hop_samples: int, recogniser: Recogniser
) -> Measured:
    """All figures of one output [samples] and of what sounded after it [samples], both at ``sample_rate``."""
    tracked = _at_rate(out, sample_rate, measures.TRACK_RATE)
    excerpts = cut_excerpts(_at_rate(out, sample_rate, SAMPLE_RATE))[item.loud]
    return Measured(
        measures.pitch_kept(item.pitch, tracked) if item.pitch.pitched else math.nan,
        measures.onset_f1(item.onsets_s, measures.onsets_s(tracked)),
        measures.chroma_correlation(item.chroma, measures.chroma(tracked), item.sounding),
        measures.loudness_correlation(item.tracked, tracked),
        measures.hop_buzz_db(item.audio, out, hop_samples),
        measures.added_clicks(item.audio, out, sample_rate),
        measures.peak_dbfs(after),
        loudness_lufs(out, sample_rate),
        _judged(recogniser, excerpts),
        len(out) / sample_rate,
    )


def _judged(recogniser: Recogniser, excerpts: NDArray[np.float32]) -> Judgement:
    """What the recogniser makes of excerpts [count, samples]; shares of zero where nothing is heard."""
    judgement = recogniser.judge(excerpts)
    judgement.shares[np.abs(excerpts).max(axis=1) < 1e-4] = 0.0
    return judgement


def evaluate(
    model: Path,
    inputs: Path,
    references: Path,
    options: EvaluationOptions = EvaluationOptions(),
    tell: Progress = lambda *_: None,
) -> Evaluation:
    """Every input in every style of the model, measured, beside the baselines.

    Raises EvaluationError, and BundleError, StyleError or ProviderError for the model.
    """
    began = time.perf_counter()
    bundle = read_bundle(model)
    check_kind(bundle, "transfer", "does not turn audio into audio, which is what is measured here")
    other = None if options.alone else _baseline(bundle, options.baseline)
    rate, hop = bundle.manifest.spectral.sample_rate, bundle.manifest.spectral.hop_samples
    styles = tuple(dict.fromkeys(bundle.manifest.style(name).id for name in options.styles)) or tuple(
        style.id for style in bundle.manifest.styles
    )
    paths = find_inputs(inputs)
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
    for number, path in enumerate(paths):
        tell("reading inputs", number, len(paths))
        try:
            items.append(read_input(path, rate, options.seconds))
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

    summaries = {
        name: {
            **summary(name, range(len(items))),
            "mean_of_voices": summary(name, voices)["mean"] if voices else None,
        }
        for name in systems
    }
    accuracy = recogniser.accuracy
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
            "accuracy": _mean(value.excerpts for value in accuracy.values()),
            "phrase_accuracy": _mean(value.phrases for value in accuracy.values()),
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
                    "heard_as": recogniser.styles[int(_taken_for(row.judgement, len(recogniser.styles)).argmax())],
                }
            )
            for item, row in zip(items, next(iter(systems[UNCHANGED].values())), strict=True)
        },
        "skipped": notes,
        **_code_figures(bundle, styles, recordings, recogniser, options, tell),
        **summaries[MODEL],
        "baselines": {name: summary for name, summary in summaries.items() if name != MODEL},
    }
    return Evaluation(figures, example)


def _code_figures(
    bundle: Bundle,
    styles: Sequence[str],
    recordings: Mapping[str, Sequence[Recording]],
    recogniser: Recogniser,
    options: EvaluationOptions,
    tell: Progress,
) -> dict[str, Any]:
    """What "code" and "reconstruction" say of an autoencoder; nothing of other models.

    Reconstructed are recordings that its card does not name as heard, each through its own style.
    """
    manifest = bundle.manifest
    if not manifest.code_levels:
        return {}
    engine, heard = Engine(bundle, options.provider), set(manifest.card.recordings_sha256)
    found: dict[str, dict[str, Any]] = {}
    for number, style in enumerate(styles):
        tell("reconstructing", number, len(styles))
        unheard = [recording for recording in recordings[style] if recording.sha256 not in heard][:UNHEARD_RECORDINGS]
        found[style] = _reconstruction(engine, style, unheard, recogniser, options.seconds)
    tell("reconstructing", len(styles), len(styles))
    names = ("style_accuracy", "style_accuracy_unchanged", "log_mel_distance_db")
    return {
        "code": {
            "levels": list(manifest.code_levels),
            "numbers_per_second": _rounded(manifest.code_numbers_per_second),
            "bits_per_second": _rounded(manifest.code_bits_per_second),
        },
        "reconstruction": {
            "styles": found,
            "mean": {name: _mean(values[name] for values in found.values()) for name in names},
        },
    }


def _reconstruction(
    engine: Engine, style: str, recordings: Sequence[Recording], recogniser: Recogniser, seconds: float
) -> dict[str, Any]:
    """Recordings through their own style: how many, how often they are recognised, before and after, and how far off.

    The recogniser may have learned from some of them, which is why its word on the same excerpts unchanged is given.
    """
    before, after = [], []
    for recording in recordings:
        audio = loudest_part(np.asarray(recording.audio()), round(seconds * engine.rate))
        out, _ = engine.render(audio, style)
        real, made = (cut_excerpts(_at_rate(sound, engine.rate, SAMPLE_RATE)) for sound in (audio, out))
        loud = loud_enough(real)
        before.append(real[loud])
        after.append(made[loud])
    reals, mades = (np.concatenate(group) if group else np.zeros((0, 1), np.float32) for group in (before, after))
    values: dict[str, Any] = {"recordings": len(recordings), "excerpts": len(reals)}
    if not len(reals):
        return {**values, "style_accuracy": None, "style_accuracy_unchanged": None, "log_mel_distance_db": None}
    number = recogniser.styles.index(style)
    right = [_accuracy(_judged(recogniser, group), number) for group in (mades, reals)]
    return {
        **values,
        "style_accuracy": _rounded(right[0]),
        "style_accuracy_unchanged": _rounded(right[1]),
        "log_mel_distance_db": _rounded(log_mel_distance_db(reals, mades)),
    }


def log_mel_distance_db(reals: Audio, mades: Audio) -> float:
    """Mean absolute difference of the mel bands of excerpts [count, samples] at SAMPLE_RATE, their levels matched."""
    pictures = []
    for group in (reals, mades):
        level = np.sqrt(np.square(group, dtype=np.float64).mean(axis=1, keepdims=True))
        power = mel_power(torch.from_numpy((group / np.maximum(level, 1e-9)).astype(np.float32))).numpy()
        pictures.append(10.0 * np.log10(power + 1e-12))
    floor = pictures[0].max(axis=(1, 2), keepdims=True) - FLOOR_DB
    real, made = (np.maximum(picture, floor) for picture in pictures)
    return float(np.abs(real - made).mean())


def _baseline(bundle: Bundle, path: Path | None) -> Bundle | None:
    """The model to compare with: the one asked for, else the first one that was shipped, if it is another."""
    if path is None:
        other = read_bundle(FIRST_MODEL)
        if other.graph == bundle.graph or other.manifest.spectral.sample_rate != bundle.manifest.spectral.sample_rate:
            return None
        return other
    other = read_bundle(path)
    if other.manifest.spectral.sample_rate != bundle.manifest.spectral.sample_rate:
        raise EvaluationError(
            f"{path}: runs at {other.manifest.spectral.sample_rate} Hz, {bundle.path} at "
            f"{bundle.manifest.spectral.sample_rate} Hz; choose a baseline of the same rate"
        )
    return other


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
    spectra = {
        style: np.mean([measures.mean_spectrum(np.asarray(r.audio()), rate) for r in recordings[style]], axis=0)
        for style in styles
    }
    played = {
        name: [style for style in styles if any(style == known.id for known in engine.bundle.manifest.styles)]
        for name, engine in engines.items()
    }
    plain = (UNCHANGED,) if options.alone else (UNCHANGED, STATIC)
    systems: dict[str, dict[str, list[Measured]]] = {
        name: {style: [] for style in played.get(name, styles)} for name in (*engines, *plain)
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
    middles = [_mean(group[i].loudness_lufs for group in rows.values()) or 0.0 for i in range(len(items))]
    styles: dict[str, dict[str, float | None]] = {}
    taken_for: dict[str, dict[str, float]] = {}
    for style, group in rows.items():
        distance, before = (_distance(some, real[style]) for some in (group, unchanged[style]))
        level = _mean(row.loudness_lufs - middle for row, middle in zip(group, middles, strict=True))
        styles[style] = {
            **_averages(group, [_accuracy(row.judgement, numbers[style]) for row in group]),
            "frechet_distance": _rounded(distance),
            "frechet_ratio": _rounded(distance / before),
            "hop_buzz_tone_db": _rounded(tones[style]) if style in tones else None,
            "level_difference_lu": level,
        }
        heard = [_taken_for(row.judgement, len(recogniser.styles)) for row in group]
        taken_for[style] = dict(zip(recogniser.styles, np.round(np.mean(heard, axis=0), 4).tolist(), strict=True))
    spreads = [_spread([group[i].loudness_lufs for group in rows.values()]) for i in range(len(items))]
    worst = {"hop_buzz_worst_db", "silence_peak_dbfs"}
    mean = {
        name: max((value for style in styles.values() if (value := style[name]) is not None), default=None)
        if name in worst
        else _mean(style[name] for style in styles.values())
        for name in next(iter(styles.values()))
        if name != "level_difference_lu"
    }
    return {
        "mean": {**mean, "level_spread_lu": _mean(spreads)},
        "styles": styles,
        "inputs": {
            item.name: {
                **_averages(
                    [group[i] for group in rows.values()],
                    [_accuracy(group[i].judgement, numbers[style]) for style, group in rows.items()],
                ),
                "level_spread_lu": _rounded(spreads[i]),
            }
            for i, item in enumerate(items)
        },
        "taken_for": taken_for,
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
        "style_accuracy": _mean(accuracies),
        "pitch_kept": _mean(row.pitch_kept for row in group),
        "onset_f1": _mean(row.onset_f1 for row in group),
        "chroma_correlation": _mean(row.chroma_correlation for row in group),
        "loudness_correlation": _mean(row.loudness_correlation for row in group),
        "hop_buzz_db": _mean(row.hop_buzz_db for row in group),
        "hop_buzz_worst_db": _rounded(max(row.hop_buzz_db for row in group)),
        "clicks_per_minute": _rounded(60.0 * sum(row.clicks for row in group) / sum(row.seconds for row in group)),
        "silence_peak_dbfs": _rounded(max(row.silence_peak_dbfs for row in group)),
    }


def _taken_for(judgement: Judgement, classes: int) -> NDArray[np.float64]:
    """Share of excerpts taken for each class [classes]; silent ones are taken for none."""
    shares = judgement.shares
    heard = shares.sum(axis=1) > 0.0
    return np.bincount(shares.argmax(axis=1)[heard], minlength=classes) / len(shares)


def _accuracy(judgement: Judgement, number: int) -> float:
    return float(_taken_for(judgement, judgement.shares.shape[1])[number])


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def _mean(values: Any) -> float | None:
    """Mean of the numbers among ``values``, None without any."""
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    return _rounded(sum(known) / len(known)) if known else None


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _rounded(value) if isinstance(value, float) else value for name, value in values.items()}
