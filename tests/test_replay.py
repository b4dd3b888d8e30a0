"""A show folder is played again to the last sample, whatever became of the audio processes that recorded it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from typer.testing import CliRunner

from realtime.bundle import DEFAULT_MODEL, DEMO_CLIP, read_bundle
from realtime.cli import app
from realtime.controls import Performer
from realtime.engine import HOP_FIELDS, METER_COUNT, Engine, EngineSettings
from realtime.replay import ShowError, read_show, replay
from realtime.ring import Mailbox, Ring
from realtime.show import SHOW_FORMAT, Recorder, ShowHeading, event_width

BUNDLE = read_bundle(DEFAULT_MODEL)
RATE = BUNDLE.manifest.spectral.sample_rate
BLOCK = 100
GUITAR = np.asarray(soundfile.read(DEMO_CLIP, dtype="float32", start=12_000, frames=RATE)[0], np.float32)
StartEngine = Callable[..., contextlib.AbstractContextManager[Engine]]


@pytest.fixture
def recording(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Recorder, StartEngine]]:
    """A recorder into ``take``, and what starts an audio process's engine that goes on where the sound ended.

    At the model's rate, or at the one that is the fixture's parameter.
    """
    rate = getattr(request, "param", RATE)
    width = event_width(BUNDLE.manifest.style_dim)
    with (
        Mailbox.create(4 + BUNDLE.manifest.style_dim) as controls,
        Mailbox.create(METER_COUNT) as meters,
        Ring.create(1000, len(HOP_FIELDS)) as hops,
        Ring.create(2 * RATE, 2) as sound,
        Ring.create(1000, width) as journal,
    ):
        controls.write(Performer(BUNDLE.manifest).controls().pack())
        names = (controls.name, meters.name, hops.name, sound.name, journal.name)

        @contextlib.contextmanager
        def start(recorded_rate: int | None = None) -> Iterator[Engine]:
            engine = Engine(
                EngineSettings(
                    *(DEFAULT_MODEL, "cpu", 1, 0, None, None, None, False),
                    *names,
                    start_frames=sound.written,
                    returning=recorded_rate is not None,
                    recorded_rate=recorded_rate,
                )
            )
            yield engine
            engine.close()

        digest = hashlib.sha256(BUNDLE.graph).hexdigest()
        heading = ShowHeading(SHOW_FORMAT, "bank", str(DEFAULT_MODEL), digest, rate, 1, 0, "2026-01-01T00:00:00+0000")
        recorder = Recorder(sound, journal, tmp_path / "take", heading)
        yield recorder, start
        if not recorder.over:
            recorder.finish()


def play(engine: Engine, audio: NDArray[np.float32]) -> None:
    for at in range(0, len(audio), BLOCK):
        engine.run_block(audio[None, at : at + BLOCK])


def test_an_audio_process_that_found_no_device_or_one_of_another_rate_leaves_no_trace(
    recording: tuple[Recorder, StartEngine],
) -> None:
    recorder, start = recording
    with start() as engine:
        play(engine, GUITAR[:20_000])
    with start(recorded_rate=RATE):
        pass  # it waited for its device in vain
    with start(recorded_rate=RATE) as engine:
        play(engine, GUITAR[20_000:40_000])
    with start(recorded_rate=RATE) as engine:
        engine.use_rate(44_100)
        play(engine, GUITAR[:10_000])
    recorder.finish()
    show = read_show(recorder.folder)
    assert show.whole and show.frames == 40_000 and [life.start_frame for life in show.lives] == [0, 20_000]
    heard, rate = soundfile.read(recorder.folder / "input.wav", dtype="float32")
    assert rate == RATE
    np.testing.assert_array_equal(heard, GUITAR[:40_000])
    again = replay(show, BUNDLE)
    assert again.equal == again.compared == 40_000 and again.outages == 1


@pytest.mark.parametrize("recording", [44_100], indirect=True)
def test_at_a_rate_that_is_not_the_models_a_show_replays_across_an_outage(
    recording: tuple[Recorder, StartEngine],
) -> None:
    recorder, start = recording
    for at, recorded_rate in ((0, None), (20_000, 44_100)):
        with start(recorded_rate) as engine:
            engine.use_rate(44_100)
            play(engine, GUITAR[at : at + 20_000])
    recorder.finish()
    show = read_show(recorder.folder)
    assert [life.start_frame for life in show.lives] == [0, 20_000]
    again = replay(show, BUNDLE)
    assert again.equal == again.compared == 40_000 and again.outages == 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("take/input.wav", "belongs to the recording itself"),
        ("take/output.wav", "belongs to the recording itself"),
        ("again.flac", "a name that ends in .wav"),
    ],
)
def test_a_replay_never_writes_over_the_recording(take: Path, name: str, why: str) -> None:
    before = {path.name: path.read_bytes() for path in take.iterdir()}
    result = CliRunner().invoke(app, ["replay", str(take), "--out", str(take.parent / name)])
    assert result.exit_code == 1 and why in " ".join(result.output.split())
    assert {path.name: path.read_bytes() for path in take.iterdir()} == before
    assert not (take.parent / "again.flac").exists()


def test_nothing_is_noted_after_the_end_of_a_recording(recording: tuple[Recorder, StartEngine]) -> None:
    recorder, start = recording
    with start() as engine:
        play(engine, GUITAR[:1000])
    recorder.finish()
    recorder.note({"frame": 1000, "note": "too late"})
    assert "too late" not in (recorder.folder / "show.jsonl").read_text()
    assert recorder.over and recorder.seconds == 1000 / RATE


@pytest.fixture
def take(recording: tuple[Recorder, StartEngine]) -> Path:
    """The folder of a finished show of 2000 frames."""
    recorder, start = recording
    with start() as engine:
        play(engine, GUITAR[:2000])
    recorder.finish()
    return recorder.folder


def cut(path: Path, lost_bytes: int) -> None:
    os.truncate(path, path.stat().st_size - lost_bytes)


@pytest.mark.parametrize("name", ["input.wav", "output.wav"])
@pytest.mark.parametrize("lost_frames", [1, 1500])
def test_a_show_that_lost_sound_after_its_end_is_refused_and_the_file_named(
    take: Path, name: str, lost_frames: int
) -> None:
    assert read_show(take).whole
    cut(take / name, 4 * lost_frames)
    with pytest.raises(ShowError) as error:
        read_show(take)
    assert str(take / name) in str(error.value) and "copy the folder again" in str(error.value)
    assert f"holds {2000 - lost_frames} of the 2000 frames that were recorded" in str(error.value)
    result = CliRunner().invoke(app, ["replay", str(take)])
    assert result.exit_code == 1 and "samples are the recorded ones" not in result.output


def test_a_show_of_a_version_that_noted_no_length_is_read_as_far_as_its_sound_goes(take: Path) -> None:
    journal = take / "show.jsonl"
    journal.write_text(journal.read_text().replace(', "frames": 2000', ""))
    assert journal.read_text().endswith('{"ended": true}\n')
    cut(take / "output.wav", 4 * 500)
    show = read_show(take)
    again = replay(show, BUNDLE)
    assert show.whole and again.equal == again.compared == again.frames == 1500


@pytest.mark.parametrize("kept_bytes", [0, 1, 20])
def test_a_show_whose_ending_is_gone_was_cut_off_and_plays_up_to_the_end_of_its_sound(
    take: Path, kept_bytes: int
) -> None:
    """As kill -9 leaves it: without its last line, or with a part of it; one file may hold more than the other."""
    ending = (take / "show.jsonl").read_bytes().splitlines(keepends=True)[-1]
    cut(take / "show.jsonl", len(ending) - kept_bytes)
    cut(take / "output.wav", 4 * 500)
    show = read_show(take)
    again = replay(show, BUNDLE)
    assert not show.whole and again.equal == again.compared == again.frames == 1500


def test_an_empty_journal_is_called_empty_and_one_without_a_whole_line_so(take: Path) -> None:
    """And not made by another version."""
    journal = take / "show.jsonl"
    for kept_bytes, state in ((100, "has no whole line"), (0, "is empty")):
        os.truncate(journal, kept_bytes)
        with pytest.raises(ShowError) as error:
            read_show(take)
        assert str(error.value).startswith(f"{journal}: {state}: ") and "copy the folder again" in str(error.value)
        assert "version" not in str(error.value)


def test_a_journal_of_a_heading_alone_says_that_nothing_was_recorded(take: Path) -> None:
    journal = take / "show.jsonl"
    os.truncate(journal, journal.read_bytes().index(b"\n") + 1)
    with pytest.raises(ShowError, match=r"show\.jsonl: holds no start of a performance; nothing was recorded"):
        read_show(take)


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"\0" * 40, b"[1]"])
def test_a_damaged_line_of_a_journal_is_named_by_its_number(take: Path, damage: bytes) -> None:
    journal = take / "show.jsonl"
    lines = journal.read_bytes().splitlines()
    lines[1] = damage
    journal.write_bytes(b"\n".join(lines))
    with pytest.raises(ShowError, match=r"show\.jsonl: line 2: is damaged .*; copy the folder again"):
        read_show(take)


def test_an_ending_that_tells_no_number_of_frames_is_not_understood(take: Path) -> None:
    journal = take / "show.jsonl"
    journal.write_text(journal.read_text().replace('"frames": 2000', '"frames": Infinity'))
    with pytest.raises(ShowError, match=r"line \d+: .*Infinity.* is not understood"):
        read_show(take)
