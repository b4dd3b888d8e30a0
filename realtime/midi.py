"""MIDI: ports, decoding, and the map from messages to the performance."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import threading
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import dacite

from realtime.audio import quiet_libraries, silence_jack
from realtime.controls import PARAMETERS, SOURCE_PARAMETERS, Performer

logger = logging.getLogger(__name__)

CLIENT_NAME = "restyle-midi"
"""Not the audio client's name: a JACK server would give the later of the two another one."""
VIRTUAL = "virtual"
LOOK_INTERVAL_S = 0.5
FETCH_INTERVAL_S = 0.001
FETCHED, QUEUED = 256, 16_384
"""Messages of one port that are heard before the next port has its turn; messages that wait at most."""
STOP_TIMEOUT_S = 2.0
QUIET_S = 0.3
"""RtMidi crashes when it closes a JACK port in a period that has messages: so long after the last one, none come."""

DRAIN_S = 0.05
"""What an output's queue needs to empty: several periods of a JACK server."""


class MidiError(RuntimeError):
    """A MIDI port, file or map that cannot be used; the text lists what there is or names the field."""


@dataclass(frozen=True)
class Message:
    """One channel message; ``data`` has the number of bytes that its kind has in ``KINDS``."""

    kind: str
    channel: int
    data: tuple[int, ...]


KINDS: dict[int, tuple[str, int]] = {
    0x8: ("note_off", 2),
    0x9: ("note_on", 2),
    0xA: ("key_pressure", 2),
    0xB: ("control_change", 2),
    0xC: ("program_change", 1),
    0xD: ("channel_pressure", 1),
    0xE: ("pitch_bend", 2),
}
"""High four bits of the status byte -> kind and number of data bytes (MIDI 1.0 Detailed Specification, table 1)."""


def decode(data: Sequence[int]) -> Message | None:
    """One whole message as a driver delivers it -> Message; None for system messages and garbage, never an error."""
    if not data or not 0x80 <= data[0] < 0xF0:
        return None
    kind, size = KINDS[data[0] >> 4]
    if len(data) != 1 + size or any(not 0 <= byte <= 0x7F for byte in data[1:]):
        return None
    values = tuple(int(byte) for byte in data[1:])
    if kind == "note_on" and values[1] == 0:
        kind = "note_off"
    return Message(kind, data[0] & 0x0F, values)


def encode(message: Message) -> bytes:
    """The bytes of a channel message; the inverse of ``decode``."""
    status = next(high for high, (kind, _) in KINDS.items() if kind == message.kind)
    return bytes([status << 4 | message.channel, *message.data])


SUSTAIN_PEDAL, ALL_SOUND_OFF, RESET_CONTROLLERS, ALL_NOTES_OFF = 64, 120, 121, 123
DEFAULT_CONTROLLERS = {
    "morph": 1,
    "output_gain_db": 7,
    "dry_wet": 12,
    "input_gain_db": 13,
    "intensity": 11,
    "drone": 69,
}


@dataclass(frozen=True)
class MidiMap:
    """Which message moves what. ``channel`` -1 listens to all; controllers map parameter id -> number, -1 for none.

    ValueError names a field that is wrong.
    """

    channel: int = -1
    first_note: int = 36
    second_style_controller: int = 3
    controllers: dict[str, int] = field(default_factory=lambda: dict(DEFAULT_CONTROLLERS))

    def __post_init__(self) -> None:
        known = [parameter.id for parameter in (*PARAMETERS, *SOURCE_PARAMETERS)]
        for name in self.controllers:
            if name not in known:
                raise ValueError(f"controllers.{name}: is no parameter; {_near(name, known)}")
        numbers = {"second_style_controller": self.second_style_controller}
        numbers |= {f"controllers.{name}": number for name, number in self.controllers.items()}
        taken: dict[int, str] = {}
        for name, number in numbers.items():
            if not -1 <= number < ALL_SOUND_OFF:
                raise ValueError(f"{name}: controller {number} is outside 0..{ALL_SOUND_OFF - 1} (-1 for none)")
            if number == SUSTAIN_PEDAL:
                raise ValueError(f"{name}: controller {number} is the sustain pedal's; choose another")
            if number in taken:
                raise ValueError(
                    f"{name}: controller {number} is that of {taken[number]} already; "
                    f"give one of them another number, or -1 for none"
                )
            if number >= 0:
                taken[number] = name
        if not -1 <= self.channel <= 15:
            raise ValueError(f"channel: {self.channel} is outside 0..15 (-1 for all)")
        if not 0 <= self.first_note <= 127:
            raise ValueError(f"first_note: {self.first_note} is outside 0..127")

    @classmethod
    def load(cls, path: Path) -> MidiMap:
        """Read a TOML map; what it leaves out, each controller included, keeps its default. MidiError names the key."""
        try:
            values = tomllib.loads(path.read_text("utf-8"))
            keys = [known.name for known in fields(cls)]
            for key in values:
                if key not in keys:
                    raise ValueError(f"{key}: is no key of a map; {_near(key, keys)}")
            if isinstance(values.get("controllers"), dict):
                values["controllers"] = DEFAULT_CONTROLLERS | values["controllers"]
            return dacite.from_dict(cls, values, dacite.Config(strict=True))
        except FileNotFoundError:
            raise MidiError(f"{path}: there is no such file; check the path") from None
        except (OSError, ValueError, dacite.DaciteError) as error:
            raise MidiError(f"{path}: {error}") from None


