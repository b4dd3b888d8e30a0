"""What to train on and how: one TOML file, checked in full before anything starts.

Every section has defaults; a recipe names its styles and whatever it wants otherwise. Unknown keys and wrong types
are errors that name the file and the field.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import dacite

from realtime.spectral import SpectralSpec
from training.models.composer import ComposerConfig
from training.models.generator import GeneratorConfig
from training.models.streaming_recogniser import StreamingRecogniserConfig
from training.models.traits import TRAITS

LEVEL_SECONDS = 0.05  # over which the level loss takes its mean


class RecipeError(ValueError):
    """A recipe that cannot be used; the text names the file, the field and the remedy."""


def _at_least(owner: object, section: str, minimum: float, *names: str) -> None:
    for name in names:
        if not getattr(owner, name) >= minimum:
            raise ValueError(f"{section}{name}: must be at least {minimum:g}, got {getattr(owner, name):g}")


def _at_most(owner: object, section: str, maximum: float, *names: str) -> None:
    for name in names:
        if not getattr(owner, name) <= maximum:
            raise ValueError(f"{section}{name}: must be at most {maximum:.10g}, got {getattr(owner, name):.10g}")


def _ranges(owner: object, section: str, *names: str) -> None:
    for name in names:
        low, high = getattr(owner, name)
        if not low <= high:
            raise ValueError(f"{section}{name}: the first value must not be above the second, got [{low:g}, {high:g}]")


def _chances(owner: object, section: str, *names: str) -> None:
    for name in names:
        if not 0.0 <= getattr(owner, name) <= 1.0:
            raise ValueError(f"{section}{name}: must lie between 0 and 1, got {getattr(owner, name):g}")


@dataclass(frozen=True)
class StyleEntry:
    """One style: a folder of recordings, and what its model card and a MIDI controller need to know of it."""

    id: str
    label: str
    folder: str
    midi_program: int
    licence: str
    attribution: str
    judged_only: bool = False  # nothing is to become it; judges tell it from the others, and no model file has it
    oscillator: bool = False  # a tone of the input's pitch stands in its place: for what sounds one note at a time
    slow_attack: bool = False  # its gains rise within ``model.attack_ms``: for what is bowed or blown
    slow_release: bool = False  # they fall within ``model.release_ms``: for what rings on
    cross_weight: float = 1.0  # how often rows are to become it, against the other styles: more for one that is hard

    def __post_init__(self) -> None:
        if not self.cross_weight > 0.0:
            raise ValueError(f"style.cross_weight: must be above 0, got {self.cross_weight} in style '{self.id}'")
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", self.id):
            raise ValueError(f"style.id: '{self.id}' is not snake_case; use small letters, digits and single _")
        if not 0 <= self.midi_program <= 127:
            raise ValueError(f"style.midi_program: must lie between 0 and 127, got {self.midi_program}")
        for name in ("label", "folder", "licence"):
            if not getattr(self, name).strip():
                raise ValueError(f"style.{name}: is empty in style '{self.id}'; fill it in")


@dataclass(frozen=True)
class DataConfig:
    """How excerpts are cut from recordings."""

    segment_seconds: float = 1.25
    segments_in_a_row: int = 1  # of one excerpt, a step each: what the model remembers is carried from one to the next
    split_seed: int = 0
    minimum_seconds: float = 0.2  # shorter recordings are skipped
    audible_dbfs: float = -50.0  # an excerpt below this root-mean-square level counts as silent
    note_seconds: float = 8.0  # recordings up to this length often start from their own onset
    piece_seconds: tuple[float, float] = (0.3, 1.5)  # a segment is filled with pieces of such lengths
    gap_chance: float = 0.3  # between two pieces: a gap, otherwise a crossfade
    gap_seconds: tuple[float, float] = (0.0, 0.15)
    fade_seconds: float = 0.008
    workers: int = 1

    def __post_init__(self) -> None:
        _at_least(self, "data.", 0.1, "segment_seconds")
        _at_least(self, "data.", 0.02, "minimum_seconds")
        _at_least(self, "data.", 1, "segments_in_a_row")
        _at_least(self, "data.", 0, "workers", "note_seconds")
        _at_least(self, "data.", 0.001, "fade_seconds")
        _ranges(self, "data.", "piece_seconds", "gap_seconds")
        _chances(self, "data.", "gap_chance")
        if self.piece_seconds[0] < 4 * self.fade_seconds:
            raise ValueError("data.piece_seconds: the shortest piece must be at least four times fade_seconds")
        if self.gap_seconds[0] < 0:
            raise ValueError(f"data.gap_seconds: must not be below zero, got {self.gap_seconds[0]:g}")


@dataclass(frozen=True)
class AugmentConfig:
    """How a style is hidden; see training/augment.py for what each step does."""

    pitch_semitones: float = 4.0  # pitch and speed of input and target together, up to this much up or down
    octave_gain_db: float = 18.0
    bump_gain_db: float = 9.0
    bump_count: int = 3
    lowpass_chance: float = 0.6
    lowpass_hz: tuple[float, float] = (800.0, 12_000.0)
    lowpass_order: tuple[float, float] = (1.0, 6.0)  # times 6 dB per octave
    comb_chance: float = 0.3
    comb_depth: float = 0.7
    comb_seconds: tuple[float, float] = (0.0001, 0.003)
    flatten_chance: float = 0.5
    flatten_exponent: float = 0.6
    saturate_chance: float = 0.4
    saturate_drive_db: tuple[float, float] = (0.0, 24.0)
    noise_snr_db: tuple[float, float] = (30.0, 70.0)
    level_dbfs: tuple[float, float] = (-42.0, -12.0)  # root mean square of input and target alike
    identity_chance: float = 0.1
    silence_chance: float = 0.05
    glide_semitones: float = 0.0  # glides, up to so much each way, in rows that are to become another style
    attack_db: float = 0.0  # a recogniser learns from what is so much off at most, where that misleads it most

    def __post_init__(self) -> None:
        at = "augment."
        names = ("pitch_semitones", "octave_gain_db", "bump_gain_db", "bump_count", "flatten_exponent")
        _at_least(self, at, 0, *names, "attack_db", "glide_semitones")
        _at_most(self, at, 6, "glide_semitones")  # time must not run backwards
        _ranges(self, at, "lowpass_hz", "lowpass_order", "comb_seconds", "saturate_drive_db", "noise_snr_db")
        _ranges(self, at, "level_dbfs")
        _chances(self, at, "lowpass_chance", "comb_chance", "comb_depth", "flatten_chance", "saturate_chance")
        _chances(self, at, "identity_chance", "silence_chance")
        _at_most(self, at, 0.95, "comb_depth")
        _at_most(self, at, 24, "pitch_semitones")  # excerpts are as much longer as the pitch may rise
        for name in ("lowpass_order", "comb_seconds"):
            if getattr(self, name)[0] < 0:
                raise ValueError(f"augment.{name}: must not be below zero, got {getattr(self, name)[0]:g}")
        if self.lowpass_hz[0] <= 0:
            raise ValueError(f"augment.lowpass_hz: must be above zero, got {self.lowpass_hz[0]:g}")


@dataclass(frozen=True)
class PhrasesConfig:
    """Tunes played on the styles' own notes, and true pairs of them; see training/phrases.py. Zero minutes: none."""

    minutes_per_style: float = 0.0  # rendered before training starts, about
    midi_folder: str = "midi"  # of tunes, below the folder of recordings
    phrase_seconds: float = 20.0
    partners: int = 3  # other styles that play each phrase too
    pair_share: float = 0.4  # of training rows: one style's playing in, another's playing of the same out
    phrase_share: float = 0.2  # of training rows: a phrase, its style hidden; what is left are recordings
    equaliser_db: float = 6.0  # what the input of a pair meets on its way: up to this much per octave, ...
    room_chance: float = 0.4  # ... a room, besides augment's noise
    tuning_semitones: float = 0.5  # input and target of a pair together, up to this much up or down
    licence: str = ""  # of the tunes
    attribution: str = ""

    def __post_init__(self) -> None:
        at = "phrases."
        _at_least(self, at, 0, "minutes_per_style", "equaliser_db", "tuning_semitones")
        _at_most(self, at, 600, "minutes_per_style")
        _at_least(self, at, 1, "phrase_seconds", "partners")
        _at_most(self, at, 600, "phrase_seconds")
        _chances(self, at, "pair_share", "phrase_share", "room_chance")
        if self.pair_share + self.phrase_share > 1.0:
            raise ValueError(
                "phrases.pair_share, phrases.phrase_share: must not add up to more than 1, "
                f"got {self.pair_share + self.phrase_share:g}"
            )
        if not self.midi_folder.strip():
            raise ValueError("phrases.midi_folder: is empty; name the folder of MIDI files")


