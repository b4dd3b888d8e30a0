"""A soak: ``restyle live``'s performance and a do-nothing client in turns on a real JACK server, and what each missed.

The machine has its own hiccups, so the figure is the ratio of the two. MIDI floods in and a recording runs all along.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realtime.audio import AudioFileError, demo_playing
from realtime.bench_jack import Child, answer_until_stop, calm_python, idle_process
from realtime.bundle import Bundle
from realtime.jack_server import JackServer, jack_library
from realtime.live import LiveSettings, Performance, PerformanceError
from realtime.midi import MidiError
from realtime.quiet import silence_jack
from realtime.spectral import SpectralSpec

PLAYER = "restyle-soak"
POLL_S = 0.1
SETTLE_SHARE, SETTLE_LIMIT_S = 1 / 3, 6.0
"""Part of a slice, and seconds at most, before anything counts: joining a server disturbs it, and memory warms up."""
WARM_SHARE = 1 / 2
"""Part of a slice after which memory should stand still: the first loud onset and the first limited hop cost once."""


@dataclass(frozen=True)
class SoakSettings:
    """How long in all, shared by the periods and the two kinds of slices, and how many MIDI messages a second.

    ``inference`` as in LiveSettings; None defers where a period is shorter than a hop, and else does not.
    """

    provider: str = "cpu"
    minutes: float = 30.0
    inference: str | None = None
    periods_samples: tuple[int, ...] = (64, 128)
    slice_s: float = 30.0
    messages_per_second: int = 1_000

    @property
    def pairs(self) -> int:
        """Pairs of slices at each period, at least one."""
        return max(1, round(60.0 * self.minutes / (2 * len(self.periods_samples) * self.slice_s)))

    def inference_at(self, period_samples: int, hop_samples: int) -> str:
        """Where the graph runs at a period."""
        return self.inference or ("deferred" if period_samples < hop_samples else "worker")

    @property
    def real_slice_s(self) -> float:
        """Seconds of one slice."""
        return 60.0 * self.minutes / (2 * len(self.periods_samples) * self.pairs)


@dataclass(frozen=True)
class Slice:
    """One client's turn; counts are of its ``seconds`` after settling.

    ``xruns`` are the server's, heard by the player; ``own_xruns`` those that PortAudio told the client. A miss is a
    hop, or a do-nothing callback, that took longer than the server's period, or a hop that was played dry for want of
    time. ``restarts`` are of graph processes, ``midi_restarts`` of MIDI's; memory jumps at one. ``lost_messages`` came
    faster than they can be heard. ``memory_kib`` is the private memory of audio, graph and MIDI processes as (seconds
    since the first block, KiB).
    """

    kind: str
    period_samples: int
    seconds: float
    frames: int
    xruns: int
    own_xruns: int
    misses: int
    messages: int
    dropped_frames: int = 0
    restarts: int = 0
    midi_restarts: int = 0
    lost_messages: int = 0
    memory_kib: list[tuple[float, float]] = field(default_factory=list)
    failure: str = ""

    @classmethod
    def failed(cls, kind: str, period_samples: int, failure: str) -> Slice:
        return cls(kind, period_samples, 0.0, 0, 0, 0, 0, 0, failure=failure)


@dataclass
class PlayerCounts:
    """What the player has seen so far: of the server's xruns, and of its own messages."""

    xruns: int = 0
    messages: int = 0


def flood() -> list[bytes]:
    """MIDI messages that keep every part of the performance moving, round and round."""
    messages: list[bytes] = []
    for i in range(128):
        messages += [
            bytes((0xC0, i)),
            bytes((0x90, i, 1 + i % 127)),
            bytes((0xB0, 1, i)),
            bytes((0xB0, 3, i)),
            bytes((0xE0, 0, i)),
            bytes((0x80, i, 0)),
        ]
    return messages


def player_process(server: str, sample_rate: int, messages_per_second: int, pipe: Connection) -> None:
    """A process's main function: a JACK client that plays the bundled clip and, between 'flood' and 'quiet', floods
    whoever listens with MIDI."""
    counts, flooding = PlayerCounts(), False
    try:
        client: Any = jack_library().Client(PLAYER, servername=server, no_start_server=True)
        silence_jack()
        out, midi = client.outports.register("out"), client.midi_outports.register("midi")
        client.inports.register("in")
        music, messages = demo_playing(sample_rate), flood()
        at, due = 0, 0.0

        def process(frames: int) -> None:
            nonlocal at, due
            if at + frames > len(music):
                at = 0
            out.get_array()[:] = music[at : at + frames]
            at += frames
            midi.clear_buffer()
            due = due + messages_per_second * frames / sample_rate if flooding else 0.0
            while due >= 1.0:
                midi.write_midi_event(0, messages[counts.messages % len(messages)])
                counts.messages += 1
                due -= 1.0

        def xrun(delayed_us: float) -> None:
            del delayed_us
            counts.xruns += 1

        client.set_process_callback(process)
        client.set_xrun_callback(xrun)
        calm_python()
        client.activate()
    except Exception as error:
        pipe.send(f"the player does not start: {error}")
        os._exit(1)

    def answer(question: str) -> PlayerCounts:
        nonlocal flooding
        flooding = question == "flood" or (flooding and question != "quiet")
        return counts

    answer_until_stop(pipe, answer)
    client.deactivate()
    client.close()