def _near(wanted: str, known: Sequence[str]) -> str:
    """What to write instead, for a message."""
    near = get_close_matches(wanted, known, n=2, cutoff=0.5)
    return (f"did you mean {' or '.join(near)}? " if near else "") + f"there are: {', '.join(known)}"


def apply(message: Message, performer: Performer, midi_map: MidiMap) -> bool:
    """Let a message act on the performance; True if it meant something. Any message is safe at any time.

    Program change selects; held notes blend, weighted by velocity, the styles of the model's list from
    ``first_note`` upwards, round and round; controllers move parameters over their range, 64 being the default of
    those that go both ways.
    """
    if midi_map.channel not in (-1, message.channel):
        return False
    match message.kind, message.data:
        case "program_change", (program,):
            style = performer.style_of_program(program)
            if style is None:
                return False
            performer.select(style.id)
        case "note_on", (note, velocity):
            styles = performer.manifest.styles
            performer.hold(note, styles[(note - midi_map.first_note) % len(styles)], velocity)
        case "note_off", (note, _):
            performer.release(note)
        case "control_change", (number, value):
            return _control(number, value, performer, midi_map)
        case _:
            return False
    return True


def _control(number: int, value: int, performer: Performer, midi_map: MidiMap) -> bool:
    if number == SUSTAIN_PEDAL:
        performer.pedal(value >= 64)
        return True
    if number in (ALL_SOUND_OFF, ALL_NOTES_OFF):
        performer.release_all()
        return True
    if number == RESET_CONTROLLERS:
        performer.pedal(False)
        performer.release_all()
        return True
    if number == midi_map.second_style_controller:
        style = performer.style_of_program(value)
        if style is not None:
            performer.select_second(style.id)
        return style is not None
    for parameter_id, controller in midi_map.controllers.items():
        if controller == number and parameter_id in performer.parameters:
            performer.set(parameter_id, controller_value(value, performer, parameter_id))
            return True
    return False


def controller_value(value: int, performer: Performer, parameter_id: str) -> float:
    """0..127 -> the parameter's range; where the default lies inside the range, 64 is the default."""
    parameter = performer.parameters[parameter_id]
    low, middle, high = parameter.minimum, parameter.default, parameter.maximum
    if not low < middle < high:
        return low + (high - low) * value / 127
    if value <= 64:
        return low + (middle - low) * value / 64
    return middle + (high - middle) * (value - 64) / 63


def read_midi_file(path: Path) -> list[tuple[float, bytes]]:
    """Channel messages of a standard MIDI file as (seconds from the start, bytes), in order. Raises MidiError."""
    import mido

    if not path.is_file():
        raise MidiError(f"{path}: there is no such file; check the path")
    try:
        events, seconds = [], 0.0
        for message in mido.MidiFile(str(path)):
            seconds += message.time
            if not message.is_meta and message.type != "sysex":
                events.append((seconds, bytes(message.bytes())))
    except Exception as error:
        raise MidiError(f"{path}: is not a standard MIDI file ({error or type(error).__name__})") from None
    return events


def _library() -> Any:
    """python-rtmidi, imported when MIDI is first asked for; its names are made at run time."""
    # Asking for MIDI must not start an audio server.
    os.environ.setdefault("JACK_NO_START_SERVER", "1")
    import rtmidi

    return rtmidi


