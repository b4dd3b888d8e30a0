"""Audio devices: which one is meant, what it can do, and what is said when there is none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from realtime.audio import Device, DeviceError, NoDeviceError, find_device, open_duplex
from realtime.engine import EngineSettings, device_latency_samples, no_device_report


def device(index: int = 0, inputs: int = 2, outputs: int = 2, name: str = "box", default: bool = False) -> Device:
    return Device(index, name, "ALSA", inputs, outputs, 48_000.0, default, default)


class RefusedError(Exception):
    pass


def opened_channels(source: Device, sink: Device, channels: int) -> tuple[int, int]:
    """How many inputs and outputs PortAudio is asked for."""
    library: Any = SimpleNamespace(Stream=lambda **arguments: arguments, PortAudioError=RefusedError)
    return open_duplex(library, source, sink, 48_000, 128, channels, lambda *_: None)["channels"]


def test_every_restyled_channel_has_an_output_and_one_channel_has_two() -> None:
    assert opened_channels(device(), device(), 1) == (1, 2)
    assert opened_channels(device(), device(outputs=1), 1) == (1, 1)
    assert opened_channels(device(inputs=8), device(outputs=8), 4) == (4, 4)


def test_channels_that_a_device_does_not_have_are_refused_on_either_side() -> None:
    with pytest.raises(DeviceError, match=r"'box' has 2 input channels, 4 were asked for; use --channels 2"):
        opened_channels(device(), device(outputs=8), 4)
    with pytest.raises(
        DeviceError, match=r"'box' has 2 output channels, 4 were asked for; use --channels 2, or .*--out"
    ):
        opened_channels(device(inputs=8), device(), 4)


def settings(**devices: str) -> EngineSettings:
    names = {"input_device": None, "output_device": None, **devices}
    return EngineSettings(
        model=Path("m.onnx"),
        provider="cpu",
        channels=1,
        block=0,
        clip=None,
        loop=False,
        controls_name="",
        meters_name="",
        hops_name="",
        sound_name=None,
        **names,
    )


def test_only_a_performance_that_names_no_device_may_go_on_without_one() -> None:
    error = NoDeviceError("the PortAudio library is not installed")
    assert no_device_report(settings(), error) == ("no_device", "the PortAudio library is not installed")
    kind, text = no_device_report(settings(input_device="scarlett", output_device="3"), error)
    assert kind == "error"
    assert text.startswith("--input scarlett --output 3: the PortAudio library is not installed; 'restyle devices'")


def test_the_default_is_meant_where_nothing_is_named() -> None:
    devices = [device(0, name="a"), device(1, name="b", default=True)]
    assert find_device(devices, None, "input").index == 1
    assert find_device(devices[:1], None, "output").index == 0
    with pytest.raises(NoDeviceError, match="no audio input device"):
        find_device([device(inputs=0)], None, "input")


def test_latency_is_what_portaudio_reports_but_with_jack() -> None:
    assert device_latency_samples("ALSA", (0.009, 0.010), 48_000) == (432, 480)
    assert device_latency_samples("JACK Audio Connection Kit", (0.009, 0.010), 48_000) is None
