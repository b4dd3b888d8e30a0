"""Listeners learn from playing before a run, once, hear timbre and not loudness, and teach without being taught."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import soundfile

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor  # noqa: E402

from tests.conftest import SAX_STYLE, VIBRAPHONE_STYLE, tiny_recipe, write_notes  # noqa: E402
from training.checkpoint import read_checkpoint  # noqa: E402
from training.library import Library, load_library  # noqa: E402
from training.models.listener import (  # noqa: E402
    EARS,
    Ear,
    ListeningLesson,
    Material,
    StyleListener,
    load_or_teach,
    teach,
)
from training.phrases import Phrase, PhraseBank, PhraseSampler, Rendering  # noqa: E402
from training.recipe import Recipe, load_recipe  # noqa: E402
from training.train import RunOptions, prepare_teachers, run_training  # noqa: E402

RATE = 48_000
CLIPS = Path(__file__).parent / "data"
SMALL = ListeningLesson(
    ear=Ear(1024, 480, 32, 10_000.0), phrases_per_style=48, seed=0, passes=6, batch=8, test_phrases_per_style=8
)
RECIPE = f"""{tiny_recipe(0.1)}[adversary]
weight = 0.3
style_weight = 0.7
likeness_weight = 1.0
classifiers = 0
listeners = 2
pretraining_phrases = 4
[trainer]
steps = 3
batch_size = 4
validation_every_steps = 3
validation_segments = 1
log_every_steps = 1
{SAX_STYLE}{VIBRAPHONE_STYLE}"""
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclasses.dataclass(frozen=True)
class Place:
    folder: Path
    recipe: Recipe
    library: Library

    def material(self, phrases: PhraseSampler | None = None) -> list[Material]:
        styles = enumerate(self.library.styles)
        return [Material(row, one.train, (*one.validation, *one.test), phrases) for row, one in styles]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A recipe with two listeners, and the recordings of its two styles."""
    folder = tmp_path_factory.mktemp("listeners")
    (folder / "run.toml").write_text(RECIPE)
    write_notes(folder)
    recipe = load_recipe(folder / "run.toml")
    return Place(folder, recipe, load_library(recipe.style, folder, recipe.data, RATE, folder / "cache"))


def note(name: str) -> Tensor:
    audio, rate = soundfile.read(CLIPS / f"{name}.flac", dtype="float32")
    return torch.from_numpy(np.asarray(audio[:rate], dtype=np.float32))[None]


@pytest.mark.parametrize("ear", [SMALL.ear, EARS[0]])
def test_a_listener_knows_styles_at_any_loudness_and_points_to_them(place: Place, ear: Ear) -> None:
    listener, known = teach(place.material(), RATE, dataclasses.replace(SMALL, ear=ear))
    assert known > 0.7  # sax and vibraphone are not hard to tell apart
    for row, name in enumerate(("alto_sax_e4", "vibraphone_418hz")):
        heard = note(name).expand(8, -1).clone().requires_grad_()
        random = torch.Generator()
        loud, quiet = (listener(heard * gain, random.manual_seed(0)) for gain in (1.0, 0.03))
        assert float((loud.argmax(dim=1) == row).float().mean()) > 0.6
        assert torch.allclose(loud, quiet, atol=1e-3)
        (slope,) = torch.autograd.grad(loud[:, row].sum(), heard)
        assert bool(torch.isfinite(slope).all()) and float(slope.abs().max()) > 0.0
    assert not any(weight.requires_grad for weight in listener.parameters()) and not listener.training


def test_the_same_lesson_makes_the_same_listener_and_another_seed_another(place: Place) -> None:
    short = dataclasses.replace(SMALL, phrases_per_style=4, passes=1)
    one, again, other = (teach(place.material(), RATE, dataclasses.replace(short, seed=seed))[0] for seed in (3, 3, 4))
    assert torch.equal(one.score.weight, again.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)


def test_a_listener_is_taught_once_and_anew_where_other_phrases_are_played(place: Place, tmp_path: Path) -> None:
    lesson = dataclasses.replace(SMALL, phrases_per_style=16, passes=1)
    told: list[str] = []

    def taught(material: list[Material]) -> bool:
        told.clear()
        load_or_teach(material, RATE, lesson, tmp_path, lambda what, *_: told.append(what))
        return bool(told)

    def played(name: str) -> PhraseSampler:
        path = tmp_path / f"{name}.npy"
        np.save(path, np.full(6 * RATE, 9000, np.int16))
        bank = PhraseBank(((Rendering(0, 0, path, 6 * RATE),), ()), (Phrase((), 6.0, (0,), "a.mid"),), (None, None), ())
        return PhraseSampler(bank)

    first = played("first")
    assert taught(place.material()) and not taught(place.material())
    assert taught(place.material(first)) and not taught(place.material(first))
    assert taught(place.material(played("second")))
    for file in tmp_path.glob("listener-*.pt"):
        file.write_bytes(b"damaged")
    assert taught(place.material()) and not taught(place.material())


@given(samples=st.integers(2048, 20_000), rows=st.integers(1, 3), ear=st.sampled_from(EARS))
def test_any_stretch_of_sound_is_judged_and_silence_too(samples: int, rows: int, ear: Ear) -> None:
    listener = StyleListener(RATE, 5, ear).eval()
    audio = torch.randn(rows, samples, generator=torch.Generator().manual_seed(samples))
    audio[0] = 0.0
    scores = listener(audio, torch.Generator().manual_seed(0))
    assert scores.shape == (rows, 5) and bool(torch.isfinite(scores).all())


def test_listeners_teach_a_run_in_place_of_classifiers_and_are_in_no_checkpoint(place: Place, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told: list[str] = []
    teachers = prepare_teachers(place.recipe, place.library, tmp_path, lambda what, *_: told.append(what))
    assert teachers is not None and teachers.classifier is None
    assert [listener.ear for listener in teachers.listeners] == [*EARS[:2]]
    assert {*teachers.known} == {"listener 1", "listener 2"} and all(0 <= s <= 1 for s in teachers.known.values())
    options = RunOptions(tmp_path / "out", accelerator="cpu", devices="1", progress=False)
    result = run_training(place.recipe, place.library, options, teachers=teachers)
    stored = read_checkpoint(result.last_checkpoint)["state_dict"]
    assert not any("classifier" in name or "listener" in name or "judge" in name for name in stored)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    taken = [event.value for event in events.Scalars("train/style_taken")]
    assert len(taken) == 3 and all(0.0 <= share <= 1.0 for share in taken)
    again = prepare_teachers(place.recipe, place.library, tmp_path, lambda *_: pytest.fail("learned twice"))
    assert again is not None and again.known == teachers.known