@dataclass(frozen=True)
class TunesConfig:
    """How a composer reads folders of MIDI files; see training/tunes.py. Other objectives leave it unused."""

    segment_events: int = 128  # of a tune in one training step; the state goes on to the next
    transpose_semitones: int = 6  # up to so many up or down, anew each time a tune is read
    touch_chance: float = 0.25  # of a tune played louder or softer, unevenly and with shorter notes
    melody_only: bool = False  # the top line alone
    minimum_notes: int = 16  # tunes with fewer are skipped
    shared_turns: float = 0.25  # of the shorter one's melodic turns: two tunes that share so many are one

    def __post_init__(self) -> None:
        at = "tunes."
        _at_least(self, at, 4, "segment_events")
        _at_least(self, at, 0, "transpose_semitones")
        _at_most(self, at, 24, "transpose_semitones")
        _at_least(self, at, 2, "minimum_notes")
        _chances(self, at, "touch_chance", "shared_turns")
        if not self.shared_turns > 0:
            raise ValueError("tunes.shared_turns: must be above zero, or all tunes are one")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the sum; a weight of zero leaves the term out. Definitions: training/losses.py."""

    fft_sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    mel_band_counts: tuple[int, ...] = (16, 32, 64, 80, 128)  # one for each FFT size
    fft_sizes_per_step: int = 0  # so many of them, drawn anew each time: cheaper, right in the mean; zero: all
    spectral_convergence: float = 0.5
    log_magnitude: float = 0.5
    log_mel: float = 1.0
    l2: float = 0.0  # of the logs of mel bands
    gram: float = 0.0  # of which mel bands sound together
    ms_ssim: float = 0.0  # of the mel spectrogram as a picture
    level: float = 0.2
    mse: float = 0.0  # of the samples themselves
    pitch: float = 0.0  # of the input's pitch, kept in every row
    onsets: float = 0.0  # of what begins in the input beginning in the output, in every row
    strokes: float = 0.0  # of nothing beginning in the output that does not in the input, in every row
    steadiness: float = 0.0  # of the generator's gains while a tone stands still: what moves there, buzzes

    def __post_init__(self) -> None:
        if not self.fft_sizes or any(n < 16 or n & (n - 1) for n in self.fft_sizes):
            raise ValueError(f"loss.fft_sizes: must be powers of two of at least 16, got {list(self.fft_sizes)}")
        if len(self.mel_band_counts) != len(self.fft_sizes):
            raise ValueError(
                f"loss.mel_band_counts: needs one value for each of the {len(self.fft_sizes)} fft_sizes, "
                f"got {len(self.mel_band_counts)}"
            )
        if any(count < 1 for count in self.mel_band_counts):
            raise ValueError(f"loss.mel_band_counts: must be at least 1 each, got {list(self.mel_band_counts)}")
        if not 0 <= self.fft_sizes_per_step <= len(self.fft_sizes):
            raise ValueError(
                f"loss.fft_sizes_per_step: must lie between 0 and {len(self.fft_sizes)}, got {self.fft_sizes_per_step}"
            )
        weights = ("spectral_convergence", "log_magnitude", "log_mel", "l2", "gram", "ms_ssim", "level", "mse")
        _at_least(self, "loss.", 0, *weights, "pitch", "onsets", "strokes", "steadiness")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"loss.{', loss.'.join(weights)}: all are zero; give one of them a weight")


ADVERSARIAL_LOSSES = ("hinge", "least_squares", "bce")  # definitions: training/models/critic.py


@dataclass(frozen=True)
class AdversaryConfig:
    """Judges that know the styles; see training/models/critic.py and classifier.py. Weight zero: none."""

    weight: float = 0.0  # of deceiving the critic
    loss: str = "hinge"  # of critic and generator about it: hinge, least_squares or bce
    feature_weight: float = 0.0  # of sounding to the critic's layers as the target does
    style_weight: float = 0.0  # of being taken for the style meant by those who know styles; zero: none of them
    style_exponent: float = 0.0  # of its generalised cross entropy: 0 urges on what is farthest off, 1 what is in doubt
    likeness_weight: float = 0.0  # of being spread, in their scores, as the style's recordings are
    cross_share: float = 0.4  # of rows that are to become another style; only judges and their level judge them
    blend_share: float = 0.0  # of those, to become a blend of styles; only level and playing judge them
    switching: bool = False  # of segments in a row each becomes a style of its own, as on stage
    start_step: int = 0  # up to here the generator learns alone
    head_start_steps: int = 0  # from there on the critic learns alone, while the generator stands still
    pretraining_phrases: int = 0  # of each style, from which classifiers and listeners learn before the run
    classifiers: int = 1  # that learned apart and take turns in judging; zero: only recognisers and listeners
    attacked_classifiers: int = 0  # of them, that learned from sounds made misleading
    attack_db: float = 1.0  # by so much at most at each place of what they heard
    recognisers: tuple[str, ...] = ()  # checkpoints of runs of recognise.toml with these styles, which judge them too
    listeners: int = 0  # that learned from phrases, each by another ear, and judge them too; see models/listener.py
    speed_semitones: float = 0.0  # up to so much faster or slower than it was made do those hear a sound
    witness: bool = True  # with pretraining, a recogniser learns too, which never teaches and chooses best.ckpt
    learning_rate: float = 5e-4  # of critic and classifier

    def __post_init__(self) -> None:
        at = "adversary."
        if self.loss not in ADVERSARIAL_LOSSES:
            raise ValueError(f"adversary.loss: must be one of {', '.join(ADVERSARIAL_LOSSES)}, got '{self.loss}'")
        _at_least(self, at, 0, "weight", "feature_weight", "style_weight", "likeness_weight", "start_step")
        _at_least(self, at, 0, "head_start_steps", "pretraining_phrases", "attacked_classifiers", "attack_db")
        _at_least(self, at, 0, "speed_semitones")
        _at_most(self, at, 24, "speed_semitones")
        _at_least(self, at, 0, "classifiers", "listeners")
        _chances(self, at, "cross_share", "blend_share", "style_exponent")
        if self.learning_rate <= 0:
            raise ValueError(f"adversary.learning_rate: must be above zero, got {self.learning_rate:g}")
        for name in ("feature_weight", "style_weight"):
            if not self.weight and getattr(self, name):
                raise ValueError(f"adversary.{name}: needs adversary.weight above zero")
        if self.pretraining_phrases and not self.style_weight:
            raise ValueError("adversary.pretraining_phrases: needs adversary.style_weight above zero")
        if self.attacked_classifiers and not self.pretraining_phrases:
            raise ValueError("adversary.attacked_classifiers: needs adversary.pretraining_phrases above zero")
        if self.attacked_classifiers > self.classifiers:
            raise ValueError(
                f"adversary.attacked_classifiers: must be at most adversary.classifiers, {self.classifiers}, "
                f"got {self.attacked_classifiers}"
            )
        if self.style_exponent and not self.style_weight:
            raise ValueError("adversary.style_exponent: needs adversary.style_weight above zero")
        if self.recognisers and not self.style_weight:
            raise ValueError("adversary.recognisers: need adversary.style_weight above zero")
        if self.style_weight and not self.classifiers and not self.recognisers and not self.listeners:
            raise ValueError(
                "adversary.classifiers: none, and no adversary.recognisers or listeners; one of them has to know styles"
            )
        if self.pretraining_phrases and not self.classifiers and not self.listeners:
            raise ValueError("adversary.pretraining_phrases: needs adversary.classifiers or listeners above zero")
        if self.listeners and not self.pretraining_phrases:
            raise ValueError("adversary.listeners: need adversary.pretraining_phrases above zero, to learn from")
        if self.likeness_weight and not self.pretraining_phrases and (self.classifiers or not self.recognisers):
            raise ValueError(
                "adversary.likeness_weight: needs adversary.pretraining_phrases above zero; a classifier that still "
                "learns cannot be compared with what it said before"
            )

    @property
    def classifies(self) -> bool:
        """Whether classifiers of styles take part."""
        return bool(self.style_weight and self.classifiers)


@dataclass(frozen=True)
class CycleConfig:
    """There and back again, of the objective ``cycle``; see training/objectives/cycle.py."""

    weight: float = 2.0  # of being itself again after another style
    identity_weight: float = 1.0  # of staying itself in its own style
    pool_size: int = 50  # past fakes that the critic is shown again
    noise_dims: int = 0  # numbers at the end of a style vector that are noise

    def __post_init__(self) -> None:
        _at_least(self, "cycle.", 0, "weight", "identity_weight", "pool_size", "noise_dims")


@dataclass(frozen=True)
class GenerateConfig:
    """Besides the judges, of the objective ``generate``; see training/objectives/generate.py."""

    statistics_weight: float = 1.0  # of sounding in the mean as recordings of the style do
    notes_weight: float = 0.3  # of the notes being as likely as in recordings
    level_weight: float = 0.5
    rest_chance: float = 0.3  # of an excerpt with a rest in it

    def __post_init__(self) -> None:
        _at_least(self, "generate.", 0, "statistics_weight", "notes_weight", "level_weight")
        _chances(self, "generate.", "rest_chance")


@dataclass(frozen=True)
class EncoderConfig:
    """The style encoder, trained beside the table of styles; see training/models/encoder.py. Share zero: none."""

    share: float = 0.0  # of rows whose style vector is heard from the recording, not looked up
    anchor_weight: float = 0.1  # of what is heard lying near what is looked up
    crossed_share: float = 0.0  # of rows to become another style: as far as it is another row's, heard from there

    def __post_init__(self) -> None:
        _chances(self, "encoder.", "share", "crossed_share")
        _at_least(self, "encoder.", 0, "anchor_weight")


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW; the rate rises over warm-up, then falls along half a cosine to its final fraction at the last step."""

    learning_rate: float = 1e-3
    final_fraction: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _at_least(self, "optimiser.", 0, "warmup_steps", "weight_decay", "clip_norm")
        _chances(self, "optimiser.", "final_fraction")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimiser.betas: must both lie between 0 and 1, 1 not included; got {list(self.betas)}")
        if self.learning_rate <= 0:
            raise ValueError(f"optimiser.learning_rate: must be above zero, got {self.learning_rate:g}")


