"""Noise and the critic that chooses: a real run, its model file, ``render --seed`` and ``render --candidates``."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

from export.verify import CRITIC_TOLERANCE, VerifyError, verify_critic  # noqa: E402
from export.writer import export_checkpoint  # noqa: E402
from realtime.audio import demo_playing  # noqa: E402
from realtime.bundle import DEMO_MIDI, Bundle, BundleError, blend_vectors, read_bundle, read_critic  # noqa: E402
from realtime.candidates import Critic, with_noise  # noqa: E402
from realtime.cli import app  # noqa: E402
from realtime.replay import read_show, replay  # noqa: E402
from tests.conftest import SAX_STYLE, tiny_recipe, write_notes  # noqa: E402
from tests.test_bundle import with_manifest  # noqa: E402
from training.checkpoint import TrainedModel, load_for_export  # noqa: E402
from training.models.critic import Critic as TorchCritic  # noqa: E402
from training.models.critic import Ratings  # noqa: E402

CLIPS = Path(__file__).parent / "data"
SAX = CLIPS / "alto_sax_a3.flac"
RECIPE = f"""objective = "cycle"
{tiny_recipe(0.2)}
[trainer]
steps = 3
batch_size = 2
validation_every_steps = 3
validation_segments = 1
checkpoint_every_steps = 3
media_count = 0
[adversary]
weight = 1.0
loss = "least_squares"
[cycle]
noise_dims = 2
pool_size = 3
{SAX_STYLE}
{SAX_STYLE.replace("sax", "vibraphone").replace("Saxophone", "Vibraphone").replace("65", "11")}
"""


@dataclass(frozen=True)
class Made:
    """A run of a few steps, and what it was exported to."""

    checkpoint: Path
    trained: TrainedModel
    path: Path
    bundle: Bundle


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Made:
    del one_thread
    place = tmp_path_factory.mktemp("cycle")
    (place / "tiny.toml").write_text(RECIPE)
    write_notes(place)
    run = ["--out", place / "run", "--cache", place / "cache", "--accelerator", "cpu", "--devices", "1"]
    result = restyle("train", place / "tiny.toml", *run)
    assert result.exit_code == 0, result.output
    checkpoint = place / "run" / "last.ckpt"
    trained = load_for_export(checkpoint)
    export_checkpoint(trained, place / "cycle.onnx")
    return Made(checkpoint, trained, place / "cycle.onnx", read_bundle(place / "cycle.onnx"))


def restyle(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def on_one_line(result: Result) -> str:
    return " ".join(result.output.replace("│", " ").split())


def render(made: Made, out: Path, *arguments: object) -> tuple[dict[str, Any], NDArray[np.float32]]:
    result = restyle("render", SAX, out, "--model", made.path, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["rendered"][0], np.asarray(soundfile.read(out)[0], np.float32)


def test_a_performance_has_the_noise_of_its_seed(made: Made, tmp_path: Path) -> None:
    arguments = ["live", "--model", str(made.path), "--clip", str(SAX), "--midi", str(DEMO_MIDI), "--patience", "5000"]
    played = []
    for seed in ([], ["--seed", "4"]):
        take = tmp_path / f"take{len(seed)}"
        command = [sys.executable, "-m", "realtime.cli", *arguments, *seed, "--record", str(take)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        show = read_show(take)
        again = replay(show, made.bundle)
        assert again.equal == again.compared > 0
        played.append(soundfile.read(take / "output.wav")[0])
    assert not np.array_equal(*played)


# -- the model file -----------------------------------------------------------------------------------------------


def test_the_file_says_how_many_numbers_are_noise_and_has_them_at_zero(made: Made) -> None:
    manifest = made.bundle.manifest
    assert manifest.noise_dims == 2
    assert all(style.vector[-2:] == (0.0, 0.0) and any(style.vector[:-2]) for style in manifest.styles)
    assert "noise: 2 numbers" in restyle("info", made.path).output


def test_the_critic_in_the_file_is_the_critic_of_the_run(made: Made) -> None:
    """Its scores' mean over places and resolutions, from the weights as the run has them, weight norm and all."""
    critic = Critic(made.bundle)
    state = torch.load(made.checkpoint, map_location="cpu", weights_only=False)["state_dict"]
    of_the_run = TorchCritic(48_000, 2).eval()
    of_the_run.load_state_dict({n.removeprefix("critic."): v for n, v in state.items() if n.startswith("critic.")})
    assert critic.clip_samples == made.trained.recipe.segment_samples
    clips = (0.1 * np.random.default_rng(0).standard_normal((5, critic.clip_samples))).astype(np.float32)
    with torch.no_grad():
        scores = of_the_run(torch.from_numpy(clips)).scores
    expected = np.mean([score.numpy().mean(axis=2) for score in scores], axis=0)
    np.testing.assert_allclose(critic.rate_clips(clips), expected, atol=1e-4)
    assert made.trained.critic is not None
    assert verify_critic(made.trained.critic, made.path, demo_playing(48_000)) < CRITIC_TOLERANCE


