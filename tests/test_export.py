"""Export: one file that computes what torch computes, or no file."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyloudnorm
import pytest

torch = pytest.importorskip("torch")

import onnx  # noqa: E402

import export.writer  # noqa: E402
from export.graph import build_graph, state_from_tensors, state_tensors  # noqa: E402
from export.verify import (  # noqa: E402
    MINIMUM_HOPS,
    TOLERANCE,
    VerifyError,
    run_torch,
    verify,
    without_cuda_kernel,
)
from export.writer import Emphasis, NamedStyle, write_model  # noqa: E402
from realtime.bundle import DEFAULT_MODEL, Card, Golden, Source, read_bundle  # noqa: E402
from realtime.controls import TARGET_LOUDNESS_LUFS  # noqa: E402
from realtime.loudness import reference_playings  # noqa: E402
from realtime.spectral import SpectralSpec  # noqa: E402
from realtime.stream import Stream  # noqa: E402
from training.models.generator import Generator, GeneratorConfig  # noqa: E402
from training.models.kinds import make_generator  # noqa: E402

SPEC = SpectralSpec()
CONFIG = GeneratorConfig(style_dim=4, band_count=12, hidden=16)
CARD = Card(
    "made in a test",
    "restore",
    "",
    "2026-01-01",
    0,
    0.0,
    (Source("a", "CC0-1.0", "nobody", 1, 0.1),),
    {"loss": 1.0},
    (),
)


def model(seed: int = 0) -> Generator:
    torch.manual_seed(seed)
    made = Generator(SPEC, CONFIG).eval()
    with torch.no_grad():
        made.leave.weight.mul_(5.0)
    return made


def styles(count: int = 2) -> list[NamedStyle]:
    random = np.random.default_rng(0)
    return [
        NamedStyle(f"s{i}", f"Style {i}", i, random.standard_normal(CONFIG.style_dim).astype(np.float32))
        for i in range(count)
    ]


@dataclass(frozen=True)
class Exported:
    generator: Generator
    path: Path
    difference: float


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("export") / "tiny.onnx"
    generator = model()
    result = write_model(generator, SPEC, styles(), CARD, path, "tiny", verify_hops=300)
    return Exported(generator, path, result.largest_difference)


def test_the_file_is_verified_before_it_gets_its_name(exported: Exported) -> None:
    assert exported.difference < TOLERANCE == 1e-4
    assert [p.name for p in exported.path.parent.iterdir()] == ["tiny.onnx"]


def test_verification_runs_two_thousand_hops_unless_a_test_says_otherwise() -> None:
    assert MINIMUM_HOPS >= 2000
    assert inspect.signature(write_model).parameters["verify_hops"].default == MINIMUM_HOPS
    assert verify.__defaults__ == (MINIMUM_HOPS,)


def test_the_manifest_says_what_the_model_is(exported: Exported) -> None:
    manifest = read_bundle(exported.path).manifest
    assert (manifest.name, manifest.kind, manifest.style_dim) == ("tiny", "transfer", 4)
    assert [style.id for style in manifest.styles] == ["s0", "s1"]
    assert manifest.weight_count == sum(p.numel() for p in exported.generator.parameters())
    states = {state.name: state.shape for state in manifest.states}
    assert states == {
        "style": (4,),
        "framer.history": (1, 896),
        "envelope.level": (1,),
        "noise.count": (1,),
        "made.history": (3, 896),
        "body.hidden": (16,),
        "bank.response": (4, 2, 544),
    }


def test_the_file_holds_no_trace_of_the_source(exported: Exported) -> None:
    data = exported.path.read_bytes()
    assert b".py" not in data and b"stack_trace" not in data


@pytest.mark.parametrize(("channels", "hops_per_step"), [(1, 1), (3, 1), (2, 7)])
def test_onnxruntime_is_torch(exported: Exported, channels: int, hops_per_step: int) -> None:
    steps = 40
    size = hops_per_step * SPEC.hop_samples
    random = np.random.default_rng(channels)
    audio = (0.2 * random.standard_normal((channels, steps * size))).astype(np.float32)
    style = random.standard_normal((steps, channels, 4)).astype(np.float32)
    expected = run_torch(exported.generator, torch.from_numpy(audio), torch.from_numpy(style), size).numpy()
    stream = Stream(read_bundle(exported.path), channels, hops_per_step)
    for i in range(steps):
        stream.audio[:] = audio[:, i * size : (i + 1) * size]
        stream.style[:] = style[i]
        np.testing.assert_allclose(stream.step(), expected[:, i * size : (i + 1) * size], atol=2e-5)


@pytest.mark.parametrize(
    "kind",
    [
        {"body": "lstm"},
        {"body": "unet", "band_count": 16},
        {"signals": ("input",), "body": "convolutional"},
        {"signals": ("pulses", "noise")},
        {"answer": "spectrum"},
        {"answer": "spectrum", "body": "convolutional"},
        {"answer": "autoencoder"},
    ],
    ids=str,
)
def test_every_kind_of_generator_is_exported_and_nothing_is_said(
    kind: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    overlaps = kind.get("answer") == "spectrum"
    spec = replace(SPEC, synthesis_window_samples=2 * SPEC.hop_samples) if overlaps else SPEC
    made = make_generator(spec, replace(CONFIG, **kind)).eval()
    result = write_model(made, spec, styles(), CARD, tmp_path / "tiny.onnx", "tiny", verify_hops=300)
    assert result.largest_difference < TOLERANCE and result.without_cuda_kernel == ()
    assert capfd.readouterr() == ("", "")


def test_shipped_models_have_a_kernel_for_every_node_on_a_gpu() -> None:
    shipped = sorted(DEFAULT_MODEL.parent.glob("*.onnx"))
    assert len(shipped) == 5 and {path.name: without_cuda_kernel(read_bundle(path)) for path in shipped} == {
        path.name: () for path in shipped
    }
    bundle = read_bundle(DEFAULT_MODEL)
    graph = onnx.load_from_string(bundle.graph)
    graph.graph.node.extend(
        [onnx.helper.make_node("Atan", ["audio"], ["a"]), onnx.helper.make_node("Tan", ["a"], ["b"])]
    )
    assert without_cuda_kernel(replace(bundle, graph=graph.SerializeToString())) == ("Atan", "Tan")


def test_the_golden_vector_is_what_torch_computes(exported: Exported) -> None:
    golden = read_bundle(exported.path).manifest.golden
    audio = torch.from_numpy(Golden.unpack(golden.audio))[None]
    style = torch.from_numpy(styles()[0].vector)[None]
    with torch.no_grad():
        out, _ = exported.generator(audio, style, exported.generator.init_state(1))
    np.testing.assert_allclose(Golden.unpack(golden.audio_out), out[0].numpy(), atol=2e-5)


def test_loudness_is_that_of_the_output_in_all_registers_plucked_and_bowed(exported: Exported) -> None:
    meter = pyloudnorm.Meter(SPEC.sample_rate)
    playings = reference_playings(SPEC.sample_rate)
    assert len(playings) == 10
    for playing in playings:
        assert meter.integrated_loudness(playing.astype(np.float64)) == pytest.approx(TARGET_LOUDNESS_LUFS, abs=0.05)
    for style, named in zip(read_bundle(exported.path).manifest.styles, styles(), strict=True):
        measured = []
        for playing in playings:
            audio = torch.from_numpy(playing[None, : len(playing) // 128 * 128])
            vector = torch.from_numpy(named.vector)[None, None]
            out = run_torch(exported.generator, audio, vector, audio.shape[1])
            measured.append(meter.integrated_loudness(out[0].numpy().astype(np.float64)))
        assert style.loudness_lufs == pytest.approx(np.mean(measured), abs=0.02)


def test_a_graph_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.writer, "build_graph", lambda _, *rest: build_graph(model(1), *rest))
    with pytest.raises(VerifyError, match=r"torch and onnxruntime differ by .* no file was written"):
        write_model(model(0), SPEC, styles(), CARD, tmp_path / "m.onnx", "wrong", verify_hops=300)
    assert not list(tmp_path.iterdir())


def test_states_survive_flattening() -> None:
    state = model().init_state(2)
    flat = [tensor for _, tensor in state_tensors(state)]
    again = state_from_tensors(state, iter(flat))
    assert [name for name, _ in state_tensors(again)] == [name for name, _ in state_tensors(state)]
    assert all(a is b for a, (_, b) in zip(flat, state_tensors(again), strict=True))


def run_export(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "realtime.cli", "export", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    missing = run_export(str(tmp_path / "no.ckpt"), str(tmp_path / "m.onnx"))
    assert missing.returncode == 1 and "no.ckpt" in missing.stdout + missing.stderr
    torch.save({"a": 1}, tmp_path / "foreign.ckpt")
    foreign = run_export(str(tmp_path / "foreign.ckpt"), str(tmp_path / "m.onnx"), "--json")
    assert foreign.returncode == 1 and "foreign.ckpt" in foreign.stderr
    suffix = run_export(str(tmp_path / "foreign.ckpt"), str(tmp_path / "m.bin"))
    assert suffix.returncode == 2 and "ends in .onnx" in suffix.stdout + suffix.stderr
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [("loud", "'loud' is no number"), ("1.1,choir=", "'choir=' is no number"), ("choir=4", "4 is outside 0.1..3")],
)
def test_an_emphasis_is_one_number_and_others_by_style(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Emphasis.parse(text)
    assert Emphasis.parse("1.15") == Emphasis(1.15)
    assert Emphasis.parse("1.15,choir=1.3,flute=1") == Emphasis(1.15, {"choir": 1.3, "flute": 1.0})
    assert Emphasis.parse("choir=1.3").metrics() == {"style_emphasis_choir": 1.3}


def test_the_shipped_card_is_plain_json() -> None:
    manifest = json.loads(read_bundle(DEFAULT_MODEL).manifest.to_json())
    assert manifest["card"]["objective"] == "restore" and manifest["card"]["steps"] > 0
