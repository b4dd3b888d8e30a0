"""The audio process: a source, the processor, a sink, and nothing else that runs Python.

It is started by ``live`` in a fresh interpreter. Controls come in and meters go out through shared memory; the pipe
says 'ready', 'fault', 'error' and 'ended', one that returns 'loaded' before it looks for its device, and hears 'stop'.
If the parent goes away, the process ends.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realtime.audio import (
    CLIENT_NAME,
    AudioFileError,
    Device,
    DeviceError,
    DeviceRateError,
    LastingDevice,
    NoDeviceError,
    device_names,
    file_info,
    find_again,
    find_device,
    list_devices,
    open_duplex,
    portaudio,
    read_blocks,
)
from realtime.bundle import BundleError, ProviderError, read_bundle
from realtime.controls import Controls
from realtime.ensemble import ALONE, Parts, join
from realtime.privileges import be_urgent, lock_memory
from realtime.processor import Processor, RateError
from realtime.resample import RateAdapter, at_rate
from realtime.ring import Mailbox, Ring
from realtime.show import pack_event
from realtime.worker import PATIENCE_SHARE, Link, RemoteStream

MAX_BLOCK = 8192
RISE_SAMPLES = 2048
RETRY_S = 0.2
LEAST_ASTRAY_S, ASTRAY = 0.5, 0.001
"""How far the clock of a JACK server may be from the system's, in seconds and as a share of the time between."""
HOP_FIELDS = ("hop_ms", "graph_ms")
FAULT_INTERVAL_S = 1.0
"""A graph may raise another text at every hop; the pipe and the performer are told no more often than that."""
FAULT_CHARACTERS = 300


@dataclass(frozen=True)
class EngineSettings:
    """All that the audio process needs to know; ``clip`` plays a file at its own pace instead of a device.

    ``heard_name`` is a ring like ``sound_name``'s, for a listener that may miss what it likes.
    ``link`` leads to the graph's workers; without it, the graph runs in the audio callback. One that takes the place
    of an audio process that is gone is ``returning``: it waits for its devices, the ones of ``before`` (input, output)
    and no others, and counts on from ``start_frames``. A recording that was begun is at ``recorded_rate``; what is
    played at another rate does not go into it.
    """

    model: Path
    provider: str
    channels: int
    block: int
    input_device: str | None
    output_device: str | None
    clip: Path | None
    loop: bool
    controls_name: str
    meters_name: str
    hops_name: str
    sound_name: str | None
    journal_name: str | None = None
    heard_name: str | None = None
    link: Link | None = None
    deferred: bool = False
    seed: int = 0
    patience_ms: float | None = None
    start_frames: int = 0
    returning: bool = False
    before: tuple[LastingDevice, LastingDevice] | None = None
    recorded_rate: int | None = None
    parts: Parts = ALONE


COUNTS = ("xruns", "misses", "bad_input_hops", "bad_output_hops", "late_hops", "errors")


@dataclass(frozen=True)
class EngineMeters:
    """A snapshot of the audio process; ``alive_at`` is its last sign of life on the system's monotonic clock.

    ``block`` is what the device brings at once, in samples.
    """

    frames: float = 0.0
    alive_at: float = 0.0
    block: float = 0.0
    input_rms: float = 0.0
    output_rms: float = 0.0
    xruns: float = 0.0
    misses: float = 0.0
    bad_input_hops: float = 0.0
    bad_output_hops: float = 0.0
    late_hops: float = 0.0
    errors: float = 0.0

    def pack(self) -> NDArray[np.float64]:
        return np.array(list(vars(self).values()), dtype=np.float64)

    def plus(self, later: EngineMeters) -> EngineMeters:
        """``later`` with what an earlier audio process counted added to its counts."""
        counts = {name: getattr(self, name) + getattr(later, name) for name in COUNTS}
        return replace(later, **counts)

    @classmethod
    def unpack(cls, values: NDArray[np.float64]) -> EngineMeters:
        return cls(*values.tolist())