def test_a_critic_that_differs_is_not_written(made: Made) -> None:
    torch.manual_seed(1)
    another = Ratings(TorchCritic(48_000, 2)).eval()
    with pytest.raises(VerifyError, match=r"the critic differs by .* no file was written"):
        verify_critic(another, made.path, demo_playing(48_000))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"noise_dims": 4}, "manifest.noise_dims: 4 is outside 0..3, below style_dim"),
        ({"noise_dims": -1}, "manifest.noise_dims: -1 is outside 0..3, below style_dim"),
        ({"noise_dims": "2"}, "manifest: wrong value type for field"),
        ({"noise_dims": 2, "kind": "recognise"}, "manifest.noise_dims: belongs to models of kind 'transfer'"),
    ],
)
def test_odd_numbers_of_noise_are_named(made: Made, tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    path = tmp_path / "odd.onnx"
    path.write_bytes(with_manifest(lambda manifest: manifest.update(change), made.path.read_bytes()))
    with pytest.raises(BundleError) as error:
        read_bundle(path)
    assert str(error.value).startswith(f"{path}: ") and problem in str(error.value)


def test_a_damaged_critic_is_named_and_never_run(made: Made) -> None:
    for damaged in (b"@", base64.b64encode(b"no graph"), made.bundle.critic[: len(made.bundle.critic) // 8 * 4]):
        with pytest.raises(BundleError, match=r"cycle\.onnx: critic: is damaged"):
            read_critic(replace(made.bundle, critic=damaged))
    with pytest.raises(BundleError, match="critic input 'audio': is not as it should be"):
        read_critic(replace(made.bundle, critic=base64.b64encode(made.bundle.graph)))
    one_style = replace(made.bundle.manifest, styles=made.bundle.manifest.styles[:1])
    with pytest.raises(BundleError, match="critic output 'ratings': is not as it should be"):
        read_critic(replace(made.bundle, manifest=one_style))


# -- noise --------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**63), weight=st.floats(0.01, 0.99))
def test_noise_is_that_of_the_seed_in_every_style_and_blend(made: Made, seed: int, weight: float) -> None:
    noise = np.random.default_rng(seed).standard_normal(2)
    styles = with_noise(made.bundle, seed).manifest.styles
    for style, plain in zip(styles, made.bundle.manifest.styles, strict=True):
        assert style.vector == (*plain.vector[:-2], *noise)
    np.testing.assert_allclose(blend_vectors(styles, [weight, 1.0 - weight])[-2:], noise, rtol=1e-5)


def test_the_same_seed_is_the_same_sound_to_the_bit_and_another_is_another(made: Made, tmp_path: Path) -> None:
    told, first = render(made, tmp_path / "a.wav", "--seed", 5)
    _, again = render(made, tmp_path / "b.wav", "--seed", 5)
    _, other = render(made, tmp_path / "c.wav", "--seed", 6)
    silent, plain = render(made, tmp_path / "d.wav")
    np.testing.assert_array_equal(first, again)
    for different in (other, plain):
        assert len(different) == len(first) and np.abs(different - first).max() > 1e-3
    assert told["seed"] == 5 and "seed" not in silent and "candidates" not in told


# -- candidates ---------------------------------------------------------------------------------------------------


def test_the_one_that_the_critic_rates_highest_is_kept(made: Made, tmp_path: Path) -> None:
    told, kept = render(made, tmp_path / "out.wav", "--candidates", 4, "--seed", 3, "--style", "vibraphone")
    rated = {item["seed"]: item["rating"] for item in told["candidates"]}
    assert list(rated) == [3, 4, 5, 6] and len(set(rated.values())) == 4
    assert rated[told["seed"]] == max(rated.values())
    critic = Critic(made.bundle)
    for seed, rating in rated.items():
        _, audio = render(made, tmp_path / f"{seed}.flac", "--seed", seed, "--style", "vibraphone")
        if seed == told["seed"]:
            _, alone = render(made, tmp_path / "alone.wav", "--seed", seed, "--style", "vibraphone")
            np.testing.assert_array_equal(alone, kept)
        import soxr

        at_rate = soxr.resample(audio, 44_100, 48_000, quality="HQ").astype(np.float32)
        # There and back between rates and through a file of 16 bits: not to the last digit.
        assert critic.rate(iter([at_rate[None]]))[1] == pytest.approx(rating, abs=0.02)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".flac"] * 4 + [".wav"] * 2


def test_a_mix_is_rated_by_the_weighted_ratings_of_its_styles(made: Made, tmp_path: Path) -> None:
    """A style that weighs next to nothing tells next to nothing."""
    alone, _ = render(made, tmp_path / "a.wav", "--candidates", 2, "--style", "sax")
    nearly, _ = render(made, tmp_path / "b.wav", "--candidates", 2, "--style", "sax=1,vibraphone=1e-7")
    half, _ = render(made, tmp_path / "c.wav", "--candidates", 2, "--style", "sax,vibraphone")
    ratings = [[item["rating"] for item in told["candidates"]] for told in (alone, nearly, half)]
    assert ratings[1] == pytest.approx(ratings[0], abs=1e-4) and ratings[2] != pytest.approx(ratings[0], abs=1e-4)


def test_each_file_of_a_folder_has_its_own_choice_and_a_table(made: Made, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("alto_sax_a3", "vibraphone_418hz"):
        (tmp_path / "in" / f"{name}.flac").write_bytes((CLIPS / f"{name}.flac").read_bytes())
    (tmp_path / "in" / "bad.wav").write_text("no sound")
    result = restyle("render", tmp_path / "in", tmp_path / "out", "--model", made.path, "--candidates", 3)
    assert result.exit_code == 1 and "bad.wav" in on_one_line(result)
    lines = [line.split() for line in result.output.splitlines() if line.startswith("  ")]
    tables = [line for line in lines if line[0].isdigit()]
    assert [line[0] for line in tables] == ["0", "1", "2"] * 2 and sum(line[-1] == "kept" for line in tables) == 2
    for table in (tables[:3], tables[3:]):
        assert [float(line[1]) for line in table if line[-1] == "kept"] == [max(float(line[1]) for line in table)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["alto_sax_a3.flac", "vibraphone_418hz.flac"]


def test_pauses_and_the_cut_into_blocks_do_not_change_a_rating(made: Made) -> None:
    critic = Critic(made.bundle)
    size = critic.clip_samples
    audio = demo_playing(48_000)[24_000 : 24_000 + 5 * size]
    rating = critic.rate(iter([audio[None]]))
    np.testing.assert_allclose(critic.rate(np.array_split(audio[None], 37, axis=1)), rating, atol=1e-6)
    stereo = np.stack([1.5 * audio, 0.5 * audio])
    np.testing.assert_allclose(critic.rate(iter([stereo])), rating, atol=1e-5)
    with_pause = np.concatenate([audio, np.zeros(3 * size, np.float32)])
    np.testing.assert_allclose(critic.rate(iter([with_pause[None]])), rating, atol=1e-6)
    short = audio[: size // 3]
    np.testing.assert_allclose(critic.rate(iter([short[None]])), critic.rate(iter([np.resize(short, size)[None]])))
    tail = np.concatenate([audio[:size], audio[size : size + size // 2]])
    both = np.stack([tail[:size], tail[-size:]])
    np.testing.assert_allclose(critic.rate(iter([tail[None]])), critic.rate_clips(both).mean(axis=0), atol=1e-6)


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--seed", "--candidates"])
def test_a_model_without_noise_says_so(tmp_path: Path, option: str) -> None:
    result = restyle("render", SAX, tmp_path / "out.wav", option, 3)
    text = on_one_line(result)
    assert result.exit_code == 1 and "bank.onnx: manifest.noise_dims: is 0" in text and "cycle.noise_dims above" in text
    assert not list(tmp_path.iterdir())


def test_a_model_that_lost_its_critic_says_so(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "deaf.onnx"
    path.write_bytes(made.path.read_bytes().replace(b"restyle.critic", b"restyle.absent"))
    result = restyle("render", SAX, tmp_path / "out.wav", "--model", path, "--candidates", 3)
    assert result.exit_code == 1 and "deaf.onnx: critic: is missing" in on_one_line(result)
    assert [p.name for p in tmp_path.iterdir()] == ["deaf.onnx"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--candidates", 0], "Invalid value for '--candidates'"),
        (["--candidates", "many"], "Invalid value for '--candidates'"),
        (["--seed", -1], "Invalid value for '--seed'"),
        (["--candidates", 2, "--midi", CLIPS / "sligo_jig.mid"], "not with --midi"),
        (["--candidates", 2, "--learned", "sax.style"], "not with --learned"),
    ],
)
def test_wrong_usage_is_refused(tmp_path: Path, arguments: list[object], problem: str) -> None:
    result = restyle("render", SAX, tmp_path / "out.wav", *arguments)
    assert result.exit_code == 2 and problem in on_one_line(result), result.output
    assert not list(tmp_path.iterdir())


def test_a_target_that_cannot_be_written_is_known_before_the_work(made: Made, tmp_path: Path) -> None:
    for target, problem in ((tmp_path / "out.xyz", "'.xyz' is none of .wav"), (SAX, "is the input itself")):
        result = restyle("render", SAX, target, "--model", made.path, "--candidates", 1000)
        assert result.exit_code == 1 and problem in on_one_line(result)
    assert not list(tmp_path.iterdir())