@dataclass(frozen=True)
class _Api:
    """One of RtMidi's ways to a machine's MIDI, and the ports it has there."""

    name: str
    number: int
    ports: tuple[str, ...]


def _apis(direction: str = "input") -> list[_Api]:
    """What this build has and this machine can open, in order of preference."""
    rtmidi, usable = _library(), []
    for number in rtmidi.get_compiled_api():
        if number == rtmidi.API_RTMIDI_DUMMY:
            continue
        try:
            with quiet_libraries():
                client = (rtmidi.MidiIn if direction == "input" else rtmidi.MidiOut)(
                    number, name=f"{CLIENT_NAME}-probe"
                )
                usable.append(_Api(rtmidi.get_api_display_name(number), number, tuple(client.get_ports())))
                client.delete()
        except Exception as error:
            logger.debug("MIDI API %s: %s", number, error)
    silence_jack()
    return usable


def list_ports(direction: str = "input") -> list[tuple[str, str]]:
    """(API, port name) of every MIDI port that can be opened; empty where there is no MIDI at all."""
    return [(api.name, port) for api in _apis(direction) for port in api.ports]


class _Port:
    """One opened input, and what is held on it: (channel, note), and channels whose pedal is down.

    Messages wait in RtMidi's queue: Python in its callback would run in JACK's own, and where that is late the server
    takes the buffer away while RtMidi reads it, which ends the process. The price is a period later at most.
    """

    def __init__(self, api: _Api, name: str, client: Any, on_message: Callable[[bytes], None]) -> None:
        self.api, self.name, self.client = api, name, client
        self._on_message = on_message
        self._notes: set[tuple[int, int]] = set()
        self._pedals: set[int] = set()
        self._lock = threading.Lock()  # nothing is fetched from a client that is being closed
        self._closed = False
        client.ignore_types(sysex=True, timing=True, active_sense=True)

    def fetch(self) -> bool:
        """Hear what waits, up to FETCHED messages; whether there were so many."""
        for _ in range(FETCHED):
            with self._lock:
                event = None if self._closed else self.client.get_message()
            if event is None:
                return False
            self._hear(bytes(event[0]))
        return True

    def _hear(self, data: bytes) -> None:
        match decode(data):
            case Message("note_on", channel, (note, _)):
                self._notes.add((channel, note))
            case Message("note_off", channel, (note, _)):
                self._notes.discard((channel, note))
            case Message("control_change", channel, (number, value)) if number == SUSTAIN_PEDAL:
                (self._pedals.add if value >= 64 else self._pedals.discard)(channel)
        self._on_message(data)

    def let_go(self) -> None:
        """The port is gone: nobody else will send the ends of the notes held on it."""
        for channel, note in sorted(self._notes):
            self._on_message(encode(Message("note_off", channel, (note, 0))))
        for channel in sorted(self._pedals):
            self._on_message(encode(Message("control_change", channel, (SUSTAIN_PEDAL, 0))))
        self._notes.clear()
        self._pedals.clear()

    def close(self) -> None:
        with self._lock, contextlib.suppress(Exception):
            self._closed = True
            self.client.close_port()
            self.client.delete()


