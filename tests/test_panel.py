"""What a performer reads: latency as a sum that adds up, and names as they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from realtime.engine import EngineMeters
from realtime.live import Status
from realtime.panel import latency_line, latency_terms, panel
from realtime.spectral import SpectralSpec

SPEC = SpectralSpec()
OVERLAPPING = SpectralSpec(synthesis_window_samples=256)
OWN = {"hop": 128}


def performance(ready: dict[str, Any]) -> Any:
    return SimpleNamespace(
        manifest=SimpleNamespace(spectral=SPEC, name="first [take]"),
        bundle=SimpleNamespace(title="first [take]"),
        ready=ready,
        midi_names=["pad [1]"],
        sample_rate=48_000,
    )


def device(samples: tuple[int, int] | None, block: int) -> dict[str, Any]:
    box = {"name": "box [usb]", "host_api": "ALSA"}
    return {"input": box, "output": box, "block": block, "device_samples": samples}


@pytest.mark.parametrize(
    ("ready", "block", "terms", "text"),
    [
        ({"clip": "a.wav", "block": 128}, 128, OWN, "128 samples (2.67 ms) = hop 128"),
        (
            device((432, 480), 128),
            128,
            {"device in": 432, **OWN, "device out": 480},
            "1040 samples (21.67 ms) = device in 432 + hop 128 + device out 480",
        ),
        (
            device(None, 0),
            64,
            {"JACK period": 64, **OWN},
            "192 samples (4.00 ms) = JACK period 64 + hop 128",
        ),
        (
            device(None, 256),
            256,
            {"block": 256, **OWN},
            "384 samples (8.00 ms) = block 256 + hop 128 + JACK period",
        ),
    ],
)
def test_the_latency_is_the_sum_of_what_the_host_api_adds_and_our_own(
    ready: dict[str, Any], block: int, terms: dict[str, int], text: str
) -> None:
    assert latency_terms(SPEC, ready, block) == terms
    assert latency_line(performance(ready), block) == text


def test_a_synthesis_window_that_overlaps_has_a_term_of_its_own() -> None:
    terms = latency_terms(OVERLAPPING, {"clip": "a.wav", "block": 128}, 128)
    assert terms == {"hop": 128, "overlap": 128}


def test_the_panel_shows_brackets_in_names() -> None:
    hop_ms = {"p50": 0.5, "p99": 0.6, "p999": 0.7, "max": 0.8}
    values = {"dry_wet": 1.0, "input_gain_db": 0.0, "output_gain_db": 0.0, "morph": 0.0}
    status = Status(1.0, {"Choir [dark]": 1.0}, values, EngineMeters(block=128), hop_ms, 2.67, None, "", 0)
    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        console.print(panel(performance(device((10, 20), 128)), status))
    for name in ("Choir [dark] 100%", "first [take]", "box [usb] -> box [usb]", "pad [1]"):
        assert name in capture.get()
