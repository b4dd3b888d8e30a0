"""Figures of merit, each a function of arrays: what playing kept, how clean the sound is, how far two clouds lie apart.

Whatever cannot be measured (no onset to find, a level that never moves) is NaN, never a guess.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d
from scipy.signal import butter, firwin2, lfilter, oaconvolve, sosfilt, welch
from sklearn.covariance import ledoit_wolf

from training.librosa_once import librosa

Audio = NDArray[np.float32]

PARTIALS_HZ = (3_000.0, 7_500.0)  # between which mel bands hold several of them
AROUND_BINS = 25  # a partial is compared with; 600 Hz at 48 kHz
FLUTTER_HZ = (150.0, 8_000.0)  # between which bands are watched
FLUTTER_BANDS = 40
FLUTTER_RANGE_DB = 40.0  # what lies further below the loudest place is not heard to move
TRACK_RATE = 16_000  # of pitch, onsets, chroma and loudness; what is asked for must have this rate
TRACK_HOP = 320  # 20 ms
SOUNDING_DB = 30.0  # a frame no more than so far below the loudest one sounds
PITCH_RANGE_HZ = (65.4, 2093.0)  # C2 to C7
PITCHED_AGREEMENT = 0.85
PITCHED_VOICED = 0.75
SILENT_DBFS = -160.0
BUZZ_FLOOR_DB = -100.0


@dataclass(frozen=True)
class PitchTrack:
    """The pitch of a recording, and where it is certain.

    ``hz`` [frames] every TRACK_HOP samples; ``certain`` [frames]; ``voiced_share`` of the frames that sound; and
    ``agreement``, the share of voiced frames whose pitch stays when the spectrum is tilted either way.
    """

    hz: NDArray[np.float64]
    certain: NDArray[np.bool_]
    voiced_share: float
    agreement: float

    @property
    def pitched(self) -> bool:
        """Whether this is one voice with a pitch: of noise, chords and speech a tilt makes another pitch."""
        return self.voiced_share >= PITCHED_VOICED and self.agreement >= PITCHED_AGREEMENT


def pitch_hz(audio: Audio) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Pitch [frames] in Hz, with a guess where there is none, and where it is voiced: pYIN (Mauch and Dixon 2014).

    Behind a low-pass, as periods that are no whole number of samples otherwise look less alike than twice as long
    ones that are, the more so the brighter the sound.
    """
    dull = np.asarray(sosfilt(butter(2, 1500.0, fs=TRACK_RATE, output="sos"), audio), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty slices, in silence
        hz, voiced, _ = librosa.pyin(
            dull,
            fmin=PITCH_RANGE_HZ[0],
            fmax=PITCH_RANGE_HZ[1],
            sr=TRACK_RATE,
            hop_length=TRACK_HOP,
            resolution=0.25,
            fill_na=None,  # pyright: ignore[reportArgumentType]
        )
    return hz, voiced


def pitch_track(audio: Audio) -> PitchTrack:
    """The input's pitch [samples at TRACK_RATE], with its certainty measured by two harmless tilts of the spectrum."""
    hz, voiced = pitch_hz(audio)
    sounding = level_db(audio) >= -SOUNDING_DB
    voiced &= sounding[: len(voiced)]
    darker = np.asarray(lfilter([1.0], [1.0, -0.9], audio), np.float32)
    brighter = np.asarray(lfilter([1.0, -0.9], [1.0], audio), np.float32)
    same = [_cents(pitch_hz(tilted)[0], hz) <= 50.0 for tilted in (darker, brighter)]
    agreement = min(float(kept[voiced].mean()) for kept in same) if voiced.any() else 0.0
    share = float(voiced.sum() / max(int(sounding.sum()), 1))
    return PitchTrack(hz, voiced & same[0] & same[1], share, agreement)


def _cents(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.abs(1200.0 * np.log2(one / other))


def pitch_kept(track: PitchTrack, audio: Audio) -> float:
    """Share of the input's certain frames where the output's pitch lies within 50 cents; an octave off is wrong.

    The raw pitch accuracy of Poliner et al. (2007), which does not ask whether the output counts as voiced.
    """
    if not track.certain.any() or not np.any(audio):
        return 0.0
    return float((_cents(pitch_hz(audio)[0], track.hz) <= 50.0)[track.certain].mean())


def onsets_s(audio: Audio) -> NDArray[np.float64]:
    """Times of onsets in seconds, of audio at TRACK_RATE: peaks of spectral flux (Böck et al. 2012)."""
    return librosa.onset.onset_detect(y=audio, sr=TRACK_RATE, hop_length=TRACK_HOP // 2, units="time")


def onset_f1(reference_s: NDArray[np.float64], found_s: NDArray[np.float64], tolerance_s: float = 0.05) -> float:
    """F1 of onsets, each matched to one other at most; NaN where neither has any.

    Going through both in order matches as many pairs as any assignment can, as every tolerance is the same.
    """
    if not len(reference_s) and not len(found_s):
        return math.nan
    reference, found, matched, i, j = np.sort(reference_s), np.sort(found_s), 0, 0, 0
    while i < len(reference) and j < len(found):
        if abs(reference[i] - found[j]) <= tolerance_s + 1e-9:
            matched, i, j = matched + 1, i + 1, j + 1
        elif reference[i] < found[j]:
            i += 1
        else:
            j += 1
    return 2.0 * matched / (len(reference) + len(found))


def chroma(audio: Audio) -> NDArray[np.float32]:
    """Energy per pitch class [12, frames] of audio at TRACK_RATE, tuned to 440 Hz."""
    return librosa.feature.chroma_stft(y=audio, sr=TRACK_RATE, n_fft=4096, hop_length=TRACK_HOP, tuning=0.0)


def chroma_correlation(
    reference: NDArray[np.float32], found: NDArray[np.float32], sounding: NDArray[np.bool_]
) -> float:
    """Pearson correlation of two chromas [12, frames], frame by frame, in the mean over the frames that sound."""
    frames = min(reference.shape[1], found.shape[1], len(sounding))
    one, other = (c[:, :frames][:, sounding[:frames]].astype(np.float64) for c in (reference, found))
    one, other = one - one.mean(axis=0), other - other.mean(axis=0)
    scale = np.sqrt((one**2).sum(axis=0) * (other**2).sum(axis=0))
    each = (one * other).sum(axis=0) / np.maximum(scale, 1e-12)
    return float(each.mean()) if each.size else math.nan


def level_db(audio: Audio, floor_db: float = -50.0) -> NDArray[np.float64]:
    """Short-term level [frames] every TRACK_HOP samples over 50 ms, in dB below the loudest, never below the floor."""
    samples = TRACK_RATE // 20
    rms = librosa.feature.rms(y=audio, frame_length=samples, hop_length=TRACK_HOP)[0].astype(np.float64)
    return np.maximum(20.0 * np.log10(np.maximum(rms, 1e-10) / max(float(rms.max()), 1e-10)), floor_db)


def loudness_correlation(reference: Audio, found: Audio) -> float:
    """Pearson correlation of the level curves in dB; NaN where the reference's level hardly moves."""
    one, other = level_db(reference), level_db(found)
    frames = min(len(one), len(other))
    one, other = one[:frames] - one[:frames].mean(), other[:frames] - other[:frames].mean()
    if one.std() < 0.5:
        return math.nan
    return float((one * other).mean() / max(one.std() * other.std(), 1e-9))


_ON = np.arange(-2, 3)  # bins of a line: the main lobe of a Hann window
_BESIDE = np.concatenate([np.arange(-24, -5), np.arange(6, 25)])  # its neighbourhood
_FLANKS = np.array([[-6, -5, -4], [4, 5, 6]])  # where a line has nothing, and a gliding partial has as much


def hop_buzz_db(reference: Audio, found: Audio, hop_samples: int) -> float:
    """Energy of lines at multiples of the hop rate that the model added, in dB relative to the output's energy.

    A window of 256 hops puts every multiple on a bin. A line is what its five bins hold above the median of their
    neighbourhood; what the reference has there is taken off, at the gain that the neighbourhood got. It counts when it
    is 6 dB above both, so that noise, which always has some bin above its neighbours, is no buzz, and as far above both
    its flanks, so that a partial that glides over a multiple is none; and what stands there is centred on the multiple
    to half a bin (0.7 Hz at 48 kHz and hops of 128), as no partial beside it is. Both are [samples] at one rate and
    aligned. BUZZ_FLOOR_DB where there is none.
    """
    size, per_line = 256 * hop_samples, 256
    if len(found) < size:
        reference, found = (np.pad(audio, (0, size - len(audio))) for audio in (reference, found))
    out, before = (
        welch(audio.astype(np.float64), window="hann", nperseg=size, scaling="spectrum")[1]
        for audio in (found, reference)
    )
    lines = np.arange(per_line, len(out) - 32, per_line)
    around, around_before = (5.0 * np.median(power[lines[:, None] + _BESIDE], axis=1) for power in (out, before))
    line, line_before = (power[lines[:, None] + _ON].sum(axis=1) for power in (out, before))
    gain = around / np.maximum(around_before, 1e-30)
    expected = np.maximum(around, np.where(around_before > 1e-20, line_before * gain, line_before))
    flanks = 5.0 * out[lines[:, None, None] + _FLANKS].mean(axis=2).max(axis=1)
    bins = np.maximum(out[lines[:, None] + _ON] - around[:, None] / 5.0, 0.0)
    centred = np.abs(bins @ _ON) < 0.5 * bins.sum(axis=1)
    stands_out = (line > 4.0 * np.maximum(expected, flanks)) & centred
    return _relative_db(float(np.where(stands_out, line - expected, 0.0).sum()), float(out.sum()))


def tone_buzz_db(found: Audio, tone_hz: float, sample_rate: int, hop_samples: int) -> float:
    """Energy at the hop rate's multiples and at the sidebands it gives a steady tone, in dB relative to the output's.

    Nothing of a tone's own masks them, so this sees what music hides. ``found`` [samples] answers a sine of
    ``tone_hz``; lines within 12 Hz of the tone's harmonics are left out, as a style may add those, and so is
    what stands less than 6 dB out of the noise.
    """
    size = 256 * hop_samples
    power = welch(found.astype(np.float64), window="hann", nperseg=size, scaling="spectrum")[1]
    hop_hz, bin_hz = sample_rate / hop_samples, sample_rate / size
    orders = np.arange(1, hop_samples // 2)
    lines = np.concatenate([orders * hop_hz, tone_hz + orders * hop_hz, np.abs(tone_hz - orders * hop_hz)])
    harmonics = tone_hz * np.maximum(1.0, np.round(lines / tone_hz))
    lines = lines[(np.abs(lines - harmonics) > 12.0) & (lines > 24 * bin_hz) & (lines < sample_rate / 2 - 24 * bin_hz)]
    centres = np.round(lines / bin_hz).astype(int)[:, None]
    around = 5.0 * np.median(power[centres + _BESIDE], axis=1)
    line = power[centres + _ON].sum(axis=1)
    buzz, total = float(np.where(line > 4.0 * around, line - around, 0.0).sum()), float(power.sum())
    return _relative_db(buzz, total)


def partials_db(audio: Audio, sample_rate: int) -> float:
    """How far partials stand out from 3 to 7.5 kHz: power of the strongest tenth of bins over the median one, in dB.

    Noise has 6.3 dB. Mean over frames of 43 ms that are within 13 dB of the loudest; NaN where nothing sounds. Bins
    are compared with their neighbours, so that a slope is no partial.
    """
    size = 2 ** round(math.log2(0.043 * sample_rate))
    if len(audio) < size:
        return math.nan
    power = np.square(np.abs(librosa.stft(audio, n_fft=size, hop_length=size // 4, center=False)))  # [bins, frames]
    level = power.sum(axis=0)
    power = power[:, level > max(0.05 * level.max(), 1e-6)]
    around = uniform_filter1d(power, AROUND_BINS, axis=0) + 1e-30
    first, last = (round(hertz * size / sample_rate) for hertz in PARTIALS_HZ)
    apart = np.sort(power[first:last] / around[first:last], axis=0)
    if not apart.size:
        return math.nan
    strongest = apart[-(len(apart) // 10) :].mean(axis=0)
    return float(np.mean(10.0 * np.log10(strongest / np.maximum(np.median(apart, axis=0), 1e-6))))


def flutter_db(audio: Audio, sample_rate: int) -> float:
    """How much mel bands move from one 20 ms to the next: mean absolute difference in dB, 0 of a steady tone.

    Over frames of 43 ms, where a band sounds both times; NaN where nothing does. Bands of what is held move little:
    what is restruck, beats, or is noise moves more.
    """
    size = 2 ** round(math.log2(0.043 * sample_rate))
    if len(audio) < 2 * size or not np.any(audio):
        return math.nan
    power = librosa.feature.melspectrogram(
        y=audio,
        sr=sample_rate,
        n_fft=size,
        hop_length=sample_rate // 50,
        n_mels=FLUTTER_BANDS,
        fmin=FLUTTER_HZ[0],
        fmax=FLUTTER_HZ[1],
        center=False,
    )
    decibels = 10.0 * np.log10(np.maximum(power, 1e-30))
    sounds = decibels > decibels.max() - FLUTTER_RANGE_DB
    both = sounds[:, 1:] & sounds[:, :-1]
    return float(np.abs(np.diff(decibels, axis=1))[both].mean()) if both.any() else math.nan


def _relative_db(buzz: float, total: float) -> float:
    if buzz <= 0.0 or total <= 0.0:
        return BUZZ_FLOOR_DB
    return max(BUZZ_FLOOR_DB, 10.0 * math.log10(buzz / total))


def find_clicks(audio: Audio, sample_rate: int, ratio: float = 6.0) -> NDArray[np.int64]:
    """Samples at which something clicks: a second difference far above all others within 20 ms before and after.

    Looking to both sides separately keeps attacks out (what follows is as sharp) and the pulses of a voice.
    """
    block = max(1, sample_rate // 1000)
    bend = np.abs(np.diff(audio.astype(np.float64), 2))
    peaks = bend[: len(bend) // block * block].reshape(-1, block).max(axis=1)
    reach, gap = 20, 2  # blocks of a millisecond; a click may touch its neighbours
    padded = np.pad(peaks, reach + gap)
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach).max(axis=1)
    count = len(peaks)
    scale = np.maximum(windows[:count], windows[reach + 2 * gap + 1 :][:count])
    lone = (peaks > ratio * scale) & (peaks > 1e-3 * float(np.abs(audio).max(initial=0.0))) & (peaks > 1e-6)
    return np.flatnonzero(lone).astype(np.int64) * block


def added_clicks(reference: Audio, found: Audio, sample_rate: int) -> int:
    """How many clicks the output has where the reference has none within 10 ms."""
    there, new = find_clicks(reference, sample_rate), find_clicks(found, sample_rate)
    if not len(there):
        return len(new)
    return int((np.abs(new[:, None] - there[None]).min(axis=1) > sample_rate // 100).sum()) if len(new) else 0


def peak_dbfs(audio: Audio) -> float:
    """Highest magnitude in dB relative to full scale; SILENT_DBFS for silence."""
    return max(SILENT_DBFS, 20.0 * math.log10(max(float(np.abs(audio).max(initial=0.0)), 1e-9)))


def gaussian_of(points: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [dims] and covariance [dims, dims] of points [count, dims].

    Few points make a covariance that is singular by chance: it is shrunk towards a multiple of the identity, by as
    much as Ledoit and Wolf (2004) find best for these points.
    """
    values = points.astype(np.float64)
    return values.mean(axis=0), ledoit_wolf(values)[0]


def frechet_distance(
    one: tuple[NDArray[np.float64], NDArray[np.float64]], other: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> float:
    """Squared Fréchet distance of two Gaussians, each (mean, covariance), as Heusel et al. (2017) use it."""
    (mean, covariance), (other_mean, other_covariance) = one, other
    # The trace of the root of a product of two covariances, through a symmetric product: real whatever the rounding.
    values, vectors = scipy.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    both = np.sqrt(np.maximum(scipy.linalg.eigvalsh(root @ other_covariance @ root), 0.0)).sum()
    moved = float(np.square(mean - other_mean).sum())
    return max(0.0, moved + float(np.trace(covariance) + np.trace(other_covariance) - 2.0 * both))


def mean_spectrum(audio: Audio, sample_rate: int) -> NDArray[np.float64]:
    """Long-term power [2049] of [samples] over bins, adding up to one (Welch 1967)."""
    if len(audio) < 4096:
        audio = np.pad(audio, (0, 4096 - len(audio)))
    power = welch(audio.astype(np.float64), sample_rate, nperseg=4096)[1]
    return power / max(float(power.sum()), 1e-30)


def static_match(audio: Audio, target: NDArray[np.float64], sample_rate: int, limit_db: float = 20.0) -> Audio:
    """[samples] through one fixed linear-phase filter that gives it the long-term spectrum ``target`` [2049].

    Spectra are compared in third octaves, as partials of two tunes never meet; level is kept, delay removed.
    """
    frequencies = np.linspace(0.0, sample_rate / 2.0, len(target))
    decibels = 10.0 * np.log10(_third_octaves(target) / _third_octaves(mean_spectrum(audio, sample_rate)))
    decibels -= np.average(decibels, weights=_third_octaves(target))
    gains = 10.0 ** (np.clip(decibels, -limit_db, limit_db) / 20.0)
    taps = firwin2(2047, frequencies, gains, fs=sample_rate)
    out = oaconvolve(np.pad(audio, (0, 1024)), taps)[1023 : 1023 + len(audio)]
    scale = math.sqrt(float(np.square(audio).mean()) / max(float(np.square(out).mean()), 1e-20))
    return (scale * out).astype(np.float32)


def _third_octaves(power: NDArray[np.float64]) -> NDArray[np.float64]:
    """[bins] averaged over a third of an octave around each bin, never below 100 dB under the highest."""
    bins = np.arange(len(power))
    low = np.floor(bins * 2.0 ** (-1 / 6)).astype(int)
    high = np.minimum(np.ceil(bins * 2.0 ** (1 / 6)).astype(int) + 1, len(power))
    total = np.concatenate([[0.0], np.cumsum(power)])
    smooth = (total[high] - total[low]) / (high - low)
    return np.maximum(smooth, 1e-10 * float(smooth.max()))
