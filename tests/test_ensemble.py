"""Several models in one performance: in line to the sample, at one level, and repeatable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from realtime import Bundle, BundleError, Part, Parts, Performer, Processor, join, read_bundle
from realtime.bench import measure_algorithmic_latency, measure_processor_latency
from realtime.bundle import DEFAULT_MODEL, DEFAULT_RECOGNISER, DEMO_CLIP, DEMO_MIDI, LONG_MODEL
from realtime.controls import select_mix
from realtime.ensemble import EnsembleStream
from realtime.limiter import LIMITER_KNEE
from realtime.render import render_samples
from realtime.resample import at_rate
from tests.test_bundle import with_manifest

RATE, HOP = 48_000, 128
BANK256, BANK = read_bundle(LONG_MODEL), read_bundle(DEFAULT_MODEL)
GUITAR = np.asarray(soundfile.read(DEMO_CLIP, dtype="float32", start=RATE // 4, frames=RATE)[0], np.float32)[None]
QUIET = 0.3 * GUITAR[:, : 160 * HOP]
"""A piece of it, at a level at which the limiter has nothing to do."""
ENSEMBLES = {
    "bank256 with bank": (BANK256, Parts(beside=(Part(DEFAULT_MODEL, "choir", 0.5),)), 256),
    "bank with bank256": (BANK, Parts(beside=(Part(LONG_MODEL, "choir", 0.5),)), 256),
    "bank256 then bank": (BANK256, Parts(then=(Part(DEFAULT_MODEL, "choir"),)), 256),
    "bank256 then bank256": (BANK256, Parts(then=(Part(LONG_MODEL, "choir"),)), 384),
    "bank with bank256 then bank256": (
        BANK,
        Parts(then=(Part(LONG_MODEL, "flute"),), beside=(Part(LONG_MODEL, "choir", 0.3),)),
        384,
    ),
}
EACH = pytest.mark.parametrize(("first", "parts", "latency_samples"), ENSEMBLES.values(), ids=ENSEMBLES.keys())


def prepared(bundle: Bundle, style: str = "violin", hops_per_step: int = 1, **values: float) -> Processor:
    performer = Performer(bundle.manifest)
    select_mix(performer, style)
    for name, value in values.items():
        performer.set(name, value)
    processor = Processor(bundle, hops_per_step=hops_per_step)
    processor.controls = performer.controls()
    processor.prepare(RATE, 32_768, 1)
    return processor


def played(bundle: Bundle, style: str = "violin", audio: NDArray[np.float32] = QUIET) -> NDArray[np.float32]:
    """Audio [1, samples] through the plug-in, the latency taken off."""
    return render_samples(prepared(bundle, style, hops_per_step=16), audio)


@EACH
def test_the_latency_is_the_sum_of_its_terms_and_is_measured(first: Bundle, parts: Parts, latency_samples: int) -> None:
    ensemble = join(first, parts)
    assert ensemble.manifest.latency_samples == ensemble.manifest.spectral.latency_samples == latency_samples
    assert prepared(ensemble).latency_samples == latency_samples
    assert measure_algorithmic_latency(ensemble) == latency_samples
    assert measure_processor_latency(ensemble) == latency_samples


@pytest.mark.parametrize("one, other", [(BANK256, BANK), (BANK, BANK256)], ids=["slow with fast", "fast with slow"])
def test_side_by_side_both_are_heard_at_the_same_sample_each_with_its_share(one: Bundle, other: Bundle) -> None:
    mixed = played(join(one, Parts(beside=(Part(other.path, "choir", 0.25),))))
    expected = 0.75 * played(one) + 0.25 * played(other, "choir")
    np.testing.assert_allclose(mixed, expected, atol=1e-6)


@pytest.mark.parametrize("style", ["violin", "violin=0.5,choir=0.5"])
def test_a_model_with_itself_is_itself(style: str) -> None:
    parts = Parts(beside=(Part(LONG_MODEL, style, 0.3), Part(LONG_MODEL, style, 0.3)))
    np.testing.assert_allclose(played(join(BANK256, parts), style), played(BANK256, style), atol=1e-6)


@pytest.mark.parametrize("level", [1.0, 8.0], ids=["as it is", "into the limiter"])
@pytest.mark.parametrize(("one", "other"), [(BANK256, BANK), (BANK, BANK256)], ids=["slow then fast", "fast then slow"])
def test_in_series_it_is_one_after_the_other_with_one_hop_to_wait_for(one: Bundle, other: Bundle, level: float) -> None:
    audio = level * QUIET
    both = prepared(join(one, Parts(then=(Part(other.path, "choir"),)))).process(audio)
    between = prepared(one).process(audio)
    assert (np.abs(between).max() > LIMITER_KNEE) == (level > 1.0)
    # The first hop is the one that the second model need not wait for again.
    after = prepared(other, "choir").process(between[:, HOP:])
    np.testing.assert_allclose(both[:, :-HOP], after, atol=1e-6)


@pytest.fixture(scope="module")
def longest() -> Processor:
    return prepared(join(*ENSEMBLES["bank with bank256 then bank256"][:2]))


@settings(max_examples=5)
@given(blocks=st.lists(st.integers(1, 700), min_size=1, max_size=6))
def test_the_block_length_changes_nothing(longest: Processor, blocks: list[int]) -> None:
    audio = QUIET[:, : 20 * HOP]
    longest.reset()
    at_once = longest.process(audio).copy()
    longest.reset()
    out, at, turn = [], 0, 0
    while at < audio.shape[1]:
        block = audio[:, at : at + blocks[turn % len(blocks)]]
        out.append(longest.process(block).copy())
        at, turn = at + block.shape[1], turn + 1
    np.testing.assert_array_equal(np.concatenate(out, axis=1), at_once)


def test_many_hops_at_once_give_the_same_samples(longest: Processor) -> None:
    longest.reset()
    many = played(join(*ENSEMBLES["bank with bank256 then bank256"][:2]))
    np.testing.assert_allclose(many, render_samples(longest, QUIET), atol=1e-5)


def test_a_change_of_style_moves_the_first_model_alone() -> None:
    mixed, alone = prepared(join(BANK256, Parts(beside=(Part(DEFAULT_MODEL, "choir", 0.5),)))), prepared(BANK256)
    beside = prepared(BANK, "choir")
    out: list[list[NDArray[np.float32]]] = [[], [], []]
    for hop in range(60):
        for made, processor in zip(out, (mixed, alone, beside), strict=True):
            if hop == 30 and processor is not beside:
                performer = Performer(processor.manifest)
                performer.select("music_box")
                processor.controls = performer.controls()
            made.append(processor.process(QUIET[:, hop * HOP : (hop + 1) * HOP]).copy())
    together, first, second = (np.concatenate(made, axis=1) for made in out)
    # The level of a style rises before the delay line here and after the overlap there, which is the same hop.
    late = np.pad(second, ((0, 0), (128, 0)))[:, : second.shape[1]]
    np.testing.assert_allclose(together, 0.5 * first + 0.5 * late, atol=1e-6)


@pytest.mark.parametrize("broken", ["_first", "_beside", "_then"])
def test_a_model_that_gives_no_numbers_leaves_the_dry_signal_at_the_same_delay_and_comes_back(broken: str) -> None:
    processor = prepared(join(*ENSEMBLES["bank with bank256 then bank256"][:2]))
    stream = processor.stream
    assert isinstance(stream, EnsembleStream)
    hurt = getattr(stream, broken)
    model = hurt if broken == "_first" else hurt[0]
    kept = model.style
    latency, out = processor.latency_samples, []
    for hop in range(60):
        if hop == 20:
            kept = model.style.copy()
            (stream if broken == "_first" else model).style[:] = np.nan
        elif hop == 21:
            stream.style[:] = processor.controls.with_level_in_style().style
            model.style[:] = kept
        out.append(processor.process(QUIET[:, hop * HOP : (hop + 1) * HOP]).copy())
    heard = np.concatenate(out, axis=1)
    assert processor.meters.bad_output_hops == 1 and np.isfinite(heard).all()
    end = 22 * HOP - 1  # hop 20 is heard a hop later, and the step to the dry signal has faded out where it ends
    np.testing.assert_allclose(heard[0, end], QUIET[0, end - latency], atol=1e-6)
    assert np.abs(heard[:, 40 * HOP :] - QUIET[:, 40 * HOP - latency : 60 * HOP - latency]).max() > 0.01


@pytest.mark.parametrize("broken", ["_first", "_beside", "_then"])
def test_garbage_that_is_finite_does_not_pass_for_sound_either(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = prepared(join(*ENSEMBLES["bank with bank256 then bank256"][:2]))
    hurt = getattr(processor.stream, broken)
    model = hurt if broken == "_first" else hurt[0]
    for hop in range(30):
        with monkeypatch.context() as patch:
            if hop == 20:
                patch.setattr(model, "step", lambda: np.full((1, HOP), 1e17, np.float32))
            heard = processor.process(QUIET[:, hop * HOP : (hop + 1) * HOP])
        assert processor.meters.bad_output_hops == int(hop >= 20) and np.abs(heard).max() <= 1.0


def test_at_another_rate_it_is_the_plug_in_that_one_model_is() -> None:
    plugin = at_rate(prepared(join(*ENSEMBLES["bank256 then bank256"][:2]), dry_wet=0.0), 44_100)
    plugin.prepare(44_100, 4096, 1)
    audio = np.zeros((1, 4096), np.float32)
    audio[0, 100] = 0.5
    assert int(np.abs(plugin.process(audio)).argmax()) - 100 == plugin.latency_samples


def restyle(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "realtime.cli", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert result.returncode == code and "Traceback" not in result.stderr, (result.stdout, result.stderr)
    return result


def test_render_takes_the_options_and_lines_up(tmp_path: Path) -> None:
    clip, out = tmp_path / "in.wav", tmp_path / "out.wav"
    soundfile.write(clip, QUIET[0], RATE, subtype="FLOAT")
    restyle(*("render", clip, out, "--style", "violin", "--with", "bank256", "--with-style", "choir", "--mix", "0.25"))
    heard = np.asarray(soundfile.read(out, dtype="float32")[0], np.float32)
    expected = 0.75 * played(BANK) + 0.25 * played(BANK256, "choir")
    np.testing.assert_allclose(heard, expected[0], atol=1e-5)


def perform(folder: Path, *arguments: str | Path) -> str:
    """A second of the guitar through ``live``, with a style changed by MIDI, recorded into ``take``."""
    clip = folder / "in.wav"
    soundfile.write(clip, GUITAR[0], RATE, subtype="FLOAT")
    return restyle("live", "--clip", clip, "--midi", DEMO_MIDI, "--record", folder / "take", *arguments).stdout


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A model file of one's own."""
    path = tmp_path / "mine.onnx"
    path.write_bytes(with_manifest(lambda manifest: manifest.update(name="mine"), DEFAULT_MODEL.read_bytes()))
    return path