class MidiInputs:
    """Open MIDI inputs; every message reaches ``on_message`` on a thread of this class, within FETCH_INTERVAL_S.

    Twice a second it looks which ports there are: one that goes away lets go of its notes, one that comes back is
    opened again, and where all ports are wanted, so is a new one. ``abandon`` and ``close`` are for the maker's thread.
    """

    def __init__(
        self,
        wanted: str | None,
        on_message: Callable[[bytes], None],
        on_port: Callable[[str, bool], None] = lambda *_: None,
    ) -> None:
        """``wanted``: an index of ``list_ports``, part of a port's name, 'virtual', or None for all ports there are.

        ``on_port`` hears, on a thread of this class, the name of a port that went away (False) or was opened after the
        start (True). Raises MidiError, with the list, when a wanted port does not exist.
        """
        self._deliver, self._tell_port = on_message, on_port
        self._heard_at = 0.0
        self._virtual: _Port | None = None
        self._open: list[_Port] = []
        self._lookers: dict[int, Any] = {}
        self._apis = apis = _apis()
        self._only: tuple[int, str] | None = None
        """The one port to listen to, as API number and lasting name; None for all."""
        ports = [(api, name) for api in apis for name in api.ports]
        listing = "; ".join(f"{i}: {name} ({api.name})" for i, (api, name) in enumerate(ports)) or "none"
        self._over = threading.Event()
        self._watch: threading.Thread | None = None
        self._fetcher = threading.Thread(target=self._keep_fetching, name="midi-messages", daemon=True)
        if wanted is None:
            self._open_virtual()
            for api, name in ports:
                self._consider(api, name)
        elif not apis:
            raise MidiError(f"MIDI port '{wanted}': this machine has no MIDI (neither a sequencer nor a JACK server)")
        elif wanted.casefold() == VIRTUAL:
            if not self._open_virtual():
                raise MidiError(f"no virtual MIDI port can be opened; there are: {listing}")
            self._fetcher.start()
            return
        else:
            api, name = ports[_choose(wanted, [name for _, name in ports], listing)]
            self._only = api.number, _lasting_name(name)
            self._open_port(api, name)
        self._fetcher.start()
        if apis:
            for api in apis:
                with contextlib.suppress(Exception):  # tried again at every look
                    self._looker(api)
            self._watch = threading.Thread(target=self._keep_looking, name="midi-ports", daemon=True)
            self._watch.start()

    @property
    def names(self) -> list[str]:
        """The ports that are open now, for a panel; any thread."""
        virtual = [f"virtual port '{CLIENT_NAME}' ({self._virtual.api.name})"] if self._virtual else []
        return virtual + [f"{port.name} ({port.api.name})" for port in list(self._open)]

    @property
    def uses_jack(self) -> bool:
        """Whether a port is one of a JACK server's."""
        return any("jack" in port.api.name.casefold() for port in (self._virtual, *self._open) if port is not None)

    def _on_message(self, data: bytes) -> None:
        self._heard_at = time.monotonic()
        self._deliver(data)

    def _open_virtual(self) -> bool:
        for api in self._apis:
            with contextlib.suppress(Exception):
                client = _library().MidiIn(api.number, name=CLIENT_NAME, queue_size_limit=QUEUED)
                client.open_virtual_port("in")
                self._virtual = _Port(api, VIRTUAL, client, self._on_message)
                return True
        return False

    def _consider(self, api: _Api, name: str) -> bool:
        """Open a port that is there if it is wanted; whether it is open now."""
        if self._only is not None:
            wanted = self._only == (api.number, _lasting_name(name)) and not self._open
        else:
            wanted = CLIENT_NAME not in name and "midi through" not in name.casefold()
        if wanted:
            try:
                self._open_port(api, name)
            except MidiError as error:
                logger.debug("%s", error)
                return False
        return wanted

    def _open_port(self, api: _Api, name: str) -> None:
        try:
            client = _library().MidiIn(api.number, name=CLIENT_NAME, queue_size_limit=QUEUED)
            client.open_port(client.get_ports().index(name), "in")
        except Exception as error:
            raise MidiError(f"MIDI port {name} ({api.name}): cannot be opened ({error})") from None
        self._open.append(_Port(api, name, client, self._on_message))

    def _keep_fetching(self) -> None:
        while not self._over.is_set():
            more = False
            for port in (self._virtual, *self._open):
                try:
                    more |= port is not None and port.fetch()
                except Exception as error:  # one message that cannot be used must not cost the rest
                    logger.warning("MIDI message: %s", error)
            if not more:
                time.sleep(FETCH_INTERVAL_S)

    def _keep_looking(self) -> None:
        while not self._over.wait(LOOK_INTERVAL_S):
            for api in self._apis:
                try:
                    present = self._looker(api).get_ports()
                except Exception as error:  # the list changed while it was read
                    logger.debug("MIDI ports of %s: %s", api.name, error)
                    continue
                self._compare(api, present)

    def _looker(self, api: _Api) -> Any:
        """A client that lists ports, one for the whole performance: those that join and leave disturb a JACK server."""
        if self._virtual is not None and self._virtual.api == api:
            return self._virtual.client
        if api.number not in self._lookers:
            self._lookers[api.number] = _library().MidiIn(api.number, name=f"{CLIENT_NAME}-ports")
        return self._lookers[api.number]

    def _compare(self, api: _Api, present: Sequence[str]) -> None:
        """Take note of ports of one API that went and came."""
        for port in [port for port in self._open if port.api == api and port.name not in present]:
            self._open.remove(port)
            port.close()
            port.let_go()
            self._tell_port(port.name, False)
        opened = {port.name for port in self._open if port.api == api}
        for name in present:
            if name not in opened and not self._over.is_set() and self._consider(api, name):
                self._tell_port(name, True)

    def mute(self) -> None:
        """Deliver nothing any more; the ports stay open. Any thread."""
        self._deliver, self._tell_port = (lambda _: None), (lambda *_: None)

    def abandon(self) -> None:
        """Stop listening without closing: RtMidi waits for a JACK server that does not answer, for ever."""
        self._over.set()
        self.mute()
        clients = [port.client for port in (self._virtual, *self._open) if port is not None]
        for client in (*clients, *self._lookers.values()):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))  # its destructor would wait, too
        self._virtual = None
        self._open.clear()
        self._lookers.clear()

    def close(self) -> None:
        """Stop listening, in a moment of quiet; under a flood of messages without closing the ports."""
        self.mute()
        if self.uses_jack:
            until = time.monotonic() + 2.0 * QUIET_S
            while (noisy := time.monotonic() - self._heard_at < QUIET_S) and time.monotonic() < until:
                time.sleep(0.02)
            if noisy:
                self.abandon()
                return
        self._over.set()
        self._fetcher.join(STOP_TIMEOUT_S)
        if self._watch is not None:
            self._watch.join(STOP_TIMEOUT_S)
        if self._fetcher.is_alive() or (self._watch is not None and self._watch.is_alive()):
            self.abandon()
        for port in (self._virtual, *self._open):
            if port is not None:
                port.close()
        for client in self._lookers.values():
            with contextlib.suppress(Exception):
                client.delete()
        self._virtual = None
        self._open.clear()
        self._lookers.clear()


