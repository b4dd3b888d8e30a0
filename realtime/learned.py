"""Styles learned from a clip: the model's own style encoder hears it, and a small ``.style`` file remembers what.

A style vector means something only to the model that it was heard by, so the file names that model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import dacite
import numpy as np
from numpy.typing import NDArray

from realtime.audio import file_info, read_blocks
from realtime.bundle import MAX_NAME, Bundle, BundleError, Manifest, Style, read_encoder, style_problem
from realtime.files import NewFile
from realtime.stream import make_session

SCHEMA_VERSION = 1
SUFFIX = ".style"
MAX_FILE_BYTES = 2**20
SHORTEST_CLIP_S = 0.5
LONGEST_CLIP_S = 600.0
BELOW_LOUDEST_DB = 30.0
"""Parts of a clip quieter than its loudest by more than this are pauses and tell nothing."""


class LearnError(ValueError):
    """A clip that no style can be learned from, or a style file that cannot be used; the text names the remedy."""


@dataclass(frozen=True)
class LearnedStyle:
    """A ``.style`` file: the style, the model that it belongs to, and what it was learned from."""

    schema: int
    model: str
    fingerprint: str  # of that model; see realtime.bundle.Manifest.fingerprint
    style: Style
    clip: str
    clip_seconds: float
    refined: dict[str, float]  # what refining gained: distance before and after, on what it never heard; empty without


def style_id(name: str) -> str:
    """``My Clip #2`` -> ``my_clip_2``. LearnError when no letter or digit is left."""
    found = "_".join(re.findall(r"[a-z0-9]+", name.casefold()))
    if not found:
        raise LearnError(f"name '{name}': has no letter or digit from a to z or 0 to 9; choose another --name")
    return found


