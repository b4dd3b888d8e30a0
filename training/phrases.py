"""Music in every style: tunes from MIDI files, played on the styles' own recorded notes before training starts.

Several styles play the same phrase, with the same notes at the same times, so any two of them are a true pair: what
one instrument plays, and what another would have played. Phrases belong to training alone. They are made from the
train split of the recordings and from the train split of the tunes: nothing held out is ever heard in one, and the
held-out notes of a style would be too few to play on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import mido
import numpy as np
from numpy.typing import NDArray

from training.instrument import Instrument, MeasuredNotes, articulation, build_instrument, measure_all
from training.library import Library, replace_file, split_sizes
from training.recipe import PhrasesConfig, Recipe

log = logging.getLogger(__name__)

PHRASES_VERSION = 1
LEVEL_DBFS = -20.0  # root mean square of a rendered phrase, lower where its peaks need room
PEAK = 0.98
START_SECONDS = 0.1  # before the first note
TAIL_SECONDS = 0.5  # the last note has ended by then, counted from the end
SLUR_SECONDS = 0.04  # notes with a shorter gap between them are slurred
LEAST_NOTES = 3  # of an instrument
LEAST_COVERAGE = 0.9  # of a tune's notes that all its players can play
AUDIBLE_DBFS = -50.0
DRUM_CHANNEL = 9

TEXTURES = ("melody", "thirds", "chords", "written")


class PhraseError(RuntimeError):
    """Phrases that cannot be made; the text names the folder or the style and the remedy."""


@dataclass(frozen=True)
class TuneNote:
    """One note of a tune or phrase; times in seconds from its start."""

    start: float
    seconds: float
    pitch: int  # MIDI number
    velocity: int  # 1 to 127


def read_tune(path: Path) -> tuple[TuneNote, ...]:
    """All pitched notes of a MIDI file in order of time. ValueError where there are none."""
    try:
        file = mido.MidiFile(path, clip=True)
        held: dict[tuple[int, int], tuple[float, int]] = {}
        notes: list[TuneNote] = []
        now = 0.0
        for message in file:
            now += message.time
            if message.type not in ("note_on", "note_off") or message.channel == DRUM_CHANNEL:
                continue
            key = (message.channel, message.note)
            if key in held:
                start, velocity = held.pop(key)
                if now > start:
                    notes.append(TuneNote(start, now - start, message.note, velocity))
            if message.type == "note_on" and message.velocity > 0:
                held[key] = (now, message.velocity)
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"cannot be read as MIDI: {error}") from error
    if not notes:
        raise ValueError("holds no notes")
    return tuple(sorted(notes, key=lambda note: (note.start, note.pitch)))


def melody_of(notes: Sequence[TuneNote]) -> tuple[TuneNote, ...]:
    """The top line: of notes that start together the highest, each ending where the next starts."""
    line: list[TuneNote] = []
    for note in sorted(notes, key=lambda note: (note.start, -note.pitch)):
        if line and note.start - line[-1].start < 0.03:
            continue
        if line and note.start < line[-1].start + 0.8 * line[-1].seconds and note.pitch < line[-1].pitch - 4:
            continue  # an accompanying voice below a held note
        line.append(note)
    following = [note.start for note in line[1:]] + [np.inf]
    return tuple(
        dataclasses.replace(note, seconds=min(note.seconds, float(until) - note.start))
        for note, until in zip(line, following, strict=True)
    )


def split_tunes(paths: Sequence[Path], seed: int) -> tuple[tuple[Path, ...], tuple[Path, ...], tuple[Path, ...]]:
    """Train, validation and test, 8:1:1, decided by content and seed alone; of copies one is kept."""
    by_hash = {hashlib.sha256(f"{seed}:".encode() + path.read_bytes()).hexdigest(): path for path in reversed(paths)}
    ordered = [by_hash[key] for key in sorted(by_hash)]
    _, validation, test = split_sizes(len(ordered))
    return (
        tuple(ordered[validation + test :]),
        tuple(ordered[:validation]),
        tuple(ordered[validation : validation + test]),
    )


def find_tunes(folder: Path, named: str = "phrases.midi_folder") -> list[Path]:
    """All MIDI files below a folder, ``named`` so by who asks, in a fixed order. PhraseError where there are none."""
    if not folder.is_dir():
        raise PhraseError(f"{named}: there is no folder {folder}; create it, or name another")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".mid", ".midi") and path.is_file())
    if not found:
        raise PhraseError(f"{named}: no MIDI files in {folder}; put .mid files there")
    return found


# -- from a tune to a phrase ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phrase:
    """What several styles play alike."""

    notes: tuple[TuneNote, ...]
    seconds: float
    players: tuple[int, ...]  # rows of the style table; the first is the style that it was made for
    tune: str  # name of the MIDI file


def with_texture(notes: Sequence[TuneNote], texture: str) -> tuple[TuneNote, ...]:
    """``melody`` as it is; ``thirds`` below it; slow ``chords`` below it, from the notes that the tune uses most."""
    line = melody_of(notes)
    if texture == "written":
        return tuple(notes)
    weight = np.zeros(12)
    for note in line:
        weight[note.pitch % 12] += note.seconds
    scale = {int(step) for step in np.argsort(-weight, kind="stable")[:7] if weight[step] > 0}
    if texture == "thirds":
        lower = [
            dataclasses.replace(
                note, pitch=note.pitch - (3 if (note.pitch - 3) % 12 in scale else 4), velocity=note.velocity * 7 // 8
            )
            for note in line
        ]
        return _merged(line, lower)
    if texture == "chords":
        chords: list[TuneNote] = []
        lowest = min(note.pitch for note in line)
        at = 0
        while at < len(line):
            root = line[at]
            last = at
            while last + 1 < len(line) and line[last + 1].start < root.start + 1.2:
                last += 1
            seconds = line[last].start + line[last].seconds - root.start
            base = lowest - 1 - (lowest - 1 - root.pitch) % 12
            third = base - 8 if (base - 8) % 12 in scale else base - 9  # a third above, an octave down
            chords += [TuneNote(root.start, seconds, pitch, root.velocity * 3 // 4) for pitch in (base, third)]
            at = last + 1
        return _merged(line, chords)
    return line


def _merged(*parts: Sequence[TuneNote]) -> tuple[TuneNote, ...]:
    return tuple(sorted((note for part in parts for note in part), key=lambda note: (note.start, note.pitch)))


def shape_phrase(notes: Sequence[TuneNote], seconds: float, random: np.random.Generator) -> tuple[TuneNote, ...]:
    """A stretch of a tune at another tempo, with its own loudness, swells and length of notes."""
    speed = float(random.uniform(0.45, 1.05))
    gate = float(random.choice([1.0, 1.0, random.uniform(0.45, 0.95)]))
    loudness, swell = float(random.uniform(55.0, 105.0)), float(random.uniform(0.0, 25.0))
    period, phase = float(random.uniform(3.0, 10.0)), float(random.uniform(0.0, 2.0 * np.pi))
    room = seconds - START_SECONDS - TAIL_SECONDS
    last_start = notes[-1].start - room * speed
    begin = float(random.uniform(notes[0].start, last_start)) if last_start > notes[0].start else notes[0].start
    chosen = [note for note in notes if begin - 1e-6 <= note.start < begin + room * speed]
    if not chosen:
        return ()
    first = chosen[0].start
    usual = float(np.mean([note.velocity for note in chosen]))
    shaped: list[TuneNote] = []
    for note in chosen:
        start = START_SECONDS + (note.start - first) / speed
        velocity = loudness + (note.velocity - usual) + swell * float(np.sin(2 * np.pi * start / period + phase))
        held = min(note.seconds / speed * gate, seconds - TAIL_SECONDS - start)
        if held >= 0.03:
            shaped.append(TuneNote(start, held, note.pitch, int(np.clip(velocity, 20, 127))))
    return tuple(shaped)


def fit(
    notes: Sequence[TuneNote], instruments: Sequence[Instrument], random: np.random.Generator
) -> tuple[TuneNote, ...]:
    """Transposed so that all can play nearly all of it, without the few notes that one cannot; empty if none fits."""
    distance = np.max([[instrument.distance(pitch) for pitch in range(128)] for instrument in instruments], axis=0)
    playable = np.all([[instrument.can_play(pitch) for pitch in range(128)] for instrument in instruments], axis=0)
    pitches = np.array([note.pitch for note in notes])
    good: list[tuple[float, int]] = []
    for shift in range(-60, 61):
        moved = pitches + shift
        if moved.min() < 0 or moved.max() > 127 or playable[moved].mean() < LEAST_COVERAGE:
            continue
        good.append((float(distance[moved].mean() + 10.0 * (1.0 - playable[moved].mean())), shift))
    if not good:
        return ()
    good.sort()
    # Among transpositions about as good as the best, any register will do.
    near = [shift for cost, shift in good if cost <= good[0][0] + 0.75]
    shift = int(random.choice(near))
    return tuple(dataclasses.replace(note, pitch=note.pitch + shift) for note in notes if playable[note.pitch + shift])


def plan_phrases(
    instruments: Sequence[Instrument | None],
    tunes: Sequence[Path],
    config: PhrasesConfig,
    seed: int,
    textures: Sequence[str] = TEXTURES,
) -> tuple[Phrase, ...]:
    """What is played and by whom; styles without an instrument (None) play nothing. A function of its arguments.

    Each phrase is made for one style and played by up to ``partners`` others that reach its notes, those first that
    have played least; a style that plays one note at a time plays melodies only.
    """
    playing = [row for row, instrument in enumerate(instruments) if instrument is not None]
    folders: dict[Path, list[Path]] = {}
    for path in tunes:
        folders.setdefault(path.parent, []).append(path)
    by_folder = list(folders.values())
    # Each phrase made for a style is played on it twice, and each brings it, on average, ``partners`` of others.
    count = max(1, round(config.minutes_per_style * 60.0 / config.phrase_seconds / (2 + config.partners)))
    played = dict.fromkeys(playing, 0)
    phrases: list[Phrase] = []
    for turn in range(count):
        for row in playing:
            random = np.random.default_rng([seed, 3, turn, row])
            home = instruments[row]
            assert home is not None
            texture = "melody" if home.articulation.monophonic else textures[turn % len(textures)]
            others = [
                other
                for other in playing
                if other != row and (texture == "melody" or not _instrument(instruments, other).articulation.monophonic)
            ]
            jitter = random.uniform(size=len(others))
            others = [other for _, _, other in sorted(zip([played[o] for o in others], jitter, others, strict=True))]
            # A few files may be all of a folder: choosing the folder first lets them be heard.
            pool = by_folder[int(random.integers(len(by_folder)))] if texture == "written" else tunes
            phrase = _phrase(row, others, instruments, pool, texture, config, random)
            if phrase is not None:
                phrases.append(phrase)
                for player in phrase.players:
                    played[player] += 1
    return tuple(phrases)


def _instrument(instruments: Sequence[Instrument | None], row: int) -> Instrument:
    instrument = instruments[row]
    assert instrument is not None
    return instrument


def _phrase(
    row: int,
    others: Sequence[int],
    instruments: Sequence[Instrument | None],
    pool: Sequence[Path],
    texture: str,
    config: PhrasesConfig,
    random: np.random.Generator,
) -> Phrase | None:
    """One phrase for style ``row``, with the first of ``others`` that can join; None if nothing fits it."""
    for _ in range(10):
        path = pool[int(random.integers(len(pool)))]
        try:
            notes = with_texture(_tune(path), texture)
        except ValueError as error:
            log.info("skipped %s: %s", path, error)
            continue
        notes = shape_phrase(notes, config.phrase_seconds, random)
        if not notes or not fit(notes, [_instrument(instruments, row)], random):
            continue
        players, fitted = [row], notes
        for other in others:
            if len(players) > config.partners:
                break
            together = fit(notes, [_instrument(instruments, player) for player in (*players, other)], random)
            if together:
                players.append(other)
        fitted = fit(notes, [_instrument(instruments, player) for player in players], random)
        return Phrase(fitted, config.phrase_seconds, tuple(players), path.name)
    return None


@lru_cache(maxsize=64)
def _tune(path: Path) -> tuple[TuneNote, ...]:
    return read_tune(path)


# -- from a phrase to sound -------------------------------------------------------------------------------------------


def render(
    notes: Sequence[TuneNote], instrument: Instrument, seconds: float, sample_rate: int, take: int = 0
) -> NDArray[np.float32]:
    """Notes played on an instrument: [samples] of ``seconds``, at LEVEL_DBFS, every onset at its note's start.

    Another ``take`` has the same loudness, but other recordings of the notes, and those of softer playing.
    """
    out = np.zeros(round(seconds * sample_rate) + 1, dtype=np.float32)
    one_voice = instrument.articulation.monophonic
    ends: dict[int, float] = {}
    for number, note in enumerate(notes):
        following = notes[number + 1].start if one_voice and number + 1 < len(notes) else np.inf
        held = min(note.seconds, float(following) - note.start)
        slurred = one_voice and note.start - ends.get(0, -1.0) < SLUR_SECONDS
        slurs_on = one_voice and float(following) - note.start - held < SLUR_SECONDS
        if one_voice:
            ends[0] = note.start + held
        dynamic = note.velocity / 127.0 * (0.5 if take % 2 else 1.0)
        sound, lead = instrument.play(note.pitch, held, dynamic, number + take, slurred, slurs_on)
        gain = np.float32((note.velocity / 100.0) ** 1.5)
        at = round(note.start * sample_rate) - lead
        sound = sound[max(0, -at) :]
        at = max(0, at)
        stop = min(len(out), at + len(sound))
        out[at:stop] += sound[: stop - at] * gain
    out = out[:-1]
    fade = min(len(out), round(0.05 * sample_rate))
    out[len(out) - fade :] *= np.linspace(1.0, 0.0, fade, dtype=np.float32)
    level = float(np.sqrt(np.mean(np.square(out, dtype=np.float64))))
    peak = float(np.abs(out).max())
    if peak == 0.0:
        return out
    return out * np.float32(min(10.0 ** (LEVEL_DBFS / 20.0) / level, PEAK / peak))


@dataclass(frozen=True)
class Rendering:
    """A phrase as one style plays it, lying in the cache: .npy int16 [samples]."""

    phrase: int  # number of the phrase
    take: int
    path: Path
    samples: int

    def audio(self) -> NDArray[np.int16]:
        return _mapped(str(self.path))


@lru_cache(maxsize=256)  # every map holds a file descriptor
def _mapped(path: str) -> NDArray[np.int16]:
    return np.load(path, mmap_mode="r")


@lru_cache(maxsize=4096)
def _level(path: str) -> float:
    """Root mean square of a rendering, as a share of full scale."""
    return float(np.sqrt(np.mean(np.square(_mapped(path), dtype=np.float64)))) / 32767.0


@dataclass(frozen=True)
class PhraseBank:
    """All renderings, per row of the style table; styles that cannot play have none."""

    renderings: tuple[tuple[Rendering, ...], ...]
    phrases: tuple[Phrase, ...]
    instruments: tuple[Instrument | None, ...]
    warnings: tuple[str, ...]

    @property
    def minutes(self) -> tuple[float, ...]:
        """Rendered music per row of the style table."""
        return tuple(sum(self.phrases[r.phrase].seconds for r in style) / 60.0 for style in self.renderings)


def _rendering_key(phrase: Phrase, instrument: Instrument, sample_rate: int, take: int) -> str:
    content = [
        PHRASES_VERSION,
        sample_rate,
        take,
        phrase.seconds,
        [dataclasses.astuple(note) for note in phrase.notes],
        dataclasses.astuple(instrument.articulation),
        [
            [n.recording.audio_sha256, n.pitch, n.dynamic, n.take, dataclasses.astuple(n.measured)]
            for n in instrument.notes
        ],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_instruments(
    library: Library, recipe: Recipe, cache_folder: Path, progress: Callable[[str, int, int], None] | None = None
) -> tuple[tuple[Instrument | None, ...], tuple[str, ...]]:
    """An instrument per style, of recordings of the train split alone, and what a user should know of them.

    None for percussion, and with a warning for styles with fewer than LEAST_NOTES usable notes.
    """
    rate = recipe.spectral.sample_rate
    notes = MeasuredNotes(cache_folder, rate)
    manners = [articulation(entry.midi_program) for entry in recipe.style]
    total = sum(len(style.train) for style, manner in zip(library.styles, manners, strict=True) if manner)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("measuring notes", done, total)

    instruments: list[Instrument | None] = []
    warnings: list[str] = []
    for style, manner in zip(library.styles, manners, strict=True):
        if manner is None:
            instruments.append(None)
            continue
        instrument = build_instrument(style.id, manner, style.train, measure_all(style.train, notes, step))
        out = instrument.left_out
        if out:
            reasons = "; ".join(f"{item.path.name} {item.reason}" for item in out[:3])
            warnings.append(
                f"style '{style.id}': {len(out)} of {len(style.train)} recordings are not played as notes "
                f"({reasons}{'; ...' if len(out) > 3 else ''})"
            )
        if len(instrument.notes) < LEAST_NOTES:
            warnings.append(
                f"style '{style.id}': {len(instrument.notes)} usable notes, so no phrases are played on it; "
                f"add recordings of at least {LEAST_NOTES} single notes to have some"
            )
            instruments.append(None)
        else:
            instruments.append(instrument)
    notes.save()
    return tuple(instruments), tuple(warnings)


def render_phrases(
    recipe: Recipe,
    library: Library,
    data_folder: Path,
    cache_folder: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> PhraseBank | None:
    """Measure notes, plan phrases and play them into the cache, or find them there; None if the recipe wants none.

    ``progress`` is told (what is done, how much of it, of how much). Raises PhraseError.
    """
    config, rate = recipe.phrases, recipe.spectral.sample_rate
    if not config.minutes_per_style:
        return None
    tunes, _, _ = split_tunes(find_tunes(data_folder / config.midi_folder), recipe.data.split_seed)
    instruments, warnings = load_instruments(library, recipe, cache_folder, progress)
    if not any(instruments):
        names = ", ".join(f"'{entry.id}'" for entry in recipe.style)
        raise PhraseError(
            f"phrases: none of the styles {names} has {LEAST_NOTES} recordings of single notes; "
            "add such recordings, or take the [phrases] section out"
        )
    phrases = plan_phrases(instruments, tunes, config, recipe.data.split_seed)
    if not phrases:
        raise PhraseError(
            f"phrases: none of the tunes in {data_folder / config.midi_folder} fits the styles' notes; add others"
        )
    folder = cache_folder / "phrases"
    folder.mkdir(parents=True, exist_ok=True)

    def perform(job: tuple[int, int, int]) -> Rendering:
        number, row, take = job
        phrase, instrument = phrases[number], _instrument(instruments, row)
        path = folder / f"{_rendering_key(phrase, instrument, rate, take)[:40]}.npy"
        samples = round(phrase.seconds * rate)
        try:
            stored = np.load(path, mmap_mode="r")
            whole = stored.shape == (samples,) and stored.dtype == np.int16
        except (OSError, ValueError, EOFError):
            whole = False
        if not whole:
            audio = np.rint(render(phrase.notes, instrument, phrase.seconds, rate, take) * 32767.0).astype(np.int16)
            replace_file(path, lambda temporary: np.save(temporary, audio))
        return Rendering(number, take, path, samples)

    jobs: list[tuple[int, int, int]] = []
    for number, phrase in enumerate(phrases):
        jobs += [(number, row, 0) for row in phrase.players]
        if _instrument(instruments, phrase.players[0]).varied:
            jobs.append((number, phrase.players[0], 1))  # so that a style is paired with itself, too
    renderings: list[list[Rendering]] = [[] for _ in recipe.style]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for done, (job, rendering) in enumerate(zip(jobs, pool.map(perform, jobs), strict=True), 1):
            renderings[job[1]].append(rendering)
            if progress is not None:
                progress("playing phrases", done, len(jobs))
    return PhraseBank(tuple(tuple(style) for style in renderings), phrases, instruments, warnings)


# -- from sound to excerpts -------------------------------------------------------------------------------------------


class PhraseSampler:
    """Draws excerpts of phrases, and of two renderings of one phrase, reproducibly."""

    def __init__(self, bank: PhraseBank) -> None:
        self._by_style = bank.renderings
        self._by_phrase: dict[int, list[Rendering]] = {}
        for style in bank.renderings:
            for rendering in style:
                self._by_phrase.setdefault(rendering.phrase, []).append(rendering)
        self._paired = [
            [rendering for rendering in style if len(self._by_phrase[rendering.phrase]) > 1]
            for style in bank.renderings
        ]

    def has_pairs(self, style: int) -> bool:
        """Whether ``draw_pair`` has anything to draw from."""
        return bool(self._paired[style])

    def __contains__(self, style: int) -> bool:
        return bool(self._by_style[style])

    def names(self, style: int) -> list[str]:
        """Of the renderings in a style; they change with what is heard in them."""
        return [rendering.path.name for rendering in self._by_style[style]]

    def draw(self, style: int, samples: int, random: np.random.Generator) -> NDArray[np.float32]:
        """[samples] of a phrase in a style that has some."""
        rendering = self._by_style[style][int(random.integers(len(self._by_style[style])))]
        return self._excerpt([rendering], samples, random)[0]

    def draw_pair(
        self, style: int, samples: int, random: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The same excerpt of one phrase as another style (or take) plays it, and as ``style`` does: [samples] each.

        The long-term level of both is the same.
        """
        target = self._paired[style][int(random.integers(len(self._paired[style])))]
        others = [item for item in self._by_phrase[target.phrase] if item is not target]
        played = others[int(random.integers(len(others)))]
        heard, wanted = self._excerpt([played, target], samples, random)
        return heard, wanted

    def _excerpt(
        self, renderings: Sequence[Rendering], samples: int, random: np.random.Generator
    ) -> list[NDArray[np.float32]]:
        """From one place, where none of them is silent, at one long-term level."""
        pieces: list[NDArray[np.float32]] = []
        for _ in range(8):
            start = int(random.integers(0, max(1, renderings[0].samples - samples + 1)))
            pieces = [_piece(rendering, start, samples) for rendering in renderings]
            if all(float(np.square(piece).mean()) >= 10.0 ** (AUDIBLE_DBFS / 10.0) for piece in pieces):
                break
        return pieces


def _piece(rendering: Rendering, start: int, samples: int) -> NDArray[np.float32]:
    scale = 10.0 ** (LEVEL_DBFS / 20.0) / max(_level(str(rendering.path)), 1e-6) / 32767.0
    piece = rendering.audio()[start : start + samples] * np.float32(scale)
    return np.pad(piece, (0, samples - len(piece)))
