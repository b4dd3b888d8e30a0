"""What a performer can move: parameters, the style mix, and the snapshot that the engine takes once a hop."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from realtime.bundle import Manifest, Parameter, Style, StyleError, blend_vectors

TARGET_LOUDNESS_LUFS = -20.0
MAX_LEVEL_MATCH_DB = 18.0
CONTROL_NUMBERS = 4
"""Of a packed snapshot, before its style vector."""

PARAMETERS: tuple[Parameter, ...] = (
    Parameter("dry_wet", "Dry/wet", 0.0, 1.0, 1.0, "ratio"),
    Parameter("input_gain_db", "Input gain", -24.0, 24.0, 0.0, "dB"),
    Parameter("output_gain_db", "Output gain", -60.0, 12.0, 0.0, "dB"),
    Parameter("morph", "Morph to the second style", 0.0, 1.0, 0.0, "ratio"),
)
"""The engine's parameters, with the ranges that a manifest may narrow or widen."""
SOURCE_PARAMETERS: tuple[Parameter, ...] = (
    Parameter("intensity", "Intensity", 0.0, 1.0, 0.7, "ratio"),
    Parameter("drone", "Sound without a held note", 0.0, 1.0, 0.0, "ratio"),
)
"""What a model of kind ``generate`` has besides; a drone is on from one half upwards."""
SILENT_DB = -200.0
"""A gain in dB that is none at all, as is every lower one."""


def db_to_gain(gain_db: float) -> float:
    """Amplitude factor for a level in dB; exactly zero up to SILENT_DB."""
    return 10.0 ** (gain_db / 20.0) if gain_db > SILENT_DB else 0.0


@dataclass(frozen=True)
class Controls:
    """One immutable snapshot: style vector [style_dim], level match of that mix, and the mix and gain controls."""

    style: NDArray[np.float32]
    level_gain_db: float = 0.0
    dry_wet: float = 1.0
    input_gain_db: float = 0.0
    output_gain_db: float = 0.0

    def with_level_in_style(self) -> Controls:
        """The same with its level match, as an amplitude factor, in the last number of the style vector."""
        style = self.style.copy()
        style[-1] = db_to_gain(self.level_gain_db)
        return replace(self, style=style, level_gain_db=0.0)

    def pack(self) -> NDArray[np.float64]:
        """As numbers for a mailbox, [CONTROL_NUMBERS + style_dim]."""
        head = (self.level_gain_db, self.dry_wet, self.input_gain_db, self.output_gain_db)
        return np.concatenate([head, self.style]).astype(np.float64)

    @classmethod
    def unpack(cls, values: NDArray[np.float64]) -> Controls:
        level, dry_wet, input_gain, output_gain = values[:CONTROL_NUMBERS].tolist()
        return cls(values[CONTROL_NUMBERS:].astype(np.float32), level, dry_wet, input_gain, output_gain)


def level_gain_db(loudness_lufs: float) -> float:
    """Gain that brings a style of this loudness to the common level, within sane bounds."""
    return min(MAX_LEVEL_MATCH_DB, max(-MAX_LEVEL_MATCH_DB, TARGET_LOUDNESS_LUFS - loudness_lufs))


def blend_loss_lu(manifest: Manifest, mix: dict[Style, float]) -> float:
    """How much quieter than its styles in the mean a mix (weights that add up to one) is expected to be.

    Pair by pair, as measured of even blends at export; a pair with a learned style counts as the mean pair. Of 44 mixes
    of two to five styles of the shipped model, 43 were then within 1 LU. Chords of many styles lose less than their
    pairs add up to, whence the last factor.
    """
    losses = manifest.blend_losses_lu
    if len(mix) < 2 or len(losses) < 2:
        return 0.0
    place = {style.id: number for number, style in enumerate(manifest.styles[: len(losses)])}
    usual = sum(map(sum, losses)) / (len(losses) * (len(losses) - 1))
    parts = [(place.get(style.id), weight) for style, weight in mix.items()]
    loss = 0.0
    for number, (one, weight) in enumerate(parts):
        for other, other_weight in parts[:number]:
            pair = usual if one is None or other is None else losses[one][other]
            loss += 4.0 * weight * other_weight * pair
    spread = 1.0 - sum(weight * weight for _, weight in parts)
    return loss * (1.0 - 0.8 * max(0.0, spread - 0.5))


def mix_controls(mix: dict[Style, float], values: dict[str, float], loss_lu: float = 0.0) -> Controls:
    """Controls for a weighted mix of styles, ``loss_lu`` quieter than they are in the mean, and values by id."""
    styles, weights = list(mix), list(mix.values())
    total = sum(weights)
    level = sum(w * level_gain_db(s.loudness_lufs) for s, w in mix.items()) / total
    level = min(MAX_LEVEL_MATCH_DB, level + loss_lu)
    return Controls(
        blend_vectors(styles, weights),
        level,
        values["dry_wet"],
        values["input_gain_db"],
        values["output_gain_db"],
    )


