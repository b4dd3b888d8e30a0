"""Folders of MIDI files -> tunes in splits, and the batches of events that a composer learns from.

Files that are one tune are held together: equal names but for digits, punctuation and an article, or so many melodic
turns in common that one must be a setting or a copy of the other. A whole group is trained on or held out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from realtime.midi import MidiError
from realtime.notes import DURATION, PITCH, VELOCITY, Note, Vocabulary, make_vocabulary
from realtime.tunes import read_tune
from training.library import SPLITS, Skipped, split_sizes
from training.recipe import Recipe, StyleEntry, TunesConfig

TURN_NOTES = 9
"""Notes whose intervals and lengths make one melodic turn."""
IGNORED = -100
"""A target that no loss counts."""
TOUCH_STEPS, UNEVEN_STEPS = 4.0, 1.0
"""Of velocity, by which a tune with another touch is louder or softer as a whole, and from note to note."""
SHORTEST_GATE = 0.4


class TunesError(RuntimeError):
    """Tunes that cannot be trained on; the text names the folder and the remedy."""


@dataclass(frozen=True)
class TrainingTune:
    """One MIDI file that is used."""

    name: str
    sha256: str
    seconds: float
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Repertoire:
    """The tunes of one ``[[style]]``, split."""

    id: str
    train: tuple[TrainingTune, ...]
    validation: tuple[TrainingTune, ...]
    test: tuple[TrainingTune, ...]

    def split(self, name: str) -> tuple[TrainingTune, ...]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


@dataclass(frozen=True)
class TuneLibrary:
    """All repertoires of a recipe, in its order; copies and unreadable files are in ``skipped``."""

    styles: tuple[Repertoire, ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...] = ()

    def split(self, name: str) -> list[TrainingTune]:
        return [tune for style in self.styles for tune in style.split(name)]

    def describe(self) -> dict[str, Any]:
        """Plain values for the model card: every tune of every split with its hash."""
        return {
            style.id: {
                split: [
                    {"name": tune.name, "sha256": tune.sha256, "seconds": round(tune.seconds, 3)}
                    for tune in style.split(split)
                ]
                for split in SPLITS
            }
            for style in self.styles
        }


def load_tunes(
    entries: Sequence[StyleEntry],
    data_folder: Path,
    config: TunesConfig,
    split_seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> TuneLibrary:
    """Read the folder of each entry, below ``data_folder``, and split its tunes 8:1:1. Raises TunesError."""
    found: list[tuple[StyleEntry, list[Path]]] = []
    for entry in entries:
        folder = data_folder / entry.folder
        if not folder.is_dir():
            raise TunesError(f"style '{entry.id}': there is no folder {folder}; create it, or see --data")
        paths = sorted(
            path for path in folder.rglob("*") if path.suffix.lower() in (".mid", ".midi") and path.is_file()
        )
        if not paths:
            raise TunesError(f"style '{entry.id}': no MIDI files in {folder}; put .mid files there")
        found.append((entry, paths))
    total, done = sum(len(paths) for _, paths in found), 0
    tunes: list[list[TrainingTune]] = []
    skipped: list[Skipped] = []
    first_of: dict[tuple[Note, ...], str] = {}
    for _, paths in found:
        tunes.append([])
        for path in paths:
            try:
                read = read_tune(path)
                notes = top_line(read.notes) if config.melody_only else read.notes
                if len(notes) < config.minimum_notes:
                    raise ValueError(f"has {len(notes)} notes, fewer than tunes.minimum_notes = {config.minimum_notes}")
                if notes in first_of:
                    raise ValueError(f"is a copy of {first_of[notes]}")
                first_of[notes] = path.name
                sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
                tunes[-1].append(TrainingTune(path.name, sha256, read.seconds, notes))
            except MidiError as error:
                skipped.append(Skipped(path, str(error).removeprefix(f"{path}: ")))
            except (OSError, ValueError) as error:
                skipped.append(Skipped(path, str(error)))
            done += 1
            if progress is not None:
                progress(done, total)
    everything = [tune for part in tunes for tune in part]
    groups = group_tunes(everything, config.shared_turns)
    of_tune = {tune.sha256 + tune.name: number for number, group in enumerate(groups) for tune in group}
    held = _held_out(groups, split_seed)
    repertoires = []
    for (entry, _), part in zip(found, tunes, strict=True):
        by_split: dict[str, list[TrainingTune]] = {name: [] for name in SPLITS}
        for tune in part:
            by_split[held.get(of_tune[tune.sha256 + tune.name], "train")].append(tune)
        repertoires.append(Repertoire(entry.id, *(tuple(by_split[name]) for name in SPLITS)))
    library = TuneLibrary(tuple(repertoires), tuple(skipped))
    for name in SPLITS:
        if not library.split(name):
            raise TunesError(
                f"{data_folder}: {len(everything)} readable tunes of {len(groups)} melodies leave none for {name}; "
                "give at least three melodies"
            )
    return library


def _held_out(groups: Sequence[Sequence[TrainingTune]], seed: int) -> dict[int, str]:
    """Number of a group -> validation or test, about a tenth of the tunes each, decided by content and seed alone."""
    keys = {
        number: hashlib.sha256(f"{seed}:{min(tune.sha256 for tune in group)}".encode()).hexdigest()
        for number, group in enumerate(groups)
    }
    _, validation, test = split_sizes(sum(len(group) for group in groups))
    held: dict[int, str] = {}
    left = {"validation": validation, "test": test}
    for number in sorted(keys, key=lambda number: keys[number]):
        for name in left:
            if 0 < len(groups[number]) <= left[name]:
                held[number] = name
                left[name] -= len(groups[number])
                break
    return held


def top_line(notes: Sequence[Note]) -> tuple[Note, ...]:
    """The melody: of notes that begin together the highest, and none below one that still sounds."""
    line: list[Note] = []
    for note in sorted(notes, key=lambda note: (note.start_ticks, -note.pitch)):
        if not line or note.start_ticks >= line[-1].end_ticks:
            line.append(note)
        elif note.start_ticks > line[-1].start_ticks and note.pitch > line[-1].pitch:
            line[-1] = dataclasses.replace(line[-1], duration_ticks=note.start_ticks - line[-1].start_ticks)
            line.append(note)
    return tuple(line)


def group_tunes(tunes: Sequence[TrainingTune], shared_turns: float) -> list[list[TrainingTune]]:
    """Tunes that are one tune, together: by name, or sharing ``shared_turns`` of the shorter one's melodic turns.

    A turn is TURN_NOTES notes by their intervals and the lengths between them, the same in every key.
    """
    leader = list(range(len(tunes)))

    def head(number: int) -> int:
        while leader[number] != number:
            leader[number] = leader[leader[number]]
            number = leader[number]
        return number

    by_name: dict[str, int] = {}
    turns = [_turns(tune.notes) for tune in tunes]
    holders: dict[int, list[int]] = defaultdict(list)
    for number, tune in enumerate(tunes):
        name = re.sub(r"^the|the$", "", re.sub(r"[\W\d_]+", "", Path(tune.name).stem.casefold()))
        leader[head(number)] = head(by_name.setdefault(name, number) if name else number)
        for turn in turns[number]:
            holders[turn].append(number)
    common: dict[tuple[int, int], int] = defaultdict(int)
    for numbers in holders.values():
        for i, one in enumerate(numbers):
            for other in numbers[i + 1 :]:
                common[one, other] += 1
    for (one, other), count in common.items():
        if count >= shared_turns * min(len(turns[one]), len(turns[other])):
            leader[head(one)] = head(other)
    groups: dict[int, list[TrainingTune]] = defaultdict(list)
    for number, tune in enumerate(tunes):
        groups[head(number)].append(tune)
    return list(groups.values())


def _turns(notes: Sequence[Note]) -> frozenset[int]:
    line = top_line(notes)
    steps = [
        (after.pitch - before.pitch, after.start_ticks - before.start_ticks)
        for before, after in itertools.pairwise(line)
    ]
    size = TURN_NOTES - 1
    return frozenset(hash(tuple(steps[at : at + size])) for at in range(max(1, len(steps) - size + 1)))


# -- from tunes to batches --------------------------------------------------------------------------------------------


class NoteBatch(NamedTuple):
    """Segments of tunes, row by row; row r of a training batch goes on where row r of the one before it ended."""

    tokens: Tensor  # [batch, time], int64
    targets: Tensor  # [batch, time], int64; IGNORED after a tune's end
    begins: Tensor  # [batch], bool: the first segment of a tune, to be read from a state of zeros


@dataclass(frozen=True)
class TokenisedTunes:
    """The events of tunes, each ``[end, ..., end]``, and the vocabulary that they are in."""

    vocabulary: Vocabulary
    tunes: tuple[NDArray[np.int64], ...]
    note_counts: tuple[int, ...]
    lowest: tuple[int, ...]  # pitch of each tune
    highest: tuple[int, ...]


def tokenise(tunes: Sequence[TrainingTune], vocabulary: Vocabulary) -> TokenisedTunes:
    """Tunes as they are written."""
    arrays = [
        np.array([vocabulary.end, *vocabulary.encode(tune.notes), vocabulary.end], dtype=np.int64) for tune in tunes
    ]
    return TokenisedTunes(
        vocabulary,
        tuple(arrays),
        tuple(len(tune.notes) for tune in tunes),
        tuple(min(note.pitch for note in tune.notes) for tune in tunes),
        tuple(max(note.pitch for note in tune.notes) for tune in tunes),
    )


def vocabulary_of(library: TuneLibrary, config: TunesConfig) -> Vocabulary:
    """The vocabulary with the range that the training tunes, transposed, reach; an octave at least."""
    pitches = [note.pitch for tune in library.split("train") for note in tune.notes]
    low = max(0, min(pitches) - config.transpose_semitones)
    high = min(127, max(pitches) + config.transpose_semitones)
    missing = max(0, 11 - (high - low))
    low = max(0, low - missing)
    return make_vocabulary(low, max(high, low + 11))


class TuneBatches(IterableDataset[NoteBatch]):
    """Endless batches from ``first_step`` on; batch n of process r is a function of (seed, n, r) alone.

    Every row reads all tunes, one after the other, in an order of its own that is another one each time, each tune
    transposed and some with another touch. The last segment of a tune is filled up, so the next begins a segment.
    """

    def __init__(self, tunes: TokenisedTunes, recipe: Recipe, first_step: int, rank: int) -> None:
        super().__init__()
        self.tunes, self.recipe, self.first_step, self.rank = tunes, recipe, first_step, rank
        size = recipe.tunes.segment_events
        self._segments = np.array([-(-(len(tokens) - 1) // size) for tokens in tunes.tunes])
        self._order = lru_cache(maxsize=4 * recipe.trainer.batch_size)(self._make_order)

    def _make_order(self, row: int, turn: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tunes in the order of one turn through all of them, and after how many segments each begins."""
        random = np.random.default_rng([self.recipe.trainer.seed, 4, self.rank, row, turn])
        order = random.permutation(len(self._segments))
        return order, np.concatenate([[0], np.cumsum(self._segments[order])])

    def batch(self, step: int) -> NoteBatch:
        """Batch number ``step`` of this process."""
        size, rows = self.recipe.tunes.segment_events, self.recipe.trainer.batch_size
        tokens = np.full((rows, size), self.tunes.vocabulary.end, dtype=np.int64)
        targets = np.full((rows, size), IGNORED, dtype=np.int64)
        begins = np.zeros(rows, dtype=bool)
        turn, place = divmod(step, int(self._segments.sum()))
        for row in range(rows):
            order, starts = self._order(row, turn)
            at = int(np.searchsorted(starts, place, side="right")) - 1
            random = np.random.default_rng([self.recipe.trainer.seed, 5, self.rank, row, turn, at])
            tune = varied(self.tunes, int(order[at]), self.recipe.tunes, random)
            first = (place - int(starts[at])) * size
            part = tune[first : first + size + 1]
            tokens[row, : len(part) - 1], targets[row, : len(part) - 1] = part[:-1], part[1:]
            begins[row] = first == 0
        return NoteBatch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(begins))

    def __iter__(self) -> Iterator[NoteBatch]:
        step = self.first_step
        while True:
            yield self.batch(step)
            step += 1


