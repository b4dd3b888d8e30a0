"""An autoencoder plays from a code of exact bit rate, in which pitch and level are what they are in the sound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from export.writer import NamedStyle, card_of, write_model
from realtime.bundle import FIRST_MODEL, read_bundle
from realtime.cli import app
from realtime.spectral import SpectralSpec
from tests.conftest import SAX_STYLE, tiny_recipe, write_notes
from tests.streaming_contract import Streaming, assert_streaming_contract
from tests.test_bundle import refuse, with_manifest
from training.checkpoint import load_for_export
from training.library import load_library
from training.models.autoencoder import (
    DETUNED_CENTS,
    FOUND_LEVELS,
    LEVEL_STEP_DB,
    LOWEST_PITCH_HZ,
    PITCH_LEVELS,
    PITCHES_PER_OCTAVE,
    Autoencoder,
    Oscillators,
    OscillatorState,
)
from training.models.generator import GeneratorConfig
from training.recipe import RecipeError, load_recipe, recipe_from_dict
from training.train import RunOptions, run_training

SPEC = SpectralSpec()
HOP, RATE = SPEC.hop_samples, SPEC.sample_rate
TINY = GeneratorConfig(answer="autoencoder", style_dim=4, band_count=12, hidden=16, code_size=3, code_levels=5)


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(SPEC, TINY).eval()


def harmonic(hz: float, hops: int, falling: float, level: float = 0.1) -> torch.Tensor:
    """[1, hops*hop]: a steady tone whose partial k has amplitude k^-falling."""
    time_s = torch.arange(hops * HOP, dtype=torch.float64) / RATE
    orders = [k for k in range(1, 40) if k * hz < 0.45 * RATE]
    partials = [k**-falling * torch.sin(2 * np.pi * k * hz * time_s + k) for k in orders]
    return level * torch.stack(partials).sum(dim=0)[None].float()


def encoded(model: Autoencoder, audio: torch.Tensor) -> Any:
    with torch.no_grad():
        return model.encode(audio, model.init_state(len(audio)))[0]


def test_the_bit_rate_is_that_of_the_levels_once_a_hop(model: Autoencoder) -> None:
    assert model.code_levels == (*FOUND_LEVELS, 5, 5, 5) == (512, 8, 256, 5, 5, 5)
    manifest = replace(read_bundle(FIRST_MODEL).manifest, code_levels=model.code_levels)
    assert manifest.code_numbers_per_second == 6 * 375
    assert manifest.code_bits_per_second == pytest.approx(375 * (9 + 3 + 8 + 3 * np.log2(5)))


def test_each_number_of_the_code_has_its_levels_and_no_others(model: Autoencoder) -> None:
    audio = torch.cat([harmonic(hz, 40, 1.0) for hz in (98.0, 523.0)]) + 0.05 * torch.randn(2, 40 * HOP)
    heard = encoded(model, audio).heard.double()
    assert heard.shape == (2, 40, 6)
    places = (heard + 1.0) * (torch.tensor(model.code_levels) - 1) / 2
    assert float((places - places.round()).abs().max()) < 1e-4
    assert bool((places.round() >= 0).all()) and bool((places.round() < torch.tensor(model.code_levels)).all())


@settings(max_examples=25)
@given(
    st.floats(70.0, 1900.0, allow_subnormal=False),
    st.floats(0.0, 2.5, allow_subnormal=False),
    st.floats(-50.0, -12.0, allow_subnormal=False),
)
def test_the_code_names_the_pitch_of_a_tone_within_half_a_semitone(
    model: Autoencoder, hz: float, falling: float, level_db: float
) -> None:
    pitch = encoded(model, harmonic(hz, 30, falling, 10 ** (level_db / 20))).pitch[0, -8:]
    found_hz = LOWEST_PITCH_HZ * 2.0 ** (pitch.double() / PITCHES_PER_OCTAVE)
    assert float((1200 * torch.log2(found_hz / hz)).abs().max()) < 50.0


@settings(max_examples=25)
@given(st.floats(-70.0, -12.0, allow_subnormal=False))
def test_the_code_names_the_level_of_a_tone_within_a_step_or_two(model: Autoencoder, level_db: float) -> None:
    code = encoded(model, harmonic(441.0, 30, 9.0, np.sqrt(2.0) * 10 ** (level_db / 20)))
    named_db = LEVEL_STEP_DB * (code.level[0, -4:] - (FOUND_LEVELS[2] - 1))
    assert float((named_db - level_db).abs().max()) < 2 * LEVEL_STEP_DB


def test_silence_is_the_lowest_level_and_plays_nothing(model: Autoencoder) -> None:
    silence = torch.zeros(1, 20 * HOP)
    assert not encoded(model, silence).level.any()
    with torch.no_grad():
        out, _ = model(silence, torch.randn(1, 4), model.init_state(1))
    assert not out.any()


def test_phases_are_the_same_under_any_chunking() -> None:
    layer = Oscillators(SPEC)
    pitches = torch.randint(PITCH_LEVELS, (3, 12), generator=torch.Generator().manual_seed(0)).float()

    def step(x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        return layer(x.nan_to_num().long(), state)

    # A pitch is one number a hop, and the whole hop that ends with it is drawn towards it.
    whole, end = step(pitches, layer.init_state(3))
    for size in (1, 5):
        state, parts = layer.init_state(3), []
        for chunk in pitches.split(size, dim=1):
            part, state = step(chunk, state)
            parts.append(part)
        assert torch.equal(torch.cat(parts, dim=-1), whole) and torch.equal(state.phase, end.phase)


def test_the_model_keeps_the_streaming_contract_at_a_pitch(model: Autoencoder) -> None:
    tones = torch.cat([harmonic(hz, 10, 1.0) for hz in (147.0, 311.0)])
    style = torch.randn(1, 4)

    def step(x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        return model(x, style.expand(len(x), -1), state)

    assert_streaming_contract(Streaming(model.init_state, step, tones, HOP, HOP, model.latency_samples, HOP, 1e-5))


def test_a_pulse_train_repeats_at_the_pitch_of_its_number_at_unit_level_even_after_hours() -> None:
    layer = Oscillators(SPEC)
    number = 2 * PITCHES_PER_OCTAVE
    state = layer.init_state(1)
    late = OscillatorState(state.phase + 2.0**21 + 12_345.0, state.step, state.leak)
    with torch.no_grad():
        pulses, _ = layer(torch.full((1, 200), number), late)
    single = pulses[0, 0, HOP:].double()
    assert float(single.square().mean().sqrt()) == pytest.approx(1.0, abs=0.1)
    spectrum = np.abs(np.fft.rfft(single.numpy() * np.hanning(len(single))))
    assert int(spectrum.argmax()) * RATE / len(single) % (4 * LOWEST_PITCH_HZ) == pytest.approx(0, abs=4.0)
    assert len(DETUNED_CENTS) == layer.mix.shape[1] and layer.sources == 2


def recipe_values(**model: Any) -> dict[str, Any]:
    style = {"label": "A", "folder": "a", "midi_program": 0, "licence": "CC0-1.0", "attribution": ""}
    return {"style": [{"id": "a", **style}], "model": {"answer": "autoencoder", **model}}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (recipe_values(code_size=0), "model.code_size: must lie between 1 and 256, got 0"),
        (recipe_values(code_levels=1), "model.code_levels: must lie between 2 and 4096, got 1"),
        (recipe_values(code_levels=2.5), "'model.code_levels' must be int"),
        (recipe_values(body="unet"), "model.body: 'unet' answers with gains"),
        (recipe_values(code_sise=8), "unknown key 'model.code_sise'; did you mean 'code_size'?"),
        (
            {**recipe_values(), "spectral": {"synthesis_window_samples": 256}},
            "spectral.synthesis_window_samples: must be 128 for model.answer = 'autoencoder', got 256",
        ),
    ],
)
def test_a_recipe_of_a_code_that_cannot_be_names_the_field(values: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_from_dict(values, "mine.toml")
    assert text in str(error.value) and str(error.value).startswith("mine.toml: ")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(code_levels=[512, 1]), "manifest.code_levels: has a number outside 2..65536"),
        (lambda m: m.update(code_levels=[2**17]), "manifest.code_levels: has a number outside 2..65536"),
        (lambda m: m.update(code_levels=[2] * 1025), "manifest.code_levels: has more than 1024 numbers"),
        (lambda m: m.update(code_levels=["many"]), "code_levels"),
    ],
)
def test_a_manifest_of_a_code_that_cannot_be_names_the_field(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], text: str
) -> None:
    assert text in refuse(tmp_path, with_manifest(change))


def test_a_run_of_a_few_steps_leaves_a_file_that_says_its_code(tmp_path: Path) -> None:
    write_notes(tmp_path, {"sax": 3})
    text = tiny_recipe(0.1).replace("[model]", '[model]\nanswer = "autoencoder"\ncode_size = 2\ncode_levels = 3')
    path = tmp_path / "tiny.toml"
    path.write_text(
        f"{text}steadiness = 1.0\n[trainer]\nsteps = 4\nbatch_size = 4\nvalidation_every_steps = 4\n"
        f"validation_segments = 1\n{SAX_STYLE}"
    )
    recipe = load_recipe(path)
    library = load_library(recipe.style, tmp_path, recipe.data, RATE, tmp_path / "cache")
    options = RunOptions(tmp_path / "run", accelerator="cpu", devices="1", progress=False)
    result = run_training(recipe, library, options)
    assert result.steps == 4 and np.isfinite(result.metrics["validation/loss"])
    trained = load_for_export(result.last_checkpoint)
    assert isinstance(trained.generator, Autoencoder)
    file = tmp_path / "tiny.onnx"
    named = NamedStyle("sax", "Saxophone", 65, trained.style_vectors[0].numpy())
    write_model(trained.generator, SPEC, [named], card_of(trained, ""), file, "tiny", verify_hops=100)
    manifest = read_bundle(file).manifest
    assert manifest.code_levels == (*FOUND_LEVELS, 3, 3) and manifest.latency_samples == HOP
    said = " ".join(CliRunner().invoke(app, ["info", str(file)]).stdout.split())
    assert "plays from a code: 1,875 numbers, 8.7 kbit a second" in said
