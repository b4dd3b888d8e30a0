"""A partner that listens: it takes over when the player stops, in the tempo heard, and falls silent at the next note.

The idea is Pachet's: "The Continuator: musical interaction with style", Journal of New Music Research 32(3), 2003.
Nothing here knows of ports or clocks: messages and times come in, messages go out through ``send``.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from realtime.compose import ENTRY_TICKS, Continuation, NoteStream, Sampling
from realtime.midi import ALL_NOTES_OFF, ALL_SOUND_OFF, SUSTAIN_PEDAL, Message, decode
from realtime.notes import TICKS_PER_QUARTER, Note
from realtime.tempo import Beat, HeardNote, TempoError, follow

LEAST_NOTES = 4
MOST_NOTES = 512
SHORTEST_SILENCE_S = 0.35
IDLE_S = 0.01
"""How often it looks whether the player has stopped."""


@dataclass(frozen=True)
class ContinuatorSettings:
    """How a partner behaves. ``silence_quarters``: how long the player must be silent before it takes over;
    ``bars``: of four quarters, after which it rests until the player has played again, 0: it goes on for ever.
    """

    sampling: Sampling = field(default_factory=Sampling)
    random_seed: int = 0
    silence_quarters: float = 2.0
    bars: int = 0
    channel: int = 0


@dataclass(frozen=True)
class Phrase:
    """What was heard and what was answered."""

    notes_heard: int
    tempo_bpm: float
    notes_played: int


class Continuator:
    """The partner itself. ``hear`` may be called by any thread, ``tick`` and ``close`` by one; ``send`` is called under
    a lock by whichever of them it is.
    """

    def __init__(self, stream: NoteStream, settings: ContinuatorSettings, send: Callable[[Message], None]) -> None:
        self._stream, self.settings, self._send = stream, settings, send
        self._lock = threading.Lock()
        self._heard: list[HeardNote] = []
        self._held: dict[tuple[int, int], tuple[float, int]] = {}
        self._last_s = 0.0
        self._takes = 0  # how often the player has taken over; an answer made for an earlier time is void
        self._answered = True
        self._beat: Beat | None = None
        self._answer: Continuation | None = None
        self._next: Note | None = None
        self._followed: tuple[int, tuple[Beat, list[Note]] | None] | None = None
        """Of which take, and what it was in time; None where nothing can be said of it."""
        self._until_ticks: int | None = None
        self._sounding: list[tuple[float, int]] = []  # a heap of when notes end, and their pitches
        self._phrases: list[Phrase] = []

    @property
    def playing(self) -> bool:
        """Whether it is its turn; any thread."""
        return self._answer is not None

    @property
    def phrases(self) -> list[Phrase]:
        """All answers so far; any thread."""
        with self._lock:
            return list(self._phrases)

    def hear(self, data: bytes, now_s: float) -> None:
        """A message of the player's. A note ends the partner's turn before this returns."""
        message = decode(data)
        if message is None:
            return
        with self._lock:
            match message:
                case Message("note_on", channel, (pitch, velocity)):
                    if self._answer is not None or self._answered:
                        self._fall_silent()
                        self._heard, self._answered = [], False
                        self._held.clear()
                    self._takes += 1
                    self._end(channel, pitch, now_s)
                    self._held[channel, pitch] = now_s, velocity
                    self._last_s = now_s
                case Message("note_off", channel, (pitch, _)):
                    self._end(channel, pitch, now_s)
                case Message("control_change", channel, (number, _)) if number in (ALL_SOUND_OFF, ALL_NOTES_OFF):
                    for held_channel, pitch in list(self._held):
                        if held_channel == channel:
                            self._end(channel, pitch, now_s)

    def _end(self, channel: int, pitch: int, now_s: float) -> None:
        begun = self._held.pop((channel, pitch), None)
        if begun is not None:
            self._heard.append(HeardNote(begun[0], max(now_s, begun[0] + 0.001), pitch, begun[1]))
            del self._heard[:-MOST_NOTES]
            self._last_s = now_s

    def tick(self, now_s: float) -> float:
        """Do what is due; the seconds until there is something to do again, unless a message comes first."""
        with self._lock:
            while self._sounding and self._sounding[0][0] <= now_s:
                self._send(Message("note_off", self.settings.channel, (heapq.heappop(self._sounding)[1], 0)))
            if self._answer is None:
                ready = not self._answered and not self._held and now_s - self._last_s >= SHORTEST_SILENCE_S
                heard, takes = (sorted(self._heard, key=lambda note: note.start_s), self._takes) if ready else ([], 0)
            else:
                return self._play(now_s)
        if heard:
            self._consider(heard, takes, now_s)
        return IDLE_S

    def _consider(self, heard: list[HeardNote], takes: int, now_s: float) -> None:
        """Take over if the player has been silent long enough; reading what was played may take a while, unlocked."""
        if self._followed is None or self._followed[0] != takes:
            try:
                found = follow(heard) if len(heard) >= LEAST_NOTES else None
            except TempoError:
                found = None
            self._followed = takes, found
        if self._followed[1] is None:
            return
        beat, notes = self._followed[1]
        if now_s - self._last_s < self.settings.silence_quarters * beat.quarter_s:
            return
        # The next quarter that can still be met once the notes are read.
        soonest = beat.ticks(now_s + 0.002 * len(notes)) + 1
        entry = -(-int(soonest) // TICKS_PER_QUARTER) * TICKS_PER_QUARTER
        entry = max(entry, notes[-1].start_ticks + ENTRY_TICKS)
        answer = Continuation(
            self._stream, notes, entry, self.settings.sampling, self.settings.random_seed + len(self._phrases)
        )
        first = next(answer)
        with self._lock:
            if takes == self._takes:  # otherwise the player was faster
                self._beat, self._answer, self._next, self._answered = beat, answer, first, True
                bars = self.settings.bars
                self._until_ticks = entry + bars * 4 * TICKS_PER_QUARTER if bars else None
                self._phrases.append(Phrase(len(heard), round(beat.tempo_bpm, 1), 0))

    def _play(self, now_s: float) -> float:
        """Begin what is due; under the lock."""
        assert self._answer is not None and self._beat is not None and self._next is not None
        note, beat = self._next, self._beat
        if self._until_ticks is not None and note.start_ticks >= self._until_ticks:
            if not self._sounding:
                self._fall_silent()
            return self._sounding[0][0] - now_s if self._sounding else IDLE_S
        start_s = beat.time_s(note.start_ticks)
        if start_s <= now_s:
            self._begin(note.pitch, note.velocity, beat.time_s(note.end_ticks))
            self._phrases[-1] = replace(self._phrases[-1], notes_played=self._phrases[-1].notes_played + 1)
            self._next = next(self._answer)
            return 0.0
        return min([start_s, *(end for end, _ in self._sounding[:1])]) - now_s

    def _begin(self, pitch: int, velocity: int, end_s: float) -> None:
        if any(sounding == pitch for _, sounding in self._sounding):
            self._sounding = [item for item in self._sounding if item[1] != pitch]
            heapq.heapify(self._sounding)
            self._send(Message("note_off", self.settings.channel, (pitch, 0)))
        self._send(Message("note_on", self.settings.channel, (pitch, velocity)))
        heapq.heappush(self._sounding, (end_s, pitch))

    def _fall_silent(self) -> None:
        """End every note of its own, and its turn; under the lock."""
        for _, pitch in self._sounding:
            self._send(Message("note_off", self.settings.channel, (pitch, 0)))
        self._sounding = []
        self._answer = self._next = None

    def close(self) -> None:
        """Fall silent for good: every note ended one by one, and all notes off for whoever missed that."""
        with self._lock:
            self._fall_silent()
            self._answered, self._takes = True, self._takes + 1
            self._heard = []
            self._send(Message("control_change", self.settings.channel, (SUSTAIN_PEDAL, 0)))
            self._send(Message("control_change", self.settings.channel, (ALL_NOTES_OFF, 0)))
