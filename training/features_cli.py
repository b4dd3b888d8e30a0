"""``restyle features``: recordings -> what describes them, for a maker's own training code."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from realtime.cli import PLAIN, JsonOption, failure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from training.features import FeatureCache, FeatureConfig, Features, Statistics
    from training.musicnet import NoteLabel

NORMALISATIONS = ("none", "peak", "loudness")


def features(
    recordings: Annotated[Path, typer.Argument(help="A folder of recordings, in folders or not, or one recording.")],
    out: Annotated[Path, typer.Argument(help="Folder for one .npz per recording, and statistics.npz.")],
    frames_per_second: Annotated[
        str, typer.Option(help="Exact, also where no hop is whole: 80, 59.94, 30000/1001.")
    ] = "80",
    sample_rate: Annotated[int, typer.Option(help="What recordings are resampled to, in Hz.")] = 48_000,
    channels: Annotated[int, typer.Option(min=1, max=2, help="1: mixed to mono; 2: stereo.")] = 1,
    start_seconds: Annotated[float, typer.Option(min=0.0, help="Where to begin in each recording.")] = 0.0,
    seconds: Annotated[float | None, typer.Option(help="How much of each; default: all.")] = None,
    normalise: Annotated[str, typer.Option(help=f"One of: {', '.join(NORMALISATIONS)} (EBU R128).")] = "none",
    mel_bands: Annotated[int, typer.Option(min=1, help="Of the mel spectrogram.")] = 80,
    mfcc: Annotated[int, typer.Option(min=1, help="Number of MFCC.")] = 20,
    bars: Annotated[bool, typer.Option("--bars", help="Also cut each recording into bars, as WAV files.")] = False,
    beats_per_bar: Annotated[int, typer.Option(min=1, help="Where the bars are.")] = 4,
    cache: Annotated[Path, typer.Option(help="Where what was computed is kept.")] = Path(".restyle-cache"),
    as_json: JsonOption = False,
) -> None:
    """Mel spectrograms, MFCC, chroma, onset strength and beats of recordings, as NumPy files.

    Each .npz holds mel [channels, bands, frames], in dB, standardised per band by mel_mean and mel_deviation of all
    recordings; mfcc and chroma [channels, rows, frames]; onset_strength [frames]; beat_frames; tempo_bpm. Frame k lies
    k / frames-per-second after the start. Of MusicNet, notes [128, frames] says which MIDI notes sound.

    Example: restyle features recordings features --frames-per-second 80 --bars
    """
    console, errors = Console(stderr=as_json), Console(stderr=True)
    if normalise not in NORMALISATIONS:
        raise typer.BadParameter(f"must be {', '.join(NORMALISATIONS)}, got '{normalise}'", param_hint="--normalise")
    try:
        rate = Fraction(frames_per_second)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"'{frames_per_second}' is no number", param_hint="--frames-per-second") from None
    try:
        from training.features import (
            FeatureCache,
            FeatureConfig,
            FeatureError,
            Preparation,
            Statistics,
            write_statistics,
        )
        from training.library import find_audio, replace_file
        from training.musicnet import MusicNetError, is_musicnet, read_musicnet
    except ModuleNotFoundError as error:
        errors.print(f"[red]'features' needs {error.name}[/]; install it with: pip install 'restyle\\[training]'")
        raise typer.Exit(1) from None
    try:
        config = FeatureConfig(
            Preparation(sample_rate, channels, start_seconds, seconds, normalise),  # pyright: ignore[reportArgumentType]
            frames_per_second=rate,
            mel_bands=mel_bands,
            mfcc_count=mfcc,
            beats_per_bar=beats_per_bar,
        )
    except FeatureError as error:
        raise failure("cannot describe", str(error)) from None
    single = recordings.is_file()
    if out.exists() and not out.is_dir():
        raise failure("cannot describe", f"{out}: is a file; name a folder")
    if not single and not recordings.is_dir():
        raise failure("cannot describe", f"{recordings}: there is no such file or folder; check the path")
    paths = [recordings] if single else find_audio(recordings)
    if not single and out.resolve().is_relative_to(recordings.resolve()):
        raise failure(
            "cannot describe",
            f"{out}: lies in {recordings}, where its bars would be recordings; choose a folder elsewhere",
        )
    if not paths:
        raise failure(
            "cannot describe", f"{recordings}: holds no recordings; put WAV, FLAC, OGG, MP3 or AIFF files there"
        )
    parts: dict[Path, Statistics] = {}
    remarks: list[str] = []
    labels: dict[Path, tuple[NoteLabel, ...]] = {}
    if not single and is_musicnet(recordings):
        try:
            pieces = read_musicnet(recordings).pieces
        except MusicNetError as error:
            raise failure("cannot describe", str(error)) from None
        for piece in pieces:
            try:
                labels[piece.audio_path] = piece.labels()
            except MusicNetError as error:
                remarks.append(f"{error}; its features come without notes")
    try:
        known = FeatureCache(cache)
        for path in track(paths, "describing", console=errors, transient=True):
            try:
                parts[path] = _described(known, path, config)[2].statistics
            except ValueError as error:
                remarks.append(f"{path}: {error}")
        if not parts:
            raise failure("cannot describe", "; ".join(remarks[:3]))
        every = Statistics.merge(parts.values())
        rows = [
            _write(
                known,
                path,
                out / (path.name if single else path.relative_to(recordings)),
                config,
                every,
                bars,
                labels.get(path),
            )
            for path in track(list(parts), "writing", console=errors, transient=True)
        ]
        replace_file(out / "statistics.npz", lambda part: write_statistics(part, every, config.frames_per_second))
    except OSError as error:
        raise failure("cannot describe", f"{error.filename or out}: {error.strerror or error}") from None
    if as_json:
        print(json.dumps({"files": rows, "frames": every.frames, "remarks": remarks}))
    table = Table("file", "seconds", "frames", "beats a minute", "bars", box=None, pad_edge=False)
    for row in rows:
        table.add_row(escape(row["file"]), *(f"{row[name]:g}" for name in ("seconds", "frames", "tempo_bpm", "bars")))
    console.print(table)
    for remark in remarks:
        console.print(f"[yellow]remark:[/] {escape(remark)}", soft_wrap=True, highlight=False)
    console.print(f"{out / 'statistics.npz'}: {mel_bands} mel bands over {every.frames} frames", **PLAIN)


def _described(known: FeatureCache, path: Path, config: FeatureConfig) -> tuple[NDArray[np.float32], int, Features]:
    """A recording [channels, samples], its rate, and what describes it. Raises ValueError."""
    import numpy as np

    from training.library import decode_file

    audio, source = decode_file(path)
    sound = np.ascontiguousarray(audio.T)
    return sound, source.sample_rate, known.of_audio(sound, source.sample_rate, config)


def _write(
    known: FeatureCache,
    path: Path,
    target: Path,
    config: FeatureConfig,
    every: Statistics,
    bars: bool,
    labels: tuple[NoteLabel, ...] | None,
) -> dict[str, Any]:
    """The features of one recording, standardised by ``every`` recording's statistics, and its bars; its figures."""
    from training.features import bar_frames, split_bars, write_features
    from training.library import replace_file, write_sound

    sound, rate, found = _described(known, path, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    described = dataclasses.replace(found, mel=every.standardise(found.mel_db), statistics=every)
    name = target.with_name(f"{target.name}.npz")  # two formats of one name are two files
    notes = None if labels is None else _notes(labels, len(found.onset_strength), config)
    replace_file(name, lambda part: write_features(part, described, notes))
    if bars:
        folder = target.with_name(f"{target.name}.bars")
        shutil.rmtree(folder, ignore_errors=True)  # an earlier run may have found more of them
        for number, piece in enumerate(split_bars(sound, rate, found, config)):
            folder.mkdir(exist_ok=True)
            write_sound(folder / f"{number:04d}.wav", piece.T, rate, "FLOAT")
    return {
        "file": str(name),
        "seconds": round(sound.shape[-1] / rate, 3),
        "frames": len(found.onset_strength),
        "tempo_bpm": round(found.tempo_bpm, 1),
        "bars": max(0, len(bar_frames(found, config.beats_per_bar)) - 1),
    }


def _notes(labels: tuple[NoteLabel, ...], frames: int, config: FeatureConfig) -> NDArray[np.bool_]:
    """Which MIDI notes sound in each frame [128, frames] of the part that is described."""
    from training.musicnet import LABEL_RATE, labels_from, piano_roll

    rate = config.frames_per_second
    heard = labels_from(labels, round(config.preparation.start_seconds * LABEL_RATE))
    return piano_roll(heard, math.ceil(frames / rate * LABEL_RATE), rate)[:, :frames]
