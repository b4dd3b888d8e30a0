"""The partner: it takes over in time when the player stops, falls silent at the next note, and leaves none hanging."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realtime.bundle import COMPOSER_MODEL, read_bundle
from realtime.compose import NoteStream, Sampling
from realtime.continuator import Continuator, ContinuatorSettings
from realtime.midi import ALL_NOTES_OFF, Message, decode, encode
from realtime.notes import Note, pitch_classes
from realtime.tunes import read_tune
from tests.conftest import JackServer

ROOT = Path(__file__).parent.parent
JIG = read_tune(Path(__file__).parent / "data" / "sligo_jig.mid").notes[:24]
QUARTER_S = 0.4
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def stream() -> NoteStream:
    return NoteStream(read_bundle(COMPOSER_MODEL))


def playing(notes: tuple[Note, ...], quarter_s: float = QUARTER_S, begin_s: float = 0.0) -> list[tuple[float, bytes]]:
    """What a player's keyboard sends, in order of time."""
    messages = []
    for note in notes:
        start_s = begin_s + note.start_ticks * quarter_s / 24
        end_s = start_s + 0.9 * note.duration_ticks * quarter_s / 24
        messages.append((start_s, encode(Message("note_on", 0, (note.pitch, note.velocity)))))
        messages.append((end_s, encode(Message("note_off", 0, (note.pitch, 0)))))
    return sorted(messages)


@dataclass
class Stage:
    """A partner on a clock of its own, and all that it sent with its time."""

    partner: Continuator
    sent: list[tuple[float, Message]]
    now_s: float = 0.0
    waiting: list[tuple[float, bytes]] = field(default_factory=list)

    def run_until(self, end_s: float) -> None:
        """Let time pass in steps of a millisecond."""
        while self.now_s < end_s:
            while self.waiting and self.waiting[0][0] <= self.now_s:
                self.partner.hear(self.waiting.pop(0)[1], self.now_s)
            self.partner.tick(self.now_s)
            self.now_s += 0.001

    def begun(self) -> list[tuple[float, int]]:
        return [(at, message.data[0]) for at, message in self.sent if message.kind == "note_on"]


def stage(stream: NoteStream, **settings: Any) -> Stage:
    made: Stage
    sent: list[tuple[float, Message]] = []
    partner = Continuator(stream, ContinuatorSettings(**settings), lambda message: sent.append((made.now_s, message)))
    made = Stage(partner, sent)
    return made


def hanging(messages: list[Message]) -> set[int]:
    """Notes that were begun and not ended, each in its order."""
    on: set[int] = set()
    for message in messages:
        if message.kind == "note_on":
            assert message.data[0] not in on, "a pitch begins twice"
            on.add(message.data[0])
        elif message.kind == "note_off":
            on.discard(message.data[0])
    return on


def test_it_takes_over_on_a_beat_of_the_tempo_it_heard(stream: NoteStream) -> None:
    scene = stage(stream)
    scene.waiting = playing(JIG)
    last_s = scene.waiting[-1][0]
    scene.run_until(last_s + 0.7)
    assert not scene.sent, "two quarters have not passed"
    scene.run_until(last_s + 8.0)
    begun = scene.begun()
    assert len(begun) >= 4
    assert last_s + 2 * QUARTER_S <= begun[0][0] <= last_s + 4 * QUARTER_S
    quarters = begun[0][0] / QUARTER_S
    assert abs(quarters - round(quarters)) * QUARTER_S < 0.02
    places = np.array([at for at, _ in begun]) / QUARTER_S * 24
    assert np.abs(places - np.round(places)).max() * QUARTER_S / 24 < 0.009
    phrase = scene.partner.phrases[0]
    assert phrase.notes_heard == len(JIG) and phrase.tempo_bpm == pytest.approx(150.0, rel=0.01)
    assert phrase.notes_played == len(begun)


def test_the_next_note_of_the_player_ends_every_note_at_once(stream: NoteStream) -> None:
    scene = stage(stream)
    scene.waiting = playing(JIG)
    scene.run_until(scene.waiting[-1][0] + 3.0)
    assert scene.partner.playing
    before = len(scene.sent)
    scene.partner.hear(encode(Message("note_on", 0, (60, 90))), scene.now_s)
    assert not scene.partner.playing
    assert all(message.kind == "note_off" for _, message in scene.sent[before:])
    assert not hanging([message for _, message in scene.sent])
    scene.run_until(scene.now_s + 5.0)
    assert len(scene.begun()) == len([1 for _, m in scene.sent[:before] if m.kind == "note_on"]), "a key is held"


def test_a_second_phrase_is_answered_in_its_own_tempo(stream: NoteStream) -> None:
    scene = stage(stream)
    scene.waiting = playing(JIG)
    scene.run_until(scene.waiting[-1][0] + 4.0)
    scene.waiting = playing(JIG, 0.5, scene.now_s)
    scene.run_until(scene.waiting[-1][0] + 4.0)
    tempi = [phrase.tempo_bpm for phrase in scene.partner.phrases]
    assert tempi == [pytest.approx(150.0, rel=0.02), pytest.approx(120.0, rel=0.02)]


