"""Where sound comes from and goes to: audio devices through PortAudio, and sound files."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
import soundfile
from numpy.typing import NDArray

from realtime.bundle import DEMO_CLIP
from realtime.files import NewFile
from realtime.quiet import quiet_libraries, silence_jack

CLIENT_NAME = "restyle"
LOSSLESS_SUFFIXES = (".wav", ".flac", ".aif", ".aiff", ".caf")
_SUBTYPES = dict.fromkeys(LOSSLESS_SUFFIXES, "PCM_24") | {".ogg": "VORBIS", ".opus": "OPUS", ".mp3": "MPEG_LAYER_III"}
AUDIO_SUFFIXES = tuple(_SUBTYPES)
_INVALID_RATE, _INVALID_CHANNELS = -9997, -9998
_UNLIKE_ENDS = -9993  # input and output that cannot run together
_BLOCK_TOO_LONG, _BLOCK_TOO_SHORT = -9991, -9990
_kept_for_portaudio: list[Any] = []


class DeviceError(RuntimeError):
    """An audio device that is not there or cannot do what was asked; the text lists what there is."""


class NoDeviceError(DeviceError):
    """The machine has no audio device at all, and none was asked for by name."""


class DeviceRateError(DeviceError):
    """An audio device that does not run at the rate that was asked for."""


class AudioFileError(ValueError):
    """A sound file that cannot be read or written; the text names the file and the reason."""


@dataclass(frozen=True)
class Device:
    """One audio device of one host API, as PortAudio numbers it."""

    index: int
    name: str
    host_api: str
    inputs: int
    outputs: int
    sample_rate: float
    default_input: bool
    default_output: bool
    default_input_of_api: bool = False
    default_output_of_api: bool = False

    def __str__(self) -> str:
        return f"{self.index}: {self.name} ({self.host_api}, {self.inputs} in, {self.outputs} out)"


def portaudio(client_name: str | None = None) -> ModuleType:
    """The sounddevice module, or DeviceError with the remedy; ``client_name`` is what a JACK server will show."""
    # Looking for devices must not start an audio server.
    os.environ.setdefault("JACK_NO_START_SERVER", "1")
    try:
        with quiet_libraries():
            import sounddevice
    except OSError:
        raise NoDeviceError(
            "the PortAudio library is not installed; on Debian or Ubuntu: apt-get install libportaudio2"
        ) from None
    if client_name:
        with contextlib.suppress(Exception):
            # PortAudio takes the name only before it starts; other builds have no JACK and no such function.
            sounddevice._terminate()
            # PortAudio keeps the pointer and makes no copy.
            _kept_for_portaudio.append(ctypes.create_string_buffer(client_name.encode()))
            ctypes.CDLL(sounddevice._libname).PaJack_SetClientName(_kept_for_portaudio[-1])  # pyright: ignore[reportAttributeAccessIssue]
        with contextlib.suppress(sounddevice.PortAudioError), quiet_libraries():
            sounddevice._initialize()
    silence_jack()
    return sounddevice


def list_devices() -> list[Device]:
    """Every audio device; empty on a machine without one. Raises DeviceError without PortAudio."""
    sd = portaudio()
    apis: Any = sd.query_hostapis()
    default_in, default_out = sd.default.device[0], sd.default.device[1]
    return [
        Device(
            index,
            str(info["name"]),
            str(apis[info["hostapi"]]["name"]),
            int(info["max_input_channels"]),
            int(info["max_output_channels"]),
            float(info["default_samplerate"]),
            index == default_in,
            index == default_out,
            index == apis[info["hostapi"]]["default_input_device"],
            index == apis[info["hostapi"]]["default_output_device"],
        )
        for index, info in enumerate(sd.query_devices())
    ]


def find_device(devices: list[Device], wanted: str | None, direction: str) -> Device:
    """The device by index, part of its name, host API (that one's default) or ``api:part``, or the default.

    ``direction`` is 'input' or 'output'. Raises DeviceError with the list when nothing, or more than one device, fits.
    """
    usable = [d for d in devices if (d.inputs if direction == "input" else d.outputs)]
    listing = "; ".join(map(str, usable)) or "none"
    if wanted is None:
        for device in usable:
            if device.default_input if direction == "input" else device.default_output:
                return device
        if usable:
            return usable[0]
        raise NoDeviceError(f"this machine has no audio {direction} device")
    if wanted.strip().isdigit():
        for device in usable:
            if device.index == int(wanted):
                return device
        raise DeviceError(f"{direction} device {wanted} does not exist; there are: {listing}")
    part = wanted.casefold()
    exact = [d for d in usable if d.name.casefold() == part]
    found = exact or [d for d in usable if part in f"{d.name} {d.host_api}".casefold()]
    if not found and ":" in part:
        api, _, name = (text.strip() for text in part.partition(":"))
        found = [d for d in usable if api in d.host_api.casefold() and name in d.name.casefold()]
    if len(found) > 1 and all(part in d.host_api.casefold() for d in found):
        found = [
            d for d in found if (d.default_input_of_api if direction == "input" else d.default_output_of_api)
        ] or found
    if not found:
        raise DeviceError(f"no {direction} device is called '{wanted}'; there are: {listing}")
    if len(found) > 1:
        matches = "; ".join(map(str, found))
        raise DeviceError(f"'{wanted}' fits several {direction} devices, give the index: {matches}")
    return found[0]


@dataclass(frozen=True)
class LastingDevice:
    """What stays the same of a device that is unplugged and comes back, perhaps under another number."""

    host_api: str
    name: str

    @classmethod
    def of(cls, device: Device) -> LastingDevice:
        return cls(device.host_api, re.sub(r"\s*\(hw:\d+,\d+\)$", "", device.name))


def find_again(devices: list[Device], lasting: LastingDevice, direction: str) -> Device:
    """That device and no other, 'input' or 'output'. Raises DeviceError while it is away."""
    for device in devices:
        if LastingDevice.of(device) == lasting and (device.inputs if direction == "input" else device.outputs):
            return device
    raise DeviceError(f"{direction} device '{lasting.name}' ({lasting.host_api}) is away")


def device_names(source: Device, sink: Device) -> str:
    """Both, or the one that is both, for a message."""
    return f"'{source.name}'" if source.index == sink.index else f"'{source.name}' and '{sink.name}'"


DuplexCallback = Callable[[Any, NDArray[np.float32], int, Any, Any], None]
"""What came in [frames, inputs], or None without a source; what goes out [frames, outputs]; frames; moment; status."""


def open_duplex(
    sd: ModuleType,
    source: Device | None,
    sink: Device,
    sample_rate: int,
    block: int,
    channels: int,
    callback: DuplexCallback,
) -> Any:
    """An input and output stream in one, not yet started; without a source, an output alone.

    ``block`` 0 leaves the length to the driver (no added delay).
    One channel goes to two outputs where there are two. Raises DeviceError for a rate or a number of channels that the
    device does not do.
    """
    ends = ((source, source.inputs, "input"), (sink, sink.outputs, "output")) if source is not None else ()
    for device, has, direction in ends or ((sink, sink.outputs, "output"),):
        if channels > has:
            raise DeviceError(
                f"'{device.name}' has {has} {direction} channels, {channels} were asked for; "
                f"use --channels {has}, or choose another device with --{direction}"
            )
    outputs = min(max(channels, 2), sink.outputs)
    try:
        with quiet_libraries():
            if source is None:
                return sd.OutputStream(
                    samplerate=sample_rate,
                    blocksize=block,
                    device=sink.index,
                    channels=outputs,
                    dtype="float32",
                    latency="low",
                    callback=lambda out, frames, moment, status: callback(None, out, frames, moment, status),
                )
            return sd.Stream(
                samplerate=sample_rate,
                blocksize=block,
                device=(source.index, sink.index),
                channels=(channels, outputs),
                dtype="float32",
                latency="low",
                callback=callback,
            )
    except sd.PortAudioError as error:
        code = error.args[1] if len(error.args) > 1 else 0
        names = device_names(source or sink, sink)
        if code == _INVALID_RATE:
            raise DeviceRateError(
                f"{names}: cannot run at {sample_rate} Hz (its own is {(source or sink).sample_rate:g} Hz); "
                f"set the device or its server to {sample_rate} Hz, or choose another with --input and --output"
            ) from None
        if code == _INVALID_CHANNELS:
            raise DeviceError(f"{names}: cannot open {channels} inputs and {outputs} outputs") from None
        if code in (_BLOCK_TOO_LONG, _BLOCK_TOO_SHORT):
            size = "long" if code == _BLOCK_TOO_LONG else "short"
            raise DeviceError(
                f"{names}: blocks of {block} samples are too {size} for it; use --block 0, which leaves the length to "
                "the driver, or another length"
            ) from None
        if code == _UNLIKE_ENDS:
            raise DeviceError(
                f"{names}: cannot run together; choose both from one host API with --input and --output"
            ) from None
        raise DeviceError(f"{names}: cannot be opened: {error.args[0]}") from None


@dataclass(frozen=True)
class FileInfo:
    """A sound file's rate, channels and length."""

    path: Path
    sample_rate: int
    channels: int
    frames: int


def file_info(path: Path) -> FileInfo:
    """Raises AudioFileError for a file that is missing, unreadable or empty."""
    if not path.is_file():
        raise AudioFileError(f"{path}: there is no such file; check the path")
    try:
        info = soundfile.info(str(path))
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioFileError(
            f"{path}: is not a sound file that can be read ({error}); use WAV, FLAC, OGG or MP3"
        ) from None
    if info.frames <= 0:
        raise AudioFileError(f"{path}: is empty")
    return FileInfo(path, info.samplerate, info.channels, info.frames)


def read_blocks(path: Path, block: int) -> Iterator[NDArray[np.float32]]:
    """Blocks [channels, up to block] of a sound file in order. Raises AudioFileError when it breaks off."""
    try:
        with soundfile.SoundFile(str(path)) as file:
            while len(frames := file.read(block, dtype="float32", always_2d=True)):
                yield np.ascontiguousarray(frames.T, dtype=np.float32)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioFileError(f"{path}: cannot be read to its end ({error})") from None


def resampled(
    blocks: Iterator[NDArray[np.float32]], old: int, new: int, channels: int
) -> Iterator[NDArray[np.float32]]:
    """A stream of blocks [channels, n] at another rate, aligned to the sample, in constant memory."""
    import soxr

    if old == new:
        yield from blocks
        return
    resampler = soxr.ResampleStream(old, new, channels, dtype="float32", quality="HQ")
    for block in blocks:
        yield _planar(resampler.resample_chunk(np.ascontiguousarray(block.T)), channels)
    yield _planar(resampler.resample_chunk(np.zeros((0, channels), np.float32), last=True), channels)


def _planar(frames: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(frames.reshape(-1, channels).T)


def demo_playing(sample_rate: int, clip: Path = DEMO_CLIP) -> NDArray[np.float32]:
    """A bundled clip in mono [samples] at this rate."""
    import soxr

    audio = np.concatenate(list(read_blocks(clip, 65_536)), axis=1).mean(axis=0)
    return soxr.resample(audio, file_info(clip).sample_rate, sample_rate, quality="VHQ").astype(np.float32)


class AudioWriter:
    """A sound file that appears under its name only when it is whole; the suffix chooses the format.

    As a context: left by an exception (a full disk included), it leaves no file behind. One thread at a time.
    """

    def __init__(self, path: Path, sample_rate: int, channels: int, subtype: str | None = None) -> None:
        """``subtype``: libsndfile's name of the encoding, None for the usual one of the suffix."""
        suffix = path.suffix.lower()
        if suffix not in AUDIO_SUFFIXES:
            raise AudioFileError(f"{path}: '{suffix}' is none of {', '.join(AUDIO_SUFFIXES)}")
        self.path, self.frames = path, 0
        self._new = NewFile(path)
        self.part = self._new.part
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = soundfile.SoundFile(
                str(self.part), "w", sample_rate, channels, subtype=subtype or _SUBTYPES[suffix]
            )
        except (soundfile.SoundFileError, OSError, ValueError) as error:
            with contextlib.suppress(OSError):
                self._new.discard()
            raise AudioFileError(f"{path}: cannot be written ({error})") from None

    def write(self, block: NDArray[np.float32]) -> None:
        """Append [channels, frames]. Raises AudioFileError when the disk is full."""
        try:
            self._file.write(block.T)
            self._file.flush()
        except (soundfile.SoundFileError, OSError) as error:
            raise AudioFileError(f"{self.path}: cannot be written ({error}); is the disk full?") from None
        self.frames += block.shape[1]

    def commit(self) -> None:
        """Finish the file and give it its name. Raises AudioFileError and then leaves no file."""
        try:
            self._file.close()
            written = soundfile.info(str(self.part)).frames
            # A full disk shows itself only in what arrived.
            if self.path.suffix.lower() in LOSSLESS_SUFFIXES and written != self.frames:
                raise AudioFileError(f"{self.path}: only {written} of {self.frames} frames fit; is the disk full?")
            self._new.commit()
        except (soundfile.SoundFileError, OSError) as error:
            raise AudioFileError(f"{self.path}: cannot be written ({error})") from None
        finally:
            self._new.discard()

    def discard(self) -> None:
        """Leave no file behind."""
        with contextlib.suppress(Exception):
            self._file.close()
        self._new.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()
