"""Training a composer: held-out tunes stay held out, batches go on where they stopped, the file computes the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

from export.notes import export_composer  # noqa: E402
from export.verify import VerifyError  # noqa: E402
from realtime.bundle import COMPOSER_MODEL, read_bundle  # noqa: E402
from realtime.cli import app  # noqa: E402
from realtime.notes import Note, make_vocabulary  # noqa: E402
from realtime.tunes import read_tune, write_tune  # noqa: E402
from training.checkpoint import load_composer, read_checkpoint  # noqa: E402
from training.models.composer import Composer, ComposerConfig  # noqa: E402
from training.ngrams import perplexity, witten_bell  # noqa: E402
from training.objectives.compose import ComposeObjective, surprise  # noqa: E402
from training.recipe import Recipe, TunesConfig, load_recipe  # noqa: E402
from training.tunes import (  # noqa: E402
    IGNORED,
    SPLITS,
    TrainingTune,
    TuneBatches,
    TuneLibrary,
    TunesError,
    group_tunes,
    held_out_batches,
    load_tunes,
    tokenise,
    top_line,
    varied,
    vocabulary_of,
)

TUNES = Path(__file__).parent / "data"
pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = """
name = "tiny"
objective = "compose"
[composer]
embedding_dim = 8
hidden = 12
dropout = 0.0
[tunes]
segment_events = 16
transpose_semitones = 3
[trainer]
steps = 6
batch_size = 3
validation_every_steps = 3
checkpoint_every_steps = 2
log_every_steps = 1
[optimiser]
learning_rate = 0.01
warmup_steps = 1
[[style]]
id = "tunes"
label = "Tunes"
folder = "tunes"
midi_program = 73
licence = "CC-BY-4.0"
attribution = "Ceol Rince na hEireann"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a recipe and stretches of two real tunes, each a tune of its own."""
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "tunes").mkdir()
    for path in sorted(TUNES.glob("*.mid")):
        tune = read_tune(path)
        for number, at in enumerate(range(0, 96, 24)):
            part = tune.notes[at : at + 24]
            moved = tuple(dataclasses.replace(n, start_ticks=n.start_ticks - part[0].start_ticks) for n in part)
            name = f"{path.stem}_{'abcd'[number]}.mid"
            write_tune(tmp_path / "tunes" / name, dataclasses.replace(tune, notes=moved))
    return tmp_path


def loaded(place: Path) -> tuple[Recipe, TuneLibrary]:
    recipe = load_recipe(place / "tiny.toml")
    return recipe, load_tunes(recipe.style, place, recipe.tunes, recipe.data.split_seed)


def command(place: Path, *arguments: str) -> Result:
    common = ["--out", str(place / "run"), "--accelerator", "cpu", "--devices", "1", "--json"]
    return CliRunner().invoke(app, ["train", str(place / "tiny.toml"), *common, *arguments])


def tune(name: str, notes: tuple[Note, ...]) -> TrainingTune:
    return TrainingTune(name, name, 1.0, notes)


# -- which tunes ------------------------------------------------------------------------------------------------------


def test_copies_settings_and_numbered_files_of_a_tune_are_one_group() -> None:
    jig, reel = (read_tune(TUNES / name).notes for name in ("sligo_jig.mid", "wind_that_shakes_the_barley.mid"))
    higher = tuple(dataclasses.replace(note, pitch=note.pitch + 5) for note in jig)
    shortened = jig[: len(jig) // 2]
    tunes = [
        tune("Sligo Jig.mid", jig),
        tune("another name.mid", higher),
        tune("a part of it.mid", shortened),
        tune("Barley 1.mid", reel),
        tune("barley-2.mid", tuple(reversed([dataclasses.replace(n, start_ticks=9999 - n.start_ticks) for n in reel]))),
    ]
    groups = [{one.name for one in group} for group in group_tunes(tunes, 0.25)]
    assert sorted(groups, key=len) == [
        {"Barley 1.mid", "barley-2.mid"},
        {"Sligo Jig.mid", "another name.mid", "a part of it.mid"},
    ]


def test_a_copy_is_skipped_and_a_group_is_never_split(place: Path) -> None:
    for path in list((place / "tunes").iterdir()):
        shutil.copy(path, path.with_stem(f"{path.stem} again"))
        raised = read_tune(path)
        notes = tuple(dataclasses.replace(note, pitch=note.pitch + 2) for note in raised.notes)
        write_tune(path.with_stem(f"{path.stem} 2"), dataclasses.replace(raised, notes=notes))
    (place / "tunes" / "damaged.mid").write_bytes(b"MThd")
    _, library = loaded(place)
    reasons = sorted(skipped.reason for skipped in library.skipped)
    assert sum("is a copy of" in reason for reason in reasons) == 8
    assert sum("is not a standard MIDI file" in reason for reason in reasons) == 1
    where = {one.name.replace(" 2", ""): split for split in SPLITS for one in library.split(split)}
    for split in SPLITS:
        assert library.split(split)
        assert all(where[one.name.replace(" 2", "")] == split for one in library.split(split))
    assert sum(len(library.split(split)) for split in SPLITS) == 16


def test_no_folder_no_files_and_too_few_tunes_are_named(place: Path) -> None:
    recipe = load_recipe(place / "tiny.toml")
    with pytest.raises(TunesError, match=r"there is no folder .*elsewhere"):
        load_tunes(recipe.style, place / "elsewhere", recipe.tunes, 0)
    for path in list((place / "tunes").iterdir())[1:]:
        path.unlink()
    with pytest.raises(TunesError, match="at least three melodies"):
        load_tunes(recipe.style, place, recipe.tunes, 0)
    shutil.rmtree(place / "tunes")
    (place / "tunes").mkdir()
    with pytest.raises(TunesError, match="no MIDI files"):
        load_tunes(recipe.style, place, recipe.tunes, 0)


def test_the_top_line_of_chords_is_the_melody() -> None:
    chords = [
        Note(0, 48, 50, 80),
        Note(0, 24, 74, 80),
        Note(12, 12, 54, 80),
        Note(24, 24, 76, 80),
        Note(36, 12, 78, 80),
    ]
    assert top_line(chords) == (Note(0, 24, 74, 80), Note(24, 12, 76, 80), Note(36, 12, 78, 80))


# -- batches ----------------------------------------------------------------------------------------------------------


def test_rows_read_every_tune_once_a_turn_from_end_to_end(place: Path) -> None:
    recipe, library = loaded(place)
    recipe = dataclasses.replace(
        recipe, tunes=dataclasses.replace(recipe.tunes, transpose_semitones=0, touch_chance=0.0)
    )
    tunes = tokenise(library.split("train"), vocabulary_of(library, recipe.tunes))
    batches = TuneBatches(tunes, recipe, 0, 0)
    steps = sum(math.ceil((len(tokens) - 1) / 16) for tokens in tunes.tunes)
    read = [batches.batch(step) for step in range(steps)]
    for row in range(recipe.trainer.batch_size):
        whole: list[list[int]] = []
        for batch in read:
            if bool(batch.begins[row]):
                whole.append([int(batch.tokens[row, 0])])
            targets = batch.targets[row]
            whole[-1] += targets[targets != IGNORED].tolist()
        assert sorted(whole) == sorted(tokens.tolist() for tokens in tunes.tunes)


def test_a_batch_is_a_function_of_seed_number_and_process(place: Path) -> None:
    recipe, library = loaded(place)
    tunes = tokenise(library.split("train"), vocabulary_of(library, recipe.tunes))
    iterated = iter(TuneBatches(tunes, recipe, 2, 0))
    next(iterated)
    one, again = next(iterated), TuneBatches(tunes, recipe, 0, 0).batch(3)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.tokens, TuneBatches(tunes, recipe, 0, 1).batch(3).tokens)


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_a_varied_tune_keeps_its_rhythm_and_its_melody_in_another_key(seed: int) -> None:
    notes = read_tune(TUNES / "sligo_jig.mid").notes
    words = make_vocabulary(40, 90)
    tunes = tokenise([tune("jig", notes)], words)
    random = np.random.default_rng(seed)
    made = words.decode(varied(tunes, 0, TunesConfig(transpose_semitones=6, touch_chance=0.5), random).tolist())
    shift = made[0].pitch - notes[0].pitch
    assert abs(shift) <= 6
    assert [note.pitch - shift for note in made] == [note.pitch for note in notes]
    assert [note.start_ticks for note in made] == [note.start_ticks for note in notes]
    assert all(new.duration_ticks <= old.duration_ticks for new, old in zip(made, notes, strict=True))


def test_held_out_tunes_are_read_whole_and_once() -> None:
    words = make_vocabulary()
    notes = read_tune(TUNES / "sligo_jig.mid").notes
    tunes = tokenise([tune(str(size), notes[:size]) for size in (5, 9, 3)], words)
    batches = held_out_batches(tunes, 2)
    counted = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
    assert counted == sum(len(tokens) - 1 for tokens in tunes.tunes) and all(bool(b.begins.all()) for b in batches)


# -- the baselines ----------------------------------------------------------------------------------------------------


def test_witten_bell_by_hand() -> None:
    train, held_out = [np.array([0, 1, 0, 1])], [np.array([0, 1, 1, 2])]
    # Two kinds in four tokens, mixed with the uniform 1/3; then by the token before, the beginning being one, too.
    zero, one, two = (2 + 2 / 3) / 6, (2 + 2 / 3) / 6, (2 / 3) / 6
    assert witten_bell(train, held_out, 0, 3) == pytest.approx([zero, one, one, two])
    after_begin, after_zero = (1 + zero) / 2, (2 + one) / 3
    one_after_one, two_after_one = one / 2, two / 2
    wanted = [after_begin, after_zero, one_after_one, two_after_one]
    assert witten_bell(train, held_out, 1, 3) == pytest.approx(wanted)
    assert perplexity(np.array(wanted)) == pytest.approx(np.prod(wanted) ** -0.25)


@settings(max_examples=20)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=20), min_size=1, max_size=4), st.integers(0, 4))
def test_a_baseline_s_probabilities_add_up_to_one(sequences: list[list[int]], order: int) -> None:
    train = [np.array(tokens) for tokens in sequences]
    context = sequences[0][:3]
    each = [witten_bell(train, [np.array([*context, token])], order, 5)[-1] for token in range(5)]
    assert sum(each) == pytest.approx(1.0)
    assert min(each) > 0


# -- the model --------------------------------------------------------------------------------------------------------


def test_any_pieces_of_a_tune_give_the_same_logits_and_none_hears_the_future() -> None:
    torch.manual_seed(0)
    composer = Composer(ComposerConfig(8, 12, 2, 0.0), 20).eval()
    tokens = torch.randint(20, (3, 40))
    with torch.no_grad():
        whole, end = composer(tokens, composer.init_state(3))
        state, pieces = composer.init_state(3), []
        for piece in tokens.split([1, 7, 16, 1, 15], dim=1):
            logits, state = composer(piece, state)
            pieces.append(logits)
        changed = tokens.clone()
        changed[:, 20:] = 0
        past, _ = composer(changed, composer.init_state(3))
        alone, _ = composer(tokens[1:2], composer.init_state(1))
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-6)
    assert torch.allclose(state.hidden, end.hidden, atol=1e-6) and torch.allclose(state.cell, end.cell, atol=1e-6)
    assert torch.equal(past[:, :20], whole[:, :20])
    assert torch.allclose(alone[0], whole[1], atol=1e-6)


def test_the_state_goes_on_within_a_tune_and_starts_at_zeros_in_the_next(place: Path) -> None:
    recipe, library = loaded(place)
    torch.manual_seed(0)
    objective = ComposeObjective(recipe, {})
    objective.log = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]
    tunes = tokenise(library.split("train"), vocabulary_of(library, recipe.tunes))
    batches = TuneBatches(tunes, recipe, 0, 0)
    states = []
    for step in range(8):
        batch = batches.batch(step)
        before = objective._state_before(batch)
        assert not before.hidden[batch.begins].any()
        if states:
            assert torch.equal(before.hidden[~batch.begins], states[-1][~batch.begins])
        objective.training_step(batch, step)
        assert objective._carried is not None and not objective._carried.hidden.requires_grad
        states.append(objective._carried.hidden)


def test_surprise_is_cross_entropy_where_there_is_a_target() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    found = surprise(logits, torch.tensor([[1, IGNORED]]))
    assert found.tolist() == [[pytest.approx(math.log(4.0)), 0.0]]


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_trains_goes_on_where_it_was_and_becomes_a_file_that_computes_the_same(place: Path) -> None:
    stopped = command(place, "--set", "trainer.steps=6", "--max-minutes", "0")
    assert stopped.exit_code == 0, stopped.output
    assert json.loads(stopped.stdout.splitlines()[-1])["steps"] == 1
    finished = command(place)
    assert finished.exit_code == 0, finished.output
    result = json.loads(finished.stdout.splitlines()[-1])
    figures = result["metrics"]
    assert result["steps"] == 6 and figures["validation/perplexity"] == pytest.approx(
        math.exp(figures["validation/loss"]), rel=1e-4
    )
    once = command(place, "--out", str(place / "once"))
    assert once.exit_code == 0, once.output
    ours, theirs = (read_checkpoint(place / name / "last.ckpt")["state_dict"] for name in ("run", "once"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)

    trained = load_composer(place / "run" / "best.ckpt")
    path = place / "tiny.onnx"
    verified = export_composer(trained, path)
    assert verified.events > 2000 and verified.largest_difference < 1e-4
    card = read_bundle(path).manifest.card
    assert card.objective == "compose" and card.sources[0].licence == "CC-BY-4.0"
    assert card.sources[0].recordings == len(loaded(place)[1].split("train"))
    refused = command(place, "--set", "composer.hidden=16")
    assert refused.exit_code == 1 and "composer.hidden: 12 -> 16" in refused.output + str(refused.stderr)


def test_a_run_ends_with_its_perplexity_beside_what_tables_of_counts_reach(place: Path) -> None:
    arguments = [
        "train",
        str(place / "tiny.toml"),
        "--out",
        str(place / "run"),
        "--accelerator",
        "cpu",
        "--devices",
        "1",
    ]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    again = command(place, "--out", str(place / "again"))
    figures = json.loads(again.stdout.splitlines()[-1])["metrics"]
    recipe, library = loaded(place)
    vocabulary = vocabulary_of(library, recipe.tunes)
    tunes = {split: [tune[1:] for tune in tokenise(library.split(split), vocabulary).tunes] for split in SPLITS}
    for split in ("validation", "test"):
        by_counts = [
            perplexity(witten_bell(tunes["train"], tunes[split], order, len(vocabulary.tokens))) for order in (0, 3)
        ]
        (row,) = [line for line in shown.output.splitlines() if line.startswith(f"│ {split}")]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[1] == f"{figures[f'{split}/perplexity']:.3f}" and float(cells[1]) < len(vocabulary.tokens)
        assert cells[2:4] == [f"{value:.3f}" for value in by_counts]


def test_a_graph_that_computes_something_else_is_not_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(place, "--set", "trainer.steps=1").exit_code == 0
    trained = load_composer(place / "run" / "last.ckpt")
    monkeypatch.setattr("export.notes.TOLERANCE", 0.0)
    with pytest.raises(VerifyError, match="no file was written"):
        export_composer(trained, place / "never.onnx")
    assert not list(place.glob("*never*"))


def test_the_bundled_tunes_were_held_out_of_the_shipped_model() -> None:
    known = read_bundle(COMPOSER_MODEL).manifest.card.recordings_sha256
    for path in TUNES.glob("*.mid"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() not in known
