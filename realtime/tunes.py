"""Tunes in standard MIDI files: notes on the grid, tempo and metre. Reading trusts nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import mido

from realtime.files import NewFile
from realtime.midi import MidiError
from realtime.notes import TICKS_PER_QUARTER, Note

DRUM_CHANNEL = 9
DEFAULT_TEMPO_BPM, DEFAULT_METRE = 120.0, (4, 4)
MAX_FILE_BYTES = 16 * 2**20
MAX_NOTES = 200_000
WRITTEN_TICKS = 480
"""To the quarter note, of files that are written."""


@dataclass(frozen=True)
class Tune:
    """Notes in order of time. ``tempo_bpm``: quarter notes per minute; ``metre``: as (beats, part of a whole note)."""

    notes: tuple[Note, ...]
    tempo_bpm: float = DEFAULT_TEMPO_BPM
    metre: tuple[int, int] = DEFAULT_METRE
    program: int = 0

    @property
    def bar_ticks(self) -> int:
        """The length of a bar."""
        beats, part = self.metre
        return max(1, round(4 * TICKS_PER_QUARTER * beats / part))

    @property
    def end_ticks(self) -> int:
        """Where the last sound ends; 0 without notes."""
        return max((note.end_ticks for note in self.notes), default=0)

    @property
    def seconds(self) -> float:
        return self.end_ticks * seconds_per_tick(self.tempo_bpm)


def seconds_per_tick(tempo_bpm: float) -> float:
    """How long a tick of the grid lasts."""
    return 60.0 / tempo_bpm / TICKS_PER_QUARTER


def read_tune(path: Path) -> Tune:
    """All pitched notes of a MIDI file on the grid, with the tempo, metre and program that hold for longest.

    A note that several channels begin together is one. Raises MidiError, also for a file without notes.
    """
    if not path.is_file():
        raise MidiError(f"{path}: there is no such file; check the path")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
        file = mido.MidiFile(str(path), clip=True)
        if file.ticks_per_beat <= 0:
            raise ValueError("it counts time in frames of film, not in quarter notes")
        if file.type == 2:
            raise ValueError("it is of type 2, several tunes in one")
        events = list(mido.merge_tracks(file.tracks))
    except Exception as error:  # mido raises many kinds for damaged files
        why = str(error) or type(error).__name__
        raise MidiError(f"{path}: is not a standard MIDI file of one tune ({why}); export it again") from None
    scale = TICKS_PER_QUARTER / file.ticks_per_beat
    held: dict[tuple[int, int], tuple[int, int]] = {}
    notes: dict[tuple[int, int], Note] = {}
    tempi, metres, programs = Counter[float](), Counter[tuple[int, int]](), Counter[int]()
    tempo, metre, program, now, ticks = DEFAULT_TEMPO_BPM, DEFAULT_METRE, dict[int, int](), 0, 0
    for message in events:
        tempi[tempo] += message.time
        metres[metre] += message.time
        ticks += message.time
        now = round(ticks * scale)
        if message.type == "set_tempo":
            tempo = round(mido.tempo2bpm(message.tempo), 4) if message.tempo else tempo
        elif message.type == "time_signature":
            metre = message.numerator, message.denominator
        elif message.type == "program_change":
            program[message.channel] = message.program
        if message.type not in ("note_on", "note_off") or message.channel == DRUM_CHANNEL:
            continue
        key = message.channel, message.note
        if key in held:
            start, velocity = held.pop(key)
            note = Note(start, max(1, now - start), message.note, velocity)
            known = notes.get((start, note.pitch))
            if known is None or known.duration_ticks < note.duration_ticks:
                notes[start, note.pitch] = note
            programs[program.get(message.channel, 0)] += 1
        if message.type == "note_on" and message.velocity > 0:
            held[key] = now, message.velocity
    if not notes:
        raise MidiError(f"{path}: holds no notes; give a file with at least one outside the drum channel")
    if len(notes) > MAX_NOTES:
        raise MidiError(f"{path}: holds {len(notes)} notes, more than {MAX_NOTES}; give a shorter one")
    ordered = tuple(notes[key] for key in sorted(notes))
    return Tune(ordered, tempi.most_common(1)[0][0], metres.most_common(1)[0][0], programs.most_common(1)[0][0])


def write_tune(path: Path, tune: Tune) -> None:
    """Write a MIDI file of one track, whole or not at all; a note ends where its pitch begins again. Raises OSError."""
    scale = WRITTEN_TICKS // TICKS_PER_QUARTER
    following: dict[int, int] = {}
    timed: list[tuple[int, int, mido.Message]] = []
    for note in sorted(tune.notes, key=lambda note: -note.start_ticks):
        end = min(note.end_ticks, following.get(note.pitch, note.end_ticks))
        following[note.pitch] = note.start_ticks
        timed.append((note.start_ticks, 1, mido.Message("note_on", note=note.pitch, velocity=note.velocity)))
        timed.append((end, 0, mido.Message("note_off", note=note.pitch, velocity=0)))
    beats, part = tune.metre
    track = mido.MidiTrack(
        [
            mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(tune.tempo_bpm)),
            mido.MetaMessage("time_signature", numerator=beats, denominator=part),
            mido.Message("program_change", program=tune.program),
        ]
    )
    before = 0
    for at, _, message in sorted(timed, key=lambda item: item[:2]):
        track.append(message.copy(time=(at - before) * scale))
        before = at
    track.append(mido.MetaMessage("end_of_track"))
    with NewFile(path) as part_path:
        mido.MidiFile(type=0, ticks_per_beat=WRITTEN_TICKS, tracks=[track]).save(str(part_path))
