"""What goes wrong on a stage, done to ``restyle live`` for real: it plays on, counts it, and comes back by itself."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from realtime.bundle import DEFAULT_MODEL, DEMO_CLIP, read_bundle
from realtime.ensemble import ALONE, Part, Parts, join
from realtime.jack_server import JackServer
from realtime.limiter import limit
from realtime.soak import flood
from realtime.stream import Stream
from realtime.worker import (
    _ASKED,
    _DONE,
    _FAILED,
    _PROBLEM,
    SHORTEST_LIFE_S,
    Exchange,
    LateError,
    Link,
    RemoteStream,
    Workers,
)
from tests.test_live_jack import (
    BUNDLE,
    GUITAR,
    HOP,
    LATENCY,
    PATIENCE_S,
    RATE,
    Musician,
    Restyle,
    children,
    first,
    journal,
    largest_step,
    musician,
    noted,
    offline,
    pedalboard,
    program,
    restyle_live,
    rms,
    running,
    summary_line,
    wait_for,
)

pytestmark = pytest.mark.jack
__all__ = ["musician"]  # a fixture


def replay(take: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "realtime.cli", "replay", str(take), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.stderr == "", result.stderr
    return json.loads(result.stdout)


def graph(restyle: Restyle) -> int:
    """The process whose graph serves, as long as none has been replaced."""
    return restyle.family[1]


@pytest.mark.parametrize("fault", ["killed", "hung", "slow"])
def test_without_the_graph_the_dry_signal_plays_until_another_one_serves(
    musician: Musician, tmp_path: Path, fault: str
) -> None:
    take = tmp_path / "take"
    arguments = ("--input", "musician", "--midi", "virtual", "--record", str(take), "--patience", "20")
    with restyle_live(*arguments) as restyle:
        restyle.await_sound()
        delay = LATENCY + musician.client.blocksize
        musician.begin(np.tile(GUITAR, 20))
        musician.rest(RATE)
        at = musician.position
        os.kill(graph(restyle), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        wait_for(lambda: noted(take, '"late"'), "late hops")
        if fault == "slow":
            os.kill(graph(restyle), signal.SIGCONT)
        wait_for(lambda: musician.differs(delay), "the style")
        musician.rest(RATE)
        end = musician.position
        restyle.family = children(restyle.process.pid)
        out, err = restyle.end()
    summary = summary_line(out)
    entries = journal(take)
    late = [entry["hop"] for entry in entries if entry.get("event") == "late"]
    assert late and f"dry {len(late)} " in summary
    if fault == "slow":
        assert "restarts 0" in summary and err == ""
    else:
        assert "restarts 1" in summary and ("died" if fault == "killed" else "hung") in err
        assert any("the graph's process" in entry.get("note", "") for entry in entries)

    # Dry at the delay of wet, the one joined to the other without a step.
    sent, heard = musician.since(0)
    recorded, played = (
        np.asarray(soundfile.read(take / name, dtype="float32")[0], np.float32) for name in ("input.wav", "output.wav")
    )
    for hop in sorted(set(late) & {hop + 1 for hop in late}):
        start = (hop + 1) * HOP
        np.testing.assert_array_equal(played[start : start + HOP], recorded[start - LATENCY : start - LATENCY + HOP])
    wet = np.pad(offline(recorded, "violin"), (delay - LATENCY + first(sent) - first(recorded), 0))
    usual = max(largest_step(wet[at - RATE // 2 : end]), largest_step(sent))
    assert largest_step(heard[at - RATE // 2 : end]) <= usual + 2.0 / HOP
    late_part, dry = heard[end - RATE // 2 : end], sent[end - RATE // 2 - delay : end - delay]
    assert rms(late_part - wet[end - RATE // 2 : end]) < 0.5 * rms(late_part - dry)

    again = replay(take)
    assert again["equal"] == again["compared"] == again["frames"] == len(recorded)
    assert again["fault_hops"] == len(late)


@pytest.mark.parametrize("parts", [ALONE, Parts(then=(Part(DEFAULT_MODEL, "choir"),))], ids=["alone", "in_series"])
def test_a_hop_whose_worker_dies_is_late_however_soon_another_one_serves(parts: Parts) -> None:
    """And not bad output: nothing came of it."""
    bundle = join(read_bundle(DEFAULT_MODEL), parts)
    workers = Workers(get_context("spawn"), DEFAULT_MODEL, parts, "cpu", bundle, channels=1)
    try:
        workers.start(0)
        assert workers.await_ready(threading.Event()) == ""
        workers.start_spare()
        stream = RemoteStream(bundle.manifest, workers.link)
        stream.timeout_s = PATIENCE_S
        stream.audio[:] = GUITAR[:HOP]
        assert np.abs(stream.step()).max() < 1.0
        dying = workers.pids[0]
        assert dying is not None
        time.sleep(SHORTEST_LIFE_S)
        os.kill(dying, signal.SIGKILL)
        wait_for(lambda: not running(dying), "the end of the worker")
        with ThreadPoolExecutor() as pool:
            hop = pool.submit(stream.step)
            wait_for(lambda: workers.exchange.waiting is not None, "the hop")
            events: list[str] = []

            def replaced() -> bool:
                events.extend(workers.watch())
                return bool(events)

            wait_for(replaced, "another worker")
            assert "died" in events[0] and workers.serving == 1
            assert isinstance(hop.exception(PATIENCE_S), LateError)
        del hop  # its traceback keeps arrays of the shared memory
        stream.reset()
        assert np.isfinite(stream.step()).all()
        stream.close()
    finally:
        workers.close()


def test_a_hop_that_the_graph_fails_in_costs_no_other_one_whose_answer_is_deferred() -> None:
    exchange = Exchange.create(channels=1, step_samples=HOP, style_dim=BUNDLE.manifest.style_dim)
    failing = 3

    class Worker:
        """Answers at once with what it hears, but for one hop."""

        def release(self) -> None:
            exchange.answer[:] = exchange.audio
            exchange.words[_FAILED] = _PROBLEM if exchange.words[_ASKED] == failing else 0
            exchange.words[_DONE] = exchange.words[_ASKED]

    class Answered:
        def acquire(self, *_: object) -> bool:
            return False

    stream = RemoteStream(BUNDLE.manifest, Link(exchange.name, (Worker(), Worker()), Answered()), deferred=True)
    heard = []
    for hop in range(1, 7):
        stream.audio[:] = hop
        try:
            heard.append(float(stream.step()[0, 0]))
        except RuntimeError:
            heard.append(-1.0)
    assert heard == [0.0, 1.0, 2.0, -1.0, 4.0, 5.0]
    stream.close()
    exchange.close()


@pytest.mark.skipif(sys.platform != "linux", reason="children are looked for in /proc")
def test_a_terminal_that_stands_still_holds_up_neither_the_graph_nor_the_end(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "realtime.cli", "live", "--clip", str(DEMO_CLIP), "--loop", "--record", "take"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    shown = [0]

    def read() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65_536):
                shown[0] += len(data)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        wait_for(lambda: shown[0] > 3_000 and len(children(process.pid)) == 5, "the panel and the spare graph")
        time.sleep(2 * SHORTEST_LIFE_S)
        before = children(process.pid)
        os.write(ours, b"\x13")  # Ctrl-S
        time.sleep(0.5)
        still = shown[0]
        time.sleep(0.5)
        assert shown[0] == still
        os.kill(before[1], signal.SIGKILL)
        wait_for(lambda: bool(set(children(process.pid)) - set(before)), "another graph")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        assert noted(tmp_path / "take", "the graph's process died") and noted(tmp_path / "take", '"ended"')
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize("times", [1, 5], ids=["once", "five times in a row"])
def test_an_audio_process_that_is_killed_comes_back_and_the_recording_goes_on(
    musician: Musician, tmp_path: Path, times: int
) -> None:
    take = tmp_path / "take"
    with restyle_live("--input", "musician", "--midi", "virtual", "--record", str(take)) as restyle:
        restyle.await_sound()
        musician.begin(np.tile(GUITAR, 20))
        musician.rest(RATE)
        others = set(restyle.family) - {restyle.family[2]}
        os.kill(restyle.family[2], signal.SIGKILL)
        for number in range(2, times + 1):  # the next ones end before they play

            def new(killed: int = number) -> set[int]:
                dead = (take / "show.jsonl").read_text().count("the audio process died")
                return set(children(restyle.process.pid)) - others if dead == killed - 1 else set()

            wait_for(lambda: bool(new()), f"audio process {number}")
            os.kill(new().pop(), signal.SIGKILL)
        wait_for(lambda: noted(take, "audio is back"), "audio")
        musician.rest(RATE)
        assert rms(musician.since(musician.position - RATE // 2)[1]) > 0.01
        restyle.family = children(restyle.process.pid)
        out, err = restyle.end()
    assert "outages 1" in out and err.count("the audio process died (exit code -9)") == times
    starts = [entry["frame"] for entry in journal(take) if entry.get("event") == "start"]
    assert len(starts) == 2 and starts[0] == 0
    played, _ = soundfile.read(take / "output.wav", dtype="float32")
    after = np.asarray(played, np.float32)[starts[1] :]
    assert len(after) > RATE // 2 and np.abs(after[:HOP]).max() == 0.0
    assert largest_step(after[: 4 * RATE // 100]) < 0.1  # it fades in
    again = replay(take)
    assert again["equal"] == again["compared"] == len(played) and again["outages"] == 1


@pytest.mark.parametrize("how", ["killed", "frozen", "killed after the audio process"])
def test_a_server_that_goes_away_is_waited_for_and_midi_is_heard_again(
    jack_server: JackServer, tmp_path: Path, how: str
) -> None:
    take = tmp_path / "take"
    with restyle_live("--midi", "virtual", "--style", "violin", "--record", str(take)) as restyle:
        restyle.await_sound()
        wait_for(lambda: (take / "output.wav").stat().st_size > 4 * RATE, "a second of sound")
        server = jack_server.process
        assert server is not None
        if "after" in how:
            os.kill(restyle.family[2], signal.SIGKILL)
        os.kill(server.pid, signal.SIGSTOP if how == "frozen" else signal.SIGKILL)
        loss = {"killed": "went away", "frozen": "no audio for 2 s"}.get(how, "the audio process died")
        wait_for(lambda: noted(take, loss), "the loss")
        server.kill()  # a frozen one does not end by itself
        jack_server.start()
        wait_for(lambda: noted(take, "audio is back"), "audio")
        wait_for(lambda: noted(take, "MIDI is heard again"), "MIDI")
        with pedalboard("restyle-midi:in") as pedals:
            pedals.send(program("trumpet"))
            wait_for(lambda: noted(take, '"midi": "c0 38"'), "the program change")
        restyle.family = children(restyle.process.pid)
        out, _ = restyle.end()
    assert "Trumpet 100%" in out and "outages 1" in out
    again = replay(take)
    assert again["equal"] == again["compared"] == again["frames"] and again["outages"] == 1


def test_a_server_that_comes_back_at_another_rate_ends_the_recording_and_not_the_performance(
    jack_server: JackServer, tmp_path: Path
) -> None:
    take = tmp_path / "take"
    with restyle_live("--midi", "virtual", "--record", str(take)) as restyle:
        restyle.await_sound()
        wait_for(lambda: (take / "output.wav").stat().st_size > 4 * RATE, "a second of sound")
        server = jack_server.process
        assert server is not None
        server.kill()
        jack_server.sample_rate = 44_100
        jack_server.start()
        wait_for(lambda: noted(take, '"ended"'), "the end of the recording")
        restyle.family = children(restyle.process.pid)
        out, err = restyle.end()
    why = f"the recording ends here: it is at {RATE} Hz, the device is at 44100 Hz now"
    assert noted(take, "audio is back") and noted(take, why) and why in err
    assert f"recording: {why}; to record what follows, start again with another --record" in out
    assert "outages 1" in out and "waiting" not in out.splitlines()[-1] and "left: " in out
    again = replay(take)
    assert again["whole"] and again["equal"] == again["compared"] == again["frames"] > RATE // 2
    assert soundfile.info(take / "output.wav").samplerate == RATE and (take / "performance.png").exists()


def test_a_full_disk_ends_the_recording_and_not_the_performance(tmp_path: Path) -> None:
    take = tmp_path / "take"
    with restyle_live("--clip", str(DEMO_CLIP), "--record", str(take)) as restyle:
        restyle.await_sound()
        resource.prlimit(restyle.process.pid, resource.RLIMIT_FSIZE, (600_000, 600_000))
        out, err = restyle.end(interrupt=False)
    assert "is the disk full?" in out and "errors 0" in out and "recording stopped" in err
    played, _ = soundfile.read(take / "output.wav")
    assert 0 < len(played) < 600_000 / 4
    again = replay(take)
    assert again["equal"] == again["compared"] == len(played)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, which two sound files fill in less than three seconds."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if os.geteuid() != 0 or mount is None or umount is None:
        pytest.skip("a small disk is a tmpfs: it takes root, mount and umount")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "restyle-test", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        # Lazy: also when a process that a failed test left behind still has a file open there.
        subprocess.run([umount, "--lazy", str(disk)], check=True)


def test_a_disk_without_room_for_another_byte_ends_the_recording_and_not_the_performance(small_disk: Path) -> None:
    take = small_disk / "take"
    clip = soundfile.info(DEMO_CLIP)
    with restyle_live("--clip", str(DEMO_CLIP), "--record", str(take)) as restyle:
        restyle.await_sound()
        wait_for(lambda: shutil.disk_usage(small_disk).free == 0, "a full disk")
        out, err = restyle.end(interrupt=False)
    summary = summary_line(out)
    assert float(summary.split()[0]) >= int(10 * clip.duration) / 10 and "errors 0" in summary
    assert "is the disk full?" in out and "recording stopped" in err and "Traceback" not in err
    recorded, played = (soundfile.info(take / name).frames for name in ("input.wav", "output.wav"))
    assert recorded == played > RATE
    again = replay(take)
    assert again["equal"] == again["compared"] == again["frames"] == played


def test_a_killed_performance_leaves_a_show_up_to_its_last_second_that_can_be_played_again(
    musician: Musician, tmp_path: Path
) -> None:
    """The last second before the kill, as the musician counts it."""
    take = tmp_path / "take"
    with restyle_live("--input", "musician", "--midi", "virtual", "--record", str(take)) as restyle:
        restyle.await_sound()
        musician.begin(np.tile(GUITAR, 20))
        musician.rest(5 * RATE)
        at = musician.position
        restyle.process.kill()
        restyle.process.communicate(timeout=PATIENCE_S)
        restyle.await_nothing_left()
    sent, _ = musician.since(0)
    recorded, _ = soundfile.read(take / "input.wav", dtype="float32")
    before = first(sent) - first(np.asarray(recorded, np.float32))  # restyle started after the musician
    assert at - before - len(recorded) <= RATE
    np.testing.assert_array_equal(recorded, sent[before : before + len(recorded)])
    again = replay(take)
    assert not again["whole"] and again["equal"] == again["compared"] == again["frames"]
    assert at - before - again["frames"] <= RATE


BREAKING_LEVEL = 0.95


def write_breakable(path: Path) -> None:
    """The shipped model with a division by zero before it: a sample above BREAKING_LEVEL becomes infinity.

    What the model remembers is bad from then on, until it is reset.
    """
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    model = onnx.load(DEFAULT_MODEL)
    for node in model.graph.node:
        node.input[:] = ["divided" if name == "audio" else name for name in node.input]
    nodes = [
        helper.make_node("Constant", [], ["level"], value_float=BREAKING_LEVEL),
        helper.make_node("Abs", ["audio"], ["magnitude"]),
        helper.make_node("LessOrEqual", ["magnitude", "level"], ["is_fine"]),
        helper.make_node("Cast", ["is_fine"], ["one_or_zero"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Div", ["audio", "one_or_zero"], ["divided"]),
    ]
    for place, node in enumerate(nodes):
        model.graph.node.insert(place, node)
    onnx.save(model, path)


@pytest.mark.parametrize("inference", ["worker", "deferred"])
def test_a_graph_that_gives_infinity_is_dry_for_those_hops_alone_and_replays(tmp_path: Path, inference: str) -> None:
    """One sample breaks the graph, then one in each of forty hops."""
    take, clip, model = tmp_path / "take", tmp_path / "clip.wav", tmp_path / "breakable.onnx"
    write_breakable(model)
    breaks = [RATE + 77, *(2 * RATE + 50 + hop * HOP for hop in range(40))]
    music = GUITAR[: 4 * RATE].copy()
    music[breaks] = 0.99
    soundfile.write(clip, music, RATE, subtype="FLOAT")
    arguments = ("--model", str(model), "--clip", str(clip), "--style", "violin", "--record", str(take))
    with restyle_live(*arguments, "--inference", inference) as restyle:
        restyle.await_sound()
        out, err = restyle.end(interrupt=False)
    recorded, played = (
        np.asarray(soundfile.read(take / name, dtype="float32")[0], np.float32) for name in ("input.wav", "output.wav")
    )
    np.testing.assert_array_equal(recorded[: len(music)], music)
    assert np.isfinite(played).all() and np.abs(played).max() <= 1.0

    later = HOP if inference == "deferred" else 0
    faults = {entry["hop"]: entry["event"] for entry in journal(take) if entry.get("event") in ("bad", "late")}
    broken = {(sample + later) // HOP for sample in breaks}
    # A deferred graph has begun the next hop, with what it remembers, when the bad answer is seen.
    lasting = {hop + 1 for hop in broken} if later else set()
    assert broken <= set(faults) <= broken | lasting and set(faults.values()) == {"bad"}
    summary = summary_line(out)
    assert f"bad in 0 out {len(faults)} " in summary and "dry 0 " in summary and "restarts 0" in summary and err == ""

    delay = LATENCY + later
    dry = np.pad(recorded, (delay, 0))[: len(recorded)]
    limit(dry)
    for hop in sorted(set(faults) & {hop + 1 for hop in faults}):
        start = (hop + 1) * HOP
        np.testing.assert_array_equal(played[start : start + HOP], dry[start : start + HOP])
    wet = np.pad(offline(recorded, "violin"), (later, 0))[: len(recorded)]
    for last in (breaks[0], breaks[-1]):
        part = slice(last + RATE // 2, last + RATE)
        assert rms(played[part] - wet[part]) < 0.5 * rms(played[part] - dry[part])

    again = replay(take)
    assert again["whole"] and again["equal"] == again["compared"] == again["frames"] == len(recorded)
    assert again["fault_hops"] == len(faults)


def test_the_breakable_graph_breaks_and_stays_broken_without_a_reset(tmp_path: Path) -> None:
    """What the test before it stands on."""
    write_breakable(tmp_path / "breakable.onnx")
    stream = Stream(read_bundle(tmp_path / "breakable.onnx"))
    music = GUITAR[None, : 20 * HOP].copy()
    whole = Stream(BUNDLE).play(music)
    np.testing.assert_array_equal(stream.play(music), whole)
    stream.reset()
    music[0, 5 * HOP + 3] = 0.99
    broken = stream.play(music)
    np.testing.assert_array_equal(broken[:, : 5 * HOP], whole[:, : 5 * HOP])
    assert not np.isfinite(broken[:, 5 * HOP : 10 * HOP]).any()
    stream.reset()
    music[0, 5 * HOP + 3] = 0.9
    assert np.isfinite(stream.play(music)).all()


@contextlib.contextmanager
def recording_midi_of(musician: Musician, take: Path) -> Iterator[Restyle]:
    """A performance that sounds, hears the musician's raw MIDI and records into ``take``."""
    with restyle_live("--input", "musician", "--midi", "virtual", "--record", str(take)) as restyle:
        restyle.await_sound()
        musician.client.connect(musician.midi, "restyle-midi:in")
        yield restyle


