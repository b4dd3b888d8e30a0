"""``restyle bench``: figures that can be wrong are checked against what is known; times only for their order."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from realtime.bench import MeasureError, append_log, histogram, measure_paced, performers_in_real_time
from realtime.bench_compare import (
    CompareError,
    CompareSettings,
    OtherModel,
    Tensor,
    audio_shape,
    other_model,
    pair_states,
)
from realtime.bench_jack import (
    SAME,
    JackSettings,
    Replay,
    find_switches,
    measure_jack,
    mixed_controls,
    switching_styles,
)
from realtime.bundle import DEFAULT_MODEL, FIRST_MODEL, read_bundle
from realtime.processor import Processor
from realtime.soak import SoakSettings, memory_growth, private_memory_kib, ratio

BUNDLE = read_bundle(DEFAULT_MODEL)
HOP = BUNDLE.manifest.spectral.hop_samples
RATE = BUNDLE.manifest.spectral.sample_rate
PATIENCE_S = 120.0
needs_jack = pytest.mark.skipif(shutil.which("jackd") is None, reason="jackd is not installed")


def bench(*arguments: str, code: int = 0, environment: dict[str, str] | None = None) -> tuple[str, str]:
    result = subprocess.run(
        [sys.executable, "-m", "realtime.cli", "bench", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
        env=os.environ | (environment or {}),
    )
    assert result.returncode == code, (result.stdout, result.stderr)
    return result.stdout, result.stderr


def test_every_part_of_a_hop_is_measured_logged_and_drawn(tmp_path: Path) -> None:
    log = tmp_path / "bench.jsonl"
    log.write_text('{"earlier":true}\n')
    paths = ("--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png"), "--log", str(log))
    out, err = bench("--hops", "500", "--no-startup", "--max-channels", "2", "--compare", str(FIRST_MODEL), *paths)
    assert err == ""
    figures = json.loads((tmp_path / "b.json").read_text())
    split = figures["split_ms"]
    assert list(split) == ["copy_in", "graph", "copy_out", "processor"]
    for part in split.values():
        assert 0 < part["p50"] <= part["p99"] <= part["p999"] <= part["max"]
    assert split["copy_in"]["p50"] + split["copy_out"]["p50"] < split["graph"]["p50"] < split["processor"]["max"]
    assert split["processor"] == figures["compute_ms"] and split["graph"] == figures["graph_ms"]
    paced = figures["paced_ms"]
    assert 0 < paced["p50"] <= paced["p99"] <= paced["p999"] <= paced["max"] and paced != figures["compute_ms"]
    counts = figures["histogram_ms"]["counts"]
    assert set(counts) == {"copy_in", "graph", "copy_out", "processor", "paced", "matmul", "compare"}
    assert {sum(lane) for lane in counts.values()} == {500}
    assert [row["channels"] for row in figures["channels"]][:2] in ([1], [1, 2])
    assert figures["performers_in_real_time"] in (0, 1, 2)
    other = figures["compare"]
    assert other["file"] == "first.onnx" and other["hop_samples"] == HOP and len(other["states"]) > 2
    assert other["ratio"]["p50"] == pytest.approx(
        other["our_ms_per_second"]["p50"] / other["ms_per_second"]["p50"], rel=1e-2
    )
    assert figures["commit"] and figures["commit"] != "unknown"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines == [{"earlier": True}, figures]
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    for text in ("copy in", "at the pace of a performance", "performers on one core", "ours over theirs"):
        assert text in out


def test_paced_hops_come_at_their_instants() -> None:
    began = time.perf_counter()
    times = measure_paced(BUNDLE, "cpu", 200)
    assert time.perf_counter() - began > 199 * HOP / RATE
    assert times.shape == (200,) and 0 < np.median(times) < 1e3 * (time.perf_counter() - began)


def test_a_histogram_counts_every_value_between_its_edges() -> None:
    edges = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    drawn = histogram({"a": np.array([2.5, 3.0, 5.0]), "b": np.array([100.0])}, edges)
    assert drawn == {"edges": [2.0, 4.0, 8.0, 16.0], "counts": {"a": [2, 1, 0], "b": [0, 0, 1]}}
    drawn = histogram({"a": np.array([0.1])}, edges)
    assert drawn == {"edges": [1.0, 2.0], "counts": {"a": [1]}}


def test_performers_are_those_whose_p99_is_within_the_hop() -> None:
    rows = [{"channels": n, "processor_ms": {"p99": p99}} for n, p99 in ((1, 0.5), (2, 0.9), (4, 2.6), (8, 4.0))]
    assert performers_in_real_time(rows, 2.67) == 4
    assert performers_in_real_time(rows[-1:], 2.67) == 0


def test_the_log_grows_by_one_line_a_run(tmp_path: Path) -> None:
    for number in range(3):
        append_log(tmp_path / "new.jsonl", {"run": number, "text": "two\nlines"})
    lines = (tmp_path / "new.jsonl").read_text().splitlines()
    assert [json.loads(line)["run"] for line in lines] == [0, 1, 2]


def tensors(text: str) -> list[Tensor]:
    """``audio:1,512 h:?,64`` -> tensors."""
    split = (word.split(":") for word in text.split())
    return [Tensor(name, tuple(None if n == "?" else int(n) for n in shape.split(","))) for name, shape in split]


@pytest.mark.parametrize(
    ("inputs", "outputs", "audio", "states"),
    [
        ("audio:1,? state.h:1,4", "audio_out:1,? next.h:1,4", "audio>audio_out", "state.h>next.h"),
        ("h_in:1,4 audio_in:1,512", "audio_out:1,512 h_out:1,4", "audio_in>audio_out", "h_in>h_out"),
        ("mix:1,257,1 cache:2,8 c2:8", "enh:1,257,1 c2_out:8 cache_out:2,8", "mix>enh", "cache>cache_out c2>c2_out"),
        ("input:1,512 a:2,4 b:2,4 c:9", "x1:1,512 x2:9 x3:2,4 x4:2,4", "input>x1", "a>x3 b>x4 c>x2"),
        ("audio_in:1,8 lstm:3", "audio_out:1,8 other:3", "audio_in>audio_out", "lstm>other"),
        ("x:1,8", "y:1,8", "x>y", ""),
    ],
    ids=["state-next", "in-out", "x-x_out", "by-shape", "audio-looks-like-a-state", "no-state"],
)
def test_states_are_paired_by_their_names_else_by_their_shapes(
    inputs: str, outputs: str, audio: str, states: str
) -> None:
    pairing = pair_states(tensors(inputs), tensors(outputs))
    assert f"{pairing.audio_in.name}>{pairing.audio_out.name}" == audio
    assert " ".join(f"{one.name}>{other.name}" for one, other in pairing.states) == states


@pytest.mark.parametrize(
    ("inputs", "outputs", "why"),
    [
        ("audio:1,8 h:3 c:4", "y:1,8 hn:3", "3 inputs .*and 2 outputs"),
        ("audio:1,8 h:3", "y:1,8 z:4", r"input 'h' \[3\] has no output of its name or shape.*z \[4\]"),
    ],
)
def test_what_cannot_be_paired_is_named(inputs: str, outputs: str, why: str) -> None:
    with pytest.raises(CompareError, match=why):
        pair_states(tensors(inputs), tensors(outputs))


def test_open_dimensions_of_audio_become_one_and_the_chunk() -> None:
    assert audio_shape((None, None), 480) == (1, 480)
    assert audio_shape((None, 1, 512), 480) == (1, 1, 512)
    assert audio_shape((1, 257, None), 1) == (1, 257, 1)
    assert audio_shape((None, 257, 2), 480) == (1, 257, 2)


def counting_model(path: Path, state_out: int = 2) -> Path:
    """An ONNX file whose output is twice the number of runs before this one, whatever the audio."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT

    def value(name: str, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    constants = [
        helper.make_tensor("zero", kind, [1], [0.0]),
        helper.make_tensor("ones", kind, [state_out], [1.0] * state_out),
    ]
    nodes = [
        helper.make_node("Mul", ["wave", "zero"], ["silent"]),
        helper.make_node("ReduceSum", ["count_in"], ["count"], keepdims=1),
        helper.make_node("Add", ["silent", "count"], ["heard"]),
        helper.make_node("Add", ["count_in", "ones"], ["count_out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "counter",
        [value("wave", "batch", "time"), value("count_in", "rows", 1 if state_out > 2 else 2)],
        [value("heard", "batch", "time"), value("count_out", "rows", state_out)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {"sample_rate": "16000"})
    onnx.save(model, path)
    return path


def test_another_model_runs_with_its_states_carried_over(tmp_path: Path) -> None:
    path = counting_model(tmp_path / "counter.onnx")
    other = other_model(CompareSettings(path, hop_samples=160), "cpu", RATE, HOP)
    heard: list[NDArray[np.float32]] = [np.array(step.numpy()) for step in (other.step() for _ in range(4))]  # pyright: ignore[reportAttributeAccessIssue]
    assert [audio.shape for audio in heard] == [(1, 160)] * 4
    assert [float(audio[0, 0]) for audio in heard] == [0.0, 2.0, 4.0, 6.0]
    assert (other.hop_samples, other.sample_rate, other.states) == (160, 16_000, (("count_in", "count_out"),))


def test_models_of_different_hops_are_compared_per_second_of_audio() -> None:
    other = OtherModel(Path("o.onnx"), hop_samples=160, sample_rate=16_000, states=(), step=lambda: None)
    figures = other.figures(np.full(10, 2.0), np.full(10, 0.4), our_hop_ms=4.0)
    assert figures["ms_per_second"]["p50"] == 200.0 and figures["our_ms_per_second"]["p50"] == 100.0
    assert figures["ratio"]["p50"] == 0.5


def test_a_model_that_cannot_run_beside_ours_is_an_error_that_names_it(tmp_path: Path) -> None:
    noise = tmp_path / "noise.onnx"
    noise.write_bytes(b"no model")
    for path, why in (
        (tmp_path / "none.onnx", "there is no such file"),
        (noise, "onnxruntime refuses it"),
        (
            counting_model(tmp_path / "wide.onnx", state_out=3),
            "state 'count_in' goes in as [1, 1] and 'count_out' comes",
        ),
    ):
        _, err = bench("--hops", "500", "--compare", str(path), code=1)
        assert err.startswith(f"cannot measure: {path}: {why}") and err.count("\n") == 1


def hostile_model(path: Path, kind: str) -> Path:
    """An ONNX file that onnxruntime takes, whose first step never ends, or wants 400 GB."""
    onnx = pytest.importorskip("onnx")
    helper, number = onnx.helper, onnx.TensorProto

    def wave(name: str) -> Any:
        return helper.make_tensor_value_info(name, number.FLOAT, ("batch", "time"))

    constants = []
    if kind == "endless":
        constants = [
            helper.make_tensor("times", number.INT64, [], [2**62]),
            helper.make_tensor("go", number.BOOL, [], [True]),
        ]
        body = helper.make_graph(
            [
                helper.make_node("Identity", ["going"], ["going_on"]),
                helper.make_node("Neg", ["before"], ["after"]),
            ],
            "body",
            [
                helper.make_tensor_value_info("turn", number.INT64, []),
                helper.make_tensor_value_info("going", number.BOOL, []),
                wave("before"),
            ],
            [helper.make_tensor_value_info("going_on", number.BOOL, []), wave("after")],
        )
        nodes = [helper.make_node("Loop", ["times", "go", "audio"], ["audio_out"], body=body)]
    else:
        constants = [helper.make_tensor("size", number.INT64, [1], [10**11])]
        nodes = [
            helper.make_node("ConstantOfShape", ["size"], ["much"]),
            helper.make_node("ReduceSum", ["much"], ["nothing"], keepdims=0),
            helper.make_node("Add", ["audio", "nothing"], ["audio_out"]),
        ]
    graph = helper.make_graph(nodes, kind, [wave("audio")], [wave("audio_out")], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("endless", "was not loaded and through its first step within 2 s"),
        ("gigantic", "(onnxruntime refuses it|cannot be run on)"),
    ],
)
def test_a_hostile_model_cannot_hold_up_the_bench(tmp_path: Path, kind: str, why: str) -> None:
    path = hostile_model(tmp_path / "hostile.onnx", kind)
    with pytest.raises(CompareError, match=why) as caught:
        other_model(CompareSettings(path, trial_s=2.0), "cpu", RATE, HOP)
    assert str(caught.value).startswith(str(path))


def played(switch_hops: list[int], silent_hops: int, hops: int = 120) -> tuple[NDArray[np.float32], ...]:
    """Noise after silence through a processor that switches to the next style at some hops: (sent, heard) by hop."""
    styles = switching_styles(BUNDLE)
    processor = Processor(BUNDLE)
    processor.controls = mixed_controls(BUNDLE, styles[0])
    processor.prepare(RATE, HOP, 1)
    sent = np.random.default_rng(0).standard_normal((hops, HOP)).astype(np.float32) * np.float32(0.1)
    sent[:silent_hops] = 0.0
    heard = np.zeros_like(sent)
    for at in range(hops):
        for number, switch_at in enumerate(switch_hops):
            if switch_at == at:
                processor.controls = mixed_controls(BUNDLE, styles[1 + number])
        out = processor.process(sent[None, at])[0]
        if at:
            heard[at - 1] = out  # the processor gives a hop while it takes the next
    return sent[:-1], heard[:-1]


def switches(*sent_at: int) -> list[tuple[int, Any]]:
    styles = switching_styles(BUNDLE)
    return [(at, mixed_controls(BUNDLE, styles[1 + number])) for number, at in enumerate(sent_at)]


def test_the_first_sample_of_a_new_style_is_found_in_what_was_heard() -> None:
    """Also while the fade before it is still under way; one that another overtook is left out."""
    replay = Replay(BUNDLE, "cpu", switching_styles(BUNDLE)[0])
    sent, heard = played([40, 60, 64, 90, 90], silent_hops=7)
    # The performance began three hops after the musician.
    sent, heard = (np.pad(audio, ((3, 0), (0, 0))) for audio in (sent, heard))
    found = find_switches(replay, sent, heard, switches(38, 58, 66, 92, 94))
    assert {number: at - 3 for number, (at, _) in found.items()} == {0: 40, 1: 60, 2: 64, 4: 90}
    unswitched = played([], silent_hops=7)[1]
    at, first = found[0]
    difference = np.abs(heard[at] - unswitched[at - 3])
    assert difference[first] > SAME and (difference[:first] <= SAME).all()


def test_a_sound_that_the_engine_did_not_compute_is_no_switch() -> None:
    replay = Replay(BUNDLE, "cpu", switching_styles(BUNDLE)[0])
    sent, heard = played([40], silent_hops=2)
    heard[70] = heard[69]
    with pytest.raises(MeasureError, match="not what the engine computes"):
        find_switches(replay, sent, heard, switches(38))
    heard = played([40], silent_hops=2)[1]
    with pytest.raises(MeasureError, match="not what the engine computes"):
        find_switches(replay, sent, heard, switches(42))  # heard before it was sent


def relatives(pid: int) -> dict[int, str]:
    """The processes that belong to the server of the bench with this process id, and their command lines."""
    mark = f"restyle-{pid}-".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            if b"resource_tracker" in command:
                continue  # Python's own, which ends with its maker
            if int(folder.name) != pid and (mark in command or mark in (folder / "environ").read_bytes()):
                found[int(folder.name)] = command.replace(b"\0", b" ").decode(errors="replace")
    return found


def await_nothing_left(pid: int) -> None:
    deadline = time.monotonic() + 20
    while left := relatives(pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert not list(Path("/dev/shm").glob(f"*restyle-{pid}-*"))


@pytest.mark.jack
@needs_jack
def test_the_round_trip_through_jack_is_the_sum_of_its_terms_and_every_switch_is_heard() -> None:
    measured = measure_jack(BUNDLE, JackSettings(switches=4, periods_samples=(64,)))
    (trip,) = measured["round_trip"]
    assert trip["expected_samples"] == BUNDLE.manifest.latency_samples + 64 == trip["measured_samples"]
    assert trip["buffer_samples"] == 64 and trip["equal"] and trip["same_sound"]
    heard = measured["midi_to_sound"]
    assert heard["heard"] == heard["switches"] == len(heard["all_ms"]) == 4
    # A message in a block changes the hop of that block at the earliest, which is heard two blocks later.
    assert all(HOP < samples < 5 * RATE for samples in heard["all_samples"])
    assert heard["samples"]["max"] == max(heard["all_samples"])
    await_nothing_left(os.getpid())


@contextlib.contextmanager
def running_bench(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "realtime.cli", "bench", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
            for left in relatives(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(left, signal.SIGKILL)


@pytest.mark.jack
@needs_jack
def test_a_short_soak_gives_every_figure(tmp_path: Path) -> None:
    path, plot = tmp_path / "soak.json", tmp_path / "soak.png"
    arguments = ("--soak", "0.1", "--inference", "deferred", "--json", str(path), "--plot", str(plot))
    with running_bench(*arguments) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, (out, err)
        await_nothing_left(process.pid)
    figures = json.loads(path.read_text())
    assert figures["model"] == "bank" and figures["machine"] and figures["commit"]
    soak = figures["soak"]
    assert {period["inference"] for period in soak["periods"]} == {"deferred"}
    assert [period["period_samples"] for period in soak["periods"]] == [64, 128]
    assert [(one["period_samples"], one["kind"]) for one in soak["slices"]] == [
        (64, "restyle"),
        (64, "idle"),
        (128, "restyle"),
        (128, "idle"),
    ]
    for period in soak["periods"]:
        for kind in ("restyle", "idle"):
            assert period[kind]["failures"] == 0 and period[kind]["messages"] > 100 and period[kind]["kept_share"] > 0.3
        assert period["xrun_ratio"] > 0 and period["miss_ratio"] > 0
        assert period["memory"]["seconds"] > 0.3
    for one in soak["slices"]:
        assert (len(one["memory_kib"]) > 3) == (one["kind"] == "restyle")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "period 64, restyle, slice 1 of 1" in err and "ratios" in out


@pytest.mark.jack
@needs_jack
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_soak_that_is_ended_leaves_its_figures_and_no_process(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C reaches every process of the terminal's group, SIGTERM the one that it is sent to."""
    path = tmp_path / "soak.json"
    with running_bench("--soak", "10", "--json", str(path)) as process:
        deadline = time.monotonic() + PATIENCE_S
        while len(relatives(process.pid)) < 3:  # the server, the player and the audio process
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(2.0)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, (out, err)
        await_nothing_left(process.pid)
    assert [one["kind"] for one in json.loads(path.read_text())["soak"]["slices"]] == ["restyle"]
    assert "Traceback" not in err


@pytest.mark.jack
@needs_jack
def test_a_bench_that_is_ended_leaves_no_process() -> None:
    with running_bench("--hops", "500", "--no-startup", "--max-channels", "0", "--jack") as process:
        deadline = time.monotonic() + PATIENCE_S
        while not any("live" in command for command in relatives(process.pid).values()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130, err
        await_nothing_left(process.pid)


@pytest.mark.parametrize("arguments", [("--jack",), ("--soak", "1")])
def test_without_jackd_the_remedy_is_said_at_once(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    _, err = bench("--hops", "1000000", *arguments, code=1, environment={"PATH": str(tmp_path)})
    assert "jackd is not installed" in err and "apt-get install jackd2" in err and "Traceback" not in err


def test_memory_growth_is_one_slope_through_slices_of_different_levels() -> None:
    seconds = np.arange(10.0)
    growing = [np.stack([seconds, level + 2.0 * seconds], axis=1) for level in (100.0, 5000.0)]
    assert memory_growth(growing) == {"slope_kib_per_s": 2.0, "growth_kib": 36.0, "seconds": 18.0}
    still = [np.stack([seconds, np.full(10, level)], axis=1) for level in (100.0, 5000.0)]
    assert memory_growth(still)["slope_kib_per_s"] == 0.0
    assert memory_growth([np.zeros((0, 2)), np.zeros((1, 2))])["growth_kib"] == 0.0


def test_private_memory_sees_what_is_allocated() -> None:
    before = private_memory_kib(os.getpid())
    kept = np.ones(2**24, np.float64)  # so large that it is asked for anew, and not taken from what was let go before
    after = private_memory_kib(os.getpid())
    assert before is not None and after is not None and after - before > 0.9 * kept.nbytes / 1024
    assert private_memory_kib(None) is None


def test_a_ratio_is_one_where_nothing_happened_and_per_second_elsewhere() -> None:
    assert ratio(0, 30.0, 0, 30.0) == 1.0
    assert ratio(9, 30.0, 0, 30.0) == 10.0
    assert ratio(3, 30.0, 1, 15.0) == 1.0
    assert ratio(3, 30.0, 0, 0.0) == 0.0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--inference", "deferred"), "is for --soak"),
        (("--soak", "1", "--inference", "none"), "'none' is none of worker"),
    ],
)
def test_where_the_graph_runs_is_for_soaks_and_one_of_three(arguments: tuple[str, ...], text: str) -> None:
    assert text in bench(*arguments, code=2)[1]


def test_a_soak_shares_its_minutes_out() -> None:
    settings = SoakSettings(minutes=30.0)
    assert (settings.pairs, settings.real_slice_s) == (15, 30.0)
    assert [settings.inference_at(period, 128) for period in (64, 128)] == ["deferred", "worker"]
    assert SoakSettings(inference="callback").inference_at(64, 128) == "callback"
    short = SoakSettings(minutes=0.2)
    assert (short.pairs, short.real_slice_s) == (1, 3.0)
