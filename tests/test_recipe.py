"""Recipes: what they accept, and the text of what they refuse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.conftest import SAX_STYLE, VIBRAPHONE_STYLE  # noqa: E402
from training.recipe import RecipeError, load_recipe, quick_look, recipe_from_dict  # noqa: E402

STYLE = f"\n{SAX_STYLE}"


def write(folder: Path, text: str, style: str = STYLE) -> Path:
    path = folder / "mine.toml"
    path.write_text(text + style, encoding="utf-8")
    return path


RECIPES = Path(__file__).parent.parent / "training" / "recipes"


def test_every_shipped_recipe_loads() -> None:
    paths = sorted(RECIPES.glob("*.toml"))
    assert paths
    for path in paths:
        recipe = load_recipe(path)
        assert all(style.attribution for style in recipe.style), path
        assert recipe_from_dict(recipe.as_dict(), "copy") == recipe


def test_the_first_recipe_names_at_least_four_styles_each_in_a_folder_of_its_own() -> None:
    recipe = load_recipe(RECIPES / "first.toml")
    assert recipe.name == "first"
    assert len(recipe.style) >= 4
    assert len({style.folder for style in recipe.style}) == len(recipe.style)


@pytest.mark.parametrize(
    ("adversary", "phrases"),
    [("weight = 1\nstyle_weight = 1\nclassifiers = 0\nrecognisers = ['a']", 4), ("weight = 1\nclassifiers = 0", 0)],
)
def test_a_quick_look_has_a_classifier_in_place_of_recognisers_that_know_other_styles(
    tmp_path: Path, adversary: str, phrases: int
) -> None:
    quick = quick_look(load_recipe(write(tmp_path, f"[adversary]\n{adversary}\n{VIBRAPHONE_STYLE}"))).adversary
    assert (quick.recognisers, quick.classifiers, quick.pretraining_phrases) == ((), 1, phrases)


def test_a_recipe_of_styles_alone_has_the_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, ""))
    assert (recipe.name, recipe.objective) == ("untitled", "restore")
    spectral = recipe.spectral
    assert (spectral.sample_rate, spectral.hop_samples, spectral.latency_samples) == (48_000, 128, 128)
    assert (spectral.analysis_window_samples, spectral.synthesis_window_samples) == (1024, 128)
    assert (recipe.model.style_dim, recipe.model.band_count, recipe.model.hidden) == (16, 64, 192)
    assert (recipe.trainer.steps, recipe.trainer.batch_size, recipe.trainer.average_decay) == (4000, 8, 0.998)
    assert (recipe.optimiser.learning_rate, recipe.optimiser.betas) == (1e-3, (0.9, 0.99))
    assert recipe.loss.fft_sizes == (256, 512, 1024, 2048, 4096)
    assert recipe.segment_samples == 469 * 128  # 1.25 s are 468.75 hops
    assert recipe.style[0].midi_program == 65


def test_sections_reach_their_fields_and_whole_numbers_serve_as_real_ones(tmp_path: Path) -> None:
    text = "[optimiser]\nlearning_rate = 1\nbetas = [0, 0.5]\n[model]\nhidden = 32\n[spectral]\nhop_samples = 128\n"
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.optimiser.learning_rate, recipe.optimiser.betas) == (1.0, (0.0, 0.5))
    assert isinstance(recipe.optimiser.learning_rate, float)
    assert isinstance(recipe.optimiser.betas[0], float)
    assert recipe.model.hidden == 32
    assert [style.id for style in recipe.style] == ["sax"]


def test_a_segment_is_whole_hops(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "[data]\nsegment_seconds = 1.0\n"))
    assert recipe.segment_samples == 375 * 128  # 48,000 / 128 = 375


def test_plain_values_and_back(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, 'name = "mine"\n[loss]\nfft_sizes = [64]\nmel_band_counts = [8]\n'))
    assert recipe_from_dict(recipe.as_dict(), "copy") == recipe


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[trainer]\nbatchsize = 4\n", "unknown key 'trainer.batchsize'; did you mean 'batch_size'?"),
        ("[trainr]\nsteps = 4\n", "unknown key 'trainr'; did you mean 'trainer'?"),
        ("[trainer]\nzzz = 4\n", "unknown key 'trainer.zzz'; known: average_decay, "),
        ('objective = "restor"\n', "objective: unknown 'restor'; did you mean 'restore'?"),
        ('[trainer]\nsteps = "many"\n', "the field 'trainer.steps' must be int, got 'many' (str)"),
        ("[trainer]\nsteps = 4.5\n", "the field 'trainer.steps' must be int, got 4.5 (float)"),
        ("[trainer]\nsteps = true\n", "the field 'trainer.steps' must be int"),
        ("trainer = 3\n", "the field 'trainer' must be TrainerConfig, got 3 (int)"),
        ("[augment]\nlevel_dbfs = [-40]\n", "the field 'augment.level_dbfs' must be tuple[float, float]"),
        ("[augment]\nlevel_dbfs = [-10, -40]\n", "augment.level_dbfs: the first value must not be above the second"),
        ("[optimiser]\nlearning_rate = nan\n", "the field 'optimiser.learning_rate' must be a finite number"),
        ("[optimiser]\nlearning_rate = 0\n", "optimiser.learning_rate: must be above zero, got 0"),
        ("[loss]\nfft_sizes = [100]\n", "loss.fft_sizes: must be powers of two"),
        ("[loss]\nfft_sizes = [256]\n", "loss.mel_band_counts: needs one value for each of the 1 fft_sizes, got 5"),
        ("[loss]\nfft_sizes_per_step = 6\n", "loss.fft_sizes_per_step: must lie between 0 and 5, got 6"),
        ("[model]\nhidden = 0\n", "model.hidden: must be at least 2, got 0"),
        ('[model]\nbody = "wide"\n', "model.body: must be one of recurrent, lstm, convolutional, unet, got 'wide'"),
        ('[model]\nsignals = ["noise", "noise"]\n', "model.signals: must be some of input, driven, pulses, noise"),
        ('[model]\nanswer = "spectrum"\n[loss]\nsteadiness = 1.0\n', "loss.steadiness: holds gains still"),
        ("[adversary]\nstyle_weight = 0.5\n", "adversary.style_weight: needs adversary.weight above zero"),
        ("[spectral]\nhop_samples = 0\n", "hop_samples: must be above zero"),
        (
            "[spectral]\nhop_samples = 32\n",
            "synthesis_window_samples: must be hop_samples (32) or twice as many, got 128",
        ),
        (
            "[spectral]\nsynthesis_window_samples = 256\n",
            "spectral.synthesis_window_samples: must be 128 for model.answer = 'gains', got 256",
        ),
        (
            "[model]\nanswer = 'spectrum'\n",
            "spectral.synthesis_window_samples: must be 256 for model.answer = 'spectrum', got 128",
        ),
        (
            f"[optimiser]\nlearning_rate = 1{'0' * 400}\n",
            "the field 'optimiser.learning_rate' must be float, got '1000",
        ),
        (f"[trainer]\nsteps = 1{'0' * 5000}\n", "is not TOML"),
        ("[optimiser]\nlearning_rate = inf\n", "the field 'optimiser.learning_rate' must be a finite number, got inf"),
        ("[optimiser]\nlearning_rate = true\n", "the field 'optimiser.learning_rate' must be float"),
        ("[optimiser]\nbetas = [0.9, 1.0]\n", "optimiser.betas: must both lie between 0 and 1, 1 not included"),
        ("[optimiser]\nbetas = [0.9]\n", "the field 'optimiser.betas' must be tuple[float, float]"),
        ("[loss]\nmel_band_counts = [0, 1, 1, 1, 1]\n", "loss.mel_band_counts: must be at least 1 each"),
        (
            "[loss]\nspectral_convergence = 0\nlog_magnitude = 0\nlog_mel = 0\nlevel = 0\n",
            "loss.ms_ssim, loss.level, loss.mse: all are zero; give one of them a weight",
        ),
        (
            "[model]\nbody = 'unet'\nband_count = 40\n",
            "model.band_count: must be a multiple of 16 for model.body = 'unet'",
        ),
        ("[model]\nscale = 'bark'\n", "model.scale: must be one of mel, linear, got 'bark'"),
        (
            "[loss]\nms_ssim = 1\n[data]\nsegment_seconds = 0.2\n",
            "loss.ms_ssim: needs data.segment_seconds of at least 0.256, got 0.2",
        ),
        ("[adversary]\nrecognisers = ['a']\n", "adversary.recognisers: need adversary.style_weight above zero"),
        (
            "[adversary]\nweight = 1\nstyle_weight = 1\nclassifiers = 0\n",
            "adversary.classifiers: none, and no adversary.recognisers or listeners; one of them has to know styles",
        ),
        (
            "[adversary]\nweight = 1\nstyle_weight = 1\nclassifiers = 0\nrecognisers = ['a']\n"
            "pretraining_phrases = 4\n",
            "adversary.pretraining_phrases: needs adversary.classifiers or listeners above zero",
        ),
        (
            "[adversary]\nweight = 1\nstyle_weight = 1\nclassifiers = 0\nlisteners = 2\n",
            "adversary.listeners: need adversary.pretraining_phrases above zero, to learn from",
        ),
        (
            "[adversary]\nweight = 1\nstyle_weight = 1\nrecognisers = ['a']\nlikeness_weight = 4\n",
            "adversary.likeness_weight: needs adversary.pretraining_phrases above zero; a classifier that still learns",
        ),
        (
            "[adversary]\nattacked_classifiers = 1\n",
            "adversary.attacked_classifiers: needs adversary.pretraining_phrases above zero",
        ),
        (
            "[adversary]\nweight = 1\nstyle_weight = 1\npretraining_phrases = 4\nattacked_classifiers = 2\n",
            "adversary.attacked_classifiers: must be at most adversary.classifiers, 1, got 2",
        ),
        (
            "[adversary]\nswitching = true\n",
            "adversary.switching: needs adversary.weight, objective = 'restore', data.segments_in_a_row above 1",
        ),
        ("[adversary]\nspeed_semitones = 25\n", "adversary.speed_semitones: must be at most 24, got 25"),
        ("[adversary]\nloss = 'wasserstein'\n", "adversary.loss: must be one of hinge, least_squares, bce"),
        ("[trainer]\nseed = 4294967296\n", "trainer.seed: must be at most 4294967295, got 4294967296"),
        ("[trainer]\naverage_decay = 1\n", "trainer.average_decay: must lie between 0 and 1, 1 not included; got 1"),
        ("[augment]\npitch_semitones = 200\n", "augment.pitch_semitones: must be at most 24, got 200"),
        ("[augment]\nlowpass_order = [-1, 2]\n", "augment.lowpass_order: must not be below zero, got -1"),
        ("[augment]\ncomb_seconds = [-1, 2]\n", "augment.comb_seconds: must not be below zero, got -1"),
        ("[augment]\nattack_db = -1\n", "augment.attack_db: must be at least 0, got -1"),
        ("[augment]\ncomb_depth = 1\n", "augment.comb_depth: must be at most 0.95, got 1"),
        ("[augment]\nidentity_chance = 1.5\n", "augment.identity_chance: must lie between 0 and 1, got 1.5"),
        ("[data]\nsegment_seconds = 0\n", "data.segment_seconds: must be at least 0.1, got 0"),
        ("[data]\npiece_seconds = [0.01, 1]\n", "data.piece_seconds: the shortest piece must be at least four times"),
        (
            "[data]\nsegment_seconds = 0.1\n[spectral]\nhop_samples = 4096\nanalysis_window_samples = 8192\n"
            "synthesis_window_samples = 8192\n[model]\nanswer = 'spectrum'\n",
            "data.segment_seconds: 0.1 s leave 0 samples after the model's delay",
        ),
        ('name = "../mine"\n', "name: '../mine' cannot name a folder"),
        ("[data]\nworkers = -1\n", "data.workers: must be at least 0, got -1"),
        ("steps = \n", "is not TOML"),
    ],
)
def test_what_is_refused_and_how(tmp_path: Path, text: str, complaint: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError, match=re.escape(complaint)) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("style", "complaint"),
    [
        ("", "the field 'style' is missing"),
        ("style = []", "the recipe names no style"),
        ("style = [1]", "the field 'style' must be"),
        (STYLE.replace("[[style]]", "[style]"), "the field 'style' must be a list of tables; write [[style]]"),
        (STYLE.replace("65", '"sax"'), "the field 'style.midi_program' must be int, got 'sax' (str)"),
        (STYLE.replace("65", "65.0"), "the field 'style.midi_program' must be int, got 65.0 (float)"),
        (STYLE.replace("65", "-1"), "style.midi_program: must lie between 0 and 127, got -1"),
        (STYLE.replace('folder = "sax"', ""), "the field 'style.folder' is missing; add it"),
        (STYLE + STYLE, "style.id: 'sax' is named twice"),
        (STYLE.replace('"sax"', '"Alto Sax"', 1), "style.id: 'Alto Sax' is not snake_case"),
        (STYLE.replace("65", "128"), "style.midi_program: must lie between 0 and 127, got 128"),
        (STYLE.replace('licence = "CC0-1.0"', ""), "is missing; add it"),
        (STYLE.replace('"CC0-1.0"', '" "'), "style.licence: is empty in style 'sax'"),
        (STYLE.replace("label", "lable"), "unknown key 'style[0].lable'; did you mean 'label'?"),
    ],
)
def test_styles_are_checked(tmp_path: Path, style: str, complaint: str) -> None:
    path = write(tmp_path, "", style)
    with pytest.raises(RecipeError, match=re.escape(complaint)) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_one_that_is_not_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml: cannot be read .*check the path"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match=r"cannot be read \(Is a directory\)"):
        load_recipe(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary\.toml: is not UTF-8 text"):
        load_recipe(tmp_path / "binary.toml")


@pytest.mark.parametrize("values", [None, [], [1], 3, "text"])
def test_plain_values_that_are_no_table_are_refused(values: Any) -> None:
    with pytest.raises(RecipeError, match="mine: must be a table of fields, got "):
        recipe_from_dict(values, "mine")


def test_fields_can_be_set_beside_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, 'name = "mine"\n[trainer]\nsteps = 9\n')
    changes = ["trainer.steps=400", "model.body=convolutional", 'model.signals=["input"]', "name=other"]
    recipe = load_recipe(path, changes)
    assert (recipe.trainer.steps, recipe.model.body, recipe.model.signals) == (400, "convolutional", ("input",))
    assert recipe.name == "other"
    assert load_recipe(path).trainer.steps == 9


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("trainer.steps", "--set trainer.steps: must be section.field=value"),
        ("=4", "must be section.field=value"),
        ("trainer..steps=4", "must be section.field=value"),
        ("trainer.step=4", r"mine.toml --set trainer.step=4: unknown key 'trainer.step'; did you mean 'steps'\?"),
        ("trainer.steps=many", "the field 'trainer.steps' must be int, got 'many'"),
        ("style.id=a", "'style' has no fields that could be set so"),
        ("name.first=a", "'name' has no fields that could be set so"),
    ],
)
def test_a_field_that_cannot_be_set_is_named(tmp_path: Path, change: str, problem: str) -> None:
    path = write(tmp_path, 'name = "mine"\n')
    with pytest.raises(RecipeError, match=problem):
        load_recipe(path, [change])


def test_a_recipe_builds_on_another(tmp_path: Path) -> None:
    write(tmp_path, "[trainer]\nsteps = 70\nseed = 3\n")
    (tmp_path / "more").mkdir()
    path = tmp_path / "more" / "longer.toml"
    path.write_text('base = "../mine.toml"\nname = "longer"\n[trainer]\nsteps = 90\n')
    recipe, base = load_recipe(path, ["optimiser.warmup_steps=7"]), load_recipe(tmp_path / "mine.toml")
    assert (recipe.name, recipe.trainer.steps, recipe.trainer.seed) == ("longer", 90, 3)
    assert recipe.optimiser.warmup_steps == 7 and recipe.style == base.style
    assert recipe_from_dict(recipe.as_dict(), "again") == recipe


@pytest.mark.parametrize(
    ("base", "complaint"),
    [
        ('"gone.toml"', r"mine\.toml: base: .*gone\.toml: cannot be read \(No such file"),
        ('"mine.toml"', r"mine\.toml: base: 'mine\.toml' builds on this recipe itself"),
        ("7", r"mine\.toml: the field 'base' must be the name of a recipe file, got 7"),
    ],
)
def test_a_base_that_cannot_be_built_on_is_refused(tmp_path: Path, base: str, complaint: str) -> None:
    path = write(tmp_path, "")
    path.write_text(f"base = {base}\n{path.read_text()}")
    with pytest.raises(RecipeError, match=complaint):
        load_recipe(path)
