"""Real MIDI ports: what another program sends through a JACK server arrives, whole and in order."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from realtime.bundle import DEFAULT_MODEL, read_bundle
from realtime.controls import Performer
from realtime.jack_server import JackServer
from realtime.midi import KINDS, Message, MidiError, MidiMap, apply, decode, encode
from realtime.midi_inputs import MidiInputs
from realtime.midi_ports import list_ports

pytestmark = pytest.mark.jack

PATIENCE_S = 30.0


@pytest.fixture
def new_output(jack_server: JackServer) -> Callable[[str], Any]:
    """Makes clients that send through RtMidi's JACK API."""
    del jack_server
    import rtmidi

    library: Any = rtmidi
    return lambda name: library.MidiOut(library.API_UNIX_JACK, name=name)


@pytest.fixture
def outputs(new_output: Callable[[str], Any]) -> Iterator[Callable[[str], Any]]:
    """Opens outputs called 'NAME:out', as other programs would."""
    clients: list[Any] = []

    def open_output(name: str) -> Any:
        client = new_output(name)
        clients.append(client)
        client.open_virtual_port("out")
        return client

    yield open_output
    for client in clients:
        client.close_port()
        client.delete()


def await_count(received: Sized, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while len(received) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def every_kind(count: int) -> list[bytes]:
    """``count`` messages, each different from its neighbours, of all kinds and channels."""
    kinds = list(KINDS.values())
    built = []
    for i in range(count):
        kind, size = kinds[i % len(kinds)]
        data = (1 + i % 127, 1 + i // 127)[:size]
        built.append(encode(Message(kind, i % 16, data)))
    return built


def send_all(output: Any, messages: list[bytes]) -> None:
    for i, message in enumerate(messages):
        output.send_message(message)
        if i % 50 == 49:
            time.sleep(0.005)  # RtMidi's own queue is short


def first_messages(output: Any, received: list[bytes]) -> None:
    """Wait until the connection, which takes effect a few periods after it was made, carries messages."""
    deadline = time.monotonic() + PATIENCE_S
    while not received:
        assert time.monotonic() < deadline, "nothing arrives"
        output.send_message([0xD0, 0])
        time.sleep(0.05)
    time.sleep(0.2)
    received.clear()


@pytest.mark.parametrize("wanted", ["0", "1", "PAD"])
def test_a_port_chosen_by_index_or_part_of_its_name_delivers_in_order(
    outputs: Callable[[str], Any], wanted: str
) -> None:
    by_name = {"keys:out": outputs("keys"), "nanopad:out": outputs("nanopad")}
    ports = [name for _, name in list_ports()]
    assert sorted(ports) == sorted(by_name)
    chosen = ports[int(wanted)] if wanted.isdigit() else "nanopad:out"
    received: list[bytes] = []
    inputs = MidiInputs(wanted, received.append)
    try:
        assert inputs.names == [f"{chosen} (Jack)"]
        first_messages(by_name[chosen], received)
        messages = every_kind(1000)
        for name, output in by_name.items():
            send_all(output, messages if name == chosen else [bytes([0x90, 1, 1])])
        await_count(received, len(messages))
        assert received == messages
    finally:
        inputs.close()


def test_the_virtual_port_and_every_port_there_is(
    new_output: Callable[[str], Any], outputs: Callable[[str], Any]
) -> None:
    received: list[bytes] = []
    inputs = MidiInputs("virtual", received.append)
    sender = new_output("sender")
    try:
        assert [name for _, name in list_ports("output")] == ["restyle-midi:in"]
        sender.open_port(0, "out")
        first_messages(sender, received)
        system = [[0xF0, *[0x11] * 298, 0xF7], [0xF8], [0xFE], [0xF2, 1, 2]]
        for message in system:
            sender.send_message(message)
        messages = every_kind(300)
        send_all(sender, messages)
        await_count(received, len(messages) + 1)
        # System-exclusive, clock and active sensing stay outside; the song position comes through, and means nothing.
        assert received == [bytes([0xF2, 1, 2]), *messages] and decode(received[0]) is None
    finally:
        sender.close_port()
        sender.delete()
        inputs.close()
    assert list_ports("output") == []

    received.clear()
    keys, pads = outputs("keys"), outputs("pads")
    inputs = MidiInputs(None, received.append)
    try:
        assert len(inputs.names) == 3 and "virtual" in inputs.names[0]
        for output in (keys, pads):
            first_messages(output, received)
    finally:
        inputs.close()


@pytest.mark.parametrize("wanted", ["0", "virtual", None], ids=["one port", "virtual", "all ports"])
def test_a_process_that_dies_lets_go_of_what_was_held_and_another_one_listens(
    new_output: Callable[[str], Any], outputs: Callable[[str], Any], wanted: str | None
) -> None:
    received: list[bytes] = []
    told: list[str] = []
    keys = new_output("sender") if wanted == "virtual" else outputs("keys")
    inputs = MidiInputs(wanted, received.append, on_trouble=told.append)
    try:
        if wanted == "virtual":
            keys.open_port(0, "out")
        names = inputs.names
        first_messages(keys, received)
        held = [bytes([0x91, 60, 9]), bytes([0x91, 61, 9]), bytes([0xB1, 64, 127]), bytes([0x81, 60, 0])]
        send_all(keys, held)
        await_count(received, len(held))
        assert inputs.pid is not None
        os.kill(inputs.pid, signal.SIGKILL)
        await_count(received, len(held) + 2)
        assert received == [*held, bytes([0x81, 61, 0]), bytes([0xB1, 64, 0])]
        await_count(told, 2)
        assert told[0] == "the process of MIDI died (exit code -9); another one is started"
        assert told[1].startswith(f"MIDI is heard again: {', '.join(names)}")
        assert ("virtual port must be again" in told[1]) == (wanted == "virtual")
        if wanted == "virtual":
            keys.close_port()
            keys.open_port(0, "out")
        first_messages(keys, received)
        assert inputs.names == names and inputs.restarts == 1
    finally:
        inputs.close()
        if wanted == "virtual":
            keys.close_port()
            keys.delete()


@contextmanager
def flood(output: Any) -> Iterator[None]:
    """A thousand messages a second."""
    over = threading.Event()

    def keep_sending() -> None:
        while not over.is_set():
            output.send_message([0xB0, 1, 64])
            time.sleep(0.001)

    sender = threading.Thread(target=keep_sending)
    sender.start()
    try:
        yield
    finally:
        over.set()
        sender.join()


def test_a_process_that_dies_under_a_flood_is_replaced_again_and_again(outputs: Callable[[str], Any]) -> None:
    """The next one hears messages from the moment that its port is open."""
    keys = outputs("keys")
    received: list[bytes] = []
    told: list[str] = []
    inputs = MidiInputs("keys", received.append, on_trouble=told.append)
    try:
        with flood(keys):
            for time_killed in (1, 2, 3):
                await_count(received, 100)
                assert inputs.pid is not None
                os.kill(inputs.pid, signal.SIGKILL)
                await_count(told, 2 * time_killed)
                assert told[-1].startswith("MIDI is heard again")
                received.clear()
            await_count(received, 100)
        assert inputs.restarts == 3 and len(received) >= 100
    finally:
        inputs.close()


def test_ending_under_a_flood_takes_seconds_at_most_and_leaves_no_process(outputs: Callable[[str], Any]) -> None:
    keys = outputs("keys")
    received: list[bytes] = []
    inputs = MidiInputs("keys", received.append)
    with flood(keys):
        await_count(received, 100)
        inputs.close()
    assert inputs.pid is not None and not Path(f"/proc/{inputs.pid}").exists() and len(received) >= 100


def test_a_port_that_does_not_exist_is_refused_with_the_list(outputs: Callable[[str], Any]) -> None:
    for name in ("nanopad", "launchpad"):
        outputs(name)
    with pytest.raises(
        MidiError, match=r"no MIDI port is called 'organ'; there are: 0: .*pad:out \(Jack\); 1: .*'virtual'"
    ):
        MidiInputs("organ", lambda _: None)
    with pytest.raises(MidiError, match=r"MIDI port 2 does not exist; there are: 0: "):
        MidiInputs("2", lambda _: None)
    with pytest.raises(MidiError, match=r"'pad' fits several MIDI ports, give the index: 0: "):
        MidiInputs("pad", lambda _: None)


def test_from_a_key_to_the_style_mix(outputs: Callable[[str], Any]) -> None:
    manifest = read_bundle(DEFAULT_MODEL).manifest
    performer, taken = Performer(manifest), list[bytes]()

    def on_message(data: bytes) -> None:
        message = decode(data)
        if message is not None:
            apply(message, performer, MidiMap())
        taken.append(data)

    keys = outputs("keys")
    inputs = MidiInputs("keys", on_message)

    def send(*messages: list[int]) -> dict[str, float]:
        taken.clear()
        for message in messages:
            keys.send_message(message)
        await_count(taken, len(messages))
        return {style.id: weight for style, weight in performer.mix().items()}

    try:
        first_messages(keys, taken)
        assert send([0xC0, manifest.style("flute").program]) == {"flute": 1.0}
        one, two = manifest.styles[0].id, manifest.styles[1].id
        assert send([0x90, 36, 75], [0x90, 37, 25]) == {one: 0.75, two: 0.25}
        assert send([0x80, 36, 0], [0x90, 37, 0]) == {"flute": 1.0}
        send([0xB0, 12, 0], [0xB0, 7, 64])
        assert performer.values["dry_wet"] == 0.0 and performer.values["output_gain_db"] == 0.0
    finally:
        inputs.close()


def test_a_port_that_comes_later_and_one_that_comes_back_are_heard(
    new_output: Callable[[str], Any], outputs: Callable[[str], Any]
) -> None:
    received: list[bytes] = []
    inputs = MidiInputs(None, received.append)
    try:
        assert len(inputs.names) == 1
        for turn in range(2):
            pads = new_output("pads")
            pads.open_virtual_port("out")
            first_messages(pads, received)
            assert inputs.names[1:] == ["pads:out (Jack)"]
            pads.send_message([0x93, 40 + turn, 99])
            await_count(received, 1)
            pads.close_port()
            pads.delete()
            await_count(received, 2)
            assert received == [bytes([0x93, 40 + turn, 99]), bytes([0x83, 40 + turn, 0])]
            received.clear()
        assert len(inputs.names) == 1
    finally:
        inputs.close()
    keys = outputs("keys")
    inputs = MidiInputs("keys", received.append)
    try:
        first_messages(keys, received)
    finally:
        inputs.close()


def test_inputs_that_follow_others_listen_to_the_same_port_also_while_it_is_away(
    new_output: Callable[[str], Any], outputs: Callable[[str], Any]
) -> None:
    """An index or a part of a name would choose anew, and a port that is away would be none."""
    received: list[bytes] = []
    pads = new_output("pads")
    pads.open_virtual_port("out")
    before = MidiInputs("0", received.append)
    before.close()
    pads.close_port()
    pads.delete()
    outputs("zither")
    inputs = MidiInputs(before.wanted, received.append)
    try:
        assert inputs.names == [] and inputs.uses_jack
        first_messages(outputs("pads"), received)
        assert inputs.names == ["pads:out (Jack)"]
    finally:
        inputs.close()
