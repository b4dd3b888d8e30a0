"""MIDI inputs in a process of their own, which may crash or hang without the performance."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from realtime.midi import MidiError
from realtime.midi_ports import VIRTUAL, Held, InputPorts, Wanted
from realtime.privileges import be_urgent
from realtime.processes import StoppedError, await_message, start_process
from realtime.quiet import HeldErrors

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 3.0
RETRY_S = 1.0
"""Before another process, where the last one lived no longer or could not open its ports."""
LOSS_INTERVAL_S = 1.0
LOSS_COMPLAINT = b"message queue limit reached"
"""RtMidi's, on standard error, of each message that finds its queue full: it tells nobody else."""


def listen(wanted: str | Wanted | None, pipe: Any) -> None:
    """The process: sends ('ready', names, whether JACK's, the one port wanted) or ('error', text), then ('heard',
    bytes) for each message, ('port', name, whether there, names) for each port and ('lost', count) for messages that
    came faster than they are heard, until anything comes or the other end is gone."""
    be_urgent()
    with HeldErrors() as said:
        _listen(wanted, pipe, said)
    os._exit(0)  # what could not be closed would crash, or wait for ever, at a usual end


def _listen(wanted: str | Wanted | None, pipe: Any, said: HeldErrors) -> None:
    sending = threading.RLock()

    def send(*message: Any) -> None:
        with sending, contextlib.suppress(OSError):  # nobody is left to hear it: the other end says so, too
            pipe.send(message)

    with sending:  # a port that is played while it opens is heard after 'ready'
        try:
            ports = InputPorts(
                wanted,
                lambda data: send("heard", data),
                lambda name, there: send("port", name, there, ports.names, ports.uses_jack),
            )
        except MidiError as error:
            send("error", str(error))
            return
        send("ready", ports.names, ports.uses_jack, ports.only)
    with contextlib.suppress(EOFError, OSError):
        while not pipe.poll(LOSS_INTERVAL_S):
            if lost := said.pass_on(without=LOSS_COMPLAINT):
                send("lost", lost)
        pipe.recv()
    ports.close()
    said.pass_on(without=LOSS_COMPLAINT)


