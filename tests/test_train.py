"""Training runs: they learn, survive being killed, go on where they were, and leave a file that export can read."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

from export.writer import card_of  # noqa: E402
from realtime.cli import app  # noqa: E402
from tests.conftest import SAX_STYLE, VIBRAPHONE_STYLE, tiny_recipe, write_notes  # noqa: E402
from training.augment import Pair  # noqa: E402
from training.beginning import load_beginning  # noqa: E402
from training.checkpoint import CHECKPOINT_KEY, CheckpointError, load_for_export, read_checkpoint  # noqa: E402
from training.library import ExcerptSampler, Library, load_library  # noqa: E402
from training.models.classifier import style_loss  # noqa: E402
from training.models.critic import critic_loss, deception_loss  # noqa: E402
from training.models.recogniser import RecogniserConfig, train_recogniser  # noqa: E402
from training.models.traits import TRAITS  # noqa: E402
from training.objectives import restore  # noqa: E402
from training.objectives.judges import Hearing, hear_judges  # noqa: E402
from training.objectives.objective import TrainingError, learning_rate_factor  # noqa: E402
from training.objectives.restore import RestoreObjective  # noqa: E402
from training.recipe import OptimiserConfig, Recipe, RecipeError, load_recipe  # noqa: E402
from training.train import (  # noqa: E402
    RunOptions,
    RunResult,
    TrainingBatches,
    prepare_teachers,
    run_training,
    set_aside,
)

CLIPS = Path(__file__).parent / "data"
pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = f"""{tiny_recipe(0.1)}[optimiser]
warmup_steps = 1
[trainer]
steps = 6
batch_size = 4
validation_every_steps = 3
validation_segments = 1
checkpoint_every_steps = 2
log_every_steps = 1
media_count = 1
{SAX_STYLE}{VIBRAPHONE_STYLE}"""

# The command as a program of its own; it notes which batches each process asks for.
PROGRAM = """
import sys
import torch
from pathlib import Path
from training.train import TrainingBatches
torch.set_num_threads(1)
draw = TrainingBatches.batch
def noted(self, step):
    batch = draw(self, step)
    with Path(f"asked-{self.rank}.txt").open("a") as file:
        file.write(f"{step} {float(batch.raw.abs().sum()):.4f}\\n")
    return batch
TrainingBatches.batch = noted
from realtime.cli import app
app()
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a recipe and two styles of real notes."""
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "program.py").write_text(PROGRAM)
    write_notes(tmp_path)
    return tmp_path


def edited(place: Path, *changes: tuple[str, str]) -> Recipe:
    text = (place / "tiny.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (place / "tiny.toml").write_text(text)
    return load_recipe(place / "tiny.toml")


def recordings(place: Path, recipe: Recipe) -> Library:
    return load_library(recipe.style, place, recipe.data, recipe.spectral.sample_rate, place / "cache")


def run(place: Path, recipe: Recipe, out: str = "run", minutes: float | None = None) -> RunResult:
    options = RunOptions(place / out, max_minutes=minutes, accelerator="cpu", devices="1", progress=False)
    return run_training(recipe, recordings(place, recipe), options)


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(CLIPS.parent.parent), "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    command = [sys.executable, "program.py", "train", "tiny.toml", "--out", "run", "--accelerator", "cpu", *arguments]
    return subprocess.Popen(
        command, cwd=place, env=environment, text=True, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"ended early with {process.returncode}: {process.communicate()[0]}")
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail("took too long")
        time.sleep(0.05)


def asked(place: Path, rank: int = 0) -> list[tuple[int, str]]:
    """Batches that a process drew: number and a sum over its samples."""
    lines = (place / f"asked-{rank}.txt").read_text().splitlines()
    return [(int(step), total) for step, total in (line.split() for line in lines)]


def command(place: Path, *arguments: str) -> Result:
    """``restyle train tiny.toml`` in this very process."""
    paths = ["--out", str(place / "run"), "--cache", str(place / "cache")]
    devices = ["--accelerator", "cpu", "--devices", "1"]
    return CliRunner().invoke(app, ["train", str(place / "tiny.toml"), *paths, *devices, *arguments])


def on_one_line(result: Result) -> str:
    """What was printed; an error that is not caught would show as another exception than SystemExit."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output.replace("\n", "")


def steps_in(path: Path) -> int:
    return int(read_checkpoint(path)["restyle"]["steps"])


def test_a_few_steps_on_one_batch_reduce_its_loss(place: Path) -> None:
    recipe = edited(place)
    torch.manual_seed(0)
    module = RestoreObjective(recipe, {})
    samplers = [ExcerptSampler(style.train, recipe.data) for style in recordings(place, recipe).styles]
    batch = TrainingBatches(samplers, recipe, 0, 0).batch(0)
    assert sorted(batch.style.tolist()) == [0, 0, 1, 1]
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
    totals = []
    for _ in range(15):
        pair = module.pair(batch)
        answer, _ = module.restore(pair.input, module.styles(batch.style))
        loss = module.restoration_loss(answer, pair.target).total.mean()
        totals.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert totals[-1] < 0.9 * totals[0]


