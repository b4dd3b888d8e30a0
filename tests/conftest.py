"""Fixtures that several test files share. Nothing here imports torch before a test asks for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import soundfile
from hypothesis import settings

from realtime.jack_server import JackServer

settings.register_profile("shared machine", deadline=None)  # nothing passes or fails by being faster
settings.load_profile("shared machine")

CLIPS = Path(__file__).parent / "data"

SAX_STYLE = """[[style]]
id = "sax"
label = "Saxophone"
folder = "sax"
midi_program = 65
licence = "CC0-1.0"
attribution = "Weresax, Karoryfer Samples"
"""
VIBRAPHONE_STYLE = """[[style]]
id = "vibraphone"
label = "Vibraphone"
folder = "vibraphone"
midi_program = 11
licence = "CC0-1.0"
attribution = "atonia"
"""
"""Styles of a recipe, of which ``write_notes`` makes the recordings."""


TINY_RECOGNISER = """objective = "recognise"
[spectral]
hop_samples = 512
synthesis_window_samples = 512
[recogniser]
band_count = 24
channels = [4, 6, 6, 8]
feature_count = 12
embedding_dim = 4
window_seconds = 0.5
dropout = 0.0
"""
"""The start of a recipe whose recogniser learns in seconds."""


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


def write_notes(folder: Path, parts: Mapping[str, int] = MappingProxyType({"sax": 3, "vibraphone": 3})) -> None:
    """Style folders of real notes in ``folder``: each of a style's clips cut into so many parts."""
    clips = {"sax": ("alto_sax_a3", "alto_sax_e4"), "vibraphone": ("vibraphone_418hz",)}
    for style, count in parts.items():
        (folder / style).mkdir()
        for name in clips[style]:
            audio, rate = soundfile.read(CLIPS / f"{name}.flac", dtype="float32")
            for number, part in enumerate(np.array_split(audio, count)):
                soundfile.write(folder / style / f"{name}{number}.flac", part, rate)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors as small as those of tests are slower on several threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def jack_server(request: pytest.FixtureRequest) -> Iterator[JackServer]:
    """A JACK server for one test; parametrize indirectly with (sample rate, period), default (48 000 Hz, 128)."""
    if shutil.which("jackd") is None:
        pytest.skip("jackd is not installed; 'make setup' installs it")
    sample_rate, period_samples = getattr(request, "param", (48_000, 128))
    with JackServer(sample_rate, period_samples) as server:
        yield server
