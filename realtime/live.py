"""One performance, start to end: the audio process, MIDI, the recorder, and what there is to show."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from realtime.audio import AudioFileError
from realtime.bundle import DEMO_CLIP, DEMO_MIDI, read_bundle
from realtime.candidates import with_noise
from realtime.controls import Performer, select_mix
from realtime.engine import HOP_FIELDS, METER_COUNT, EngineMeters, EngineSettings, another_server, engine_process
from realtime.ensemble import ALONE, Ensemble, Parts, join
from realtime.learned import add_styles
from realtime.listener import Heard, Listener, read_recogniser
from realtime.midi import MidiError, MidiMap, apply, decode, read_midi_file
from realtime.midi_inputs import MidiInputs
from realtime.midi_ports import Wanted
from realtime.processes import StoppedError, await_message, start_process
from realtime.ring import Mailbox, Ring
from realtime.show import (
    SHOW_FORMAT,
    History,
    Recorder,
    ShowHeading,
    draw_performance,
    event_width,
    free_folder,
    percentiles_ms,
)
from realtime.worker import Workers

logger = logging.getLogger(__name__)

INFERENCES = ("worker", "deferred", "callback")
SOUND_RING_SECONDS = 10
JOURNAL_RING = 4096
HOP_RING = 16_384
STATUS_HOPS = 4_000
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 2.0
STALE_S = 2.0
RETURN_TIMEOUT_S = 5.0
SHORTEST_LIFE_S = 2.0
LIVES, PAUSE_S = 3, 1.0
"""So many audio processes in a row may end within SHORTEST_LIFE_S; then each next one waits for PAUSE_S."""


class PerformanceError(RuntimeError):
    """A performance that cannot start or go on; the text says why and what to do."""


class NoAudioDeviceError(PerformanceError):
    """There is no audio device and none was asked for: perform a clip instead."""


@dataclass(frozen=True)
class LiveSettings:
    """What to perform with.

    ``learned`` are style files; ``midi`` is a port (index, part of the name, 'virtual') or a MIDI file; None is all
    ports. ``inference``: where the graph runs, in a 'worker' that the audio callback waits for, in one whose answer it
    takes a hop later ('deferred'), or in the 'callback' itself; ``patience_ms``: how long it waits for a hop, None for
    most of the time that there is. ``seed`` is of a model's noise, None: of one that makes sound of it, 0, of another,
    no noise. ``intensity`` (0..1, None for the usual one) and ``drone`` are for models of kind ``generate``, which have
    no input. ``recognise``: a recogniser's model file that hears what goes in and what comes out. ``parts``: models
    beside and after the first, which style, MIDI and ``learned`` are for.
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
    inference: str = "worker"
    patience_ms: float | None = None
    recognise: Path | None = None
    parts: Parts = ALONE
    seed: int | None = None
    intensity: float | None = None
    drone: bool = False

    def __post_init__(self) -> None:
        if self.inference not in INFERENCES:
            raise PerformanceError(f"inference '{self.inference}' is none of {', '.join(INFERENCES)}")

    def without_device(self) -> LiveSettings:
        """The same performance on the bundled clip, with the bundled MIDI file unless MIDI or a style was asked for.

        Recorded, so that there is something to hear, beside what was recorded before.
        """
        return replace(
            self,
            clip=DEMO_CLIP,
            midi=self.midi or (None if self.style else str(DEMO_MIDI)),
            record=self.record or free_folder(Path("performance")),
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
    restarts: int = 0
    outages: int = 0
    lost_ports: int = 0  # how many times a MIDI port went away
    midi_restarts: int = 0  # how many times the process of MIDI died
    lost_messages: int = 0  # of MIDI, that came faster than they can be heard
    fault: str = ""  # what the graph or the engine raised last
    waiting_s: float | None = None  # for the audio device, since it went away
    last_event: Event | None = None
    heard: Heard | None = None  # None without a recogniser

    @property
    def headroom(self) -> float:
        """Share of the hop that is left at p99."""
        return 1.0 - self.hop_ms["p99"] / self.hop_budget_ms


@dataclass(frozen=True)
class Summary:
    """How a performance ended, and what it left."""

    status: Status
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Event:
    """Something that went wrong, or came back: seconds since the start, and what."""

    seconds: float
    text: str


class Performance:
    """Context: entering starts the audio process and MIDI, leaving stops them and finishes the recording.

    ``poll`` belongs to the thread that entered; MIDI arrives on threads of its own. ``stop_asked`` may be set by any
    thread, and by a signal: entering then ends with StoppedError.
    """

    def __init__(self, settings: LiveSettings) -> None:
        """Checks model, styles and MIDI before anything starts; raises their errors."""
        self.settings = settings
        model = read_bundle(settings.model)
        if settings.seed is not None and model.manifest.kind != "generate":
            model = with_noise(model, settings.seed)
        self.bundle = join(add_styles(model, settings.learned), settings.parts)
        self.manifest = self.bundle.manifest
        self.performer = Performer(self.manifest)
        self._lock = threading.Lock()
        if settings.style:
            select_mix(self.performer, settings.style)
        if settings.second_style:
            self.performer.select_second(settings.second_style)
        if settings.dry_wet is not None:
            self.performer.set("dry_wet", settings.dry_wet)
        self._check_source()
        self._events = self._midi_file_events()
        self._recogniser = read_recogniser(settings.recognise) if settings.recognise else None
        self.history = History()
        self.ready: dict[str, Any] = {}
        self._recent: deque[float] = deque(maxlen=STATUS_HOPS)
        self.events: list[Event] = []
        self.stop_asked = threading.Event()
        self._midi_wanted: str | Wanted | None = settings.midi
        self.outages = 0
        self.lost_ports = 0
        self.fault = ""
        self.midi_restarts = self.lost_messages = 0
        self._midi_news: deque[tuple[str, bool] | str] = deque()

    def _check_source(self) -> None:
        """Set what only a model of kind ``generate`` has. Raises PerformanceError for what this model has not."""
        settings, generates = self.settings, self.manifest.kind == "generate"
        if generates and settings.input_device is not None:
            raise PerformanceError(
                f"model '{self.manifest.name}' makes sound of noise and takes no input; leave out --input"
            )
        if not generates and (settings.intensity is not None or settings.drone):
            raise PerformanceError(
                f"model '{self.manifest.name}' makes no sound by itself: --intensity and --drone are for "
                "models of kind 'generate'; leave them out, or choose such a --model"
            )
        if settings.intensity is not None:
            self.performer.set("intensity", settings.intensity)
        if settings.drone:
            self.performer.set("drone", 1.0)

    def _midi_file_events(self) -> list[tuple[float, bytes]] | None:
        """The events of the MIDI file that performs, None where MIDI comes from ports."""
        name = self.settings.midi
        if name is None or Path(name).suffix.lower() not in (".mid", ".midi"):
            return None
        return read_midi_file(Path(name))

    def __enter__(self) -> Self:
        settings, spec = self.settings, self.manifest.spectral
        self._sound: Ring | None = None
        self._journal: Ring | None = None
        self._workers: Workers | None = None
        self._listener: Listener | None = None
        self._lost_at: float | None = None
        self._short_lives = 0
        self._next_start_at: float | None = None
        self._return_timeout_s = START_TIMEOUT_S
        self._past = EngineMeters()
        try:
            with ExitStack() as shared:
                self._controls = shared.enter_context(Mailbox.create(4 + self.manifest.style_dim))
                self._meters = shared.enter_context(Mailbox.create(METER_COUNT))
                self._hops = shared.enter_context(Ring.create(HOP_RING, len(HOP_FIELDS)))
                if settings.record is not None:
                    frames = SOUND_RING_SECONDS * spec.sample_rate
                    self._sound = shared.enter_context(Ring.create(frames, 2 * settings.channels))
                    width = event_width(self.manifest.style_dim)
                    self._journal = shared.enter_context(Ring.create(JOURNAL_RING, width))
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
        settings = self.settings
        self._send_controls()
        # A fresh interpreter: a fork would inherit threads and libraries of this one.
        self._context = multiprocessing.get_context("spawn")
        if self._recogniser is not None:
            try:
                self._listener = Listener(self._context, self._recogniser, settings.channels)
            except OSError as error:
                raise PerformanceError(f"there is no room for shared memory: {error.strerror}") from None
        if settings.inference != "callback":
            try:
                self._workers = Workers(
                    self._context, settings.model, settings.parts, settings.provider, self.bundle, settings.channels
                )
            except OSError as error:
                raise PerformanceError(f"there is no room for shared memory: {error.strerror}") from None
            self._workers.start(0)
        self._start_engine(0, returning=False)
        if self._events is None:
            self._inputs = self._open_midi()
        if self._workers is not None:
            problem = self._workers.await_ready(self.stop_asked)
            if problem:
                raise PerformanceError(problem)
        self._await_ready()
        if self._sound is not None and self._journal is not None and settings.record is not None:
            # Not before there is sound: a start that fails leaves an earlier recording alone.
            self._recorder = Recorder(self._sound, self._journal, settings.record, self._heading())
        if self._workers is not None:
            self._workers.start_spare()
        sys.setswitchinterval(1e-3)
        if self._events is not None:
            self._player = threading.Thread(target=self._play_events, name="midi-file", daemon=True)
            self._player.start()

    def _start_engine(self, start_frames: int, returning: bool) -> None:
        """Start an audio process; it says 'ready' when there is sound."""
        settings = self.settings
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
            journal_name=None if self._journal is None else self._journal.name,
            heard_name=None if self._listener is None else self._listener.ring_name,
            link=None if self._workers is None else self._workers.link,
            deferred=settings.inference == "deferred",
            seed=settings.seed or 0,
            patience_ms=settings.patience_ms,
            start_frames=start_frames,
            returning=returning,
            before=self.ready.get("devices") if returning else None,
            recorded_rate=None if self._recorder is None else self._recorder.heading.sample_rate,
            parts=settings.parts,
        )
        self._engine_started_at = time.monotonic()
        self._process, self._pipe = start_process(
            self._context, engine_process, (engine_settings,), "restyle-audio", daemon=False
        )

    def _heading(self) -> ShowHeading:
        manifest = self.manifest
        return ShowHeading(
            show_format=SHOW_FORMAT,
            model=manifest.name,
            model_path=str(self.settings.model.resolve()),
            model_sha256=hashlib.sha256(self.bundle.graph).hexdigest(),
            sample_rate=self.sample_rate,
            channels=self.settings.channels,
            deferred_hops=int(self.settings.inference == "deferred"),
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            ensemble=self.bundle.journal_entries() if isinstance(self.bundle, Ensemble) else [],
            seed=self.settings.seed or 0,
        )

    def _await_ready(self) -> None:
        if not await_message(self._pipe, START_TIMEOUT_S, self.stop_asked):
            raise PerformanceError(f"the audio process did not start within {START_TIMEOUT_S:g} s")
        self._hear(self._receive())
        self.started_at = self._engine_started_at = time.monotonic()

    def _receive(self) -> tuple[str, Any]:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(STOP_TIMEOUT_S)
            return "died", f"the audio process died (exit code {self._process.exitcode})"

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
    def sample_rate(self) -> int:
        """Of what is played and recorded: the device's, in Hz."""
        return int(self.ready.get("sample_rate", self.manifest.spectral.sample_rate))

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
        if self._recorder is not None:
            self._recorder.note({"frame": self._frames, "midi": data.hex(" ")})
        with self._lock:
            if apply(message, self.performer, self.settings.midi_map):
                self._send_controls()
                self._note_mix()

    def _open_midi(self) -> MidiInputs:
        news = self._midi_news
        return MidiInputs(
            self._midi_wanted, self._on_midi, lambda *port: news.append(port), news.append, self.stop_asked
        )

    def _play_events(self) -> None:
        start = time.monotonic()
        for seconds, data in self._events or []:
            if self._over.wait(max(0.0, start + seconds - time.monotonic())):
                return
            self._on_midi(data)

    @property
    def _frames(self) -> int:
        """How far the performance is, in samples."""
        return int(self._meters.read()[0])

    def _note_mix(self) -> None:
        if self.settings.record is None:
            return
        mix = {style.label: weight for style, weight in self.performer.mix().items()}
        self.history.note(self._frames, mix)

    def poll(self) -> bool:
        """Collect what the processes have to say, and replace what died; True when the performance has ended.

        Raises PerformanceError when it cannot go on. Call it about ten times a second.
        """
        self._drain_hops()
        with self._lock:
            self._note_mix()
        if self._workers is not None:
            for text in self._workers.watch():
                self._happened(text)
        while self._midi_news:
            self._note_midi(self._midi_news.popleft())
        if self._listener is not None:
            self._listener.watch(self.sample_rate)
        if self._next_start_at is not None:
            if time.monotonic() >= self._next_start_at:
                self._restart_engine()
            return False
        alive = self._process.is_alive()  # before the pipe: its last words come first
        if self._pipe.poll():
            message = self._receive()
            if message[0] == "loaded":
                self._engine_started_at, self._return_timeout_s = time.monotonic(), RETURN_TIMEOUT_S
            elif message[0] == "ready" and self._lost_at is not None:
                self._is_back(message[1])
            elif message[0] in ("ready", "ended"):
                return self._hear(message)
            elif message[0] == "fault":
                self.fault = message[1]
                self._happened(self.fault)
            else:
                self._lose_audio(*message)
        elif not alive:
            self._lose_audio("died", f"the audio process died (exit code {self._process.exitcode})")
        elif self._lost_at is not None:
            if time.monotonic() - self._engine_started_at > self._return_timeout_s:
                self._restart_engine()  # PortAudio waits for ever for a server that does not answer
        else:
            alive_at = EngineMeters.unpack(self._meters.read()).alive_at
            if time.monotonic() - max(alive_at, self._engine_started_at) > STALE_S:
                self._lose_audio("stale", f"no audio for {STALE_S:g} s: the device or its server has stopped")
            elif self._events is None and self._inputs is None:
                self._reopen_midi()
        return False

    def _note_midi(self, news: tuple[str, bool] | str) -> None:
        """A MIDI port went away, or was opened after the start; or what became of the process that hears them."""
        if isinstance(news, str):
            self._happened(news)
            return
        name, there = news
        if there:
            self._happened(f"MIDI port {name} is heard")
        else:
            self.lost_ports += 1
            self._happened(f"MIDI port {name} went away; once it is there again, it is heard by itself")

    def _reopen_midi(self) -> None:
        """After a JACK server came back; until then, try again at every look."""
        try:
            self._inputs = self._open_midi()
        except StoppedError:
            return
        except MidiError as error:
            logger.debug("%s", error)
        else:
            self._happened(f"MIDI is heard again: {', '.join(self.midi_names) or 'no port'}")

    def _happened(self, text: str) -> None:
        """Note an event, for the panel and the journal."""
        self.events.append(Event(time.monotonic() - self.started_at, text))
        logger.warning("%s", text)
        if self._recorder is not None:
            self._recorder.note({"frame": self._frames, "note": text})

    def _lose_audio(self, kind: str, text: str) -> None:
        """The audio process is gone or useless: another one, which waits until there is a device again."""
        lived = time.monotonic() - self._engine_started_at
        self._short_lives = self._short_lives + 1 if lived < SHORTEST_LIFE_S else 0
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            self.outages += 1
        self._happened(text)
        with self._lock:
            self.performer.release_all()
            self.performer.pedal(down=False)
            self._send_controls()
        if kind != "died":
            self._abandon_midi()
        if self._short_lives < LIVES:
            self._restart_engine()
        else:  # what ends at once is not started without end, and a show not given up
            self._next_start_at = time.monotonic() + PAUSE_S

    def _abandon_midi(self) -> None:
        """RtMidi stays silent on a server that has gone: another process hears the same ports, once audio is back."""
        if self._inputs is None or not self._inputs.uses_jack:
            return
        self._inputs.abandon()
        self._midi_wanted = self._inputs.wanted
        self.midi_restarts += self._inputs.restarts
        self.lost_messages += self._inputs.lost_messages
        self._inputs = None

    def _restart_engine(self) -> None:
        self._next_start_at = None
        if self._process.is_alive():
            self._process.kill()
        self._process.join(STOP_TIMEOUT_S)
        self._pipe.close()
        meters = EngineMeters.unpack(self._meters.read())
        self._past = self._past.plus(meters)
        frames = int(meters.frames) if self._sound is None else self._sound.written
        self._meters.write(EngineMeters(frames=frames).pack())
        self._return_timeout_s = START_TIMEOUT_S
        self._start_engine(frames, returning=True)

    def _is_back(self, ready: dict[str, Any]) -> None:
        assert self._lost_at is not None
        if another_server(self.ready, ready):
            self._abandon_midi()
        self.ready = ready
        self._happened(f"audio is back after {time.monotonic() - self._lost_at:.1f} s")
        self._lost_at = None
        self._engine_started_at = time.monotonic()
        recorder = self._recorder
        if recorder is not None and not recorder.problem and self.sample_rate != recorder.heading.sample_rate:
            self._happened(
                f"the recording ends here: it is at {recorder.heading.sample_rate} Hz, the device is at "
                f"{self.sample_rate} Hz now; to record what follows, start again with another --record"
            )
            self._files = recorder.finish()
            recorder.problem = recorder.problem or self.events[-1].text
            self._sound = self._journal = None

    def _drain_hops(self) -> None:
        times = self._hops.pop()
        if len(times):
            self.history.hop_ms.append(times)
            self._recent.extend(times[:, 0].tolist())

    def status(self) -> Status:
        """The latest numbers; call after ``poll``."""
        meters = self._past.plus(EngineMeters.unpack(self._meters.read()))
        rate, recorder = self.sample_rate, self._recorder
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
            recorded_seconds=recorder.seconds if recorder else None,
            recorder_problem=recorder.problem if recorder else "",
            dropped_frames=recorder.dropped_frames if recorder else 0,
            restarts=self._workers.restarts if self._workers else 0,
            outages=self.outages,
            lost_ports=self.lost_ports,
            midi_restarts=self.midi_restarts + (self._inputs.restarts if self._inputs else 0),
            lost_messages=self.lost_messages + (self._inputs.lost_messages if self._inputs else 0),
            fault=self.fault,
            waiting_s=None if self._lost_at is None else time.monotonic() - self._lost_at,
            last_event=self.events[-1] if self.events else None,
            heard=None if self._listener is None else self._listener.heard(),
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
        if self._workers is not None:
            self._workers.close()
            self._workers = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._inputs is not None:
            self._inputs.mute()
        if self._player is not None:
            self._player.join(1.0)
        if self._recorder is not None:
            if not self._recorder.over:
                self._files = self._recorder.finish()
            if self._files:
                try:
                    self._files.append(self._draw())
                except (OSError, AudioFileError) as error:
                    self._recorder.problem = self._recorder.problem or f"the picture could not be written ({error})"
        if self._inputs is not None:
            self._inputs.close()
            self._inputs = None
        self._shared.close()
        self._controls_closed = True

    def _draw(self) -> Path:
        assert self.settings.record is not None and self._recorder is not None
        spec, rate = self.manifest.spectral, self._recorder.heading.sample_rate
        path = self.settings.record / "performance.png"
        source = Path(self.ready["clip"]).name if "clip" in self.ready else self.ready["input"]["name"]
        draw_performance(
            path,
            self.settings.record,
            self.history,
            rate,
            spec.hop_samples * rate / spec.sample_rate,
            spec.latency_samples * rate / spec.sample_rate,
            f"{source} through '{self.bundle.title}', {1e3 * spec.latency_samples / spec.sample_rate:.2f} ms later",
        )
        return path

    def __exit__(self, *_: object) -> None:
        if not getattr(self, "_controls_closed", False):
            self._stop_everything()