METER_COUNT = len(EngineMeters().pack())


class Engine:
    """The processor between shared memory and whoever brings blocks; ``run_block`` belongs to the audio thread."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.bundle = join(read_bundle(settings.model), settings.parts)
        self._remote = RemoteStream(self.bundle.manifest, settings.link, settings.deferred) if settings.link else None
        self.processor = Processor(self.bundle, settings.provider, stream=self._remote, seed=settings.seed)
        self.model_rate = self.bundle.manifest.spectral.sample_rate
        self.listens = self.bundle.manifest.kind != "generate"
        """Whether what comes in is heard at all."""
        channels = settings.channels
        self.use_rate(self.model_rate)
        # Shared memory comes last: nothing after it can fail and leave it open.
        self._controls = Mailbox.attach(settings.controls_name)
        self._meters = Mailbox.attach(settings.meters_name)
        self._hops = Ring.attach(settings.hops_name)
        self._sound = Ring.attach(settings.sound_name) if settings.sound_name else None
        self._journal = Ring.attach(settings.journal_name) if settings.journal_name else None
        self._heard = Ring.attach(settings.heard_name) if settings.heard_name else None
        if self._journal is not None:
            self.processor.journal = []
            # Also where nothing is recorded at this rate yet: the device may take another one.
            self._journal.push(pack_event("start", settings.start_frames, None, self.bundle.manifest.style_dim))
        self.processor.controls = Controls.unpack(self._controls.read())
        self.processor.reset()
        self._in = np.zeros((channels, MAX_BLOCK), np.float32)
        self.out = np.zeros((channels, MAX_BLOCK), np.float32)
        self._record = np.zeros((MAX_BLOCK, 2 * channels), np.float32)
        self._hop_budget_ms = 1e3 * self.bundle.manifest.spectral.hop_seconds
        self._block_samples = 0
        self._period_began, self._period_samples, self._gathered = -1.0, 0, 0
        self.frames = settings.start_frames
        self.xruns = 0
        self.misses = 0
        self.errors = 0
        self._block_fault = ""
        self._told: set[str] = set()
        self._told_at = 0.0

    def use_rate(self, sample_rate: int) -> None:
        """Play at this rate from now on; not while the stream runs. Raises RateError."""
        self.sample_rate = sample_rate
        self._records = self.settings.recorded_rate in (None, sample_rate)
        self.plugin: Processor | RateAdapter = at_rate(self.processor, sample_rate)
        self.plugin.prepare(sample_rate, MAX_BLOCK, self.settings.channels)

    def run_block(self, block: NDArray[np.float32]) -> NDArray[np.float32]:
        """block [channels, up to MAX_BLOCK] -> the same shape, valid until the next call. Never raises, never waits."""
        samples = block.shape[1]
        out = self.out[:, :samples]
        if samples != self._block_samples:
            self._expect(samples)
        if self._controls.changed():
            self.processor.controls = Controls.unpack(self._controls.read())
        try:
            self.plugin.process(block, out)
        except Exception as error:
            # Silence for one block beats an audio thread that is gone; the count and the text are shown.
            self.errors += 1
            self._block_fault = f"{type(error).__name__}: {error}"
            out[:] = 0.0
            self._tell("error", self.frames)
        if self.settings.returning:
            rise(out, self.frames - self.settings.start_frames)
        self.frames += samples
        self._report(samples)
        if self.processor.journal:  # before the sound: what is recorded can be replayed to its end
            self._tell_journal()
        recorded = self._sound if self._records else None
        if recorded is not None or self._heard is not None:
            channels = self.settings.channels
            self._record[:samples, :channels] = block.T
            self._record[:samples, channels:] = out.T
            for ring in (recorded, self._heard):
                if ring is not None:
                    ring.push(self._record[:samples])
        return out

    def new_fault(self) -> str:
        """In one line, what was raised last, the first time that it is asked for; '' where there is nothing new."""
        now = time.monotonic()
        if now - self._told_at < FAULT_INTERVAL_S:
            return ""
        for who, text in (("graph", self.processor.meters.fault), ("engine", self._block_fault)):
            if text and text not in self._told:
                self._told.add(text)
                self._told_at = now
                return f"the {who} failed: {' '.join(text.split())[:FAULT_CHARACTERS]}"
        return ""

    @property
    def deferred_samples(self) -> int:
        """How much later than in the callback the graph's answers are taken."""
        return self.processor.latency_samples - self.bundle.manifest.latency_samples

    @property
    def ready(self) -> bool:
        """Whether the graph is loaded."""
        return self._remote is None or self._remote.ready

    def _expect(self, samples: int) -> None:
        """Blocks have another length now, and so has the time for a hop."""
        self._block_samples = samples
        if self._remote is not None:
            span_s = min(samples / self.sample_rate, self.processor.hop_samples / self.model_rate)
            patience_ms = self.settings.patience_ms
            self._remote.timeout_s = PATIENCE_SHARE * span_s if patience_ms is None else 1e-3 * patience_ms

    def _tell(self, kind: str, at: int, controls: Controls | None = None) -> None:
        if self._journal is not None and self._records:
            self._journal.push(pack_event(kind, at, controls, self.bundle.manifest.style_dim))

    def _tell_journal(self) -> None:
        """Controls taken and faults of the last block, for the recorder."""
        journal, self.processor.journal = self.processor.journal or [], []
        for hop, what in journal:
            if isinstance(what, str):
                self._tell(what, hop)
            else:
                self._tell("controls", hop, what)

    def _report(self, samples: int) -> None:
        meters = self.processor.meters
        times = self.plugin.take_hop_times()
        if len(times):
            self.misses += int((times[:, 0] > self._hop_budget_ms).sum())
            self._hops.push(times)
        self._meters.write(
            np.array(
                (
                    self.frames,
                    time.monotonic(),
                    self._period_samples or samples,
                    meters.input_rms,
                    meters.output_rms,
                    self.xruns,
                    self.misses,
                    meters.bad_input_hops,
                    meters.bad_output_hops,
                    meters.late_hops,
                    self.errors,
                )
            )
        )

    def on_audio(
        self, source: NDArray[np.float32] | None, sink: NDArray[np.float32], frames: int, moment: Any, status: Any
    ) -> None:
        """PortAudio's callback: source [frames, inputs], or None where there is no input; sink [frames, outputs]."""
        if status:
            self.xruns += 1
        if moment.currentTime != self._period_began:  # PortAudio brings a long JACK period in parts of 1024
            self._period_began, self._period_samples, self._gathered = moment.currentTime, self._gathered, 0
        self._gathered += frames
        channels = self.settings.channels
        at = 0
        while at < frames:
            count = min(MAX_BLOCK, frames - at)
            block = self._in[:, :count]
            block[:] = 0.0 if source is None else source[at : at + count, :channels].T
            out = self.run_block(block)
            sink[at : at + count] = out[: sink.shape[1]].T  # one channel goes to every output
            at += count

    def close(self) -> None:
        memories = (self._controls, self._meters, self._hops, self._sound, self._journal, self._heard, self._remote)
        for shared in memories:
            if shared is not None:
                shared.close()


