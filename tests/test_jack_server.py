"""The JACK server that measurements and tests start: it is there when they begin, and gone after them."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from realtime.jack_server import JackServer, JackServerError

pytestmark = [
    pytest.mark.jack,
    pytest.mark.skipif(shutil.which("jackd") is None, reason="jackd is not installed"),
]


def look() -> tuple[int, int]:
    """Rate and period of the server that this process is led to."""
    import jack

    client: Any = jack.Client("look", no_start_server=True)
    try:
        return client.samplerate, client.blocksize
    finally:
        client.close()


def test_a_server_answers_with_its_rate_and_period_also_after_it_was_killed(jack_server: JackServer) -> None:
    assert look() == (48_000, 128)
    first = jack_server.process
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    jack_server.sample_rate, jack_server.period_samples = 44_100, 256
    jack_server.start()
    assert look() == (44_100, 256)
    assert first.returncode == -signal.SIGKILL and jack_server.process is not first


def test_it_leaves_nothing_behind_however_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jack")
    monkeypatch.setenv("JACK_DEFAULT_SERVER", "that of the user")
    monkeypatch.delenv("JACK_NO_START_SERVER", raising=False)
    with JackServer(48_000, 128) as server:
        assert server.process is not None and os.environ["JACK_DEFAULT_SERVER"] == server.name
        server.process.kill()
    assert server.process.returncode is not None
    assert not [path for path in Path("/dev/shm").iterdir() if server.name in path.name]
    assert os.environ["JACK_DEFAULT_SERVER"] == "that of the user" and "JACK_NO_START_SERVER" not in os.environ


def test_a_server_that_does_not_start_says_why_and_is_not_left() -> None:
    with pytest.raises(JackServerError, match=r"^jackd does not start: .+"), JackServer(48_000, 128, ("-Z",)):
        pass
