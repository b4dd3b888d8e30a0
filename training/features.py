"""What sound is described by: mel spectrograms, MFCC, chroma, onset strength and bars, at one exact frame rate.

librosa computes each from one power spectrogram, whose frames lie where a clock of ``frames_per_second`` puts them:
frame k is centred on sample round(k * sample_rate / frames_per_second), so no rate drifts, whether it divides the
sample rate (48,000 / 80) or not (44,100 / 80). Frames look half a window ahead: for training and analysis, never live.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soxr
from numpy.typing import NDArray

from realtime.loudness import SILENT_LUFS, loudness_lufs
from training.library import SHORTEST_LOUDNESS_SECONDS, Recording, replace_file
from training.librosa_once import librosa

log = logging.getLogger(__name__)

FEATURES_VERSION = 1
FRAMES_AT_ONCE = 4096  # bounds the memory that framing takes
POWER_FLOOR = 1e-10  # -100 dB: what librosa's power_to_db calls amin
CONSTANT_DB = 1e-4  # a band that varies by less has no deviation to divide by


class FeatureError(ValueError):
    """Sound or settings that no features can be had from; the text names the field and the remedy."""


@dataclass(frozen=True)
class Preparation:
    """What happens to a recording before it is described: cropped, mixed, resampled, levelled, in this order."""

    sample_rate: int = 48_000
    channels: int = 1  # 1: the mean of all; 2: as recorded, mono doubled, the first two of more
    start_seconds: float = 0.0
    seconds: float | None = None  # None: to the end
    normalise: Literal["none", "peak", "loudness"] = "none"
    peak_dbfs: float = -1.0  # of "peak": where the highest sample lies; of "loudness": where it lies at most
    loudness_lufs: float = -23.0  # of "loudness": EBU R128's programme level

    def __post_init__(self) -> None:
        if self.sample_rate < 8000:
            raise FeatureError(f"sample_rate: must be at least 8000, got {self.sample_rate}")
        if self.channels not in (1, 2):
            raise FeatureError(f"channels: must be 1 or 2, got {self.channels}")
        if not (math.isfinite(self.start_seconds) and self.start_seconds >= 0):
            raise FeatureError(f"start_seconds: must not be below zero, got {self.start_seconds:g}")
        if self.seconds is not None and not self.seconds > 0:
            raise FeatureError(f"seconds: must be above zero, got {self.seconds:g}")
        if self.normalise not in ("none", "peak", "loudness"):
            raise FeatureError(f"normalise: must be none, peak or loudness, got '{self.normalise}'")
        if not self.peak_dbfs <= 0:
            raise FeatureError(f"peak_dbfs: must be at most 0, got {self.peak_dbfs:g}")
        if not SILENT_LUFS < self.loudness_lufs <= 0:
            raise FeatureError(f"loudness_lufs: must lie between {SILENT_LUFS:g} and 0, got {self.loudness_lufs:g}")


def prepare(audio: NDArray[np.float32], sample_rate: int, settings: Preparation) -> NDArray[np.float32]:
    """Recording [samples] or [channels, samples] -> [settings.channels, samples] at the settings' rate and level.

    Silence stays silence. Raises FeatureError where nothing is left, or too little to have a loudness.
    """
    sound = np.atleast_2d(np.asarray(audio, dtype=np.float32))
    start = round(settings.start_seconds * sample_rate)
    stop = None if settings.seconds is None else start + round(settings.seconds * sample_rate)
    sound = sound[:, start:stop]
    if sound.shape[-1] == 0:
        raise FeatureError(
            f"start_seconds: {settings.start_seconds:g} s lie behind the end of a recording of "
            f"{np.shape(audio)[-1] / sample_rate:g} s; crop less"
        )
    if settings.channels == 1:
        sound = sound.mean(axis=0, keepdims=True)
    else:
        sound = np.repeat(sound, 2, axis=0) if len(sound) == 1 else sound[:2]
    if sample_rate != settings.sample_rate:
        sound = soxr.resample(sound.T, sample_rate, settings.sample_rate, quality="HQ").T
    return np.ascontiguousarray(sound * np.float32(_gain(sound, settings)), dtype=np.float32)


def _gain(sound: NDArray[np.float32], settings: Preparation) -> float:
    """What ``settings.normalise`` asks [channels, samples] to be multiplied by."""
    peak = float(np.abs(sound).max())
    if settings.normalise == "none" or peak == 0.0:
        return 1.0
    to_peak = 10.0 ** (settings.peak_dbfs / 20.0) / peak
    if settings.normalise == "peak":
        return to_peak
    seconds = sound.shape[-1] / settings.sample_rate
    if seconds < SHORTEST_LOUDNESS_SECONDS:
        raise FeatureError(
            f"normalise: {seconds:.3f} s have no loudness, BS.1770 measures {SHORTEST_LOUDNESS_SECONDS:g} s; "
            "use normalise = 'peak'"
        )
    loudness = loudness_lufs(sound.T, settings.sample_rate)
    return 1.0 if loudness <= SILENT_LUFS else min(to_peak, 10.0 ** ((settings.loudness_lufs - loudness) / 20.0))


@dataclass(frozen=True)
class FeatureConfig:
    """What is computed and how; every field is part of the cache's key."""

    preparation: Preparation = field(default_factory=Preparation)
    frames_per_second: Fraction | float = Fraction(80)  # kept exactly: 80, 59.94, Fraction(30_000, 1001)
    window_samples: int = 2048  # Hann
    mel_bands: int = 80
    lowest_hz: float = 30.0
    highest_hz: float | None = None  # None: half the sample rate
    mfcc_count: int = 20
    tuning_semitones: float = 0.0  # of chroma, from A4 = 440 Hz
    beats_per_bar: int = 4

    def __post_init__(self) -> None:
        try:
            rate = Fraction(self.frames_per_second).limit_denominator(1_000_000)
        except (ValueError, TypeError, OverflowError, ZeroDivisionError):
            rate = Fraction(0)
        if not 1 <= rate <= self.preparation.sample_rate:
            raise FeatureError(
                f"frames_per_second: must lie between 1 and the sample rate, got {self.frames_per_second}"
            )
        object.__setattr__(self, "frames_per_second", rate)  # 80 and 80.0 are one setting with one cache entry
        if self.window_samples < 64 or self.window_samples % 2:
            raise FeatureError(f"window_samples: must be even and at least 64, got {self.window_samples}")
        if not 1 <= self.mfcc_count <= self.mel_bands:
            raise FeatureError(f"mfcc_count: must lie between 1 and mel_bands, got {self.mfcc_count}")
        if not 0 <= self.lowest_hz < self.top_hz <= self.preparation.sample_rate / 2:
            raise FeatureError(
                f"lowest_hz, highest_hz: must rise and end at half the sample rate, got {self.lowest_hz:g} and "
                f"{self.top_hz:g}"
            )
        if self.beats_per_bar < 1:
            raise FeatureError(f"beats_per_bar: must be at least 1, got {self.beats_per_bar}")

    @property
    def top_hz(self) -> float:
        return self.preparation.sample_rate / 2 if self.highest_hz is None else self.highest_hz

    @property
    def hop(self) -> Fraction:
        """Samples from one frame to the next, exactly."""
        return self.preparation.sample_rate / Fraction(self.frames_per_second)