def rise(out: NDArray[np.float32], done: int) -> None:
    """Fade in place [channels, n] what starts anew in the middle of a performance, ``done`` samples after its start."""
    left = RISE_SAMPLES - done
    if left > 0:
        count = min(left, out.shape[1])
        out[:, :count] *= np.arange(done, done + count, dtype=np.float32) / np.float32(RISE_SAMPLES)


def engine_process(settings: EngineSettings, pipe: Connection) -> None:
    """The audio process's main function."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and says 'stop'
    engine = None
    try:
        engine = Engine(settings)
        gc.collect()
        gc.freeze()
        gc.disable()
        if settings.link is not None or settings.provider == "cpu":  # the libraries of a GPU are gigabytes
            lock_memory()
        sys.setswitchinterval(5e-4)
        warnings.simplefilter("ignore", RuntimeWarning)  # bad numbers are counted; to print them would take time
        while not engine.ready:
            if _stop_asked(pipe, 0.005):
                return
        if settings.returning:
            pipe.send(("loaded", ""))
        if settings.clip is not None:
            _play_clip(engine, settings.clip, pipe)
        else:
            _play_device(engine, pipe)
        pipe.send(("ended", ""))
    except NoDeviceError as error:
        pipe.send(no_device_report(settings, error))
    except (BundleError, DeviceError, AudioFileError, ProviderError, RateError) as error:
        pipe.send(("error", str(error)))
    except (BrokenPipeError, EOFError):
        pass
    except Exception:
        with contextlib.suppress(OSError):
            pipe.send(("error", f"the audio process failed:\n{traceback.format_exc()}"))
    finally:
        if engine is not None:
            engine.close()


def no_device_report(settings: EngineSettings, error: NoDeviceError) -> tuple[str, str]:
    """What the parent hears where there is no audio: 'no_device', or an 'error' if a device was asked for by name."""
    asked = [
        f"--{direction} {name}"
        for direction, name in (("input", settings.input_device), ("output", settings.output_device))
        if name is not None
    ]
    if not asked:
        return "no_device", str(error)
    remedy = "'restyle devices' lists what there is; without the option, the bundled clip is performed"
    return "error", f"{' '.join(asked)}: {error}; {remedy}"


def _stop_asked(pipe: Connection, seconds: float) -> bool:
    """Wait that long for 'stop'; without a parent, end here and now."""
    try:
        return pipe.poll(seconds) and pipe.recv() == "stop"
    except (EOFError, OSError):
        # Nobody is left who could end this process if PortAudio waited for its server for ever.
        os._exit(1)


def _tell_fault(engine: Engine, pipe: Connection) -> None:
    if text := engine.new_fault():
        with contextlib.suppress(OSError):  # a parent that is gone is seen when it is asked for 'stop'
            pipe.send(("fault", text))


def choose_devices(settings: EngineSettings, listens: bool = True) -> tuple[Device, Device]:
    """Input and output device for the settings, twice the output for who does not listen. Raises DeviceError."""
    devices = list_devices()
    if settings.before is not None:
        source, sink = settings.before
        return find_again(devices, source, "input" if listens else "output"), find_again(devices, sink, "output")
    if not listens:
        sink = find_device(devices, settings.output_device, "output")
        return sink, sink
    source = find_device(devices, settings.input_device, "input")
    wanted = settings.output_device
    if wanted is None and settings.input_device is not None and source.outputs:
        return source, source
    return source, find_device(devices, wanted, "output")


def device_latency_samples(host_api: str, latency_s: tuple[float, float], sample_rate: int) -> tuple[int, int] | None:
    """What input and output of a device add, in samples, as PortAudio reports it; None with JACK, where it misleads."""
    if "JACK" in host_api:
        return None
    return round(latency_s[0] * sample_rate), round(latency_s[1] * sample_rate)


def another_server(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a JACK server has taken the place of another one, by what the audio process said when it was ready.

    A server's clock begins with it; no two clocks run alike, and one may stop in an xrun.
    """
    if before.get("server_s") is None or now.get("server_s") is None:
        return False
    (then_s, began_s), (now_s, is_s) = before["server_s"], now["server_s"]
    elapsed_s = is_s - began_s
    return abs(now_s - then_s - elapsed_s) > max(LEAST_ASTRAY_S, ASTRAY * elapsed_s)