def varied(tunes: TokenisedTunes, number: int, config: TunesConfig, random: np.random.Generator) -> NDArray[np.int64]:
    """A tune in another key, and by chance with another touch: other loudness, uneven, notes cut shorter."""
    vocabulary, tokens = tunes.vocabulary, tunes.tunes[number].copy()
    reach = config.transpose_semitones
    down = min(reach, tunes.lowest[number] - vocabulary.lowest_pitch)
    up = min(reach, vocabulary.highest_pitch - tunes.highest[number])
    shift = int(random.integers(-down, up + 1))
    pitch_tokens = _numbers(vocabulary, PITCH)
    pitched = np.isin(tokens, pitch_tokens)
    tokens[pitched] += shift
    if random.uniform() >= config.touch_chance:
        return tokens
    struck = np.isin(tokens, velocities := _numbers(vocabulary, VELOCITY))
    moved = random.uniform(-TOUCH_STEPS, TOUCH_STEPS) + UNEVEN_STEPS * random.standard_normal(int(struck.sum()))
    tokens[struck] = np.clip(tokens[struck] + np.round(moved).astype(np.int64), velocities[0], velocities[-1])
    durations = vocabulary.of_kind(DURATION)
    gate = random.uniform(SHORTEST_GATE, 1.0)
    shortened = np.arange(len(vocabulary.tokens))
    for ticks, token in durations.items():
        shortened[token] = durations[min(durations, key=lambda value: abs(value - ticks * gate))]
    return shortened[tokens]


def _numbers(vocabulary: Vocabulary, kind: str) -> list[int]:
    return list(vocabulary.of_kind(kind).values())


def held_out_batches(tunes: TokenisedTunes, batch_size: int) -> list[NoteBatch]:
    """Every tune as it is written, whole, from a state of zeros; tunes of like length together."""
    order = sorted(range(len(tunes.tunes)), key=lambda number: len(tunes.tunes[number]))
    batches = []
    for start in range(0, len(order), batch_size):
        chosen = [tunes.tunes[number] for number in order[start : start + batch_size]]
        size = max(len(tune) for tune in chosen) - 1
        tokens = np.full((len(chosen), size), tunes.vocabulary.end, dtype=np.int64)
        targets = np.full((len(chosen), size), IGNORED, dtype=np.int64)
        for row, tune in enumerate(chosen):
            tokens[row, : len(tune) - 1], targets[row, : len(tune) - 1] = tune[:-1], tune[1:]
        begins = torch.ones(len(chosen), dtype=torch.bool)
        batches.append(NoteBatch(torch.from_numpy(tokens), torch.from_numpy(targets), begins))
    return batches
