"""Losses: each a function of prediction and target, with one value per item of the batch and its source.

Magnitudes are scaled so that a sine of amplitude 1 has magnitude 0.5 at every FFT size; one floor then serves all.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from training.recipe import LEVEL_SECONDS, LossConfig

MAGNITUDE_FLOOR = 1e-5  # -94 dB below a full-scale sine
LOWEST_PITCH_HZ, HIGHEST_PITCH_HZ = 65.0, 2000.0
UNCLEAR = 0.3  # a period whose difference is above this is none
ONSET_SECONDS, ONSET_BANDS = 0.02, 40
LEAST_ONSET = 0.1  # dB squared: steady sound and noise have less
STROKE_DB = 1.0  # no style that holds its notes stands out by more where nothing begins
SSIM_FFT_SIZE, SSIM_BANDS = 1024, 64
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_WEIGHTS = (0.0710, 0.4530, 0.4760)  # 0.0448, 0.2856 and 0.3001, brought to a sum of one
CONVERGENCE_FLOOR = 1e-4  # root mean square over all bins; a full-scale sine has about 0.03


def stft_magnitude(audio: Tensor, fft_size: int, window: Tensor) -> Tensor:
    """audio [batch, samples] -> magnitudes [batch, bins, frames]; hop is a quarter of ``fft_size``."""
    spectrum = torch.stft(
        audio, fft_size, fft_size // 4, window=window, center=True, pad_mode="constant", return_complex=True
    )
    # The square root of a floored power has a gradient everywhere, the absolute value has none at zero.
    power = spectrum.real.square() + spectrum.imag.square()
    return (power / window.sum().square()).clamp_min(MAGNITUDE_FLOOR**2).sqrt()


def spectral_convergence(predicted: Tensor, target: Tensor) -> Tensor:
    """Frobenius norm of the difference over that of the target: magnitudes [batch, bins, frames] -> [batch].

    Arik, Jun and Diamos, "Fast spectrogram inversion using multi-head convolutional neural networks", 2018, eq. 3;
    used at several resolutions by Yamamoto, Song and Kim, "Parallel WaveGAN", 2020, eq. 6.
    """
    difference = torch.linalg.vector_norm(predicted - target, dim=(1, 2))
    size = torch.linalg.vector_norm(target, dim=(1, 2))
    # Without this floor an almost silent target would outweigh everything else.
    return difference / size.clamp_min(CONVERGENCE_FLOOR * (target.shape[1] * target.shape[2]) ** 0.5)


def log_l1(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of natural logs: magnitudes above zero [batch, bins, frames] -> [batch].

    Yamamoto, Song and Kim, "Parallel WaveGAN", 2020, eq. 7. On mel bands: Kong, Kim and Bae, "HiFi-GAN", 2020, eq. 5,
    over several scales as Kumar et al., "High-fidelity audio compression with improved RVQGAN", 2023, section 3.4.
    """
    return (predicted.log() - target.log()).abs().mean(dim=(1, 2))


