"""One performance, start to end: the audio process, MIDI, the recorder, and what there is to show."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from realtime.audio import AudioFileError
from realtime.bundle import DEMO_CLIP, DEMO_MIDI, read_bundle
from realtime.controls import Performer, select_mix
from realtime.engine import HOP_FIELDS, METER_COUNT, EngineMeters, EngineSettings, engine_process
from realtime.learned import add_styles
from realtime.midi import MidiInputs, MidiMap, apply, decode, read_midi_file
from realtime.ring import Mailbox, Ring
from realtime.show import History, Recorder, draw_performance, percentiles_ms

logger = logging.getLogger(__name__)

SOUND_RING_SECONDS = 10
HOP_RING = 16_384
STATUS_HOPS = 4_000
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 2.0
STALE_S = 2.0


class PerformanceError(RuntimeError):
    """A performance that cannot start or go on; the text says why and what to do."""


class NoAudioDeviceError(PerformanceError):
    """There is no audio device and none was asked for: perform a clip instead."""


@dataclass(frozen=True)
class LiveSettings:
    """What to perform with.

    ``learned`` are style files; ``midi`` is a port (index, part of the name, 'virtual') or a MIDI file; None is all
    ports.
    """

    model: Path
    learned: tuple[Path, ...] = ()
    style: str | None = None
    second_style: str | None = None
    dry_wet: float | None = None
    input_device: str | None = None
    output_device: str | None = None
    channels: int = 1
    block: int = 0
    midi: str | None = None
    midi_map: MidiMap = field(default_factory=MidiMap)
    provider: str = "cpu"
    record: Path | None = None
    clip: Path | None = None
    loop: bool = False

    def without_device(self) -> LiveSettings:
        """The same performance on the bundled clip, with the bundled MIDI file unless another MIDI was asked for."""
        return replace(
            self,
            clip=DEMO_CLIP,
            midi=self.midi or str(DEMO_MIDI),
            record=self.record or Path("performance"),
        )


@dataclass(frozen=True)
class Status:
    """One look at a performance, for a panel or a log."""

    seconds: float
    mix: dict[str, float]
    values: dict[str, float]
    meters: EngineMeters
    hop_ms: dict[str, float]
    hop_budget_ms: float
    recorded_seconds: float | None
    recorder_problem: str
    dropped_frames: int

    @property
    def headroom(self) -> float:
        """Share of the hop that is left at p99."""
        return 1.0 - self.hop_ms["p99"] / self.hop_budget_ms


@dataclass(frozen=True)
class Summary:
    """How a performance ended, and what it left."""

    status: Status
    files: tuple[Path, ...]


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits: a process started meanwhile never hears it, and no call to a JACK server breaks off halfway."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Performance:
    """Context: entering starts the audio process and MIDI, leaving stops them and finishes the recording.

    ``poll`` belongs to the thread that entered; MIDI arrives on threads of its own.
    """

    def __init__(self, settings: LiveSettings) -> None:
        """Checks model, styles and MIDI before anything starts; raises their errors."""
        self.settings = settings
        self.bundle = add_styles(read_bundle(settings.model), settings.learned)
        self.manifest = self.bundle.manifest
        self.performer = Performer(self.manifest)
        self._lock = threading.Lock()
        if settings.style:
            select_mix(self.performer, settings.style)
        if settings.second_style:
            self.performer.select_second(settings.second_style)
        if settings.dry_wet is not None:
            self.performer.set("dry_wet", settings.dry_wet)
        self._events = self._midi_file_events()
        self.history = History()
        self.ready: dict[str, Any] = {}
        self._recent: deque[float] = deque(maxlen=STATUS_HOPS)

    def _midi_file_events(self) -> list[tuple[float, bytes]] | None:
        """The events of the MIDI file that performs, None where MIDI comes from ports."""
        name = self.settings.midi
        if name is None or Path(name).suffix.lower() not in (".mid", ".midi"):
            return None
        return read_midi_file(Path(name))

    def __enter__(self) -> Self:
        settings, spec = self.settings, self.manifest.spectral
        self._sound: Ring | None = None
        try:
            with ExitStack() as shared:
                self._controls = shared.enter_context(Mailbox.create(4 + self.manifest.style_dim))
                self._meters = shared.enter_context(Mailbox.create(METER_COUNT))
                self._hops = shared.enter_context(Ring.create(HOP_RING, len(HOP_FIELDS)))
                if settings.record is not None:
                    frames = SOUND_RING_SECONDS * spec.sample_rate
                    self._sound = shared.enter_context(Ring.create(frames, 2 * settings.channels))
                self._shared = shared.pop_all()
        except OSError as error:
            raise PerformanceError(f"there is no room for shared memory: {error.strerror}") from None
        self._recorder: Recorder | None = None
        self._inputs: MidiInputs | None = None
        self._over = threading.Event()
        self._player: threading.Thread | None = None
        self._process: Any = None
        self._files: list[Path] = []
        try:
            self._start()
        except BaseException:
            self._stop_everything()
            raise
        return self

    def _start(self) -> None:
        settings, spec = self.settings, self.manifest.spectral
        self._send_controls()
        engine_settings = EngineSettings(
            model=settings.model,
            provider=settings.provider,
            channels=settings.channels,
            block=settings.block,
            input_device=settings.input_device,
            output_device=settings.output_device,
            clip=settings.clip,
            loop=settings.loop,
            controls_name=self._controls.name,
            meters_name=self._meters.name,
            hops_name=self._hops.name,
            sound_name=None if self._sound is None else self._sound.name,
        )
        # A fresh interpreter: a fork would inherit threads and libraries of this one.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=engine_process, args=(engine_settings, theirs), name="restyle-audio")
        with _interrupts_held():
            self._process.start()
            theirs.close()
            if self._events is None:
                self._inputs = MidiInputs(settings.midi, self._on_midi)
        self._await_ready()
        if self._sound is not None and settings.record is not None:
            # Not before there is sound: a start that fails leaves an earlier recording alone.
            self._recorder = Recorder(self._sound, settings.record, spec.sample_rate, settings.channels)
        sys.setswitchinterval(1e-3)
        if self._events is not None:
            self._player = threading.Thread(target=self._play_events, name="midi-file", daemon=True)
            self._player.start()

    def _await_ready(self) -> None:
        if not self._pipe.poll(START_TIMEOUT_S):
            raise PerformanceError(f"the audio process did not start within {START_TIMEOUT_S:g} s")
        self._hear(self._receive())
        self.started_at = time.monotonic()

    def _receive(self) -> tuple[str, Any]:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join(STOP_TIMEOUT_S)
            return "error", f"the audio process died (exit code {self._process.exitcode})"

    def _hear(self, message: tuple[str, Any]) -> bool:
        """What the audio process says; True when the performance is over."""
        kind, content = message
        if kind == "ready":
            self.ready = content
        elif kind == "ended":
            return True
        elif kind == "no_device":
            raise NoAudioDeviceError(content)
        else:
            raise PerformanceError(content)
        return False

    @property
    def midi_names(self) -> list[str]:
        """Where MIDI comes from now: ports come and go."""
        if self._events is not None:
            return [f"file {self.settings.midi}"]
        return [] if self._inputs is None else self._inputs.names

    def _send_controls(self) -> None:
        self._controls.write(self.performer.controls().pack())

    def _on_midi(self, data: bytes) -> None:
        message = decode(data)
        if message is None:
            return
        with self._lock:
            if apply(message, self.performer, self.settings.midi_map):
                self._send_controls()
                self._note_mix()

    def _play_events(self) -> None:
        start = time.monotonic()
        for seconds, data in self._events or []:
            if self._over.wait(max(0.0, start + seconds - time.monotonic())):
                return
            self._on_midi(data)

    def _note_mix(self) -> None:
        mix = {style.label: weight for style, weight in self.performer.mix().items()}
        self.history.note(int(EngineMeters.unpack(self._meters.read()).frames), mix)

    def poll(self) -> bool:
        """Collect what the audio process has to say; True when it has ended. Raises PerformanceError when it failed."""
        self._drain_hops()
        with self._lock:
            self._note_mix()
        alive = self._process.is_alive()  # before the pipe: its last words come first
        if self._pipe.poll():
            return self._hear(self._receive())
        if not alive:
            raise PerformanceError(f"the audio process died (exit code {self._process.exitcode})")
        alive_at = EngineMeters.unpack(self._meters.read()).alive_at or self.started_at
        if time.monotonic() - alive_at > STALE_S:
            raise PerformanceError(f"no audio for {STALE_S:g} s: the device or its server has stopped")
        return False

    def _drain_hops(self) -> None:
        times = self._hops.pop()
        if len(times):
            self.history.hop_ms.append(times)
            self._recent.extend(times[:, 0].tolist())

    def status(self) -> Status:
        """The latest numbers; call after ``poll``."""
        meters = EngineMeters.unpack(self._meters.read())
        rate = self.manifest.spectral.sample_rate
        recorder = self._recorder
        with self._lock:
            mix = {style.label: weight for style, weight in self.performer.mix().items()}
            values = dict(self.performer.values)
        return Status(
            seconds=meters.frames / rate,
            mix=mix,
            values=values,
            meters=meters,
            hop_ms=percentiles_ms(np.array(self._recent, dtype=np.float32)),
            hop_budget_ms=1e3 * self.manifest.spectral.hop_seconds,
            recorded_seconds=meters.frames / rate if recorder else None,
            recorder_problem=recorder.problem if recorder else "",
            dropped_frames=recorder.dropped_frames if recorder else 0,
        )

    def stop(self) -> Summary:
        """End the performance and finish the recording; safe to call once, also after a failure."""
        self._stop_audio()
        self._drain_hops()
        status = self.status()
        if self.history.hop_ms:
            status = replace(status, hop_ms=percentiles_ms(np.concatenate(self.history.hop_ms)[:, 0]))
        self._stop_everything()
        return Summary(replace(status, recorder_problem=self.recorder_problem), tuple(self._files))

    @property
    def recorder_problem(self) -> str:
        return self._recorder.problem if self._recorder else ""

    def _stop_audio(self) -> None:
        """Ask the audio process to end; kill it if it hangs, as PortAudio does when a JACK server dies."""
        process = self._process
        if process is None:
            return
        try:
            self._pipe.send("stop")
        except OSError:
            logger.debug("the audio process is gone already")
        process.join(STOP_TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join(STOP_TIMEOUT_S)
            if self._inputs is not None:
                # A JACK server that no longer answers would keep the MIDI ports from closing as well.
                self._inputs.abandon()
        self._process = None

    def _stop_everything(self) -> None:
        self._over.set()
        self._stop_audio()
        if self._inputs is not None:
            self._inputs.close()
            self._inputs = None
        if self._player is not None:
            self._player.join(1.0)
        if self._recorder is not None:
            self._files = self._recorder.finish()
            if len(self._files) == 2:
                try:
                    self._files.append(self._draw())
                except (OSError, AudioFileError) as error:
                    self._recorder.problem = self._recorder.problem or f"the picture could not be written ({error})"
        self._shared.close()
        self._controls_closed = True

    def _draw(self) -> Path:
        assert self.settings.record is not None
        spec = self.manifest.spectral
        path = self.settings.record / "performance.png"
        source = Path(self.ready["clip"]).name if "clip" in self.ready else self.ready["input"]["name"]
        draw_performance(
            path,
            self.settings.record,
            self.history,
            spec.sample_rate,
            spec.hop_samples,
            self.manifest.latency_samples,
            f"{source} through '{self.manifest.name}', {1e3 * spec.latency_samples / spec.sample_rate:.2f} ms later",
        )
        return path

    def __exit__(self, *_: object) -> None:
        if not getattr(self, "_controls_closed", False):
            self._stop_everything()
