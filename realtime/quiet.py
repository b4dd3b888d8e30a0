"""Keep libraries of hardware from writing over the terminal."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

HELD_BYTES = 1 << 20


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


class HeldErrors:
    """Holds in memory what this process writes on standard error, so that no thread of a library waits for a terminal.

    ``pass_on`` passes it on; so does the end of the ``with``. Where the system has no files in memory nothing is held.
    """

    def __enter__(self) -> Self:
        sys.stderr.flush()
        self._terminal, self._read_bytes, self._file = os.dup(2), 0, None
        if hasattr(os, "memfd_create"):
            import fcntl

            self._file = os.memfd_create("stderr")
            fcntl.fcntl(self._file, fcntl.F_SETFL, os.O_APPEND)
            os.dup2(self._file, 2)
        return self

    def pass_on(self, without: bytes) -> int:
        """Pass on what was written since the last call, but for lines with ``without`` in them; how many those were."""
        if self._file is None:
            return 0
        written = os.pread(self._file, os.fstat(self._file).st_size - self._read_bytes, self._read_bytes)
        whole = written[: written.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        if self._read_bytes > HELD_BYTES:
            os.ftruncate(self._file, 0)
            self._read_bytes = 0
        lines = whole.splitlines(keepends=True)
        passed = [line for line in lines if without not in line]
        if b"".join(passed).strip():
            os.write(self._terminal, b"".join(passed))
        return len(lines) - len(passed)

    def __exit__(self, *_: object) -> None:
        sys.stderr.flush()
        os.dup2(self._terminal, 2)
        if self._file is not None:
            rest = os.pread(self._file, HELD_BYTES, self._read_bytes)
            os.write(self._terminal, rest)
            os.close(self._file)
        os.close(self._terminal)
