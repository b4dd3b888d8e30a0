"""Keep libraries of hardware from writing over the terminal."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep what C libraries print on standard error while they look for hardware away from the terminal."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def silence_jack() -> None:
    """Keep the JACK libraries loaded so far from writing over the terminal when their server dies."""
    with contextlib.suppress(OSError, AttributeError):
        maps = Path("/proc/self/maps").read_text()
        # They report to any function that takes a text; strlen does, and leaves it at that.
        listener = ctypes.CDLL(None).strlen
        # RtMidi brings a library of its own.
        for library in set(re.findall(r"/\S*/libjack[^/\s]*\.so\S*", maps)):
            ctypes.CDLL(library).jack_set_error_function(listener)
            ctypes.CDLL(library).jack_set_info_function(listener)
