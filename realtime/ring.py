"""Memory shared by two processes: a ring of frames, and a mailbox that holds the latest value.

One producer and one consumer each. Nobody waits: a full ring drops and counts, an empty one returns nothing, a mailbox
caught in the middle of a write keeps its last value. Counters are aligned 64-bit words, written after the data they
announce; on x86-64 stores are seen in that order, and the interpreter's own calls in between order them elsewhere.
"""

from __future__ import annotations

import os
from multiprocessing import shared_memory
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

_WRITTEN, _READ, _DROPPED, _CAPACITY, _WIDTH = range(5)
_HEADER_WORDS = 8


def shared_view(memory: shared_memory.SharedMemory, kind: type[Any], count: int, offset: int = 0) -> NDArray[Any]:
    """An array [count] of numpy type ``kind`` that lies in the shared memory."""
    assert memory.buf is not None
    return np.frombuffer(memory.buf, kind, count, offset=offset)


def new_memory(size: int) -> shared_memory.SharedMemory:
    """So many bytes of zeros, all of them there. Raises OSError where there is no room.

    Without asking for them, pages are missed where they are first touched, which ends the process.
    """
    memory = shared_memory.SharedMemory(create=True, size=size)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(memory._fd, 0, size)  # pyright: ignore[reportAttributeAccessIssue]
    except OSError:
        memory.close()
        memory.unlink()
        raise
    return memory


class Shared:
    """A named block of shared memory; ``create`` owns and removes it, ``attach`` only looks."""

    def __init__(self, memory: shared_memory.SharedMemory, owner: bool) -> None:
        self._memory, self._owner = memory, owner
        self.name = memory.name

    @classmethod
    def attach(cls, name: str) -> Self:
        """What another process created under this name."""
        return cls(shared_memory.SharedMemory(name=name), owner=False)

    def close(self) -> None:
        """Let go of the memory (the owner also removes it). Any thread; no other call may follow."""
        # The memory cannot be unmapped while an array points into it.
        for name in [name for name, value in vars(self).items() if isinstance(value, np.ndarray)]:
            delattr(self, name)
        self._memory.close()
        if self._owner:
            self._memory.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Ring(Shared):
    """Frames of ``width`` float32 numbers from one producer to one consumer, in order, without a lock."""

    def __init__(self, memory: shared_memory.SharedMemory, owner: bool) -> None:
        super().__init__(memory, owner)
        self._words: NDArray[np.int64] = shared_view(memory, np.int64, _HEADER_WORDS)
        self.capacity, self.width = int(self._words[_CAPACITY]), int(self._words[_WIDTH])
        self._data: NDArray[np.float32] = shared_view(
            memory, np.float32, self.capacity * self.width, offset=8 * _HEADER_WORDS
        ).reshape(self.capacity, self.width)

    @classmethod
    def create(cls, capacity: int, width: int) -> Self:
        """A new ring for ``capacity`` frames of ``width`` numbers."""
        if capacity < 1 or width < 1:
            raise ValueError(f"capacity and width: must be at least 1, got {capacity} and {width}")
        memory = new_memory(8 * _HEADER_WORDS + 4 * capacity * width)
        words = shared_view(memory, np.int64, _HEADER_WORDS)
        words[:] = 0
        words[_CAPACITY], words[_WIDTH] = capacity, width
        del words
        return cls(memory, owner=True)

    @property
    def dropped(self) -> int:
        """Frames that found no room since the ring was made."""
        return int(self._words[_DROPPED])

    @property
    def written(self) -> int:
        """Frames that found room since the ring was made."""
        return int(self._words[_WRITTEN])

    def __len__(self) -> int:
        return int(self._words[_WRITTEN] - self._words[_READ])

    def push(self, frames: NDArray[np.float32]) -> bool:
        """Producer: append frames [n, width], all of them or, if they do not fit, none (counted as dropped)."""
        count = len(frames)
        written = int(self._words[_WRITTEN])
        if written + count - int(self._words[_READ]) > self.capacity:
            self._words[_DROPPED] += count
            return False
        start = written % self.capacity
        first = min(count, self.capacity - start)
        self._data[start : start + first] = frames[:first]
        if first < count:
            self._data[: count - first] = frames[first:]
        self._words[_WRITTEN] = written + count
        return True

    def pop(self, limit: int | None = None) -> NDArray[np.float32]:
        """Consumer: a copy [n, width] of the oldest frames, at most ``limit``, possibly none."""
        read = int(self._words[_READ])
        count = int(self._words[_WRITTEN]) - read
        if limit is not None:
            count = min(count, limit)
        start = read % self.capacity
        first = min(count, self.capacity - start)
        frames = np.concatenate([self._data[start : start + first], self._data[: count - first]])
        self._words[_READ] = read + count
        return frames


class Mailbox(Shared):
    """The latest ``size`` float64 numbers from one writer; the reader sees it whole or its last one (a seqlock)."""

    def __init__(self, memory: shared_memory.SharedMemory, owner: bool) -> None:
        super().__init__(memory, owner)
        self._words: NDArray[np.int64] = shared_view(memory, np.int64, 2)
        self.size = int(self._words[1])
        self._values: NDArray[np.float64] = shared_view(memory, np.float64, self.size, offset=16)
        self._latest = self._values.copy()
        self._seen = 0

    @classmethod
    def create(cls, size: int) -> Self:
        memory = new_memory(16 + 8 * size)
        words = shared_view(memory, np.int64, 2)
        words[:] = 0, size
        shared_view(memory, np.float64, size, offset=16)[:] = 0.0
        del words
        return cls(memory, owner=True)

    def write(self, values: NDArray[np.float64]) -> None:
        """Writer: replace the value [size]. An odd sequence number says that a write is under way."""
        sequence = int(self._words[0]) | 1  # odd already where a writer was killed halfway
        self._words[0] = sequence
        self._values[:] = values
        self._words[0] = sequence + 1

    def changed(self) -> bool:
        """Reader: is there a value that ``read`` has not returned yet?"""
        return int(self._words[0]) != self._seen

    def read(self) -> NDArray[np.float64]:
        """Reader: the latest whole value [size], valid until the next call; the one before if a write is under way."""
        sequence = int(self._words[0])
        if sequence % 2 == 0 and sequence != self._seen:
            fresh = self._values.copy()
            if int(self._words[0]) == sequence:
                self._latest, self._seen = fresh, sequence
        return self._latest
