"""What a performer reads: latency as a sum that adds up, names as they are, and in red what went wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console, Group
from rich.text import Text

from realtime.engine import EngineMeters
from realtime.live import Status
from realtime.panel import latency_line, latency_terms, panel, status_line
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


def status_of(counts: dict[str, float], **more: Any) -> Status:
    """``counts`` are the audio process's."""
    hop_ms = {"p50": 0.5, "p99": 0.6, "p999": 0.7, "max": 0.8}
    values = {"dry_wet": 1.0, "input_gain_db": 0.0, "output_gain_db": 0.0, "morph": 0.0}
    meters = EngineMeters(block=128, **counts)
    return Status(1.0, {"Choir [dark]": 1.0}, values, meters, hop_ms, 2.67, None, "", **{"dropped_frames": 0, **more})


def line(status: Status, name: str) -> Text | None:
    """The line of the panel that begins so."""
    group = panel(performance(device((10, 20), 128)), status)
    assert isinstance(group, Group)
    texts = [part for part in group.renderables if isinstance(part, Text)]
    return next((text for text in texts if text.plain.startswith(name)), None)


def test_without_faults_nothing_is_red() -> None:
    faults = line(status_of({}), "faults")
    assert faults is not None and faults.plain.split(maxsplit=1)[1] == "xruns 0, late hops 0" and faults.style == ""
    assert line(status_of({}), "raised") is None and "raised" not in status_line(status_of({}))


@pytest.mark.parametrize(
    ("counts", "more", "shown", "told"),
    [
        ({"xruns": 2}, {}, "xruns 2", "xruns 2"),
        ({"misses": 2}, {}, "late hops 2", "late 2"),
        ({"late_hops": 2}, {}, "dry for want of time 2", "dry 2"),
        ({"bad_input_hops": 2}, {}, "bad input 2", "bad in 2"),
        ({"bad_output_hops": 2}, {}, "bad output 2", "out 2"),
        ({"errors": 2}, {}, "errors 2", "errors 2"),
        ({}, {"restarts": 2}, "graph restarts 2", "restarts 2"),
        ({}, {"outages": 2}, "audio outages 2", "outages 2"),
        ({}, {"lost_ports": 2}, "MIDI ports lost 2", "MIDI lost 2"),
        ({}, {"lost_messages": 7}, "MIDI messages lost 7", "MIDI messages lost 7"),
        ({}, {"dropped_frames": 2}, "recording dropped frames 2", ""),
    ],
)
def test_each_fault_is_counted_in_red_and_in_the_line_for_a_log(
    counts: dict[str, float], more: dict[str, int], shown: str, told: str
) -> None:
    status = status_of(counts, **more)
    faults = line(status, "faults")
    assert faults is not None and shown in faults.plain and faults.style == "red"
    assert told in status_line(status)


def test_what_the_graph_raised_is_shown_word_by_word() -> None:
    status = status_of({"bad_output_hops": 1}, fault="the graph failed: RuntimeError: axis [0]")
    raised = line(status, "raised")
    assert raised is not None and raised.plain.endswith("the graph failed: RuntimeError: axis [0]")
    assert raised.style == "red" and status_line(status).endswith("raised: the graph failed: RuntimeError: axis [0]")


def test_the_panel_shows_brackets_in_names() -> None:
    status = status_of({})
    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        console.print(panel(performance(device((10, 20), 128)), status))
    for name in ("Choir [dark] 100%", "first [take]", "box [usb] -> box [usb]", "pad [1]"):
        assert name in capture.get()
