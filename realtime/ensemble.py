"""Several models in one performance, in series and side by side: together they are one bundle and one stream.

Models side by side hear the same input and are mixed; those that come after take what came before as their input. All
have one hop, so it is waited for once, and only what each adds beyond it counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from realtime.bundle import Bundle, BundleError, Manifest, check_kind, read_bundle
from realtime.controls import Performer, db_to_gain, level_gain_db, select_mix
from realtime.limiter import LOUDEST_RMS, limit
from realtime.spectral import SpectralSpec

if TYPE_CHECKING:
    from realtime.stream import Stream


@dataclass(frozen=True)
class Part:
    """One more model: its file, its style or mix of styles as ``--style`` takes it (None: the file's first), and, of a
    model that plays beside the first one, its share of what is heard (0..1)."""

    model: Path
    style: str | None = None
    share: float = 0.0


@dataclass(frozen=True)
class Parts:
    """What joins the first model: models ``beside`` it, which it leaves the rest of the sum of their shares, and models
    that come ``then``, one after the other. Travels between processes."""

    then: tuple[Part, ...] = ()
    beside: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if any(part.share < 0.0 for part in self.beside) or sum(part.share for part in self.beside) > 1.0 + 1e-9:
            raise ValueError("beside: shares must not be below zero, nor add up to more than one")


NO_MEMBER = "does not turn audio into audio, so it cannot play in an ensemble"
ALONE = Parts()
"""No other model."""


@dataclass(frozen=True)
class EnsembleSpec(SpectralSpec):
    """The first model's geometry with the delay of all: ``beside_delay_samples`` is the longest of those that play at
    once, ``then_delay_samples`` the sum of those that follow."""

    beside_delay_samples: int = 0
    then_delay_samples: int = 0

    @property
    def stream_delay_samples(self) -> int:
        """See SpectralSpec; here delays of models in series add up."""
        return self.beside_delay_samples + self.then_delay_samples


@dataclass(frozen=True)
class Voice:
    """A model whose style does not move: its vector [style_dim], and the amplitude factor that goes with it."""

    bundle: Bundle
    style: NDArray[np.float32]
    gain: float


@dataclass(frozen=True, kw_only=True)
class Ensemble(Bundle):
    """Several checked model files that look like one.

    Path, graph and card are those of ``first``, which is performed. The last number of a style vector here is the
    amplitude factor of that style: models are mixed, and follow each other, at matched loudness.
    """

    first: Bundle
    parts: Parts
    beside: tuple[Voice, ...]
    then: tuple[Voice, ...]

    @property
    def title(self) -> str:
        words = [self.first.title]
        words += [f"with {voice.bundle.title}" for voice in self.beside]
        words += [f"then {voice.bundle.title}" for voice in self.then]
        return " ".join(words)

    @property
    def members(self) -> tuple[Bundle, ...]:
        return (self.first, *(voice.bundle for voice in (*self.beside, *self.then)))

    @property
    def level_in_style(self) -> bool:
        return True

    def journal_entries(self) -> list[dict[str, Any]]:
        """What a show must remember of the models after the first, plain values for JSON."""
        roles = (("with", self.parts.beside, self.beside), ("then", self.parts.then, self.then))
        return [
            {
                "role": role,
                **asdict(part),
                "model": str(part.model.resolve()),
                "sha256": hashlib.sha256(voice.bundle.graph).hexdigest(),
            }
            for role, parts, voices in roles
            for part, voice in zip(parts, voices, strict=True)
        ]


def join(bundle: Bundle, parts: Parts) -> Bundle:
    """The model together with these parts, which are read here; the bundle itself where there are none.

    Raises BundleError for files that cannot be read or do not fit, StyleError for styles that they do not have.
    """
    if parts == ALONE:
        return bundle
    check_kind(bundle, "transfer", NO_MEMBER)
    beside = tuple(_voice(bundle, part) for part in parts.beside)
    then = tuple(_voice(bundle, part) for part in parts.then)
    manifest = bundle.manifest
    spec = EnsembleSpec(
        **asdict(manifest.spectral),
        beside_delay_samples=max(b.manifest.stream_delay_samples for b in (bundle, *(v.bundle for v in beside))),
        then_delay_samples=sum(voice.bundle.manifest.stream_delay_samples for voice in then),
    )
    joined: Manifest = replace(
        manifest,
        spectral=spec,
        latency_samples=spec.latency_samples,
        stream_delay_samples=spec.stream_delay_samples,
        style_dim=manifest.style_dim + 1,
        styles=tuple(
            replace(style, vector=(*style.vector, db_to_gain(level_gain_db(style.loudness_lufs))))
            for style in manifest.styles
        ),
    )
    return Ensemble(
        bundle.path, joined, bundle.graph, bundle.encoder, first=bundle, parts=parts, beside=beside, then=then
    )


def _voice(first: Bundle, part: Part) -> Voice:
    bundle = read_bundle(part.model)
    check_kind(bundle, "transfer", NO_MEMBER)
    for field_name, unit in (("sample_rate", " Hz"), ("hop_samples", " samples")):
        here, there = (getattr(b.manifest.spectral, field_name) for b in (bundle, first))
        if here != there:
            raise BundleError(
                bundle.path,
                f"manifest.spectral.{field_name}",
                f"is {here}{unit}, that of {first.path} is {there}{unit}: they cannot play together",
                f"train and export one of them with the other's {field_name}",
            )
    performer = Performer(bundle.manifest)
    if part.style is not None:
        select_mix(performer, part.style)
    controls = performer.controls()
    return Voice(bundle, controls.style, db_to_gain(controls.level_gain_db))


class _DelayLine:
    """``push`` what is there now [channels, step], get what was there ``delay_samples`` earlier."""

    def __init__(self, channels: int, step_samples: int, delay_samples: int) -> None:
        self._step, self._delay = step_samples, delay_samples
        self._buffer = np.zeros((channels, delay_samples + step_samples), np.float32)

    def push(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        if not self._delay:
            return x
        self._buffer[:, : self._delay] = self._buffer[:, self._step :]
        self._buffer[:, self._delay :] = x
        return self._buffer[:, : self._step]

    def reset(self) -> None:
        self._buffer[:] = 0.0


class EnsembleStream:
    """An ensemble in motion: what ``Stream`` is for one model, with the same attributes. Not for two threads at a time.

    Models that play at once are delayed to the slowest of them, so that their outputs line up to the sample. Between
    two models in series the limiter works as it does at the end.
    """

    def __init__(self, ensemble: Ensemble, channels: int = 1, hops_per_step: int = 1, provider: str = "cpu") -> None:
        """Raises BundleError, ProviderError."""
        from realtime.stream import Stream

        def load(bundle: Bundle) -> Stream:
            return Stream(bundle, channels, hops_per_step, provider)

        self.manifest, self.channels, self.provider = ensemble.manifest, channels, provider
        self.delay_samples = ensemble.manifest.stream_delay_samples
        self._first = load(ensemble.first)
        self._beside = [load(voice.bundle) for voice in ensemble.beside]
        self._then = [load(voice.bundle) for voice in ensemble.then]
        for stream, voice in zip((*self._beside, *self._then), (*ensemble.beside, *ensemble.then), strict=True):
            stream.style[:] = voice.style
        self.step_samples = samples = self._first.step_samples
        self.audio: NDArray[np.float32] = self._first.audio
        """Input of the next step [channels, step_samples]; write here."""
        self.style: NDArray[np.float32] = np.zeros((channels, ensemble.manifest.style_dim), np.float32)
        """Style of the first model in the next step and its amplitude factor [channels, style_dim]; write here."""
        self.audio_out: NDArray[np.float32] = np.zeros((channels, samples), np.float32)
        """Output of the last step [channels, step_samples]."""
        longest = max(stream.delay_samples for stream in (self._first, *self._beside))
        self._lines = [
            _DelayLine(channels, samples, longest - stream.delay_samples) for stream in (self._first, *self._beside)
        ]
        shares = [part.share for part in ensemble.parts.beside]
        self._share = np.float32(max(0.0, 1.0 - sum(shares)))
        self._beside_gains = [
            np.float32(voice.gain * share) for voice, share in zip(ensemble.beside, shares, strict=True)
        ]
        self._then_gains = [np.float32(voice.gain) for voice in ensemble.then]
        self._ramp: NDArray[np.float32] = (np.arange(1, samples + 1, dtype=np.float32) / np.float32(samples))[None]
        self._scratch = np.zeros((channels, samples), np.float32)
        self._level: NDArray[np.float32] | None = None  # [channels, 1] of the last step; none after a reset

    def step(self) -> NDArray[np.float32]:
        """Run ``self.audio`` under ``self.style``; returns ``self.audio_out``, valid until the next step.

        It is all NaN if any model gave numbers that are no sound: the next model might hide them and stay broken.
        """
        out, scratch = self.audio_out, self._scratch
        self._first.style[:] = self.style[:, :-1]
        for stream in self._beside:
            stream.audio[:] = self.audio
        np.multiply(self._first.step(), self._slope(), scratch)
        if not _is_sound(scratch):
            return self._broken()
        out[:] = self._lines[0].push(scratch)
        for stream, gain, line in zip(self._beside, self._beside_gains, self._lines[1:], strict=True):
            np.multiply(stream.step(), gain, scratch)
            if not _is_sound(scratch):
                return self._broken()
            out += line.push(scratch)
        for stream, gain in zip(self._then, self._then_gains, strict=True):
            limit(out)
            stream.audio[:] = out
            np.multiply(stream.step(), gain, out)
            if not _is_sound(out):
                return self._broken()
        return out

    def _slope(self) -> NDArray[np.float32]:
        """The first model's amplitude over this step [channels, 1 or step_samples]: a straight line from the last."""
        level: NDArray[np.float32] = self.style[:, -1:] * self._share
        last, self._level = self._level, level
        if last is None or (last == level).all():
            return level
        slope: NDArray[np.float32] = np.multiply(self._ramp, level - last, dtype=np.float32)
        slope += last
        return slope

    def _broken(self) -> NDArray[np.float32]:
        self.audio_out[:] = np.nan
        return self.audio_out

    def reset(self) -> None:
        """Back to silence: every state of every model, and what was on its way between them."""
        for part in (self._first, *self._beside, *self._then, *self._lines):
            part.reset()
        self._level = None
        self.audio_out[:] = 0.0

    def warm_up(self) -> None:
        """Run silence so that first-call work is done before the first note, then reset. Raises BundleError."""
        for stream in (self._first, *self._beside, *self._then):
            stream.warm_up()
        self.reset()


def _is_sound(x: NDArray[np.float32]) -> bool:
    flat = x.reshape(-1)
    return float(flat.dot(flat)) < LOUDEST_RMS**2 * flat.size  # false for NaN


def make_stream(
    bundle: Bundle, channels: int = 1, hops_per_step: int = 1, provider: str = "cpu"
) -> Stream | EnsembleStream:
    """What plays this bundle, one model or several. Raises BundleError, ProviderError."""
    from realtime.stream import Stream

    if isinstance(bundle, Ensemble):
        return EnsembleStream(bundle, channels, hops_per_step, provider)
    return Stream(bundle, channels, hops_per_step, provider)


def parts_of(entries: Sequence[dict[str, Any]], place: Callable[[dict[str, Any]], Path]) -> Parts:
    """``journal_entries`` back as parts; ``place`` says where the file of an entry is now.

    Raises KeyError, TypeError or ValueError for what is no such entry.
    """
    made: dict[str, list[Part]] = {"with": [], "then": []}
    for entry in entries:
        style = entry["style"]
        made[entry["role"]].append(Part(place(entry), None if style is None else str(style), float(entry["share"])))
    return Parts(tuple(made["then"]), tuple(made["with"]))