class Performer:
    """The state of a performance: selected style, morph target, held notes, parameters. One thread at a time.

    Held notes blend their styles, weighted by velocity, and take the place of the selected style until they are
    released (the sustain pedal holds them). With no note held, ``morph`` moves from the selected style to the second.

    A model of kind ``generate`` sounds while a note is held, or always with ``drone``; ``intensity`` is how loud.
    """

    def __init__(self, manifest: Manifest) -> None:
        if not manifest.styles:
            raise StyleError(f"model '{manifest.name}' has no styles to perform: it makes {manifest.kind}")
        self.manifest = manifest
        self.parameters = {p.id: p for p in (*PARAMETERS, *manifest.parameters)}
        self.values = {p.id: p.default for p in self.parameters.values()}
        self.selected = manifest.styles[0]
        self.selected_mix: dict[Style, float] | None = None
        """A blend that was chosen in place of one style, until the next selection."""
        self.second = manifest.styles[1 % len(manifest.styles)]
        self.held: dict[int, tuple[Style, int]] = {}
        self._sustained: set[int] = set()
        self._pedal = False
        self._released: dict[Style, float] | None = None
        """The last chord of a source that fell silent: it fades out as it was."""

    @property
    def sounding(self) -> bool:
        """Whether there is anything to hear: a source falls silent when nothing is held."""
        return self.manifest.kind != "generate" or bool(self.held) or self.values["drone"] >= 0.5

    def select(self, style_id: str) -> None:
        """Select a style by id; StyleError if the model does not have it."""
        self.selected = self.manifest.style(style_id)
        self.selected_mix = self._released = None

    def select_second(self, style_id: str) -> None:
        """Choose the style that ``morph`` moves to."""
        self.second = self.manifest.style(style_id)

    def style_of_program(self, program: int) -> Style | None:
        """The style that a MIDI program selects: its own program number, else its place in the file."""
        for style in self.manifest.styles:
            if style.program == program:
                return style
        return self.manifest.styles[program] if program < len(self.manifest.styles) else None

    def hold(self, note: int, style: Style, velocity: int) -> None:
        """A note is held: its style joins the mix with weight ``velocity`` (1..127)."""
        self.held[note] = (style, velocity)
        self._sustained.discard(note)

    def release(self, note: int) -> None:
        if self._pedal and note in self.held:
            self._sustained.add(note)
        else:
            self.held.pop(note, None)

    def pedal(self, down: bool) -> None:
        """The sustain pedal: notes released while it is down stay in the mix until it is up."""
        self._pedal = down
        if not down:
            for note in self._sustained:
                self.held.pop(note, None)
            self._sustained.clear()

    def release_all(self) -> None:
        self.held.clear()
        self._sustained.clear()

    def set(self, parameter_id: str, value: float) -> None:
        """Set a parameter, clipped to its range; NaN is ignored."""
        parameter = self.parameters.get(parameter_id)
        if parameter is None:
            raise ValueError(f"parameter '{parameter_id}' is none of {', '.join(self.parameters)}")
        if not math.isnan(value):
            self.values[parameter_id] = min(parameter.maximum, max(parameter.minimum, value))

    def mix(self) -> dict[Style, float]:
        """The style mix that sounds now; weights add up to one."""
        if self.held:
            held = list(self.held.values())
            total = sum(velocity for _, velocity in held)
            weights: dict[Style, float] = {}
            for style, velocity in held:
                weights[style] = weights.get(style, 0.0) + velocity / total
            self._released = weights
            return weights
        if self._released is not None and not self.sounding:
            return dict(self._released)
        if self.selected_mix is not None:
            return dict(self.selected_mix)
        morph = self.values["morph"]
        if morph <= 0.0 or self.second == self.selected:
            return {self.selected: 1.0}
        if morph >= 1.0:
            return {self.second: 1.0}
        return {self.selected: 1.0 - morph, self.second: morph}

    def controls(self) -> Controls:
        """The snapshot that the engine takes."""
        mix = self.mix()
        controls = mix_controls(mix, self.values, blend_loss_lu(self.manifest, mix))
        if self.manifest.kind != "generate":
            return controls
        level = self.values["intensity"] if self.sounding else 0.0
        return replace(controls, input_gain_db=20.0 * math.log10(level) if level > 0.0 else SILENT_DB)


def parse_mix(manifest: Manifest, text: str) -> dict[Style, float]:
    """``violin`` or ``violin=0.7,choir=0.3`` -> mix; StyleError names what is wrong."""
    mix: dict[Style, float] = {}
    for part in text.split(","):
        name, _, weight_text = part.partition("=")
        try:
            weight = float(weight_text) if weight_text else 1.0
        except ValueError:
            weight = math.nan
        if not (weight > 0.0 and math.isfinite(weight)):
            raise StyleError(f"style mix '{text}': weight '{weight_text}' of '{name}' is not a number above zero")
        mix[manifest.style(name)] = weight
    total = sum(mix.values())
    return {style: weight / total for style, weight in mix.items()}


def select_mix(performer: Performer, text: str) -> None:
    """Select a style, or a blend of several, as ``parse_mix`` reads it; StyleError names what is wrong."""
    mix = parse_mix(performer.manifest, text)
    performer.select(next(iter(mix)).id)
    if len(mix) > 1:
        performer.selected_mix = mix
