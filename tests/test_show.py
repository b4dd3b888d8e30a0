"""What a performance leaves: whole files, also when the disk fills up, and a picture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from realtime.audio import AudioFileError
from realtime.ring import Ring
from realtime.show import History, Recorder, draw_performance, spectrogram_db

RATE = 48_000


def test_a_recording_is_what_went_through_the_ring(tmp_path: Path) -> None:
    sent = (0.5 * np.random.default_rng(0).uniform(-1, 1, (30_000, 4))).astype(np.float32)
    with Ring.create(RATE, 4) as ring:
        recorder = Recorder(ring, tmp_path / "take", RATE, channels=2)
        for start in range(0, len(sent), 1000):
            assert ring.push(sent[start : start + 1000])
        files = recorder.finish()
        assert recorder.problem == "" and recorder.dropped_frames == 0
    assert [path.name for path in files] == ["input.wav", "output.wav"]
    for path, columns in zip(files, (sent[:, :2], sent[:, 2:]), strict=True):
        heard, rate = soundfile.read(path)
        assert rate == RATE
        np.testing.assert_allclose(heard, columns, atol=2**-23)


def test_a_full_disk_ends_the_recording_with_whole_files(tmp_path: Path) -> None:
    """The recorder in a process that may write 200 kB a file; what fits stays, under its name, from the start."""
    code = (
        "import resource, sys, time; from pathlib import Path; import numpy as np\n"
        "from realtime.ring import Ring; from realtime.show import Recorder\n"
        "ring = Ring.create(480_000, 2)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "recorder = Recorder(ring, Path(sys.argv[1]), 48_000, 1)\n"
        "ramp = (np.arange(200_000, dtype=np.float32) / 400_000)[:, None].repeat(2, axis=1)\n"
        "for at in range(0, 200_000, 10_000): ring.push(ramp[at:at + 10_000]); time.sleep(0.06)\n"
        "print(recorder.finish(), recorder.problem); ring.close()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "take")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "is the disk full?" in result.stdout
    assert sorted(path.name for path in (tmp_path / "take").iterdir()) == ["input.wav", "output.wav"]
    saved, _ = soundfile.read(tmp_path / "take" / "input.wav")
    assert 40_000 < len(saved) < 70_000
    np.testing.assert_allclose(saved, np.arange(len(saved)) / 400_000, atol=2**-22)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "take").write_text("a file")
    with Ring.create(100, 2) as ring, pytest.raises(AudioFileError, match=r"take/input\.wav: cannot be written"):
        Recorder(ring, tmp_path / "take", RATE, 1)


def test_a_full_scale_sine_is_at_zero_decibels() -> None:
    time = np.arange(RATE) / RATE
    decibels = spectrogram_db(np.sin(2 * np.pi * 3000 * time).astype(np.float32))
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
    for frames, mix in ((0, {"A": 1.0}), (10, {"A": 1.0}), (20, {"B": 1.0}), (30, {"A": 1.0})):
        history.note(frames, mix)
    assert history.mixes == [(0, {"A": 1.0}), (20, {"B": 1.0}), (30, {"A": 1.0})]