def frame_count(samples: int, hop: Fraction) -> int:
    """How many frames have their centre in or right behind ``samples`` samples, the first on sample 0."""
    return int(samples / hop) + 1


def frame_centres(count: int, hop: Fraction, start: int = 0) -> NDArray[np.int64]:
    """Sample numbers [count] of frames ``start``, ``start`` + 1, ..., to the nearest sample; halves go up.

    Exact for as long as a recording can be, as the arithmetic is on integers.
    """
    over, under = hop.numerator, hop.denominator
    return np.array([(2 * k * over + under) // (2 * under) for k in range(start, start + count)], dtype=np.int64)


def power_spectrogram(audio: NDArray[np.float32], window_samples: int, hop: Fraction) -> NDArray[np.float32]:
    """[channels, samples] -> [channels, window_samples / 2 + 1, frames], by a Hann window with silence around.

    librosa.stft(center=True) squared where the hop is whole; librosa itself has no other hops.
    """
    half = window_samples // 2
    padded = np.pad(audio, ((0, 0), (half, half)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, window_samples, axis=-1)
    hann = librosa.filters.get_window("hann", window_samples).astype(np.float32)
    frames = frame_count(audio.shape[-1], hop)
    power = np.empty((len(audio), half + 1, frames), dtype=np.float32)
    for start in range(0, frames, FRAMES_AT_ONCE):
        centres = frame_centres(min(FRAMES_AT_ONCE, frames - start), hop, start)
        spectrum = np.fft.rfft(windows[:, centres] * hann)
        power[:, :, start : start + len(centres)] = np.square(np.abs(spectrum)).swapaxes(1, 2)
    return power


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each mel band [bands], in dB, over ``frames`` frames."""

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    frames: int

    @staticmethod
    def of(mel_db: NDArray[np.floating]) -> Statistics:
        """Of log-mel spectrograms [..., bands, frames]."""
        bands = mel_db.shape[-2]
        values = np.moveaxis(mel_db, -2, 0).reshape(bands, -1).astype(np.float64)
        return Statistics(values.mean(axis=1), values.std(axis=1), values.shape[1])

    @staticmethod
    def merge(parts: Iterable[Statistics]) -> Statistics:
        """Of many recordings together, as if they were one: Chan, Golub and LeVeque (1979), equation 2.1.

        Raises FeatureError for none, or for different numbers of bands.
        """
        every = list(parts)
        if not every or len({part.mean.shape for part in every}) > 1:
            raise FeatureError("statistics: need at least one recording, all with as many mel bands")
        counts = np.array([part.frames for part in every], dtype=np.float64)
        means = np.stack([part.mean for part in every])
        mean = counts @ means / counts.sum()
        within = np.stack([np.square(part.deviation) for part in every])
        variance = counts @ (within + np.square(means - mean)) / counts.sum()
        return Statistics(mean, np.sqrt(variance), int(counts.sum()))

    def standardise(self, mel_db: NDArray[np.floating]) -> NDArray[np.float32]:
        """[..., bands, frames] in dB -> zero mean and unit variance per band; a band that never moves becomes zero."""
        scale = np.where(self.deviation > CONSTANT_DB, self.deviation, 1.0)
        return ((mel_db - self.mean[:, None]) / scale[:, None]).astype(np.float32)

    def restore(self, mel: NDArray[np.floating]) -> NDArray[np.float32]:
        """The way back from ``standardise``, to dB."""
        scale = np.where(self.deviation > CONSTANT_DB, self.deviation, 1.0)
        return (mel * scale[:, None] + self.mean[:, None]).astype(np.float32)


@dataclass(frozen=True)
class Features:
    """One recording, described. Frame k of every array is centred k / frames_per_second seconds after its start."""

    mel: NDArray[np.float32]  # [channels, mel_bands, frames], standardised by ``statistics``
    statistics: Statistics
    mfcc: NDArray[np.float32]  # [channels, mfcc_count, frames]
    chroma: NDArray[np.float32]  # [channels, 12, frames], C first, the highest of each frame 1
    onset_strength: NDArray[np.float32]  # [frames], over all channels
    beat_frames: NDArray[np.int64]  # [beats]
    tempo_bpm: float  # 0 where no beat was found

    @property
    def mel_db(self) -> NDArray[np.float32]:
        """The mel spectrogram in dB as it was before it was standardised."""
        return self.statistics.restore(self.mel)


def describe(audio: NDArray[np.float32], sample_rate: int, config: FeatureConfig) -> Features:
    """Prepare a recording [samples] or [channels, samples] and compute everything. Raises FeatureError.

    Mel bands after Slaney (1998), MFCC after Davis and Mermelstein (1980), onset strength as spectral flux of the mel
    bands (Böck and Widmer 2013), beats by dynamic programming (Ellis 2007): librosa's.
    """
    sound = prepare(audio, sample_rate, config.preparation)
    rate, window = config.preparation.sample_rate, config.window_samples
    power = power_spectrogram(sound, window, config.hop)
    mel_db = librosa.power_to_db(
        librosa.feature.melspectrogram(
            S=power, sr=rate, n_fft=window, n_mels=config.mel_bands, fmin=config.lowest_hz, fmax=config.top_hz
        ),
        amin=POWER_FLOOR,
        top_db=None,  # what counts as silent must not depend on the loudest moment
    ).astype(np.float32)
    statistics = Statistics.of(mel_db)
    chroma = librosa.feature.chroma_stft(
        S=power, sr=rate, n_fft=window, tuning=config.tuning_semitones, hop_length=round(config.hop)
    )
    onset = onset_strength(mel_db, config)
    beats, tempo = track_beats(onset, config.frames_per_second)
    return Features(
        mel=statistics.standardise(mel_db),
        statistics=statistics,
        mfcc=librosa.feature.mfcc(S=mel_db, n_mfcc=config.mfcc_count).astype(np.float32),
        chroma=chroma.astype(np.float32),
        onset_strength=onset,
        beat_frames=beats,
        tempo_bpm=tempo,
    )


def onset_strength(mel_db: NDArray[np.float32], config: FeatureConfig) -> NDArray[np.float32]:
    """Log-mel spectrograms [channels, bands, frames] in dB -> mean rise over bands and channels [frames]."""
    # Far below the loudest moment, noise of rounding rises and falls by many dB.
    heard = np.maximum(mel_db, mel_db.max() - 80.0)
    strength = librosa.onset.onset_strength(
        S=heard, sr=config.preparation.sample_rate, n_fft=config.window_samples, hop_length=max(1, round(config.hop))
    )
    return np.asarray(strength, dtype=np.float32).reshape(-1, mel_db.shape[-1]).mean(axis=0)


def track_beats(strength: NDArray[np.float32], frames_per_second: Fraction | float) -> tuple[NDArray[np.int64], float]:
    """Onset strength [frames] -> frames of the beats and the tempo in beats per minute; none of silence."""
    # A hop of one sample at a sample rate of one per frame: the frame rate as it is, whole or not.
    tempo, beats = librosa.beat.beat_track(onset_envelope=strength, sr=float(frames_per_second), hop_length=1)
    return np.asarray(beats, dtype=np.int64), float(np.atleast_1d(tempo)[0])


def bar_frames(features: Features, beats_per_bar: int) -> NDArray[np.int64]:
    """Frames [bars + 1] where whole bars begin and the last one ends; empty where there is not one.

    The first beat of the bar is the one in ``beats_per_bar`` whose onsets are strongest in the mean, as accents mark
    it: the simplest cue of Goto, "An audio-based real-time beat tracking system", 2001, section 3.2.
    """
    beats = features.beat_frames
    if len(beats) <= beats_per_bar:
        return np.zeros(0, dtype=np.int64)
    # A beat is found to the frame or two; its onset may lie in the next.
    near = beats[:, None] + np.arange(-2, 3)
    strength = features.onset_strength[np.clip(near, 0, len(features.onset_strength) - 1)].max(axis=1)
    accents = [float(strength[phase::beats_per_bar].mean()) for phase in range(beats_per_bar)]
    bars = beats[int(np.argmax(accents)) :: beats_per_bar]
    return bars if len(bars) > 1 else np.zeros(0, dtype=np.int64)


def split_bars(
    audio: NDArray[np.float32], sample_rate: int, features: Features, config: FeatureConfig
) -> list[NDArray[np.float32]]:
    """The recording that was described, [samples] or [channels, samples], cut into whole bars at its own rate.

    What lies before the first bar and behind the last is left out; every sample between them is in one bar.
    """
    hop = sample_rate / Fraction(config.frames_per_second)
    begin = round(config.preparation.start_seconds * sample_rate)
    frames = bar_frames(features, config.beats_per_bar)
    edges = [begin + int(frame_centres(1, hop, int(frame))[0]) for frame in frames]
    return [audio[..., start:stop] for start, stop in itertools.pairwise(edges)]


class FeatureCache:
    """Features on disk, one file for each sound and setting. Threads and processes may share a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, audio_sha256: str, sample_rate: int, channels: int, config: FeatureConfig) -> Path:
        """Where features lie: by the sound, the settings, and what computes them."""
        key = json.dumps(
            {
                "version": FEATURES_VERSION,
                "librosa": version("librosa"),
                "audio": [audio_sha256, sample_rate, channels],
                "config": asdict(config),
            },
            sort_keys=True,
            default=str,  # fractions
        )
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}-features.npz"

    def of_recording(self, recording: Recording, config: FeatureConfig) -> Features:
        """Of a recording in the library, without reading its sound where the features are known."""
        path = self.path(recording.audio_sha256, recording.sample_rate, 1, config)
        known = _read(path, config)
        return known or self._make(path, np.asarray(recording.audio()), recording.sample_rate, config)

    def of_audio(self, audio: NDArray[np.float32], sample_rate: int, config: FeatureConfig) -> Features:
        """Of any sound [samples] or [channels, samples]."""
        sound = np.ascontiguousarray(np.atleast_2d(audio), dtype=np.float32)
        path = self.path(hashlib.sha256(sound.data).hexdigest(), sample_rate, len(sound), config)
        return _read(path, config) or self._make(path, sound, sample_rate, config)

    def _make(self, path: Path, audio: NDArray[np.float32], sample_rate: int, config: FeatureConfig) -> Features:
        features = describe(audio, sample_rate, config)
        replace_file(path, lambda temporary: write_features(temporary, features))
        return features


def write_features(path: Path, features: Features, notes: NDArray[np.bool_] | None = None) -> None:
    """One .npz with the fields of ``Features``, its statistics as mel_mean, mel_deviation and mel_frames.

    ``notes`` [128, frames]: which MIDI notes sound, where that is known. Raises OSError.
    """
    known: dict[str, Any] = {} if notes is None else {"notes": notes}
    known |= _fields(features.statistics)
    with path.open("wb") as file:  # np.savez puts a suffix of its own on a name
        np.savez(
            file,
            mel=features.mel,
            mfcc=features.mfcc,
            chroma=features.chroma,
            onset_strength=features.onset_strength,
            beat_frames=features.beat_frames,
            tempo_bpm=np.float64(features.tempo_bpm),
            **known,
        )


def write_statistics(path: Path, statistics: Statistics, frames_per_second: Fraction | float) -> None:
    """One .npz with the statistics as ``write_features`` names them, and the frame rate, a fraction. Raises OSError."""
    rate = Fraction(frames_per_second)
    with path.open("wb") as file:
        np.savez(file, frames_per_second=np.array([rate.numerator, rate.denominator]), **_fields(statistics))


def _fields(statistics: Statistics) -> dict[str, Any]:
    return {
        "mel_mean": statistics.mean,
        "mel_deviation": statistics.deviation,
        "mel_frames": np.int64(statistics.frames),
    }


def _read(path: Path, config: FeatureConfig) -> Features | None:
    """Features as they were written, or None where the file is missing or damaged: the archive has checksums."""
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            found = {name: file[name] for name in file.files}
        features = Features(
            found["mel"],
            Statistics(found["mel_mean"], found["mel_deviation"], int(found["mel_frames"])),
            found["mfcc"],
            found["chroma"],
            found["onset_strength"],
            found["beat_frames"],
            float(found["tempo_bpm"]),
        )
        channels, frames = config.preparation.channels, len(features.onset_strength)
        shapes: Sequence[tuple[NDArray[np.generic], int]] = (
            (features.mel, config.mel_bands),
            (features.mfcc, config.mfcc_count),
            (features.chroma, 12),
        )
        if all(values.shape == (channels, rows, frames) for values, rows in shapes):
            return features
    except Exception as error:  # damage to an archive comes out as almost any of them, and the answer is the same
        log.info("cannot be read: %s (%s)", path, error)
    log.info("made anew: %s", path)
    return None
