"""A show folder is played again to the last sample, whatever became of the audio processes that recorded it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from realtime.bundle import DEFAULT_MODEL, DEMO_CLIP, read_bundle
from realtime.controls import Performer
from realtime.engine import HOP_FIELDS, METER_COUNT, Engine, EngineSettings
from realtime.replay import read_show, replay
from realtime.ring import Mailbox, Ring
from realtime.show import SHOW_FORMAT, Recorder, ShowHeading, event_width

BUNDLE = read_bundle(DEFAULT_MODEL)
RATE = BUNDLE.manifest.spectral.sample_rate
BLOCK = 100
GUITAR = np.asarray(soundfile.read(DEMO_CLIP, dtype="float32", start=12_000, frames=RATE)[0], np.float32)
StartEngine = Callable[..., contextlib.AbstractContextManager[Engine]]


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[tuple[Recorder, StartEngine]]:
    """A recorder into ``take``, and what starts an audio process's engine that goes on where the sound ended."""
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
        heading = ShowHeading(SHOW_FORMAT, "bank", str(DEFAULT_MODEL), digest, RATE, 1, 0, "2026-01-01T00:00:00+0000")
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


def test_nothing_is_noted_after_the_end_of_a_recording(recording: tuple[Recorder, StartEngine]) -> None:
    recorder, start = recording
    with start() as engine:
        play(engine, GUITAR[:1000])
    recorder.finish()
    recorder.note({"frame": 1000, "note": "too late"})
    assert "too late" not in (recorder.folder / "show.jsonl").read_text()
    assert recorder.over and recorder.seconds == 1000 / RATE
