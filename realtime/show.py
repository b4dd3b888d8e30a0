"""What a performance leaves: input and output as sound files, a journal to play it again from, and a picture."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import struct
import threading
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from realtime.audio import AudioFileError, read_blocks
from realtime.controls import CONTROL_NUMBERS, Controls
from realtime.files import NewFile
from realtime.ring import Ring

logger = logging.getLogger(__name__)

PICTURE_SECONDS = 120.0
MIX_FRAMES, MOST_MIXES = 480, 12_000
FINISH_TIMEOUT_S = 10.0
INPUT_NAME, OUTPUT_NAME, JOURNAL_NAME = "input.wav", "output.wav", "show.jsonl"
SHOW_FORMAT = 1
LARGEST_WAV_BYTES = 2**32 - 1
EVENT_KINDS = ("start", "controls", "late", "bad", "error")
EVENT_HEAD = 2
"""Numbers of an event before those of its controls: which kind, and where."""


@dataclass(frozen=True)
class ShowHeading:
    """The first entry of ``show.jsonl``: what is needed to play the show again.

    ``deferred_hops``: how many hops later than usual the graph's answers were taken. ``ensemble``: the models after the
    first, as ``Ensemble.journal_entries`` gives them. ``seed``: of the noise.
    """

    show_format: int
    model: str
    model_path: str
    model_sha256: str
    sample_rate: int
    channels: int
    deferred_hops: int
    started: str
    ensemble: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0


def holds_recording(folder: Path) -> bool:
    """Whether a recording into this folder would write over a file."""
    return any((folder / name).exists() for name in (INPUT_NAME, OUTPUT_NAME, JOURNAL_NAME))


def free_folder(folder: Path) -> Path:
    """This folder, or the first of name-2, name-3, ... that holds no recording yet."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(found for found in itertools.chain([folder], numbered) if not holds_recording(found))


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def event_width(style_dim: int) -> int:
    """Numbers of float32 that an event takes in a ring."""
    return 2 * (EVENT_HEAD + CONTROL_NUMBERS + style_dim)


def pack_event(kind: str, at: int, controls: Controls | None, style_dim: int) -> NDArray[np.float32]:
    """An event as a frame [1, event_width] of a ring; doubles, so that controls come back as they were.

    ``at``: the frame for 'start' and 'error', for others the hop since the last start.
    """
    numbers = np.zeros(EVENT_HEAD + CONTROL_NUMBERS + style_dim)
    numbers[:EVENT_HEAD] = EVENT_KINDS.index(kind), at
    if controls is not None:
        numbers[EVENT_HEAD:] = controls.pack()
    return numbers.view(np.float32)[None]


def unpack_event(frame: NDArray[np.float32]) -> dict[str, Any]:
    """The journal entry of an event in a ring."""
    numbers = np.ascontiguousarray(frame).view(np.float64)
    kind, at = EVENT_KINDS[int(numbers[0])], int(numbers[1])
    if kind == "controls":
        return {"hop": at, "controls": numbers[EVENT_HEAD:].tolist()}
    return {"frame" if kind in ("start", "error") else "hop": at, "event": kind}


def percentiles_ms(times: NDArray[Any]) -> dict[str, float]:
    """p50, p99, p999 and max of times in ms [n], to a tenth of a microsecond; zeros when there are none."""
    if not len(times):
        return {"p50": 0.0, "p99": 0.0, "p999": 0.0, "max": 0.0}
    p50, p99, p999 = np.percentile(times, [50, 99, 99.9]).tolist()
    values = {"p50": p50, "p99": p99, "p999": p999, "max": float(times.max())}
    return {name: round(value, 4) for name, value in values.items()}


