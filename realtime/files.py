"""Files that appear under their name only when they are whole: a crash or a full disk leaves what was there before."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType


class NewFile:
    """A file on its way: write to ``part``, beside ``path`` and with its suffix, then ``commit`` or ``discard``.

    As a context it gives ``part``, commits at the end and discards after an exception. One thread at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")

    def commit(self) -> None:
        """Give the file its name, over whatever has it. Raises OSError and then leaves no part behind."""
        try:
            self.part.replace(self.path)
        finally:
            self.discard()

    def discard(self) -> None:
        """Leave no part behind."""
        self.part.unlink(missing_ok=True)

    def __enter__(self) -> Path:
        return self.part

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()


def check_writable(path: Path) -> None:
    """Raises OSError if no file can be written at ``path``, before long work that would end there."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    new = NewFile(path)
    new.part.touch()
    new.discard()