def _printable(name: str) -> str:
    """Without what a terminal obeys and what is not text; file names may hold either."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)[:MAX_NAME]


def free_program(styles: Sequence[Style]) -> int:
    """The lowest MIDI program that selects none of these styles, by its number or by its place; 127 if all do."""
    taken = {style.program for style in styles} | set(range(len(styles) + 1))
    return next((program for program in range(128) if program not in taken), 127)


def read_clip(path: Path, sample_rate: int) -> NDArray[np.float32]:
    """A sound file in mono [samples] at this rate. Raises AudioFileError, and LearnError for one of unfit length."""
    import soxr

    info = file_info(path)
    seconds = info.frames / info.sample_rate
    if not SHORTEST_CLIP_S <= seconds <= LONGEST_CLIP_S:
        raise LearnError(
            f"{path}: is {seconds:.2f} s long; a style is learned from {SHORTEST_CLIP_S:g} to {LONGEST_CLIP_S:g} s, "
            "a minute is best"
        )
    audio = np.concatenate(list(read_blocks(path, 65_536)), axis=1).mean(axis=0)
    if not np.isfinite(audio).all():
        raise LearnError(f"{path}: holds NaN or infinity; repair it first")
    audio = soxr.resample(audio, info.sample_rate, sample_rate, quality="HQ").astype(np.float32)
    if float(np.abs(audio).max(initial=0.0)) < 1e-4:
        raise LearnError(f"{path}: is silent; a style is learned from playing")
    return audio


def cut_windows(audio: NDArray[np.float32], samples: int) -> NDArray[np.float32]:
    """audio -> [windows, samples], each half a window after the last, without pauses; a short clip goes round."""
    if len(audio) < samples:
        audio = np.resize(audio, samples)
    windows = np.lib.stride_tricks.sliding_window_view(audio, samples)[:: samples // 2]
    power = np.square(windows, dtype=np.float64).mean(axis=1)
    return windows[power >= power.max() * 10.0 ** (-BELOW_LOUDEST_DB / 10.0)].copy()


def hear_windows(bundle: Bundle, audio: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """audio [samples] at the model's rate -> its windows [count, samples], and a style vector of each.

    Raises BundleError for a model without a style encoder.
    """
    graph = read_encoder(bundle)
    try:
        session = make_session(graph)
        windows = cut_windows(audio, session.get_inputs()[0].shape[1])
        heard: list[NDArray[np.float32]] = [
            np.asarray(session.run(["vector"], {"audio": windows[i : i + 16]})[0]) for i in range(0, len(windows), 16)
        ]
    except Exception as error:
        raise BundleError(bundle.path, "encoder", f"cannot be run: {error}", "export the model again") from None
    return windows, np.concatenate(heard)


def _loudness_lufs(bundle: Bundle, vector: NDArray[np.float32]) -> float:
    from realtime.loudness import reference_playings, styles_loudness_lufs

    playings = reference_playings(bundle.manifest.spectral.sample_rate)
    return round(float(styles_loudness_lufs(bundle, [vector], playings).mean()), 2)


def learn(bundle: Bundle, clip: Path, name: str, program: int | None = None) -> LearnedStyle:
    """A new style for this model from a clip. Raises AudioFileError, LearnError, BundleError."""
    manifest = bundle.manifest
    new_id = style_id(name)
    if any(new_id in style.names for style in manifest.styles):
        raise LearnError(
            f"name '{name}': model '{manifest.name}' has a style '{new_id}' already; choose another --name"
        )
    if program is not None and any(style.program == program for style in manifest.styles):
        raise LearnError(f"program {program}: selects another style already; choose another --program")
    audio = read_clip(clip, manifest.spectral.sample_rate)
    vector = hear_windows(bundle, audio)[1].mean(axis=0)
    style = Style(
        new_id,
        _printable(name.strip()),
        tuple(float(value) for value in vector),
        _loudness_lufs(bundle, vector),
        free_program(manifest.styles) if program is None else program,
    )
    wrong = style_problem(style, manifest.style_dim)
    if wrong:
        raise LearnError(
            f"{clip}: gives a style whose {wrong[0]} {wrong[1]}; check the clip's level, or use another clip"
        )
    seconds = len(audio) / manifest.spectral.sample_rate
    return LearnedStyle(
        SCHEMA_VERSION, manifest.name, manifest.fingerprint, style, _printable(clip.name), round(seconds, 2), {}
    )


def with_vector(bundle: Bundle, learned: LearnedStyle, vector: NDArray[np.float32]) -> LearnedStyle:
    """The same style with another vector, its loudness measured anew."""
    lufs = _loudness_lufs(bundle, vector)
    return replace(
        learned, style=replace(learned.style, vector=tuple(float(value) for value in vector), loudness_lufs=lufs)
    )


def write_style(path: Path, learned: LearnedStyle) -> None:
    """Write a ``.style`` file, whole or not at all. Raises OSError."""
    with NewFile(path) as part:
        part.write_text(json.dumps(asdict(learned), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_style(path: Path, manifest: Manifest) -> LearnedStyle:
    """Read a ``.style`` file for this model. Raises LearnError."""
    try:
        if path.exists() and not (path.is_file() and path.stat().st_size <= MAX_FILE_BYTES):
            raise LearnError(f"{path}: is no style file; give a file that 'restyle learn' wrote")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LearnError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError):
        raise LearnError(f"{path}: is no style file; give a file that 'restyle learn' wrote") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA_VERSION:
        raise LearnError(f"{path}: schema: is {schema!r}, this version reads {SCHEMA_VERSION}; learn the style again")
    try:
        learned = dacite.from_dict(LearnedStyle, data, dacite.Config(strict=True, cast=[tuple]))
    except (dacite.DaciteError, ValueError, TypeError, AttributeError) as error:
        raise LearnError(f"{path}: {' '.join(str(error).split())}; learn the style again") from None
    wrong = style_problem(learned.style, manifest.style_dim)
    if not wrong and not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", learned.style.id):
        wrong = "id", f"'{learned.style.id}' is not in snake_case"
    if wrong:
        raise LearnError(f"{path}: style.{wrong[0]}: {wrong[1]}; learn the style again")
    if learned.fingerprint != manifest.fingerprint:
        raise LearnError(
            f"{path}: was learned for another model ({learned.model!r} {learned.fingerprint!r}, not this "
            f"'{manifest.name}' '{manifest.fingerprint}'); learn it again with --model"
        )
    return learned


def add_styles(bundle: Bundle, paths: Sequence[Path]) -> Bundle:
    """The model with the styles of these files after its own, as if it had been made with them.

    Of two styles with one MIDI program, the later one moves to a free program. Raises LearnError.
    """
    styles = list(bundle.manifest.styles)
    for path in paths:
        style = read_style(path, bundle.manifest).style
        if any(set(style.names) & set(known.names) for known in styles):
            raise LearnError(f"{path}: there is a style '{style.id}' already; learn it again under another --name")
        if any(style.program == known.program for known in styles):
            style = replace(style, program=free_program(styles))
        styles.append(style)
    return replace(bundle, manifest=replace(bundle.manifest, styles=tuple(styles)))
