"""MusicNet as it is published -> styles by composer, ensemble or instrument, of sound and, from its labels, of notes.

Thickstun, Harchaoui and Kakade, "Learning features of music from scratch", ICLR 2017. The folder:
``train_data/1727.wav``, ``train_labels/1727.csv``, the same for ``test``, and ``musicnet_metadata.csv`` in it or beside
it. Times in labels are samples at 44,100 Hz, instruments are General MIDI programs counted from 1.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import soundfile
from numpy.typing import NDArray

from realtime.learned import style_id
from realtime.notes import TICKS_PER_QUARTER, Note
from realtime.tunes import DEFAULT_TEMPO_BPM, Tune, write_tune
from training.features import frame_count
from training.library import Skipped, is_cut_short, write_sound

LABEL_RATE = 44_100
LABEL_COLUMNS = ("start_time", "end_time", "instrument", "note", "start_beat", "end_beat", "note_value")
METADATA_COLUMNS = (
    "id",
    "composer",
    "composition",
    "movement",
    "ensemble",
    "source",
    "transcriber",
    "catalog_name",
    "seconds",
)
METADATA_NAME = "musicnet_metadata.csv"
PROGRAM_NAMES = {
    0: "Piano",
    6: "Harpsichord",
    40: "Violin",
    41: "Viola",
    42: "Cello",
    43: "Double bass",
    60: "Horn",
    68: "Oboe",
    70: "Bassoon",
    71: "Clarinet",
    73: "Flute",
}
"""The instruments of MusicNet by General MIDI program, counted from 0 as everywhere else here."""
LICENCE = "CC-BY-4.0"
FADE_SECONDS = 0.01
RECIPE_NAME, COMPOSE_RECIPE_NAME, TUNES_FOLDER = "recipe.toml", "compose.toml", "tunes"
TUNE_VELOCITY = 80
"""Labels say nothing of how hard a note was struck."""

Split = Literal["train", "test"]
Grouping = Literal["composer", "ensemble", "instrument"]


class MusicNetError(ValueError):
    """A MusicNet folder, or a file of it, that cannot be used; the text names the file, the line and the remedy."""


@dataclass(frozen=True)
class NoteLabel:
    """One note of one instrument."""

    start_samples: int  # at LABEL_RATE
    end_samples: int  # the first one after it
    program: int  # General MIDI, 0 to 127
    pitch: int  # MIDI number
    start_beat: float
    end_beat: float  # as published; in most files the length in beats
    note_value: str


@dataclass(frozen=True)
class Piece:
    """One recording with its line of the metadata."""

    id: str
    split: Split
    audio_path: Path
    labels_path: Path
    composer: str
    composition: str
    movement: str
    ensemble: str
    source: str
    transcriber: str
    catalog_name: str
    seconds: float

    def labels(self) -> tuple[NoteLabel, ...]:
        """Its notes by start time. Raises MusicNetError with the line that is wrong."""
        return read_labels(self.labels_path)


@dataclass(frozen=True)
class MusicNet:
    """The pieces that are there, by id, and what is missing or left over."""

    folder: Path
    pieces: tuple[Piece, ...]
    problems: tuple[Skipped, ...]


def is_musicnet(folder: Path) -> bool:
    """Whether a folder is laid out as MusicNet is."""
    return any((folder / f"{split}_data").is_dir() for split in get_args(Split)) and _metadata_path(folder).is_file()


def _metadata_path(folder: Path) -> Path:
    inside = folder / METADATA_NAME
    return inside if inside.is_file() else folder.absolute().parent / METADATA_NAME


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields of every row. Raises MusicNetError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MusicNetError(f"{path}: cannot be read ({error.strerror}); get the file again") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise MusicNetError(f"{path}: line {line}: is not UTF-8 text; get the file again") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in columns if name not in header]
        if missing:
            raise MusicNetError(
                f"{path}: line 1: has no column {', '.join(missing)}; MusicNet's are {','.join(columns)}"
            )
        for row in reader:
            if row and len(row) != len(header):
                raise MusicNetError(
                    f"{path}: line {reader.line_num}: has {len(row)} fields instead of {len(header)}; "
                    "get the file again"
                )
            if row:
                yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise MusicNetError(f"{path}: line {reader.line_num}: is not CSV: {error}; get the file again") from error


def _whole(row: dict[str, str], name: str, low: int, high: int) -> int:
    text = row[name].strip()
    if not text.isascii() or not text.isdecimal() or len(text) > 15 or not low <= int(text) <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got '{row[name]}'")
    return int(text)


def _number(row: dict[str, str], name: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        value = np.nan
    if not np.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a number from 0 up, got '{row[name]}'")
    return value


def read_labels(path: Path) -> tuple[NoteLabel, ...]:
    """The notes of one label file by start time. Raises MusicNetError with the line that is wrong."""
    labels: list[NoteLabel] = []
    for line, row in _rows(path, LABEL_COLUMNS):
        try:
            start, end = (_whole(row, name, 0, 10**12) for name in ("start_time", "end_time"))
            if end < start:
                raise ValueError(f"end_time {end} lies before start_time {start}")
            program, pitch = _whole(row, "instrument", 1, 128) - 1, _whole(row, "note", 0, 127)
            beats = _number(row, "start_beat"), _number(row, "end_beat")
        except ValueError as error:
            raise MusicNetError(f"{path}: line {line}: {error}; correct it or get the file again") from error
        labels.append(NoteLabel(start, end, program, pitch, *beats, row["note_value"].strip()))
    if not labels:
        raise MusicNetError(f"{path}: holds no notes; get the file again")
    return tuple(sorted(labels, key=lambda note: (note.start_samples, note.program, note.pitch, note.end_samples)))


def read_musicnet(folder: Path) -> MusicNet:
    """What a MusicNet folder holds. A piece whose sound or labels are missing is named in ``problems``.

    Raises MusicNetError where there is no metadata, where its table is damaged, or where no piece is whole.
    """
    metadata = _metadata_path(folder)
    if not folder.is_dir():
        raise MusicNetError(f"{folder}: there is no such folder; name the one that holds train_data")
    if not metadata.is_file():
        raise MusicNetError(f"{folder}: {METADATA_NAME} is missing; it is published beside the archive: put it here")
    pieces: list[Piece] = []
    problems: list[Skipped] = []
    known: set[str] = set()
    for line, row in _rows(metadata, METADATA_COLUMNS):
        values = {name: row[name].strip() for name in METADATA_COLUMNS}
        number = values.pop("id")
        try:
            seconds = _number(row, "seconds")
            if not number.isascii() or not number.isdecimal():
                raise ValueError(f"id must be a whole number, got '{number}'")
            if number in known:
                raise ValueError(f"id {number} is there twice")
            for name in ("composer", "ensemble"):
                if not re.search("[a-z0-9]", values[name].casefold()):
                    raise ValueError(f"{name} must have a letter or digit from a to z or 0 to 9, got '{values[name]}'")
        except ValueError as error:
            raise MusicNetError(f"{metadata}: line {line}: {error}; correct it or get the file again") from error
        known.add(number)
        audio, labels = (_find(folder, number, kind) for kind in ("data", "labels"))
        if not audio.is_file():
            problems.append(Skipped(audio, f"is missing; {metadata.name}, line {line}, names it"))
        elif not labels.is_file():
            problems.append(Skipped(labels, f"is missing; {audio.name} has no notes without it"))
        else:
            del values["seconds"]
            split: Split = "test" if audio.parent.name == "test_data" else "train"
            pieces.append(
                Piece(id=number, split=split, audio_path=audio, labels_path=labels, seconds=seconds, **values)
            )
    for split in get_args(Split):
        problems += [
            Skipped(path, f"is not in {metadata.name}; its composer and ensemble are not known")
            for path in sorted((folder / f"{split}_data").glob("*.wav"))
            if path.stem not in known and not path.name.startswith(".")
        ]
    if not pieces:
        why = "; ".join(f"{item.path} {item.reason}" for item in problems[:3])
        raise MusicNetError(f"{folder}: no piece has both sound and labels ({why or 'the table is empty'})")
    return MusicNet(folder, tuple(sorted(pieces, key=lambda piece: int(piece.id))), tuple(problems))


def _find(folder: Path, number: str, kind: str) -> Path:
    """Where a piece's file lies; where it is in neither split, its place in train."""
    name = f"{number}.{'wav' if kind == 'data' else 'csv'}"
    test = folder / f"test_{kind}" / name
    return test if test.is_file() else folder / f"train_{kind}" / name


