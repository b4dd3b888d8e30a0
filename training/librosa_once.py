"""librosa, which one process of a user imports at a time: ``from training.librosa_once import librosa``.

On their first import numba compiles functions of librosa and keeps them on the disk. Two processes that do so at once
leave files that do not fit together, and every later process crashes on them (numba issue 10128).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from filelock import FileLock

# A container may run as a user that has a number and no name.
USER = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")

with FileLock(Path(tempfile.gettempdir()) / f"restyle-librosa-{USER}.lock"):
    import librosa
    import librosa.beat
    import librosa.core.audio
    import librosa.core.pitch
    import librosa.onset

__all__ = ["librosa"]