def _open_device(engine: Engine) -> tuple[Any, Device, Device, int]:
    """The running stream, its devices and the length of its blocks. Raises DeviceError."""
    settings = engine.settings
    sd = portaudio(CLIENT_NAME)
    source, sink = choose_devices(settings, engine.listens)
    jack, own_rate = "JACK" in source.host_api, round(source.sample_rate)

    def open_at(rate: int) -> tuple[Any, int]:
        if rate != engine.sample_rate:
            engine.use_rate(rate)
        # JACK sets the length itself, and any fixed one would add its own delay there.
        hop_samples = round(engine.processor.hop_samples * rate / engine.model_rate)
        block = settings.block or (0 if jack else hop_samples)
        return open_duplex(
            sd, source if engine.listens else None, sink, rate, block, settings.channels, engine.on_audio
        ), block

    try:
        # A JACK server has one rate; other devices often have several.
        stream, block = open_at(own_rate if jack else engine.model_rate)
    except DeviceRateError:
        if own_rate == engine.sample_rate:
            raise
        stream, block = open_at(own_rate)
    try:
        stream.start()
    except sd.PortAudioError as error:
        stream.close()
        raise DeviceError(f"{device_names(source, sink)}: cannot be started: {error.args[0]}") from None
    return stream, source, sink, block


