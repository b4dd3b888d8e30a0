"""Seeded noise: what models of kind ``generate`` make their sound of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORD_BITS = 64


class SeededNoise:
    """Random signs, -1 or 1: white noise whose level is exactly one, the same for a seed on every machine, endless.

    Bits of a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011: Philox),
    hop by hop, so that it does not matter how many hops are asked for at once. One thread at a time.
    """

    def __init__(self, seed: int, channels: int, hop_samples: int) -> None:
        """``seed`` 0..2**64-1; every channel has noise of its own."""
        self.seed, self.channels, self.hop_samples = seed, channels, hop_samples
        self._words = -(-hop_samples // WORD_BITS)
        self.reset()

    def reset(self) -> None:
        """Back to the first hop."""
        keys = [np.array((self.seed, channel), np.uint64) for channel in range(self.channels)]
        self._sources = [np.random.Philox(key=key) for key in keys]

    def fill(self, out: NDArray[np.float32]) -> None:
        """The next hops into out [channels, n*hop]."""
        hops = out.shape[1] // self.hop_samples
        for row, source in zip(out, self._sources, strict=True):
            octets = source.random_raw(hops * self._words).astype("<u8").view(np.uint8)
            bits = np.unpackbits(octets).reshape(hops, self._words * WORD_BITS)[:, : self.hop_samples]
            np.subtract(bits.reshape(-1), np.float32(0.5), out=row)
        out *= 2.0