def test_a_flood_of_midi_disturbs_nothing(musician: Musician) -> None:
    """Ten thousand messages, as fast as the sender can; the last one counts."""
    with restyle_live("--input", "musician", "--midi", "virtual", "--dry-wet", "0") as restyle:
        restyle.await_sound()
        delay = LATENCY + musician.client.blocksize
        musician.begin(np.tile(GUITAR, 40))
        musician.rest(RATE // 2)
        start = musician.position
        with pedalboard("restyle-midi:in") as pedals:
            flood = [[0xC0, i % 128] if i % 2 else [0xB0, 1, i % 128] for i in range(10_000)]
            pedals.send(*flood, program("trumpet"), [0xB0, 1, 0])
            musician.rest(RATE)
        end = musician.position
        out, err = restyle.end()
    assert "Trumpet 100%" in out and err == ""
    sent, heard = musician.since(0)
    np.testing.assert_array_equal(heard[start:end], sent[start - delay : end - delay])


def test_of_ten_thousand_messages_a_second_none_is_lost_and_all_of_them_replay(
    musician: Musician, tmp_path: Path
) -> None:
    """Programs, chords and controllers in the middle of a phrase, as many in every period as make 10,125 a second."""
    take = tmp_path / "take"
    with recording_midi_of(musician, take) as restyle:
        musician.begin(np.tile(GUITAR, 4))
        musician.rest(RATE // 2)
        messages = [message for message in flood() if not message.startswith(b"\xe0")] * 32
        musician.raw_midi_per_period = 27
        start = musician.position
        musician.raw_midi += messages
        wait_for(lambda: not musician.raw_midi, "the end of the flood")
        seconds = (musician.position - start) / RATE
        wait_for(lambda: sum("midi" in entry for entry in journal(take)) >= len(messages), "the last message")
        musician.rest(RATE // 2)
        out, err = restyle.end()
    assert len(messages) / seconds > 9_000 and err == ""
    assert [entry["midi"] for entry in journal(take) if "midi" in entry] == [one.hex(" ") for one in messages]
    summary = summary_line(out)
    assert "dry 0 " in summary and "errors 0 " in summary
    again = replay(take)
    assert again["equal"] == again["compared"] == again["frames"] and again["fault_hops"] == 0


def test_messages_that_come_faster_than_they_are_heard_are_counted_and_shown(
    musician: Musician, tmp_path: Path
) -> None:
    """Nobody hears any while the performance stands still; all of them are either heard later or counted."""
    take = tmp_path / "take"
    with recording_midi_of(musician, take) as restyle:
        musician.rest(RATE // 2)
        messages = [bytes((0xB0, 20, i % 128)) for i in range(40_000)]
        os.kill(restyle.process.pid, signal.SIGSTOP)
        musician.raw_midi_per_period = 400
        musician.raw_midi += messages
        wait_for(lambda: not musician.raw_midi, "the end of the flood")
        musician.rest(RATE // 2)
        os.kill(restyle.process.pid, signal.SIGCONT)
        wait_for(lambda: noted(take, "MIDI messages were lost"), "the loss to be told")
        musician.rest(2 * RATE)
        out, err = restyle.end()
    heard = sum("midi" in entry for entry in journal(take))
    lost = int(re.findall(r"MIDI messages lost (\d+)", summary_line(out))[0])
    assert heard + lost == len(messages) and heard > 10_000 and lost > 10_000
    told = [int(line.split()[1]) for line in err.splitlines() if "MIDI messages were lost" in line]
    assert sum(told) == lost and "queue limit" not in err


@pytest.mark.usefixtures("jack_server")
def test_ctrl_c_under_a_flood_of_midi_ends_it_cleanly(tmp_path: Path) -> None:
    take = tmp_path / "take"
    with restyle_live("--midi", "virtual", "--record", str(take)) as restyle:
        restyle.await_sound()
        with pedalboard("restyle-midi:in") as pedals:
            flood = threading.Thread(target=pedals.send, args=[[0xB0, 1, i % 128] for i in range(60_000)])
            flood.start()
            wait_for(lambda: noted(take, '"midi"'), "the flood")
            restyle.family = children(restyle.process.pid)
            _, err = restyle.end()
            flood.join()
    assert err == ""
    assert replay(take)["whole"]
