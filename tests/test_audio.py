"""Audio devices: which one is meant, what it can do, and what is said when there is none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from realtime.audio import Device, DeviceError, LastingDevice, NoDeviceError, find_again, find_device, open_duplex
from realtime.engine import EngineSettings, device_latency_samples, no_device_report


def device(
    index: int = 0,
    inputs: int = 2,
    outputs: int = 2,
    name: str = "box",
    default: bool = False,
    api: str = "ALSA",
    default_of_api: bool = False,
) -> Device:
    return Device(
        index, name, api, inputs, outputs, 48_000.0, default, default, default_of_api, default_of_api and outputs > 0
    )


class RefusedError(Exception):
    """What PortAudio raises: a text and a number."""


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


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (-9990, r"'box': blocks of 16 samples are too short for it; use --block 0"),
        (-9991, r"'box': blocks of 16 samples are too long for it; use --block 0"),
        (-9997, r"'box': cannot run at 48000 Hz \(its own is 48000 Hz\); set the device"),
        (-9993, r"'box': cannot run together; choose both from one host API"),
        (-9999, r"'box': cannot be opened: no"),
    ],
)
def test_what_a_driver_refuses_is_said_with_the_remedy(code: int, text: str) -> None:
    def refuse(**_: object) -> None:
        raise RefusedError("no", code)

    library: Any = SimpleNamespace(Stream=refuse, PortAudioError=RefusedError)
    with pytest.raises(DeviceError, match=text):
        open_duplex(library, device(), device(), 48_000, 16, 1, lambda *_: None)


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


def test_a_device_that_comes_back_is_the_same_one_under_whatever_number_and_no_other() -> None:
    before = device(1, name="Scarlett 2i2: USB Audio (hw:1,0)", default=True)
    others = [device(0, name="HDA Intel: ALC295 (hw:0,0)", default=True), device(2, name=before.name, api="JACK")]
    again = device(3, name="Scarlett 2i2: USB Audio (hw:2,0)", inputs=0)
    with pytest.raises(DeviceError, match=r"output device 'Scarlett 2i2: USB Audio' \(ALSA\) is away"):
        find_again(others, LastingDevice.of(before), "output")
    assert find_again([*others, again], LastingDevice.of(before), "output") == again
    with pytest.raises(DeviceError, match="input device"):
        find_again([*others, again], LastingDevice.of(before), "input")


def test_a_device_is_meant_by_index_part_of_its_name_or_host_api() -> None:
    devices = [
        device(0, name="default", default=True),
        device(1, name="Scarlett 2i2: USB Audio (hw:1,0)", default_of_api=True),
        device(2, name="system", api="JACK Audio Connection Kit"),
        device(3, name="PulseAudio", api="JACK Audio Connection Kit", default_of_api=True),
        device(4, name="Scarlett 2i2", api="Windows WASAPI"),
    ]
    for wanted, index in {
        "2": 2,
        "usb audio": 1,
        "hw:1,0": 1,
        "default": 0,
        "jack": 3,
        "alsa": 1,
        "JACK: system": 2,
        "wasapi:scarlett": 4,
        "Scarlett 2i2": 4,
    }.items():
        assert find_device(devices, wanted, "input").index == index, wanted
    for wanted, text in {
        "scarlett": "'scarlett' fits several input devices, give the index: 1: .*4: ",
        "9": "input device 9 does not exist; there are: 0: ",
        "jack:usb": "no input device is called 'jack:usb'; there are: 0: ",
    }.items():
        with pytest.raises(DeviceError, match=text):
            find_device(devices, wanted, "input")


def test_latency_is_what_portaudio_reports_but_with_jack() -> None:
    assert device_latency_samples("ALSA", (0.009, 0.010), 48_000) == (432, 480)
    assert device_latency_samples("JACK Audio Connection Kit", (0.009, 0.010), 48_000) is None
