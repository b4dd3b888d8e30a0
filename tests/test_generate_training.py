"""From folders of recordings to a source: it trains by noise alone, is exported with the commands, and plays."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from realtime.bundle import read_bundle  # noqa: E402
from realtime.cli import app  # noqa: E402
from tests.conftest import SAX_STYLE, VIBRAPHONE_STYLE, tiny_recipe, write_notes  # noqa: E402
from training.library import load_library  # noqa: E402
from training.models.noise_player import LOWEST_NOTE, NOTES  # noqa: E402
from training.models.recogniser import RecogniserConfig, train_recogniser  # noqa: E402
from training.objectives.generate import INTENSITIES, noise_excerpt, note_loss  # noqa: E402
from training.recipe import RecipeError, load_recipe  # noqa: E402
from training.train import RunOptions, prepare_teachers, run_training  # noqa: E402

RATE = 48_000
LSTM = ("hidden = 16", 'hidden = 16\nbody = "lstm"')
RECIPE = f"""objective = "generate"
{tiny_recipe(0.4).replace(*LSTM)}
[adversary]
weight = 0.3
style_weight = 0.7
pretraining_phrases = 4
start_step = 2
[trainer]
steps = 4
batch_size = 4
average_decay = 0.5
validation_every_steps = 4
validation_segments = 2
[optimiser]
warmup_steps = 1
{SAX_STYLE}{VIBRAPHONE_STYLE}"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings, the recipe, and what a run with the command left."""
    place = tmp_path_factory.mktemp("generate")
    (place / "tiny.toml").write_text(RECIPE)
    write_notes(place, {"sax": 3, "vibraphone": 5})
    paths = ["--out", place / "run", "--cache", place / "cache", "--json"]
    said = command("train", place / "tiny.toml", *paths, "--accelerator", "cpu", "--devices", "1")
    (place / "said.json").write_text(said)
    return place


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_run_becomes_a_file_that_plays_in_its_styles(place: Path) -> None:
    said: dict[str, Any] = json.loads((place / "said.json").read_text())
    assert said["steps"] == 4 and said["metrics"]["validation/statistics"] > 0.0
    assert {name.rpartition("/")[2] for name in said["metrics"] if "/style/" in name} <= {"sax", "vibraphone"}
    verified = json.loads(command("export", said["last_checkpoint"], place / "tiny.onnx", "--json"))
    assert verified["largest_difference"] < 1e-4
    manifest = read_bundle(place / "tiny.onnx").manifest
    assert (manifest.kind, manifest.card.objective) == ("generate", "generate")
    assert [style.id for style in manifest.styles] == ["sax", "vibraphone"]
    assert {"intensity", "drone"} < {parameter.id for parameter in manifest.parameters}
    for style in ("sax", "vibraphone"):
        out = place / f"{style}.wav"
        command("generate", "--model", place / "tiny.onnx", "--style", style, "--seconds", "1", out)
        audio, rate = soundfile.read(out)
        assert rate == RATE and len(audio) == RATE and 1e-3 < float(np.abs(audio).max()) <= 1.0


def test_a_witness_hears_what_is_made_and_chooses_the_best_checkpoint(place: Path, tmp_path: Path) -> None:
    recipe = load_recipe(place / "tiny.toml")
    library = load_library(recipe.style, place, recipe.data, RATE, place / "cache")
    teachers = prepare_teachers(recipe, library, place / "cache", lambda *_: None)
    assert teachers is not None
    groups = {style.id: (*style.train, *style.validation, *style.test) for style in library.styles}
    witness = train_recogniser(groups, RecogniserConfig(excerpts_per_style=16, passes=2, batch=8))
    options = RunOptions(tmp_path / "run", accelerator="cpu", devices="1", progress=False)
    result = run_training(recipe, library, options, teachers=dataclasses.replace(teachers, witness=witness))
    assert 0.0 <= result.metrics["validation/style_recognised"] <= 1.0 and result.best_checkpoint is not None


def test_noise_is_played_at_many_intensities_and_sometimes_rests() -> None:
    levels = noise_excerpt(200, 400, 0.3, 128 / RATE, 7)
    assert levels.shape == (200, 400) and torch.equal(levels, noise_excerpt(200, 400, 0.3, 128 / RATE, 7))
    played = levels.amax(dim=1)
    assert INTENSITIES[0] <= float(played.min()) < 0.2 < 0.9 < float(played.max()) <= INTENSITIES[1]
    resting = (levels == 0.0).any(dim=1)
    assert 0.15 < float(resting.float().mean()) < 0.4
    assert bool((levels[~resting] == played[~resting, None]).all())
    assert not noise_excerpt(50, 400, 0.0, 128 / RATE, 7).eq(0.0).any()


@pytest.mark.parametrize("note", [45, 57, 69])
def test_notes_are_learned_from_what_recordings_play(note: int) -> None:
    time = torch.arange(RATE // 2) / RATE
    hertz = 440.0 * 2.0 ** ((note - 69) / 12.0)
    audio = 0.2 * torch.stack([torch.sin(2 * torch.pi * k * hertz * time) / k for k in range(1, 6)]).sum(dim=0)[None]
    scores = torch.zeros(1, NOTES)
    assert float(note_loss(scores, audio, RATE)) == pytest.approx(np.log(NOTES), abs=1e-3)
    losses = [float(note_loss(scores.index_fill(1, torch.tensor([n]), 8.0), audio, RATE)) for n in range(NOTES)]
    assert int(np.argmin(losses)) + LOWEST_NOTE == note
    assert float(note_loss(scores, torch.zeros(1, RATE // 2), RATE)) == 0.0  # silence says nothing


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("weight = 0.3\nstyle_weight = 0.7\npretraining_phrases = 4", "weight = 0.0"), "needs a critic"),
        (('body = "lstm"', 'body = "recurrent"'), "plays by an LSTM"),
        (("[adversary]", "[encoder]\nshare = 0.5\n[adversary]"), "hears no input"),
        (("[adversary]", "[generate]\nrest_chance = 2.0\n[adversary]"), "generate.rest_chance"),
    ],
)
def test_what_a_source_cannot_be(tmp_path: Path, change: tuple[str, str], complaint: str) -> None:
    assert change[0] in RECIPE
    (tmp_path / "tiny.toml").write_text(RECIPE.replace(*change))
    with pytest.raises(RecipeError, match=complaint):
        load_recipe(tmp_path / "tiny.toml")
