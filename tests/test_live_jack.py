"""``restyle live`` on a real JACK server: what a musician sends in and gets back, sample by sample.

The server is synchronous (``jackd -S``): on a loaded machine it slips time and loses nothing, so samples are asserted
and never wall time. The musician is a JACK client of the test's process; restyle runs in processes of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from realtime.bundle import DEFAULT_MODEL, DEMO_CLIP, read_bundle
from realtime.controls import Performer, select_mix
from realtime.jack_server import JackServer
from realtime.live import START_TIMEOUT_S
from realtime.privileges import may_lock_memory
from realtime.processor import FADE_HOPS, Processor
from realtime.replay import read_show, replay
from realtime.resample import plan_rates

pytestmark = pytest.mark.jack

RATE = 48_000
PATIENCE_S = 60.0
"""How long a loaded machine may take; nothing passes or fails by being faster."""
BUNDLE = read_bundle(DEFAULT_MODEL)
HOP = BUNDLE.manifest.spectral.hop_samples
LATENCY = BUNDLE.manifest.spectral.latency_samples
GUITAR = np.asarray(soundfile.read(DEMO_CLIP, dtype="float32", start=12_000, frames=6 * RATE)[0], np.float32)

MIRROR = """
import sys, jack
client = jack.Client("mirror")
source, sink = client.inports.register("in"), client.outports.register("out")
@client.set_process_callback
def process(frames):
    sink.get_array()[:] = source.get_array()
with client:
    client.connect("musician:out", source)
    client.connect(sink, "musician:in")
    print("ready", flush=True)
    sys.stdin.read()
"""

PEDALBOARD = """
import sys, time, rtmidi
target = sys.argv[1]
output = rtmidi.MidiOut(rtmidi.API_UNIX_JACK, name="pedalboard")
if target:
    output.open_port(next(i for i, name in enumerate(output.get_ports()) if target in name), "out")
else:
    output.open_virtual_port("pedals")
print("ready", flush=True)
for line in sys.stdin:
    for i, message in enumerate(line.split()):
        output.send_message(bytes.fromhex(message))
        if i % 100 == 99:
            time.sleep(0.005)  # its own queue is short
    print("sent", flush=True)
# A client that is gone without a word holds a synchronous server up.
output.close_port()
output.delete()
"""


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.02)


class Musician:
    """A JACK client with one output and one input that plays what it is given and keeps all it sends and hears."""

    def __init__(self) -> None:
        import jack

        self.client: Any = jack.Client("musician")
        self._out = self.client.outports.register("out")
        self._in = self.client.inports.register("in")
        self.midi = self.client.midi_outports.register("raw")
        self.raw_midi: list[bytes] = []
        self.raw_midi_per_period = 1_000
        self._sent: list[NDArray[np.float32]] = []
        self._heard: list[NDArray[np.float32]] = []
        self._music, self._at = np.zeros(0, np.float32), 0
        self.position = 0
        self.client.set_process_callback(self._process)

    def _process(self, frames: int) -> None:
        out = self._out.get_array()
        music = self._music[self._at : self._at + frames]
        self._at += len(music)
        out[: len(music)], out[len(music) :] = music, 0.0
        self.midi.clear_buffer()
        count = min(self.raw_midi_per_period, len(self.raw_midi))
        for i in range(count):
            self.midi.write_midi_event(i * frames // count, self.raw_midi[i])
        del self.raw_midi[:count]
        self._sent.append(out.copy())
        self._heard.append(self._in.get_array().copy())
        self.position += frames

    def begin(self, music: NDArray[np.float32]) -> None:
        """Start to play it, from the next period on; silence comes after it."""
        self._music, self._at = np.zeros(0, np.float32), 0
        self._music = music

    def play(self, music: NDArray[np.float32]) -> int:
        """Play it all, with half a second of silence after it; the first frame that may hold it."""
        self.rest(RATE // 8)  # a new connection takes effect a few periods after the call
        start = self.position
        self.begin(music)
        self.rest(len(music) + RATE // 2)
        return start

    def rest(self, frames: int) -> None:
        """Let so many frames pass."""
        goal = self.position + frames
        wait_for(lambda: self.position >= goal, f"frame {goal}")

    def since(self, start: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What was sent and what was heard, from a frame on, up to now."""
        periods = len(self._heard)
        return np.concatenate(self._sent[:periods])[start:], np.concatenate(self._heard[:periods])[start:]

    def differs(self, delay: int, frames: int = 4096) -> bool:
        """Is what was heard lately anything but what was sent ``delay`` frames before?"""
        blocks = (frames + delay) // len(self._sent[-1]) + 2
        end = len(self._heard)
        heard = np.concatenate(self._heard[max(0, end - blocks) : end])
        sent = np.concatenate(self._sent[max(0, end - blocks) : end])
        return not np.array_equal(heard[-frames:], sent[-frames - delay : -delay])