def relative_mse(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean square of the difference over that of the target: audio [batch, samples] -> [batch].

    The target counts as no quieter than -60 dBFS, so that silence does not outweigh everything else.
    """
    power = target.square().mean(dim=1).clamp_min(1e-6)
    return (predicted - target).square().mean(dim=1) / power


def mel_magnitude(magnitude: Tensor, matrix: Tensor) -> Tensor:
    """Magnitudes [batch, bins, frames] and ``matrix`` [bands, bins] -> [batch, bands, frames], floored."""
    return torch.matmul(matrix, magnitude).clamp_min(MAGNITUDE_FLOOR)


@lru_cache
def loudness_weighting(sample_rate: int, size: int) -> Tensor:
    """[size / 2 + 1] magnitudes at the bins of an FFT: how loud frequencies are heard; ITU-R BS.1770-4, annex 1."""
    from pyloudnorm import IIRfilter

    shelf = IIRfilter(4.0, 0.5**0.5, 1500.0, sample_rate, "high_shelf")
    high_pass = IIRfilter(0.0, 0.5, 38.0, sample_rate, "high_pass")
    z = np.exp(-2j * np.pi * np.fft.rfftfreq(size))
    responses = [np.polyval(stage.b[::-1], z) / np.polyval(stage.a[::-1], z) for stage in (shelf, high_pass)]
    return torch.tensor(np.abs(responses[0] * responses[1]), dtype=torch.float32)


def level_l1(predicted: Tensor, target: Tensor, sample_rate: int) -> Tensor:
    """Mean absolute difference of short-term levels in natural log units: audio [batch, samples] -> [batch].

    Root mean square over 50 ms, every 25 ms, floored at -80 dBFS, of what is weighted as loudness is: how loud the
    playing is, whatever the timbre. Loudness over time as a loss: Engel et al., "DDSP", 2020, section 4.
    """
    size, samples = max(2, round(LEVEL_SECONDS * sample_rate)), predicted.shape[1]
    padded = 2 ** math.ceil(math.log2(samples + size))  # what wraps around falls into the padding
    weights = loudness_weighting(sample_rate, padded).to(predicted.device)

    def level(audio: Tensor) -> Tensor:
        heard = torch.fft.irfft(torch.fft.rfft(audio, padded) * weights, padded)[:, :samples]
        power = torch.nn.functional.avg_pool1d(heard.square()[:, None], size, size // 2)[:, 0]
        return 0.5 * (power + 1e-8).log()

    return (level(predicted) - level(target)).abs().mean(dim=1)


def period_differences(audio: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
    """How unlike itself a sound is one lag later: audio [batch, samples] -> [batch, frames, lags] and power [..., 1].

    The cumulative mean normalised difference of de Cheveigné and Kawahara, "YIN", 2002, eq. 8, from the
    autocorrelation of windowed frames over that of the window (Boersma, "Accurate short-term analysis", 1993, eq. 9),
    behind a low-pass at 1.5 kHz. Lag i + 1 is at place i; about 1 where there is no period, near 0 at one.
    """
    size = 2 ** round(math.log2(0.04 * sample_rate))
    window = torch.hann_window(size, device=audio.device)
    longest = round(sample_rate / LOWEST_PITCH_HZ)
    hertz = torch.fft.rfftfreq(2 * size, 1.0 / sample_rate, device=audio.device)
    dull = 1.0 / (1.0 + (hertz / 1500.0) ** 4)
    spectra = torch.fft.rfft(audio.unfold(1, size, size // 2) * window, 2 * size)
    power = (spectra.real.square() + spectra.imag.square()) * dull
    alike = torch.fft.irfft(power)[..., : longest + 1]
    loudness = alike[..., :1].clamp_min(1e-8)
    shape = torch.fft.irfft(torch.fft.rfft(window, 2 * size).abs().square())[: longest + 1]
    difference = (1.0 - alike[..., 1:] / loudness / (shape[1:] / shape[0])).clamp_min(0.0)
    lags = torch.arange(1, longest + 1, device=audio.device)
    return difference * lags / difference.cumsum(dim=-1).clamp_min(1e-4), alike[..., :1] / size


@torch.no_grad()
def clear_periods(audio: Tensor, sample_rate: int) -> tuple[Tensor, Tensor, Tensor]:
    """The period of a sound: audio [batch, samples] -> three of [batch, frames, 1], without gradients.

    Its lag less that of HIGHEST_PITCH_HZ, the difference there (see ``period_differences``), and how much it counts:
    from 1, where it is clear, down to 0, where there is none or next to no sound.
    """
    shortest = round(sample_rate / HIGHEST_PITCH_HZ) - 1
    found, power = period_differences(audio, sample_rate)
    found = found[..., shortest:]
    lags = torch.arange(found.shape[-1], device=audio.device)
    # The first place that is nearly as low as the lowest, then the bottom of that dip.
    near = (found <= found.amin(dim=-1, keepdim=True) + 0.05).to(torch.uint8).argmax(dim=-1, keepdim=True)
    dip = (lags >= near) & (lags <= 1.1 * (near + shortest) - shortest)
    period = torch.where(dip, found, 2.0).argmin(dim=-1, keepdim=True)
    clear = found.gather(-1, period)
    sounding = power > power.amax(dim=1, keepdim=True).clamp_min(1e-7) * 1e-3
    return period, clear, (1.0 - clear / UNCLEAR).clamp_min(0.0) * sounding


def pitch_loss(predicted: Tensor, heard: Tensor, sample_rate: int) -> Tensor:
    """How far the pitch of what is heard is from being the pitch of what is made: audio [batch, samples] -> [batch].

    Where what is heard has a clear period, what is made should have it as clearly, and no shorter one.
    """
    shortest = round(sample_rate / HIGHEST_PITCH_HZ) - 1
    period, clear, weight = clear_periods(heard, sample_rate)
    ours = period_differences(predicted, sample_rate)[0][..., shortest:]
    at = ours.gather(-1, period)
    lost = (at - clear.clamp_min(0.1)).clamp_min(0.0)
    lags = torch.arange(ours.shape[-1], device=heard.device)
    shorter = lags < 0.85 * (period + shortest) - shortest
    rival = torch.where(shorter, ours, 2.0).amin(dim=-1, keepdim=True)
    wrong = (at + 0.1 - rival).clamp_min(0.0)
    return ((lost + wrong) * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp_min(1.0)


def onset_strength(audio: Tensor, sample_rate: int) -> Tensor:
    """The mean rise of mel bands over about 10 ms, in dB: audio [batch, samples] -> [batch, frames] of 5 ms.

    Böck and Widmer, "Maximum filter vibrato suppression for onset detection", 2013, eq. 3, without the filter, over
    the last 50 dB of the excerpt and smoothed over three frames: a bow may answer a pluck some milliseconds late.
    """
    size = 2 ** round(math.log2(ONSET_SECONDS * sample_rate))
    window, matrix = torch.hann_window(size, device=audio.device), mel_matrix(sample_rate, size, ONSET_BANDS)
    spectrum = torch.stft(audio, size, size // 4, window=window, pad_mode="constant", return_complex=True)
    mel = torch.matmul(matrix.to(audio.device), spectrum.real.square() + spectrum.imag.square())
    floor = 1e-5 * mel.detach().mean(dim=(1, 2), keepdim=True).clamp_min(1e-9)
    decibels = 10.0 * (mel + floor).log10()
    rise = (decibels[..., 2:] - decibels[..., :-2]).clamp_min(0.0).mean(dim=1, keepdim=True)
    return torch.nn.functional.avg_pool1d(rise, 3, 1, 1)[:, 0]


def onset_loss(predicted: Tensor, heard: Tensor, sample_rate: int) -> Tensor:
    """One minus the correlation of onset strengths: audio [batch, samples] -> [batch]; 0 where nothing begins."""
    strengths = onset_strength(predicted, sample_rate), onset_strength(heard, sample_rate).detach()
    ours, theirs = (strength - strength.mean(dim=1, keepdim=True) for strength in strengths)
    alike = (ours * theirs).mean(dim=1)
    powers = [side.square().mean(dim=1) for side in (ours, theirs)]
    correlation = alike / (powers[0].clamp_min(1e-2) * powers[1].clamp_min(1e-2)).sqrt()
    return (1.0 - correlation) * (powers[1] > LEAST_ONSET)


def stroke_loss(predicted: Tensor, heard: Tensor, sample_rate: int) -> Tensor:
    """How far what is struck stands out where nothing is heard to begin, in dB in the mean: audio [batch, samples] ->
    [batch].

    Onset strengths against their mean over the excerpt, so that steady noise is no stroke. Within 21 ms of what is
    heard a stroke may be as strong as that, and anywhere 1 dB.
    """
    ours, theirs = onset_strength(predicted, sample_rate), onset_strength(heard, sample_rate).detach()
    ours, theirs = ours - ours.detach().mean(dim=1, keepdim=True), theirs - theirs.mean(dim=1, keepdim=True)
    near = torch.nn.functional.max_pool1d(theirs[:, None], 9, 1, 4)[:, 0]
    return (ours - near - STROKE_DB).clamp_min(0.0).mean(dim=1)


def log_l2(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean square of the difference of natural logs: magnitudes above zero [batch, bins, frames] -> [batch]."""
    return (predicted.log() - target.log()).square().mean(dim=(1, 2))


def gram(features: Tensor) -> Tensor:
    """Features [batch, channels, places] -> how alike channels are [batch, channels, channels], per place and channel.

    Gatys, Ecker and Bethge, "Image style transfer using convolutional neural networks", 2016, eq. 3.
    """
    return torch.matmul(features, features.transpose(1, 2)) / (features.shape[1] * features.shape[2])


def gram_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Squared difference of Gram matrices over that of the target's: magnitudes [batch, bands, frames] -> [batch].

    Bands are the channels and frames the places, so what sounds together counts and when it sounds does not. In place
    of a network's features it takes what lies above 80 dB below a full-scale sine, in units of 80 dB: Gatys et al.,
    2016, eq. 4, on spectrograms as Grinstein et al., "Audio style transfer", 2018.
    """
    ours, theirs = (gram(picture(side)) for side in (predicted, target))
    size = theirs.square().sum(dim=(1, 2)).clamp_min(1e-2)  # that of a picture 55 dB down; quieter targets count less
    return (ours - theirs).square().sum(dim=(1, 2)) / size


def picture(magnitude: Tensor) -> Tensor:
    """Magnitudes above zero as the picture of a spectrogram: 0 is 80 dB below a full-scale sine or less, 1 is one."""
    return (20.0 * (2.0 * magnitude).log10() / 80.0 + 1.0).clamp_min(0.0)


def ms_ssim(predicted: Tensor, target: Tensor) -> Tensor:
    """Multi-scale structural similarity of two pictures with values from 0 to 1: [batch, height, width] -> [batch].

    Wang, Simoncelli and Bovik, "Multi-scale structural similarity for image quality assessment", 2003, eq. 7, at three
    scales with weights in the ratio of its first three, under a Gaussian window of eleven
    places.
    """
    weights = torch.tensor(SSIM_WEIGHTS, device=predicted.device)
    place = torch.arange(SSIM_WINDOW, device=predicted.device) - SSIM_WINDOW // 2
    bell = torch.exp(-0.5 * (place / SSIM_SIGMA) ** 2)
    window = (bell[:, None] * bell / bell.sum() ** 2)[None, None]
    a, b = predicted[:, None], target[:, None]
    scales = []
    for scale in range(len(SSIM_WEIGHTS)):
        means = [torch.nn.functional.conv2d(x, window) for x in (a, b, a * a, b * b, a * b)]
        mean_a, mean_b = means[:2]
        variance_a, variance_b = means[2] - mean_a.square(), means[3] - mean_b.square()
        covariance = means[4] - mean_a * mean_b
        alike = (2.0 * covariance + 9e-4) / (variance_a + variance_b + 9e-4)
        if scale == len(SSIM_WEIGHTS) - 1:  # luminance counts at the coarsest scale alone
            alike = alike * (2.0 * mean_a * mean_b + 1e-4) / (mean_a.square() + mean_b.square() + 1e-4)
        scales.append(alike.mean(dim=(1, 2, 3)).clamp_min(1e-4))
        a, b = (torch.nn.functional.avg_pool2d(x, 2) for x in (a, b))
    return (torch.stack(scales, dim=1) ** weights).prod(dim=1)


@lru_cache
def mel_matrix(sample_rate: int, fft_size: int, bands: int, highest_hz: float | None = None) -> Tensor:
    """[bands, bins]: rows of triangles on the mel scale that each add up to one; empty bands are left out.

    Up to ``highest_hz``, or to half the sample rate.
    """
    from training.librosa_once import librosa

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # librosa warns of the empty bands that the next line takes out
        matrix = torch.tensor(
            librosa.filters.mel(sr=sample_rate, n_fft=fft_size, n_mels=bands, fmax=highest_hz, norm=None)
        )
    matrix = matrix[matrix.sum(dim=1) > 0]
    return matrix / matrix.sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class LossTerms:
    """Weighted sum and each unweighted term, one value per item [batch]."""

    total: Tensor
    terms: dict[str, Tensor]


class SpectralLoss(nn.Module):
    """The recipe's weighted sum, with one STFT per resolution shared by all terms that need it."""

    def __init__(self, config: LossConfig, sample_rate: int) -> None:
        super().__init__()
        self.config, self.sample_rate = config, sample_rate
        for size, bands in zip(config.fft_sizes, config.mel_band_counts, strict=True):
            self.register_buffer(f"window{size}", torch.hann_window(size), persistent=False)
            self.register_buffer(f"mel{size}", mel_matrix(sample_rate, size, bands), persistent=False)

        self.register_buffer("picture_window", torch.hann_window(SSIM_FFT_SIZE), persistent=False)
        self.register_buffer("picture_mel", mel_matrix(sample_rate, SSIM_FFT_SIZE, SSIM_BANDS), persistent=False)

    def _picture(self, audio: Tensor) -> Tensor:
        """audio [batch, samples] -> its mel spectrogram as a picture [batch, bands, frames]."""
        magnitude = stft_magnitude(audio, SSIM_FFT_SIZE, self.get_buffer("picture_window"))
        return picture(mel_magnitude(magnitude, self.get_buffer("picture_mel")))

    def forward(self, predicted: Tensor, target: Tensor, fft_sizes: tuple[int, ...] | None = None) -> LossTerms:
        """audio [batch, samples], both -> one value per item and term; at some of the FFT sizes, or at all."""
        config = self.config
        on_magnitudes = {"spectral_convergence": spectral_convergence, "log_magnitude": log_l1}
        on_bands = {"log_mel": log_l1, "l2": log_l2, "gram": gram_distance}
        values: dict[str, list[Tensor]] = {name: [] for name in (*on_magnitudes, *on_bands)}
        for size in config.fft_sizes if fft_sizes is None else fft_sizes:
            window, mel = self.get_buffer(f"window{size}"), self.get_buffer(f"mel{size}")
            pair = [stft_magnitude(side, size, window) for side in (predicted, target)]
            bands = [mel_magnitude(side, mel) for side in pair]
            for losses, sides in ((on_magnitudes, pair), (on_bands, bands)):
                for name, loss in losses.items():
                    if getattr(config, name):
                        values[name].append(loss(*sides))
        terms = {name: torch.stack(items).mean(dim=0) for name, items in values.items() if items}
        if config.level:
            terms["level"] = level_l1(predicted, target, self.sample_rate)
        if config.ms_ssim:
            terms["ms_ssim"] = 1.0 - ms_ssim(self._picture(predicted), self._picture(target))
        if config.mse:
            terms["mse"] = relative_mse(predicted, target)
        total = torch.stack([getattr(config, name) * value for name, value in terms.items()]).sum(dim=0)
        return LossTerms(total, terms)
