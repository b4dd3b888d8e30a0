"""Composing: notes that continue a tune, the same for the same seed, in key, in metre; a model file that is checked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner, Result

from realtime.bundle import COMPOSER_MODEL, DEFAULT_MODEL, BundleError, Golden, StyleError, read_bundle
from realtime.cli import app as restyle
from realtime.compose import NoteStream, Sampling, compose_bars, entry_after
from realtime.compose_cli import compose
from realtime.controls import Performer
from realtime.notes import pitch_classes
from realtime.stream import Stream
from realtime.tunes import Tune, read_tune
from tests.test_bundle import with_manifest
from tests.test_notes import damaged

TUNES = Path(__file__).parent / "data"
JIG = TUNES / "sligo_jig.mid"
app = Typer()
app.command()(compose)


@pytest.fixture(scope="module")
def stream() -> NoteStream:
    return NoteStream(read_bundle(COMPOSER_MODEL))


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_shipped_composer_names_its_tunes_their_licence_and_its_figures() -> None:
    bundle = read_bundle(COMPOSER_MODEL)
    manifest = bundle.manifest
    assert manifest.kind == "notes" and not manifest.styles and len(bundle.graph) <= 2_000_000
    for source in manifest.card.sources:
        assert "CC-BY" in source.licence and "Breathnach" in source.attribution and source.recordings > 900
    figures = manifest.card.metrics
    for split in ("validation", "test"):
        ours = figures[f"{split}/perplexity"]
        assert ours < figures[f"{split}/markov_3_perplexity"] < figures[f"{split}/unigram_perplexity"]
        assert ours < figures[f"{split}/markov_12_perplexity"]


def test_every_machine_computes_what_the_maker_s_did(stream: NoteStream) -> None:
    golden = read_bundle(COMPOSER_MODEL).manifest.golden
    tokens = Golden.unpack(golden.audio).astype(int).tolist()
    stream.reset()
    found = np.concatenate([stream.step(token) for token in tokens])
    assert np.abs(found - Golden.unpack(golden.audio_out)).max() < 1e-3


def test_a_continuation_keeps_tempo_and_metre_and_fills_its_bars(stream: NoteStream) -> None:
    seed = read_tune(JIG)
    made = compose_bars(stream, seed, 8, Sampling(), 0)
    entry = entry_after(seed.notes)
    assert (made.tempo_bpm, made.metre, made.program) == (seed.tempo_bpm, seed.metre, seed.program)
    assert made.notes[0].start_ticks == entry >= seed.end_ticks
    assert made.end_ticks <= entry + 8 * 72 and len(made.notes) >= 8
    assert [note.start_ticks for note in made.notes] == sorted(note.start_ticks for note in made.notes)


def test_the_same_random_seed_gives_the_same_notes_and_another_gives_others(stream: NoteStream) -> None:
    seed = read_tune(JIG)
    one, again, other = (compose_bars(stream, seed, 4, Sampling(0.9), number).notes for number in (7, 7, 8))
    assert one == again != other


@settings(max_examples=6)
@given(st.sampled_from(["D dorian", "Bb minor pentatonic", "F# major"]), st.integers(0, 5), st.integers(0, 3))
def test_no_note_leaves_the_key(stream: NoteStream, key: str, top_k: int, random_seed: int) -> None:
    made = compose_bars(stream, read_tune(JIG), 2, Sampling(1.5, top_k, pitch_classes(key)), random_seed)
    assert {note.pitch % 12 for note in made.notes} <= pitch_classes(key)
    together = [(note.start_ticks, note.pitch) for note in made.notes]
    assert len(set(together)) == len(together)


def test_a_tune_far_out_of_the_model_s_range_is_answered_where_it_is(stream: NoteStream) -> None:
    seed = read_tune(JIG)
    low = tuple(
        type(note)(note.start_ticks, note.duration_ticks, note.pitch - 60, note.velocity) for note in seed.notes
    )
    made = compose_bars(stream, Tune(low), 2, Sampling(0.5), 0)
    assert all(0 <= note.pitch <= 59 for note in made.notes)


def test_temperature_zero_and_the_one_likeliest_are_the_same(stream: NoteStream) -> None:
    seed = read_tune(JIG)
    assert compose_bars(stream, seed, 2, Sampling(0.0), 1) == compose_bars(stream, seed, 2, Sampling(1.0, 1), 2)


@given(st.lists(st.integers(-50, 50), min_size=4, max_size=12), st.integers(1, 4), st.sampled_from([0.1, 1.0, 3.0]))
def test_only_what_is_allowed_and_among_the_likeliest_is_drawn(scores: list[int], top_k: int, heat: float) -> None:
    logits = np.array([score / 10 for score in scores], np.float32)
    allowed = np.arange(len(scores)) % 2 == 0
    drawn = Sampling(heat, top_k).draw(logits, allowed, np.random.default_rng(0))
    assert allowed[drawn]
    assert (logits[allowed] > logits[drawn]).sum() < top_k


def test_temperature_is_that_of_the_softmax() -> None:
    logits = np.log(np.array([0.7, 0.2, 0.1], np.float32))
    random = np.random.default_rng(0)
    everything = np.ones(3, dtype=bool)
    for heat in (0.5, 1.0, 2.0):
        drawn = [Sampling(heat).draw(logits, everything, random) for _ in range(4000)]
        wanted = np.exp(logits / heat) / np.exp(logits / heat).sum()
        assert np.abs(np.bincount(drawn, minlength=3) / 4000 - wanted).max() < 0.03


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_tune_and_its_new_bars_and_says_the_figures(tmp_path: Path) -> None:
    out = tmp_path / "more.mid"
    result = command("--seed", JIG, "--bars", 4, "--key", "E dorian", "--random-seed", 3, out, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert (figures["bars"], figures["metre"], figures["tempo_bpm"], figures["seed_notes"]) == (4, "6/8", 160.0, 174)
    seed, written = read_tune(JIG), read_tune(out)
    assert written.notes[: len(seed.notes)] == seed.notes and written.metre == (6, 8)
    assert len(written.notes) == len(seed.notes) + figures["notes"]
    assert [path.name for path in tmp_path.iterdir()] == ["more.mid"]


def test_the_new_bars_alone_begin_at_once(tmp_path: Path) -> None:
    out = tmp_path / "new.mid"
    assert command("--seed", JIG, "--bars", 2, "--alone", out).exit_code == 0
    assert read_tune(out).notes[0].start_ticks == 0


@pytest.mark.parametrize("kind", ["missing", "cut", "silent"])
def test_a_seed_that_is_no_tune_fails_and_leaves_what_was_there(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out.mid"
    out.write_bytes(b"precious")
    seed = damaged(kind, tmp_path)
    result = command("--seed", seed, out)
    assert result.exit_code == 1 and re.sub(r"\s", "", str(seed)) in re.sub(r"\s", "", result.output)
    assert out.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--seed", str(JIG), "--key", "D dorain", "out.mid"], "did you mean dorian"),
        (["--seed", str(JIG), "--temperature", "-1", "out.mid"], "temperature"),
        (["out.mid"], "--seed"),
        (["--seed", str(JIG)], "OUT.mid"),
        (["--live", "out.mid"], "--live"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(arguments: list[str], text: str) -> None:
    result = command(*arguments)
    assert result.exit_code == 2 and text in re.sub(r"[│\n]\s*", "", result.output)


def test_a_place_that_cannot_be_written_is_said_before_composing(tmp_path: Path) -> None:
    result = command("--seed", JIG, tmp_path / "nowhere" / "out.mid")
    assert result.exit_code == 1 and "nowhere" in result.output


# -- the model file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: m.pop("vocabulary"), "manifest.vocabulary"),
        (lambda m: m["vocabulary"]["tokens"].append("loud"), "vocabulary.tokens"),
        (lambda m: m["vocabulary"]["tokens"].append("pitch_999"), "vocabulary.tokens"),
        (lambda m: m["vocabulary"]["tokens"].remove("duration_1"), "graph output 'logits'"),
        (lambda m: m["vocabulary"].update(highest_pitch=500), "lowest_pitch, highest_pitch"),
        (lambda m: m.update(kind="transfer"), "manifest.vocabulary"),
        (lambda m: m["states"][0].update(shape=[1, 1]), "graph input 'state."),
    ],
)
def test_a_manifest_that_does_not_fit_its_graph_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], field: str
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(with_manifest(change, COMPOSER_MODEL.read_bytes()))
    with pytest.raises(BundleError, match=f"{re.escape(str(path))}: .*{re.escape(field)}"):
        read_bundle(path)


def test_a_model_of_sound_composes_nothing_and_a_composer_makes_no_sound(tmp_path: Path) -> None:
    result = command("--model", DEFAULT_MODEL, "--seed", JIG, tmp_path / "out.mid")
    assert result.exit_code == 1 and "'transfer' makes no notes" in re.sub(r"\s+", " ", result.output)
    bundle = read_bundle(COMPOSER_MODEL)
    with pytest.raises(BundleError, match="'notes' makes no sound"):
        Stream(bundle)
    with pytest.raises(StyleError, match="no styles to perform"):
        Performer(bundle.manifest)


def test_info_shows_the_card_of_a_composer() -> None:
    result = CliRunner().invoke(restyle, ["info", str(COMPOSER_MODEL)])
    assert result.exit_code == 0, result.output
    assert "(notes)" in result.output and "24 ticks to the quarter note" in result.output
    assert "CC-BY" in result.output


@pytest.mark.parametrize(("name", "why"), [("tune.mid", "is the tune itself"), ("song.wav", "ends in .mid")])
def test_neither_the_tune_nor_a_file_of_another_kind_is_written_over(tmp_path: Path, name: str, why: str) -> None:
    tune = tmp_path / "tune.mid"
    tune.write_bytes(JIG.read_bytes())
    (tmp_path / "song.wav").write_bytes(b"the best song ever")
    before = (tmp_path / name).read_bytes()
    result = command("--seed", tune, "--bars", 1, tmp_path / name)
    assert result.exit_code == 1 and why in " ".join(result.output.split())
    assert (tmp_path / name).read_bytes() == before