@dataclass(frozen=True)
class TrainerConfig:
    """Length of the run and what happens how often. Batch size is per process."""

    steps: int = 4000
    batch_size: int = 8
    seed: int = 0
    average_decay: float = 0.998  # moving average of the weights, used for validation and export; 0 turns it off
    validation_every_steps: int = 250
    validation_segments: int = 4  # per style
    checkpoint_every_steps: int = 100
    log_every_steps: int = 10
    media_count: int = 4  # styles whose pictures and sounds go to TensorBoard at each validation

    def __post_init__(self) -> None:
        at = "trainer."
        _at_least(self, at, 1, "steps", "batch_size", "validation_every_steps", "validation_segments")
        _at_least(self, at, 1, "checkpoint_every_steps", "log_every_steps")
        _at_least(self, at, 0, "media_count", "seed")
        _at_most(self, at, 2**32 - 1, "seed")
        if not 0 <= self.average_decay < 1:
            raise ValueError(
                f"trainer.average_decay: must lie between 0 and 1, 1 not included; got {self.average_decay:g}"
            )


@dataclass(frozen=True)
class Recipe:
    """A whole training run. ``style`` is the list of ``[[style]]`` tables, in the order of the style table."""

    style: tuple[StyleEntry, ...]
    name: str = "untitled"
    objective: str = "restore"
    spectral: SpectralSpec = field(default_factory=SpectralSpec)
    model: GeneratorConfig = field(default_factory=GeneratorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    phrases: PhrasesConfig = field(default_factory=PhrasesConfig)
    composer: ComposerConfig = field(default_factory=ComposerConfig)
    tunes: TunesConfig = field(default_factory=TunesConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    cycle: CycleConfig = field(default_factory=CycleConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    recogniser: StreamingRecogniserConfig = field(default_factory=StreamingRecogniserConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        from training.objectives import OBJECTIVES

        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"name: '{self.name}' cannot name a folder; use letters, digits, '-', '_' and '.'")
        if not self.style:
            raise ValueError("style: the recipe names no style; add a [[style]] table")
        ids = [style.id for style in self.style]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"style.id: '{', '.join(twice)}' is named twice; ids must differ")
        if self.adversary.weight and len(self.performed) < 2:
            raise ValueError("adversary.weight: a critic of styles needs two of them; add a [[style]] or leave it out")
        if not self.performed:
            raise ValueError("style.judged_only: is set in every [[style]]; leave it out of those to be played")
        crosses = bool(self.adversary.weight) and self.objective == "restore"
        if len(self.performed) < len(self.style) and not crosses:
            raise ValueError("style.judged_only: is for judges; needs adversary.weight, and objective = 'restore'")
        if any(style.cross_weight != 1.0 for style in self.style) and not crosses:
            raise ValueError(
                "style.cross_weight: is for rows that become another style; needs adversary.weight, and "
                "objective = 'restore'"
            )
        if self.traits and not (self.objective == "restore" and self.model.answer == "gains"):
            raise ValueError(f"style.{min(self.traits)}: needs objective = 'restore' and model.answer = 'gains'")
        if self.adversary.switching and not (crosses and self.data.segments_in_a_row > 1):
            raise ValueError(
                "adversary.switching: needs adversary.weight, objective = 'restore', data.segments_in_a_row above 1"
            )
        if self.loss.steadiness and self.model.answer == "spectrum":
            raise ValueError("loss.steadiness: holds gains still, and model.answer = 'spectrum' has none; set it to 0")
        if self.objective == "cycle":
            self._check_cycle()
        if self.objective == "generate":
            self._check_generate()
        overlapping = self.spectral.stream_delay_samples > 0
        if overlapping != (self.model.answer == "spectrum"):
            wanted = self.spectral.hop_samples * (1 if overlapping else 2)
            raise ValueError(
                f"spectral.synthesis_window_samples: must be {wanted} for model.answer = '{self.model.answer}', "
                f"got {self.spectral.synthesis_window_samples}"
            )
        if self.phrases.tuning_semitones > self.augment.pitch_semitones:
            raise ValueError(
                "phrases.tuning_semitones: must be at most augment.pitch_semitones "
                f"({self.augment.pitch_semitones:g}), got {self.phrases.tuning_semitones:g}"
            )
        excerpt_seconds = self.data.segments_in_a_row * self.data.segment_seconds
        if self.phrases.minutes_per_style and self.phrases.phrase_seconds < 4 * excerpt_seconds:
            raise ValueError(
                f"phrases.phrase_seconds: must be at least four times the {excerpt_seconds:g} s of "
                "data.segments_in_a_row times data.segment_seconds"
            )
        answer = self.segment_samples - self.spectral.stream_delay_samples
        if answer < LEVEL_SECONDS * self.spectral.sample_rate:
            raise ValueError(
                f"data.segment_seconds: {self.data.segment_seconds:g} s leave {max(0, answer)} samples after the "
                f"model's delay; the level loss needs {LEVEL_SECONDS:g} s: make segments longer"
            )
        shortest_s = 48 * 256 / self.spectral.sample_rate  # three scales of a picture under a window of eleven places
        if self.loss.ms_ssim and self.data.segment_seconds < shortest_s:
            raise ValueError(
                f"loss.ms_ssim: needs data.segment_seconds of at least {shortest_s:g}, "
                f"got {self.data.segment_seconds:g}"
            )
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: unknown '{self.objective}'{_near(self.objective, list(OBJECTIVES))}")
        if self.objective == "recognise":
            self.recogniser.check_spec(self.spectral)
            if self.phrases.minutes_per_style and self.phrases.pair_share:
                raise ValueError("phrases.pair_share: the objective 'recognise' hears phrases, not pairs; set it to 0")
            if len(self.style) < 2:
                raise ValueError("style: a recogniser needs two of them to tell apart; add a [[style]]")

    def _check_cycle(self) -> None:
        """ValueError for what the objective ``cycle`` cannot do without, or does not have."""
        if not self.adversary.weight:
            raise ValueError("adversary.weight: the objective 'cycle' needs a critic; set it above zero")
        if self.encoder.share or self.phrases.minutes_per_style or self.data.segments_in_a_row > 1:
            raise ValueError(
                "encoder.share, phrases.minutes_per_style, data.segments_in_a_row: the objective 'cycle' has no "
                "encoder, phrases or segments in a row; leave them out"
            )
        if self.cycle.noise_dims >= self.model.style_dim:
            raise ValueError(
                f"cycle.noise_dims: must be below model.style_dim ({self.model.style_dim}), got {self.cycle.noise_dims}"
            )

    def _check_generate(self) -> None:
        """ValueError for what the objective ``generate`` cannot do without, or does not have."""
        if not self.adversary.weight:
            raise ValueError("adversary.weight: the objective 'generate' needs a critic; set it above zero")
        if (self.model.body, self.model.answer) != ("lstm", "gains"):
            raise ValueError(
                "model.body, model.answer: the objective 'generate' plays by an LSTM and gains: set 'lstm', 'gains'"
            )
        if self.encoder.share or self.phrases.minutes_per_style or self.loss.steadiness:
            raise ValueError(
                "encoder.share, phrases.minutes_per_style, loss.steadiness: the objective 'generate' hears no input "
                "that they could tell something of; leave them out"
            )

    @property
    def performed(self) -> list[int]:
        """Rows of ``style`` that a model of this recipe plays: all but those for the judges alone."""
        return [row for row, style in enumerate(self.style) if not style.judged_only]

    @property
    def traits(self) -> dict[str, list[bool]]:
        """Which rows of ``style`` have a trait, for each trait that any of them has."""
        rows = {name: [bool(getattr(style, name)) for style in self.style] for name in TRAITS}
        return {name: wanted for name, wanted in rows.items() if any(wanted)}

    @property
    def composes(self) -> bool:
        """Whether the run learns notes from MIDI files, and not sound from recordings."""
        return self.objective == "compose"

    @property
    def noise_dims(self) -> int:
        """Numbers at the end of a style vector that are noise: those of ``cycle``, no other objective has any."""
        return self.cycle.noise_dims if self.objective == "cycle" else 0

    @property
    def segment_samples(self) -> int:
        """Length of a training segment in whole hops."""
        hop = self.spectral.hop_samples
        return max(1, round(self.data.segment_seconds * self.spectral.sample_rate / hop)) * hop

    @property
    def excerpt_samples(self) -> int:
        """Length of the segments in a row."""
        return self.data.segments_in_a_row * self.segment_samples

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers; ``recipe_from_dict`` reads it back."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _near(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(item) for item in value)
    return value


def _check_finite(value: Any, source: str, path: str) -> None:
    """RecipeError for nan and inf, which TOML can write, anywhere below."""
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{source}: the field '{path}' must be a finite number, got {value}")
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple) else ()
    for key, item in items:
        _check_finite(item, source, f"{path}.{key}" if path else str(key))


def _check_keys(kind: type, value: Any, source: str, path: str) -> None:
    """RecipeError for a key that no field answers to, anywhere below."""
    if not isinstance(value, Mapping):
        return
    hints = get_type_hints(kind)
    known = [item.name for item in dataclasses.fields(kind)]
    for key, item in value.items():
        dotted = f"{path}{key}"
        if key not in known:
            raise RecipeError(f"{source}: unknown key '{dotted}'{_near(key, known)}")
        inner = hints[key]
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            _check_keys(inner, item, source, f"{dotted}.")
        for argument in get_args(inner):
            if isinstance(argument, type) and dataclasses.is_dataclass(argument) and isinstance(item, tuple):
                for number, entry in enumerate(item):
                    _check_keys(argument, entry, source, f"{dotted}[{number}].")


def _whole(value: Any) -> Any:
    # bool is an int to Python but not in a recipe; a string makes the type check name the field.
    return str(value).lower() if isinstance(value, bool) else value


def _real(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return str(value)  # no float can hold it
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else _whole(value)


def recipe_from_dict(values: Mapping[str, Any], source: str) -> Recipe:
    """A checked recipe from plain values; ``source`` names where they came from in errors. Raises RecipeError."""
    if not isinstance(values, Mapping):
        raise RecipeError(f"{source}: must be a table of fields, got {type(values).__name__}")
    tupled = _tuples(values)
    _check_keys(Recipe, tupled, source, "")
    _check_finite(tupled, source, "")
    if isinstance(tupled.get("style"), Mapping):
        raise RecipeError(f"{source}: the field 'style' must be a list of tables; write [[style]] with two brackets")
    try:
        return dacite.from_dict(Recipe, tupled, dacite.Config(strict=True, type_hooks={int: _whole, float: _real}))
    except dacite.MissingValueError as error:
        raise RecipeError(f"{source}: the field '{error.field_path}' is missing; add it") from error
    except dacite.WrongTypeError as error:
        wanted = getattr(error.field_type, "__name__", None) if not get_args(error.field_type) else None
        raise RecipeError(
            f"{source}: the field '{error.field_path}' must be {wanted or error.field_type}, "
            f"got {error.value!r} ({type(error.value).__name__})"
        ) from error
    except (dacite.DaciteError, ValueError, TypeError) as error:
        raise RecipeError(f"{source}: {error}") from error


def _change(values: dict[str, Any], change: str) -> None:
    """Put ``change``, 'section.field=value' with a TOML value, into the values of a recipe. Raises RecipeError."""
    name, equals, text = change.partition("=")
    *sections, field_name = name.strip().split(".")
    if not equals or not field_name or not all(sections):
        raise RecipeError(f"--set {change}: must be section.field=value, for instance trainer.steps=400")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()  # a word without quotes
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {change}: '{section}' has no fields that could be set so")
        values = inner
    values[field_name] = value


def _read_values(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a recipe file on top of those of the file that its ``base`` names. Raises RecipeError."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        named = f"{above[-1]}: base: " if above else ""
        raise RecipeError(f"{named}{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except ValueError as error:  # TOMLDecodeError, or a number with thousands of digits
        raise RecipeError(f"{path}: is not TOML: {error}") from error
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise RecipeError(f"{path}: the field 'base' must be the name of a recipe file, got {base!r}")
    under = path.parent / base
    if under.resolve() in {file.resolve() for file in (*above, path)}:
        raise RecipeError(f"{path}: base: '{base}' builds on this recipe itself; name another one")
    return _merged(_read_values(under, (*above, path)), values)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are merged, field by field; anything else in ``over`` takes the place of what is in ``under``."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read and check a TOML recipe, with ``changes`` such as 'trainer.steps=400'. Raises RecipeError.

    ``base = "other.toml"`` at its top, a path from its own folder, takes all that it leaves out from there.
    """
    values = _read_values(path)
    for change in changes:
        _change(values, change)
    return recipe_from_dict(values, " ".join([str(path), *(f"--set {change}" for change in changes)]))


def quick_look(recipe: Recipe) -> Recipe:
    """The same system, trained so little that all of it can be tried within two minutes on a CPU: what ``--fast`` does.

    Sizes of the model stay; styles, steps, rows, phrases and what the judges learn beforehand are cut down.
    """
    trainer, adversary = recipe.trainer, recipe.adversary
    alone = bool(adversary.recognisers) and not adversary.classifiers  # recognisers, which three styles do not have
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-fast",
        style=tuple(recipe.style[row] for row in recipe.performed[:3]),
        trainer=dataclasses.replace(
            trainer,
            steps=min(trainer.steps, 16),
            validation_every_steps=min(trainer.validation_every_steps, 8),
            batch_size=min(trainer.batch_size, 4),
            validation_segments=1,
            average_decay=min(trainer.average_decay, 0.8),
        ),
        phrases=dataclasses.replace(recipe.phrases, minutes_per_style=0),
        adversary=dataclasses.replace(
            adversary,
            start_step=min(adversary.start_step, 4),
            head_start_steps=min(adversary.head_start_steps, 2),
            pretraining_phrases=4 if alone else min(adversary.pretraining_phrases, 4),
            classifiers=1,
            recognisers=(),
            listeners=min(adversary.listeners, 1),
            attacked_classifiers=min(adversary.attacked_classifiers, 1),
            witness=False,
        ),
        optimiser=dataclasses.replace(recipe.optimiser, warmup_steps=min(recipe.optimiser.warmup_steps, 4)),
    )
