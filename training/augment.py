"""Hiding a style: from a recording, an input that has lost its timbre, and a target that has kept it.

Everything runs batched on the tensors' own device and draws from one generator, so a seed fixes it. Every filter is
minimum-phase: no part of the input comes before its cause in the target, so a causal model can undo it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.recipe import AugmentConfig, PhrasesConfig

FILTER_FFT_SIZE = 8192  # long enough for the cepstrum of a steep low-pass not to wrap
ENVELOPE_HOP_SAMPLES = 256
RESAMPLE_EDGE_SAMPLES = 256
SEMITONE_STEPS = 4  # pitch ratios lie on a quarter-semitone grid, so that few FFT lengths occur


@dataclass(frozen=True)
class Pair:
    """What the model hears and what it should answer, both [batch, samples], aligned to the sample."""

    input: Tensor
    target: Tensor


def raw_samples(samples: int, config: AugmentConfig) -> int:
    """How many samples a recording must give so that ``samples`` are left after the largest change of pitch."""
    steps = math.ceil(config.pitch_semitones * SEMITONE_STEPS)  # change_pitch may round up to the grid
    steepest = 2.0 ** (steps / SEMITONE_STEPS / 12.0)
    return 32 * math.ceil(samples * steepest / 32) + 4 * RESAMPLE_EDGE_SAMPLES


def _uniform(generator: torch.Generator, batch: int, low: float, high: float, columns: int = 1) -> Tensor:
    """[batch, columns] on the generator's device."""
    return low + (high - low) * torch.rand(batch, columns, generator=generator, device=generator.device)


def _chance(generator: torch.Generator, batch: int, probability: float) -> Tensor:
    """[batch, 1] of true and false."""
    return _uniform(generator, batch, 0.0, 1.0) < probability


def rms(audio: Tensor) -> Tensor:
    """Root mean square over time: [batch, samples] -> [batch, 1]."""
    return audio.square().mean(dim=-1, keepdim=True).sqrt()


