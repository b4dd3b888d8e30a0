"""MIDI ports of the machine, through RtMidi: those that are heard, and one to play to."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from realtime.midi import SUSTAIN_PEDAL, Message, MidiError, decode, encode
from realtime.quiet import quiet_libraries, silence_jack

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


class Held:
    """What is held on an input: (channel, note), and channels whose pedal is down."""

    def __init__(self) -> None:
        self._notes: set[tuple[int, int]] = set()
        self._pedals: set[int] = set()

    def hear(self, data: bytes) -> None:
        """Take note of one message."""
        match decode(data):
            case Message("note_on", channel, (note, _)):
                self._notes.add((channel, note))
            case Message("note_off", channel, (note, _)):
                self._notes.discard((channel, note))
            case Message("control_change", channel, (number, value)) if number == SUSTAIN_PEDAL:
                (self._pedals.add if value >= 64 else self._pedals.discard)(channel)

    def let_go(self) -> list[bytes]:
        """The messages that end all of it, which nobody else will send; nothing is held then."""
        ends = [encode(Message("note_off", channel, (note, 0))) for channel, note in sorted(self._notes)]
        ends += [encode(Message("control_change", channel, (SUSTAIN_PEDAL, 0))) for channel in sorted(self._pedals)]
        self._notes.clear()
        self._pedals.clear()
        return ends


class _Port:
    """One opened input, and what is held on it.

    Messages wait in RtMidi's queue: Python in its callback would run in JACK's own, and where that is late the server
    takes the buffer away while RtMidi reads it, which ends the process.
    """

    def __init__(self, api: _Api, name: str, client: Any, on_message: Callable[[bytes], None]) -> None:
        self.api, self.name, self.client = api, name, client
        self._on_message = on_message
        self._held = Held()
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
            data = bytes(event[0])
            self._held.hear(data)
            self._on_message(data)
        return True

    def let_go(self) -> None:
        """The port is gone."""
        for data in self._held.let_go():
            self._on_message(data)

    def close(self) -> None:
        with self._lock, contextlib.suppress(Exception):
            self._closed = True
            self.client.close_port()
            self.client.delete()


@dataclass(frozen=True)
class Wanted:
    """The one port to listen to: the number of its API, and its name without an address."""

    api: int
    name: str


class InputPorts:
    """Open MIDI inputs; every message reaches ``on_message`` on a thread of this class, within FETCH_INTERVAL_S.

    Twice a second it looks which ports there are: one that goes away lets go of its notes, one that comes back is
    opened again, and where all ports are wanted, so is a new one. RtMidi may end the process that has it (a JACK server
    that takes a buffer away too early, ports that are closed under a flood), or wait for ever: ``MidiInputs`` gives it
    one of its own.
    """

    def __init__(
        self,
        wanted: str | Wanted | None,
        on_message: Callable[[bytes], None],
        on_port: Callable[[str, bool], None] = lambda *_: None,
    ) -> None:
        """``wanted``: an index of ``list_ports``, part of a port's name, 'virtual', or None for all ports there are;
        a ``Wanted``, which may be away, from an earlier life.

        ``on_port`` hears, on a thread of this class, the name of a port that went away (False) or was opened after the
        start (True). Raises MidiError, with the list, when a port asked for by text does not exist.
        """
        self._deliver, self._tell_port = on_message, on_port
        self._heard_at = 0.0
        self._virtual: _Port | None = None
        self._open: list[_Port] = []
        self._lookers: dict[int, Any] = {}
        self._apis = apis = _apis()
        self.only: Wanted | None = None
        """The one port to listen to; None for all."""
        ports = [(api, name) for api in apis for name in api.ports]
        listing = "; ".join(f"{i}: {name} ({api.name})" for i, (api, name) in enumerate(ports)) or "none"
        self._over = threading.Event()
        self._watch: threading.Thread | None = None
        self._fetcher = threading.Thread(target=self._keep_fetching, name="midi-messages", daemon=True)
        if wanted is None or isinstance(wanted, Wanted):
            self.only = wanted
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
            self.only = Wanted(api.number, _lasting_name(name))
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
        """Whether what is heard, or looked for, is a JACK server's."""
        if self._virtual is not None and "jack" in self._virtual.api.name.casefold():
            return True
        sought = [api for api in self._apis if self.only is None or self.only.api == api.number]
        return self._watch is not None and any("jack" in api.name.casefold() for api in sought)

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
        if self.only is not None:
            wanted = self.only == Wanted(api.number, _lasting_name(name)) and not self._open
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

    def close(self) -> None:
        """Stop listening, in a moment of quiet; under a flood of messages, and where a port is stuck, without closing.

        The process had better end then: clients of RtMidi that are not closed crash, or wait, when it lets go of them.
        """
        self._deliver, self._tell_port = (lambda _: None), (lambda *_: None)
        if self.uses_jack:
            until = time.monotonic() + 2.0 * QUIET_S
            while (noisy := time.monotonic() - self._heard_at < QUIET_S) and time.monotonic() < until:
                time.sleep(0.02)
            if noisy:
                self._over.set()
                return
        self._over.set()
        self._fetcher.join(STOP_TIMEOUT_S)
        if self._watch is not None:
            self._watch.join(STOP_TIMEOUT_S)
        if self._fetcher.is_alive() or (self._watch is not None and self._watch.is_alive()):
            return
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
