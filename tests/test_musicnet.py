"""MusicNet's layout, made small from real notes: reading, piano rolls, solos, style folders, damage."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from realtime.cli import app as whole_app  # noqa: E402
from training.cli import data  # noqa: E402
from training.library import load_library  # noqa: E402
from training.musicnet import (  # noqa: E402
    LABEL_COLUMNS,
    LABEL_RATE,
    METADATA_COLUMNS,
    MusicNetError,
    NoteLabel,
    SoloConfig,
    is_musicnet,
    piano_roll,
    read_labels,
    read_musicnet,
    solo_stretches,
    tune_of,
    write_styles,
)
from training.recipe import load_recipe  # noqa: E402
from training.tunes import load_tunes  # noqa: E402

CLIPS = Path(__file__).parent / "data"
METADATA = """id,composer,composition,movement,ensemble,source,transcriber,catalog_name,seconds
1727,Schubert,Piano Quintet in A major,2. Andante,Piano Quintet,European Archive,http://x.org/,OP114,8
1728,Schubert,"Sonata, so called",1. Allegro,Solo Piano,Museopen,http://x.org/,D958,8
2303,Bach,WTK I No 1,Prelude,Solo Piano,Suzuki,http://x.org/,BWV846,8
"""
HEADER = ",".join(LABEL_COLUMNS)
app = typer.Typer()
app.command()(data)


def note(name: str, samples: int) -> NDArray[np.float32]:
    audio, _ = soundfile.read(CLIPS / f"{name}.flac", frames=samples)
    return np.asarray(audio, dtype=np.float32)


def row(start_seconds: float, end_seconds: float, instrument: int, pitch: int) -> str:
    return f"{round(start_seconds * LABEL_RATE)},{round(end_seconds * LABEL_RATE)},{instrument},{pitch},0.0,1.0,Quarter"


def label(start: int, end: int, program: int = 0, pitch: int = 60) -> NoteLabel:
    return NoteLabel(start, end, program, pitch, 0.0, 1.0, "Quarter")


def piece(folder: Path, split: str, number: str, rows: list[str]) -> None:
    """Eight seconds in which the labelled notes really sound: piano labels as vibraphone, cello labels as saxophone."""
    for kind in ("data", "labels"):
        (folder / f"{split}_{kind}").mkdir(parents=True, exist_ok=True)
    audio = np.random.default_rng(int(number)).normal(0, 1e-4, 8 * LABEL_RATE).astype(np.float32)
    for line in rows:
        start, end, instrument = (int(value) for value in line.split(",")[:3])
        sound = note("vibraphone_418hz" if instrument == 1 else "alto_sax_a3", end - start)
        audio[start : start + len(sound)] += 0.5 * sound
    soundfile.write(folder / f"{split}_data" / f"{number}.wav", audio, LABEL_RATE, subtype="FLOAT")
    (folder / f"{split}_labels" / f"{number}.csv").write_text("\n".join([HEADER, *rows, ""]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Cello alone from 0 to 3 s, both from 3 to 5 s, piano alone from 5 to 8 s; and two pieces of piano alone."""
    top = tmp_path / "musicnet"
    both = [row(0, 1.5, 43, 57), row(1.6, 5, 43, 57), row(3, 5, 1, 68), row(5, 6.5, 1, 68), row(6.5, 8, 1, 68)]
    piece(top, "train", "1727", both)
    piece(top, "train", "1728", [row(at, at + 1.5, 1, 68) for at in range(0, 8, 2)])
    piece(top, "test", "2303", [row(at, at + 1.0, 1, 68) for at in range(0, 8, 2)])
    (top / "musicnet_metadata.csv").write_text(METADATA)
    return top


def test_the_published_layout_is_read(folder: Path) -> None:
    found = read_musicnet(folder)
    assert is_musicnet(folder) and not is_musicnet(folder.parent) and found.problems == ()
    assert [(p.id, p.split, p.composer, p.ensemble) for p in found.pieces] == [
        ("1727", "train", "Schubert", "Piano Quintet"),
        ("1728", "train", "Schubert", "Solo Piano"),
        ("2303", "test", "Bach", "Solo Piano"),
    ]
    assert found.pieces[1].composition == "Sonata, so called" and found.pieces[0].seconds == 8.0
    first = found.pieces[0].labels()[0]
    assert first == NoteLabel(0, 66_150, 42, 57, 0.0, 1.0, "Quarter")  # General MIDI's cello is 42 counted from 0