class MidiOutput:
    """An open MIDI output. One thread at a time."""

    def __init__(self, wanted: str) -> None:
        """``wanted``: an index of ``list_ports('output')``, part of a port's name, or 'virtual'.

        Raises MidiError, with the list, when there is no such port.
        """
        apis = _apis("output")
        ports = [(api, name) for api in apis for name in api.ports]
        listing = "; ".join(f"{i}: {name} ({api.name})" for i, (api, name) in enumerate(ports)) or "none"
        if not apis:
            raise MidiError(f"MIDI port '{wanted}': this machine has no MIDI (neither a sequencer nor a JACK server)")
        if wanted.casefold() == VIRTUAL:
            for api in apis:
                with contextlib.suppress(Exception):
                    self._client = _library().MidiOut(api.number, name=CLIENT_NAME)
                    self._client.open_virtual_port("out")
                    self.name = f"virtual port '{CLIENT_NAME}' ({api.name})"
                    return
            raise MidiError(f"no virtual MIDI port can be opened; there are: {listing}")
        api, name = ports[_choose(wanted, [name for _, name in ports], listing)]
        try:
            self._client = _library().MidiOut(api.number, name=CLIENT_NAME)
            self._client.open_port(self._client.get_ports().index(name), "out")
        except Exception as error:
            raise MidiError(f"MIDI port {name} ({api.name}): cannot be opened ({error})") from None
        self.name = f"{name} ({api.name})"

    def send(self, message: Message) -> None:
        """Send one channel message; a receiver that has gone away is no error."""
        with contextlib.suppress(Exception):
            self._client.send_message(list(encode(message)))

    def close(self) -> None:
        """Close the port once what was sent has left."""
        time.sleep(DRAIN_S)
        with contextlib.suppress(Exception):
            self._client.close_port()
            self._client.delete()


def _lasting_name(name: str) -> str:
    """A port's name without the ALSA address at its end, which is another one after plugging in again."""
    return re.sub(r"\s\d+:\d+$", "", name)


def _choose(wanted: str, names: list[str], listing: str) -> int:
    """The index that ``wanted``, an index or part of a name, stands for. Raises MidiError."""
    if wanted.strip().isdigit():
        if int(wanted) < len(names):
            return int(wanted)
        raise MidiError(f"MIDI port {wanted} does not exist; there are: {listing}; or '{VIRTUAL}'")
    found = [i for i, name in enumerate(names) if wanted.casefold() in name.casefold()]
    if not found:
        raise MidiError(f"no MIDI port is called '{wanted}'; there are: {listing}; or '{VIRTUAL}'")
    if len(found) > 1:
        raise MidiError(f"'{wanted}' fits several MIDI ports, give the index: {listing}")
    return found[0]
