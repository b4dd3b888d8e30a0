"""Which style is this? A small network that has heard real recordings only, so it can judge what a generator made.

Its classes are folders of recordings. Recordings of single notes are laid into phrases, because what it will be asked
about is playing. Recordings are split before anything is cut from them: it is tested on takes that it never heard.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from scipy.signal import fftconvolve
from torch import Tensor, nn

from training.library import Recording, replace_file
from training.librosa_once import librosa

log = logging.getLogger(__name__)

SAMPLE_RATE = 24_000
EXCERPT_SECONDS = 3.0
EXCERPT_SAMPLES = round(EXCERPT_SECONDS * SAMPLE_RATE)
FFT_SAMPLES = 1024
HOP_SAMPLES = 480
MELS = 64
NOTE_SECONDS = 20.0  # a recording shorter than this may be one note
NOTES_PER_PHRASE = 6  # different ones; tunes repeat theirs
RANGE_DB = 60.0  # what lies further below the loudest place of an excerpt is not seen: noise floors tell sources apart
EMBEDDING = 24  # few enough numbers for a covariance from a few dozen excerpts
SMALLEST_CLASS_RECORDINGS = 4
SMALLEST_CLASS_SECONDS = 10.0
"""A folder with less is no class: there would be nothing left to test on."""


@dataclass(frozen=True)
class RecogniserConfig:
    """How the recogniser is trained; together with the recordings, it decides every weight."""

    seed: int = 0
    excerpts_per_style: int = 480  # laid out anew from recordings; every pass then colours them differently
    passes: int = 14
    batch: int = 32
    learning_rate: float = 3e-3
    semitones: float = 9.0  # tape speed, both ways: where a style has few notes, its pitch must not give it away
    eq_db: float = 6.0
    room_chance: float = 0.35
    held_out_share: float = 0.25
    test_phrases_per_style: int = 24
    test_semitones: float = 2.5

    @property
    def for_tests(self) -> RecogniserConfig:
        """How phrases of held-out recordings are drawn: near the pitch that they have."""
        return replace(self, semitones=self.test_semitones)


@dataclass(frozen=True)
class Accuracy:
    """On one style's held-out recordings: share of excerpts recognised as they are, and laid into phrases."""

    excerpts: float
    phrases: float
    training_recordings: int
    held_out_recordings: int


@dataclass(frozen=True)
class Judgement:
    """What the recogniser makes of excerpts: ``shares`` [excerpts, styles] adding up to one, ``embeddings``
    [excerpts, EMBEDDING]."""

    shares: NDArray[np.float32]
    embeddings: NDArray[np.float32]