def test_the_metadata_may_lie_beside_the_folder_and_have_a_byte_order_mark(folder: Path) -> None:
    (folder / "musicnet_metadata.csv").rename(folder.parent / "musicnet_metadata.csv")
    content = METADATA.replace("\n", "\r\n").encode("utf-8-sig")
    (folder.parent / "musicnet_metadata.csv").write_bytes(content)
    assert is_musicnet(folder) and len(read_musicnet(folder).pieces) == 3


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["1,2,43,53,0,1,Q", "x,2,43,53,0,1,Q"], r"line 3: start_time must be a whole number .* got 'x'"),
        (["10,2,43,53,0,1,Q"], r"line 2: end_time 2 lies before start_time 10"),
        (["1,2,0,53,0,1,Q"], r"line 2: instrument must be a whole number from 1 to 128, got '0'"),
        (["1,2,43,128,0,1,Q"], r"line 2: note must be a whole number from 0 to 127"),
        (["1,2,43,53,nan,1,Q"], r"line 2: start_beat must be a number"),
        (["1,2,43,53,0,1,Q", "", "1,2,43"], r"line 4: has 3 fields instead of 7"),
        (['1,2,43,53,0,1,"Q" x'], r"line 2: is not CSV"),
        (["1,2,43,53,0,1,\udcff"], r"line 2: is not UTF-8"),
        ([], r"holds no notes"),
        (None, r"line 1: has no column end_time, instrument"),
    ],
)
def test_a_wrong_line_of_labels_is_named(tmp_path: Path, lines: list[str] | None, complaint: str) -> None:
    path = tmp_path / "1727.csv"
    text = "start_time,note\n1,2\n" if lines is None else "\n".join([HEADER, *lines, ""])
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(MusicNetError, match=f"1727.csv: {complaint}"):
        read_labels(path)


@given(st.binary(max_size=200) | st.text("0123456789,.\n\"'x-", max_size=200).map(str.encode))
@settings(max_examples=150, deadline=None)
def test_labels_of_anything_are_notes_or_a_named_error(tmp_path_factory: pytest.TempPathFactory, tail: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(HEADER.encode() + b"\n" + tail)
    try:
        assert all(0 <= each.pitch < 128 and each.start_samples <= each.end_samples for each in read_labels(path))
    except MusicNetError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("D958,8", "D958,eight", r"line 3: seconds must be a number"),
        ("D958,8", "D958", r"line 3: has 8 fields instead of 9"),
        ("1728", "1727", r"line 3: id 1727 is there twice"),
        ("1728", "../1728", r"line 3: id must be a whole number"),
        ("Bach", "???", r"line 4: composer must have a letter"),
        ("composer,", "who,", r"line 1: has no column composer"),
    ],
)
def test_wrong_metadata_is_named(folder: Path, old: str, new: str, complaint: str) -> None:
    (folder / "musicnet_metadata.csv").write_text(METADATA.replace(old, new, 1))
    with pytest.raises(MusicNetError, match=f"musicnet_metadata.csv: {complaint}"):
        read_musicnet(folder)


def test_what_is_missing_or_left_over_is_named_and_the_rest_is_used(folder: Path) -> None:
    (folder / "train_data" / "1727.wav").unlink()
    (folder / "train_labels" / "1728.csv").unlink()
    shutil.copy(folder / "test_data" / "2303.wav", folder / "test_data" / "9999.wav")
    found = read_musicnet(folder)
    assert [p.id for p in found.pieces] == ["2303"]
    assert {item.path.name: item.reason for item in found.problems} == {
        "1727.wav": "is missing; musicnet_metadata.csv, line 2, names it",
        "1728.csv": "is missing; 1728.wav has no notes without it",
        "9999.wav": "is not in musicnet_metadata.csv; its composer and ensemble are not known",
    }
    (folder / "test_data" / "2303.wav").unlink()
    with pytest.raises(MusicNetError, match=r"no piece has both sound and labels \(.*1727\.wav is missing"):
        read_musicnet(folder)
    (folder / "musicnet_metadata.csv").unlink()
    with pytest.raises(MusicNetError, match=r"musicnet_metadata.csv is missing; it is published beside"):
        read_musicnet(folder)
    with pytest.raises(MusicNetError, match="there is no such folder"):
        read_musicnet(folder / "none")