def test_few_notes_a_held_key_and_a_controller_are_no_phrase(stream: NoteStream) -> None:
    scene = stage(stream)
    scene.waiting = playing(JIG[:3])
    scene.run_until(6.0)
    assert not scene.sent
    scene = stage(stream)
    scene.waiting = playing(JIG)[:-1]
    scene.run_until(20.0)
    assert not scene.sent, "the last key is still down"
    scene.partner.hear(encode(Message("control_change", 0, (ALL_NOTES_OFF, 0))), scene.now_s)
    scene.run_until(scene.now_s + 3.0)
    assert scene.sent


def test_it_rests_after_its_bars_until_the_player_has_played_again(stream: NoteStream) -> None:
    scene = stage(stream, bars=1)
    scene.waiting = playing(JIG)
    last_s = scene.waiting[-1][0]
    scene.run_until(last_s + 20.0)
    first, last = scene.begun()[0][0], scene.begun()[-1][0]
    assert last - first < 4 * QUARTER_S + 0.02
    assert not scene.partner.playing and not hanging([message for _, message in scene.sent])
    scene.waiting = playing(JIG, begin_s=scene.now_s)
    scene.run_until(scene.waiting[-1][0] + 4.0)
    assert len(scene.partner.phrases) == 2


def test_the_same_playing_and_random_seed_give_the_same_answer_in_key(stream: NoteStream) -> None:
    answers = []
    for seed in (1, 1, 2):
        sampling = Sampling(scale=pitch_classes("E dorian"))
        scene = stage(stream, sampling=sampling, random_seed=seed)
        scene.waiting = playing(JIG)
        scene.run_until(scene.waiting[-1][0] + 6.0)
        answers.append([pitch for _, pitch in scene.begun()])
        assert {pitch % 12 for pitch in answers[-1]} <= pitch_classes("E dorian")
    assert answers[0] == answers[1] != answers[2]


def test_closing_ends_every_note(stream: NoteStream) -> None:
    scene = stage(stream)
    scene.waiting = playing(JIG)
    scene.run_until(scene.waiting[-1][0] + 3.0)
    scene.partner.close()
    messages = [message for _, message in scene.sent]
    assert not hanging(messages)
    assert messages[-1] == Message("control_change", 0, (ALL_NOTES_OFF, 0))


# -- through real ports -----------------------------------------------------------------------------------------------


@dataclass
class Band:
    """The command in a process of its own, a keyboard that it listens to, and what comes out of its port."""

    process: subprocess.Popen[str]
    keyboard: Any
    received: list[tuple[float, Message]]

    def play(self, notes: tuple[Note, ...]) -> None:
        begin_s = time.monotonic()
        for at_s, data in playing(notes, begin_s=begin_s):
            time.sleep(max(0.0, at_s - time.monotonic()))
            self.keyboard.send_message(list(data))

    def await_notes(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while sum(message.kind == "note_on" for _, message in list(self.received)) < count:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, f"it does not play: {self.received}"
            time.sleep(0.01)

    def end(self) -> tuple[int, dict[str, Any]]:
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=PATIENCE_S)
        time.sleep(0.2)
        return self.process.returncode, json.loads(out)


@pytest.fixture
def band(jack_server: JackServer) -> Iterator[Band]:
    del jack_server
    import rtmidi

    library: Any = rtmidi
    keyboard = library.MidiOut(library.API_UNIX_JACK, name="keys")
    keyboard.open_virtual_port("out")
    ear = library.MidiIn(library.API_UNIX_JACK, name="synth")
    ear.open_virtual_port("in")
    received: list[tuple[float, Message]] = []

    def on_message(event: tuple[list[int], float], _: object) -> None:
        message = decode(event[0])
        if message is not None:
            received.append((time.monotonic(), message))

    ear.set_callback(on_message)
    command = "from realtime.compose_cli import compose; import typer; typer.run(compose)"
    arguments = ["--live", "--input", "keys", "--output", "synth", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        assert "listens to keys:out" in process.stderr.readline()
        time.sleep(0.5)  # a connection takes effect a few periods after it was made
        yield Band(process, keyboard, received)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
        ear.cancel_callback()
        for client in (keyboard, ear):
            client.close_port()
            client.delete()


@pytest.mark.jack
def test_through_ports_it_answers_stops_at_the_next_note_and_leaves_nothing_hanging(band: Band) -> None:
    band.play(JIG[:12])
    band.await_notes(3)
    again_s = time.monotonic()
    band.keyboard.send_message(list(encode(Message("note_on", 0, (60, 90)))))
    time.sleep(1.0)
    late = [message for at, message in band.received if message.kind == "note_on" and at > again_s + 0.5]
    assert not late and not hanging([message for _, message in band.received])
    band.keyboard.send_message(list(encode(Message("note_off", 0, (60, 0)))))
    band.play(JIG[12:24])
    heard = sum(message.kind == "note_on" for _, message in band.received)
    band.await_notes(heard + 2)
    code, figures = band.end()
    assert code == 0
    assert len(figures["phrases"]) == 2 and figures["output"] == "synth:in (Jack)"
    messages = [message for _, message in band.received]
    assert not hanging(messages)
    assert messages[-1] == Message("control_change", 0, (ALL_NOTES_OFF, 0))