class MidiInputs:
    """Hears MIDI inputs; every message reaches ``on_message`` on a thread of this class.

    A port that goes away lets go of its notes, and is opened again once it is back. Where the process that has the
    ports dies, what was held is let go and another one starts at once. ``close`` and ``abandon`` are for the maker.
    """

    def __init__(
        self,
        wanted: str | Wanted | None,
        on_message: Callable[[bytes], None],
        on_port: Callable[[str, bool], None] = lambda *_: None,
        on_trouble: Callable[[str], None] = lambda _: None,
        stop: threading.Event | None = None,
    ) -> None:
        """``wanted``: an index of ``list_ports``, part of a port's name, 'virtual', or None for all ports there are;
        what was ``wanted`` of inputs that are gone, which may be away.

        On a thread of this class, ``on_port`` hears the name of a port that went away (False) or was opened after the
        start (True), and ``on_trouble``, in words, that the process died, that another one listens, or that messages
        were lost. Raises MidiError, with the list, when a port asked for by text does not exist, and StoppedError once
        ``stop`` is set before they are heard.
        """
        self.wanted: str | Wanted | None = wanted
        """What is listened to, for others to listen to later; one port is the same one then."""
        self._deliver, self._tell_port, self._tell_trouble = on_message, on_port, on_trouble
        self._held = Held()
        self._lock = threading.Lock()  # no process is started once it is over
        self._over = threading.Event()
        self.names: list[str] = []
        """The ports that are open now, for a panel; any thread."""
        self.uses_jack = False
        """Whether a port is one of a JACK server's."""
        self.restarts = 0
        self.lost_messages = 0
        """Messages that came faster than they were heard."""
        # A fresh interpreter: a fork would inherit threads and libraries of this one.
        self._context = multiprocessing.get_context("spawn")
        self._start()
        try:
            problem = self._await_ready(stop or self._over)
        except StoppedError:
            self._kill()
            raise
        if problem:
            self._kill()
            raise MidiError(problem)
        self._reader = threading.Thread(target=self._keep_hearing, name="midi-messages", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int | None:
        """Of the process that has the ports."""
        return self._process.pid

    def _start(self) -> None:
        self._process, self._pipe = start_process(self._context, listen, (self.wanted,), "restyle-midi")
        self._started_at = time.monotonic()

    def _await_ready(self, stop: threading.Event) -> str:
        """Wait until the process listens; what went wrong, or nothing. Raises StoppedError."""
        try:
            if not await_message(self._pipe, START_TIMEOUT_S, stop):
                return f"the process of MIDI did not start within {START_TIMEOUT_S:g} s"
            kind, *content = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(STOP_TIMEOUT_S)
            return f"the process of MIDI died (exit code {self._process.exitcode}) while it opened the ports"
        if kind == "error":
            return content[0]
        self.names, self.uses_jack, only = content
        self.wanted = only or self.wanted
        return ""

    def _keep_hearing(self) -> None:
        """To the last message, also of an input that is being closed: it would wait for room in the pipe."""
        while True:
            try:
                kind, *content = self._pipe.recv()
            except (EOFError, OSError):
                if self._over.is_set():
                    return
                self._replace()
                continue
            if kind == "lost":
                self.lost_messages += content[0]
                self._tell_trouble(f"{content[0]} MIDI messages were lost: they came faster than they can be heard")
            elif kind == "heard":
                self._held.hear(content[0])
                self._hear(content[0])
            else:
                name, there, self.names, self.uses_jack = content
                self._tell_port(name, there)

    def _hear(self, data: bytes) -> None:
        try:
            self._deliver(data)
        except Exception as error:  # one message that cannot be used must not cost the rest
            logger.warning("MIDI message: %s", error)

    def _replace(self) -> None:
        """The process is gone: nobody else will send the ends of what was held; another one, unless it is over."""
        self._process.join(STOP_TIMEOUT_S)
        if self._over.is_set():
            return
        self.restarts += 1
        self.names = []
        for data in self._held.let_go():
            self._hear(data)
        self._tell_trouble(f"the process of MIDI died (exit code {self._process.exitcode}); another one is started")
        pause_s = RETRY_S if time.monotonic() - self._started_at < RETRY_S else 0.0
        while not self._over.wait(pause_s):
            with self._lock:
                if self._over.is_set():
                    return
                self._pipe.close()
                self._start()
            try:
                problem = self._await_ready(self._over)
            except StoppedError:
                return
            if not problem:
                again = "; what was connected to the virtual port must be again" if self.wanted == VIRTUAL else ""
                self._tell_trouble(f"MIDI is heard again: {', '.join(self.names) or 'no port'}{again}")
                return
            logger.debug("%s", problem)
            self._kill()
            pause_s = RETRY_S

    def _kill(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join(STOP_TIMEOUT_S)

    def mute(self) -> None:
        """Deliver nothing any more; the ports stay open. Any thread."""
        self._deliver, self._tell_port, self._tell_trouble = (lambda _: None), (lambda *_: None), (lambda _: None)

    def abandon(self) -> None:
        """Stop listening at once: RtMidi waits for a JACK server that does not answer, for ever."""
        self.mute()
        with self._lock:
            self._over.set()
            self._kill()
        self._reader.join(STOP_TIMEOUT_S)

    def close(self) -> None:
        """Stop listening, and close the ports in a moment of quiet, or within STOP_TIMEOUT_S all the same."""
        self.mute()
        with self._lock:
            self._over.set()
            with contextlib.suppress(OSError):
                self._pipe.send("stop")
            self._process.join(STOP_TIMEOUT_S)
            self._kill()
        self._reader.join(STOP_TIMEOUT_S)