def piano_roll(
    labels: Sequence[NoteLabel],
    samples: int,
    frames_per_second: Fraction | float,
    program: int | None = None,
) -> NDArray[np.bool_]:
    """Which MIDI notes sound in each frame [128, frames], of all instruments or of one General MIDI program.

    ``samples`` at LABEL_RATE is the recording's length. Frames are those of training.features: frame k lies at
    k / frames_per_second seconds, and a note sounds in it from its start to just before its end. A note that lies
    between two frames sounds in the one after it, so that none is lost.
    """
    hop = LABEL_RATE / Fraction(frames_per_second)
    roll = np.zeros((128, frame_count(samples, hop)), dtype=np.bool_)
    for note in labels:
        if program is None or note.program == program:
            start, stop = _frame_from(note.start_samples, hop), _frame_from(note.end_samples, hop)
            roll[note.pitch, start : max(stop, start + 1)] = True
    return roll


def labels_from(labels: Sequence[NoteLabel], start_samples: int) -> tuple[NoteLabel, ...]:
    """The labels of what lies behind ``start_samples`` at LABEL_RATE, counted from there; what has ended is out."""
    return tuple(
        replace(
            note,
            start_samples=max(0, note.start_samples - start_samples),
            end_samples=note.end_samples - start_samples,
        )
        for note in labels
        if note.end_samples > start_samples
    )


