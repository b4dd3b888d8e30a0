"""Playing by instruments that do not exist: melodies with random partials, attacks, decays, glides, vibrato and breath.

What a model hears in training is made of the styles' own recordings, most of them single notes; on stage it hears
anything. Random variety that is wider than the world's makes the world one more case of it (Tobin et al., "Domain
randomization for transferring deep neural networks from simulation to the real world", 2017). Such playing only ever
comes in: nobody learns from it what a style sounds like.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.augment import add_room, apply_filter, minimum_phase, random_timbre, rms, uniform
from training.recipe import AugmentConfig

CONTROL_HZ = 200  # how often pitch and loudness are drawn, straight lines in between
PARTIALS = 32
LOWEST_NOTE, HIGHEST_NOTE = 36.0, 86.0  # MIDI numbers, around which a melody moves
FORMANTS = 3


def _between(generator: torch.Generator, rows: int, low: float, high: float, columns: int = 1) -> Tensor:
    """[rows, columns] on the generator's device, evenly over the logarithm."""
    return low * (high / low) ** uniform(generator, rows, 0.0, 1.0, columns)


def _some(generator: torch.Generator, rows: int, probability: float) -> Tensor:
    """[rows, 1] of zeros and ones."""
    return (uniform(generator, rows, 0.0, 1.0) < probability).float()


def _smoothed(curve: Tensor, seconds: Tensor) -> Tensor:
    """[rows, frames] settling within ``seconds`` [rows, 1], each row its own."""
    lags = torch.arange(curve.shape[1], device=curve.device) / CONTROL_HZ
    kernel = torch.exp(-lags / seconds)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    padded = torch.cat([curve[:, :1].expand(-1, curve.shape[1] - 1), curve], dim=1)
    return torch.nn.functional.conv1d(padded[None], kernel.flip(1)[:, None], groups=len(curve))[0]


