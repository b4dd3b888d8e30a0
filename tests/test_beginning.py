"""A model file is enough for a new run to go on from: weights, style vectors by id, and what was heard before."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from export.writer import card_of  # noqa: E402
from realtime.bundle import WEIGHTS_KEY, read_bundle  # noqa: E402
from realtime.cli import app  # noqa: E402
from tests.conftest import SAX_STYLE, VIBRAPHONE_STYLE, tiny_recipe, write_notes  # noqa: E402
from training.beginning import load_beginning, load_model_for_export  # noqa: E402
from training.checkpoint import CheckpointError, load_for_export  # noqa: E402
from training.recipe import load_recipe  # noqa: E402

RECIPE = f"""{tiny_recipe(0.4)}
[encoder]
share = 0.5
[trainer]
steps = 2
batch_size = 2
average_decay = 0.5
validation_every_steps = 2
validation_segments = 1
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class First:
    """A run with both styles, and the model file exported from it."""

    place: Path
    checkpoint: Path
    model: Path

    def train(self, out: str, *arguments: object) -> Result:
        paths = ["--data", self.place, "--out", self.place / out, "--cache", self.place / "cache"]
        return command("train", *arguments, *paths, "--accelerator", "cpu", "--devices", "1", "--json")


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> First:
    place = tmp_path_factory.mktemp("beginning")
    write_notes(place, {"sax": 3, "vibraphone": 5})
    (place / "both.toml").write_text(RECIPE + SAX_STYLE + VIBRAPHONE_STYLE)
    (place / "one.toml").write_text(RECIPE + VIBRAPHONE_STYLE)
    first = First(place, place / "first" / "last.ckpt", place / "first.onnx")
    assert first.train("first", place / "both.toml").exit_code == 0
    exported = command("export", first.checkpoint, first.model)
    assert exported.exit_code == 0, exported.output
    return first


def test_a_model_file_carries_what_its_checkpoint_knows_but_for_names_and_judges(first: First) -> None:
    ours, theirs = load_beginning(first.model), load_beginning(first.checkpoint)
    expected = {name for name in theirs.weights if name.startswith(("generator.", "encoder.", "styles."))}
    assert set(ours.weights) == expected
    assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in expected)
    heard, known = ours.card["recordings"]["sax"]["train"], theirs.card["recordings"]["sax"]["train"]
    assert [one["sha256"] for one in heard] == [one["sha256"] for one in known]
    assert not any("name" in one for one in heard)
    assert "carries a style encoder for 'restyle learn', weights for 'restyle train --from'" in " ".join(
        command("info", first.model).output.split()
    )


def test_a_run_begins_with_a_model_file(first: First) -> None:
    result = first.train(
        "more", first.place / "one.toml", "--from", first.model, "--set", "optimiser.warmup_steps=1000"
    )
    assert result.exit_code == 0, result.output
    before = load_for_export(first.checkpoint)
    after = load_for_export(Path(json.loads(result.stdout)["last_checkpoint"]))
    for name, value in before.generator.state_dict().items():
        torch.testing.assert_close(after.generator.state_dict()[name], value, atol=1e-4, rtol=0.0)  # hardly moved yet
    torch.testing.assert_close(after.style_vectors[0], before.style_vectors[1], atol=1e-4, rtol=0.0)
    card, earlier = card_of(after, ""), card_of(before, "")
    assert card.steps == 4 and {source.style for source in card.sources} == {"sax", "vibraphone"}
    assert set(card.recordings_sha256) == set(earlier.recordings_sha256)


def test_the_shipped_model_is_a_beginning_by_its_name(first: First) -> None:
    beginning = load_beginning(Path("bank"))
    assert beginning.path == read_bundle(beginning.path).path
    ids = [style["id"] for style in beginning.card["styles"]]
    assert "violin" in ids and beginning.weights["styles.weight"].shape[0] == len(ids)
    refused = first.train("other", first.place / "one.toml", "--from", "bank")
    assert refused.exit_code == 1 and "begin with a run of the same [model]" in " ".join(refused.output.split())


