"""Latency through a real JACK server: the round trip of ``restyle live``, and from MIDI to sound.

The server is ours and synchronous: overload slips its time and loses no sample, so both are figures to the sample.
The musician is a JACK client of this process; ``restyle live`` runs as a command of its own, and so does PortAudio,
which must never share a process with JACK clients.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from realtime.audio import find_device, list_devices, open_duplex, portaudio
from realtime.bench import MeasureError, measure_processor_latency
from realtime.bundle import Bundle, Style
from realtime.controls import Controls, Performer, db_to_gain
from realtime.jack_server import JackServer, jack_library
from realtime.limiter import limit
from realtime.processor import FADE_HOPS
from realtime.quiet import silence_jack
from realtime.show import percentiles_ms
from realtime.stream import make_session

MUSICIAN = "restyle-bench"
IDLE = "restyle-idle"
PERIODS_SAMPLES = (64, 128, 256)
PATIENCE_S = 60.0
"""How long a loaded machine may take over anything."""
STOP_TIMEOUT_S = 5.0
SAME = 1e-6
"""Samples that differ by less (-120 dBFS) are the same sound."""
START_HOPS_CHECKED = 8
SWITCH_GAP_S = (0.1, 0.2)
"""Shortest and longest time from one switch to the next."""


class Musician:
    """A JACK client that plays what it is given, sends MIDI at a frame, and keeps all it sends and hears.

    Its callback runs on a thread of JACK's; every method here belongs to the maker's thread.
    """

    def __init__(self, server: str) -> None:
        self.client: Any = jack_library().Client(MUSICIAN, servername=server, no_start_server=True)
        silence_jack()
        self._out = self.client.outports.register("out")
        self._in = self.client.inports.register("in")
        self._midi = self.client.midi_outports.register("midi")
        self.period_samples: int = self.client.blocksize
        self._messages: deque[tuple[int, bytes]] = deque()
        self._music, self._at = np.zeros(0, np.float32), 0
        self.sent: list[NDArray[np.float32]] = []
        self.heard: list[NDArray[np.float32]] = []
        self.seconds: list[float] = []
        """Of the system's monotonic clock, at the start of each period."""
        self.frame_clock: list[int] = []
        """Of the server, at the start of each period."""
        self.midi_sent: list[tuple[int, int]] = []
        """Period and frame within it of every message."""
        self.client.set_process_callback(self._process)

    def _process(self, frames: int) -> None:
        self.seconds.append(time.monotonic())
        self.frame_clock.append(self.client.last_frame_time)
        out = self._out.get_array()
        music = self._music[self._at : self._at + frames]
        self._at += len(music)
        out[: len(music)], out[len(music) :] = music, 0.0
        self._midi.clear_buffer()
        if self._messages:
            offset, message = self._messages.popleft()
            self._midi.write_midi_event(offset, message)
            self.midi_sent.append((len(self.sent), offset))
        self.sent.append(out.copy())
        self.heard.append(self._in.get_array().copy())

    def play(self, music: NDArray[np.float32]) -> None:
        """Start to play [samples] from the next period on; silence comes after it."""
        self._music, self._at = np.zeros(0, np.float32), 0
        self._music = music

    def send(self, message: bytes, offset: int) -> None:
        """A MIDI message at a frame of the next period."""
        self._messages.append((offset, message))

    def rest(self, frames: int) -> None:
        """Let so many frames pass. Raises MeasureError when the server stands still."""
        goal = len(self.heard) + -(-frames // self.period_samples)
        deadline = time.monotonic() + PATIENCE_S + 10.0 * frames / self.client.samplerate
        while len(self.heard) < goal:
            if time.monotonic() > deadline:
                raise MeasureError("the JACK server stands still; is the machine overloaded?")
            time.sleep(0.01)

    def __enter__(self) -> Self:
        self.client.activate()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.client.deactivate()
        self.client.close()


@contextlib.contextmanager
def _restyle_live(bundle: Bundle, provider: str, *arguments: str) -> Iterator[None]:
    """``restyle live`` between the musician's ports, from its first block on. Raises MeasureError."""
    command = [sys.executable, "-m", "realtime.cli", "live", "--model", str(bundle.path), "--provider", provider]
    # The server waits for its clients, so the callback may wait for the graph: no sample depends on the machine.
    command += ["--input", MUSICIAN, "--midi", MUSICIAN, "--patience", "5000", *arguments]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    watchdog = threading.Timer(PATIENCE_S, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline()
        watchdog.cancel()
        if not line.startswith("performing: "):
            process.kill()
            problem = (process.stderr.read() or line).strip().splitlines()
            raise MeasureError(f"restyle live does not start: {problem[-1] if problem else 'it says nothing'}")
        yield
    finally:
        watchdog.cancel()
        # Its audio process follows it in any case.
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=STOP_TIMEOUT_S + PATIENCE_S / 4)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


class Child:
    """A process of ours that answers over a pipe; it says 'ready' first and ends at 'stop'.

    Entering waits until it is ready, leaving ends it, by force if it must. Raises MeasureError.
    """

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, self._theirs = context.Pipe()
        self._process = context.Process(target=target, args=(*arguments, self._theirs), daemon=True)

    def __enter__(self) -> Self:
        # Signals that end a bench are for this process: the child never hears them, and is told to stop.
        resource_tracker.ensure_running()  # otherwise it starts with the child, and lets them through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        try:
            self._process.start()
            self._theirs.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            self._receive()
        except BaseException:
            self.close()
            raise
        return self

    def ask(self, question: str = "counts") -> Any:
        try:
            self._pipe.send(question)
        except OSError:
            raise MeasureError("a client of the JACK server died") from None
        return self._receive()

    def _receive(self) -> Any:
        try:
            if not self._pipe.poll(PATIENCE_S):
                raise MeasureError(f"a client of the JACK server did not answer within {PATIENCE_S:g} s")
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise MeasureError("a client of the JACK server died") from None
        if isinstance(answer, str) and answer != "ready":
            raise MeasureError(answer)
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send("stop")
        self._process.join(STOP_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(STOP_TIMEOUT_S)
        self._pipe.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def answer_until_stop(pipe: Connection, answer: Callable[[str], object]) -> None:
    """A child's main loop: 'ready', then an answer to every question, until 'stop' or the parent is gone."""
    try:
        pipe.send("ready")
        while (question := pipe.recv()) != "stop":
            pipe.send(answer(question))
    except (EOFError, OSError):
        # Nobody is left who could end this process if a dead server held it up.
        os._exit(1)


def calm_python() -> None:
    """As in the audio process: no garbage collection from here on, and a short switch interval."""
    gc.collect()
    gc.freeze()
    gc.disable()
    sys.setswitchinterval(5e-4)


@dataclass
class IdleCounts:
    """What the do-nothing client counts; a miss is a callback that took longer than its block lasts."""

    frames: int = 0
    xruns: int = 0
    misses: int = 0


def idle_process(device_name: str, sample_rate: int, pipe: Connection) -> None:
    """A process's main function: a PortAudio client like the audio process, which copies and does nothing else."""
    counts = IdleCounts()

    def on_audio(source: NDArray[np.float32], sink: NDArray[np.float32], frames: int, _: Any, status: Any) -> None:
        start = time.perf_counter()
        if status:
            counts.xruns += 1
        sink[:] = source
        counts.frames += frames
        if time.perf_counter() - start > frames / sample_rate:
            counts.misses += 1

    try:
        sd = portaudio(IDLE)
        device = find_device(list_devices(), device_name, "input")
        stream = open_duplex(sd, device, device, sample_rate, 0, 1, on_audio)
        with contextlib.suppress(Exception):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(20))
        calm_python()
        stream.start()
    except Exception as error:
        pipe.send(f"the do-nothing client does not start: {error}")
        os._exit(1)
    answer_until_stop(pipe, lambda _: counts)
    stream.abort()
    stream.close()


@dataclass(frozen=True)
class JackSettings:
    """What to measure through JACK: ``switches`` of style for MIDI to sound."""

    provider: str = "cpu"
    switches: int = 200
    periods_samples: tuple[int, ...] = PERIODS_SAMPLES


def measure_jack(bundle: Bundle, settings: JackSettings, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """'round_trip' at each period and 'midi_to_sound' at a period of one hop. Raises MeasureError, JackServerError."""
    spec = bundle.manifest.spectral
    trips = []
    for period in settings.periods_samples:
        say(f"round trip at {period} frames")
        with JackServer(spec.sample_rate, period) as server, Musician(server.name) as musician:
            trips.append(_measure_round_trip(musician, bundle, settings.provider))
    say(f"MIDI to sound, {settings.switches} switches")
    with JackServer(spec.sample_rate, spec.hop_samples) as server, Musician(server.name) as musician:
        buffers = _measure_buffers(musician)
        heard = _measure_midi_to_sound(musician, bundle, settings, buffers)
    return {"round_trip": trips, "midi_to_sound": heard}


def _measure_buffers(musician: Musician) -> int:
    """Frames from the musician's output to their input through a client that only copies."""
    with Child(idle_process, MUSICIAN, int(musician.client.samplerate)):
        return _delay_of_a_burst(musician)[0]


def _delay_of_a_burst(musician: Musician) -> tuple[int, bool]:
    """Frames until a burst of noise is back, and whether it came back sample for sample. Raises MeasureError."""
    rate = musician.client.samplerate
    musician.rest(rate // 8)  # a new connection takes effect a few periods after the call
    burst = _noise(rate // 4)
    start = len(musician.heard)
    musician.play(burst)
    musician.rest(rate)
    sent, heard = (np.concatenate(blocks[start:]) for blocks in (list(musician.sent), list(musician.heard)))
    if not heard.any():
        raise MeasureError("nothing comes back through the JACK server")
    first_sent, first_heard = int(np.flatnonzero(sent)[0]), int(np.flatnonzero(heard)[0])
    same = np.array_equal(heard[first_heard : first_heard + len(burst)], burst)
    return first_heard - first_sent, same


def _noise(samples: int) -> NDArray[np.float32]:
    noise = np.random.default_rng(4).standard_normal(samples).astype(np.float32) * np.float32(0.1)
    return np.where(noise == 0.0, np.float32(0.1), noise)


def _measure_round_trip(musician: Musician, bundle: Bundle, provider: str) -> dict[str, Any]:
    """``restyle live`` on its dry path, which waits as long as the wet one; the buffers without restyle between."""
    algorithmic = measure_processor_latency(bundle, provider)
    buffers = _measure_buffers(musician)
    with _restyle_live(bundle, provider, "--dry-wet", "0"):
        measured, same = _delay_of_a_burst(musician)
    return {
        "period_samples": musician.period_samples,
        "algorithmic_samples": algorithmic,
        "buffer_samples": buffers,
        "expected_samples": algorithmic + buffers,
        "measured_samples": measured,
        "equal": measured == algorithmic + buffers,
        "same_sound": same,
    }


def switching_styles(bundle: Bundle) -> list[Style]:
    """The styles that a MIDI program of their own selects. Raises MeasureError for less than two."""
    performer = Performer(bundle.manifest)
    styles = [style for style in bundle.manifest.styles if performer.style_of_program(style.program) is style]
    if len(styles) < 2:
        raise MeasureError(f"model '{bundle.manifest.name}' has one style only; there is nothing to switch to")
    return styles


def _measure_midi_to_sound(
    musician: Musician, bundle: Bundle, settings: JackSettings, buffer_samples: int
) -> dict[str, Any]:
    """Program changes at random moments, each to another style, while noise plays; then see when each was heard."""
    rate, hop = bundle.manifest.spectral.sample_rate, bundle.manifest.spectral.hop_samples
    styles = switching_styles(bundle)
    random = np.random.default_rng(5)
    order = [styles[(1 + number) % len(styles)] for number in range(settings.switches)]
    shortest, longest = (int(seconds * rate) for seconds in SWITCH_GAP_S)
    begin = len(musician.heard)
    with _restyle_live(bundle, settings.provider, "--style", styles[0].id):
        musician.rest(rate // 4)
        musician.play(_noise(rate + settings.switches * (longest + hop)))
        musician.rest(rate // 2)
        for style in order:
            musician.send(bytes((0xC0, style.program)), int(random.integers(hop)))
            musician.rest(int(random.integers(shortest, longest)))
        musician.rest(rate // 4)
        periods = len(musician.heard)
    delay_hops = (hop + buffer_samples) // hop
    replay = Replay(bundle, settings.provider, styles[0])
    heard = find_switches(
        replay,
        np.stack(musician.sent[begin : periods - delay_hops]),
        np.stack(musician.heard[begin + delay_hops : periods]),
        [
            (period - begin, mixed_controls(bundle, style))
            for (period, _), style in zip(musician.midi_sent, order, strict=True)
        ],
    )
    if not heard:
        raise MeasureError("no switch was heard; does restyle live hear the musician's MIDI port?")
    samples, milliseconds = [], []
    for number, (at, first) in heard.items():
        (period, offset), at = musician.midi_sent[number], at + begin + delay_hops
        samples.append((musician.frame_clock[at] - musician.frame_clock[period]) % 2**32 + first - offset)
        seconds = musician.seconds[at] - musician.seconds[period] + (first - offset) / rate
        milliseconds.append(1e3 * seconds)
    return {
        "period_samples": musician.period_samples,
        "switches": settings.switches,
        "heard": len(heard),
        "samples": percentiles_ms(np.array(samples)),
        "ms": percentiles_ms(np.array(milliseconds)),
        "all_samples": samples,
        "all_ms": [round(value, 3) for value in milliseconds],
    }


def mixed_controls(bundle: Bundle, style: Style) -> Controls:
    """What a performance's controls are when this style was selected and nothing else was touched."""
    performer = Performer(bundle.manifest)
    performer.select(style.id)
    return performer.controls()


@dataclass(frozen=True)
class _Moment:
    """All that the next hop depends on: states by input name, style vector, wet gain, and a fade in progress."""

    states: dict[str, NDArray[np.float32]]
    style: NDArray[np.float32]
    gain: float
    goal: Controls
    hops_left: int = 0

    def towards(self, goal: Controls) -> _Moment:
        return _Moment(self.states, self.style, self.gain, goal, FADE_HOPS)


class Replay:
    """The wet path of the processor as a function of a moment, so that one hop can be tried with several controls."""

    def __init__(self, bundle: Bundle, provider: str, style: Style) -> None:
        manifest = bundle.manifest
        self._hop = manifest.spectral.hop_samples
        self._session = make_session(bundle.graph, provider, {"channels": 1, "samples": self._hop})
        self._names = ["audio_out", *(f"next.{state.name}" for state in manifest.states)]
        self._states = [f"state.{state.name}" for state in manifest.states]
        self._ramp = (np.arange(1, self._hop + 1, dtype=np.float32) / np.float32(self._hop))[None]
        controls = mixed_controls(bundle, style)
        zeros = {f"state.{state.name}": np.zeros((1, *state.shape), np.float32) for state in manifest.states}
        self.start = _Moment(zeros, controls.style.copy(), _gain(controls), controls)

    def hop(self, moment: _Moment, audio: NDArray[np.float32]) -> tuple[NDArray[np.float32], _Moment]:
        """audio [hop] -> what the processor gives [hop], and the moment after it."""
        style, old, new, left = moment.style, moment.gain, moment.gain, moment.hops_left
        if left:
            style = (style + (moment.goal.style - style) * (1.0 / left)).astype(np.float32)
            goal = _gain(moment.goal)
            new = old + (goal - old) * (1.0 / left) if left > 1 else goal
            left -= 1
        wet, *states = self._session.run(self._names, {"audio": audio[None], "style": style[None]} | moment.states)
        out = np.asarray(wet, np.float32) * (
            new if old == new else self._ramp * np.float32(new - old) + np.float32(old)
        )
        limit(out)
        after = dict(zip(self._states, map(np.asarray, states), strict=True))
        return out[0], _Moment(after, style, new, moment.goal, left)


def _gain(controls: Controls) -> float:
    return db_to_gain(controls.level_gain_db)


def find_switches(
    replay: Replay,
    sent: NDArray[np.float32],
    heard: NDArray[np.float32],
    switches: Sequence[tuple[int, Controls]],
) -> dict[int, tuple[int, int]]:
    """The hop, and the sample in it, where each switch was first heard, by the switch's number.

    ``sent`` and ``heard`` [hops, hop] line up; a switch is (hop in which it was sent, controls that it leads to). Every
    hop is computed again. One that is not what was heard must be the first under the controls of a switch sent before;
    a switch that another overtook is left out. Raises MeasureError when no switch explains what was heard.
    """
    began = int(np.flatnonzero(sent.any(axis=1))[0])
    moment = _moment_at(replay, sent, heard, began)
    found: dict[int, tuple[int, int]] = {}
    waiting = 0
    for at in range(began, len(sent)):
        out, after = replay.hop(moment, sent[at])
        changed = np.abs(out - heard[at]) > SAME
        if changed.any():
            for number in range(waiting, len(switches)):
                sent_at, goal = switches[number]
                # A message may overtake the block that was sent with it, no more.
                if sent_at > at + 1:
                    raise MeasureError("what came back through the JACK server is not what the engine computes")
                other, other_after = replay.hop(moment.towards(goal), sent[at])
                if np.abs(other - heard[at]).max() <= SAME:
                    found[number] = (at, int(changed.argmax()))
                    waiting, after = number + 1, other_after
                    break
            else:
                raise MeasureError("what came back through the JACK server is not what the engine computes")
        moment = after
    return found


def _moment_at(replay: Replay, sent: NDArray[np.float32], heard: NDArray[np.float32], at: int) -> _Moment:
    """The engine's moment before hop ``at``, the first with a sound in it; how long it had heard silence is open."""
    moment = replay.start
    for _ in range(at + 1):
        trial = moment
        for number in range(at, at + START_HOPS_CHECKED):
            out, trial = replay.hop(trial, sent[number])
            if np.abs(out - heard[number]).max() > SAME:
                break
        else:
            return moment
        _, moment = replay.hop(moment, sent[0])
    raise MeasureError("what came back through the JACK server is not what the engine computes")