def test_a_piano_roll_by_hand() -> None:
    labels = [label(0, 22_050, 0, 60), label(22_050, 44_100, 42, 64), label(1000, 1001, 0, 72)]
    roll = piano_roll(labels, 44_100, 80)
    assert roll.shape == (128, 81)
    assert np.flatnonzero(roll[60]).tolist() == list(range(40))  # the frame at 0.5 s is no longer in it
    assert np.flatnonzero(roll[64]).tolist() == list(range(40, 80))
    assert np.flatnonzero(roll[72]).tolist() == [2]  # between the frames at 551 and 1102: sounds in the one after it
    assert roll.sum() == 81
    cello = piano_roll(labels, 44_100, 80, program=42)
    assert np.flatnonzero(cello.any(axis=1)).tolist() == [64]


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 127)), max_size=8),
    st.fractions(1, 500, max_denominator=1001),
)
@settings(deadline=None)
def test_a_frame_holds_the_notes_that_sound_at_its_time(notes: list[tuple[int, int, int]], fps: Fraction) -> None:
    labels = [label(min(a, b), max(a, b), 0, pitch) for a, b, pitch in notes]
    roll = piano_roll(labels, 6000, fps)
    for frame in range(roll.shape[1]):
        time = frame * LABEL_RATE / fps
        sounding = {each.pitch for each in labels if each.start_samples <= time < each.end_samples}
        shown = set(np.flatnonzero(roll[:, frame]).tolist())
        assert sounding <= shown
        before = time - LABEL_RATE / fps
        brief = {each.pitch for each in labels if before < each.start_samples <= each.end_samples <= time}
        assert shown <= sounding | brief


