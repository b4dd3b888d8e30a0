"""A recorded show once more: the same input, controls and faults through the same engine, to the same samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from realtime.audio import AudioFileError, AudioWriter
from realtime.bundle import MODELS_DIR, Bundle, read_bundle
from realtime.controls import CONTROL_NUMBERS, Controls
from realtime.engine import rise
from realtime.ensemble import join, make_stream, parts_of
from realtime.processor import START_HOP, Processor, RateError
from realtime.resample import at_rate
from realtime.show import INPUT_NAME, JOURNAL_NAME, OUTPUT_NAME, SHOW_FORMAT, ShowHeading
from realtime.worker import LateError


class ShowError(ValueError):
    """A show folder that cannot be played again; the text names the file and the remedy."""


@dataclass
class Life:
    """What one audio process went through: from which frame on, and what it met at which of its hops.

    One that took the place of another is ``returning``.
    """

    start_frame: int
    returning: bool = False
    controls: dict[int, list[float]] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    broken_at: int | None = None  # the frame of an error that left the processor in an unknown state


@dataclass(frozen=True)
class Show:
    """A show folder, read and checked."""

    folder: Path
    heading: ShowHeading
    lives: tuple[Life, ...]
    frames: int
    whole: bool  # it ended as it should
    dropped_frames: int
    midi_messages: int


@dataclass(frozen=True)
class Replayed:
    """How a replay went. ``compared`` frames were, ``equal`` of them are the recorded ones; the largest difference."""

    frames: int
    compared: int
    equal: int
    largest_difference: float
    first_difference: int | None
    fault_hops: int
    outages: int


def read_show(folder: Path) -> Show:
    """Raises ShowError for a folder that is no show, of another version, or with less sound than it ended with.

    A killed one, which has no ending, is read as far as it goes.
    """
    journal = folder / JOURNAL_NAME
    entries = _entries(journal)
    heading = _heading(journal, entries[0])
    lengths: dict[Path, int] = {}
    for name in (INPUT_NAME, OUTPUT_NAME):
        try:
            info = soundfile.info(str(folder / name))
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise ShowError(f"{folder / name}: cannot be read ({error})") from None
        if (info.samplerate, info.channels) != (heading.sample_rate, heading.channels):
            raise ShowError(
                f"{folder / name}: is {info.samplerate} Hz, {info.channels} channels; the show has "
                f"{heading.sample_rate} Hz, {heading.channels}: it is not the file that was recorded"
            )
        lengths[folder / name] = info.frames
    lives: list[Life] = []
    ended, recorded = False, 0
    for number, entry in enumerate(entries[1:], 2):
        try:
            _take(entry, lives)
            if entry.get("ended"):
                ended, recorded = True, int(entry.get("frames", 0))  # shows of earlier versions do not say how many
        except (KeyError, TypeError, ValueError, IndexError, OverflowError):
            raise ShowError(f"{journal}: line {number}: {json.dumps(entry)[:80]} is not understood") from None
    if not lives:
        raise ShowError(f"{journal}: holds no start of a performance; nothing was recorded")
    for path, length in lengths.items():
        if length < recorded:
            raise ShowError(
                f"{path}: holds {length} of the {recorded} frames that were recorded, it was cut short since; "
                "copy the folder again"
            )
    frames = min(lengths.values())
    stops = [*(life.start_frame for life in lives[1:]), frames]
    return Show(
        folder,
        heading,
        # One that waited for its device in vain, or found it at another rate, left no sound.
        tuple(life for life, stop in zip(lives, stops, strict=True) if life.start_frame < min(stop, frames)),
        frames,
        ended,
        sum(int(entry.get("dropped_frames", 0)) for entry in entries),
        sum("midi" in entry for entry in entries),
    )


def _entries(journal: Path) -> list[dict[str, Any]]:
    """The lines of a journal, at least one, but not a last one that its writer was killed in. Raises ShowError."""
    try:
        lines = journal.read_bytes().splitlines()
    except OSError as error:
        raise ShowError(
            f"{journal}: cannot be read ({error.strerror}); give a folder that 'restyle live --record' made"
        ) from None
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            if number == len(lines):
                break
            raise ShowError(f"{journal}: line {number}: is damaged ({error}); copy the folder again") from None
        entries.append(entry)
    if not entries:
        state = "has no whole line" if lines else "is empty"
        raise ShowError(f"{journal}: {state}: nothing was recorded, or it was lost in a copy; copy the folder again")
    return entries


def _heading(journal: Path, entry: dict[str, Any]) -> ShowHeading:
    if entry.get("show_format") != SHOW_FORMAT:
        raise ShowError(
            f"{journal}: show_format: is {entry.get('show_format')!r}, this version reads {SHOW_FORMAT}; "
            "use the version of restyle that recorded it"
        )
    try:
        heading = ShowHeading(**entry)
    except TypeError as error:
        raise ShowError(f"{journal}: line 1: {error}") from None
    for name, kind in ShowHeading.__annotations__.items():
        if type(getattr(heading, name)).__name__ != kind.partition("[")[0]:
            raise ShowError(f"{journal}: line 1: {name}: is {getattr(heading, name)!r}, must be of type {kind}")
    return heading


def _take(entry: dict[str, Any], lives: list[Life]) -> None:
    if "controls" in entry:
        lives[-1].controls[int(entry["hop"])] = [float(number) for number in entry["controls"]]
    elif entry.get("event") == "start":
        lives.append(Life(int(entry["frame"]), returning=bool(lives)))
    elif entry.get("event") in ("late", "bad"):
        lives[-1].faults[int(entry["hop"])] = entry["event"]
    elif entry.get("event") == "error":
        lives[-1].broken_at = int(entry["frame"])


class _ReplayStream:
    """A stream that fails at the hops at which the recorded one failed, and defers as it did."""

    def __init__(self, bundle: Bundle, channels: int, faults: dict[int, str], deferred_hops: int) -> None:
        self._stream = stream = make_stream(bundle, channels)
        self.channels, self.audio, self.style = channels, stream.audio, stream.style
        self._faults, self._deferred = faults, bool(deferred_hops)
        self.delay_samples = stream.delay_samples + deferred_hops * stream.step_samples
        self.hop = 0
        self._pending = np.zeros_like(stream.audio_out)
        self._fresh = self._reset_wanted = False

    def step(self) -> NDArray[np.float32]:
        hop, self.hop = self.hop, self.hop + 1
        fault = self._faults.get(hop)
        if not self._deferred:
            if fault == "late":
                raise LateError
            answer = self._stream.audio_out if fault else self._stream.step()
        else:
            # What is asked for in the last of several late hops starts from silence; see RemoteStream.
            answer, self._fresh = self._pending, self._reset_wanted or fault == "late"
            if self._fresh:
                self._stream.reset()
            self._pending, self._reset_wanted = self._stream.step().copy(), False
            if fault == "late":
                raise LateError
        if fault == "bad":
            answer[:] = np.nan
        return answer

    def reset(self) -> None:
        if not self._deferred:
            self._stream.reset()
        elif not self._fresh:
            self._reset_wanted = True


def find_model(show: Show, model: Path | None) -> Bundle:
    """The model of a show: ``model``, or where it was; it must be the same file.

    The others of an ensemble are looked for where they were, beside the first one, and among the shipped ones. Raises
    ShowError, BundleError.
    """
    path = model or Path(show.heading.model_path)
    if not path.is_file():
        raise ShowError(f"{path}: the show's model '{show.heading.model}' is not there; say where it is: --model")
    bundle = read_bundle(path)
    if hashlib.sha256(bundle.graph).hexdigest() != show.heading.model_sha256:
        raise ShowError(
            f"{path}: is not the model of the show (its SHA-256 differs from {show.heading.model_sha256[:12]}...); "
            "give the file that it was performed with: --model"
        )
    try:
        parts = parts_of(show.heading.ensemble, lambda entry: _find_part(entry, path.parent))
    except ShowError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ShowError(f"{show.folder / JOURNAL_NAME}: line 1: ensemble: is not understood ({error!r})") from None
    return join(bundle, parts)


def _find_part(entry: dict[str, Any], beside: Path) -> Path:
    was, digest = Path(entry["model"]), str(entry["sha256"])
    for path in dict.fromkeys((was, beside / was.name, MODELS_DIR / was.name)):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
            return path
    state = "has changed (its SHA-256 differs)" if was.is_file() else "is not there"
    raise ShowError(
        f"{was}: a model of the show's ensemble {state}; put the file that it was performed with (SHA-256 "
        f"{digest[:12]}...) there again, or beside the first model, {beside / was.name}"
    )


def replay(
    show: Show,
    bundle: Bundle,
    target: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Replayed:
    """Play the show again, to ``target`` if given, and compare with what was recorded.

    Raises ShowError for journals that do not fit the model, AudioFileError.
    """
    heading, spec = show.heading, bundle.manifest.spectral
    if target is not None:
        if target.suffix.lower() != ".wav":
            raise AudioFileError(f"{target}: what is played is written to a WAV file; choose a name that ends in .wav")
        if target.exists() and any(target.samefile(file) for file in show.folder.iterdir()):
            raise AudioFileError(f"{target}: belongs to the recording itself; choose another file")
    # No block may hold more than one hop: what happens at a hop happens before its block.
    block_samples = spec.hop_samples * heading.sample_rate // spec.sample_rate
    compared = equal = 0
    largest, first = 0.0, None
    try:
        with (
            soundfile.SoundFile(str(show.folder / INPUT_NAME)) as played,
            soundfile.SoundFile(str(show.folder / OUTPUT_NAME)) as recorded,
            AudioWriter(target, heading.sample_rate, heading.channels, "FLOAT") if target else nullcontext() as sink,
        ):
            for number, life in enumerate(show.lives):
                stop = show.lives[number + 1].start_frame if number + 1 < len(show.lives) else show.frames
                processor = Processor(bundle, stream=_stream(show, bundle, life), seed=heading.seed)
                processor.controls = Controls.unpack(np.array(life.controls[START_HOP]))
                plugin = at_rate(processor, heading.sample_rate)
                plugin.prepare(heading.sample_rate, block_samples, heading.channels)
                for start in range(life.start_frame, min(stop, show.frames), block_samples):
                    count = min(block_samples, stop - start, show.frames - start)
                    block = _read(played, count)
                    wanted = _read(recorded, count)
                    numbers = life.controls.get(processor.meters.hops)
                    if numbers is not None:
                        processor.controls = Controls.unpack(np.array(numbers))
                    out = plugin.process(block)
                    if life.returning:
                        rise(out, start - life.start_frame)
                    if sink is not None:
                        sink.write(out)
                    if life.broken_at is None or start + count <= life.broken_at:
                        same = (out == wanted).all(axis=0)
                        compared += count
                        equal += int(same.sum())
                        if first is None and not same.all():
                            first = start + int(same.argmin())
                        largest = max(largest, float(np.abs(out - wanted).max(initial=0.0)))
                    if progress is not None:
                        progress(start + count, show.frames)
    except RateError as error:
        raise ShowError(f"{show.folder / JOURNAL_NAME}: sample_rate: {error}") from None
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioFileError(f"{show.folder}: cannot be played again ({error})") from None
    faults = sum(len(life.faults) for life in show.lives)
    outages = sum(life.returning for life in show.lives)
    return Replayed(show.frames, compared, equal, largest, first, faults, outages)


def _read(file: soundfile.SoundFile, frames: int) -> NDArray[np.float32]:
    """The next samples [channels, frames]."""
    return np.ascontiguousarray(file.read(frames, dtype="float32", always_2d=True).T, dtype=np.float32)


def _stream(show: Show, bundle: Bundle, life: Life) -> _ReplayStream:
    """The graph of one life. Raises ShowError for a journal that does not fit the model."""
    size = CONTROL_NUMBERS + bundle.manifest.style_dim
    wrong = [hop for hop, numbers in life.controls.items() if len(numbers) != size]
    if wrong or START_HOP not in life.controls:
        problem = f"the controls at hop {wrong[0]} do not fit the model" if wrong else "the first controls are missing"
        raise ShowError(f"{show.folder / JOURNAL_NAME}: {problem}; the journal is damaged")
    return _ReplayStream(bundle, show.heading.channels, life.faults, show.heading.deferred_hops)
