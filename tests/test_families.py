"""Every recipe that is shipped, by the commands alone: trained ``--fast``, exported, and used for what it is for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mido
import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from realtime.bundle import DEMO_CLIP, read_bundle  # noqa: E402
from realtime.cli import app  # noqa: E402
from tests.conftest import CLIPS  # noqa: E402
from training.checkpoint import load_for_export  # noqa: E402
from training.recipe import Recipe, load_recipe, quick_look  # noqa: E402

RECIPES = Path(__file__).parents[1] / "training" / "recipes"
PLAYED = ("recurrent", "unet", "cycle", "autoencoder")
OTHERS = ("bank", "generate", "recognise", "compose")  # "first" and "gan" are "bank" with other numbers
RATE = 48_000

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for every style of any recipe, each with real notes at a tape speed of its own, or with tunes."""
    place = tmp_path_factory.mktemp("recordings")
    clips = sorted(CLIPS.glob("*.flac"))
    plans = {name: recipe(name) for name in (*PLAYED, *OTHERS)}
    styles = {style.folder for plan in plans.values() for style in plan.style if not plan.composes}
    for number, style in enumerate(sorted(styles)):
        (place / style).mkdir()
        audio, rate = soundfile.read(clips[number % len(clips)], dtype="float32")
        for part, cut in enumerate(np.array_split(audio, 3)):
            soundfile.write(place / style / f"{part}.wav", cut, round(rate * 2 ** (number / 48)))
    for style in plans["compose"].style:
        folder = place / style.folder
        folder.mkdir(parents=True, exist_ok=True)
        for tune in CLIPS.glob("*.mid"):
            shutil.copy(tune, folder)
            backwards(tune, folder / f"{tune.stem} backwards.mid")
    return place


def backwards(tune: Path, path: Path) -> None:
    """The same rhythm with the pitches in the other direction: another tune."""
    song = mido.MidiFile(tune)
    for track in song.tracks:
        pitches = [message.note for message in track if message.type == "note_on" and message.velocity]
        turned = dict(enumerate(reversed(pitches)))
        at, sounding = 0, {}
        for message in track:
            if message.type == "note_on" and message.velocity:
                sounding[message.note] = turned[at]
                message.note, at = turned[at], at + 1
            elif message.type in ("note_on", "note_off"):
                message.note = sounding.pop(message.note, message.note)
    song.save(path)


def recipe(name: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.toml")


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def train_fast(name: str, recordings: Path, run: Path) -> Path:
    """The last checkpoint of a run of this recipe."""
    paths = ("--data", recordings, "--out", run, "--cache", recordings / "cache")
    arguments = ("--fast", "--set", "trainer.steps=6", *paths, "--accelerator", "cpu", "--json")
    said = json.loads(command("train", RECIPES / f"{name}.toml", *arguments))
    assert said["steps"] == 6 < quick_look(recipe(name)).trainer.steps and said["ended_by"] == "steps"
    assert all(np.isfinite(value) for value in said["metrics"].values())
    return Path(said["last_checkpoint"])


@pytest.mark.parametrize("name", OTHERS)
def test_every_recipe_trains_in_a_moment(name: str, recordings: Path, tmp_path: Path) -> None:
    checkpoint = train_fast(name, recordings, tmp_path / "run")
    if name in ("recognise", "compose"):
        out = tmp_path / "m.onnx"
        refused = CliRunner().invoke(app, ["export", str(checkpoint), str(out), "--emphasis", "1.2"])
        assert refused.exit_code == 2 and "--emphasis: " in refused.output and not out.exists()
        refused = CliRunner().invoke(app, ["export", str(checkpoint), str(out), "--mean-with", str(checkpoint)])
        assert refused.exit_code == 2 and "performs no styles; leave it out" in refused.output and not out.exists()


@pytest.mark.parametrize("name", PLAYED)
def test_a_family_trains_is_exported_rendered_and_performed(name: str, recordings: Path, tmp_path: Path) -> None:
    model, clip, out = tmp_path / f"{name}.onnx", tmp_path / "clip.wav", tmp_path / "out.wav"
    checkpoint = train_fast(name, recordings, tmp_path / "run")
    first = recipe(name).style[0].id
    command("export", checkpoint, model, "--emphasis", f"1.25,{first}=0.9")
    manifest = read_bundle(model).manifest
    assert manifest.name == f"{name}-fast" and manifest.card.metrics["style_emphasis"] == 1.25
    learned = load_for_export(checkpoint).style_vectors
    written = torch.tensor([style.vector for style in manifest.styles])
    factors = torch.tensor([[0.9 if style.id == first else 1.25] for style in manifest.styles])
    mean = learned.mean(dim=0)
    torch.testing.assert_close(written, mean + factors * (learned - mean))
    refused = CliRunner().invoke(app, ["export", str(checkpoint), str(tmp_path / "no.onnx"), "--emphasis", "kazoo=2"])
    assert refused.exit_code == 1 and "there is no style 'kazoo'; there are: " in refused.output
    soundfile.write(clip, soundfile.read(DEMO_CLIP, frames=RATE)[0], RATE)
    style = ("--style", manifest.styles[-1].id)
    command("render", clip, out, "--model", model, *style)
    take = ("--clip", clip, "--record", tmp_path / "take", "--inference", "callback")
    live = (sys.executable, "-m", "realtime.cli", "live", "--model", model, *style, *take)
    subprocess.run([str(part) for part in live], check=True, capture_output=True)
    for path in (out, tmp_path / "take" / "output.wav"):
        audio = soundfile.read(path)[0]
        assert np.isfinite(audio).all() and 1e-4 < np.sqrt(np.mean(audio**2)) < 1.0
