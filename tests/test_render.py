"""``render``: the very same engine on files; output lines up with input to the sample, whatever the rate."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from realtime.audio import AudioFileError, AudioWriter, file_info
from realtime.bundle import DEFAULT_MODEL, DEMO_CLIP, DEMO_MIDI, Bundle, read_bundle
from realtime.controls import Performer
from realtime.midi import read_midi_file
from realtime.processor import Processor
from realtime.render import STEADY_HOPS_PER_STEP, plan_files, render_file

RATE, HOP = 48_000, 128


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(DEFAULT_MODEL)


def guitar(seconds: float, channels: int = 1) -> NDArray[np.float32]:
    audio, _ = soundfile.read(DEMO_CLIP, dtype="float32", frames=int(seconds * RATE), start=RATE // 4)
    return np.stack([audio * (1 - 0.3 * i) for i in range(channels)])


def write(path: Path, audio: NDArray[np.float32], rate: int = RATE, subtype: str = "FLOAT") -> Path:
    soundfile.write(path, audio.T, rate, subtype=subtype)
    return path


def performer(bundle: Bundle, **values: float) -> Performer:
    made = Performer(bundle.manifest)
    for name, value in values.items():
        made.set(name, value)
    return made


def test_dry_output_is_the_input_sample_by_sample(bundle: Bundle, tmp_path: Path) -> None:
    audio = guitar(1.234, channels=2)
    source = write(tmp_path / "in.wav", audio)
    render_file(bundle, source, tmp_path / "out.wav", performer(bundle, dry_wet=0.0))
    out, rate = soundfile.read(tmp_path / "out.wav", dtype="float32")
    assert rate == RATE and out.shape == audio.T.shape
    np.testing.assert_allclose(out, audio.T, atol=2**-23)


def test_wet_output_is_the_processor_output_without_its_latency(bundle: Bundle, tmp_path: Path) -> None:
    audio = guitar(1.0)
    made = performer(bundle)
    made.select("choir")
    render_file(bundle, write(tmp_path / "in.wav", audio), tmp_path / "out.wav", made)
    out, _ = soundfile.read(tmp_path / "out.wav", dtype="float32")
    processor = Processor(bundle)
    processor.controls = made.controls()
    processor.prepare(RATE, 100_000, 1)
    padded = np.pad(audio, ((0, 0), (0, processor.latency_samples)))
    expected = processor.process(padded)[0, processor.latency_samples :]
    np.testing.assert_allclose(out, expected, atol=2**-22)


@pytest.mark.parametrize("rate", [22_050, 44_100, 96_000])
def test_other_rates_come_back_at_their_rate_length_and_place(bundle: Bundle, tmp_path: Path, rate: int) -> None:
    time = np.arange(int(0.7 * rate)) / rate
    audio = (0.3 * np.sin(2 * np.pi * 440 * time) * np.hanning(len(time))).astype(np.float32)[None]
    source = write(tmp_path / "in.wav", audio, rate)
    render_file(bundle, source, tmp_path / "out.wav", performer(bundle, dry_wet=0.0))
    out, out_rate = soundfile.read(tmp_path / "out.wav", dtype="float32")
    assert (out_rate, out.shape) == (rate, audio[0].shape)
    np.testing.assert_allclose(out, audio[0], atol=2e-3)


def test_a_midi_file_changes_the_style_where_it_says(bundle: Bundle, tmp_path: Path) -> None:
    audio = guitar(2.0)
    source = write(tmp_path / "in.wav", audio)
    outs = {}
    for name, events in {
        "violin": [(0.0, b"\xc0\x28")],
        "choir": [(0.0, b"\xc0\x34")],
        "both": [(0.0, b"\xc0\x28"), (1.0, b"\xc0\x34")],
    }.items():
        render_file(bundle, source, tmp_path / f"{name}.wav", Performer(bundle.manifest), events)
        outs[name], _ = soundfile.read(tmp_path / f"{name}.wav", dtype="float32")
    before = slice(0, RATE - 2 * HOP - bundle.manifest.latency_samples)
    np.testing.assert_array_equal(outs["both"][before], outs["violin"][before])
    after = slice(int(1.3 * RATE), None)
    near = np.abs(outs["both"][after] - outs["choir"][after]).mean()
    far = np.abs(outs["both"][after] - outs["violin"][after]).mean()
    assert near < 0.3 * far


def test_the_bundled_performance_renders(bundle: Bundle, tmp_path: Path) -> None:
    result = render_file(
        bundle, DEMO_CLIP, tmp_path / "demo.flac", Performer(bundle.manifest), read_midi_file(DEMO_MIDI)
    )
    out, _ = soundfile.read(tmp_path / "demo.flac")
    assert result.frames == len(out) == file_info(DEMO_CLIP).frames
    assert 0.01 < np.sqrt(np.mean(out**2)) < 0.3 and np.abs(out).max() <= 1.0


def test_nan_and_infinity_in_a_file_do_no_harm(bundle: Bundle, tmp_path: Path) -> None:
    audio = guitar(0.5)
    audio[0, 5000:5100] = np.nan
    audio[0, 9000] = np.inf
    result = render_file(bundle, write(tmp_path / "in.wav", audio), tmp_path / "out.wav", performer(bundle))
    out, _ = soundfile.read(tmp_path / "out.wav")
    assert np.isfinite(out).all() and np.sqrt(np.mean(out[12_000:] ** 2)) > 1e-3
    assert result.bad_input_hops == 2 * STEADY_HOPS_PER_STEP and result.bad_output_hops == 0


def test_a_model_that_fails_renders_dry_and_says_so(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = guitar(0.5)
    prepare = Processor.prepare

    def prepare_to_fail(self: Processor, *arguments: int) -> None:
        def fail() -> NDArray[np.float32]:
            raise RuntimeError("no memory left")

        prepare(self, *arguments)
        assert self.stream is not None
        self.stream.step = fail

    monkeypatch.setattr(Processor, "prepare", prepare_to_fail)
    result = render_file(bundle, write(tmp_path / "in.wav", audio), tmp_path / "out.wav", performer(bundle))
    assert result.bad_output_hops >= 24_000 / HOP and result.fault == "RuntimeError: no memory left"
    out, _ = soundfile.read(tmp_path / "out.wav", dtype="float32")
    # Of a model that never answered, the first step of dry is joined to the silence before it.
    joined = STEADY_HOPS_PER_STEP * HOP
    np.testing.assert_allclose(out[joined:], audio[0, joined:], atol=2**-22)
    assert np.abs(np.diff(out[:joined])).max() <= 1.1 * np.abs(np.diff(audio[0, :joined])).max()


def test_plans(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("in/a.wav", "in/deep/b.flac", "in/notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    pairs = plan_files(tmp_path / "in", tmp_path / "out")
    assert [(p.name, str(t.relative_to(tmp_path))) for p, t in pairs] == [
        ("a.wav", "out/a.wav"),
        ("b.flac", "out/deep/b.flac"),
    ]
    assert plan_files(tmp_path / "in/a.wav", tmp_path)[0][1] == tmp_path / "a.wav"
    assert plan_files(tmp_path / "in/a.wav", tmp_path / "x.ogg")[0][1] == tmp_path / "x.ogg"
    with pytest.raises(AudioFileError, match="no such file or folder"):
        plan_files(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AudioFileError, match="has no sound files"):
        plan_files(tmp_path / "empty", tmp_path / "out")


def test_what_was_rendered_into_the_source_folder_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("takes/a.wav", "takes/out/a.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for source in (Path("takes"), tmp_path / "takes"):
        for target in (Path("takes/out"), Path("takes/../takes/out"), tmp_path / "takes" / "out"):
            assert plan_files(source, target) == [(source / "a.wav", target / "a.wav")]
        with pytest.raises(AudioFileError, match="takes: is the input itself"):
            plan_files(source, Path("takes"))


def test_bad_files_are_named_and_leave_nothing(bundle: Bundle, tmp_path: Path) -> None:
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF nothing")
    for source, text in ((bad, "bad.wav: is not a sound file"), (tmp_path / "none.wav", "there is no such file")):
        with pytest.raises(AudioFileError, match=text):
            render_file(bundle, source, tmp_path / "out.wav", performer(bundle))
    source = write(tmp_path / "in.wav", guitar(0.2))
    with pytest.raises(AudioFileError, match=r"'\.xyz' is none of \.wav"):
        render_file(bundle, source, tmp_path / "out.xyz", performer(bundle))
    with pytest.raises(AudioFileError, match="is the input itself"):
        render_file(bundle, source, source, performer(bundle))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.wav", "in.wav"]


def _limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    write(tmp_path / "in.wav", guitar(2.0))
    command = [sys.executable, "-m", "realtime.cli", "render", str(tmp_path / "in.wav"), str(tmp_path / "out.wav")]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=_limit_file_size, check=False)
    assert result.returncode == 1, result.stderr
    assert "out.wav" in result.stderr and "is the disk full?" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["in.wav"]


def test_a_writer_left_by_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), AudioWriter(tmp_path / "a.flac", RATE, 1) as writer:
        writer.write(guitar(0.1))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    """Peak memory (kB, as Linux counts it since the program started) for 2 s and for 30 s of sound."""
    code = (
        "import re, sys; from pathlib import Path\n"
        "from realtime.bundle import DEFAULT_MODEL, read_bundle\n"
        "from realtime.controls import Performer\n"
        "from realtime.render import render_file\n"
        "b = read_bundle(DEFAULT_MODEL)\n"
        "render_file(b, Path(sys.argv[1]), Path(sys.argv[2]), Performer(b.manifest))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    peaks = []
    for seconds in (2, 30):
        source = write(tmp_path / f"{seconds}.wav", np.tile(guitar(2.0), (1, seconds // 2)), 44_100, "PCM_16")
        arguments = [sys.executable, "-c", code, str(source), str(tmp_path / "out.wav")]
        peaks.append(int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout))
    # 28 s of float32 would be 5 MB at each rate and step.
    assert peaks[1] - peaks[0] < 2_500
