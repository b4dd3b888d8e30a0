"""The commands as a stranger meets them: right input, wrong input, exit codes 0, 1 and 2."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mido
import numpy as np
import pytest
import soundfile

import realtime.bench
from realtime.bench import MeasureError, measure_live_start_s
from realtime.bundle import DEFAULT_MODEL, DEMO_CLIP, DEMO_MIDI, read_bundle
from realtime.live import LiveSettings
from tests.test_bundle import with_manifest


def restyle(*arguments: str, cwd: Path | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "realtime.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=cwd)
    assert result.returncode == code, (result.stdout, result.stderr)
    return result


def test_help_lists_every_command_with_an_example_each() -> None:
    listing = restyle("--help").stdout
    for command in ("devices", "info", "live", "render", "recognise", "bench", "data", "train", "export", "evaluate"):
        assert command in listing
        assert "Example: restyle " + command in restyle(command, "--help").stdout


def test_usage_errors_exit_with_2() -> None:
    assert "No such command" in restyle("sing", code=2).stderr
    assert "--loudly" in restyle("live", "--loudly", code=2).stderr
    assert "--dry-wet" in restyle("live", "--dry-wet", "7", code=2).stderr


def test_info_shows_the_card() -> None:
    text = restyle("info").stdout
    for word in ("violin", "128 samples (2.67 ms)", "framer.history", "CC-BY-3.0", "John Garner"):
        assert word in text
    manifest = json.loads(restyle("info", "--json").stdout)
    assert manifest["latency_samples"] == 128


def test_brackets_in_names_are_shown_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "take [1].onnx"

    def rename(manifest: dict[str, Any]) -> None:
        manifest["name"] = "solo [bold]"
        manifest["card"]["description"] = "made [red]here[/red]"
        manifest["styles"][0].update(label="Violin [muted]")

    path.write_bytes(with_manifest(rename))
    text = restyle("info", str(path)).stdout
    for name in ("solo [bold]", "made [red]here[/red]", "Violin [muted]"):
        assert name in text
    clip = tmp_path / "riff [a].wav"
    soundfile.write(clip, np.zeros(4800), 48_000)
    text = restyle("live", "--model", str(path), "--clip", str(clip), "--seconds", "3", cwd=tmp_path).stdout
    assert f"performing: clip {clip}" in text and "Violin [muted] 100%" in text


def test_info_of_something_else_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "song.onnx"
    path.write_bytes(DEMO_CLIP.read_bytes())
    result = restyle("info", str(path), code=1)
    assert f"{path}: file: is not a whole ONNX file" in result.stderr and "Traceback" not in result.stderr


def test_devices_prints_json_and_no_library_noise() -> None:
    result = restyle("devices", "--json")
    listing = json.loads(result.stdout)
    assert set(listing) == {"audio", "midi_inputs", "midi_outputs", "problem"}
    assert result.stderr == ""


def test_render_a_file_and_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    audio, rate = soundfile.read(DEMO_CLIP, frames=24_000, start=12_000)
    soundfile.write(folder / "a.wav", audio, rate)
    soundfile.write(folder / "b.flac", np.stack([audio, audio[::-1]], axis=1), rate)
    one = json.loads(
        restyle("render", str(folder / "a.wav"), str(tmp_path / "a.wav"), "--style", "choir", "--json").stdout
    )
    assert one["rendered"][0]["frames"] == 24_000 and one["failed"] == []
    (folder / "c.wav").write_bytes(b"not sound")
    result = restyle("render", str(folder), str(tmp_path / "out"), "--style", "violin=1,flute=1", code=1)
    assert "c.wav" in result.stderr and "2 rendered, 1 skipped" in result.stdout
    assert soundfile.info(tmp_path / "out" / "b.flac").channels == 2
    assert soundfile.info(tmp_path / "out" / "a.wav").frames == 24_000


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--style", "violinn"], "did you mean violin?"),
        (["--model", "none.onnx"], "none.onnx: file: there is no such file"),
        (["--midi", "none.mid"], "none.mid: there is no such file"),
        (["--map", "none.toml"], "none.toml: there is no such file"),
        (["--provider", "cuda"], "--provider cpu"),
    ],
)
def test_render_says_what_is_wrong(tmp_path: Path, arguments: list[str], text: str) -> None:
    result = restyle("render", str(DEMO_CLIP), str(tmp_path / "out.wav"), *arguments, code=1)
    assert text in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--style", "trumpett"], "did you mean trumpet?"),
        (["--model", "none.onnx"], "there is no such file"),
        (["--midi", "none.mid"], "none.mid: there is no such file"),
        (["--clip", "none.wav"], "none.wav: there is no such file"),
        (["--provider", "cuda", "--clip", str(DEMO_CLIP)], "--provider cpu"),
    ],
)
def test_live_says_what_is_wrong(tmp_path: Path, arguments: list[str], text: str) -> None:
    result = restyle("live", *arguments, "--seconds", "1", cwd=tmp_path, code=1)
    assert text in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("option", ["--input", "--output"])
def test_a_device_asked_for_by_name_is_never_replaced_by_the_clip(tmp_path: Path, option: str) -> None:
    result = restyle("live", option, "no such box", "--seconds", "1", cwd=tmp_path, code=1)
    assert "no such box" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_live_on_a_clip_plays_records_and_leaves_a_picture(tmp_path: Path) -> None:
    result = restyle(
        "live", "--clip", str(DEMO_CLIP), "--style", "flute", "--record", "take", "--seconds", "3", cwd=tmp_path
    )
    assert "Flute 100%" in result.stdout and "latency 128 samples (2.67 ms) = hop 128\n" in result.stdout
    assert result.stderr == ""
    names = ["input.wav", "output.wav", "performance.png", "show.jsonl"]
    assert sorted(p.name for p in (tmp_path / "take").iterdir()) == names
    heard, rate = soundfile.read(tmp_path / "take" / "input.wav")
    played, _ = soundfile.read(tmp_path / "take" / "output.wav")
    assert rate == 48_000 and len(heard) == len(played) and 1.5 * rate < len(heard) < 4.5 * rate
    clip, _ = soundfile.read(DEMO_CLIP, frames=len(heard))
    np.testing.assert_allclose(heard, clip, atol=2**-22)
    assert np.sqrt(np.mean(played[rate:] ** 2)) > 0.005
    assert (tmp_path / "take" / "performance.png").read_bytes().startswith(b"\x89PNG")


def test_live_recording_equals_the_offline_engine(tmp_path: Path) -> None:
    """What a performance records is what ``render`` makes of its input, later by the latency."""
    quiet = tmp_path / "none.mid"
    mido.MidiFile(tracks=[mido.MidiTrack()]).save(quiet)
    clip = ("--clip", str(DEMO_CLIP), "--style", "violin", "--midi", str(quiet), "--seconds", "2", "--patience", "5000")
    restyle("live", *clip, "--record", "take", cwd=tmp_path)
    take = tmp_path / "take"
    restyle("render", str(take / "input.wav"), str(take / "render.wav"), "--style", "violin")
    played, _ = soundfile.read(take / "output.wav")
    rendered, _ = soundfile.read(take / "render.wav")
    latency = read_bundle(DEFAULT_MODEL).manifest.latency_samples
    np.testing.assert_allclose(played[latency:], rendered[:-latency], atol=1e-5)


@pytest.mark.parametrize("name", ["input.wav", "output.wav", "show.jsonl"])
def test_a_recording_is_never_recorded_over(tmp_path: Path, name: str) -> None:
    (tmp_path / "take").mkdir()
    (tmp_path / "take" / name).write_bytes(b"the best solo ever")
    result = restyle("live", "--clip", str(DEMO_CLIP), "--record", "take", "--seconds", "1", cwd=tmp_path, code=1)
    assert "take holds a recording already; choose another folder" in result.stderr
    assert (tmp_path / "take" / name).read_bytes() == b"the best solo ever"


def test_the_bundled_clip_is_recorded_beside_an_earlier_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = LiveSettings(DEFAULT_MODEL)
    assert settings.without_device().record == Path("performance") and settings.without_device().midi == str(DEMO_MIDI)
    assert LiveSettings(DEFAULT_MODEL, style="choir").without_device().midi is None  # or it would be another style
    for name in ("performance", "performance-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "output.wav").write_bytes(b"the best solo ever")
    assert settings.without_device().record == Path("performance-3")
    assert LiveSettings(DEFAULT_MODEL, record=Path("take")).without_device().record == Path("take")


def test_ctrl_c_ends_a_performance_cleanly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "realtime.cli", "live", "--clip", str(DEMO_CLIP), "--loop", "--record", "take"]
    process = subprocess.Popen(
        ["nohup", *command],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("performing: clip")
    process.send_signal(signal.SIGHUP)  # which nohup has it ignore
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=15)
    assert process.returncode == 0, err
    assert err == "" and "left: take/output.wav" in out
    assert soundfile.info(tmp_path / "take" / "output.wav").frames > 24_000


def test_bench_writes_every_figure(tmp_path: Path) -> None:
    result = restyle(
        "bench", "--hops", "500", "--no-startup", "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")
    )
    figures = json.loads((tmp_path / "b.json").read_text())
    assert figures["algorithmic_latency_samples"] == {"declared": 128, "measured": 128}
    assert figures["processor_latency_samples"] == {"declared": 128, "measured": 128}
    compute = figures["compute_ms"]
    assert 0 < compute["p50"] <= compute["p99"] <= compute["p999"] <= compute["max"]
    assert figures["overhead_ratio"] > 0.9 and figures["matmul_ratio"] > 0.1 and figures["real_time_factor"] > 0
    assert figures["model"] == "bank" and figures["provider"] == "cpu" and figures["sample_rate"] == 48_000
    assert "128 samples (2.67 ms) measured" in result.stdout
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_bench_says_before_it_measures_that_its_target_cannot_be_written(tmp_path: Path, option: str) -> None:
    for target, why in ((tmp_path / "none" / "b", "No such file or directory"), (tmp_path, "Is a directory")):
        began = time.monotonic()
        result = restyle("bench", "--hops", "1000000", option, str(target), code=1)
        assert time.monotonic() - began < 30
        assert f"cannot write: {target}: {why}; choose another file" in result.stderr
    assert not list(tmp_path.iterdir())
    song = tmp_path / "song.wav"
    song.write_bytes(b"the best song ever")
    if option == "--plot":
        result = restyle("bench", "--hops", "1000000", option, str(song), code=1)
        assert "song.wav: a picture ends in .png" in result.stderr
    assert song.read_bytes() == b"the best song ever"


def test_a_start_that_fails_or_hangs_ends_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeasureError, match=r"restyle live: .*BundleError: .*none\.onnx: file: there is no such file"):
        measure_live_start_s(tmp_path / "none.onnx", "cpu", runs=1)
    monkeypatch.setattr(realtime.bench, "FRESH_TIMEOUT_S", 0.05)
    with pytest.raises(MeasureError, match=r"not done within 0\.05 s; --no-startup leaves it out"):
        measure_live_start_s(DEFAULT_MODEL, "cpu", runs=1)


@pytest.mark.parametrize("module", ["realtime", "realtime.cli"])
def test_importing_the_engine_or_the_command_loads_nothing_heavy(module: str) -> None:
    heavy = "{'torch', 'numpy', 'onnxruntime', 'sounddevice', 'librosa', 'realtime.bench_cli'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_rendering_never_needs_torch(tmp_path: Path) -> None:
    audio, rate = soundfile.read(DEMO_CLIP, frames=24_000)
    soundfile.write(tmp_path / "in.wav", audio, rate)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from realtime.cli import app\n"
        f"app(['render', {str(tmp_path / 'in.wav')!r}, {str(tmp_path / 'out.wav')!r}, '--style', 'pipe_organ'])"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert soundfile.info(tmp_path / "out.wav").frames == 24_000