class RecogniserNet(nn.Module):
    """Log-mel [batch, 1, MELS, frames] -> embedding [batch, EMBEDDING] and logits [batch, styles]."""

    def __init__(self, styles: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, 16, 2), (16, 32, 2), (32, 64, 2), (64, 96, (2, 1))):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.embed = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * 96 * (MELS // 16), EMBEDDING))
        self.classify = nn.Linear(EMBEDDING, styles)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.body(mel).flatten(1, 2)  # [batch, channels x bands, frames]: pitch and formants stay in their place
        embedding = self.embed(torch.cat([seen.mean(dim=-1), seen.amax(dim=-1)], dim=-1))
        return embedding, self.classify(embedding)


class Recogniser:
    """A trained network with its classes and how often it is right on real recordings."""

    def __init__(self, styles: Sequence[str], net: RecogniserNet, accuracy: Mapping[str, Accuracy]) -> None:
        self.styles, self.net, self.accuracy = tuple(styles), net.eval(), dict(accuracy)

    def judge(self, excerpts: NDArray[np.float32]) -> Judgement:
        """Excerpts [count, EXCERPT_SAMPLES] at SAMPLE_RATE, at any level."""
        mel = normalise(mel_power(torch.from_numpy(excerpts)))
        with torch.inference_mode():
            embedding, logits = self.net(mel)
        return Judgement(torch.softmax(logits, dim=-1).numpy(), embedding.numpy())


def mel_power(audio: Tensor) -> Tensor:
    """[batch, samples] at SAMPLE_RATE -> mel power [batch, MELS, frames]."""
    window = torch.hann_window(FFT_SAMPLES)
    spectrum = torch.stft(audio, FFT_SAMPLES, HOP_SAMPLES, window=window, return_complex=True)
    filters = torch.from_numpy(librosa.filters.mel(sr=SAMPLE_RATE, n_fft=FFT_SAMPLES, n_mels=MELS, fmin=40.0))
    return filters @ spectrum.abs().square()


def normalise(power: Tensor) -> Tensor:
    """Mel power [batch, MELS, frames] -> decibels below the loudest place, 1 down to 0 at RANGE_DB: [batch, 1, ...]."""
    decibels = 10.0 * torch.log10(power.clamp_min(1e-12))
    relative = decibels - decibels.amax(dim=(1, 2), keepdim=True)
    return (1.0 + relative / RANGE_DB).clamp_min(0.0)[:, None]


def split_held_out(
    recordings: Sequence[Recording], share: float, seed: int
) -> tuple[tuple[Recording, ...], tuple[Recording, ...]]:
    """(training, held out) by whole recordings, decided by their content and the seed alone; at least one held out."""
    ordered = sorted(recordings, key=lambda r: hashlib.sha256(f"{seed}:{r.audio_sha256}".encode()).hexdigest())
    held_out = max(1, round(share * len(ordered)))
    return tuple(ordered[held_out:]), tuple(ordered[:held_out])


def is_class(recordings: Sequence[Recording]) -> bool:
    """Whether there is enough to learn from and to test on."""
    seconds = sum(recording.seconds for recording in recordings)
    return len(recordings) >= SMALLEST_CLASS_RECORDINGS and seconds >= SMALLEST_CLASS_SECONDS


def _piece(
    recording: Recording, samples: int, semitones: float, random: np.random.Generator, sample_rate: int
) -> NDArray[np.float32]:
    """Up to ``samples`` at ``sample_rate`` from a loud enough place, at another tape speed; with soft edges."""
    ratio = 2.0 ** (semitones / 12.0)
    wanted = round(samples * ratio * recording.sample_rate / sample_rate)
    audio, start = recording.audio(), 0
    anywhere = 0.4 if recording.seconds < NOTE_SECONDS else 0.9
    # In playing, a note starts from its onset more often than not; the louder of two places in a long take is no pause.
    if recording.samples > wanted and random.uniform() < anywhere:
        places = [int(place) for place in random.integers(0, recording.samples - wanted, 2)]
        start = max(places, key=lambda place: float(np.abs(audio[place : place + wanted]).max()))
    piece = np.asarray(audio[start : start + wanted])
    piece = soxr.resample(piece, ratio * recording.sample_rate, sample_rate, quality="LQ")[:samples]
    edge = min(240, len(piece) // 2)
    ramp = np.linspace(0.0, 1.0, edge, dtype=np.float32)
    if start:
        piece[:edge] *= ramp
    piece[len(piece) - edge :] *= ramp[::-1]
    return piece


def draw_phrase(
    recordings: Sequence[Recording],
    config: RecogniserConfig,
    random: np.random.Generator,
    sample_rate: int = SAMPLE_RATE,
) -> NDArray[np.float32]:
    """[EXCERPT_SECONDS] of one style: one stretch of a recording, or several in a row, ringing on or cut off."""
    excerpt_samples = round(EXCERPT_SECONDS * sample_rate)
    seconds = np.array([recording.seconds for recording in recordings])
    # Half by length, half by number: a long take is worth more than a note, but does not drown the notes.
    weights = 0.5 * seconds / seconds.sum() + 0.5 / len(recordings)
    speed = random.uniform(-config.semitones, config.semitones)

    def draw(samples: int) -> NDArray[np.float32]:
        recording = recordings[int(random.choice(len(recordings), p=weights))]
        piece = _piece(recording, samples, speed, random, sample_rate)
        rms = float(np.sqrt(np.mean(np.square(piece)))) if len(piece) else 0.0
        return piece * np.float32(10.0 ** (random.uniform(-8.0, 0.0) / 20.0) / max(rms, 1e-5))

    out = np.zeros(excerpt_samples, np.float32)
    if random.uniform() < 0.3:
        whole = draw(excerpt_samples)
        out[: len(whole)] = whole
        return out
    pace_s = random.uniform(0.12, 0.9)  # from note to note
    rings, chord = random.uniform() < 0.4, random.uniform() < 0.25
    notes = [draw(excerpt_samples if rings else round(1.2 * pace_s * sample_rate)) for _ in range(NOTES_PER_PHRASE)]
    at = 0
    while at < excerpt_samples - sample_rate // 10:
        for _ in range(int(random.integers(2, 4)) if chord else 1):
            note = notes[int(random.integers(len(notes)))][: excerpt_samples - at]
            out[at : at + len(note)] += note
        at += round(pace_s * random.choice([0.5, 1.0, 1.0, 2.0]) * sample_rate)
    return out


def in_a_room(
    audio: NDArray[np.float32], random: np.random.Generator, sample_rate: int = SAMPLE_RATE
) -> NDArray[np.float32]:
    """With the tail of a random room: decaying noise (Moorer 1979), 6 to 20 dB below the direct sound's energy."""
    seconds = random.uniform(0.1, 0.9)
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    tail = random.standard_normal(len(time)) * 10.0 ** (-3.0 * time / seconds)
    tail *= 10.0 ** (-random.uniform(6.0, 20.0) / 20.0) / np.sqrt(np.sum(np.square(tail)))
    tail[0] = 1.0
    return fftconvolve(audio, tail)[: len(audio)].astype(np.float32)


def _colour(power: Tensor, config: RecogniserConfig, generator: torch.Generator) -> Tensor:
    """Mel power [batch, MELS, frames] through a random smooth equaliser, on a random floor, moved in time."""
    batch, _, frames = power.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    knots = uniform(-config.eq_db, config.eq_db, batch, 1, 7)
    curve = nn.functional.interpolate(knots, size=MELS, mode="linear", align_corners=True)
    cutoff = uniform(0.6, 1.6, batch, 1, 1) * MELS
    beyond = (torch.arange(MELS) - cutoff).clamp_min(0.0)
    power = power * 10.0 ** ((curve - 1.5 * beyond).transpose(1, 2) / 10.0)
    floor_db = uniform(-70.0, -30.0, batch, 1, 1)
    tilt = nn.functional.interpolate(uniform(-10.0, 0.0, batch, 1, 3), size=MELS, mode="linear").transpose(1, 2)
    noise = -torch.log(torch.rand(power.shape, generator=generator).clamp_min(1e-6))  # power of a Gaussian bin
    power = power + power.amax(dim=(1, 2), keepdim=True) * 10.0 ** ((floor_db + tilt) / 10.0) * noise
    shift = int(torch.randint(0, frames, (1,), generator=generator))
    return power.roll(shift, dims=-1)


def train_recogniser(
    recordings: Mapping[str, Sequence[Recording]],
    config: RecogniserConfig = RecogniserConfig(),
    progress: Callable[[int, int], None] | None = None,
) -> Recogniser:
    """Learn to tell the styles of ``recordings`` (id -> its recordings) apart; seeded. ``progress``: (done, in all)."""
    styles = tuple(recordings)
    splits = {style: split_held_out(recordings[style], config.held_out_share, config.seed) for style in styles}
    random = np.random.default_rng(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    count = config.excerpts_per_style * len(styles)
    steps = config.passes * (count // config.batch)
    in_all = count + 2 * steps
    powers, labels = [], []
    for label, style in enumerate(styles):
        for _ in range(config.excerpts_per_style):
            phrase = draw_phrase(splits[style][0], config, random)
            if random.uniform() < config.room_chance:
                phrase = in_a_room(phrase, random)
            # One range for all: the floor below it is drawn anew at every pass.
            powers.append(mel_power(torch.from_numpy(phrase / max(float(np.abs(phrase).max()), 1e-5))[None]))
            labels.append(label)
            if progress and len(labels) % 16 == 0:
                progress(len(labels), in_all)
    pool, target = torch.cat(powers), torch.tensor(labels)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = RecogniserNet(len(styles))
        optimiser = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=steps)
        done = 0
        for _ in range(config.passes):
            order = torch.randperm(count, generator=generator)
            for rows in order[: count // config.batch * config.batch].split(config.batch):
                _, logits = net(normalise(_colour(pool[rows], config, generator)))
                loss = nn.functional.cross_entropy(logits, target[rows], label_smoothing=0.05)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                done += 1
                if progress:
                    progress(count + 2 * done, in_all)
    recogniser = Recogniser(styles, net, {})
    for label, (style, (training, held_out)) in enumerate(splits.items()):
        phrases = np.stack(
            [draw_phrase(held_out, config.for_tests, random) for _ in range(config.test_phrases_per_style)]
        )
        alone, laid = (
            float((recogniser.judge(excerpts).shares.argmax(axis=1) == label).mean())
            for excerpts in (real_excerpts(held_out), phrases)
        )
        recogniser.accuracy[style] = Accuracy(alone, laid, len(training), len(held_out))
    return recogniser


def real_excerpts(recordings: Sequence[Recording], most_per_recording: int = 12) -> NDArray[np.float32]:
    """Excerpts [count, EXCERPT_SAMPLES] of recordings as they are, spread over each, the loud enough ones."""
    found = []
    for recording in recordings:
        audio = soxr.resample(np.asarray(recording.audio()), recording.sample_rate, SAMPLE_RATE, quality="HQ")
        cut = cut_excerpts(audio)
        found.append(cut[loud_enough(cut)][:: max(1, len(cut) // most_per_recording)][:most_per_recording])
    return np.concatenate(found)


def cut_excerpts(audio: NDArray[np.float32]) -> NDArray[np.float32]:
    """[samples] at SAMPLE_RATE -> [count, EXCERPT_SAMPLES], each half an excerpt after the last; a short one padded."""
    if len(audio) < EXCERPT_SAMPLES:
        audio = np.pad(audio, (0, EXCERPT_SAMPLES - len(audio)))
    return np.lib.stride_tricks.sliding_window_view(audio, EXCERPT_SAMPLES)[:: EXCERPT_SAMPLES // 2].copy()


def loud_enough(excerpts: NDArray[np.float32], below_loudest_db: float = 30.0) -> NDArray[np.bool_]:
    """Which of the excerpts [count, samples] are no more than so far below the loudest one."""
    power = np.square(excerpts, dtype=np.float64).mean(axis=1)
    return power >= max(float(power.max()) * 10.0 ** (-below_loudest_db / 10.0), 1e-20)


def cache_key(recordings: Mapping[str, Sequence[Recording]], config: RecogniserConfig) -> str:
    """A name that changes with the recordings' content, the configuration and the code that trains."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    content = {style: sorted(recording.audio_sha256 for recording in group) for style, group in recordings.items()}
    return hashlib.sha256(json.dumps([code, asdict(config), list(content.items())]).encode()).hexdigest()[:24]


def load_or_train(
    recordings: Mapping[str, Sequence[Recording]],
    config: RecogniserConfig,
    cache_folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Recogniser:
    """The recogniser of these recordings from the cache, else trained and put there."""
    path = cache_folder / f"recogniser-{cache_key(recordings, config)}.pt"
    styles = tuple(recordings)
    net = RecogniserNet(len(styles))
    try:
        stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(stored["weights"])
        return Recogniser(styles, net, {style: Accuracy(*stored["accuracy"][style]) for style in styles})
    except Exception as error:  # torch raises many kinds for damaged files; whatever cannot be read is made again
        log.debug("no usable recogniser at %s: %s", path, error)
    recogniser = train_recogniser(recordings, config, progress)
    accuracy = {style: list(asdict(value).values()) for style, value in recogniser.accuracy.items()}
    replace_file(path, lambda file: torch.save({"weights": recogniser.net.state_dict(), "accuracy": accuracy}, file))
    return recogniser