class Band(Musician):
    """A musician with so many outputs and inputs, each output at half the level of the one before."""

    def __init__(self, ports: int) -> None:
        super().__init__()
        self._more_out = [self.client.outports.register(f"out{i}") for i in range(1, ports)]
        self._more_in = [self.client.inports.register(f"in{i}") for i in range(1, ports)]
        self._more_heard: list[NDArray[np.float32]] = []

    def _process(self, frames: int) -> None:
        super()._process(frames)
        for number, port in enumerate(self._more_out, 1):
            port.get_array()[:] = self._out.get_array() * 0.5**number
        self._more_heard.append(np.stack([port.get_array() for port in self._more_in]))

    def more_since(self, start: int) -> NDArray[np.float32]:
        """What the inputs after the first heard, from a frame on [inputs, frames]."""
        return np.concatenate(self._more_heard, axis=1)[:, start:]


@pytest.fixture
def musician(jack_server: JackServer) -> Iterator[Musician]:
    del jack_server
    musician = Musician()
    with musician.client:
        yield musician


class Helper:
    """A client of the JACK server in a process of its own: opening a client there would hold up the musician here."""

    def __init__(self, script: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer("ready")

    def _answer(self, expected: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == f"{expected}\n"

    def send(self, *messages: Sequence[int]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(bytes(message).hex() for message in messages) + "\n")
        self._process.stdin.flush()
        self._answer("sent")

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.communicate(timeout=10)  # it ends with its input
        finally:
            self._process.kill()


def pedalboard(target: str = "") -> Helper:
    """A MIDI output of RtMidi's JACK API: a port of its own, called 'pedals', or one connected to ``target``."""
    return Helper(PEDALBOARD, target)


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def journal(take: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (take / "show.jsonl").read_text().splitlines()]


def noted(take: Path, text: str) -> bool:
    lines = (take / "show.jsonl").read_text() if (take / "show.jsonl").exists() else ""
    return text in lines


def summary_line(out: str) -> str:
    """The last status line that a performance printed."""
    return next(line for line in reversed(out.splitlines()) if "restarts" in line)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Restyle:
    """A running ``restyle live``."""

    def __init__(self, *arguments: str) -> None:
        # The server waits for its clients, so the callback may wait for the graph: no sample depends on the machine.
        command = [sys.executable, "-m", "realtime.cli", "live", "--patience", "5000", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.family: list[int] = []
        self.memory: list[Path] = []

    def await_sound(self) -> str:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        assert line.startswith("performing: "), line + self.process.stderr.read()
        # In the order of their start: resource tracker of Python, graph, audio process, MIDI, spare graph.
        wait_for(lambda: len(children(self.process.pid)) == 5, "the spare graph")
        self.family = children(self.process.pid)
        maps = Path(f"/proc/{self.process.pid}/maps").read_text().split()
        self.memory = [Path(word) for word in set(maps) if word.startswith("/dev/shm/psm_")]
        assert self.memory
        return line

    def end(self, code: int = 0, interrupt: bool = True) -> tuple[str, str]:
        """Wait for the end, after Ctrl-C if ``interrupt``; (stdout, stderr). Nothing may stay behind."""
        if interrupt:
            self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == code, (out, err)
        self.await_nothing_left()
        return out, err

    def await_nothing_left(self) -> None:
        """No process, no shared memory."""
        wait_for(lambda: not any(map(running, self.family)), "the end of every process")
        assert not [path for path in self.memory if path.exists()]

    def kill(self) -> None:
        if self.process.poll() is None:
            # The audio process follows its parent; Python's resource tracker then takes the shared memory away.
            self.process.kill()
            self.process.communicate(timeout=10)


@contextlib.contextmanager
def restyle_live(*arguments: str) -> Iterator[Restyle]:
    restyle = Restyle(*arguments)
    try:
        yield restyle
    finally:
        restyle.kill()


def offline(recorded: NDArray[np.float32], style: str) -> NDArray[np.float32]:
    """What the engine makes of [samples] on its own, with one style (or mix) from the first to the last."""
    performer = Performer(BUNDLE.manifest)
    select_mix(performer, style)
    processor = Processor(BUNDLE)
    processor.controls = performer.controls()
    processor.prepare(RATE, 8192, 1)
    blocks = [recorded[None, at : at + 8192] for at in range(0, len(recorded), 8192)]
    return np.concatenate([processor.process(block).copy() for block in blocks], axis=1)[0]


def first(signal_: NDArray[np.float32]) -> int:
    return int(np.flatnonzero(signal_)[0])


def round_trip_samples(musician: Musician) -> int:
    """Frames from the musician's output to their input through a client that does nothing: what JACK itself takes."""
    with Helper(MIRROR):
        sent, heard = musician.since(musician.play(np.ones(1, np.float32)))
        return first(heard) - first(sent)


def program(style: str) -> list[int]:
    return [0xC0, BUNDLE.manifest.style(style).program]


def note(style: str) -> int:
    return 36 + [s.id for s in BUNDLE.manifest.styles].index(style)


def read_take(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """input.wav and output.wav, which must be whole and of one length, beside the picture."""
    names = ["input.wav", "output.wav", "performance.png", "show.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "performance.png").read_bytes().startswith(b"\x89PNG")
    heard, rate = soundfile.read(folder / "input.wav", dtype="float32")
    played, _ = soundfile.read(folder / "output.wav", dtype="float32")
    assert rate == RATE and len(heard) == len(played)
    return np.asarray(heard, np.float32), np.asarray(played, np.float32)


@pytest.mark.parametrize(
    "jack_server",
    [(RATE, period) for period in (16, 32, 64, 128, 256, 1024, 2048, 4096)],
    indirect=True,
    ids=lambda p: f"period{p[1]}",
)
def test_a_device_adds_nothing_to_the_declared_latency_and_changes_no_sample(
    jack_server: JackServer, musician: Musician, tmp_path: Path
) -> None:
    """The musician's client is restyle's device, chosen by part of its name; so is the MIDI port."""
    jack_s_own = round_trip_samples(musician)
    assert jack_s_own == jack_server.period_samples  # a ring of two clients: one of them hears the other's last period
    delay = LATENCY + jack_s_own
    take = tmp_path / "take"
    arguments = ("--input", "music", "--style", "violin", "--dry-wet", "0", "--midi", "pedalb", "--record", str(take))
    with pedalboard() as pedals, restyle_live(*arguments) as restyle:
        assert "musician -> musician (JACK" in restyle.await_sound()
        names = {port.name for port in musician.client.get_ports()}
        assert {"restyle:in_0", "restyle:out_0", "restyle-midi:in"} <= names
        music = GUITAR[:RATE]
        start = musician.play(music)
        sent, heard = musician.since(start)
        began = start + first(sent)
        np.testing.assert_allclose(heard[delay:], sent[:-delay], rtol=0, atol=1e-6)
        assert start + first(heard) == began + delay
        musician.begin(np.tile(GUITAR, 10))
        pedals.send([0xB0, 12, 127])
        wait_for(lambda: musician.differs(delay), "the wet signal")
        musician.rest(2 * FADE_HOPS * HOP)
        wet_start = musician.play(music)
        out, err = restyle.end()
    total, period = LATENCY + jack_s_own, jack_server.period_samples
    assert f"latency {total} samples ({1e3 * total / RATE:.2f} ms) = JACK period {period} + hop {HOP}" in out
    assert err == ""
    recorded, played = read_take(take)
    # The engine's frame 0 is some frame of the musician's; the first sample that is not zero tells which.
    offset = first(recorded) - began
    sent, heard = musician.since(-offset)  # restyle started after the musician
    heard = heard[jack_s_own:]
    length = min(len(recorded), len(heard))
    np.testing.assert_array_equal(recorded[:length], sent[:length])
    np.testing.assert_allclose(played[:length], heard[:length], atol=2**-23)
    expected = offline(recorded, "violin")
    wet = slice(wet_start + offset, wet_start + offset + len(music))
    np.testing.assert_allclose(heard[wet], expected[wet], rtol=0, atol=1e-4)
    assert np.abs(expected[wet] - recorded[wet.start - LATENCY : wet.stop - LATENCY]).max() > 0.05


@pytest.mark.parametrize("jack_server", [(RATE, 16)], indirect=True, ids=["period16"])
def test_deferred_answers_of_the_graph_come_one_hop_later_and_replay(
    jack_server: JackServer, musician: Musician, tmp_path: Path
) -> None:
    """What blocks much shorter than a hop leave no time for otherwise."""
    take, period = tmp_path / "take", jack_server.period_samples
    arguments = ("--input", "musician", "--midi", "virtual", "--style", "violin", "--record", str(take))
    with restyle_live(*arguments, "--inference", "deferred") as restyle:
        restyle.await_sound()
        musician.play(GUITAR[:RATE])
        out, err = restyle.end()
    assert f"latency {LATENCY + HOP + period} samples" in out and f" + deferred {HOP}" in out and err == ""
    recorded, played = read_take(take)
    np.testing.assert_allclose(played[HOP:], offline(recorded, "violin")[:-HOP], rtol=0, atol=1e-4)
    sent, heard = musician.since(0)
    before = first(sent) - first(recorded)  # restyle started after the musician
    heard = heard[before + period :]
    length = min(len(played), len(heard))
    assert length > RATE
    np.testing.assert_allclose(heard[:length], played[:length], atol=2**-23)
    again = replay(read_show(take), BUNDLE)
    assert again.equal == again.compared == again.frames and again.fault_hops == 0


def rms(x: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def largest_step(x: NDArray[np.float32]) -> float:
    return float(np.abs(np.diff(x)).max())


def test_midi_performs_the_styles_without_a_click(musician: Musician, tmp_path: Path) -> None:
    """Program changes select, a chord blends, a controller goes dry and back, and nothing disturbs."""
    take = tmp_path / "take"
    moments: dict[str, int] = {}
    with restyle_live(
        "--input", "musician", "--style", "violin", "--midi", "virtual", "--record", str(take)
    ) as restyle:
        restyle.await_sound()
        delay = LATENCY + musician.client.blocksize
        with pedalboard("restyle-midi:in") as pedals:

            def then(name: str, *messages: list[int]) -> None:
                musician.rest(5 * RATE // 4)
                moments[name] = musician.position
                pedals.send(*messages)

            musician.begin(np.tile(GUITAR, 20))
            then("flute", program("flute"))
            then("chord", [0x90, note("violin"), 100], [0x91, note("choir"), 100])
            then("released", [0x80, note("violin"), 64], [0x91, note("choir"), 0])
            then("dry", [0xB0, 12, 0])
            wait_for(lambda: not musician.differs(delay), "the dry signal")
            exact_from = musician.position
            flood = [
                *([0x90 + i % 16, i % 128, 1 + i % 127] for i in range(500)),
                *([0x80 + i % 16, i % 128, 0] for i in range(500)),
                *([0xC0, i % 128] for i in range(500)),
                *([0xB0, 20 + i % 80 if (20 + i % 80) != 64 else 20, i % 128] for i in range(500)),
            ]
            pedals.send(*flood)
            pedals.send(*[[0xF0, *([0x55] * 298), 0xF7]] * 20)
            musician.client.connect(musician.midi, "restyle-midi:in")
            garbage = [
                b"\x00",
                b"\x7f\x7f",
                b"\xf4",
                b"\xff",
                b"\xb0\x0c",
                b"\x90",
                b"\xc0\x90\x01",
                b"\xe0\x01",
                b"\xf7",
                b"\xfe",
            ]
            musician.raw_midi += [*garbage, b"\xf0" + bytes(300) + b"\xf7", *garbage]
            wait_for(lambda: not musician.raw_midi, "the garbage to be sent")
            musician.rest(RATE // 2)
            exact_to = musician.position
            then("trumpet", program("trumpet"), [0xB0, 123, 0], [0xB0, 12, 127])
            then("end")
        out, err = restyle.end()
    assert "Trumpet 100%" in out and err == ""
    recorded, _ = read_take(take)
    sent, heard = musician.since(0)
    jack_s_own, offset = delay - LATENCY, first(recorded) - first(sent)
    exact = heard[exact_from:exact_to]
    np.testing.assert_array_equal(exact, sent[exact_from - delay : exact_to - delay])

    # The same samples in each style from first to last, on the musician's clock.
    mixes = {"violin": "violin", "flute": "flute", "chord": "violin,choir", "trumpet": "trumpet"}
    at_end = moments["end"]
    stills = {name: np.pad(offline(recorded, mix), (jack_s_own - offset, 0))[:at_end] for name, mix in mixes.items()}
    stills["dry"] = np.pad(sent, (delay, 0))[:at_end]
    # A second after a switch the model remembers little of the style before.
    for name, end in (
        ("violin", "flute"),
        ("flute", "chord"),
        ("chord", "released"),
        ("flute", "dry"),
        ("dry", "trumpet"),
        ("trumpet", "end"),
    ):
        part = slice(moments[end] - RATE // 4, moments[end])
        distances = {still: rms(heard[part] - audio[part]) for still, audio in stills.items()}
        others = [distance for still, distance in distances.items() if still != name]
        assert distances[name] < 0.5 * min(others) and distances[name] < 0.2 * rms(stills[name][part]), (end, distances)

    for name in ("flute", "chord", "released", "dry", "trumpet"):
        around = slice(moments[name] - RATE // 10, moments[name] + RATE // 2)
        usual = max(largest_step(audio[around]) for audio in stills.values())
        assert largest_step(heard[around]) <= usual + 2.0 / (FADE_HOPS * HOP), name


def test_the_servers_period_may_change_while_it_plays(musician: Musician) -> None:
    with restyle_live("--input", "musician", "--dry-wet", "0", "--midi", "virtual") as restyle:
        restyle.await_sound()
        for period in (256, 64, 16, 32, 4096, 1024, 2048):
            musician.client.blocksize = period
            musician.rest(RATE // 4)
            sent, heard = musician.since(musician.play(GUITAR[: RATE // 2]))
            delay = LATENCY + period
            np.testing.assert_array_equal(heard[delay:], sent[:-delay])
        _, err = restyle.end()
    assert err == ""


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("jack_server", [(RATE, 256)], indirect=True, ids=["period256"])
def test_one_channel_goes_to_two_outputs_and_more_go_side_by_side(jack_server: JackServer, channels: int) -> None:
    band, delay = Band(4), LATENCY + jack_server.period_samples
    arguments = ("--input", "musician", "--channels", str(channels), "--dry-wet", "0", "--midi", "virtual")
    with band.client, restyle_live(*arguments) as restyle:
        restyle.await_sound()
        start = band.play(GUITAR[: RATE // 2])
        sent, heard = band.since(start)
        more = band.more_since(start)
        _, err = restyle.end()
    assert err == "" and sent.any()
    length = min(len(sent), more.shape[1])
    np.testing.assert_array_equal(heard[delay:], sent[:-delay])
    for number in range(1, 4):
        gain = {1: 1.0 if number == 1 else 0.0, 2: 0.5 if number == 1 else 0.0, 4: 0.5**number}[channels]
        np.testing.assert_array_equal(more[number - 1, delay:length], gain * sent[: length - delay])


@pytest.mark.parametrize("frozen", [False, True], ids=["", "server that does not answer"])
def test_ctrl_c_while_it_starts_ends_it_cleanly(jack_server: JackServer, frozen: bool) -> None:
    """As a terminal sends it: to every process of the group."""
    server = jack_server.process
    assert server is not None
    if frozen:
        os.kill(server.pid, signal.SIGSTOP)
    try:
        with restyle_live("--midi", "virtual", "--input", "system") as restyle:
            wait_for(lambda: len(children(restyle.process.pid)) >= 3, "the audio process")
            restyle.family = children(restyle.process.pid)
            os.killpg(restyle.process.pid, signal.SIGINT)
            began = time.monotonic()
            _, err = restyle.end(code=1, interrupt=False)
            assert time.monotonic() - began < START_TIMEOUT_S / 2
        assert "cannot perform: stopped before it began" in err
    finally:
        os.kill(server.pid, signal.SIGCONT)


def test_the_audio_process_does_not_outlive_the_one_that_started_it(jack_server: JackServer) -> None:
    del jack_server
    with restyle_live("--midi", "virtual") as restyle:
        restyle.await_sound()
        restyle.process.kill()
        restyle.process.communicate(timeout=PATIENCE_S)
        restyle.await_nothing_left()


def notes_of(take: Path) -> list[str]:
    """The events in the journal of a recording that may still go on."""
    journal = take / "show.jsonl"
    lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
    return [
        entry["note"] for entry in map(json.loads, filter(lambda line: line.endswith("\n"), lines)) if "note" in entry
    ]


def test_a_midi_port_that_goes_away_and_comes_back_is_told_and_counted(jack_server: JackServer, tmp_path: Path) -> None:
    del jack_server
    take = tmp_path / "take"
    pedals = pedalboard()
    with restyle_live("--clip", str(DEMO_CLIP), "--loop", "--midi", "pedalb", "--record", str(take)) as restyle:
        restyle.await_sound()
        with pedals:
            pedals.send(program("violin"))
        wait_for(lambda: len(notes_of(take)) == 1, "the loss of the port")
        with pedalboard() as pedals:
            wait_for(lambda: len(notes_of(take)) == 2, "the port")
            pedals.send(program("trumpet"))
            wait_for(lambda: noted(take, '"midi": "c0 38"'), "the program change")
            out, err = restyle.end()
    gone, back = notes_of(take)
    assert gone == "MIDI port pedalboard:pedals went away; once it is there again, it is heard by itself"
    assert back == "MIDI port pedalboard:pedals is heard"
    assert err == f"WARNING: {gone}\nWARNING: {back}\n"
    assert "Trumpet 100%" in out and "MIDI lost 1" in next(
        line for line in reversed(out.splitlines()) if "MIDI" in line
    )
    assert replay(read_show(take), BUNDLE).equal > RATE // 2


def test_when_the_process_of_midi_dies_its_notes_end_and_another_one_hears(tmp_path: Path) -> None:
    take = tmp_path / "take"
    arguments = ("--clip", str(DEMO_CLIP), "--loop", "--midi", "pedalb", "--style", "violin", "--record", str(take))
    # A synchronous server would wait four seconds for the client that died.
    with JackServer(RATE, 128, ("-r",)), pedalboard() as pedals, restyle_live(*arguments) as restyle:
        restyle.await_sound()
        pedals.send(bytes([0x90, 0x2A, 0x40]))
        wait_for(lambda: noted(take, '"midi": "90 2a 40"'), "the note")
        os.kill(restyle.family[3], signal.SIGKILL)
        wait_for(lambda: len(notes_of(take)) == 2, "another process")
        restyle.family = children(restyle.process.pid)
        pedals.send(program("trumpet"))
        wait_for(lambda: noted(take, '"midi": "c0 38"'), "the program change")
        out, err = restyle.end()
    died, again = notes_of(take)
    assert died == "the process of MIDI died (exit code -9); another one is started"
    assert again == "MIDI is heard again: pedalboard:pedals (Jack)"
    assert err == f"WARNING: {died}\nWARNING: {again}\n"
    entries = journal(take)
    assert [entry["midi"] for entry in entries if "midi" in entry] == ["90 2a 40", "80 2a 00", "c0 38"]
    frames = [entry["frame"] for entry in entries if entry.get("note") in (died, again)]
    assert frames[1] - frames[0] < 2 * RATE  # a second where the machine has nothing else to do
    assert "Trumpet 100%" in out
    assert "MIDI restarts 1" in summary_line(out)
    assert replay(read_show(take), BUNDLE).equal > RATE // 2


def write_fragile_model(path: Path) -> None:
    """The shipped model, which also looks up the level of its input in a table that ends below the demo clip's peak."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(DEFAULT_MODEL))
    node, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    entries_a_unit = np.array(1.5 / np.abs(soundfile.read(DEMO_CLIP)[0]).max(), np.float32)
    model.graph.initializer.extend([tensor(np.zeros(1, np.float32), "table"), tensor(entries_a_unit, "entries_a_unit")])
    last = next(one for one in model.graph.node if "audio_out" in one.output)
    last.output[0] = "sound"
    model.graph.node.extend(
        [
            node("ReduceMax", ["audio"], ["peak"], keepdims=0),
            node("Mul", ["peak", "entries_a_unit"], ["place"]),
            node("Cast", ["place"], ["entry"], to=onnx.TensorProto.INT64),
            node("Gather", ["table", "entry"], ["nothing"]),
            node("Add", ["sound", "nothing"], ["audio_out"]),
        ]
    )
    onnx.save(model, str(path))


@pytest.mark.parametrize("inference", ["worker", "callback"])
def test_what_the_graph_raises_is_told_once_and_stands_in_the_summary(tmp_path: Path, inference: str) -> None:
    model, take = tmp_path / "fragile.onnx", tmp_path / "take"
    write_fragile_model(model)
    arguments = ("--model", str(model), "--clip", str(DEMO_CLIP), "--loop", "--inference", inference)
    with restyle_live(*arguments, "--record", str(take)) as restyle:
        wait_for(lambda: len(notes_of(take)) == 1, "what the graph raised")
        wait_for(lambda: (take / "show.jsonl").read_text().count('"bad"') > 20, "more of it")
        out, err = restyle.end()
    [told] = notes_of(take)
    assert told.startswith("the graph failed: ") and "Gather" in told and "idx=1" in told
    assert err == f"WARNING: {told}\n"
    summary = next(line for line in reversed(out.splitlines()) if "headroom" in line)
    assert summary.endswith(f"raised: {told}") and "bad in 0 out 0" not in summary and "errors 0" in summary


def locked_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmLck:")).split()[1])


@pytest.mark.skipif(not may_lock_memory(), reason="this user may not lock memory")
def test_the_audio_and_graph_processes_are_locked_into_memory() -> None:
    with restyle_live("--clip", str(DEMO_CLIP), "--loop") as restyle:
        restyle.await_sound()
        assert all(locked_kib(pid) > 50_000 for pid in restyle.family[1:3])
        wait_for(lambda: locked_kib(restyle.family[4]) > 50_000, "the spare graph's lock")
        restyle.end()


@pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
def test_under_a_limit_no_memory_is_locked_and_all_of_it_can_be_had() -> None:
    """What was locked under a limit would leave nothing to allocate. As nobody where the tests run as root."""
    code = (
        "import os, resource\n"
        "from realtime.privileges import lock_memory\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (2**20, 2**20))\n"
        "if os.geteuid() == 0: os.setresuid(65534, 65534, 65534)\n"
        "print(lock_memory(), len(bytearray(2**26)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == ["False", str(2**26)]


def refused(*arguments: str) -> str:
    with restyle_live(*arguments, "--seconds", "1") as restyle:
        out, err = restyle.end(code=1, interrupt=False)
    assert out == "" and "Traceback" not in err and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "jack_server", [(44_100, 128), (88_200, 128), (96_000, 64)], indirect=True, ids=lambda p: f"{p[0]}Hz-period{p[1]}"
)
def test_a_server_at_another_rate_is_resampled_with_one_exact_delay_and_replays(
    jack_server: JackServer, musician: Musician, tmp_path: Path
) -> None:
    take, rate = tmp_path / "take", jack_server.sample_rate
    delay = plan_rates(rate, RATE, LATENCY).latency_samples + jack_server.period_samples
    with restyle_live("--input", "musician", "--midi", "virtual", "--record", str(take), "--dry-wet", "0") as restyle:
        restyle.await_sound()
        # An edge would be sound beyond what a device of 44.1 kHz can hold.
        rise = np.sin(np.linspace(0, np.pi / 2, RATE // 20, dtype=np.float32)) ** 2
        music = GUITAR[:RATE] * np.concatenate([rise, np.ones(RATE - 2 * len(rise), np.float32), rise[::-1]])
        sent, heard = musician.since(musician.play(music))
        with pedalboard("restyle-midi:in") as pedals:
            musician.begin(GUITAR)
            pedals.send([0xB0, 12, 127])
            musician.rest(RATE)
        out, err = restyle.end()
    assert f"latency {delay} samples" in out and " + resampling " in out and err == ""
    np.testing.assert_allclose(heard[delay:], sent[:-delay], atol=2e-3)
    assert soundfile.info(take / "output.wav").samplerate == rate
    again = replay(read_show(take), BUNDLE)
    assert again.equal == again.compared == again.frames and again.frames > rate


def test_a_start_that_fails_leaves_an_earlier_recording_alone(jack_server: JackServer, tmp_path: Path) -> None:
    del jack_server
    take = tmp_path / "take"
    take.mkdir()
    (take / "performance.png").write_bytes(b"an earlier take")
    text = refused("--record", str(take), "--channels", "5")
    assert "'system' has 2 input channels" in text
    assert (take / "performance.png").read_bytes() == b"an earlier take"


def test_unknown_names_are_refused_with_the_list_of_known_ones(musician: Musician) -> None:
    del musician
    text = refused("--input", "microphone")
    assert "no input device is called 'microphone'" in text
    assert "system (JACK Audio Connection Kit, 2 in, 2 out)" in text and "musician (JACK Audio" in text
    text = refused("--midi", "nanopad")
    assert "no MIDI port is called 'nanopad'" in text and "0: musician:raw (Jack)" in text and "'virtual'" in text


def test_a_source_needs_no_input_and_sounds_while_a_note_is_held(
    jack_server: JackServer, musician: Musician, tmp_path: Path
) -> None:
    """A model of kind ``generate`` opens an output alone; what it plays begins and ends without a step."""
    del jack_server
    pytest.importorskip("torch")
    from tests.sources import write_source

    write_source(tmp_path / "source.onnx")
    take = tmp_path / "take"
    arguments = ("--model", str(tmp_path / "source.onnx"), "--output", "music", "--midi", "pedalb")
    with pedalboard() as pedals, restyle_live(*arguments, "--seed", "3", "--record", str(take)) as restyle:
        assert "noise of seed 3 -> musician (JACK" in restyle.await_sound()
        names = {port.name for port in musician.client.get_ports()}
        assert "restyle:out_0" in names and "restyle:in_0" not in names
        start = musician.position
        musician.rest(RATE // 4)
        assert not musician.since(start)[1].any(), "nothing held, nothing heard"
        pedals.send([0x90, 36, 100])
        wait_for(lambda: bool(musician.since(start)[1].any()), "the note")
        musician.rest(RATE // 2)
        pedals.send([0x80, 36, 0])
        released = musician.position
        wait_for(lambda: not musician.since(max(released, musician.position - RATE // 8))[1].any(), "silence")
        musician.rest(RATE // 4)
        _, heard = musician.since(start)
        out, err = restyle.end()
    assert err == "" and "latency" in out
    sounding = np.flatnonzero(heard)
    assert not heard[-RATE // 8 :].any() and len(sounding) > RATE // 4
    steps = np.abs(np.diff(heard))
    largest = steps[sounding[0] + 4096 : sounding[-1] - 4096].max()
    edges = steps[sounding[0] - 2 : sounding[0] + 256], steps[sounding[-1] - 256 : sounding[-1] + 2]
    assert max(float(edge.max()) for edge in edges) < 0.5 * largest
    assert not read_take(take)[0].any()
    again = replay(read_show(take), read_bundle(tmp_path / "source.onnx"))
    assert again.equal == again.compared > 0
