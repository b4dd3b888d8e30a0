"""Fixtures that several test files share. Nothing here imports torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from hypothesis import settings

from realtime.jack_server import JackServer

settings.register_profile("shared machine", deadline=None)  # nothing passes or fails by being faster
settings.load_profile("shared machine")

SAX_STYLE = """[[style]]
id = "sax"
label = "Saxophone"
folder = "sax"
midi_program = 65
licence = "CC0-1.0"
attribution = "Weresax, Karoryfer Samples"
"""
"""One style of a recipe."""


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


@pytest.fixture
def jack_server(request: pytest.FixtureRequest) -> Iterator[JackServer]:
    """A JACK server for one test; parametrize indirectly with (sample rate, period), default (48 000 Hz, 128)."""
    if shutil.which("jackd") is None:
        pytest.skip("jackd is not installed; 'make setup' installs it")
    sample_rate, period_samples = getattr(request, "param", (48_000, 128))
    with JackServer(sample_rate, period_samples) as server:
        yield server
