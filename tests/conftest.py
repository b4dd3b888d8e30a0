"""Fixtures that several test files share. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)  # nothing passes or fails by being faster
settings.load_profile("shared machine")

SAX_STYLE = """[[style]]
id = "sax"
label = "Saxophone"
folder = "sax"
midi_program = 65
licence = "CC0-1.0"
attribution = "Weresax, Karoryfer Samples"
"""
"""One style of a recipe."""


def tiny_recipe(segment_seconds: float) -> str:
    """The start of a recipe that trains in seconds; sections that a test cares about come after it."""
    return f"""
name = "tiny"
[model]
style_dim = 4
band_count = 8
hidden = 16
[data]
segment_seconds = {segment_seconds}
workers = 0
[loss]
fft_sizes = [256, 512]
mel_band_counts = [16, 32]
"""


_numbers = itertools.count()


@dataclass(frozen=True)
class JackServer:
    """A JACK server of our own without a sound card, in synchronous mode: overload slips time, loses nothing."""

    name: str
    sample_rate: int
    period: int
    process: subprocess.Popen[bytes]
    command: tuple[str, ...] = ()

    @contextlib.contextmanager
    def again(self, log: Path) -> Iterator[None]:
        """The same server once more, after it was killed."""
        with log.open("wb") as out:
            process = _start(list(self.command), self.name, out)
            try:
                yield
            finally:
                _stop(process)

    def kill(self) -> None:
        """End it without warning, as a crash would."""
        self.process.kill()
        self.process.wait(timeout=5)

    def freeze(self) -> None:
        """Let it answer nobody any more."""
        self.process.send_signal(signal.SIGSTOP)


def _answers(server: str) -> bool:
    look = subprocess.run(["jack_wait", "-c", "-s", server], capture_output=True, text=True, check=False, timeout=20)
    return look.stdout.startswith("running")


@contextlib.contextmanager
def run_jack(log: Path, sample_rate: int = 48_000, period: int = 128) -> Iterator[JackServer]:
    """A running server, and the environment that leads every client of this process and its children to it."""
    name = f"restyle-test-{os.getpid()}-{next(_numbers)}"
    environment = {"JACK_DEFAULT_SERVER": name, "JACK_NO_START_SERVER": "1"}
    # A client that leaves in the middle of a period can hold a synchronous server up for ten times -t; whoever wants to
    # join meanwhile gives up after 5 s, which is the default's ten times 0.5 s.
    command = ["jackd", "-n", name, "-r", "-S", "-t", "200", "-d", "dummy", "-r", str(sample_rate), "-p", str(period)]
    with log.open("wb") as out, pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        process = _start(command, name, out)
        try:
            yield JackServer(name, sample_rate, period, process, tuple(command))
        finally:
            _stop(process)
            if process.returncode == -signal.SIGKILL:
                # It left its place taken, one of the eight that a machine has; a namesake gives it back.
                _stop(_start(command, name, out))
            for left in Path("/dev/shm").glob(f"jack_sem.*_{name}_*"):
                left.unlink(missing_ok=True)


def _start(command: list[str], name: str, out: IO[bytes]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 20
        # jack_wait -w looks once a second only.
        while not _answers(name):
            assert process.poll() is None and time.monotonic() < deadline, Path(out.name).read_text()
            time.sleep(0.02)
        # A second server of one name dies silently, and the first would have answered.
        assert process.poll() is None, Path(out.name).read_text()
    except BaseException:
        _stop(process)
        raise
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=5)


@pytest.fixture
def jack_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[JackServer]:
    """A JACK server for one test; parametrize indirectly with (sample rate, period), default (48 000 Hz, 128)."""
    if shutil.which("jackd") is None:
        pytest.skip("jackd is not installed; 'make setup' installs it")
    sample_rate, period = getattr(request, "param", (48_000, 128))
    with run_jack(tmp_path / "jackd.log", sample_rate, period) as server:
        yield server