TENTH = LABEL_RATE // 10


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(1, 30), st.sampled_from([0, 42])), max_size=12),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 8),
)
@settings(deadline=None)
def test_solos_hold_nobody_else_and_miss_nothing(
    notes: list[tuple[int, int, int]], before: int, after: int, rest: int
) -> None:
    labels = [label(a * TENTH, (a + length) * TENTH, program) for a, length, program in notes]
    config = SoloConfig(0.5, rest / 10, before / 10, after / 10)
    own, others = np.zeros((2, 200), bool)
    for start, length, program in notes:
        if program == 42:
            own[start : start + length] = True
        else:
            others[max(0, start - before) : start + length + after] = True
    found = np.zeros(200, bool)
    for start, end in solo_stretches(labels, 42, config):
        assert start % TENTH == end % TENTH == 0 and end - start >= 5 * TENTH
        span = slice(start // TENTH, end // TENTH)
        assert not others[span].any() and not found[span].any()
        assert own[span.start] and own[span.stop - 1]
        found[span] = True
        silent = "".join(".x"[int(sound)] for sound in own[span]).split("x")
        assert max(map(len, silent)) <= rest
    runs = "".join("x" if a and not b else "." for a, b in zip(own, others, strict=True))
    for length in range(5, 200):
        at = runs.find("." + "x" * length + ".")
        assert at < 0 or found[at + 1 : at + 1 + length].all()


def names(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("grouping", "split", "files"),
    [
        ("composer", "train", {"schubert/1727.wav", "schubert/1728.wav"}),
        ("composer", "test", {"bach/2303.wav"}),
        ("ensemble", "train", {"piano_quintet/1727.wav", "solo_piano/1728.wav"}),
        ("instrument", "train", {"cello/1727.flac", "piano/1727.flac", "piano/1728.wav"}),
    ],
)
def test_styles_are_made_with_a_recipe_that_trains(
    folder: Path, tmp_path: Path, grouping: str, split: str, files: set[str]
) -> None:
    out = tmp_path / "styles"
    made = write_styles(read_musicnet(folder), grouping, out, split)
    tunes = {f"tunes/{name.rsplit('.', 1)[0]}.mid" for name in files}
    assert names(out) == files | tunes | {"recipe.toml", "compose.toml"} and made.skipped == ()
    plan = load_recipe(made.recipe)
    library = load_library(plan.style, out, plan.data, plan.spectral.sample_rate, tmp_path / "cache")
    assert library.skipped == () and {style.id for style in library.styles} == {name.split("/")[0] for name in files}
    assert {entry.licence for entry in plan.style} == {"CC-BY-4.0"}
    assert sum(style.recordings for style in made.styles) == len(files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "musicnet", "styles"]  # nothing half made


def test_labels_become_tunes_where_the_score_has_them() -> None:
    second = LABEL_RATE
    score = (
        NoteLabel(0, second // 2, 40, 60, 0.0, 1.0, "Quarter"),
        NoteLabel(second // 2, 2 * second, 40, 62, 1.0, 4.0, "Dotted Half"),  # here the last beat, and not the length
        NoteLabel(second // 2, second, 42, 48, 1.0, 1.0, "Quarter"),
        NoteLabel(2 * second, 5 * second // 2, 40, 64, 4.0, 1.0, "Quarter"),
    )
    tune = tune_of(score)
    assert [(note.start_ticks, note.duration_ticks, note.pitch) for note in tune.notes] == [
        (0, 24, 60),
        (24, 24, 48),
        (24, 72, 62),
        (96, 24, 64),
    ]
    assert tune.tempo_bpm == pytest.approx(120.0) and tune.program == 40
    assert [note.pitch for note in tune_of(score, 42).notes] == [48]
    with pytest.raises(ValueError, match="holds no notes"):
        tune_of(score, 0)
    without_beats = [label(0, second // 2), label(second, 2 * second, pitch=67)]
    assert [(note.start_ticks, note.duration_ticks) for note in tune_of(without_beats).notes] == [(0, 24), (48, 48)]


def test_a_composer_learns_from_the_labels(tmp_path: Path) -> None:
    top = tmp_path / "musicnet"
    random = np.random.default_rng(5)
    for number in range(1727, 1731):
        pitches = random.integers(55, 80, 24)
        rows = [
            f"{at * LABEL_RATE // 4},{(at + 1) * LABEL_RATE // 4},1,{pitch},{at / 2:g},0.5,Eighth"
            for at, pitch in enumerate(pitches)
        ]
        piece(top, "train", str(number), rows)
    lines = [f"{number},Bach,No {number},1,Solo Piano,s,t,c,8" for number in range(1727, 1731)]
    (top / "musicnet_metadata.csv").write_text("\n".join([METADATA.splitlines()[0], *lines, ""]))
    made = write_styles(read_musicnet(top), "composer", tmp_path / "styles")
    assert made.compose_recipe is not None and made.skipped == ()
    plan = load_recipe(made.compose_recipe)
    assert plan.composes
    tunes = load_tunes(plan.style, tmp_path / "styles", plan.tunes, 0)
    assert tunes.skipped == () and len(tunes.split("train")) == 2
    assert all(len(tune.notes) == 24 and tune.notes[1].start_ticks == 12 for tune in tunes.split("train"))


def test_features_come_with_the_notes_as_conditions(folder: Path, tmp_path: Path) -> None:
    options = [
        "--cache",
        str(tmp_path / "cache"),
        "--frames-per-second",
        "50",
        "--start-seconds",
        "1",
        "--seconds",
        "5",
    ]
    result = CliRunner().invoke(whole_app, ["features", str(folder), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "out" / "train_data" / "1727.wav.npz") as file:
        notes, mel = file["notes"], file["mel"]
    assert notes.dtype == np.bool_ and notes.shape == (128, mel.shape[-1]) == (128, 251)
    # Cello from 1.6 to 5 s, piano from 3 s on, and the recording's second 1 is second 0 here.
    assert notes[57, :25].all() and not notes[57, 26:29].any() and notes[57, 31:199].all() and not notes[57, 201:].any()
    assert not notes[68, :99].any() and notes[68, 101:].all() and notes.any(axis=1).sum() == 2


def test_whole_recordings_are_links_and_take_no_room(folder: Path, tmp_path: Path) -> None:
    write_styles(read_musicnet(folder), "composer", tmp_path / "styles")
    linked = tmp_path / "styles" / "schubert" / "1727.wav"
    assert linked.samefile(folder / "train_data" / "1727.wav")


def test_another_disk_gets_copies(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr("training.musicnet.os.link", refuse)
    write_styles(read_musicnet(folder), "composer", tmp_path / "styles")
    copied = tmp_path / "styles" / "schubert" / "1727.wav"
    assert copied.read_bytes() == (folder / "train_data" / "1727.wav").read_bytes()


def test_an_instruments_excerpts_are_its_own_sound(folder: Path, tmp_path: Path) -> None:
    made = write_styles(read_musicnet(folder), "instrument", tmp_path / "styles")
    programs = {style.id: (style.label, style.midi_program, style.seconds) for style in made.styles}
    whole, _ = soundfile.read(folder / "train_data" / "1727.wav")
    cello, rate = soundfile.read(tmp_path / "styles" / "cello" / "1727.flac")
    assert programs["cello"][:2] == ("Cello", 42) and programs["piano"][1] == 0
    assert programs["cello"][2] == pytest.approx(2.95, abs=0.01)  # until 50 ms before the piano
    assert rate == LABEL_RATE and len(cello) == round(2.95 * LABEL_RATE)
    np.testing.assert_allclose(cello[1000:-1000], whole[1000 : len(cello) - 1000], atol=1e-4)
    assert abs(cello[0]) < 1e-4 and abs(cello[-1]) < 1e-4
    piano, _ = soundfile.read(tmp_path / "styles" / "piano" / "1727.flac")
    begin = round(5.3 * LABEL_RATE)  # 0.3 s after the cello
    np.testing.assert_allclose(piano[1000:-1000], whole[begin + 1000 : begin + len(piano) - 1000], atol=1e-4)


def test_a_damaged_piece_is_named_and_the_rest_is_made(folder: Path, tmp_path: Path) -> None:
    wav, csv = folder / "train_data" / "1728.wav", folder / "train_labels" / "1727.csv"
    wav.write_bytes(wav.read_bytes()[:5000])
    made = write_styles(read_musicnet(folder), "composer", tmp_path / "one")
    assert names(tmp_path / "one") == {"schubert/1727.wav", "recipe.toml", "tunes/schubert/1727.mid", "compose.toml"}
    assert "1728.wav: is damaged" in made.as_dict()["skipped"][0]
    csv.write_text(csv.read_text().replace(",43,57", ",43,x", 1))
    with pytest.raises(MusicNetError, match=r"no instrument has a recording in train_data \(.*1727\.csv line 2: note"):
        write_styles(read_musicnet(folder), "instrument", tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_a_full_disk_is_no_fault_of_a_recording(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        raise soundfile.LibsndfileError(2, f"Error opening {path}")

    monkeypatch.setattr(soundfile, "write", full)
    with pytest.raises(OSError, match="cannot be written"):
        write_styles(read_musicnet(folder), "instrument", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "styles").mkdir()
    write_styles(read_musicnet(folder), "composer", tmp_path / "styles")  # an empty one will do
    before = names(tmp_path / "styles")
    with pytest.raises(MusicNetError, match=r"styles: is there already; choose another --out"):
        write_styles(read_musicnet(folder), "ensemble", tmp_path / "styles")
    assert names(tmp_path / "styles") == before


def test_the_command_makes_styles_and_says_what_comes_next(folder: Path, tmp_path: Path) -> None:
    (folder / "test_data" / "2303.wav").unlink()
    out = tmp_path / "by composer"
    arguments = [str(folder), "--as-styles", "composer", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "made.json")])
    assert result.exit_code == 0, result.output
    assert f"next: restyle train '{out / 'recipe.toml'}', or restyle train '{out / 'compose.toml'}'" in result.stdout
    assert "2303.wav: is missing" in result.stdout
    values = json.loads((tmp_path / "made.json").read_text())
    assert values["styles"]["schubert"]["recordings"] == 2 and len(values["skipped"]) == 1
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1 and "is there already" in again.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["--as-styles", "composer"],
        ["--out", "x"],
        ["--as-styles", "key", "--out", "x"],
        ["--as-styles", "composer", "--out", "x", "--split", "all"],
        ["--as-styles", "composer", "--out", "x", "--plot", "x.png"],
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(folder: Path, options: list[str]) -> None:
    assert CliRunner().invoke(app, [str(folder), *options]).exit_code == 2


def test_metadata_columns_are_those_published() -> None:
    assert METADATA.splitlines()[0] == ",".join(METADATA_COLUMNS)
