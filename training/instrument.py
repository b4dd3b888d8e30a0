"""Recordings of single notes -> an instrument that can be played: what each note is, and how it sounds at a pitch.

What a file's name says of pitch and dynamics is believed as far as the sound bears it out. Recordings that are not one
note are left out, each with its reason.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from training.library import Recording, Skipped, replace_file
from training.librosa_once import librosa

log = logging.getLogger(__name__)

MEASURE_VERSION = 1
LONGEST_NOTE_SECONDS = 20.0
LOWEST_HZ, HIGHEST_HZ = 27.0, 4500.0
ONSET_DB = -20.0  # a note starts where it comes this near to the level that its attack reaches
FADE_IN_SECONDS = 0.003  # before the onset
LONGEST_ATTACK_SECONDS = 0.1  # a slower attack is entered late, so that the note sounds when it should
LEGATO_ATTACK_SECONDS = 0.03  # the same where one note is slurred to the next
LEGATO_FADE_SECONDS = 0.03
LONGEST_RING_SECONDS = 4.0
LOOP_FADE_SECONDS = 0.12
WIDEST_SHIFT_SEMITONES = 5.0  # by which a recording may be transposed
OCTAVE_AGREES_CENTS = 90.0

NOTE_NAME = re.compile(r"([A-Ga-g])(s|#|b)?(\d)")
HERTZ = re.compile(r"(\d{2,4}\.\d+)|(\d{2,4}(?:\.\d+)?)hz", re.IGNORECASE)
SEMITONE_OF = {"c": 0, "d": 2, "e": 4, "f": 5, "g": 7, "a": 9, "b": 11}
DYNAMICS = {"ppp": 0.15, "pp": 0.25, "p": 0.4, "mp": 0.5, "mf": 0.65, "f": 0.8, "ff": 0.9, "fff": 1.0}
NOT_ONE_NOTE = re.compile(
    r"arp|bend|chord|fifth|5th|glis|groov|harmonic|loop|orch|octaves|phrase|riff|scale|sequence|slide|stacc|tremolo|trill",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class NoteName:
    """What a file's name says: pitch as a MIDI number with A4 = 69, dynamic from 0 to 1, which take it is."""

    pitch: float | None
    dynamic: float | None
    take: int


def hertz_to_midi(hertz: float) -> float:
    return 69.0 + 12.0 * math.log2(hertz / 440.0)


def midi_to_hertz(pitch: float) -> float:
    return 440.0 * 2.0 ** ((pitch - 69.0) / 12.0)


def parse_name(name: str) -> NoteName:
    """Read ``sax_a3_f_rr1``, ``Cs4_2``, ``102_110.00000`` (velocity, hertz), ``418hz`` and the like."""
    tokens = [token for token in re.split(r"[_\-\s]+", Path(name).stem) if token]
    pitch: float | None = None
    dynamic: float | None = None
    take, at = 1, -1
    for number, token in enumerate(tokens):
        note, hertz = NOTE_NAME.fullmatch(token), HERTZ.fullmatch(token)
        if note:
            flat = {"s": 1, "#": 1, "b": -1}.get(note[2], 0)
            pitch, at = 12.0 * (int(note[3]) + 1) + SEMITONE_OF[note[1].lower()] + flat, number
        elif hertz and LOWEST_HZ * 0.9 <= (value := float(hertz[1] or hertz[2])) <= HIGHEST_HZ:
            pitch, at = hertz_to_midi(value), number
            before = tokens[number - 1] if number else ""
            if re.fullmatch(r"\d{1,3}", before) and 1 <= int(before) <= 127:
                dynamic = int(before) / 127.0
        elif token in DYNAMICS:
            dynamic = DYNAMICS[token]
        elif found := re.fullmatch(r"(?:rr|v)?(\d{1,3})", token):
            take = int(found[1]) if 0 <= at < number or token.startswith("rr") else take
    return NoteName(pitch, dynamic, take)