def edited(first: First, text: str | None) -> Path:
    graph = onnx.load(first.model)
    kept = {item.key: item.value for item in graph.metadata_props if item.key != WEIGHTS_KEY}
    del graph.metadata_props[:]
    onnx.helper.set_model_props(graph, kept if text is None else kept | {WEIGHTS_KEY: text})
    path = first.place / "edited.onnx"
    onnx.save(graph, path)
    return path


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "weights: are missing, so no run can begin with it; export it again, or begin with a checkpoint"),
        ("bm90IGEgemlw", "weights: are damaged"),
        ("%%%", "weights: are damaged"),
    ],
)
def test_what_cannot_be_a_beginning_is_said(first: First, text: str | None, complaint: str) -> None:
    with pytest.raises(CheckpointError, match="edited.onnx: " + complaint):
        load_beginning(edited(first, text))


def test_a_file_that_is_no_model_is_said(first: First, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(np.random.default_rng(0).bytes(400))
    for path, complaint in ((tmp_path / "x.onnx", "not a whole ONNX file"), (tmp_path / "y.onnx", "no such file")):
        with pytest.raises(CheckpointError, match=complaint):
            load_beginning(path)
    assert first.train("none", first.place / "one.toml", "--from", "nothing").exit_code == 1


def test_a_model_file_is_exported_again_by_its_recipe(first: First) -> None:
    """The same sound; and what is not learned may be another."""
    again = first.place / "again.onnx"
    result = command("export", first.model, again, "--recipe", first.place / "both.toml")
    assert result.exit_code == 0, result.output
    before, after = read_bundle(first.model), read_bundle(again)
    assert after.manifest.golden == before.manifest.golden and after.manifest.styles == before.manifest.styles
    assert after.manifest.card.recordings_sha256 == before.manifest.card.recordings_sha256
    assert after.manifest.card.metrics == before.manifest.card.metrics
    ours, theirs = load_beginning(again), load_beginning(first.model)
    assert all(torch.equal(value, ours.weights[name]) for name, value in theirs.weights.items())


def test_a_trait_is_given_to_a_style_that_was_trained_without_it(first: First) -> None:
    slow = first.place / "slow.toml"
    slow.write_text(RECIPE + SAX_STYLE + "slow_attack = true\n" + VIBRAPHONE_STYLE)
    files = {source: first.place / f"slow_{source.suffix[1:]}.onnx" for source in (first.checkpoint, first.model)}
    for source, file in files.items():
        result = command("export", source, file, "--recipe", slow, "--emphasis", "1.2")
        assert result.exit_code == 0, result.output
    golden = [read_bundle(file).manifest.golden for file in (first.model, *files.values())]
    assert golden[1] == golden[2] != golden[0]
    assert read_bundle(files[first.model]).manifest.card.metrics["style_emphasis"] == 1.2
    assert "style_emphasis" not in load_model_for_export(files[first.model], load_recipe(slow)).card["metrics"]


@pytest.mark.parametrize(
    ("source", "arguments", "complaint"),
    [
        ("first.onnx", [], "first.onnx: is a model file; say by which --recipe it was trained"),
        ("first.onnx", ["--recipe", "one.toml"], "was trained by another recipe (style.id: sax, vibraphone)"),
        ("first.onnx", ["--recipe", "hop.toml"], "was trained by another recipe (spectral: "),
        ("first.onnx", ["--recipe", "drive.toml"], "was trained by another recipe (model.drive: 8.0 -> 2.0)"),
        ("first/last.ckpt", ["--recipe", "drive.toml"], "was trained by another recipe (model.drive: 8.0 -> 2.0)"),
        ("first/last.ckpt", ["--recipe", "one.toml"], "was trained by another recipe (style.id:"),
        ("first/last.ckpt", ["--recipe", "none.toml"], "none.toml"),
        (
            "first.onnx",
            ["--recipe", "both.toml", "--mean-with", "first/last.ckpt"],
            "is a model file and no checkpoint",
        ),
        ("none.onnx", ["--recipe", "both.toml"], "none.onnx"),
    ],
)
def test_what_cannot_be_exported_again_is_said(first: First, source: str, arguments: list[str], complaint: str) -> None:
    both = (first.place / "both.toml").read_text()
    for name, added in {
        "hop": "[spectral]\nhop_samples = 256\nsynthesis_window_samples = 256\n[model]\n",
        "drive": "[model]\ndrive = 2.0\n",
    }.items():
        (first.place / f"{name}.toml").write_text(both.replace("[model]\n", added))
    places = [first.place / part if "." in part else part for part in arguments]
    result = command("export", first.place / source, first.place / "no.onnx", *places)
    assert result.exit_code in (1, 2) and complaint in " ".join(result.output.split())
    assert not (first.place / "no.onnx").exists()