def test_answer_and_target_are_aligned(place: Path) -> None:
    recipe = edited(place)
    module = RestoreObjective(recipe, {})
    latency = module.generator.latency_samples
    audio = 0.1 * torch.randn(2, 10_240, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answer, _ = module.restore(audio, module.styles(torch.tensor([0, 1])))
    assert answer.shape == (2, 10_240 - latency)
    # Untrained, the model lets its input through: the answer's best fit to the input is at shift zero.
    fits = [
        float((answer[:, 256:-256] * audio[:, 256 + k : answer.shape[1] - 256 + k]).sum()) for k in range(-130, 130)
    ]
    assert int(np.argmax(fits)) - 130 == 0
    unchanged = module.restoration_loss(audio[:, : answer.shape[1]], audio)
    assert unchanged.total.tolist() == [0.0, 0.0]


def test_a_whole_run_and_what_its_checkpoint_holds(place: Path) -> None:
    recipe = edited(place)
    (place / "sax" / "broken.wav").write_text("no sound")
    result = run(place, recipe)
    assert (result.steps, result.ended_by) == (6, "steps")
    assert result.best_checkpoint == place / "run" / "best.ckpt"
    expected = {"validation/loss", "validation/unchanged", "validation/style/sax", "validation/log_mel"}
    assert expected <= set(result.metrics)
    assert list((place / "run" / "tensorboard").glob("events*"))

    model = load_for_export(result.last_checkpoint)
    assert model.recipe == recipe
    assert model.style_vectors.shape == (2, 4)
    assert not model.generator.training
    card = json.loads(json.dumps(model.card))  # plain values only
    assert card["steps"] == 6
    assert card["metrics"] == result.metrics
    assert card["wall_seconds"] > 0
    assert [style["id"] for style in card["styles"]] == ["sax", "vibraphone"]
    assert card["styles"][0]["attribution"] == "Weresax, Karoryfer Samples"
    assert [len(card["recordings"]["sax"][split]) for split in ("train", "validation", "test")] == [4, 1, 1]
    assert all(len(item["sha256"]) == 64 for item in card["recordings"]["vibraphone"]["train"])
    assert card["skipped"][0][0] == "broken.wav"
    assert card["versions"]["torch"] == torch.__version__
    with torch.no_grad():
        state = model.generator.init_state(2)
        audio, _ = model.generator(0.1 * torch.randn(2, 1280), model.style_vectors, state)
    assert torch.isfinite(audio).all()


def test_export_takes_the_averaged_weights_where_there_are_some(place: Path) -> None:
    result = run(place, edited(place))
    state = read_checkpoint(result.last_checkpoint)["state_dict"]
    assert torch.equal(load_for_export(result.last_checkpoint).style_vectors, state["average_styles.weight"])
    assert not torch.equal(state["average_styles.weight"], state["styles.weight"])
    plain = run(place, edited(place, ("[trainer]", "[trainer]\naverage_decay = 0")), out="plain")
    state = read_checkpoint(plain.last_checkpoint)["state_dict"]
    assert torch.equal(load_for_export(plain.last_checkpoint).style_vectors, state["styles.weight"])


def test_export_takes_the_mean_of_several_checkpoints_of_a_run_and_refuses_those_of_others(place: Path) -> None:
    result = run(place, edited(place))
    first = place / "earlier.ckpt"
    first.write_bytes(result.last_checkpoint.read_bytes())
    saved = torch.load(first, weights_only=True)
    for name in saved["state_dict"]:
        if name.startswith("average_styles."):
            saved["state_dict"][name] = saved["state_dict"][name] + 1.0
    torch.save(saved, first)
    one, both = load_for_export(result.last_checkpoint), load_for_export(result.last_checkpoint, first)
    torch.testing.assert_close(both.style_vectors, one.style_vectors + 0.5)
    for name, value in both.generator.state_dict().items():
        torch.testing.assert_close(value, one.generator.state_dict()[name])
    saved[CHECKPOINT_KEY]["recipe"]["model"]["hidden"] += 2
    torch.save(saved, first)
    with pytest.raises(CheckpointError, match=r"^\S*earlier.ckpt: is of another run than .*model\.hidden"):
        load_for_export(result.last_checkpoint, first)
    saved[CHECKPOINT_KEY]["recipe"]["model"]["kazoo"] = 1
    torch.save(saved, first)
    with pytest.raises(CheckpointError, match=r"^\S*earlier.ckpt: does not fit .*model\.kazoo.*; leave it out$"):
        load_for_export(result.last_checkpoint, first)
    with pytest.raises(CheckpointError, match=r"^\S*none\.ckpt: there is no such checkpoint"):
        load_for_export(result.last_checkpoint, place / "none.ckpt")


def test_the_average_follows_the_weights(place: Path) -> None:
    recipe = edited(place)
    one, two = (read_checkpoint(run(place, recipe, minutes=0.0).last_checkpoint)["state_dict"] for _ in range(2))
    # At its step n it keeps n / (9 + n) of itself, as long as that is below average_decay.
    for name, before in one.items():
        if name.startswith("average_"):
            expected = (2 * before + 9 * two[name.removeprefix("average_")]) / 11
            assert torch.allclose(two[name], expected, atol=1e-6), name


def test_what_is_exported_is_the_average_number_by_number(place: Path) -> None:
    result = run(place, edited(place))
    state = read_checkpoint(result.last_checkpoint)["state_dict"]
    weights = load_for_export(result.last_checkpoint).generator.state_dict()
    assert {f"average_generator.{name}" for name in weights} == {n for n in state if n.startswith("average_generator.")}
    assert all(torch.equal(value, state[f"average_generator.{name}"]) for name, value in weights.items())
    assert any(not torch.equal(value, state[f"generator.{name}"]) for name, value in weights.items())


def test_tensorboard_has_curves_pictures_and_sound(place: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(place, edited(place, ("media_count = 1", "media_count = 2")))
    board = EventAccumulator(str(place / "run" / "tensorboard"), size_guidance={"images": 0, "audio": 0})
    board.Reload()
    tags = board.Tags()
    assert {"train/loss", "train/log_mel", "validation/loss", "validation/unchanged"} <= set(tags["scalars"])
    losses = board.Scalars("train/loss")
    assert len(losses) == 6
    assert all(0.0 < item.value < 100.0 for item in losses)
    last = board.Scalars("validation/loss")[-1]
    assert last.value == pytest.approx(result.metrics["validation/loss"], abs=1e-5)
    assert set(tags["images"]) == {"sax/spectrograms", "vibraphone/spectrograms"}
    assert [item.step for item in board.Images("sax/spectrograms")] == [3, 6]
    assert board.Images("sax/spectrograms")[0].encoded_image_string.startswith(b"\x89PNG")
    assert set(tags["audio"]) == {f"{s}/{k}" for s in ("sax", "vibraphone") for k in ("input", "output", "target")}
    heard = board.Audio("sax/target")[0]
    sound, rate = soundfile.read(io.BytesIO(heard.encoded_audio_string))
    assert (rate, len(sound)) == (48_000, 38 * 128)  # 0.1 s, in whole hops
    assert 10 ** (-45 / 20) < np.sqrt(np.mean(sound**2)) < 10 ** (-10 / 20)


def test_one_recording_a_style_trains_without_validation(place: Path) -> None:
    for path in (*(place / "sax").glob("*[1-9].flac"), *(place / "vibraphone").glob("*[1-9].flac")):
        path.unlink()
    (place / "sax" / "alto_sax_e40.flac").unlink()
    result = run(place, edited(place))
    assert (result.steps, result.metrics, result.best_checkpoint) == (6, {}, None)
    assert load_for_export(result.last_checkpoint).style_vectors.shape == (2, 4)


def test_a_run_gives_the_signals_back(place: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    run(place, edited(place, ("steps = 6", "steps = 1")))
    assert [signal.getsignal(number) for number in numbers] == before


def test_the_best_stays_the_best_in_a_run_folder_that_was_moved(place: Path) -> None:
    recipe = edited(place, ("steps = 6", "steps = 3"))
    run(place, recipe)
    checkpoint = read_checkpoint(place / "run" / "last.ckpt")
    for state in checkpoint["callbacks"].values():
        if state.get("monitor") == "validation_loss":  # so good that no later one can be better
            state["best_model_score"] = state["kth_value"] = torch.tensor(-1.0)
            state["best_k_models"] = {path: torch.tensor(-1.0) for path in state["best_k_models"]}
    torch.save(checkpoint, place / "run" / "last.ckpt")
    shutil.copytree(place / "run", place / "moved")
    best = (place / "run" / "best.ckpt").read_bytes()
    result = run(place, edited(place, ("steps = 3", "steps = 6")), out="moved")
    assert result.steps == steps_in(place / "moved" / "last.ckpt") == 6
    assert (place / "moved" / "best.ckpt").read_bytes() == best
    assert (place / "run" / "best.ckpt").read_bytes() == best  # nor is the original touched


def test_interrupted_and_resumed_is_as_good_as_uninterrupted(place: Path) -> None:
    recipe = edited(place, ("steps = 6", "steps = 4"))
    whole = run(place, recipe, out="whole")
    for steps in (1, 2, 3, 4):
        parts = run(place, recipe, out="parts", minutes=0.0)  # one step each
        assert (parts.steps, steps_in(parts.last_checkpoint)) == (steps, steps)
    one, other = (read_checkpoint(r.last_checkpoint) for r in (whole, parts))
    for name, value in one["state_dict"].items():
        assert torch.allclose(value, other["state_dict"][name], atol=1e-6), name
    assert other["restyle"]["wall_seconds"] > 0


def test_a_finished_run_stays_finished_and_a_longer_recipe_goes_on(place: Path) -> None:
    run(place, edited(place, ("steps = 6", "steps = 2")))
    before = (place / "run" / "last.ckpt").read_bytes()
    again, card = run(place, edited(place)), read_checkpoint(place / "run" / "last.ckpt")["restyle"]
    assert again.steps == 2 and (again.metrics, again.wall_seconds) == (card["metrics"], card["wall_seconds"])
    assert again.metrics and (place / "run" / "last.ckpt").read_bytes() == before
    optimiser = "[optimiser]\nlearning_rate = 0.5\nweight_decay = 0.125\nbetas = [0.5, 0.75]"
    result = run(place, edited(place, ("steps = 2", "steps = 5"), ("[optimiser]", optimiser)))
    assert result.steps == 5
    stored = read_checkpoint(result.last_checkpoint)
    assert stored["lr_schedulers"][0]["base_lrs"] == [0.5]  # what is new is not overruled by what is stored
    group = stored["optimizer_states"][0]["param_groups"][0]
    assert group["weight_decay"] == 0.125 and tuple(group["betas"]) == (0.5, 0.75)


def test_judges_and_encoder_join_a_run_and_leave_it(place: Path) -> None:
    plain = run(place, edited(place, ("steps = 6", "steps = 2")))
    before = read_checkpoint(plain.last_checkpoint)
    judges = "[adversary]\nweight = 0.2\nfeature_weight = 0.5\nstyle_weight = 0.3\nstart_step = 3\n"
    both = f"{judges}[encoder]\nshare = 0.5\n"
    result = run(place, edited(place, ("steps = 2", "steps = 5"), ("[optimiser]", f"{both}[optimiser]")))
    after = read_checkpoint(result.last_checkpoint)
    joined = {name.split(".")[0] for name in after["state_dict"].keys() - before["state_dict"].keys()}
    assert joined == {"encoder", "average_encoder", "critic", "classifier"}
    assert result.best_checkpoint is None  # the loss does not know what the critic taught
    optimiser = after["optimizer_states"][0]
    assert [group["initial_lr"] for group in optimiser["param_groups"]] == [1e-3, 5e-4, 5e-4]
    generator, *judges = (group["params"] for group in optimiser["param_groups"])
    # The generator's momentum was carried over, the judges began at their own step.
    assert float(optimiser["state"][generator[0]]["step"]) == 5
    assert {float(optimiser["state"][number]["step"]) for judge in judges for number in judge} == {2}
    assert load_for_export(result.last_checkpoint).style_vectors.shape == (2, 4)
    last = run(place, edited(place, ("steps = 5", "steps = 6"), (both, "")))
    assert last.steps == 6
    assert read_checkpoint(last.last_checkpoint)["state_dict"].keys() == before["state_dict"].keys()


def test_judges_and_generator_learn_each_from_its_own_loss(place: Path) -> None:
    changes = ("[optimiser]", "[adversary]\nweight = 0.3\nstyle_weight = 0.7\n[optimiser]")
    module = RestoreObjective(edited(place, changes), {})
    random = torch.Generator().manual_seed(0)
    target = 0.1 * torch.randn(2, 4736, generator=random)
    answer = (0.1 * torch.randn(2, 4736, generator=random)).requires_grad_()
    style, crossed = torch.tensor([0, 1]), torch.tensor([False, False])
    heard = Hearing(answer, target, style, style, crossed)
    total, said = hear_judges(module.judges, module.recipe.adversary, heard, 7)
    critic, classifier = list(module.critic.parameters()), list(module.classifier.parameters())
    gradients = torch.autograd.grad(total, [answer, *critic, *classifier])
    made = answer.detach().requires_grad_()
    random.manual_seed(7)  # of the colours, drawn for the real ones first
    known, taken = (module.classifier(audio, random).scores for audio in (target, made))
    deceiving = 0.3 * deception_loss(module.critic(made), style).mean() + 0.7 * style_loss(taken, style).mean()
    learning = critic_loss(module.critic(target), style, module.critic(answer.detach()), style).mean()
    apart = [
        *torch.autograd.grad(deceiving, [made]),
        *torch.autograd.grad(learning, critic),
        *torch.autograd.grad(style_loss(known, style).mean(), classifier),
    ]
    assert float(said["style_missing"].detach()) == pytest.approx(
        float(style_loss(taken, style).detach().mean()), abs=1e-5
    )
    assert all(torch.allclose(ours, theirs, atol=1e-7) for ours, theirs in zip(gradients, apart, strict=True))


PRETRAINED = "[adversary]\nweight = 0.3\nstyle_weight = 0.7\npretraining_phrases = 4\nhead_start_steps = 2\n"


def test_classifiers_that_learned_before_the_run_teach_and_stay_as_they_are(place: Path) -> None:
    two = "classifiers = 2\nattacked_classifiers = 1\nspeed_semitones = 4\n"
    recipe = edited(place, ("[optimiser]", f"{PRETRAINED}{two}[optimiser]"), ("steps = 6", "steps = 3"))
    library, told = recordings(place, recipe), []
    teachers = prepare_teachers(recipe, library, place / "cache", lambda what, *_: told.append(what))
    assert teachers is not None and teachers.classifier is not None
    assert {*told} == {"training the classifier 1 of 2", "training the classifier 2 of 2"}
    learned = [value for name, value in teachers.classifier.state_dict().items() if name.endswith("score.bias")]
    assert len(learned) == 6 and not torch.equal(learned[0], learned[3])  # each for itself
    assert teachers.witness is None  # so few recordings make no recogniser
    assert teachers.known["the classifier"] > 0.6  # sax and vibraphone are not hard to tell apart
    unattacked = dataclasses.replace(recipe.adversary, attacked_classifiers=0)
    others = prepare_teachers(
        dataclasses.replace(recipe, adversary=unattacked), library, place / "cache", lambda *_: None
    )
    assert others is not None and others.classifier is not None
    mild = [value for name, value in others.classifier.state_dict().items() if name.endswith("score.bias")]
    assert [torch.equal(a, b) for a, b in zip(learned, mild, strict=True)] == [True] * 3 + [False] * 3
    again = prepare_teachers(recipe, library, place / "cache", lambda *_: pytest.fail("learned twice"))
    assert again is not None and again.known == teachers.known
    options = RunOptions(place / "run", accelerator="cpu", devices="1", progress=False)
    result = run_training(recipe, library, options, teachers=again)
    stored = read_checkpoint(result.last_checkpoint)["state_dict"]
    for name, value in teachers.classifier.state_dict().items():
        assert torch.equal(stored[f"classifier.{name}"], value), name


def test_a_witness_says_what_it_hears_and_the_best_checkpoint_is_where_it_hears_most(place: Path) -> None:
    recipe = edited(place, ("[optimiser]", f"{PRETRAINED}[optimiser]"))
    library = recordings(place, recipe)
    teachers = prepare_teachers(recipe, library, place / "cache", lambda *_: None)
    assert teachers is not None
    groups = {style.id: (*style.train, *style.validation, *style.test) for style in library.styles}
    witness = train_recogniser(groups, RecogniserConfig(excerpts_per_style=16, passes=2, batch=8))
    options = RunOptions(place / "run", accelerator="cpu", devices="1", progress=False)
    result = run_training(recipe, library, options, teachers=dataclasses.replace(teachers, witness=witness))
    assert 0.0 <= result.metrics["validation/style_recognised"] <= 1.0
    assert result.best_checkpoint is not None
    callbacks = read_checkpoint(result.last_checkpoint)["callbacks"]
    guides = [state["monitor"] for state in callbacks.values() if "monitor" in state]
    assert "validation/style_recognised" in guides and "validation_loss" not in guides


def test_in_its_head_start_the_critic_learns_and_the_generator_stands_still(place: Path) -> None:
    changes = (("[optimiser]", f"{PRETRAINED}[optimiser]"), ("steps = 6", "steps = 2"))
    recipe = edited(place, *changes)
    after = read_checkpoint(run(place, recipe).last_checkpoint)["state_dict"]
    longer = run(place, edited(place, ("\nsteps = 2", "\nsteps = 3")))
    moved = read_checkpoint(longer.last_checkpoint)["state_dict"]
    critic = [name for name in after if name.startswith("critic.") and name.endswith("original1")]
    generator = [name for name in after if name.startswith("generator.")]
    assert any(not torch.equal(moved[name], after[name]) for name in generator)
    assert all(not torch.equal(moved[name], after[name]) for name in critic)
    optimiser = read_checkpoint(longer.last_checkpoint)["optimizer_states"][0]
    first, second = (group["params"] for group in optimiser["param_groups"][:2])
    assert {float(optimiser["state"][number]["step"]) for number in first if number in optimiser["state"]} == {1}
    assert {float(optimiser["state"][number]["step"]) for number in second} == {3}


def test_nothing_becomes_a_style_for_the_judges_alone_and_no_file_has_it(place: Path) -> None:
    drums = SAX_STYLE.replace('id = "sax"', 'id = "other"').replace("[[style]]", "[[style]]\njudged_only = true")
    changes = ("[optimiser]", "[adversary]\nweight = 0.3\ncross_share = 0.2\n[optimiser]")
    recipe = edited(place, changes, (SAX_STYLE, drums + SAX_STYLE))
    assert recipe.performed == [1, 2]
    module = RestoreObjective(recipe, {})
    own = torch.tensor([0, 1, 2] * 300)
    wanted, crossed, _ = module._crossed(own, torch.Generator().manual_seed(0))
    assert crossed[3::3].all() and not bool(crossed[0])  # row 0 is restored in every step, whatever it is
    assert set(wanted[1:].tolist()) == {1, 2}
    assert torch.equal(wanted[~crossed], own[~crossed])
    assert all(int(other) != int(mine) for other, mine in zip(wanted[crossed], own[crossed], strict=True))
    with pytest.raises(RecipeError, match=r"judged_only: is for judges; needs adversary\.weight"):
        edited(place, ("weight = 0.3", "weight = 0.0"))


@pytest.mark.parametrize("trait", TRAITS)
def test_a_trait_changes_the_styles_that_have_it_alone(place: Path, trait: str) -> None:
    wanted = (SAX_STYLE, SAX_STYLE.replace("[[style]]", f"[[style]]\n{trait} = true"))
    module = RestoreObjective(edited(place, wanted), {})
    plain = RestoreObjective(edited(place, (wanted[1], wanted[0])), {})
    plain.load_state_dict(module.state_dict())  # nothing of it is learned
    assert list(module.recipe.traits) == [trait] and not plain.recipe.traits
    number = [getattr(style, trait) for style in module.recipe.style].index(True)
    audio = 0.1 * torch.sin(2.0 * torch.pi * 220.0 * torch.arange(80 * 128) / 48_000)[None]
    audio[:, 40 * 128 :] *= 0.03  # gains rise, and others fall
    for row, vector in enumerate(module.styles.weight):
        made, other = (each.restore(audio, vector[None])[0] for each in (module, plain))
        assert torch.equal(made, other) == (row != number)
    with pytest.raises(RecipeError, match=rf"style\.{trait}: needs objective = 'restore' and model\.answer = 'gains'"):
        edited(place, wanted, ("[model]", '[model]\nanswer = "spectrum"'))


def test_a_hard_style_is_asked_for_more_often(place: Path) -> None:
    critic = ("[optimiser]", "[adversary]\nweight = 0.3\ncross_share = 1.0\n[optimiser]")
    third = SAX_STYLE.replace('id = "sax"', 'id = "third"').replace("[[style]]", "[[style]]\ncross_weight = 3.0")
    module = RestoreObjective(edited(place, critic, (SAX_STYLE, third + SAX_STYLE)), {})
    own = torch.tensor([0, 1, 2] * 1000)
    wanted = module._crossed(own, torch.Generator().manual_seed(0))[0]
    wanted, own = wanted[1:], own[1:]  # the first row is restored in every step
    assert not bool((wanted == own).any())
    assert float((wanted[own == 1] == 0).float().mean()) == pytest.approx(0.75, abs=0.05)
    assert float((wanted[own == 0] == 1).float().mean()) == pytest.approx(0.5, abs=0.05)
    with pytest.raises(RecipeError, match=r"cross_weight: must be above 0, got -1\.0 in style 'third'"):
        edited(place, ("cross_weight = 3.0", "cross_weight = -1.0"))
    with pytest.raises(RecipeError, match=r"cross_weight: is for rows that become another style; needs adversary\.w"):
        edited(place, ("cross_weight = -1.0", "cross_weight = 3.0"), ("\nweight = 0.3", "\nweight = 0.0"))


def test_gains_that_stand_still_are_steady_and_moving_ones_are_not(place: Path) -> None:
    torch.manual_seed(0)
    module = RestoreObjective(edited(place), {})
    vectors = module.styles(torch.tensor([0, 1]))
    with torch.no_grad():
        module.generator.leave.weight.mul_(50.0)
    assert float(module.unsteadiness(vectors, 0).detach()) > 1e-3
    with torch.no_grad():
        module.generator.leave.weight.zero_()  # gains are then the bias, whatever is heard
    assert float(module.unsteadiness(vectors, 0).detach()) < 1e-5


def test_steadiness_is_trained_and_shown(place: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(place, edited(place, ("[loss]", "[loss]\nsteadiness = 300.0"), ("steps = 6", "steps = 40")))
    board = EventAccumulator(str(place / "run" / "tensorboard"))
    board.Reload()
    values = [item.value for item in board.Scalars("train/unsteadiness")]
    assert len(values) == 40 and np.mean(values[-10:]) < 0.7 * np.mean(values[:10])


def test_a_step_looks_at_as_many_fft_sizes_as_the_recipe_says(place: Path) -> None:
    module = RestoreObjective(edited(place, ("[loss]", "[loss]\nfft_sizes_per_step = 1")), {})
    sizes = module.recipe.loss.fft_sizes
    drawn = [module._fft_sizes(torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert {size for (size,) in drawn} == set(sizes)
    answer, target = torch.randn(2, 2, 4800, generator=torch.Generator().manual_seed(0))
    each = torch.stack([module.restoration_loss(answer, target, (size,)).terms["log_mel"] for size in sizes])
    assert torch.allclose(each.mean(dim=0), module.restoration_loss(answer, target).terms["log_mel"], rtol=1e-5)


def test_crossed_rows_become_another_style(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ("[optimiser]", "[adversary]\nweight = 0.3\ncross_share = 0.5\nstart_step = 4\n[optimiser]")
    module = RestoreObjective(edited(place, changes), {})
    style = torch.tensor([0, 1] * 500)
    assert not module._crossed(style, torch.Generator().manual_seed(0))[1].any()
    monkeypatch.setattr(RestoreObjective, "global_step", 4)
    wanted, crossed, told_by = module._crossed(style, torch.Generator().manual_seed(0))
    assert not any(bool(module._crossed(style[:1], torch.Generator().manual_seed(n))[1]) for n in range(8))
    assert 0.45 < float(crossed.float().mean()) < 0.55
    assert torch.equal(wanted, torch.where(crossed, 1 - style, style))
    assert (told_by == -1).all()  # without an encoder nothing is heard


def test_some_crossed_rows_become_a_blend_which_no_judge_hears(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = "[adversary]\nweight = 0.3\ncross_share = 0.5\nblend_share = {}\n[optimiser]"
    module = RestoreObjective(edited(place, ("[optimiser]", share.format(0.4))), {})
    vectors, crossed = torch.eye(1000), torch.arange(1000) % 2 == 1
    mixed, blended = module._blended(vectors, crossed, torch.Generator().manual_seed(0))
    assert not (blended & ~crossed).any() and 0.33 < float(blended[crossed].float().mean()) < 0.47
    assert torch.equal(mixed[~blended], vectors[~blended])
    rows = torch.arange(1000)[blended]
    parts = torch.stack([mixed[rows, (rows - by) % 1000] for by in range(3)])  # its own and the two before it
    assert (parts > 0.0).all() and torch.allclose(parts.sum(dim=0), torch.ones(len(rows)))
    assert torch.allclose(parts.mean(dim=1), torch.full((3,), 1 / 3), atol=0.06)

    heard: list[Tensor] = []

    def hear(*args: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        heard.append(args[2].crossed)
        return hear_judges(*args, **options)

    monkeypatch.setattr(restore, "hear_judges", hear)
    run(place, edited(place, ("blend_share = 0.4", "blend_share = 1.0")))
    assert heard and all(len(crossed) and not crossed.any() for crossed in heard)
    assert min(len(crossed) for crossed in heard) < max(len(crossed) for crossed in heard)


def test_what_a_crossed_row_becomes_is_looked_up_or_heard_from_a_row_of_that_style(place: Path) -> None:
    sections = "[adversary]\nweight = 0.3\ncross_share = 0.5\n[encoder]\nshare = 0.5\ncrossed_share = 0.5\n[optimiser]"
    module = RestoreObjective(edited(place, ("[optimiser]", sections)), {})
    style = torch.tensor([0, 1] * 500)
    wanted, crossed, told_by = module._crossed(style, torch.Generator().manual_seed(0))
    told, rows = told_by >= 0, torch.arange(1000)
    assert torch.equal(wanted, torch.where(crossed, 1 - style, style))
    assert torch.equal(style[told_by[told]], wanted[told])
    assert torch.equal(told_by[told & ~crossed], rows[told & ~crossed])
    # Half of the rows asked are of the very style of the row that asks: those look it up.
    shares = [float(told[kind].float().mean()) for kind in (~crossed, crossed)]
    assert shares == pytest.approx([0.5, 0.25], abs=0.06)

    module.encoder = torch.nn.Identity()
    raw = torch.arange(1000.0)[:, None].expand(-1, module.recipe.model.style_dim)
    vectors, _ = module._style_vectors(raw, style, wanted, told_by)
    assert torch.equal(vectors[told], raw[told_by[told]])
    assert torch.equal(vectors[~told], module.styles(wanted)[~told])


def test_on_their_way_to_another_style_rows_hear_recordings_as_they_are_alone_or_together(place: Path) -> None:
    module = RestoreObjective(edited(place), {})
    target = torch.arange(1.0, 1001.0)[:, None].expand(-1, 4)
    crossed = torch.arange(1000) % 4 > 0
    heard = module._heard_on_stage(Pair(-target, target), crossed, torch.Generator().manual_seed(0))
    together = (heard == 0.5 * (target + target.roll(1, dims=0))).all(dim=1)
    as_is, hidden = (heard == target).all(dim=1), (heard == -target).all(dim=1)
    assert (together | as_is | hidden).all() and hidden[~crossed].all()
    shares = [float(kind[crossed].float().mean()) for kind in (hidden, as_is, together)]
    assert shares == pytest.approx([0.5, 0.35, 0.15], abs=0.04)


def test_half_of_the_rows_that_become_another_style_glide_if_the_recipe_says_so(place: Path) -> None:
    plain = RestoreObjective(edited(place), {})
    module = RestoreObjective(edited(place, ("[optimiser]", "[augment]\nglide_semitones = 2\n[optimiser]")), {})
    target = torch.sin(0.05 * torch.arange(2000.0)).expand(400, -1)
    crossed = torch.arange(400) % 4 > 0
    pair = Pair(-target, target)
    heard, as_ever = (m._heard_on_stage(pair, crossed, torch.Generator().manual_seed(0)) for m in (module, plain))
    moved = (heard != as_ever).any(dim=1)
    assert not moved[~crossed].any()
    assert float(moved[crossed].float().mean()) == pytest.approx(0.5, abs=0.08)


def test_a_recipe_that_no_longer_fits_is_refused_and_fresh_sets_the_old_run_aside(place: Path) -> None:
    run(place, edited(place, ("steps = 6", "steps = 1")))
    changed = edited(place, ("hidden = 16", "hidden = 32"), ('id = "sax"', 'id = "saxophone"'))
    with pytest.raises(CheckpointError, match=r"model\.hidden: 16 -> 32; style\.id: sax, .*--fresh"):
        run(place, changed)
    set_aside(place / "run")
    assert (place / "run" / "previous-1" / "last.ckpt").is_file()
    assert (place / "run" / "previous-1" / "tensorboard").is_dir()
    assert run(place, changed).steps == 1


def test_recordings_trained_on_stay_listed_when_the_folder_changes(place: Path) -> None:
    first = run(place, edited(place, ("steps = 6", "steps = 1")))
    heard = read_checkpoint(first.last_checkpoint)["restyle"]["recordings"]["sax"]["train"]
    (place / "sax" / heard[0]["name"]).unlink()
    second = run(place, edited(place, ("steps = 1", "steps = 2")))
    listed = read_checkpoint(second.last_checkpoint)["restyle"]["recordings"]["sax"]["train"]
    assert {item["sha256"] for item in heard} <= {item["sha256"] for item in listed}


def test_foreign_damaged_and_missing_checkpoints_are_named(place: Path) -> None:
    result = run(place, edited(place, ("steps = 6", "steps = 1")))
    with pytest.raises(CheckpointError, match=r"none\.ckpt: there is no such checkpoint"):
        load_for_export(place / "none.ckpt")
    damaged = place / "damaged.ckpt"
    damaged.write_bytes(result.last_checkpoint.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"damaged\.ckpt: cannot be read as a checkpoint"):
        load_for_export(damaged)
    foreign = place / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    with pytest.raises(CheckpointError, match=r"holds no 'restyle' entry"):
        load_for_export(foreign)
    torch.save({"state_dict": {}, "code": subprocess.Popen}, foreign)  # would import what it names
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_for_export(foreign)
    checkpoint = read_checkpoint(result.last_checkpoint)
    checkpoint["restyle"]["format"] = 99
    torch.save(checkpoint, foreign)
    with pytest.raises(CheckpointError, match="format: is 99, this version reads 2"):
        load_for_export(foreign)
    checkpoint["restyle"]["format"] = 2
    for name in ("styles.weight", "average_styles.weight"):
        checkpoint["state_dict"].pop(name)
    torch.save(checkpoint, foreign)
    with pytest.raises(CheckpointError, match="does not fit this version's model"):
        load_for_export(foreign)


def test_a_step_without_finite_gradient_changes_nothing_and_many_end_the_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = edited(place, ("steps = 6", "steps = 30"), ("[optimiser]", "[optimiser]\nweight_decay = 0"))
    judge = RestoreObjective.restoration_loss

    def poisoned(self: RestoreObjective, *args: Any) -> object:
        result = judge(self, *args)
        bad = self.global_step >= 2 and self.trainer.training
        return dataclasses.replace(result, total=result.total * float("nan")) if bad else result

    monkeypatch.setattr(RestoreObjective, "restoration_loss", poisoned)
    monkeypatch.setattr("training.objectives.objective.MAX_SKIPPED_STEPS", 5)
    with pytest.raises(TrainingError, match=r"no finite gradient in 5 steps .* lower optimiser\.learning_rate"):
        run(place, recipe)
    state = read_checkpoint(place / "run" / "last.ckpt")["state_dict"]
    assert steps_in(place / "run" / "last.ckpt") > 2
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_a_step_that_is_skipped_moves_no_weight(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = edited(place, ("[optimiser]", "[optimiser]\nweight_decay = 0.1"))
    for _ in range(2):  # so that the optimiser has momentum
        run(place, recipe, minutes=0.0)
    before = read_checkpoint(place / "run" / "last.ckpt")["state_dict"]
    judge = RestoreObjective.restoration_loss

    def poisoned(self: RestoreObjective, *args: Any) -> object:
        result = judge(self, *args)
        return dataclasses.replace(result, total=result.total * float("nan")) if self.trainer.training else result

    monkeypatch.setattr(RestoreObjective, "restoration_loss", poisoned)
    assert run(place, recipe).steps == 6
    after = read_checkpoint(place / "run" / "last.ckpt")["state_dict"]
    learned = [name for name in before if not name.startswith("average_")]
    assert "styles.weight" in learned
    assert all(torch.equal(before[name], after[name]) for name in learned)


def test_the_rate_rises_then_falls() -> None:
    config = OptimiserConfig(warmup_steps=10, final_fraction=0.1)
    factors = [learning_rate_factor(step, 110, config) for step in range(120)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.55)  # half way: the mean of 1 and 0.1
    assert factors[110] == factors[119] == pytest.approx(0.1)


def test_batches_depend_on_step_and_process_alone(place: Path) -> None:
    recipe = edited(place)
    samplers = [ExcerptSampler(style.train, recipe.data) for style in recordings(place, recipe).styles]

    def total(step: int, rank: int) -> float:
        return float(TrainingBatches(samplers, recipe, 0, rank).batch(step).raw.abs().sum())

    assert total(3, 0) == total(3, 0)
    assert len({total(3, 0), total(4, 0), total(3, 1)}) == 3
    later = iter(TrainingBatches(samplers, recipe, 3, 0))
    assert float(next(later).raw.abs().sum()) == total(3, 0)
    loader = torch.utils.data.DataLoader(TrainingBatches(samplers, recipe, 0, 0), batch_size=None, num_workers=2)
    batches = iter(loader)
    assert [float(next(batches).raw.abs().sum()) for _ in range(4)] == [total(step, 0) for step in range(4)]


def test_killed_at_any_moment_it_goes_on_at_the_last_checkpoint(place: Path) -> None:
    edited(place, ("steps = 6", "steps = 100000"), ("checkpoint_every_steps = 2", "checkpoint_every_steps = 1"))
    edited(place, ("validation_every_steps = 3", "validation_every_steps = 50000"))
    last = place / "run" / "last.ckpt"
    process = start(place)
    wait_for(lambda: last.exists() and len(asked(place)) > 10, process)
    process.kill()
    process.wait()
    done = steps_in(last)  # whole, although it was being written all the time
    assert done >= 1
    drawn = asked(place)
    assert [step for step, _ in drawn] == list(range(len(drawn)))

    (place / "asked-0.txt").unlink()
    edited(place, ("steps = 100000", f"steps = {done + 3}"))
    process = start(place, "--json")
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    assert f"goes on from step {done} of {done + 3}" in output.replace("\n", "")
    assert json.loads(output.strip().splitlines()[-1])["steps"] == done + 3
    assert steps_in(last) == done + 3
    assert not list((place / "run").glob(".*.tmp"))  # what the kill may have left half written
    # It goes on with the batch that comes next, not with the first.
    assert asked(place)[0][0] == done
    shared = dict(drawn)
    assert all(shared.get(step, total) == total for step, total in asked(place))


@pytest.mark.parametrize("tell", [os.kill, os.killpg], ids=["alone", "with its workers"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_writes_a_checkpoint_and_says_so(
    place: Path, number: signal.Signals, tell: Callable[[int, int], None]
) -> None:
    edited(place, ("steps = 6", "steps = 100000"), ("checkpoint_every_steps = 2", "checkpoint_every_steps = 50000"))
    edited(place, ("validation_every_steps = 3", "validation_every_steps = 50000"), ("workers = 0", "workers = 1"))
    process = start(place)
    wait_for(lambda: (place / "asked-0.txt").exists() and len(asked(place)) > 6, process)
    tell(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "stopped by a signal" in output
    assert "the same command goes on from here" in output
    assert steps_in(place / "run" / "last.ckpt") >= 1
    assert "Traceback" not in output


def test_two_processes_train_together_on_different_data(place: Path) -> None:
    judges = "[adversary]\nweight = 0.2\nstyle_weight = 0.2\nstart_step = 2\n"  # without work in some steps
    edited(place, ("steps = 6", "steps = 3"), ("[optimiser]", f"{judges}[encoder]\nshare = 0.5\n[optimiser]"))
    process = start(place, "--devices", "2", "--strategy", "ddp", "--json")
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    result = json.loads(output.strip().splitlines()[-1])
    assert result["steps"] == 3
    assert output.count('"last_checkpoint"') == 1  # one of the two speaks
    ours, theirs = dict(asked(place, 0)), dict(asked(place, 1))
    assert set(ours) & set(theirs) >= {0, 1, 2}
    assert all(ours[step] != theirs[step] for step in (0, 1, 2))
    assert load_for_export(place / "run" / "last.ckpt").style_vectors.shape == (2, 4)


def test_the_command_says_what_is_wrong(place: Path) -> None:
    runner = CliRunner()
    missing = runner.invoke(app, ["train", str(place / "none.toml")])
    assert missing.exit_code == 1
    assert "cannot be read" in missing.output
    assert runner.invoke(app, ["train"]).exit_code == 2
    typo = command(place, "--from", "nobody.ckpt")
    assert typo.exit_code == 1 and "nobody.ckpt: there is no such checkpoint" in on_one_line(typo)
    assert not (place / "cache").exists()  # before any recording is read
    assert runner.invoke(app, ["train", str(place / "tiny.toml"), "--num-nodes", "0"]).exit_code == 2
    shutil.rmtree(place / "sax")
    common = ["train", str(place / "tiny.toml"), "--out", str(place / "run"), "--cache", str(place / "cache")]
    empty = runner.invoke(app, common)
    assert empty.exit_code == 1
    assert "style 'sax': there is no folder" in empty.output
    elsewhere = runner.invoke(app, [*common, "--data", str(place / "nowhere")])
    assert elsewhere.exit_code == 1


def test_flags_that_lightning_refuses_are_reported(place: Path) -> None:
    recipe = edited(place)
    options = RunOptions(place / "run", accelerator="abacus", progress=False)
    with pytest.raises(TrainingError, match=r"do not go together: .*abacus.*--accelerator"):
        run_training(recipe, recordings(place, recipe), options)


def test_the_command_names_what_it_leaves_out_and_trains_on_the_rest(place: Path) -> None:
    edited(place, ("steps = 6", "steps = 1"))
    (place / "sax" / "[broken].wav").write_text("no sound")
    soundfile.write(place / "vibraphone" / "silent.wav", np.zeros(48_000), 48_000)
    result = command(place)
    output = on_one_line(result)
    assert result.exit_code == 0, output
    assert f"skipped: {place / 'sax' / '[broken].wav'}: cannot be decoded" in output
    assert f"skipped: {place / 'vibraphone' / 'silent.wav'}: is silent (never above -50 dBFS)" in output
    assert "2 recordings skipped" in output
    assert "done: step 1 of 1" in output
    assert f"next: restyle export {place / 'run' / 'best.ckpt'} tiny.onnx" in output


def test_the_command_as_json(place: Path) -> None:
    edited(place, ("steps = 6", "steps = 2"))
    result = command(place, "--json")
    values = json.loads(result.stdout)  # and nothing else
    assert (values["steps"], values["ended_by"]) == (2, "steps")
    assert values["last_checkpoint"] == str(place / "run" / "last.ckpt")
    assert values["metrics"]["validation/unchanged"] > 0


def test_recordings_of_which_none_can_be_used_are_a_failure(place: Path) -> None:
    for path in (place / "sax").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    result = command(place)
    output = on_one_line(result)
    assert result.exit_code == 1
    assert f"style 'sax': none of the recordings in {place / 'sax'} can be used (alto_sax_a30.flac cannot be" in output
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("batch_size = 4", "batchsize = 4", "unknown key 'trainer.batchsize'; did you mean 'batch_size'?"),
        ("steps = 6", 'steps = "six"', "the field 'trainer.steps' must be int, got 'six' (str)"),
        ("[[style]]", "[style]", "is not TOML"),
    ],
)
def test_a_recipe_with_a_mistake_is_a_failure_that_names_the_field(
    place: Path, old: str, new: str, complaint: str
) -> None:
    (place / "tiny.toml").write_text((place / "tiny.toml").read_text().replace(old, new))
    result = command(place)
    output = on_one_line(result)
    assert result.exit_code == 1
    assert f"{place / 'tiny.toml'}: {complaint}" in output


def test_another_recipe_needs_fresh_which_moves_the_old_run_aside(place: Path) -> None:
    edited(place, ("steps = 6", "steps = 1"))
    assert command(place).exit_code == 0
    old = (place / "run" / "last.ckpt").read_bytes()
    edited(place, ("hidden = 16", "hidden = 24"))
    refused = command(place)
    assert refused.exit_code == 1
    assert "last.ckpt: the recipe has changed since (model.hidden: 16 -> 24); undo that" in on_one_line(refused)
    assert (place / "run" / "last.ckpt").read_bytes() == old

    # As long as the new run cannot begin, the old one stays where it is.
    (place / "sax").rename(place / "elsewhere")
    assert command(place, "--fresh").exit_code == 1
    assert (place / "run" / "last.ckpt").read_bytes() == old
    (place / "elsewhere").rename(place / "sax")

    assert command(place, "--fresh").exit_code == 0
    assert (place / "run" / "previous-1" / "last.ckpt").read_bytes() == old
    assert load_for_export(place / "run" / "last.ckpt").recipe.model.hidden == 24
    assert command(place, "--fresh").exit_code == 0
    assert steps_in(place / "run" / "previous-2" / "last.ckpt") == 1


def _spoil(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["restyle"].update(entries)


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "steps": (_spoil(steps="many"), "restyle.steps: is missing or no int"),
    "time": (lambda c: c["restyle"].pop("wall_seconds"), "restyle.wall_seconds: is missing or no float"),
    "metrics": (_spoil(metrics=None), "restyle.metrics: is missing or no dict"),
    "recordings": (_spoil(recordings=[]), "restyle.recordings: is missing or no dict"),
    "recipe": (_spoil(recipe=[1]), "restyle.recipe: is missing or no dict"),
    "recipe's field": (_spoil(recipe={"style": []}), "its recipe cannot be read"),
    "optimiser": (lambda c: c.pop("optimizer_states"), "holds weights but not where training stood"),
    "weight missing": (lambda c: c["state_dict"].pop("styles.weight"), "state_dict.styles.weight: has shape None"),
    "weight's shape": (
        lambda c: c["state_dict"].update({"styles.weight": torch.zeros(3, 4)}),
        "state_dict.styles.weight: has shape (3, 4), this version's model (2, 4)",
    ),
    "weight's value": (
        lambda c: c["state_dict"]["styles.weight"].fill_(torch.nan),
        "state_dict.styles.weight: holds something other than finite numbers",
    ),
    "weights": (lambda c: c.update(state_dict=[]), "holds no 'restyle' entry"),
}


def test_nothing_goes_on_from_a_checkpoint_that_is_not_whole(place: Path) -> None:
    edited(place, ("steps = 6", "steps = 1"))
    assert command(place).exit_code == 0
    edited(place, ("steps = 1", "steps = 2"))
    last = place / "run" / "last.ckpt"
    whole = last.read_bytes()
    for name, (spoil, complaint) in SPOILED.items():
        checkpoint = torch.load(io.BytesIO(whole), weights_only=True)
        spoil(checkpoint)
        torch.save(checkpoint, last)
        result = command(place)
        assert result.exit_code == 1, name
        assert complaint in on_one_line(result), name
        assert str(last) in on_one_line(result), name
    for content in (b"", b"hello", whole[:-1000], whole[1000:]):
        last.write_bytes(content)
        result = command(place)
        assert result.exit_code == 1
        assert f"{last}: cannot be read as a checkpoint" in on_one_line(result)
    last.write_bytes(whole)
    assert command(place).exit_code == 0
    assert steps_in(last) == 2


@pytest.mark.parametrize("name", ["recipe", "recipe's field", "weight's value", "weights"])
def test_nothing_is_exported_from_a_checkpoint_that_is_not_whole(place: Path, name: str) -> None:
    last = run(place, edited(place, ("steps = 6", "steps = 1"))).last_checkpoint
    checkpoint = read_checkpoint(last)
    SPOILED[name][0](checkpoint)
    torch.save(checkpoint, last)
    with pytest.raises(CheckpointError, match=re.escape(str(last))):
        load_for_export(last)


JUDGED = """[adversary]
weight = 0.5
feature_weight = 0.5
style_weight = 0.5
start_step = 0
[encoder]
share = 0.5
"""
ANOTHER_STYLE = """[[style]]
id = "sung"
label = "Sung"
folder = "sung"
midi_program = 52
licence = "CC0-1.0"
attribution = "nobody"
"""


def test_a_run_that_begins_with_another_takes_its_weights_and_matches_styles_by_id(place: Path) -> None:
    recipe = edited(place, ("[optimiser]\n", JUDGED + "[optimiser]\n"))
    first = run(place, recipe, "first")
    before = load_for_export(first.last_checkpoint)
    text = (place / "tiny.toml").read_text()
    head, sax, vibraphone = (
        text.partition("[[style]]")[0],
        *("[[style]]" + part for part in text.split("[[style]]")[1:]),
    )
    (place / "sung").mkdir()
    for path in (place / "sax").iterdir():
        audio, rate = soundfile.read(path, dtype="float32")
        soundfile.write(place / "sung" / path.name, audio[::-1], rate)
    (place / "more.toml").write_text(head + vibraphone + ANOTHER_STYLE + sax)
    more = load_recipe(place / "more.toml", ["optimiser.learning_rate=1e-12", "adversary.learning_rate=1e-12"])
    options = RunOptions(
        place / "more", begin_with=first.last_checkpoint, accelerator="cpu", devices="1", progress=False
    )
    result = run_training(more, recordings(place, more), options)
    after = load_for_export(result.last_checkpoint)
    old, new = before.style_vectors, after.style_vectors
    torch.testing.assert_close(new[0], old[1])  # the vibraphone
    torch.testing.assert_close(new[2], old[0])  # the saxophone
    torch.testing.assert_close(new[1], old.mean(dim=0))
    for name, value in before.generator.state_dict().items():
        torch.testing.assert_close(after.generator.state_dict()[name], value)
    ours, theirs = (read_checkpoint(path)["state_dict"] for path in (result.last_checkpoint, first.last_checkpoint))
    torch.testing.assert_close(ours["critic.parts.0.score.weight"][2], theirs["critic.parts.0.score.weight"][0])
    torch.testing.assert_close(ours["classifier.parts.0.score.bias"][0], theirs["classifier.parts.0.score.bias"][1])


def test_what_the_first_run_heard_stays_in_the_card_of_the_second(place: Path) -> None:
    first = run(place, load_recipe(place / "tiny.toml"), "first")
    text = (place / "tiny.toml").read_text()
    alone = text[: text.rindex("[[style]]")]
    (place / "alone.toml").write_text(alone)
    recipe = load_recipe(place / "alone.toml")
    options = RunOptions(
        place / "alone", begin_with=first.last_checkpoint, accelerator="cpu", devices="1", progress=False
    )
    result = run_training(recipe, recordings(place, recipe), options)
    again = run_training(
        load_recipe(place / "alone.toml", ["trainer.steps=8"]),
        recordings(place, recipe),
        dataclasses.replace(options, begin_with=None),
    )
    card, both = (card_of(load_for_export(path), "") for path in (first.last_checkpoint, again.last_checkpoint))
    assert result.steps == 6
    assert both.steps == 6 + 8
    assert set(card.recordings_sha256) == set(both.recordings_sha256)
    assert {source.style for source in both.sources} == {"sax", "vibraphone"}


@pytest.mark.parametrize("body", ["recurrent", "lstm"])
def test_a_run_with_more_units_begins_with_the_same_sound(place: Path, body: str) -> None:
    first = run(place, load_recipe(place / "tiny.toml", [f"model.body={body}"]), "first")
    wider = load_recipe(place / "tiny.toml", [f"model.body={body}", "model.hidden=24"])
    objective = RestoreObjective(wider, {})
    objective.begin_with(load_beginning(first.last_checkpoint))
    before = load_for_export(first.last_checkpoint)
    audio, style = 0.1 * torch.randn(2, 2048), before.style_vectors
    with torch.no_grad():
        old, _ = before.generator(audio, style, before.generator.init_state(2))
        for name in ("generator", "average_generator"):
            generator = getattr(objective, name)
            new, _ = generator(audio, style, generator.init_state(2))
            torch.testing.assert_close(new, old)
    cell = objective.generator.state_dict()["body.cell.weight_hh_l0"]
    assert cell.shape[1] == 24 and (cell[16:24] != 0.0).any() and not cell[:16, 16:].any()
    # They are heard as soon as something is learned.
    objective.generator(audio, style, objective.generator.init_state(2))[0].square().mean().backward()
    gradient = objective.generator.leave.weight.grad
    assert gradient is not None and (gradient[:, 16:] != 0.0).any()


def test_a_beginning_of_another_size_is_refused_by_name(place: Path) -> None:
    first = run(place, load_recipe(place / "tiny.toml"), "first")
    other = load_recipe(place / "tiny.toml", ["model.hidden=10"])
    options = RunOptions(
        place / "other", begin_with=first.last_checkpoint, accelerator="cpu", devices="1", progress=False
    )
    with pytest.raises(CheckpointError, match=r"last\.ckpt: state_dict\..*: has shape .* begin with a run of the same"):
        run_training(other, recordings(place, other), options)
    with pytest.raises(CheckpointError, match=r"nowhere\.ckpt: there is no such checkpoint"):
        run_training(other, recordings(place, other), dataclasses.replace(options, begin_with=place / "nowhere.ckpt"))


def test_segments_in_a_row_are_one_excerpt_and_the_model_remembers_it(place: Path) -> None:
    recipe = load_recipe(place / "tiny.toml", ["data.segments_in_a_row=3", "model.body=lstm"])
    library = recordings(place, recipe)
    batches = TrainingBatches([ExcerptSampler(style.train, recipe.data) for style in library.styles], recipe, 0, 0)
    row = [batches.batch(step) for step in range(4)]
    assert [batch.segment for batch in row] == [0, 1, 2, 0]
    assert all(torch.equal(batch.raw, row[0].raw) and batch.seed == row[0].seed for batch in row[:3])
    assert not torch.equal(row[3].raw, row[0].raw)
    module = RestoreObjective(recipe, {})
    asked: list[tuple[Tensor, Any]] = []
    restore = module.restore

    def noted(audio: Tensor, vectors: Tensor, averaged: bool = False, state: Any = None) -> Any:
        asked.append((audio, state))
        return restore(audio, vectors, averaged, state)

    module.restore = noted  # pyright: ignore[reportAttributeAccessIssue]
    module.log = module.log_dict = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]
    module._trainer = SimpleNamespace(world_size=1, global_step=0)  # pyright: ignore[reportAttributeAccessIssue]
    for number, batch in enumerate(row[:3]):
        module.training_step(batch, number).backward()
    whole = module.pair(row[0])
    torch.testing.assert_close(torch.cat([audio for audio, _ in asked], dim=1), whole.input)
    answer, _ = restore(whole.input, module.styles(row[0].style))
    last, _ = restore(*asked[2][:1], module.styles(row[0].style), state=asked[2][1])
    torch.testing.assert_close(last, answer[:, -last.shape[1] :], atol=1e-5, rtol=0)
    assert asked[0][1] is None and not asked[2][1].body.cell.requires_grad


def test_of_segments_in_a_row_each_may_become_another_style(place: Path) -> None:
    changes = ["data.segments_in_a_row=3", "adversary.weight=0.3", "adversary.cross_share=0.5"]
    played: dict[bool, list[list[bool]]] = {}
    for switching in (False, True):
        recipe = load_recipe(place / "tiny.toml", [*changes, f"adversary.switching={str(switching).lower()}"])
        library = recordings(place, recipe)
        batches = TrainingBatches([ExcerptSampler(style.train, recipe.data) for style in library.styles], recipe, 0, 0)
        module = RestoreObjective(recipe, {})
        module.log = module.log_dict = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]
        module._trainer = SimpleNamespace(world_size=1, global_step=0)  # pyright: ignore[reportAttributeAccessIssue]
        crossed: list[list[bool]] = []
        draw = module._crossed

        def noted(style: Tensor, random: Any, draw: Any = draw, crossed: Any = crossed) -> Any:
            drawn = draw(style, random)
            crossed.append(drawn[1].tolist())
            return drawn

        module._crossed = noted  # pyright: ignore[reportAttributeAccessIssue]
        for step in range(12):
            module.training_step(batches.batch(step), step)
        assert module._excerpt is not None and module._excerpt.state is not None
        played[switching] = crossed
    rows = [played[False][at : at + 3] for at in range(0, 12, 3)]
    assert all(row[0] == row[1] == row[2] for row in rows)
    assert any(played[True][at] != played[True][at + 1] for at in range(0, 12, 3))


def test_a_run_that_goes_on_within_an_excerpt_remembers_its_beginning(place: Path) -> None:
    recipe = load_recipe(place / "tiny.toml", ["data.segments_in_a_row=3", "model.body=lstm"])
    library = recordings(place, recipe)
    batches = TrainingBatches([ExcerptSampler(style.train, recipe.data) for style in library.styles], recipe, 0, 0)
    remembered: list[Any] = []
    for first in (0, 2):  # from the beginning, and from the last segment on as after a checkpoint
        torch.manual_seed(0)
        module = RestoreObjective(recipe, {})
        module.log = module.log_dict = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]
        module._trainer = SimpleNamespace(world_size=1, global_step=first)  # pyright: ignore[reportAttributeAccessIssue]
        for step in range(first, 3):
            module.training_step(batches.batch(step), step)
        assert module._excerpt is not None
        remembered.append(module._excerpt.state)
    whole, resumed = remembered
    assert float(whole.body.cell.abs().max()) > 0.0
    torch.testing.assert_close(resumed.body.cell, whole.body.cell, atol=1e-5, rtol=0)
    torch.testing.assert_close(resumed.body.hidden, whole.body.hidden, atol=1e-5, rtol=0)


def test_a_run_over_segments_in_a_row_goes_on_where_it_was(place: Path) -> None:
    recipe = load_recipe(place / "tiny.toml", ["data.segments_in_a_row=4", "model.body=lstm"])
    half = run(place, dataclasses.replace(recipe, trainer=dataclasses.replace(recipe.trainer, steps=2)))
    assert half.steps == 2
    assert run(place, recipe).steps == 6
