"""A JACK server of our own without a sound card, for measurements and tests."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Self

from realtime.quiet import quiet_libraries

SYNCHRONOUS = ("-r", "-S")
"""Without real-time priority, and waiting for its clients: overload slips time and loses nothing."""
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
LOOK_INTERVAL_S = 0.05

_numbers = itertools.count()


class JackServerError(RuntimeError):
    """A JACK server that cannot be had here; the text says why and what to do."""


def jack_library() -> ModuleType:
    """The JACK-Client module, where there is a server to go with it; JackServerError with the remedy."""
    if shutil.which("jackd") is None:
        raise JackServerError("jackd is not installed; on Debian or Ubuntu: apt-get install jackd2 libportaudio2")
    try:
        import jack
    except ImportError:
        raise JackServerError("JACK-Client is not installed: pip install 'restyle[jack]'") from None
    except OSError:
        raise JackServerError(
            "the JACK library is not installed; on Debian or Ubuntu: apt-get install jackd2"
        ) from None
    return jack


class JackServer:
    """As a context, a running server; JACK, PortAudio and RtMidi of this process and its children find it and no other.

    One at a time, by one thread. Leaving ends it, by force if it must, and leaves nothing of it behind.
    """

    def __init__(self, sample_rate: int, period_samples: int, arguments: Sequence[str] = SYNCHRONOUS) -> None:
        """``arguments``: of jackd, for how it runs."""
        self.sample_rate, self.period_samples, self.arguments = sample_rate, period_samples, arguments
        self.name = f"restyle-{os.getpid()}-{next(_numbers)}"
        self.process: subprocess.Popen[bytes] | None = None
        self._before: dict[str, str | None] = {}

    def start(self) -> None:
        """Start it, or again after it was killed; returns when it answers. Raises JackServerError."""
        jack = jack_library()
        self._stop()
        # A client that leaves in the middle of a period can hold a synchronous server up for ten times -t; whoever
        # wants to join meanwhile gives up after 5 s, which is the default's ten times 0.5 s.
        command = ["jackd", "-n", self.name, *self.arguments, "-t", "200"]
        command += ["-d", "dummy", "-r", str(self.sample_rate), "-p", str(self.period_samples)]
        if shutil.which("setpriv"):  # whoever is killed takes the server along
            command = ["setpriv", "--pdeathsig", "TERM", *command]
        with tempfile.TemporaryFile() as log:
            # A session of its own: Ctrl-C must not reach it before its clients have left.
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            deadline = time.monotonic() + START_TIMEOUT_S
            # Another server of the name would answer, and ours be gone.
            while not _answers(jack, self.name) or self.process.poll() is not None:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    said = log.read().decode(errors="replace").strip().splitlines()
                    why = said[-1] if said else f"exit code {self.process.returncode}"
                    raise JackServerError(f"jackd does not start: {why}")
                time.sleep(LOOK_INTERVAL_S)

    def _stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_TIMEOUT_S)

    def __enter__(self) -> Self:
        variables = {"JACK_DEFAULT_SERVER": self.name, "JACK_NO_START_SERVER": "1"}
        self._before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._stop()
            if self.process is not None and self.process.returncode == -signal.SIGKILL:
                # It left its place taken, one of the eight that a machine has; a namesake gives it back.
                with contextlib.suppress(JackServerError):
                    self.start()
                self._stop()
        finally:
            for name, value in self._before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            for left in Path("/dev/shm").glob(f"jack_sem.*_{self.name}_*"):
                left.unlink(missing_ok=True)


def _answers(jack: ModuleType, server: str) -> bool:
    try:
        with quiet_libraries():
            jack.Client("restyle-probe", servername=server, no_start_server=True).close()
    except jack.JackError:
        return False
    return True