def change_pitch(audio: Tensor, semitones: Tensor, samples: int) -> Tensor:
    """Pitch and speed together, as a tape does: [batch, raw] -> [batch, samples].

    Band-limited through the FFT: the spectrum is cut or padded to the new length. Rows of one ratio share one
    transform. ``semitones`` [batch] is rounded to the quarter-semitone grid.
    """
    steps = (semitones.flatten() * SEMITONE_STEPS).round().long().tolist()
    raw = audio.shape[-1]
    edge = RESAMPLE_EDGE_SAMPLES
    ramp = torch.linspace(0.0, 1.0, edge, device=audio.device, dtype=audio.dtype)
    faded = audio.clone()
    # The transform is circular: with both ends at zero nothing wraps around.
    faded[:, :edge] *= ramp
    faded[:, -edge:] *= ramp.flip(0)
    out = torch.empty(audio.shape[0], samples, device=audio.device, dtype=audio.dtype)
    for step in sorted(set(steps)):
        rows = [i for i, s in enumerate(steps) if s == step]
        length = 32 * round(raw / 2.0 ** (step / SEMITONE_STEPS / 12.0) / 32)
        spectrum = torch.fft.rfft(faded[rows])
        resampled = torch.fft.irfft(spectrum[:, : length // 2 + 1], n=length) * (length / raw)
        start = (length - samples) // 2
        assert start > 0, "raw_samples gave too few samples"
        out[rows] = resampled[:, start : start + samples]
    return out


def minimum_phase(log_magnitude: Tensor) -> Tensor:
    """Natural log magnitudes [batch, bins] of a real filter -> its minimum-phase spectrum [batch, bins], complex.

    By folding the real cepstrum: Oppenheim and Schafer, Discrete-Time Signal Processing, section 13.
    """
    size = 2 * (log_magnitude.shape[-1] - 1)
    cepstrum = torch.fft.irfft(log_magnitude.to(torch.complex64), n=size)
    fold = torch.zeros(size, device=log_magnitude.device)
    fold[0] = fold[size // 2] = 1.0
    fold[1 : size // 2] = 2.0
    return torch.exp(torch.fft.rfft(cepstrum * fold))


def apply_filter(audio: Tensor, spectrum: Tensor) -> Tensor:
    """Linear convolution of [batch, samples] with the causal filter of spectrum [batch, bins]; the same length."""
    taps = torch.fft.irfft(spectrum)
    size = 1 << (audio.shape[-1] + taps.shape[-1] - 2).bit_length()
    product = torch.fft.rfft(audio, n=size) * torch.fft.rfft(taps, n=size)
    return torch.fft.irfft(product, n=size)[:, : audio.shape[-1]]


def random_timbre(batch: int, sample_rate: int, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Natural log magnitudes [batch, FILTER_FFT_SIZE / 2 + 1] of a random smooth equaliser.

    Gains per octave joined by straight lines over log frequency, a few resonances, a low-pass, a comb.
    """
    device = generator.device
    frequency = torch.arange(FILTER_FFT_SIZE // 2 + 1, device=device) * (sample_rate / FILTER_FFT_SIZE)
    octave = torch.log2(frequency.clamp_min(31.25) / 31.25)  # [bins], 0 at 31.25 Hz
    knots = int(octave.max().ceil()) + 1
    gains = _uniform(generator, batch, -config.octave_gain_db, config.octave_gain_db, knots + 1)
    below = octave.floor().long().clamp_max(knots - 1)
    share = octave - below
    decibels = gains[:, below] * (1 - share) + gains[:, below + 1] * share

    for _ in range(config.bump_count):
        centre = _uniform(generator, batch, 2.5, 8.5)  # 180 Hz to 11 kHz
        width = _uniform(generator, batch, 0.08, 0.5)
        height = _uniform(generator, batch, -config.bump_gain_db, config.bump_gain_db)
        decibels = decibels + height * torch.exp(-0.5 * ((octave - centre) / width).square())

    low, high = config.lowpass_hz
    cutoff = low * (high / low) ** _uniform(generator, batch, 0.0, 1.0)
    order = _uniform(generator, batch, *config.lowpass_order)
    use = _chance(generator, batch, config.lowpass_chance)
    # Butterworth's magnitude, with any real number for its order.
    falling = -10.0 * torch.log10(1.0 + (frequency / cutoff) ** (2.0 * order))
    decibels = decibels + torch.where(use, falling, torch.zeros_like(falling))
    log_magnitude = decibels.clamp(-90.0, 40.0) * (math.log(10.0) / 20.0)

    delay = _uniform(generator, batch, *config.comb_seconds)
    depth = _uniform(generator, batch, 0.0, config.comb_depth)
    use = _chance(generator, batch, config.comb_chance)
    comb = 0.5 * torch.log(1.0 + depth.square() + 2.0 * depth * torch.cos(2.0 * math.pi * frequency * delay))
    return log_magnitude + torch.where(use, comb, torch.zeros_like(comb))


def flatten_envelope(audio: Tensor, exponent: Tensor, smooth_hops: int) -> Tensor:
    """Divide [batch, samples] by its smoothed level to the power of ``exponent`` [batch, 1].

    The level is never taken as lower than 40 dB below its highest, so that pauses stay pauses.
    """
    hop = ENVELOPE_HOP_SAMPLES
    samples = audio.shape[-1]
    padded = torch.nn.functional.pad(audio, (0, -samples % hop))
    energy = padded.unflatten(-1, (-1, hop)).square().mean(dim=-1)[:, None]  # [batch, 1, hops]
    width = 2 * smooth_hops + 1
    energy = torch.nn.functional.avg_pool1d(energy, width, stride=1, padding=smooth_hops, count_include_pad=False)
    level = energy.sqrt()
    level = torch.maximum(level, 0.01 * level.amax(dim=-1, keepdim=True)).clamp_min(1e-8)
    gain = torch.exp(-exponent[:, None] * torch.log(level))
    gain = torch.nn.functional.interpolate(gain, size=padded.shape[-1], mode="linear", align_corners=False)
    return audio * gain[:, 0, :samples]


def saturate(audio: Tensor, drive_db: Tensor) -> Tensor:
    """tanh at ``drive_db`` [batch, 1] above the signal's own root mean square; [batch, samples]."""
    drive = 10.0 ** (drive_db / 20.0) / rms(audio).clamp_min(1e-8)
    return torch.tanh(audio * drive) / drive


def hide_style(audio: Tensor, sample_rate: int, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """[batch, samples] -> the same playing with another timbre, at the same root-mean-square level.

    Order: envelope, saturation, equaliser, noise. All but the noise keep silence silent.
    """
    batch = audio.shape[0]
    zero = torch.zeros(batch, 1, device=audio.device)
    exponent = _uniform(generator, batch, 0.0, config.flatten_exponent)
    exponent = torch.where(_chance(generator, batch, config.flatten_chance), exponent, zero)
    smooth_hops = int(torch.randint(2, 12, (1,), generator=generator, device=generator.device))
    hidden = flatten_envelope(audio, exponent, smooth_hops)

    drive_db = _uniform(generator, batch, *config.saturate_drive_db)
    use = _chance(generator, batch, config.saturate_chance)
    hidden = torch.where(use, saturate(hidden, drive_db), hidden)

    timbre = random_timbre(batch, sample_rate, config, generator)
    hidden = apply_filter(hidden, minimum_phase(timbre))
    hidden = hidden * (rms(audio) / rms(hidden).clamp_min(1e-8))

    snr_db = _uniform(generator, batch, *config.noise_snr_db)
    noise = torch.randn(hidden.shape, generator=generator, device=generator.device)
    return hidden + noise * rms(audio) * 10.0 ** (-snr_db / 20.0)


def make_pair(raw: Tensor, samples: int, sample_rate: int, config: AugmentConfig, generator: torch.Generator) -> Pair:
    """Recordings [batch, raw_samples(samples)] -> input and target [batch, samples].

    A few rows stay unchanged (the style restored is itself), a few fall silent (nothing in, nothing out).
    Input and target share one root-mean-square level, drawn per row, and neither exceeds full scale.
    """
    batch = raw.shape[0]
    spread = config.pitch_semitones
    # Two draws make a triangle: small changes are the rule.
    semitones = _uniform(generator, batch, -0.5, 0.5) + _uniform(generator, batch, -0.5, 0.5)
    target = change_pitch(raw, spread * semitones, samples)
    hidden = hide_style(target, sample_rate, config, generator)
    hidden = torch.where(_chance(generator, batch, config.identity_chance), target, hidden)

    level = 10.0 ** (_uniform(generator, batch, *config.level_dbfs) / 20.0)
    gain = level / rms(target).clamp_min(1e-8)
    peak = torch.maximum(hidden.abs().amax(dim=-1, keepdim=True), target.abs().amax(dim=-1, keepdim=True))
    gain = torch.minimum(gain, 0.99 / peak.clamp_min(1e-8))
    silent = _chance(generator, batch, config.silence_chance)
    gain = torch.where(silent, torch.zeros_like(gain), gain)
    return Pair(hidden * gain, target * gain)


def steady_tones(rows: int, samples: int, sample_rate: int, generator: torch.Generator) -> Tensor:
    """[rows, samples] of tones that stand still: a random pitch, level and share of each of sixteen partials."""
    hertz = 60.0 * 25.0 ** _uniform(generator, rows, 0.0, 1.0)  # up to 1500 Hz
    number = torch.arange(1, 17, device=generator.device)
    steepness = _uniform(generator, rows, 0.5, 8.0)  # from a sawtooth to a sine
    amplitude = number**-steepness * _uniform(generator, rows, 0.1, 1.0, 16)
    amplitude = torch.where(hertz * number < 0.45 * sample_rate, amplitude, torch.zeros_like(amplitude))
    phase = _uniform(generator, rows, 0.0, 2.0 * math.pi, 16)
    seconds = torch.arange(samples, device=generator.device) / sample_rate
    angle = 2.0 * math.pi * (hertz * number)[:, :, None] * seconds + phase[:, :, None]
    tone = (amplitude[:, :, None] * torch.sin(angle)).sum(dim=1)
    return tone / rms(tone) * 10.0 ** (_uniform(generator, rows, -42.0, -12.0) / 20.0)


def at_places(audio: Tensor, place: Tensor) -> Tensor:
    """[batch, samples] at ``place`` [batch, places], in samples, on straight lines between them: [batch, places]."""
    before = place.long().clamp(0, audio.shape[1] - 2)
    share = (place - before).to(audio.dtype)
    return audio.gather(1, before) * (1.0 - share) + audio.gather(1, before + 1) * share


def bend_pitch(audio: Tensor, sample_rate: int, semitones: float, generator: torch.Generator) -> Tensor:
    """[batch, samples] with a glide of up to ``semitones`` each way and vibrato of up to a quarter of that.

    Time is bent, as a tape's that is held back and let go, and is where it was at both ends. Vibrato: 4 to 7 Hz.
    """
    batch, samples = audio.shape
    per_second = torch.tensor([[1.0, 8.0], [4.0, 14.0]], device=generator.device)  # half turns: glide, vibrato
    drawn = torch.rand(batch, 2, generator=generator, device=generator.device)
    turns = (per_second[0] + drawn * (per_second[1] - per_second[0])) * (samples / sample_rate)
    turns = turns.round().clamp_min(1.0)  # whole ones, so that both ends stay in place
    depth = _uniform(generator, batch, -semitones, semitones, 2) * torch.tensor([1.0, 0.25], device=generator.device)
    slower = 1.0 - 2.0 ** (-depth.abs() / 12.0)  # as much faster at most, which is a smaller interval
    shift = depth.sign() * slower * samples / (math.pi * turns)
    turns, shift = turns.to(audio.device), shift.to(audio.device)
    time = torch.linspace(0.0, math.pi, samples, device=audio.device)
    bent = (shift[:, :, None] * torch.sin(turns[:, :, None] * time)).sum(dim=1)
    place = (torch.arange(samples, device=audio.device) + bent).clamp(0.0, samples - 1.0)
    return at_places(audio, place)  # that dulls the highest octave a little, which a microphone does, too


def add_room(audio: Tensor, sample_rate: int, chance: float, generator: torch.Generator) -> Tensor:
    """[batch, samples] in a random room: the direct sound unchanged, then noise that decays exponentially.

    Such noise is the usual model of late reverberation: Moorer, "About this reverberation business", 1979.
    """
    batch = audio.shape[0]
    seconds = torch.arange(round(0.4 * sample_rate), device=audio.device) / sample_rate
    sixty_db_seconds = _uniform(generator, batch, 0.1, 0.6)
    noise = torch.randn(batch, len(seconds), generator=generator, device=audio.device)
    tail = noise * torch.exp(-math.log(1000.0) * seconds / sixty_db_seconds) * (seconds > 0.004)
    share = 10.0 ** (_uniform(generator, batch, -26.0, -8.0) / 20.0)
    share = torch.where(_chance(generator, batch, chance), share, torch.zeros_like(share))
    tail = tail / torch.linalg.vector_norm(tail, dim=-1, keepdim=True).clamp_min(1e-8) * share
    tail[:, 0] = 1.0
    size = 1 << (audio.shape[-1] + tail.shape[-1] - 2).bit_length()
    product = torch.fft.rfft(audio, n=size) * torch.fft.rfft(tail, n=size)
    return torch.fft.irfft(product, n=size)[:, : audio.shape[-1]]


def make_true_pair(
    heard: Tensor,
    wanted: Tensor,
    samples: int,
    sample_rate: int,
    config: AugmentConfig,
    phrases: PhrasesConfig,
    generator: torch.Generator,
) -> Pair:
    """Two renderings of one phrase [batch, raw_samples(samples)] -> input and target [batch, samples].

    Both are retuned alike; only the input meets an equaliser, a room and noise. Both keep their level to each other
    and get one gain, drawn per row, which lets neither exceed full scale. A few rows fall silent.
    """
    batch = heard.shape[0]
    semitones = phrases.tuning_semitones * _uniform(generator, batch, -1.0, 1.0)
    target = change_pitch(wanted, semitones, samples)
    played = change_pitch(heard, semitones, samples)
    light = replace(
        config,
        octave_gain_db=phrases.equaliser_db,
        bump_gain_db=min(config.bump_gain_db, phrases.equaliser_db),
        lowpass_chance=0.3 * config.lowpass_chance,
        comb_chance=0.3 * config.comb_chance,
        flatten_chance=0.0,
        saturate_chance=0.3 * config.saturate_chance,
    )
    played = hide_style(add_room(played, sample_rate, phrases.room_chance, generator), sample_rate, light, generator)

    loudness = torch.maximum(rms(played), rms(target))
    gain = 10.0 ** (_uniform(generator, batch, *config.level_dbfs) / 20.0) / loudness.clamp_min(1e-8)
    peak = torch.maximum(played.abs().amax(dim=-1, keepdim=True), target.abs().amax(dim=-1, keepdim=True))
    gain = torch.minimum(gain, 0.99 / peak.clamp_min(1e-8))
    gain = torch.where(_chance(generator, batch, config.silence_chance), torch.zeros_like(gain), gain)
    return Pair(played * gain, target * gain)