@dataclass(frozen=True)
class Articulation:
    """How notes of a General MIDI program begin, last and end."""

    sustained: bool  # bowed, blown or sung: lasts as long as it is held
    monophonic: bool
    release_seconds: float  # fade after the note ends; infinite where nothing damps it


def articulation(midi_program: int) -> Articulation | None:
    """By family of General MIDI 1 (programs 0 to 127); None for percussion and effects, which have no pitch."""
    family = midi_program // 8
    if midi_program >= 112 or midi_program == 47:
        return None
    if family == 1 or midi_program in (46, 108):  # chromatic percussion, harp, kalimba
        return Articulation(sustained=False, monophonic=False, release_seconds=math.inf)
    if family in (0, 3, 4) or midi_program in (45, 55, 104, 105, 106, 107):  # piano, guitar, bass, plucked
        return Articulation(sustained=False, monophonic=family == 4, release_seconds=0.2)
    if family in (2, 6, 11) or midi_program in (61, 62, 63):  # organ, ensemble, pad, brass section
        return Articulation(sustained=True, monophonic=False, release_seconds=0.1)
    return Articulation(sustained=True, monophonic=family in (5, 7, 8, 9, 13), release_seconds=0.07)


@dataclass(frozen=True)
class Measured:
    """What the sound of one recording says. Positions in samples of the recording."""

    problem: str = ""  # why it is not one note
    pitch: float = 0.0  # MIDI number, to the cent
    onset: int = 0
    attack: int = 0  # from the onset to 6 dB below the level that the attack reaches
    level: float = 1.0  # root mean square of the loudest tenth of a second near the start
    steady_start: int = 0  # a stretch of even level, empty where there is none
    steady_end: int = 0


def _levels(audio: NDArray[np.float32], window: int, hop: int) -> NDArray[np.float64]:
    """Root mean square of ``window`` samples, every ``hop``; entry i covers samples from i * hop on."""
    total = np.concatenate([[0.0], np.cumsum(np.square(audio, dtype=np.float64))])
    starts = np.arange(0, max(1, len(audio) - window), hop)
    return np.sqrt((total[np.minimum(starts + window, len(audio))] - total[starts]) / window + 1e-16)