def _play_device(engine: Engine, pipe: Connection) -> None:
    settings = engine.settings
    be_urgent()
    while True:
        try:
            stream, source, sink, block = _open_device(engine)
            break
        except DeviceError:
            if not settings.returning:
                raise
            if _stop_asked(pipe, RETRY_S):
                return
    # An output alone has one latency.
    latency_s = stream.latency if engine.listens else (0.0, stream.latency)
    ready = {
        "devices": (LastingDevice.of(source), LastingDevice.of(sink)),
        "input": asdict(source) if engine.listens else asdict(source) | {"name": f"noise of seed {settings.seed}"},
        "output": asdict(sink),
        "block": block,
        "sample_rate": engine.sample_rate,
        "latency_samples": engine.plugin.latency_samples,
        "deferred_samples": engine.deferred_samples,
        "device_samples": device_latency_samples(source.host_api, latency_s, engine.sample_rate),
        "server_s": (stream.time, time.monotonic()) if "JACK" in source.host_api else None,
    }
    pipe.send(("ready", ready))
    while not _stop_asked(pipe, 0.1):
        _tell_fault(engine, pipe)
        if not stream.active:
            pipe.send(("error", f"{device_names(source, sink)}: went away during the performance"))
            # PortAudio waits for a dead JACK server for ever: in stop, in close, and when the interpreter exits.
            os._exit(1)
    stream.abort()
    stream.close()


def _play_clip(engine: Engine, clip: Path, pipe: Connection) -> None:
    """A file at real-time pace: each block is processed when its last sample would have been played."""
    import soxr

    settings, rate = engine.settings, engine.sample_rate
    info = file_info(clip)
    block = settings.block or engine.processor.hop_samples
    audio = np.concatenate(list(read_blocks(clip, 65_536)), axis=1)
    if info.sample_rate != rate:
        audio = soxr.resample(audio.T, info.sample_rate, rate).T
    if audio.shape[0] > settings.channels:
        audio = audio[: settings.channels] if settings.channels > 1 else audio.mean(axis=0, keepdims=True)
    audio = np.ascontiguousarray(np.resize(audio, (settings.channels, audio.shape[1])), dtype=np.float32)
    if not engine.listens:
        audio = np.zeros_like(audio)  # a clip then only says how long
    total = math.ceil((audio.shape[1] + engine.processor.latency_samples) / block) * block
    audio = np.pad(audio, ((0, 0), (0, total - audio.shape[1])))
    be_urgent()
    pipe.send(
        ("ready", {"clip": str(clip), "block": block, "sample_rate": rate, "deferred_samples": engine.deferred_samples})
    )
    at = settings.start_frames // block * block
    at = at % total if settings.loop else min(at, total)
    start, played = time.perf_counter(), 0
    while at < total:
        wait = start + (played + block) / rate - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        elif wait < -block / rate:
            engine.xruns += 1
            start -= wait  # time slips, as it would on a device; nothing is played faster to catch up
        engine.run_block(audio[:, at : at + block])
        at += block
        played += block
        if settings.loop and at >= total:
            at = 0
        if played % (block * max(1, 4096 // block)) == 0:
            _tell_fault(engine, pipe)
            if _stop_asked(pipe, 0):
                return
