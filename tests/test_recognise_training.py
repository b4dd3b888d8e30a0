"""From folders of recordings to a recogniser's file: it learns, is calibrated, goes on and computes what torch does."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

import export.recogniser  # noqa: E402
from export.recogniser import export_recogniser, run_recogniser  # noqa: E402
from export.verify import MINIMUM_HOPS, TOLERANCE, VerifyError  # noqa: E402
from realtime.bundle import Golden, read_bundle  # noqa: E402
from realtime.cli import app  # noqa: E402
from realtime.recognise import Recogniser, recognise_file  # noqa: E402
from tests.conftest import CLIPS, SAX_STYLE, TINY_RECOGNISER, VIBRAPHONE_STYLE, tiny_recipe, write_notes  # noqa: E402
from training.checkpoint import (  # noqa: E402
    CHECKPOINT_FORMAT,
    CHECKPOINT_KEY,
    CheckpointError,
    load_recogniser,
    read_checkpoint,
)
from training.library import load_library  # noqa: E402
from training.models.recogniser_judge import RecogniserJudge  # noqa: E402
from training.models.streaming_recogniser import StreamingRecogniser  # noqa: E402
from training.objectives.recognise import RecogniseObjective, at_speeds, fit_temperature  # noqa: E402
from training.recipe import RecipeError, load_recipe  # noqa: E402
from training.train import RunOptions, prepare_teachers, read_judges, run_training  # noqa: E402

RECIPE = f"""
name = "tiny"
{TINY_RECOGNISER}[data]
segment_seconds = 0.5
piece_seconds = [0.2, 0.5]
workers = 0
[augment]
pitch_semitones = 1.0
[optimiser]
learning_rate = 0.02
warmup_steps = 2
[trainer]
steps = 40
batch_size = 8
average_decay = 0.8
validation_every_steps = 20
checkpoint_every_steps = 20
log_every_steps = 6
{SAX_STYLE}{VIBRAPHONE_STYLE}"""


@dataclass(frozen=True)
class Trained:
    """A run of the tiny recipe: where it happened, what the command said, and the file exported from it."""

    place: Path
    said: dict[str, Any]
    model: Path
    difference: float

    def train(self, *arguments: str) -> Any:
        return train(self.place, *arguments)


def train(place: Path, *arguments: str) -> Any:
    paths = ["--out", str(place / "run"), "--cache", str(place / "cache")]
    devices = ["--accelerator", "cpu", "--devices", "1"]
    return CliRunner().invoke(app, ["train", str(place / "tiny.toml"), *paths, *devices, *arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Trained:
    """Real notes of two instruments, learned and exported with the commands."""
    del one_thread
    place = tmp_path_factory.mktemp("recognise")
    (place / "tiny.toml").write_text(RECIPE)
    write_notes(place, {"sax": 3, "vibraphone": 5})
    result = train(place, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    model = place / "tiny.onnx"
    exported = CliRunner().invoke(app, ["export", said["best_checkpoint"], str(model), "--json"])
    assert exported.exit_code == 0, exported.output
    return Trained(place, said, model, json.loads(exported.stdout)["largest_difference"])


def test_the_run_says_how_it_fares_on_recordings_held_out(trained: Trained) -> None:
    metrics = trained.said["metrics"]
    assert trained.said["steps"] == 40
    assert 0.0 <= metrics["validation/expected_calibration_error"] <= 1.0
    assert metrics["validation/accuracy"] > 0.5 and metrics["validation/loss"] < math.log(2.0)
    assert 0.1 <= metrics["validation/temperature"] <= 10.0


def test_the_file_is_verified_over_two_thousand_hops(trained: Trained) -> None:
    assert trained.difference < TOLERANCE == 1e-4
    assert export_recogniser.__defaults__ == ("", MINIMUM_HOPS)


def test_the_manifest_says_what_the_recogniser_is(trained: Trained) -> None:
    manifest = read_bundle(trained.model).manifest
    assert (manifest.name, manifest.kind, manifest.latency_samples) == ("tiny", "recognise", 512)
    assert [style.id for style in manifest.styles] == ["sax", "vibraphone"]
    assert manifest.card.objective == "recognise" and len(manifest.card.recordings_sha256) == 9
    assert {"validation/accuracy", "validation/temperature"} < set(manifest.card.metrics)
    assert {state.name: state.shape for state in manifest.states} == {
        "framer.history": (1, 768),
        "peak": (93,),
        "first": (2, 24, 2),
        "second": (4, 12, 1),
        "third": (6, 6, 2),
        "fourth": (6, 3, 2),
        "found": (13, 46),
    }


@pytest.mark.parametrize(("channels", "hops_per_step"), [(1, 1), (3, 1), (2, 7)])
def test_onnxruntime_is_torch(trained: Trained, channels: int, hops_per_step: int) -> None:
    model = load_recogniser(Path(trained.said["best_checkpoint"])).recogniser
    recogniser, size = Recogniser(read_bundle(trained.model)), 512 * hops_per_step
    audio = 0.2 * torch.randn(channels, 12 * size, generator=torch.Generator().manual_seed(channels))
    states = recogniser.silence(channels)
    for i, expected in enumerate(run_recogniser(model, audio, size)):
        probabilities, embedding, states = recogniser.step(audio[:, i * size : (i + 1) * size].numpy(), states)
        np.testing.assert_allclose(np.concatenate([probabilities, embedding], axis=1), expected, atol=2e-5)


def test_the_golden_vector_is_what_the_file_computes(trained: Trained) -> None:
    recogniser = Recogniser(read_bundle(trained.model))
    golden = recogniser.manifest.golden
    audio, states = Golden.unpack(golden.audio)[None], recogniser.silence(1)
    for i, expected in enumerate(Golden.unpack(golden.audio_out).reshape(-1, 2)):
        probabilities, _, states = recogniser.step(audio[:, 512 * i : 512 * (i + 1)], states)
        np.testing.assert_allclose(probabilities[0], expected, atol=2e-5)


def test_what_is_exported_is_calibrated_as_the_run_was(trained: Trained) -> None:
    model = load_recogniser(Path(trained.said["best_checkpoint"])).recogniser
    assert float(model.temperature) != 1.0
    recipe = load_recipe(trained.place / "tiny.toml")
    library = load_library(recipe.style, trained.place, recipe.data, 48_000, trained.place / "cache")
    batches = RecogniseObjective.validation_batches(library, recipe)
    recogniser = Recogniser(read_bundle(trained.model))
    likelihoods = []
    for batch in batches:
        probabilities, _, _ = recogniser.step(batch.raw.numpy(), recogniser.silence(len(batch.raw)))
        likelihoods += (-np.log(probabilities[np.arange(len(batch.raw)), batch.style.numpy()])).tolist()
    card = load_recogniser(Path(trained.said["best_checkpoint"])).card
    assert np.mean(likelihoods) == pytest.approx(card["metrics"]["validation/loss"], abs=1e-3)


def test_the_command_recognises_with_it_and_leaves_out_what_it_learned_from(trained: Trained) -> None:
    def run(*arguments: str) -> Any:
        command = ["recognise", str(trained.place), "--model", str(trained.model), "--json", *arguments]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    unseen, everything = run(), run("--with-known")
    assert (unseen["recordings"], unseen["left_out_known"]) == (2, 9)
    assert (everything["recordings"], everything["left_out_known"]) == (11, 0)
    assert everything["accuracy"] > 0.6


def test_a_run_goes_on_where_it_stopped_and_begins_with_no_other(trained: Trained) -> None:
    more = trained.train("--json", "--set", "trainer.steps=42")
    assert more.exit_code == 0, more.output
    assert json.loads(more.stdout)["steps"] == 42
    other = ["--out", str(trained.place / "other"), "--from", trained.said["last_checkpoint"]]
    refused = trained.train(*other)
    assert refused.exit_code == 1 and "begins with no other run" in refused.output.replace("\n", "")
    changed = trained.train("--set", "recogniser.band_count=32")
    assert changed.exit_code == 1


def test_a_graph_that_differs_is_not_written(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_recogniser(Path(trained.said["best_checkpoint"]))
    torch.manual_seed(1)
    other = StreamingRecogniser(loaded.recipe.spectral, loaded.recipe.recogniser, 2).eval()
    right = export.recogniser.build_recogniser_graph
    monkeypatch.setattr(export.recogniser, "build_recogniser_graph", lambda _, hop: right(other, hop))
    with pytest.raises(VerifyError, match=r"differ by .* no file was written"):
        export_recogniser(loaded, tmp_path / "m.onnx", verify_hops=100)
    assert not list(tmp_path.iterdir())


def test_a_short_recording_is_one_excerpt(trained: Trained) -> None:
    found = recognise_file(Recogniser(read_bundle(trained.model)), trained.place / "sax" / "alto_sax_a30.flac")
    assert len(found.excerpts) == 1 and found.excerpts[0].start_seconds == 0.0
    assert np.linalg.norm(found.embedding) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("spectral.analysis_window_samples=2048", "must be the square of a multiple of 4"),
        ("recogniser.dropout=1.0", "recogniser.dropout"),
        ("recogniser.highest_hz=30000", "at most half the sample rate"),
        ("phrases.minutes_per_style=1", "phrases.pair_share: the objective 'recognise' hears phrases, not pairs"),
    ],
)
def test_a_recipe_that_no_recogniser_can_have_is_refused(tmp_path: Path, change: str, complaint: str) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    with pytest.raises(RecipeError, match=complaint):
        load_recipe(tmp_path / "tiny.toml", [change])


def test_one_style_alone_cannot_be_told_apart(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(
        f'objective = "recognise"\n[spectral]\nhop_samples = 512\nsynthesis_window_samples = 512\n{SAX_STYLE}'
    )
    with pytest.raises(RecipeError, match="needs two of them"):
        load_recipe(tmp_path / "tiny.toml")


@given(st.integers(0, 2**31), st.floats(0.2, 5.0, allow_subnormal=False))
def test_scores_that_are_too_sure_by_a_factor_are_divided_by_it(seed: int, factor: float) -> None:
    random = np.random.default_rng(seed)
    scores = random.normal(0.0, 2.0, (4_000, 3))
    chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    style = (random.uniform(size=(4_000, 1)) > chances.cumsum(axis=1)).sum(axis=1).clip(max=2)
    found = fit_temperature((factor * scores).astype(np.float32), style)
    assert found == pytest.approx(factor, rel=0.15)


@given(st.floats(-12.0, 12.0, allow_subnormal=False))
def test_a_tone_at_another_speed_is_a_tone_of_another_pitch(semitones: float) -> None:
    rate, samples = 48_000, 4_800
    raw = torch.sin(2 * math.pi * 200.0 * torch.arange(2 * samples) / rate)[None]
    moved = at_speeds(raw, torch.tensor([semitones]), samples)
    expected = torch.sin(2 * math.pi * 200.0 * 2.0 ** (semitones / 12.0) * torch.arange(samples) / rate)
    # The last sample of one is the last of the other, so the end is off by up to a sample and a half: 0.04 radians.
    assert float((moved[0] - expected).abs().max()) < 0.05


def test_a_recogniser_may_learn_from_what_misleads_it(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE.replace("pitch_semitones = 1.0", "pitch_semitones = 1.0\nattack_db = 3"))
    net = load_recogniser(Path(trained.said["best_checkpoint"])).recogniser
    losses = {}
    for name, recipe in (("plain", trained.place / "tiny.toml"), ("attacked", tmp_path / "tiny.toml")):
        module = RecogniseObjective(load_recipe(recipe), {})
        module.recogniser.load_state_dict(net.state_dict())
        module.recogniser.eval()
        clips = [soundfile.read(CLIPS / f"{clip}.flac", dtype="float32", frames=36_000)[0] for clip in NOTES]
        raw, style = torch.from_numpy(np.stack(clips)), torch.tensor([0, 1])
        said = module.hear(raw, torch.Generator().manual_seed(0), style).scores[:, -1]
        losses[name] = float(torch.nn.functional.cross_entropy(said, style).detach())
    assert losses["attacked"] > 1.2 * losses["plain"]


NOTES = ("alto_sax_a3", "vibraphone_418hz")
JUDGED = """[adversary]
weight = 0.3
style_weight = 0.7
likeness_weight = 1.0
classifiers = 0
recognisers = ["run/best.ckpt"]
[trainer]
steps = 3
batch_size = 4
validation_every_steps = 3
validation_segments = 1
log_every_steps = 1
"""


def test_a_recogniser_that_learned_judges_the_styles_of_a_run(trained: Trained) -> None:
    net = load_recogniser(Path(trained.said["best_checkpoint"])).recogniser
    judge = RecogniserJudge(net, ["sax", "vibraphone"], ["vibraphone", "sax"])
    alone = RecogniserJudge(net, ["sax", "vibraphone"], ["vibraphone"])
    random = torch.Generator()
    for row, clip in enumerate(reversed(NOTES)):
        audio, _ = soundfile.read(CLIPS / f"{clip}.flac", dtype="float32", frames=24_000)
        heard = torch.from_numpy(audio).requires_grad_()
        scores = judge(heard.expand(8, -1), random.manual_seed(0))
        assert float((scores.argmax(dim=1) == row).float().mean()) > 0.6
        assert torch.equal(alone(heard.expand(8, -1), random.manual_seed(0)), scores[:, :1])
        (slope,) = torch.autograd.grad(scores[:, row].sum(), heard)
        assert bool(torch.isfinite(slope).all()) and float(slope.abs().max()) > 0.0
    assert not any(weight.requires_grad for weight in judge.parameters())


def test_recognisers_teach_a_run_in_place_of_classifiers(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.toml").write_text(f"{tiny_recipe(0.1)}{JUDGED}{SAX_STYLE}{VIBRAPHONE_STYLE}")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(trained.place)
    recipe = load_recipe(tmp_path / "run.toml")
    library = load_library(recipe.style, trained.place, recipe.data, recipe.spectral.sample_rate, tmp_path)
    assert prepare_teachers(recipe, library, tmp_path, lambda *_: pytest.fail("there is nothing to learn")) is None
    assert len(read_judges(recipe)) == 1
    options = RunOptions(tmp_path / "out", accelerator="cpu", devices="1", progress=False)
    result = run_training(recipe, library, options)
    stored = read_checkpoint(result.last_checkpoint)["state_dict"]
    assert not any("classifier" in name or "recogniser" in name for name in stored)
    assert any(name.startswith("critic.") for name in stored)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    taken = [event.value for event in events.Scalars("train/style_taken")]
    assert len(taken) == 3 and all(0.0 <= share <= 1.0 for share in taken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("run/best.ckpt", "nowhere.ckpt"), "there is no such checkpoint; train one with restyle train"),
        (("run/best.ckpt", "other/last.ckpt"), "is a run of 'restore'; train one with"),
        (('id = "sax"', 'id = "oboe"'), "does not know the style 'oboe'; train one with"),
        (
            ("[adversary]", "[spectral]\nsample_rate = 44100\n[adversary]"),
            "hears 48000 Hz and not 44100 Hz; train one with",
        ),
    ],
)
def test_recognisers_that_cannot_judge_a_run_are_refused_before_it(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], message: str
) -> None:
    text = f"{tiny_recipe(0.1)}{JUDGED}{SAX_STYLE}{VIBRAPHONE_STYLE}"
    assert change[0] in text
    (tmp_path / "run.toml").write_text(text.replace(*change))
    monkeypatch.chdir(trained.place)
    if "other" in change[1]:
        card = {"format": CHECKPOINT_FORMAT, "objective": "restore"}
        (tmp_path / "other").mkdir()
        torch.save({CHECKPOINT_KEY: card, "state_dict": {}}, tmp_path / "other/last.ckpt")
        monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_judges(load_recipe(tmp_path / "run.toml"))


def test_a_missing_recogniser_is_said_before_the_recordings_are_read(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f"{tiny_recipe(0.1)}{JUDGED}{SAX_STYLE}{VIBRAPHONE_STYLE}")
    result = CliRunner().invoke(app, ["train", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out")])
    said = " ".join((result.output + result.stderr).split())
    assert result.exit_code == 1 and "run/best.ckpt: adversary.recognisers: there is no such checkpoint" in said
    assert not list(tmp_path.glob("out/*"))


def test_a_recogniser_that_hears_longer_stretches_than_a_run_makes_is_refused(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = read_checkpoint(Path(trained.said["best_checkpoint"]))
    spectral = stored[CHECKPOINT_KEY]["recipe"]["spectral"]
    spectral |= {"hop_samples": 2048, "synthesis_window_samples": 2048, "analysis_window_samples": 4096}
    (tmp_path / "run").mkdir()
    torch.save(stored, tmp_path / "run/best.ckpt")
    text = f"{tiny_recipe(0.1)}{JUDGED}{SAX_STYLE}{VIBRAPHONE_STYLE}"
    (tmp_path / "run.toml").write_text(text.replace("classifiers = 0", "classifiers = 0\nspeed_semitones = 24"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"hears 2048 samples at a time .* raise data\.segment_seconds"):
        read_judges(load_recipe(tmp_path / "run.toml"))