def measure(audio: NDArray[np.float32], sample_rate: int, named: float | None) -> Measured:
    """Onset, level, steady part and pitch of a recording [samples] of one note; ``problem`` if it is not one.

    Pitch by pYIN (Mauch and Dixon, 2014), to the cent by YIN (de Cheveigne and Kawahara, 2002) around it. Where pYIN
    finds no steady pitch (bells, lowest strings), ``named`` is the place to look.
    """
    seconds = len(audio) / sample_rate
    if seconds > LONGEST_NOTE_SECONDS:
        return Measured(problem=f"is longer than one note ({seconds:.1f} s)")
    hop, window = sample_rate // 1000, sample_rate // 250
    fast = _levels(audio, window, hop)
    slow = _levels(audio, sample_rate // 50, hop)
    audible = int(np.argmax(fast > 0.03 * fast.max()))
    reached = float(slow[audible : audible + 1000].max())
    half = audible + int(np.argmax(fast[audible:] > 0.5 * reached))
    # From the attack back to the last hundredth of a second of quiet: noises before it do not count.
    still = (
        np.convolve(fast[: half + 1] < reached * 10.0 ** (ONSET_DB / 20.0), np.ones(10), mode="full")[: half + 1] > 9.5
    )
    above = int(np.flatnonzero(still)[-1]) + 1 if still.any() else 0
    # The window that first holds 1 % of the power of the attack ends where the attack begins.
    onset = min(above * hop + (window - hop if above else 0), len(audio) - 1)
    if len(audio) - onset < sample_rate // 8:
        return Measured(problem="ends before its pitch can be told")
    first = onset // hop
    attack = int(np.argmax(slow[first:] > 0.5 * reached)) * hop if first < len(slow) else 0
    blocks = _levels(audio[onset : onset + 2 * sample_rate], sample_rate // 10, sample_rate // 40)
    level = float(blocks.max())

    coarse = _levels(audio[onset:], sample_rate // 20, sample_rate // 40)  # 50 ms, every 25 ms
    decibels = 20.0 * np.log10(coarse / coarse.max())
    quiet_first = max(6, round(attack / sample_rate / 0.025) + 2)
    # Several players beat, and their names tell that they play one note.
    for at in range(quiet_first + 6, len(decibels) if named is None else 0):
        if decibels[at] > -12.0 and decibels[at] > decibels[at - 6 : at].min() + 10.0:
            return Measured(problem=f"is struck again after {at * 0.025:.1f} s")

    start = onset + max(attack + sample_rate // 10, sample_rate // 4)
    even = decibels[(start - onset) * 40 // sample_rate :]
    steady_end = start
    if len(even) > 8:
        # It ends where the level leaves 6 dB around that of its first second.
        leaves = np.abs(even - np.median(even[:40])) > 6.0
        count = int(np.argmax(leaves)) if leaves.any() else len(even)
        steady_end = min(start + max(0, count - 2) * sample_rate // 40, start + 4 * sample_rate, len(audio))
    if steady_end - start < sample_rate // 4:
        start = steady_end = 0

    pitch, problem = _pitch(audio, sample_rate, onset, attack, decibels, named)
    return Measured(problem, pitch, onset, attack, level, start, steady_end)


def _pitch(
    audio: NDArray[np.float32],
    sample_rate: int,
    onset: int,
    attack: int,
    decibels: NDArray[np.float64],
    named: float | None,
) -> tuple[float, str]:
    """MIDI pitch of the sustained part, or why there is none. ``decibels``: level every 25 ms from the onset on."""
    begin = min(attack / sample_rate, 0.3) + 0.03
    blocks = decibels[int(begin * 40) :]
    faded = np.flatnonzero(blocks < -32.0)
    seconds = min(1.2, (int(faded[0]) if len(faded) else len(blocks)) / 40.0 + 0.05)
    part = audio[onset + round(begin * sample_rate) :][: round(max(seconds, 0.2) * sample_rate)]
    # YIN hears a decaying note too high: a shorter lag meets more alike levels. Even out the decay.
    level = np.log(_levels(part, sample_rate // 20, sample_rate // 40))
    slope = float(np.polyfit(np.arange(len(level)) / 40.0, level, 1)[0]) if len(level) > 3 else 0.0
    part = (part * np.exp(-min(slope, 0.0) * np.arange(len(part)) / sample_rate)).astype(np.float32)
    rate = 24_000
    low = soxr.resample(part, sample_rate, rate, quality="HQ")
    low = np.pad(low, (0, max(0, 4096 + 600 - len(low))))
    found, voiced, _ = librosa.pyin(
        low, fmin=LOWEST_HZ, fmax=HIGHEST_HZ, sr=rate, frame_length=4096, hop_length=600, resolution=0.2, center=False
    )
    pitches = librosa.hz_to_midi(found[voiced])
    middle = float(np.median(pitches)) if len(pitches) else 0.0
    near = np.abs(pitches - middle) < 0.7
    steady = len(pitches) >= 0.5 * len(found) and near.mean() > 0.8
    if steady:
        fine, _ = _fine_pitch(part, sample_rate, middle)
        if named is None and _fundamental_db(part, sample_rate, fine) < -26.0:
            return 0.0, "sounds like several notes at once"
        return fine, ""
    if named is None:
        return 0.0, "has no steady pitch"
    fine, spread = _fine_pitch(part, sample_rate, named)
    if spread > 0.3 and _fundamental_db(part, sample_rate, named) < -12.0:
        return 0.0, "has no steady pitch, and not the one in its name"
    return fine, ""


def _fine_pitch(part: NDArray[np.float32], sample_rate: int, pitch: float) -> tuple[float, float]:
    """Median of YIN within a semitone of ``pitch``, and half the range of its middle half, in semitones."""
    hertz = midi_to_hertz(pitch)
    least = max(2048, 1 << math.ceil(math.log2(3.5 * sample_rate / hertz)))
    # Many periods, where there are as many: with few, YIN is up to 7 cents off.
    frame = max(4096, 1 << math.ceil(math.log2(8.0 * sample_rate / hertz)))
    while frame > least and frame + frame // 4 > len(part):
        frame //= 2
    part = np.pad(part, (0, max(0, frame + frame // 4 - len(part))))
    found = librosa.yin(
        part, fmin=hertz / 1.06, fmax=hertz * 1.06, sr=sample_rate, frame_length=frame, hop_length=512, center=False
    )
    pitches = librosa.hz_to_midi(found)
    low, middle, high = np.percentile(pitches, [25, 50, 75])
    return float(middle), float(high - low) / 2.0


def _fundamental_db(part: NDArray[np.float32], sample_rate: int, pitch: float) -> float:
    """Level of the strongest partial within 70 cents of ``pitch``, below the strongest partial of all."""
    spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)), 1 << (2 * len(part) - 1).bit_length()))
    size = 2 * (len(spectrum) - 1)
    low, high = (midi_to_hertz(pitch + shift) * size / sample_rate for shift in (-0.7, 0.7))
    own = spectrum[int(low) : math.ceil(high) + 1].max()
    floor = spectrum[int(20.0 * size / sample_rate) :].max()
    return 20.0 * math.log10(max(float(own), 1e-12) / max(float(floor), 1e-12))


class MeasuredNotes:
    """Measurements on disk, by the hash of the sound and the pitch looked for."""

    def __init__(self, folder: Path, sample_rate: int) -> None:
        self._path, self._sample_rate = folder / f"notes-{sample_rate}.json", sample_rate
        self._known: dict[str, dict[str, Any]] = {}
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            if stored["version"] == MEASURE_VERSION:
                self._known = dict(stored["notes"])
        except (OSError, ValueError, KeyError, TypeError):
            log.debug("no usable measurements at %s", self._path)

    def measure(self, recording: Recording) -> Measured:
        named = parse_name(recording.name).pitch
        key = f"{recording.audio_sha256}:{named}"
        try:
            return Measured(**self._known[key])
        except (KeyError, TypeError):
            pass
        result = measure(np.asarray(recording.audio()), self._sample_rate, named)
        self._known[key] = asdict(result)
        return result

    def save(self) -> None:
        text = json.dumps({"version": MEASURE_VERSION, "notes": self._known})
        replace_file(self._path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class Note:
    """One recorded note, ready to be played at other pitches."""

    recording: Recording
    measured: Measured
    pitch: float  # MIDI number; of the sound, whatever its name says
    dynamic: float | None  # 0 to 1
    take: int

    @cached_property
    def _loop(self) -> tuple[NDArray[np.float32], int]:
        """One turn of the steady part that follows itself without a seam, and where it takes over."""
        rate, start, end = self.recording.sample_rate, self.measured.steady_start, self.measured.steady_end
        audio = np.asarray(self.recording.audio())
        fade = min(round(LOOP_FADE_SECONDS * rate), (end - start) // 3)
        tail = audio[end - fade : end]
        # Two periods hold a place where the sound goes on in phase.
        reach = min(max(64, round(2 * rate / midi_to_hertz(self.pitch))), (end - start) // 3)
        alike = np.correlate(audio[start : start + reach + fade], tail, mode="valid")
        power = np.convolve(np.square(audio[start : start + reach + fade]), np.ones(fade), mode="valid")
        likeness = alike / np.sqrt(np.maximum(power * float(np.square(tail).sum()), 1e-20))
        begin = start + int(likeness.argmax())
        alike_most = float(np.clip(likeness.max(), 0.0, 1.0))
        rise = (np.arange(fade, dtype=np.float32) + 0.5) / fade
        # Constant power for sounds as much alike as these are.
        even = 1.0 / np.sqrt(rise**2 + (1 - rise) ** 2 + 2 * alike_most * rise * (1 - rise))
        seam = (tail * (1 - rise) + audio[begin : begin + fade] * rise) * even
        turn = np.concatenate([seam, audio[begin + fade : end - fade]]).astype(np.float32)
        return turn, end - fade

    def sound(self, start: int, samples: int, sustained: bool) -> NDArray[np.float32]:
        """[up to ``samples``] from ``start`` on; held by looping where ``sustained`` and the recording allows it."""
        measured = self.measured
        audio = self.recording.audio()
        if not sustained or measured.steady_end <= measured.steady_start or start + samples <= measured.steady_end:
            return np.asarray(audio[start : start + samples])
        turn, takes_over = self._loop
        before = np.asarray(audio[start:takes_over])
        turns = -(-(samples - len(before)) // len(turn))
        return np.concatenate([before, np.tile(turn, turns)])[:samples]


@dataclass(frozen=True)
class Instrument:
    """A style's notes in order of pitch, and how they are articulated."""

    style_id: str
    articulation: Articulation
    notes: tuple[Note, ...]
    left_out: tuple[Skipped, ...]

    def distance(self, pitch: float) -> float:
        """Semitones to the nearest recorded note."""
        return min(abs(note.pitch - pitch) for note in self.notes)

    @property
    def varied(self) -> bool:
        """Whether some pitch was recorded more than once, so that two takes of a phrase differ."""
        pitches = sorted(note.pitch for note in self.notes)
        return any(above - below < 0.5 for below, above in itertools.pairwise(pitches))

    def can_play(self, pitch: float) -> bool:
        return self.distance(pitch) <= WIDEST_SHIFT_SEMITONES

    def choose(self, pitch: int, dynamic: float, turn: int, seconds: float = 0.0) -> Note:
        """The nearest note of the nearest dynamic; of equally good ones number ``turn``, round and round.

        Of sustained notes, one that lasts or can be looped for ``seconds`` is worth a fourth in pitch.
        """

        def far(note: Note) -> float:
            other = 0.0 if note.dynamic is None else abs(note.dynamic - dynamic)
            loops = note.measured.steady_end > 0 or not self.articulation.sustained
            lasts = loops or note.recording.seconds - note.measured.onset / note.recording.sample_rate > 1.3 * seconds
            return abs(note.pitch - pitch) + 3.0 * other + (0.0 if lasts else 5.0)

        nearest = min(far(note) for note in self.notes)
        equal = [note for note in self.notes if far(note) <= nearest + 0.5]
        return equal[turn % len(equal)]

    def play(
        self, pitch: int, seconds: float, dynamic: float, turn: int, slurred: bool = False, slurs_on: bool = False
    ) -> tuple[NDArray[np.float32], int]:
        """A note at ``pitch``, held for ``seconds``: samples, and how many of them come before its onset.

        All notes have one loudness; ``dynamic`` (0 to 1) only chooses the recording. ``slurred``: follows another note
        at once; ``slurs_on``: is followed at once.
        """
        note = self.choose(pitch, dynamic, turn, seconds)
        measured, manner = note.measured, self.articulation
        rate = note.recording.sample_rate
        ratio = 2.0 ** ((pitch - note.pitch) / 12.0)
        lead_seconds = FADE_IN_SECONDS
        onset = measured.onset
        longest_attack = round((LEGATO_ATTACK_SECONDS if slurred else LONGEST_ATTACK_SECONDS) * rate * ratio)
        if manner.sustained and measured.attack > longest_attack:
            onset += measured.attack - longest_attack
        start = max(0, onset - round(lead_seconds * rate * ratio))
        release = manner.release_seconds
        if manner.monophonic and slurs_on:
            release = min(release, LEGATO_FADE_SECONDS)
        rings = math.isinf(release)
        after = LONGEST_RING_SECONDS if rings else release
        wanted = round((lead_seconds + seconds + after) * rate)
        source = note.sound(start, math.ceil(wanted * ratio) + 16, manner.sustained)
        out = source if abs(ratio - 1.0) < 1e-5 else soxr.resample(source, rate * ratio, rate, quality="HQ")
        out = np.array(out[:wanted], dtype=np.float32) / np.float32(measured.level)
        lead = round((onset - start) / ratio)
        rise = max(lead, rate // 1000)
        edge = np.sin(0.5 * np.pi * (np.arange(rise, dtype=np.float32) + 0.5) / rise) ** 2
        out[:rise] *= edge[: len(out)]
        # A ringing note fades at the end of what there is, a damped one from its end on.
        fade = min(len(out), round((0.05 if rings else release) * rate))
        if fade:
            held = len(out) - fade if rings else min(lead + round(seconds * rate), len(out) - fade)
            fall = np.cos(0.5 * np.pi * (np.arange(fade, dtype=np.float32) + 0.5) / fade) ** 2
            out[held : held + fade] *= fall
            out = out[: held + fade]
        return out, lead


def build_instrument(
    style_id: str, manner: Articulation, recordings: Sequence[Recording], measured: Sequence[Measured]
) -> Instrument:
    """Sort measured recordings into notes and what is left out; octaves as most recordings so named have them."""
    notes: list[Note] = []
    left_out: list[Skipped] = []
    shifts = _octave_shifts(recordings, measured)
    for recording, result in zip(recordings, measured, strict=True):
        name = parse_name(recording.name)
        problem = result.problem
        if name.pitch is None and NOT_ONE_NOTE.search(Path(recording.name).stem):
            problem = problem or "is not one note, by its name"
        pitch = result.pitch
        if not problem and name.pitch is not None:
            believed = name.pitch + 12.0 * shifts.get(_convention(recording.name), 0)
            octaves = round((believed - pitch) / 12.0)
            if abs(believed - pitch - 12.0 * octaves) * 100.0 <= OCTAVE_AGREES_CENTS:
                pitch += 12.0 * octaves
            else:
                log.info("%s: sounds at %.2f, its name says %.2f", recording.name, pitch, name.pitch)
                problem = f"sounds at MIDI pitch {pitch:.1f}, its name says {name.pitch:.1f}"
        if problem:
            left_out.append(Skipped(recording.path, problem))
        else:
            notes.append(Note(recording, result, pitch, name.dynamic, name.take))
    notes.sort(key=lambda note: (round(note.pitch, 1), note.dynamic or 0.0, note.take, note.recording.name))
    return Instrument(style_id, manner, tuple(notes), tuple(left_out))


def _convention(name: str) -> str:
    """Names that start alike count octaves alike."""
    found = re.match(r"[A-Za-z]+", Path(name).stem)
    return found[0] if found else ""


def _octave_shifts(recordings: Sequence[Recording], measured: Sequence[Measured]) -> dict[str, int]:
    """By convention of naming: how many octaves most recordings sound above their name."""
    votes: dict[str, Counter[int]] = {}
    for recording, result in zip(recordings, measured, strict=True):
        named = parse_name(recording.name).pitch
        if named is None or result.problem:
            continue
        octaves = round((result.pitch - named) / 12.0)
        if abs(result.pitch - named - 12.0 * octaves) * 100.0 <= OCTAVE_AGREES_CENTS:
            votes.setdefault(_convention(recording.name), Counter())[octaves] += 1
    return {kind: counter.most_common(1)[0][0] for kind, counter in votes.items()}


def measure_all(
    recordings: Sequence[Recording], notes: MeasuredNotes, progress: Callable[[], object] | None = None
) -> list[Measured]:
    """Measure in a few threads, in the given order."""
    results: list[Measured] = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for result in pool.map(notes.measure, recordings):
            results.append(result)
            if progress is not None:
                progress()
    return results