@pytest.mark.parametrize("inference", ["worker", "deferred", "callback"])
def test_a_recorded_ensemble_is_replayed_to_the_sample(tmp_path: Path, mine: Path, inference: str) -> None:
    arguments = ("--then", mine, "--then-style", "choir", "--with", "bank256", "--mix", "0.4", "--inference", inference)
    said = perform(tmp_path, *arguments)
    assert f"latency {384 if inference == 'deferred' else 256} samples" in said and "hop 128 + overlap 128" in said
    result = json.loads(restyle("replay", tmp_path / "take", "--json").stdout)
    assert result["equal"] == result["compared"] >= RATE


def test_a_replay_finds_a_model_that_was_moved_or_says_which_is_missing(tmp_path: Path, mine: Path) -> None:
    perform(tmp_path, "--then", mine)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "first.onnx").write_bytes(DEFAULT_MODEL.read_bytes())
    mine.rename(moved / "mine.onnx")
    error = restyle("replay", tmp_path / "take", code=1).stderr
    assert f"{mine}: a model of the show's ensemble is not there" in error and "SHA-256" in error
    restyle("replay", tmp_path / "take", "--model", moved / "first.onnx")
    (moved / "mine.onnx").write_bytes(DEFAULT_MODEL.read_bytes())
    restyle("replay", tmp_path / "take", "--model", moved / "first.onnx", code=1)