def _frame_from(sample: int, hop: Fraction) -> int:
    """The first frame at or after a sample."""
    return -(-sample * hop.denominator // hop.numerator)


@dataclass(frozen=True)
class SoloConfig:
    """What counts as one instrument alone. Labels are aligned to the sound to a few hundredths of a second."""

    shortest_seconds: float = 2.0  # of a stretch
    longest_rest_seconds: float = 1.0  # within a stretch
    before_seconds: float = 0.05  # this much silence of others before they enter
    after_seconds: float = 0.3  # and this much after they end, as rooms and strings ring


def solo_stretches(
    labels: Sequence[NoteLabel], program: int, config: SoloConfig | None = None
) -> list[tuple[int, int]]:
    """Stretches (first sample, one past the last) at LABEL_RATE where only this General MIDI program sounds."""
    config = config or SoloConfig()
    before, after, rest, shortest = (
        round(seconds * LABEL_RATE)
        for seconds in (
            config.before_seconds,
            config.after_seconds,
            config.longest_rest_seconds,
            config.shortest_seconds,
        )
    )
    others = _union((n.start_samples - before, n.end_samples + after) for n in labels if n.program != program)
    own = _union((n.start_samples, n.end_samples) for n in labels if n.program == program)
    alone = _without(own, others)
    joined: list[tuple[int, int]] = []
    for start, end in alone:
        if joined and start - joined[-1][1] <= rest and not _any_between(others, joined[-1][1], start):
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return [(start, end) for start, end in joined if end - start >= shortest]


def _union(spans: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same time as spans that are in order and do not touch."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(result[-1][1], end)
        elif end > start:
            result.append((start, end))
    return result


def _without(spans: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of ``spans`` lies in none of ``others``; both in order, neither touching itself."""
    result: list[tuple[int, int]] = []
    first = 0
    for start, end in spans:
        while first < len(others) and others[first][1] <= start:
            first += 1
        at, number = start, first
        while number < len(others) and others[number][0] < end:
            if others[number][0] > at:
                result.append((at, others[number][0]))
            at = max(at, others[number][1])
            number += 1
        if at < end:
            result.append((at, end))
    return result


def _any_between(spans: Sequence[tuple[int, int]], start: int, end: int) -> bool:
    return any(one < end and other > start for one, other in spans)


@dataclass(frozen=True)
class WrittenStyle:
    """One style folder that was made."""

    id: str
    label: str
    midi_program: int
    recordings: int
    seconds: float
    sources: tuple[str, ...]


@dataclass(frozen=True)
class WrittenStyles:
    """What ``write_styles`` made, and what it had to leave out."""

    recipe: Path
    compose_recipe: Path | None  # of the notes; None where no piece gave a tune
    styles: tuple[WrittenStyle, ...]
    skipped: tuple[Skipped, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "recipe": str(self.recipe),
            "compose_recipe": str(self.compose_recipe) if self.compose_recipe else None,
            "styles": {style.id: asdict(style) for style in self.styles},
            "skipped": [f"{item.path}: {item.reason}" for item in self.skipped],
        }


@dataclass(frozen=True)
class _Part:
    """What one piece gives to one style: all of it, or the stretches [samples at LABEL_RATE] where it is alone."""

    style: str
    program: int | None
    piece: Piece
    stretches: tuple[tuple[int, int], ...] | None


def write_styles(
    data: MusicNet,
    grouping: Grouping | str,
    out: Path,
    split: Split | str = "train",
    solo: SoloConfig | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> WrittenStyles:
    """Folders of recordings, one per composer, ensemble or instrument, and a recipe for ``restyle train``.

    Their labels become MIDI files, in folders of the same names below ``tunes``, and a second recipe, of a composer;
    of an instrument all its notes, solo or not.

    Whole recordings are hard links, or copies on another disk. Of an instrument that does not play alone throughout,
    one FLAC per piece holds the stretches where it does, so that no piece is in two splits. ``out`` appears whole or
    not at all; ``progress`` is told (files done, files in all). Raises MusicNetError where no style is left, or where
    ``out`` holds something.
    """
    if grouping not in get_args(Grouping) or split not in get_args(Split):
        raise MusicNetError(f"no styles by '{grouping}' of '{split}'; known: {get_args(Grouping)}, {get_args(Split)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MusicNetError(f"{out}: is there already; choose another --out, or remove it")
    pieces = [piece for piece in data.pieces if piece.split == split]
    skipped = list(data.problems)
    parts: list[_Part] = []
    for piece in pieces:
        try:
            parts += _parts(piece, grouping, solo or SoloConfig())
        except MusicNetError as error:
            skipped.append(Skipped(piece.labels_path, str(error).removeprefix(f"{piece.labels_path}: ")))
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    made: dict[str, list[tuple[_Part, float]]] = {}
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as temporary:
        target = Path(temporary) / "styles"
        target.mkdir()
        for number, part in enumerate(parts):
            folder = target / style_id(part.style)
            folder.mkdir(exist_ok=True)
            try:
                seconds = _write_part(part, folder)
                made.setdefault(folder.name, []).append((part, seconds))
            except (soundfile.SoundFileError, ValueError) as error:
                skipped.append(Skipped(part.piece.audio_path, f"is damaged: {error}; get the file again"))
            if progress is not None:
                progress(number + 1, len(parts))
        if not made:
            why = "; ".join(f"{item.path} {item.reason}" for item in skipped[:3]) or "no piece is in this split"
            raise MusicNetError(f"{data.folder}: no {grouping} has a recording in {split}_data ({why})")
        for folder in target.iterdir():
            if not any(folder.iterdir()):
                folder.rmdir()
        styles = tuple(_summary(done, number) for number, (_, done) in enumerate(sorted(made.items())))
        recipe = _recipe(f"musicnet_{grouping}", styles)
        (target / RECIPE_NAME).write_text(recipe, encoding="utf-8")
        skipped += _write_tunes([part for done in made.values() for part, _ in done], target / TUNES_FOLDER)
        composed = [style for style in styles if (target / TUNES_FOLDER / style_id(style.label)).is_dir()]
        if composed:
            recipe = _recipe(f"musicnet_{grouping}_composer", composed, f"{TUNES_FOLDER}/", ['objective = "compose"'])
            (target / COMPOSE_RECIPE_NAME).write_text(recipe, encoding="utf-8")
        if out.is_dir():
            out.rmdir()
        target.rename(out)
    composing = out / COMPOSE_RECIPE_NAME
    return WrittenStyles(out / RECIPE_NAME, composing if composed else None, styles, tuple(skipped))


def tune_of(labels: Sequence[NoteLabel], program: int | None = None) -> Tune:
    """The notes of a piece, of all instruments or of one, where the score has them; ValueError without a note.

    The tempo is the median of all that were played. Labels without beats are taken at the time they were played, as if
    at DEFAULT_TEMPO_BPM.
    """
    chosen = [note for note in labels if program is None or note.program == program]
    if not chosen:
        raise ValueError("holds no notes")
    first_at = {note.start_beat: note.start_samples for note in reversed(labels)}
    beats = sorted(first_at)
    paces = [
        60.0 * LABEL_RATE * (after - before) / (first_at[after] - first_at[before])
        for before, after in itertools.pairwise(beats)
        if first_at[after] > first_at[before]
    ]
    tempo = float(np.clip(np.median(paces), 20.0, 400.0)) if paces else DEFAULT_TEMPO_BPM
    notes: dict[tuple[int, int], Note] = {}
    for note in chosen:
        played_at, played = (
            samples * tempo / (60.0 * LABEL_RATE)
            for samples in (note.start_samples, note.end_samples - note.start_samples)
        )
        # What is called the last beat is the length in most files, and the last beat in some.
        lengths = [length for length in (note.end_beat, note.end_beat - note.start_beat) if length > 0.0]
        length = min(lengths, key=lambda length: abs(length - played)) if paces and lengths else played
        start = round(TICKS_PER_QUARTER * (note.start_beat if paces else played_at))
        heard = Note(start, max(1, round(TICKS_PER_QUARTER * length)), note.pitch, TUNE_VELOCITY)
        known = notes.get((start, note.pitch))
        if known is None or known.duration_ticks < heard.duration_ticks:  # of a doubling, the longer one
            notes[start, note.pitch] = heard
    programs = [note.program for note in chosen]
    return Tune(tuple(notes[key] for key in sorted(notes)), tempo, program=max(set(programs), key=programs.count))


def _write_tunes(parts: Sequence[_Part], folder: Path) -> list[Skipped]:
    """A MIDI file of each part below ``folder``, by style; what has none."""
    skipped: list[Skipped] = []
    for part in parts:
        path = folder / style_id(part.style) / f"{part.piece.id}.mid"
        try:
            tune = tune_of(part.piece.labels(), part.program)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tune(path, tune)
        except (MusicNetError, ValueError) as error:
            why = str(error).removeprefix(f"{part.piece.labels_path}: ")
            skipped.append(Skipped(part.piece.labels_path, f"gives no tune: {why}"))
    return skipped


def _parts(piece: Piece, grouping: str, solo: SoloConfig) -> list[_Part]:
    if grouping != "instrument":
        return [_Part(piece.composer if grouping == "composer" else piece.ensemble, None, piece, None)]
    labels = piece.labels()
    programs = sorted({note.program for note in labels})
    parts: list[_Part] = []
    for program in programs:
        name = PROGRAM_NAMES.get(program, f"Program {program}")
        stretches = tuple(solo_stretches(labels, program, solo))
        if len(programs) == 1:
            parts.append(_Part(name, program, piece, None))
        elif stretches:
            parts.append(_Part(name, program, piece, stretches))
    return parts


def _write_part(part: _Part, folder: Path) -> float:
    """Put a piece, or an instrument's stretches of it, into a style's folder: its seconds."""
    source = part.piece.audio_path
    with soundfile.SoundFile(source) as file:
        rate, frames = file.samplerate, len(file)
        if is_cut_short(file, source):
            raise ValueError("its end is missing")
        if part.stretches is None:
            target = folder / source.name
            try:
                os.link(source, target)
            except OSError:  # another disk, or one that has no links
                shutil.copy2(source, target)
            return frames / rate
        pieces: list[NDArray[np.float32]] = []
        for start, end in part.stretches:
            first, last = (sample * rate // LABEL_RATE for sample in (start, end))
            if first >= frames:
                raise ValueError(f"it ends after {frames / rate:.1f} s, before its labels do")
            file.seek(first)
            pieces.append(
                _faded(np.asarray(file.read(last - first, dtype="float32", always_2d=True), dtype=np.float32), rate)
            )
        subtype = "PCM_16" if file.subtype == "PCM_16" else "PCM_24"
    sound = np.concatenate(pieces)
    sound /= max(1.0, float(np.abs(sound).max()))  # floats may lie above full scale, FLAC has nothing there
    write_sound(folder / f"{part.piece.id}.flac", sound, rate, subtype)
    return len(sound) / rate


def _faded(sound: NDArray[np.float32], sample_rate: int) -> NDArray[np.float32]:
    """[samples, channels] that rise from silence and fall to it."""
    edge = min(round(FADE_SECONDS * sample_rate), len(sound) // 2)
    rise = np.sin(0.5 * np.pi * (np.arange(edge, dtype=np.float32) + 0.5) / max(edge, 1))[:, None] ** 2
    sound[:edge] *= rise
    sound[len(sound) - edge :] *= rise[::-1]
    return sound


def _summary(done: Sequence[tuple[_Part, float]], number: int) -> WrittenStyle:
    label, program = done[0][0].style, done[0][0].program
    folder = style_id(label)
    return WrittenStyle(
        id=folder if folder[0].isalpha() else f"style_{folder}",
        label=label,
        midi_program=number % 128 if program is None else program,
        recordings=len(done),
        seconds=sum(seconds for _, seconds in done),
        sources=tuple(sorted({part.piece.source for part, _ in done if part.piece.source})),
    )


def _recipe(name: str, styles: Sequence[WrittenStyle], parent: str = "", settings: Sequence[str] = ()) -> str:
    """A recipe of these styles, their folders below ``parent``, with defaults for all but the ``settings``."""

    def quoted(text: str) -> str:
        kept = "".join(letter if letter.isprintable() else " " for letter in text)
        return '"' + kept.replace("\\", "\\\\").replace('"', '\\"') + '"'

    lines = [f"name = {quoted(name)}", "# MusicNet's own licence; what a source allows may differ: see its metadata."]
    lines += settings
    for style in styles:
        sources = f"; recordings: {', '.join(style.sources)}" if style.sources else ""
        lines += [
            "",
            "[[style]]",
            f"id = {quoted(style.id)}",
            f"label = {quoted(style.label)}",
            f"folder = {quoted(parent + style_id(style.label))}",
            f"midi_program = {style.midi_program}",
            f"licence = {quoted(LICENCE)}",
            f"attribution = {quoted('MusicNet, Thickstun, Harchaoui and Kakade' + sources)}",
        ]
    return "\n".join([*lines, ""])
