"""Sources: the same seed gives the same samples, notes switch sound on and off without a click, faults are silent."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import mido
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

pytest.importorskip("torch")

from realtime.bundle import DEFAULT_MODEL, Bundle, read_bundle
from realtime.cli import app
from realtime.controls import Performer
from realtime.generate import Generation
from realtime.midi import MidiMap
from realtime.noise import SeededNoise
from realtime.processor import FADE_HOPS, Processor
from realtime.render import BLOCK
from realtime.replay import read_show, replay
from tests.sources import write_source

RATE = 48_000
NOTE_ON, NOTE_OFF = bytes((0x90, 36, 100)), bytes((0x80, 36, 0))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("source") / "source.onnx"
    assert write_source(path) < 1e-4
    return read_bundle(path)


def restyle(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def generate(bundle: Bundle, out: Path, *arguments: object) -> NDArray[np.float32]:
    result = restyle("generate", "--model", bundle.path, out, *arguments)
    assert result.exit_code == 0, result.output
    return np.asarray(soundfile.read(out, dtype="float32")[0], np.float32)


def perform(bundle: Bundle, events: list[tuple[float, bytes]], seconds: float, **values: float) -> NDArray[np.float32]:
    """What MIDI events (seconds, bytes) play, [samples]."""
    performer = Performer(bundle.manifest)
    for name, value in values.items():
        performer.set(name, value)
    blocks, frames, made = Generation(bundle, performer, events=events).blocks(), round(seconds * RATE), []
    while sum(map(len, made)) < frames:
        made.append(next(blocks)[0])
    return np.concatenate(made)[:frames]


def midi_file(path: Path, events: list[tuple[float, bytes]]) -> Path:
    track = mido.MidiTrack()
    ticks = [round(seconds * 960) for seconds, _ in events]  # 480 to a quarter note, of which two last a second
    for at, before, (_, data) in zip(ticks, [0, *ticks], events, strict=False):
        track.append(mido.Message.from_bytes(data, time=at - before))
    mido.MidiFile(tracks=[track]).save(path)
    return path


def test_noise_is_white_of_level_one_and_does_not_depend_on_how_it_is_asked_for() -> None:
    whole, parts = np.zeros((2, 400 * 128), np.float32), np.zeros((2, 400 * 128), np.float32)
    SeededNoise(7, 2, 128).fill(whole)
    again = SeededNoise(7, 2, 128)
    for start, stop in ((0, 1), (1, 18), (18, 400)):
        again.fill(parts[:, start * 128 : stop * 128])
    assert np.array_equal(whole, parts) and set(np.unique(whole)) == {-1.0, 1.0}
    assert abs(whole.mean()) < 0.01 and not np.array_equal(whole[0], whole[1])
    lags = np.fft.irfft(np.abs(np.fft.rfft(whole[0])) ** 2)[1:200] / len(whole[0])
    assert np.abs(lags).max() < 0.03
    other = np.zeros_like(whole)
    SeededNoise(8, 2, 128).fill(other)
    assert abs(float((whole * other).mean())) < 0.03


def test_a_seed_is_a_sound_and_seconds_are_samples(bundle: Bundle, tmp_path: Path) -> None:
    one = generate(bundle, tmp_path / "a.wav", "--style", "bell", "--seconds", "0.7", "--seed", "7")
    assert len(one) == 33_600 and float(np.abs(one).max()) > 0.01
    generate(bundle, tmp_path / "b.wav", "--style", "bell", "--seconds", "0.7", "--seed", "7")
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    longer = generate(bundle, tmp_path / "c.wav", "--style", "bell", "--seconds", "1.2345", "--seed", "7")
    assert len(longer) == 59_256 and np.array_equal(longer[:33_600], one)
    other = generate(bundle, tmp_path / "d.wav", "--style", "bell", "--seconds", "0.7", "--seed", "8")
    assert not np.array_equal(other, one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "b.wav", "c.wav", "d.wav"]


def test_styles_blends_intensity_and_channels_are_heard(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "x.wav"
    made = [
        generate(bundle, out, "--seconds", "1", "--style", style) for style in ("reed", "bell", "reed=0.7,bell=0.3")
    ]
    assert all(not np.array_equal(one, other) for one, other in ((made[0], made[1]), (made[0], made[2])))
    quiet = generate(bundle, out, "--seconds", "1", "--style", "reed", "--intensity", "0.1")
    assert 0.0 < float(quiet.std()) < 0.5 * float(made[0].std())
    assert not generate(bundle, out, "--seconds", "1", "--intensity", "0").any()
    stereo = generate(bundle, out, "--seconds", "1", "--style", "reed", "--channels", "2")
    assert np.array_equal(stereo[:, 0], made[0]) and not np.array_equal(stereo[:, 0], stereo[:, 1])


def test_any_blocks_give_the_same_samples(bundle: Bundle) -> None:
    def play(sizes: list[int]) -> NDArray[np.float32]:
        processor = Processor(bundle, seed=3)
        processor.prepare(RATE, 8193, 1)
        made = [processor.process(np.full((1, size), np.nan, np.float32)).copy() for size in sizes]
        assert processor.meters.bad_input_hops == 0  # what comes in is not heard
        return np.concatenate(made, axis=1)[0]

    whole = play([8193, 8193])
    for sizes in ([1, 17, 64, 65, 127, 128, 129, 8193], [128] * 100):
        made = play(sizes)
        assert np.array_equal(made, whole[: len(made)])


def test_notes_switch_sound_on_and_off_without_a_click(bundle: Bundle) -> None:
    events = [(0.3, NOTE_ON), (0.8, NOTE_OFF), (1.2, NOTE_ON), (1.7, NOTE_OFF)]
    made = perform(bundle, events, 2.2)
    reach = bundle.manifest.spectral.analysis_window_samples + (FADE_HOPS + 2) * 128
    for start, stop in ((0.0, 0.3), (0.8 + reach / RATE, 1.2), (1.7 + reach / RATE, 2.2)):
        # What happens within a hop holds from its start.
        assert not made[round(start * RATE) : round(stop * RATE) - 128].any(), "nothing held, nothing heard"
    sounds = [made[round(start * RATE) : round(stop * RATE)] for start, stop in ((0.35, 0.8), (1.25, 1.7))]
    assert all(float(np.abs(sound).max()) > 0.01 for sound in sounds)
    steady = max(float(np.abs(np.diff(sound)).max()) for sound in sounds)
    for edge in (0.3, 0.8, 1.2, 1.7):
        steps = np.abs(np.diff(made[round(edge * RATE) - 64 : round(edge * RATE) + reach]))
        assert float(steps.max()) <= 1.1 * steady, f"a click at {edge} s"
    first_steps = np.abs(np.diff(made[round(0.3 * RATE) - 128 : round(0.3 * RATE) + 128]))
    assert float(first_steps.max()) < 0.5 * steady, "sound begins by itself, not with a step"


def test_controllers_set_intensity_and_drone_and_programs_choose(bundle: Bundle) -> None:
    drone_on, drone_off = bytes((0xB0, 69, 127)), bytes((0xB0, 69, 0))
    made = perform(bundle, [(0.2, drone_on), (0.8, drone_off)], 1.2)
    assert not made[: round(0.2 * RATE) - 128].any() and made[round(0.3 * RATE) : round(0.8 * RATE)].any()
    assert not made[round(0.9 * RATE) :].any()
    reed, bell = (perform(bundle, [(0.0, bytes((0xC0, p)))], 0.5, drone=1.0) for p in (20, 14))
    assert not np.array_equal(reed, bell)
    loud, quiet = (perform(bundle, [(0.0, bytes((0xB0, 11, value)))], 0.5, drone=1.0) for value in (127, 10))
    assert float(quiet[4800:].std()) < 0.3 * float(loud[4800:].std())


def test_a_released_chord_fades_as_it_was(bundle: Bundle) -> None:
    performer, first = Performer(bundle.manifest), MidiMap().first_note
    bell = performer.manifest.styles[1]
    performer.hold(first + 1, bell, 100)
    assert performer.sounding and performer.mix() == {bell: 1.0}
    performer.release(first + 1)
    assert not performer.sounding and performer.mix() == {bell: 1.0}
    performer.select("reed")
    assert performer.mix() == {performer.manifest.styles[0]: 1.0}


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_where_the_graph_fails_there_is_silence_and_no_noise(bundle: Bundle, fault: str) -> None:
    processor = Processor(bundle)
    processor.prepare(RATE, 128, 1)
    stream = processor.stream
    assert stream is not None
    step, silence = stream.step, np.zeros((1, 128), np.float32)
    for _ in range(100):
        processor.process(silence)

    def broken() -> NDArray[np.float32]:
        if fault == "raises":
            raise RuntimeError("gone")
        return np.full((1, 128), np.nan, np.float32)

    stream.step = broken  # pyright: ignore[reportAttributeAccessIssue]
    made = np.concatenate([processor.process(silence).copy() for _ in range(6)], axis=1)
    assert processor.meters.bad_output_hops == 6 and not made[:, -256:].any()
    stream.step = step  # pyright: ignore[reportAttributeAccessIssue]
    assert np.concatenate([processor.process(silence).copy() for _ in range(30)], axis=1)[:, -128:].any()


def test_a_midi_file_plays_it(bundle: Bundle, tmp_path: Path) -> None:
    notes = midi_file(tmp_path / "notes.mid", [(0.25, NOTE_ON), (0.5, NOTE_OFF)])
    made = generate(bundle, tmp_path / "x.wav", "--midi", notes)
    assert len(made) == 72_000  # the last event, and a second
    assert not made[: 12_000 - 128].any() and made[13_000:24_000].any() and not made[28_000:].any()


def test_memory_does_not_grow_with_the_length(bundle: Bundle) -> None:
    generation = Generation(bundle, Performer(bundle.manifest))
    blocks = generation.blocks()
    tracemalloc.start()
    try:
        peaks: list[int] = []
        for count in (5, 60):
            tracemalloc.reset_peak()
            assert sum(next(blocks).shape[1] for _ in range(count)) > 0.9 * count * BLOCK
            peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 100_000


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["x.wav", "--style", "red"], 1, "style 'red' is not in model 'source': did you mean reed?"),
        (["x.wav", "--style", "reed=much"], 1, "weight 'much' of 'reed' is not a number above zero"),
        (["x.wav", "--model", "none.onnx"], 1, "none.onnx: file: there is no such file"),
        (["x.wav", "--model", str(DEFAULT_MODEL)], 1, "manifest.kind: 'transfer' makes no sound of noise"),
        (["x.txt"], 1, "'.txt' is none of .wav"),
        (["/proc/x.wav"], 1, "/proc/x.wav: cannot be written"),
        (["x.wav", "--midi", "none.mid"], 1, "none.mid: there is no such file"),
        (["x.wav", "--seconds", "0"], 2, "--seconds"),
        (["x.wav", "--seed", "-1"], 2, "--seed"),
        (["x.wav", "--intensity", "2"], 2, "--intensity"),
        (["-", "--json"], 2, "without --json"),
    ],
)
def test_what_is_wrong_is_said_and_no_file_is_left(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    result = restyle("generate", "--model", bundle.path, *arguments)
    assert result.exit_code == code and text in result.output, result.output
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(b"the last take")
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); "
    code = limit + "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from realtime.cli import main; main()"
    command = [sys.executable, "-c", code, "generate", "--model", str(bundle.path), "x.wav", "--seconds", "5"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "x.wav: cannot be written" in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.wav"]
    assert (tmp_path / "x.wav").read_bytes() == b"the last take"


def test_into_a_pipe_it_goes_on_until_nobody_reads(bundle: Bundle, tmp_path: Path) -> None:
    expected = generate(bundle, tmp_path / "x.wav", "--seconds", "0.5", "--seed", "2")
    command = [sys.executable, "-m", "realtime.cli", "generate", "--model", str(bundle.path), "--seed", "2", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        heard = np.frombuffer(process.stdout.read(4 * len(expected)), "<f4")
        process.stdout.close()
        assert process.wait(60) == 0 and process.stderr.read() == b""
    np.testing.assert_allclose(heard, expected, atol=2**-23)


def test_other_commands_know_what_it_is(bundle: Bundle, tmp_path: Path) -> None:
    info = restyle("info", bundle.path)
    assert "source (generate)" in info.output and "reed" in info.output
    soundfile.write(tmp_path / "in.wav", np.zeros(4800), RATE)
    rendered = restyle("render", "--model", bundle.path, tmp_path / "in.wav", tmp_path / "out.wav")
    assert rendered.exit_code == 1 and "use 'restyle generate'" in rendered.output
    for option in (["--drone"], ["--intensity", "0.5"]):
        result = restyle("live", "--clip", tmp_path / "in.wav", *option)
        assert result.exit_code == 1 and "models of kind 'generate'" in " ".join(result.output.split())
    result = restyle("live", "--clip", tmp_path / "in.wav", "--seed", "3")
    assert result.exit_code == 1 and "leave out --seed" in " ".join(result.output.split())
    result = restyle("live", "--model", bundle.path, "--input", "guitar")
    assert result.exit_code == 1 and "takes no input" in result.output
    refusing = {
        "no way from an input": (["bench", bundle.path], ["bench", bundle.path, "--soak", "1"]),
        "which is what is measured here": (["evaluate", bundle.path, "--inputs", tmp_path, "--references", tmp_path],),
        "cannot play in an ensemble": (["live", "--model", bundle.path, "--then", "bank", "--seconds", "1"],),
    }
    for text, commands in refusing.items():
        for command in commands:
            result = restyle(*command)
            assert result.exit_code == 1 and text in " ".join(result.output.split()), result.output


def test_a_performance_is_played_by_midi_and_replays_to_the_sample(bundle: Bundle, tmp_path: Path) -> None:
    notes = midi_file(tmp_path / "notes.mid", [(0.5, NOTE_ON), (1.5, NOTE_OFF)])
    soundfile.write(tmp_path / "clock.wav", np.full(3 * RATE, 0.5), RATE)
    arguments = ["live", "--model", str(bundle.path), "--clip", "clock.wav", "--midi", str(notes), "--record", "take"]
    command = [sys.executable, "-m", "realtime.cli", *arguments, "--seed", "5", "--patience", "5000"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    heard, played = (soundfile.read(tmp_path / "take" / name)[0] for name in ("input.wav", "output.wav"))
    assert not heard.any() and float(np.abs(played).max()) > 0.01
    assert not played[: RATE // 4].any() and not played[-RATE // 2 :].any()
    assert json.loads((tmp_path / "take" / "show.jsonl").read_text().splitlines()[0])["seed"] == 5
    again = replay(read_show(tmp_path / "take"), bundle)
    assert again.equal == again.compared == len(played)