def soak(
    bundle: Bundle,
    settings: SoakSettings,
    stop_asked: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """The figures so far after every slice, the last ones at the end or soon after ``stop_asked``.

    Raises MeasureError, JackServerError. Whoever leaves early closes the generator, which ends every process.
    """
    rate = bundle.manifest.spectral.sample_rate
    slices: list[Slice] = []
    for period in settings.periods_samples:
        with (
            JackServer(rate, period, _server_arguments()) as server,
            Child(player_process, server.name, rate, settings.messages_per_second) as player,
        ):
            for pair in range(settings.pairs):
                for kind, turn in (("restyle", _restyle_turn), ("idle", _idle_turn)):
                    say(f"period {period}, {kind}, slice {pair + 1} of {settings.pairs}")
                    try:
                        slices.append(turn(bundle, settings, period, player, stop_asked))
                    except (PerformanceError, MidiError, AudioFileError) as error:
                        slices.append(Slice.failed(kind, period, str(error)))
                    yield soak_figures(slices, settings, bundle.manifest.spectral)
                    if stop_asked():
                        return


@contextlib.contextmanager
def _flooded(player: Child) -> Iterator[None]:
    """MIDI comes in meanwhile, and not before and after: a performance that ends under messages leaves its JACK ports
    open, and one client more a slice would burden the server that all slices share."""
    player.ask("flood")
    try:
        yield
    finally:
        player.ask("quiet")


def _server_arguments() -> tuple[str, ...]:
    """Real-time priority where this process may have it; asynchronous, since drop-outs are what is studied."""
    try:
        policy, before = os.sched_getscheduler(0), os.sched_getparam(0)
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        os.sched_setscheduler(0, policy, before)
    except (OSError, AttributeError):
        return ("-r",)
    return ("-R", "-P", "70")


def _wait(
    seconds: float, stop_asked: Callable[[], bool], each: Callable[[], object] = lambda: None, every_s: float = POLL_S
) -> None:
    deadline = time.monotonic() + seconds
    while not stop_asked() and (left := deadline - time.monotonic()) > 0:
        each()
        time.sleep(min(every_s, left))


def _settle_s(settings: SoakSettings) -> float:
    return min(SETTLE_LIMIT_S, SETTLE_SHARE * settings.real_slice_s)


def _idle_turn(
    bundle: Bundle, settings: SoakSettings, period: int, player: Child, stop_asked: Callable[[], bool]
) -> Slice:
    with Child(idle_process, PLAYER, bundle.manifest.spectral.sample_rate) as idle, _flooded(player):
        _wait(_settle_s(settings), stop_asked)
        began, played, before = time.monotonic(), player.ask(), idle.ask()
        _wait(settings.real_slice_s - _settle_s(settings), stop_asked)
        ended, played_after, after = time.monotonic(), player.ask(), idle.ask()
    return Slice(
        kind="idle",
        period_samples=period,
        seconds=ended - began,
        frames=after.frames - before.frames,
        xruns=played_after.xruns - played.xruns,
        own_xruns=after.xruns - before.xruns,
        misses=after.misses - before.misses,
        messages=played_after.messages - played.messages,
    )


def _restyle_turn(
    bundle: Bundle, settings: SoakSettings, period: int, player: Child, stop_asked: Callable[[], bool]
) -> Slice:
    spec = bundle.manifest.spectral
    memory: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        live = LiveSettings(
            bundle.path,
            input_device=PLAYER,
            midi=PLAYER,
            provider=settings.provider,
            record=Path(folder) / "take",
            inference=settings.inference_at(period, spec.hop_samples),
        )
        with Performance(live) as performance:
            with _flooded(player):
                first_block = time.monotonic()
                _wait(_settle_s(settings), stop_asked, performance.poll)
                performance.poll()
                began, played, before = time.monotonic(), player.ask(), performance.status()
                hops_before = sum(map(len, performance.history.hop_ms))

                def look() -> None:
                    performance.poll()
                    kib = [private_memory_kib(process_id) for process_id in performing_process_ids()]
                    known = [one for one in kib if one is not None]
                    if known:
                        memory.append((round(time.monotonic() - first_block, 2), sum(known)))

                _wait(settings.real_slice_s - _settle_s(settings), stop_asked, look)
                performance.poll()
                ended, played_after, after = time.monotonic(), player.ask(), performance.status()
                hop_ms = np.concatenate([np.zeros((0, 2), np.float32), *performance.history.hop_ms])[hops_before:, 0]
            summary = performance.stop()
        problem = summary.status.recorder_problem
    deadline_ms = 1e3 * min(period, spec.hop_samples) / spec.sample_rate
    return Slice(
        kind="restyle",
        period_samples=period,
        seconds=ended - began,
        frames=int(after.meters.frames - before.meters.frames),
        xruns=played_after.xruns - played.xruns,
        own_xruns=int(after.meters.xruns - before.meters.xruns),
        misses=int((hop_ms > deadline_ms).sum() + after.meters.late_hops - before.meters.late_hops),
        messages=played_after.messages - played.messages,
        dropped_frames=after.dropped_frames - before.dropped_frames,
        restarts=after.restarts - before.restarts,
        midi_restarts=after.midi_restarts - before.midi_restarts,
        lost_messages=after.lost_messages - before.lost_messages,
        memory_kib=memory,
        failure=problem,
    )


def performing_process_ids() -> list[int]:
    """The audio, graph and MIDI processes of the performance that this process runs."""
    return [
        process.pid
        for process in multiprocessing.active_children()
        if process.name.startswith("restyle-") and process.pid is not None
    ]


def private_memory_kib(process_id: int | None) -> float | None:
    """Resident private memory in KiB, without shared memory and files; None where Linux does not tell."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return float(line.split()[1])
    return None


def memory_growth(runs: list[NDArray[np.float64]]) -> dict[str, float]:
    """One slope in KiB/s through runs [n, (s, KiB)] that start at levels of their own, and what they grew in sum."""
    runs = [run for run in runs if len(run) > 1]
    above = below = 0.0
    for run in runs:
        seconds, kib = run[:, 0] - run[:, 0].mean(), run[:, 1] - run[:, 1].mean()
        above += float(seconds @ kib)
        below += float(seconds @ seconds)
    return {
        "slope_kib_per_s": round(above / below, 4) if below else 0.0,
        "growth_kib": float(sum(run[-1, 1] - run[0, 1] for run in runs)),
        "seconds": round(float(sum(run[-1, 0] - run[0, 0] for run in runs)), 1),
    }


def _warm(memory_kib: list[tuple[float, float]]) -> NDArray[np.float64]:
    """The later part of a slice's memory [n, (s, KiB)]."""
    run = np.array(memory_kib, np.float64).reshape(-1, 2)
    return run[run[:, 0] >= WARM_SHARE * run[-1, 0]] if len(run) else run


def ratio(restyle: int, restyle_s: float, idle: int, idle_s: float) -> float:
    """Events per second, ours to the do-nothing client's; one is added to each count, so that nothing to nothing is 1.

    0.0 where one of them has not been measured.
    """
    if restyle_s <= 0.0 or idle_s <= 0.0:
        return 0.0
    return round((restyle + 1) / (idle + 1) * idle_s / restyle_s, 3)


def soak_figures(slices: list[Slice], settings: SoakSettings, spec: SpectralSpec) -> dict[str, Any]:
    """What the slices come to, by period; 1.0 is the goal of a ratio, 0.0 of memory growth."""
    periods = []
    for period in dict.fromkeys(one.period_samples for one in slices):
        sums: dict[str, dict[str, Any]] = {}
        for kind in ("restyle", "idle"):
            chosen = [one for one in slices if one.period_samples == period and one.kind == kind]
            seconds = sum(one.seconds for one in chosen)
            frames = sum(one.frames for one in chosen)
            sums[kind] = {
                "seconds": round(seconds, 1),
                "xruns": sum(one.xruns for one in chosen),
                "own_xruns": sum(one.own_xruns for one in chosen),
                "misses": sum(one.misses for one in chosen),
                "kept_share": round(frames / (seconds * spec.sample_rate), 5) if seconds else 0.0,
                "messages": sum(one.messages for one in chosen),
                "recording_dropped_frames": sum(one.dropped_frames for one in chosen),
                "restarts": sum(one.restarts for one in chosen),
                "midi_restarts": sum(one.midi_restarts for one in chosen),
                "lost_messages": sum(one.lost_messages for one in chosen),
                "failures": sum(bool(one.failure) for one in chosen),
            }
        ours, idle = sums["restyle"], sums["idle"]
        periods.append(
            {"period_samples": period, "inference": settings.inference_at(period, spec.hop_samples)}
            | sums
            | {
                name: ratio(ours[counted], ours["seconds"], idle[counted], idle["seconds"])
                for name, counted in (("xrun_ratio", "xruns"), ("miss_ratio", "misses"))
            }
            | {"memory": memory_growth([_warm(one.memory_kib) for one in slices if one.period_samples == period])}
        )
    return {
        "minutes": settings.minutes,
        "slice_s": round(settings.real_slice_s, 2),
        "seconds": round(sum(one.seconds for one in slices), 1),
        "messages_per_second": settings.messages_per_second,
        "periods": periods,
        "slices": [vars(one) for one in slices],
    }