@dataclass
class History:
    """The style mix over time, for the picture, as (frames since the start, weights by style label); all hop times."""

    mixes: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    hop_ms: list[NDArray[np.float32]] = field(default_factory=list)

    def note(self, frames: int, mix: dict[str, float]) -> None:
        """Remember a mix from here on; repeated mixes once, of a flood one in MIX_FRAMES, and MOST_MIXES in all."""
        if self.mixes and (self.mixes[-1][1] == mix or len(self.mixes) >= MOST_MIXES):
            return
        if self.mixes and frames - self.mixes[-1][0] < MIX_FRAMES:
            frames, _ = self.mixes.pop()
        self.mixes.append((frames, mix))


class TakeFile:
    """A float32 WAV file that can be read at any moment, also when its writer is killed: its header keeps up.

    One thread at a time.
    """

    def __init__(self, path: Path, sample_rate: int, channels: int) -> None:
        """Raises AudioFileError when it cannot be written, and leaves no file then."""
        self.path, self.frames, self._frame_bytes = path, 0, 4 * channels
        there = path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = soundfile.SoundFile(str(path), "w", sample_rate, channels, subtype="FLOAT", format="WAV")
            self._file.flush()
            head = path.read_bytes()
            if b"data" not in head:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except (soundfile.SoundFileError, OSError) as error:
            if not there:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            raise AudioFileError(f"{path}: cannot be written ({error})") from None
        self._fact_at, self._data_at = head.index(b"fact") + 8, head.index(b"data") + 4

    def write(self, frames: NDArray[np.float32]) -> None:
        """Append [frames, channels]. Raises AudioFileError when the disk is full."""
        if self._data_at + 4 + (self.frames + len(frames)) * self._frame_bytes > LARGEST_WAV_BYTES:
            raise AudioFileError(f"{self.path}: a WAV file holds no more than 4 GiB; go on with another --record")
        try:
            self._file.write(frames)
            self._file.flush()
            self._tell_length()
        except (soundfile.SoundFileError, OSError) as error:
            raise AudioFileError(f"{self.path}: cannot be written ({error}); is the disk full?") from None
        self.frames += len(frames)

    def _tell_length(self) -> None:
        """What libsndfile writes into the header when it closes a file (RIFF: IBM and Microsoft, 1991)."""
        with self.path.open("r+b") as file:
            there = os.fstat(file.fileno()).st_size - self._data_at - 4
            frames = there // self._frame_bytes
            for at, number in (
                (4, self._data_at - 4 + frames * self._frame_bytes),
                (self._fact_at, frames),
                (self._data_at, frames * self._frame_bytes),
            ):
                file.seek(at)
                file.write(struct.pack("<I", number))

    def finish(self) -> int:
        """Close the file; the frames that are really in it. Raises AudioFileError if it is no sound file."""
        with contextlib.suppress(soundfile.SoundFileError, OSError):
            self._file.close()
        try:
            return soundfile.info(str(self.path)).frames
        except (soundfile.SoundFileError, OSError) as error:
            raise AudioFileError(f"{self.path}: nothing could be saved ({error})") from None

    def discard(self) -> None:
        """Leave no file behind."""
        with contextlib.suppress(soundfile.SoundFileError, OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def cut(self, frames: int) -> None:
        """Leave at most the first ``frames`` of a file that is finished. Raises AudioFileError."""
        try:
            with soundfile.SoundFile(str(self.path), "r+") as file:
                if file.frames > frames:
                    file.truncate(frames)
        except (soundfile.SoundFileError, OSError) as error:
            raise AudioFileError(f"{self.path}: cannot be cut to {frames} frames ({error})") from None


class Recorder:
    """Drains what the audio process has to tell, on a thread of its own: ``input.wav``, ``output.wav``, ``show.jsonl``.

    A disk that fills up ends the recording, not the performance: what was written until then stays whole.
    """

    def __init__(self, sound: Ring, journal: Ring, folder: Path, heading: ShowHeading) -> None:
        """Raises AudioFileError when one of the files cannot be written, and leaves neither files nor folder then."""
        self.folder, self.heading, self.channels = folder, heading, heading.channels
        self.problem = ""
        self._sound, self._events = sound, journal
        self._notes: deque[dict[str, Any]] = deque()
        with contextlib.ExitStack() as undo:
            for place in (*reversed(folder.parents), folder):
                if not place.exists():
                    undo.callback(_remove_if_empty, place)
            self._input = TakeFile(folder / INPUT_NAME, heading.sample_rate, self.channels)
            undo.callback(self._input.discard)
            self._output = TakeFile(folder / OUTPUT_NAME, heading.sample_rate, self.channels)
            undo.callback(self._output.discard)
            try:
                self._journal = (folder / JOURNAL_NAME).open("w", encoding="utf-8")
            except OSError as error:
                raise AudioFileError(
                    f"{folder / JOURNAL_NAME}: cannot be written ({error.strerror}); choose another folder for --record"
                ) from None
            undo.pop_all()
        self._over = threading.Event()
        self.note(asdict(heading))
        self._thread = threading.Thread(target=self._drain, name="recorder", daemon=True)
        self._thread.start()

    def note(self, entry: dict[str, Any]) -> None:
        """Put an entry into the journal, while there is a recording; any thread."""
        if not self.over:
            self._notes.append(entry)

    def _drain(self) -> None:
        while not self._over.wait(0.05):
            self._take()
        self._take()

    def _take(self) -> None:
        frames, events = self._sound.pop(), self._events.pop()
        if self.problem:
            return
        try:
            entries: list[dict[str, Any]] = []
            while self._notes:
                entries.append(self._notes.popleft())
            entries += map(unpack_event, events)
            if entries:
                self._journal.write("".join(json.dumps(entry) + "\n" for entry in entries))
                self._journal.flush()
            if len(frames):  # after what controlled them: a recording cut off in between replays to its end
                self._input.write(frames[:, : self.channels])
                self._output.write(frames[:, self.channels :])
        except Exception as error:
            # Whatever it is, it ends the recording and must be seen: nobody waits for this thread.
            self.problem = str(error) or type(error).__name__
            logger.warning("recording stopped: %s", self.problem)

    @property
    def dropped_frames(self) -> int:
        """Frames that the disk was too slow for."""
        return self._sound.dropped

    @property
    def seconds(self) -> float:
        """How much is recorded."""
        return self._output.frames / self.heading.sample_rate

    @property
    def over(self) -> bool:
        """Whether it is finished."""
        return self._over.is_set()

    def finish(self) -> list[Path]:
        """Write out what is left and bring both files to one length; the files that are there now. Once.

        The journal ends with that length: a file that is shorter later has lost something.
        """
        self._over.set()
        self._thread.join(FINISH_TIMEOUT_S)
        writers = (self._input, self._output)
        if self._thread.is_alive():
            self.problem = f"the disk has not answered for {FINISH_TIMEOUT_S:g} s; what it took is in {self.folder}"
            return []
        paths: list[Path] = []
        ending: dict[str, bool | int] = {"ended": True}
        try:
            kept = min(writer.finish() for writer in writers)
            if kept < self._output.frames and not self.problem:
                self.problem = f"{self.folder}: only {kept} of {self._output.frames} frames fit; is the disk full?"
            for writer in writers:
                writer.cut(kept)
                paths.append(writer.path)
            ending["frames"] = kept
        except AudioFileError as error:
            self.problem = self.problem or str(error)
        with contextlib.suppress(OSError):
            if self.dropped_frames:
                self._journal.write(json.dumps({"dropped_frames": self.dropped_frames}) + "\n")
            self._journal.write(json.dumps(ending) + "\n")
            self._journal.close()
        return [*paths, self.folder / JOURNAL_NAME]


def draw_performance(
    path: Path, folder: Path, history: History, sample_rate: int, hop_samples: float, latency_samples: float, title: str
) -> None:
    """Picture of a recorded performance: input and output spectrograms, style lane, time per hop."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True, height_ratios=[3, 3, 1.4, 1.6])
    seconds = 0.0
    for axis, name, label in ((axes[0], "input.wav", "in"), (axes[1], "output.wav", "out")):
        audio = _mono(folder / name, int(PICTURE_SECONDS * sample_rate))
        seconds = len(audio) / sample_rate
        decibels = spectrogram_db(audio)
        axis.imshow(
            decibels,
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=-95,
            vmax=-15,
            extent=(0, seconds, 0, sample_rate / 2000),
        )
        axis.set_ylabel(f"{label} (kHz)")
        axis.set_ylim(0, min(16, sample_rate / 2000))
    axes[0].set_title(title)
    _draw_lane(axes[2], history, sample_rate, latency_samples, seconds)
    times = np.concatenate(history.hop_ms) if history.hop_ms else np.zeros((0, 2), np.float32)
    budget_ms = 1e3 * hop_samples / sample_rate
    at = (np.arange(len(times)) + 1) * hop_samples / sample_rate
    axes[3].plot(at, times[:, 0], ".", markersize=1.5, color="#1f5f8b")
    axes[3].axhline(budget_ms, color="#b03030", linewidth=1)
    axes[3].text(0.0, budget_ms, f" one hop: {budget_ms:.2f} ms", va="bottom", color="#b03030", fontsize=8)
    if len(times):
        hop = percentiles_ms(times[:, 0])
        axes[3].set_xlabel(
            f"s;  time per hop p50 {hop['p50']:.2f}, p99 {hop['p99']:.2f}, p99.9 {hop['p999']:.2f}, "
            f"max {hop['max']:.2f} ms"
        )
    axes[3].set_ylim(0, max(1.3 * budget_ms, 1.0))
    axes[3].set_ylabel("ms per hop")
    axes[3].set_xlim(0, max(seconds, 0.1))
    with NewFile(path) as part:
        figure.savefig(part, dpi=110, format="png")


def _draw_lane(axis, history: History, sample_rate: int, latency_samples: float, seconds: float) -> None:  # pyright: ignore[reportMissingParameterType]
    labels = list(dict.fromkeys(label for _, mix in history.mixes for label in mix))
    # One shape a style: a controller on the move brings hundreds of mixes a second.
    starts = [(frames + latency_samples) / sample_rate for frames, _ in history.mixes]
    times = [*starts, max(seconds, starts[-1])] if starts else []
    base, handles = np.zeros(len(times)), []
    for label in labels:
        weights = [mix.get(label, 0.0) for _, mix in history.mixes]
        top = base + np.array([*weights, weights[-1]])
        handles.append(axis.fill_between(times, base, top, linewidth=0, step="post", label=label))
        base = top
    if handles:
        axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    axis.set_ylim(0, 1)
    axis.set_yticks([])
    axis.set_ylabel("style mix")


def _mono(path: Path, limit: int) -> NDArray[np.float32]:
    parts, left = [], limit
    for block in read_blocks(path, 65_536):
        parts.append(block.mean(axis=0)[:left])
        left -= len(parts[-1])
        if left <= 0:
            break
    return np.concatenate(parts) if parts else np.zeros(1024, np.float32)


def spectrogram_db(audio: NDArray[np.float32], window: int = 2048, columns: int = 1200) -> NDArray[np.float32]:
    """Levels in dB [bins, columns] of audio [samples]; a full-scale sine is at 0 dB."""
    hop = max(window // 8, len(audio) // columns)
    padded = np.pad(audio, (window // 2, window))
    starts = np.arange(0, max(len(audio), 1), hop)
    shape = np.hanning(window).astype(np.float32)
    frames = np.stack([padded[s : s + window] for s in starts]) * shape
    magnitude = np.abs(np.fft.rfft(frames, axis=1)) / (shape.sum() / 2)
    return (20 * np.log10(magnitude + 1e-6)).T.astype(np.float32)