def invent_playing(
    rows: int, samples: int, sample_rate: int, config: AugmentConfig, generator: torch.Generator
) -> Tensor:
    """[rows, samples] on the generator's device, each row by another instrument, at a level that ``config`` allows."""
    device = generator.device
    frames = math.ceil(samples / (sample_rate // CONTROL_HZ)) + 2
    seconds = torch.arange(frames, device=device) / CONTROL_HZ

    begins = uniform(generator, rows, 0.0, 1.0, frames) < _between(generator, rows, 0.7, 8.0) / CONTROL_HZ
    begins[:, 0] = True
    note = begins.long().cumsum(dim=1) - 1
    places = torch.arange(frames, device=device).expand(rows, -1)
    age = (places - torch.where(begins, places, 0).cummax(dim=1).values) / CONTROL_HZ  # seconds

    hertz = _pitch(note, seconds, generator)
    loudness = _loudness(note, age, seconds, generator)
    fine = (frames - 1) * (sample_rate // CONTROL_HZ) + 1

    def up(curve: Tensor) -> Tensor:
        """[rows, frames] -> [rows, samples]."""
        return torch.nn.functional.interpolate(curve[:, None], size=fine, mode="linear", align_corners=True)[
            :, 0, :samples
        ]

    phase = 2.0 * math.pi * (up(hertz).double().cumsum(dim=1) / sample_rate % 1.0).float()

    strength = _strength(hertz, age, sample_rate, generator)  # [rows, partials, frames]
    tone = torch.zeros(rows, samples, device=device)
    first = uniform(generator, rows, 0.0, 2.0 * math.pi, PARTIALS)
    for number in range(PARTIALS):
        tone += up(strength[:, number]) * torch.sin((number + 1) * phase + first[:, number : number + 1])
    tone = tone / rms(tone).clamp_min(1e-8)
    breath = torch.randn(rows, samples, generator=generator, device=device)
    sound = (tone + breath * 10.0 ** (uniform(generator, rows, -60.0, -12.0) / 20.0)) * up(loudness)
    sound = apply_filter(sound, minimum_phase(0.5 * random_timbre(rows, sample_rate, config, generator)))
    sound = add_room(sound, sample_rate, 0.5, generator)
    level = 10.0 ** (uniform(generator, rows, *config.level_dbfs) / 20.0)
    gain = level / rms(sound).clamp_min(1e-8)
    return sound * torch.minimum(gain, 0.99 / sound.abs().amax(dim=1, keepdim=True).clamp_min(1e-8))


def _pitch(note: Tensor, seconds: Tensor, generator: torch.Generator) -> Tensor:
    """Hertz [rows, frames] of melodies whose notes are numbered [rows, frames]."""
    rows, frames = note.shape
    centre = uniform(generator, rows, LOWEST_NOTE, HIGHEST_NOTE)
    steps = 4.0 * torch.randn(rows, frames, generator=generator, device=generator.device)
    pitch = _smoothed((centre + steps.round()).gather(1, note), _between(generator, rows, 0.002, 0.12))
    vibrato = uniform(generator, rows, 0.0, 0.8) * _some(generator, rows, 0.6)
    turns = uniform(generator, rows, 3.5, 7.0) * seconds + uniform(generator, rows, 0.0, 1.0)
    wander = torch.randn(rows, frames, generator=generator, device=generator.device)
    wander = _smoothed(wander, _between(generator, rows, 0.03, 0.3)) * uniform(generator, rows, 0.0, 1.0)
    return 440.0 * 2.0 ** ((pitch + vibrato * torch.sin(2.0 * math.pi * turns) + wander - 69.0) / 12.0)


def _loudness(note: Tensor, age: Tensor, seconds: Tensor, generator: torch.Generator) -> Tensor:
    """Amplitudes [rows, frames]: attack, decay or none, swells, notes of their own loudness, a rest now and then."""
    rows, frames = note.shape
    attack, decay = _between(generator, rows, 0.002, 0.15), _between(generator, rows, 0.1, 3.0)
    plucked = _some(generator, rows, 0.5)
    shape = (1.0 - torch.exp(-(age + 1.0 / CONTROL_HZ) / attack)) * torch.exp(-plucked * age / decay)
    each = uniform(generator, rows, -12.0, 0.0, frames).gather(1, note)
    rest = (uniform(generator, rows, 0.0, 1.0, frames) < 0.08).float().gather(1, note)
    swell = uniform(generator, rows, 0.0, 6.0) * torch.sin(2.0 * math.pi * uniform(generator, rows, 0.1, 6.0) * seconds)
    return shape * 10.0 ** ((each + swell) / 20.0) * (1.0 - 0.99 * rest)


def _strength(hertz: Tensor, age: Tensor, sample_rate: int, generator: torch.Generator) -> Tensor:
    """Amplitudes of partials [rows, partials, frames]: they fall off, more so in an old note, and have formants."""
    rows = len(hertz)
    number = torch.arange(1, PARTIALS + 1, device=hertz.device)[:, None]
    at = hertz[:, None] * number
    octaves = torch.log2(number.float())
    steepness = uniform(generator, rows, 1.0, 15.0) + 10.0 * uniform(generator, rows, 0.0, 1.0) * age.clamp_max(1.5)
    decibels = -steepness[:, None] * octaves
    for _ in range(FORMANTS):
        centre, width = _between(generator, rows, 250.0, 6000.0), uniform(generator, rows, 0.1, 0.6)
        height = uniform(generator, rows, 0.0, 20.0)
        bump = torch.exp(-0.5 * (torch.log2(at / centre[:, None]) / width[:, None]).square())
        decibels = decibels + height[:, None] * bump
    uneven = uniform(generator, rows, -9.0, 3.0, PARTIALS)[:, :, None]
    even = (number % 2 == 0).float() * _some(generator, rows, 0.2)[:, None] * -25.0  # as a stopped pipe has few of
    strength = 10.0 ** ((decibels + uneven + even) / 20.0)
    return strength * (at < 0.45 * sample_rate)
