"""MIDI bytes to a performance: every message means what the map says, and garbage means nothing."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mido
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import realtime.midi_ports
from realtime.bundle import DEFAULT_MODEL, DEMO_MIDI, Manifest, read_bundle
from realtime.controls import Performer
from realtime.midi import (
    KINDS,
    Message,
    MidiError,
    MidiMap,
    apply,
    controller_value,
    decode,
    encode,
    read_midi_file,
)
from realtime.midi_ports import InputPorts

MANIFEST = read_bundle(DEFAULT_MODEL).manifest
MAP = MidiMap()


@pytest.fixture
def performer() -> Performer:
    return Performer(MANIFEST)


def send(performer: Performer, *messages: bytes, midi_map: MidiMap = MAP) -> list[bool]:
    answers = []
    for data in messages:
        message = decode(data)
        answers.append(message is not None and apply(message, performer, midi_map))
    return answers


def mix(performer: Performer) -> dict[str, float]:
    return {style.id: weight for style, weight in performer.mix().items()}


def style_ids(manifest: Manifest = MANIFEST) -> list[str]:
    return [style.id for style in manifest.styles]


messages = st.one_of(
    [
        st.builds(
            Message,
            st.just(kind),
            st.integers(0, 15),
            st.tuples(*[st.integers(1 if kind == "note_on" else 0, 127)] * size),
        )
        for kind, size in KINDS.values()
    ]
)


@settings(max_examples=300)
@given(messages)
def test_decode_is_the_inverse_of_encode(message: Message) -> None:
    assert decode(encode(message)) == message


@settings(max_examples=300)
@given(messages)
def test_decode_agrees_with_mido(message: Message) -> None:
    theirs: Any = mido.Message.from_bytes(list(encode(message)))
    names = {"key_pressure": "polytouch", "channel_pressure": "aftertouch", "pitch_bend": "pitchwheel"}
    assert theirs.type == names.get(message.kind, message.kind)
    assert theirs.channel == message.channel


@settings(max_examples=500)
@given(st.binary(max_size=400))
def test_any_bytes_are_decoded_or_ignored_and_never_disturb(data: bytes) -> None:
    performer = Performer(MANIFEST)
    message = decode(data)
    if message is not None:
        assert len(data) == 1 + len(message.data)
        apply(message, performer, MAP)
    controls = performer.controls()
    assert sum(performer.mix().values()) == pytest.approx(1.0)
    assert 0.0 <= controls.dry_wet <= 1.0


@settings(max_examples=60)
@given(st.lists(messages, max_size=80))
def test_any_sequence_of_messages_leaves_a_valid_mix(sequence: list[Message]) -> None:
    performer = Performer(MANIFEST)
    for message in sequence:
        apply(message, performer, MAP)
    weights = performer.mix()
    assert sum(weights.values()) == pytest.approx(1.0)
    assert all(weight > 0 for weight in weights.values())
    for parameter in performer.parameters.values():
        assert parameter.minimum <= performer.values[parameter.id] <= parameter.maximum


def test_note_on_with_velocity_zero_is_a_note_off() -> None:
    assert decode(b"\x90\x3c\x00") == Message("note_off", 0, (60, 0))


@pytest.mark.parametrize(
    "data", [b"", b"\x3c\x40", b"\x90\x3c", b"\x90\x3c\x40\x00", b"\x90\x80\x40", b"\xf0\x01\xf7", b"\xf8", b"\xff"]
)
def test_garbage_and_system_messages_are_nothing(data: bytes) -> None:
    assert decode(data) is None


def test_program_change_selects_by_program_number_and_else_by_place(performer: Performer) -> None:
    assert send(performer, b"\xc0\x38") == [True]  # 56, trumpet
    assert mix(performer) == {"trumpet": 1.0}
    assert send(performer, b"\xc5\x02") == [True]  # nobody's program: the third of the file
    assert mix(performer) == {style_ids()[2]: 1.0}
    assert send(performer, b"\xc0\x7f") == [False]
    assert mix(performer) == {style_ids()[2]: 1.0}


def test_held_notes_blend_by_velocity_and_the_selected_style_comes_back(performer: Performer) -> None:
    first, second, _, fourth = style_ids()[:4]
    send(performer, b"\xc0\x34")
    send(performer, b"\x90\x24\x60", b"\x90\x27\x20")  # notes 36 and 39, velocities 96 and 32
    assert mix(performer) == {first: pytest.approx(0.75), fourth: pytest.approx(0.25)}
    send(performer, b"\x90\x25\x40", b"\x80\x27\x00")
    assert mix(performer) == {first: pytest.approx(0.6), second: pytest.approx(0.4)}
    send(performer, b"\x80\x24\x00", b"\x90\x25\x00")
    assert mix(performer) == {"choir": 1.0}


def test_notes_go_round_the_list_and_one_style_held_twice_adds_up(performer: Performer) -> None:
    count = len(style_ids())
    send(performer, bytes([0x90, 36, 30]), bytes([0x90, 36 + count, 30]), bytes([0x90, 35, 60]))
    assert mix(performer) == {style_ids()[0]: pytest.approx(0.5), style_ids()[-1]: pytest.approx(0.5)}


def test_the_sustain_pedal_holds_the_blend(performer: Performer) -> None:
    send(performer, b"\xb0\x40\x7f", b"\x90\x25\x40", b"\x80\x25\x00")
    assert mix(performer) == {style_ids()[1]: 1.0}
    send(performer, b"\xb0\x40\x00")
    assert mix(performer) == {style_ids()[0]: 1.0}


@pytest.mark.parametrize("controller", [120, 121, 123])
def test_all_notes_off_and_reset_let_go(performer: Performer, controller: int) -> None:
    send(performer, b"\xb0\x40\x7f", b"\x90\x25\x40", b"\x90\x26\x40", b"\x80\x26\x00", bytes([0xB0, controller, 0]))
    assert mix(performer) == {style_ids()[0]: 1.0}


def test_reset_lifts_the_pedal_as_well(performer: Performer) -> None:
    send(performer, b"\xb0\x40\x7f", b"\xb0\x79\x00", b"\x90\x25\x40", b"\x80\x25\x00")
    assert mix(performer) == {style_ids()[0]: 1.0}


def test_morph_moves_from_the_selected_to_the_second_style(performer: Performer) -> None:
    send(performer, b"\xc0\x28", b"\xb0\x03\x34", b"\xb0\x01\x00")
    assert mix(performer) == {"violin": 1.0}
    send(performer, bytes([0xB0, 1, 127]))
    assert mix(performer) == {"choir": 1.0}
    send(performer, bytes([0xB0, 1, 32]))
    assert mix(performer) == {"violin": pytest.approx(1 - 32 / 127), "choir": pytest.approx(32 / 127)}


@pytest.mark.parametrize(
    ("controller", "parameter", "values"),
    [
        (12, "dry_wet", {0: 0.0, 127: 1.0}),
        (13, "input_gain_db", {0: -24.0, 64: 0.0, 127: 24.0}),
        (7, "output_gain_db", {0: -60.0, 64: 0.0, 127: 12.0}),
    ],
)
def test_controllers_reach_both_ends_and_the_middle_of_their_range(
    performer: Performer, controller: int, parameter: str, values: dict[int, float]
) -> None:
    for value, expected in values.items():
        send(performer, bytes([0xB3, controller, value]))
        assert performer.values[parameter] == pytest.approx(expected)
        assert getattr(performer.controls(), parameter) == pytest.approx(expected)


@given(st.integers(0, 126), st.sampled_from(["dry_wet", "input_gain_db", "output_gain_db", "morph"]))
def test_controllers_are_monotonic(value: int, parameter: str) -> None:
    performer = Performer(MANIFEST)
    assert controller_value(value, performer, parameter) < controller_value(value + 1, performer, parameter)


def test_a_map_may_listen_to_one_channel_and_move_controllers(tmp_path: Path, performer: Performer) -> None:
    path = tmp_path / "pads.toml"
    path.write_text("channel = 2\nfirst_note = 60\n[controllers]\ndry_wet = 20\n")
    midi_map = MidiMap.load(path)
    assert send(performer, b"\xc0\x38", b"\xb2\x14\x00", b"\x92\x3d\x40", midi_map=midi_map) == [False, True, True]
    assert performer.values["dry_wet"] == 0.0
    assert mix(performer) == {style_ids()[1]: 1.0}


OF_SOURCES = {"intensity": 11, "drone": 69}


def test_a_map_keeps_every_controller_that_it_does_not_name(tmp_path: Path, performer: Performer) -> None:
    path = tmp_path / "pads.toml"
    path.write_text("[controllers]\ndry_wet = 20\noutput_gain_db = -1\n")
    midi_map = MidiMap.load(path)
    assert midi_map.controllers == {"morph": 1, "output_gain_db": -1, "dry_wet": 20, "input_gain_db": 13} | OF_SOURCES
    moves = send(performer, b"\xb0\x14\x00", b"\xb0\x0d\x7f", b"\xb0\x07\x00", b"\xb0\x0c\x40", midi_map=midi_map)
    assert moves == [True, True, False, False]
    assert performer.values["dry_wet"] == 0.0 and performer.values["input_gain_db"] == 24.0
    assert performer.values["output_gain_db"] == 0.0


def test_the_map_that_the_readme_shows_does_what_it_says(tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    path = tmp_path / "pads.toml"
    path.write_text(re.findall(r"```toml\n(.*?)```", readme, re.DOTALL)[0])
    assert MidiMap.load(path) == MidiMap(
        9, 60, 22, {"morph": 21, "output_gain_db": -1, "dry_wet": 20, "input_gain_db": 13} | OF_SOURCES
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("chanel = 1", r"chanel: is no key of a map; did you mean channel\?"),
        ("channel = 16", r"channel: 16 is outside 0\.\.15"),
        ('first_note = "C3"', "first_note"),
        ("[controllers]\ndry_wet = 130", r"controllers\.dry_wet: controller 130 is outside"),
        (
            "[controllers]\ndry_wet = 3",
            r"controllers\.dry_wet: controller 3 is that of second_style_controller already",
        ),
        ("[controllers]\ndry_wet = 7", r"controllers\.dry_wet: controller 7 is that of controllers\.output_gain_db"),
        ("[controllers]\nmorph = 64", r"controllers\.morph: controller 64 is the sustain pedal's"),
        ("[controllers]\ndry_wat = 20", r"controllers\.dry_wat: is no parameter; did you mean dry_wet\?"),
        ("[controllers]\nreverb = 20", r"controllers\.reverb: is no parameter; there are: dry_wet, input_gain_db"),
        ('[controllers]\ndry_wet = "20"', "controllers"),
        ("controllers = 3", "controllers"),
        ("channel =", "Invalid value"),
    ],
)
def test_a_wrong_map_names_file_and_field(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "map.toml"
    path.write_text(text)
    with pytest.raises(MidiError, match=problem) as error:
        MidiMap.load(path)
    assert str(error.value).startswith(f"{path}: ")


def test_the_bundled_file_switches_blends_and_morphs(performer: Performer) -> None:
    events = read_midi_file(DEMO_MIDI)
    assert events == sorted(events, key=lambda event: event[0])
    sizes, styles = set(), set()
    for _, data in events:
        send(performer, data)
        sizes.add(len(performer.mix()))
        styles |= set(mix(performer))
    assert sizes == {1, 2, 3} and len(styles) >= 6
    assert 15 < events[-1][0] < 19.6


@pytest.mark.parametrize("content", [b"", b"RIFFxxxx", b"MThd\x00\x00\x00\x06\x00\x01"])
def test_a_file_that_is_no_midi_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "song.mid"
    path.write_bytes(content)
    with pytest.raises(MidiError, match=r"song\.mid: is not a standard MIDI file"):
        read_midi_file(path)
    with pytest.raises(MidiError, match=r"missing\.mid: there is no such file"):
        read_midi_file(tmp_path / "missing.mid")


class Sequencer:
    """What RtMidi shows of an ALSA sequencer, as far as inputs need it; ``ports`` may change at any time."""

    API_RTMIDI_DUMMY, LINUX_ALSA = 0, 2

    def __init__(self, *ports: str) -> None:
        self.ports = list(ports)
        self.listeners: dict[str, Client] = {}

    def get_compiled_api(self) -> list[int]:
        return [self.LINUX_ALSA]

    def get_api_display_name(self, _: int) -> str:
        return "ALSA"

    def MidiIn(self, _: int, name: str, queue_size_limit: int = 0) -> Any:  # noqa: N802 - RtMidi's name
        del queue_size_limit
        return Client(self, name)

    def send(self, port: str, *messages: bytes) -> None:
        """Returns once all of it was heard."""
        listener = self.listeners[port]
        listener.empty.clear()
        listener.queue.extend(messages)
        assert listener.empty.wait(20)


class Client:
    def __init__(self, sequencer: Sequencer, name: str) -> None:
        self._sequencer, self.name = sequencer, name
        self._port = ""
        self.queue: deque[bytes] = deque()
        self.empty = threading.Event()

    def get_ports(self) -> list[str]:
        return list(self._sequencer.ports)

    def open_port(self, place: int, _: str) -> None:
        self._port = self._sequencer.ports[place]
        self._sequencer.listeners[self._port] = self

    def open_virtual_port(self, name: str) -> None:
        self._port = f"{self.name}:{name}"
        self._sequencer.listeners[self._port] = self

    def get_message(self) -> tuple[bytes, float] | None:
        if self.queue:
            return self.queue.popleft(), 0.0
        self.empty.set()
        return None

    def ignore_types(self, **_: bool) -> None: ...

    def close_port(self) -> None:
        self._sequencer.listeners.pop(self._port, None)

    def delete(self) -> None: ...


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_port_that_goes_away_lets_go_of_its_notes_and_is_found_again_at_another_address(
    monkeypatch: pytest.MonkeyPatch, performer: Performer
) -> None:
    sequencer = Sequencer("keys:keys MIDI 1 20:0", "pads:pads MIDI 1 24:0")
    monkeypatch.setattr(realtime.midi_ports, "_library", lambda: sequencer)
    received: list[bytes] = []

    def on_message(data: bytes) -> None:
        received.append(data)
        send(performer, data)

    inputs = InputPorts("pads", on_message)
    try:
        assert inputs.names == ["pads:pads MIDI 1 24:0 (ALSA)"]
        held = b"\xb2\x40\x7f", b"\x92\x25\x40", b"\x92\x26\x40", b"\x82\x26\x00"
        sequencer.send("pads:pads MIDI 1 24:0", *held)
        assert set(mix(performer)) == {style_ids()[1], style_ids()[2]}
        sequencer.ports.remove("pads:pads MIDI 1 24:0")
        wait_for(lambda: len(received) == 6)
        assert received == [*held, b"\x82\x25\x00", b"\xb2\x40\x00"]
        assert mix(performer) == {style_ids()[0]: 1.0} and inputs.names == []
        sequencer.ports += ["synth:out 28:0", "pads:pads MIDI 1 32:0"]
        wait_for(lambda: inputs.names == ["pads:pads MIDI 1 32:0 (ALSA)"])
        sequencer.send("pads:pads MIDI 1 32:0", b"\x92\x27\x40")
        assert mix(performer) == {style_ids()[3]: 1.0}
    finally:
        inputs.close()
    assert not sequencer.listeners


def test_where_all_ports_are_wanted_a_new_one_is_opened_and_the_others_keep_their_notes(
    monkeypatch: pytest.MonkeyPatch, performer: Performer
) -> None:
    sequencer = Sequencer("keys 20:0")
    monkeypatch.setattr(realtime.midi_ports, "_library", lambda: sequencer)

    def perform(data: bytes) -> None:
        send(performer, data)

    inputs = InputPorts(None, perform)
    virtual = "virtual port 'restyle-midi' (ALSA)"
    try:
        assert inputs.names == [virtual, "keys 20:0 (ALSA)"]
        sequencer.ports += ["Midi Through 14:0", "restyle-midi-2 30:0", "pads 24:0"]
        wait_for(lambda: inputs.names == [virtual, "keys 20:0 (ALSA)", "pads 24:0 (ALSA)"])
        sequencer.send("keys 20:0", b"\x90\x25\x40")
        sequencer.send("pads 24:0", b"\x90\x26\x40")
        sequencer.ports.remove("keys 20:0")
        wait_for(lambda: len(inputs.names) == 2)
        wait_for(lambda: mix(performer) == {style_ids()[2]: 1.0})
    finally:
        inputs.close()
