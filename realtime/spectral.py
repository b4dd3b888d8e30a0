"""Short-time spectral geometry and the latency that follows from it.

Pure arithmetic and numpy, shared by training, export and the engine so that all three run one geometry.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SpectralSpec:
    """Hop, windows and rate of a streaming analysis and synthesis.

    The analysis window looks far back and ends on the newest sample. What is made of a frame covers its last part: one
    hop, which delays nothing more, or two, which overlap and delay by one. Asymmetric windows after Mauler and Martin,
    "A low delay, variable resolution, perfect reconstruction spectral analysis-synthesis system", EUSIPCO 2007.
    """

    sample_rate: int = 48_000
    hop_samples: int = 128
    analysis_window_samples: int = 1024
    synthesis_window_samples: int = 128

    def __post_init__(self) -> None:
        for field in ("sample_rate", "hop_samples", "analysis_window_samples", "synthesis_window_samples"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field}: must be above zero, got {getattr(self, field)}")
        if self.synthesis_window_samples not in (self.hop_samples, 2 * self.hop_samples):
            raise ValueError(
                f"synthesis_window_samples: must be hop_samples ({self.hop_samples}) or twice as many, "
                f"got {self.synthesis_window_samples}"
            )
        if self.analysis_window_samples % self.hop_samples:
            raise ValueError(
                f"analysis_window_samples: must be a multiple of hop_samples ({self.hop_samples}), "
                f"got {self.analysis_window_samples}"
            )
        if self.analysis_window_samples < 2 * self.hop_samples:
            raise ValueError(
                f"analysis_window_samples: must be at least twice hop_samples ({2 * self.hop_samples}), "
                f"got {self.analysis_window_samples}"
            )

    @property
    def hop_seconds(self) -> float:
        return self.hop_samples / self.sample_rate

    @property
    def stream_delay_samples(self) -> int:
        """Sample i of the output stream is sample i minus this of the input stream, chunk in against chunk out."""
        return self.synthesis_window_samples - self.hop_samples

    @property
    def latency_samples(self) -> int:
        """Algorithmic latency: a hop must be full before it is computed; a longer synthesis window then overlaps."""
        return self.hop_samples + self.stream_delay_samples

    def analysis_window(self) -> NDArray[np.float64]:
        """What a frame is measured under [analysis_window_samples]: a Hann window whose fall is steeper than its rise.

        The newest samples count soon, and yet both slopes are smooth: what is measured of a steady tone hardly depends
        on where in its period a frame ends, so it does not change from hop to hop.
        """
        fall = min(2 * self.hop_samples, self.analysis_window_samples // 2)
        rise = self.analysis_window_samples - fall
        return np.concatenate(
            [
                np.sin(0.5 * np.pi * (np.arange(rise) + 0.5) / rise) ** 2,
                np.cos(0.5 * np.pi * (np.arange(fall) + 0.5) / fall) ** 2,
            ]
        )
