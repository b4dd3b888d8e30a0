"""The limiter: no sample leaves full scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LIMITER_KNEE = 0.89
"""Amplitude (-1 dBFS) above which the limiter bends; below it, samples pass unchanged."""

LOUDEST_RMS = 1e3
"""Root mean square, 60 dB above full scale, that no sound has: a hop above it is broken, as one with NaN is."""


def limit(x: NDArray[np.float32]) -> None:
    """Bend samples above the knee smoothly towards full scale, in place; memoryless, so it adds no latency."""
    magnitude = np.abs(x)
    if magnitude.max() <= LIMITER_KNEE:
        return
    room = 1.0 - LIMITER_KNEE
    bent = LIMITER_KNEE + room * np.tanh((magnitude - LIMITER_KNEE) / room)
    np.copyto(x, np.copysign(bent, x), where=magnitude > LIMITER_KNEE)
