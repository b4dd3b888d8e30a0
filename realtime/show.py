"""What a performance leaves: input and output as sound files, and a picture of what happened."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realtime.audio import AudioFileError, AudioWriter, read_blocks
from realtime.files import NewFile
from realtime.ring import Ring

logger = logging.getLogger(__name__)

PICTURE_SECONDS = 120.0
FINISH_TIMEOUT_S = 10.0


def percentiles_ms(times: NDArray[Any]) -> dict[str, float]:
    """p50, p99, p999 and max of times in ms [n], to a tenth of a microsecond; zeros when there are none."""
    if not len(times):
        return {"p50": 0.0, "p99": 0.0, "p999": 0.0, "max": 0.0}
    p50, p99, p999 = np.percentile(times, [50, 99, 99.9]).tolist()
    values = {"p50": p50, "p99": p99, "p999": p999, "max": float(times.max())}
    return {name: round(value, 4) for name, value in values.items()}


@dataclass
class History:
    """The style mix over time, as (frames since the start, weights by style label)."""

    mixes: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    hop_ms: list[NDArray[np.float32]] = field(default_factory=list)

    def note(self, frames: int, mix: dict[str, float]) -> None:
        """Remember a mix from here on; repeated mixes are kept once."""
        if not self.mixes or self.mixes[-1][1] != mix:
            self.mixes.append((frames, mix))


class Recorder:
    """Drains the sound ring to ``input.wav`` and ``output.wav`` on a thread of its own, away from the audio process.

    A disk that fills up ends the recording, not the performance: what was written until then becomes a whole file.
    """

    def __init__(self, ring: Ring, folder: Path, sample_rate: int, channels: int) -> None:
        """Raises AudioFileError when the folder cannot be written."""
        self.folder, self.channels = folder, channels
        self.problem = ""
        self._ring = ring
        self._input = AudioWriter(folder / "input.wav", sample_rate, channels)
        try:
            self._output = AudioWriter(folder / "output.wav", sample_rate, channels)
        except AudioFileError:
            self._input.discard()
            raise
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._drain, name="recorder", daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        while not self._over.wait(0.05):
            self._take()
        self._take()

    def _take(self) -> None:
        frames = self._ring.pop()
        if not len(frames) or self.problem:
            return
        try:
            self._input.write(frames[:, : self.channels].T)
            self._output.write(frames[:, self.channels :].T)
        except Exception as error:
            # Whatever it is, it ends the recording and must be seen: nobody waits for this thread.
            self.problem = str(error) or type(error).__name__
            logger.warning("recording stopped: %s", self.problem)

    @property
    def dropped_frames(self) -> int:
        """Frames that the disk was too slow for."""
        return self._ring.dropped

    def finish(self) -> list[Path]:
        """Write out what is left and give the files, which have one length, their names; those that are there now."""
        self._over.set()
        self._thread.join(FINISH_TIMEOUT_S)
        writers = (self._input, self._output)
        if self._thread.is_alive():
            parts = " and ".join(str(writer.part) for writer in writers)
            self.problem = f"the disk has not answered for {FINISH_TIMEOUT_S:g} s; what it took is in {parts}"
            return []
        paths = []
        try:
            kept = min(writer.finish() for writer in writers)
            if kept < self._output.frames and not self.problem:
                self.problem = f"{self.folder}: only {kept} of {self._output.frames} frames fit; is the disk full?"
            for writer in writers:
                writer.salvage(kept)
                paths.append(writer.path)
        except AudioFileError as error:
            self.problem = self.problem or str(error)
        for writer in writers:
            writer.discard()
        return paths


def draw_performance(
    path: Path, folder: Path, history: History, sample_rate: int, hop_samples: int, latency_samples: int, title: str
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


def _draw_lane(axis, history: History, sample_rate: int, latency_samples: int, seconds: float) -> None:  # pyright: ignore[reportMissingParameterType]
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
