"""What a performance leaves: whole files, also when the disk fills up, and a picture."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

import realtime.show
from realtime.audio import AudioFileError
from realtime.controls import Controls
from realtime.ring import Ring
from realtime.show import (
    MIX_FRAMES,
    MOST_MIXES,
    SHOW_FORMAT,
    History,
    Recorder,
    ShowHeading,
    TakeFile,
    draw_performance,
    event_width,
    pack_event,
    percentiles_ms,
    spectrogram_db,
)

RATE, STYLE_DIM = 48_000, 3


@contextlib.contextmanager
def recording(sound: Ring, folder: Path, channels: int = 1) -> Iterator[tuple[Recorder, Ring]]:
    """A recorder of ``sound`` [frames, 2 * channels], and the ring for its events."""
    with Ring.create(64, event_width(STYLE_DIM)) as journal:
        yield Recorder(sound, journal, folder, heading(channels)), journal


def heading(channels: int = 1) -> ShowHeading:
    return ShowHeading(SHOW_FORMAT, "model", "/model.onnx", "0" * 64, RATE, channels, 0, "2026-01-01T00:00:00+0000")


def test_a_recording_is_what_went_through_the_ring(tmp_path: Path) -> None:
    sent = (0.5 * np.random.default_rng(0).uniform(-1, 1, (30_000, 4))).astype(np.float32)
    with Ring.create(RATE, 4) as ring, recording(ring, tmp_path / "take", channels=2) as (recorder, journal):
        controls = Controls(np.array([0.1, -2.0, 1 / 3], np.float32), 1 / 3, 0.7, -1.5, 2.0)
        journal.push(pack_event("start", 0, None, STYLE_DIM))
        journal.push(pack_event("controls", 7, controls, STYLE_DIM))
        journal.push(pack_event("late", 9, None, STYLE_DIM))
        for start in range(0, len(sent), 1000):
            assert ring.push(sent[start : start + 1000])
        files = recorder.finish()
        assert recorder.problem == "" and recorder.dropped_frames == 0
    assert [path.name for path in files] == ["input.wav", "output.wav", "show.jsonl"]
    for path, columns in zip(files[:2], (sent[:, :2], sent[:, 2:]), strict=True):
        heard, rate = soundfile.read(path, dtype="float32")
        assert rate == RATE
        np.testing.assert_array_equal(heard, columns)
    entries = [json.loads(line) for line in files[2].read_text().splitlines()]
    assert entries[0]["show_format"] == SHOW_FORMAT and entries[0]["sample_rate"] == RATE
    assert {"frame": 0, "event": "start"} in entries and {"hop": 9, "event": "late"} in entries
    taken = next(entry for entry in entries if "controls" in entry)
    np.testing.assert_array_equal(taken["controls"], controls.pack())
    assert taken["hop"] == 7 and entries[-1] == {"ended": True, "frames": 30_000}


def test_a_take_can_be_read_while_it_is_written_and_when_its_writer_is_gone(tmp_path: Path) -> None:
    sound = np.random.default_rng(0).uniform(-1, 1, (5000, 2)).astype(np.float32)
    file = TakeFile(tmp_path / "take.wav", RATE, 2)
    for start in range(0, 5000, 1000):
        file.write(sound[start : start + 1000])
        heard, _ = soundfile.read(tmp_path / "take.wav", dtype="float32")
        np.testing.assert_array_equal(heard, sound[: start + 1000])
    assert file.finish() == 5000


def test_a_full_disk_ends_the_recording_with_whole_files(tmp_path: Path) -> None:
    """The recorder in a process that may write 200 kB a file; what fits stays, under its name, from the start."""
    code = (
        "import resource, sys, time; from pathlib import Path; import numpy as np\n"
        "from realtime.ring import Ring; from tests.test_show import recording\n"
        "ring = Ring.create(480_000, 2)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "with recording(ring, Path(sys.argv[1])) as (recorder, _):\n"
        " ramp = (np.arange(200_000, dtype=np.float32) / 400_000)[:, None].repeat(2, axis=1)\n"
        " for at in range(0, 200_000, 10_000):\n"
        "  ring.push(ramp[at:at + 10_000])\n"
        "  while len(ring): time.sleep(0.005)\n"
        " print(recorder.finish(), recorder.problem)\n"
        "ring.close()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "take")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "is the disk full?" in result.stdout
    assert sorted(path.name for path in (tmp_path / "take").iterdir()) == ["input.wav", "output.wav", "show.jsonl"]
    saved, _ = soundfile.read(tmp_path / "take" / "input.wav")
    assert len(saved) == 40_000
    np.testing.assert_allclose(saved, np.arange(len(saved)) / 400_000, atol=2**-22)
    np.testing.assert_array_equal(soundfile.read(tmp_path / "take" / "output.wav")[0], saved)


@pytest.mark.parametrize("error", [AudioFileError("output.wav: is the disk full?"), ValueError("no such format")])
def test_whatever_ends_a_recording_is_told_and_leaves_two_files_of_one_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    sent = np.linspace(0, 0.9, 6000, dtype=np.float32)[:, None].repeat(2, axis=1)
    writes = 0
    write = TakeFile.write

    def failing_write(self: TakeFile, block: NDArray[np.float32]) -> None:
        nonlocal writes
        writes += 1
        if writes == 6:  # the third chunk of the output
            raise error
        write(self, block)

    monkeypatch.setattr(TakeFile, "write", failing_write)
    with Ring.create(RATE, 2) as ring, recording(ring, tmp_path) as (recorder, _):
        for start in range(0, 6000, 1000):
            ring.push(sent[start : start + 1000])
            while len(ring):
                time.sleep(0.005)
        files = recorder.finish()
    assert recorder.problem == str(error)
    assert files == [tmp_path / name for name in ("input.wav", "output.wav", "show.jsonl")]
    heard, played = (soundfile.read(path)[0] for path in files[:2])
    assert 0 < len(heard) < 6000 and writes == 6
    np.testing.assert_array_equal(heard, played)
    np.testing.assert_allclose(heard, sent[: len(heard), 0], atol=2**-23)


def test_a_disk_that_does_not_answer_keeps_its_files_and_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()

    def hanging_write(*_: object) -> None:
        answers.wait(60)

    monkeypatch.setattr(TakeFile, "write", hanging_write)
    monkeypatch.setattr(realtime.show, "FINISH_TIMEOUT_S", 0.3)
    with Ring.create(RATE, 2) as ring, recording(ring, tmp_path) as (recorder, _):
        ring.push(np.ones((10, 2), np.float32))
        try:
            assert recorder.finish() == []
            assert recorder.problem.startswith("the disk has not answered for 0.3 s; what it took is in ")
            assert str(tmp_path) in recorder.problem and len(list(tmp_path.iterdir())) == 3
        finally:
            answers.set()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "take").write_text("a file")
    match = r"take/input\.wav: cannot be written"
    with (
        Ring.create(100, 2) as ring,
        pytest.raises(AudioFileError, match=match),
        recording(ring, tmp_path / "take"),
    ):
        pass


def test_a_recording_that_cannot_begin_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    """Its journal leads to a folder that is not there; or the disk has no room for as much as a heading."""
    take = tmp_path / "take"
    take.mkdir()
    (take / "show.jsonl").symlink_to(tmp_path / "none" / "show.jsonl")
    match = r"take/show\.jsonl: cannot be written \(No such file"
    with Ring.create(100, 2) as ring, pytest.raises(AudioFileError, match=match), recording(ring, take):
        pass
    assert [path.name for path in take.iterdir()] == ["show.jsonl"]

    code = (
        "import resource, sys; from pathlib import Path\n"
        "from realtime.ring import Ring; from tests.test_show import AudioFileError, Recorder, heading\n"
        "with Ring.create(100, 2) as sound, Ring.create(100, 10) as journal:\n"
        " resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        " try: Recorder(sound, journal, Path(sys.argv[1]), heading())\n"
        " except AudioFileError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "new" / "take")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "new/take/input.wav: cannot be written" in result.stdout
    assert not (tmp_path / "new").exists()


def test_percentiles_show_the_outlier_and_zeros_for_nothing() -> None:
    times = np.append(np.arange(1000) / 1000, 7.0)
    assert percentiles_ms(times) == {"p50": 0.5, "p99": 0.99, "p999": 0.999, "max": 7.0}
    assert percentiles_ms(np.zeros(0)) == {"p50": 0.0, "p99": 0.0, "p999": 0.0, "max": 0.0}


def test_a_full_scale_sine_is_at_zero_decibels() -> None:
    seconds = np.arange(RATE) / RATE
    decibels = spectrogram_db(np.sin(2 * np.pi * 3000 * seconds).astype(np.float32))
    middle = decibels[:, decibels.shape[1] // 2]
    assert middle.max() == pytest.approx(0.0, abs=0.1)
    assert middle.argmax() == round(3000 * 2048 / RATE)


def test_the_picture_is_a_png_whatever_there_is_to_show(tmp_path: Path) -> None:
    for name, seconds in (("none", 0.01), ("some", 1.0)):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("input.wav", "output.wav"):
            soundfile.write(folder / file, 0.1 * np.ones(int(seconds * RATE)), RATE)
        history = History()
        if name == "some":
            history.note(0, {"Violin": 1.0})
            history.note(0, {"Violin": 1.0})
            history.note(RATE // 2, {"Violin": 0.5, "Choir": 0.5})
            assert len(history.mixes) == 2
            history.hop_ms.append(np.full((375, 2), 0.5, np.float32))
        draw_performance(folder / "p.png", folder, history, RATE, 128, 256, name)
        assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
        assert sorted(path.name for path in folder.iterdir()) == ["input.wav", "output.wav", "p.png"]


def test_notes_of_a_history_start_where_the_mix_changed() -> None:
    history = History()
    for frames, mix in ((0, {"A": 1.0}), (1_000, {"A": 1.0}), (2_000, {"B": 1.0}), (3_000, {"A": 1.0})):
        history.note(frames, mix)
    assert history.mixes == [(0, {"A": 1.0}), (2_000, {"B": 1.0}), (3_000, {"A": 1.0})]


def test_a_flood_of_mixes_fills_no_memory() -> None:
    history = History()
    for frames in range(10_000):
        history.note(frames, {"A": frames / 10_000})
    assert len(history.mixes) <= 10_000 // MIX_FRAMES + 1 and history.mixes[-1][1] == {"A": 0.9999}
    for number in range(2 * MOST_MIXES):
        history.note(10_000 + number * MIX_FRAMES, {"A": float(number)})
    assert len(history.mixes) == MOST_MIXES