def test_models_that_cannot_play_together_are_named_with_the_remedy(tmp_path: Path) -> None:
    def altered(name: str, **spectral: int) -> Path:
        def change(manifest: dict[str, Any]) -> None:
            manifest["spectral"].update(spectral)

        path = tmp_path / name
        path.write_bytes(with_manifest(change, DEFAULT_MODEL.read_bytes()))
        return path

    for path, field, words in (
        (altered("slow.onnx", sample_rate=44_100), "manifest.spectral.sample_rate", ("44100 Hz", "48000 Hz")),
        (DEFAULT_RECOGNISER, "manifest.kind", ("'recognise'", "'transfer'")),
    ):
        for parts in (Parts(then=(Part(path),)), Parts(beside=(Part(path, None, 0.5),))):
            with pytest.raises(BundleError) as raised:
                join(BANK, parts)
            text = str(raised.value)
            assert text.startswith(f"{path}: {field}: ") and all(word in text for word in words)
    with pytest.raises(BundleError, match=r"sample_rate: is 44100 Hz, that of .*bank\.onnx"):
        join(BANK, Parts(then=(Part(tmp_path / "slow.onnx"),)))


def test_wrong_options_are_said_before_anything_plays(tmp_path: Path) -> None:
    common = ("render", DEMO_CLIP, tmp_path / "out.wav")
    assert "--then-style is given 1 times" in restyle(*common, "--then-style", "choir", code=2).stderr
    assert "--with MODEL" in restyle(*common, "--mix", "0.5", code=2).stderr
    assert "did you mean choir" in restyle(*common, "--with", "bank256", "--with-style", "chior", code=1).stderr
    assert "there is no such file" in restyle(*common, "--then", tmp_path / "none.onnx", code=1).stderr
    assert not (tmp_path / "out.wav").exists()


def test_shares_add_up_to_one_at_most() -> None:
    with pytest.raises(ValueError, match="more than one"):
        Parts(beside=(Part(DEFAULT_MODEL, None, 0.7), Part(DEFAULT_MODEL, None, 0.7)))
