"""The plugin: any block in, the same block out, restyled, exactly ``latency_samples`` later."""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from realtime.bundle import Bundle, Parameter
from realtime.controls import PARAMETERS, Controls, db_to_gain, mix_controls
from realtime.limiter import LIMITER_KNEE, LOUDEST_RMS, limit
from realtime.noise import SeededNoise
from realtime.worker import LateError

FADE_HOPS = 8
TIMES_KEPT = 256
START_HOP = -1
"""In a journal: what held before the first hop."""


class RateError(ValueError):
    """A sample rate that the model was not made for."""


class AnyStream(Protocol):
    """What the processor asks of a stream, wherever its graphs run; ``Stream`` says what each means."""

    channels: int
    delay_samples: int
    audio: NDArray[np.float32]
    style: NDArray[np.float32]

    def step(self) -> NDArray[np.float32]: ...

    def reset(self) -> None: ...


@dataclass
class Meters:
    """What the engine counts, written by the thread that calls ``process``; readers only look.

    ``late_hops`` had no answer of the graph in time, ``bad_output_hops`` an unusable one; both became the dry signal.
    ``fault`` is the text of the last exception that the graph raised; energies are sums of squares of the last hop's
    ``samples``.
    """

    hops: int = 0
    input_energy: float = 0.0
    output_energy: float = 0.0
    samples: int = 1
    bad_input_hops: int = 0
    bad_output_hops: int = 0
    late_hops: int = 0
    fault: str = ""

    @property
    def input_rms(self) -> float:
        """Root mean square of what the last hop took in."""
        return math.sqrt(self.input_energy / self.samples)

    @property
    def output_rms(self) -> float:
        """Root mean square of what the last hop gave."""
        return math.sqrt(self.output_energy / self.samples)


@dataclass(frozen=True)
class _Gains:
    """Amplitude factors of one moment: into the model, and of wet and dry; ``whole`` is that of dry on its own."""

    input: float
    wet: float
    dry: float
    whole: float

    @classmethod
    def of(cls, controls: Controls) -> _Gains:
        out = db_to_gain(controls.output_gain_db)
        wet = controls.dry_wet * out * db_to_gain(controls.level_gain_db)
        return cls(db_to_gain(controls.input_gain_db), wet, (1.0 - controls.dry_wet) * out, out)

    def towards(self, goal: _Gains, share: float) -> _Gains:
        return _Gains(
            self.input + (goal.input - self.input) * share,
            self.wet + (goal.wet - self.wet) * share,
            self.dry + (goal.dry - self.dry) * share,
            self.whole + (goal.whole - self.whole) * share,
        )

    def under(self, trust: float) -> _Gains:
        """With the wet signal trusted only so far (0..1), the dry one filling in."""
        if trust == 1.0:
            return self
        return _Gains(self.input, self.wet * trust, self.dry * trust + self.whole * (1.0 - trust), self.whole)


class Processor:
    """``prepare`` once, then ``process`` blocks of any length. No threads, no devices; one caller thread at a time.

    A hop must be full before it is computed (``hop`` samples), and a synthesis window longer than that overlaps the
    next (``synthesis window - hop``); their sum is the constant delay of wet and dry alike, whatever the block length.
    Style and gains fade towards the newest ``controls`` hop by hop. A hop for which the graph raises, or gives
    numbers that are no sound, becomes the dry signal at the same delay, as does one that a remote graph is late
    for; then the model is reset and fades back.

    A model of kind ``generate`` hears seeded noise in place of what comes in, under the input gain, and its dry signal
    is silence.
    """

    parameters: tuple[Parameter, ...] = PARAMETERS

    def __init__(
        self,
        bundle: Bundle,
        provider: str = "cpu",
        hops_per_step: int = 1,
        stream: AnyStream | None = None,
        seed: int = 0,
    ) -> None:
        """``hops_per_step`` above one computes so many hops at once: cheaper for files, and later by as much.

        ``stream``: the graph, ready to run, perhaps elsewhere; without it, ``prepare`` makes one and warms it up.
        ``seed``: of the noise.
        """
        self.bundle, self.provider, self.hops_per_step, self.seed = bundle, provider, hops_per_step, seed
        self.manifest = bundle.manifest
        self.hop_samples = self.manifest.spectral.hop_samples
        self._step_samples = hops_per_step * self.hop_samples
        self._fade_steps = max(1, FADE_HOPS // hops_per_step)
        self.controls = mix_controls({self.manifest.styles[0]: 1.0}, {p.id: p.default for p in PARAMETERS})
        """The snapshot that the next hop takes; assign a new one at any time, from any thread."""
        self.meters = Meters()
        self._given = stream
        self.stream: AnyStream | None = stream
        self.journal: list[tuple[int, str | Controls]] | None = None
        """Where it is a list: for every hop at which controls were taken or a fault occurred, the hop and which."""

    @property
    def latency_samples(self) -> int:
        """Output sample i is made from input sample i - latency_samples (and what came before it)."""
        delay_samples = self.manifest.stream_delay_samples if self._given is None else self._given.delay_samples
        return self._step_samples + delay_samples

    def prepare(self, sample_rate: int, max_block: int, channels: int) -> None:
        """Allocate everything for blocks [channels, up to max_block], warm up and reset. Not for the audio thread.

        Another call loads the graph again only for another number of channels. Raises RateError for a rate that is not
        the model's.
        """
        if sample_rate != self.manifest.spectral.sample_rate:
            raise RateError(
                f"model '{self.manifest.name}' runs at {self.manifest.spectral.sample_rate} Hz, not {sample_rate} Hz; "
                f"set the device to {self.manifest.spectral.sample_rate} Hz"
            )
        if max_block < 1 or channels < 1:
            raise ValueError(f"max_block and channels: must be at least 1, got {max_block} and {channels}")
        self.channels, self.max_block = channels, max_block
        if self._given is None and (self.stream is None or self.stream.channels != channels):
            from realtime.ensemble import make_stream

            self.stream = loaded = make_stream(self.bundle, channels, self.hops_per_step, self.provider)
            loaded.warm_up()
        assert self.stream is not None and self.stream.audio.shape == (channels, self._step_samples)
        hop = self._step_samples
        self._ramp: NDArray[np.float32] = (np.arange(1, hop + 1, dtype=np.float32) / np.float32(hop))[None]
        delay = self.stream.delay_samples
        self._dry = np.zeros((channels, delay + hop), np.float32)
        # Views are made here: after a graph has emptied the caches, each call into numpy costs microseconds.
        self._dry_past, self._dry_shifted = self._dry[:, :delay], self._dry[:, hop:]
        self._dry_newest, self._dry_now = self._dry[:, delay:], self._dry[:, :hop]
        self._dry_swaps = delay == hop  # two halves that take turns, no need to move what is in them
        self._out, self._spare = np.zeros((channels, hop), np.float32), np.zeros((channels, hop), np.float32)
        self._flat_in, self._flat_out, self._flat_spare = (
            buffer.reshape(-1) for buffer in (self.stream.audio, self._out, self._spare)
        )
        self._scratch = np.zeros((channels, hop), np.float32)
        self._loudest_energy = LOUDEST_RMS**2 * channels * hop
        generates = self.manifest.kind == "generate"
        self._noise = SeededNoise(self.seed, channels, self.hop_samples) if generates else None
        self._times = np.zeros((TIMES_KEPT, 2), np.float32)
        self._block_out = np.zeros((channels, max_block), np.float32)
        self._hop_out = self._block_out[:, :hop]
        self._hop_shape = (channels, hop) if max_block >= hop else None
        self.reset()

    def reset(self) -> None:
        """Back to the moment after ``prepare``: silence in the past, the controls in place without a fade."""
        assert self.stream is not None, "prepare comes first"
        self.stream.reset()
        if self._noise is not None:
            self._noise.reset()
        self.stream.audio[:] = 0.0
        self._dry[:] = 0.0
        self._out[:] = 0.0
        self._position = 0
        self._goal = self.controls
        placed = self._placed(self.controls)
        self._gains = self._gains_goal = _Gains.of(placed)
        self._style_goal, self._style = placed.style, placed.style.copy()
        self.stream.style[:] = self._style
        self._fade_left = 0
        self._trust = 1.0
        self._times_taken = 0
        if self.journal is not None:
            self.journal.append((START_HOP, self.controls))
        self.meters = Meters(samples=self._out.size)

    def take_hop_times(self) -> NDArray[np.float32]:
        """Milliseconds [hops, (whole hop, graph alone)] of the hops since the last call, at most TIMES_KEPT."""
        done = self.meters.hops
        first = max(self._times_taken, done - TIMES_KEPT)
        self._times_taken = done
        start, stop = first % TIMES_KEPT, first % TIMES_KEPT + done - first
        if stop <= TIMES_KEPT:
            return self._times[start:stop]
        return np.concatenate([self._times[start:], self._times[: stop - TIMES_KEPT]])

    def process(self, block: NDArray[np.float32], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """block [channels, n] (or [n] for one channel), n at most ``max_block`` -> the same shape.

        The result is ``out`` if given, which may be ``block`` itself, else a buffer that the next call overwrites.
        """
        assert self.stream is not None, "prepare comes first"
        if block.shape == self._hop_shape and self._position == 0:  # the usual block
            result = self._hop_out if out is None else out
            self.stream.audio[:] = block  # before the result: they may be one array
            result[:] = self._out
            self._hop()
            return result
        samples = block.shape[-1]
        planar = block.reshape(self.channels, samples)
        if out is None:
            if samples > self.max_block:
                raise ValueError(f"block: {samples} samples are above max_block, {self.max_block}")
            out = self._block_out[:, :samples]
        result = out.reshape(self.channels, samples)
        gathered, hop, at = self.stream.audio, self._step_samples, 0
        while at < samples:
            position = self._position
            count = min(hop - position, samples - at)
            gathered[:, position : position + count] = planar[:, at : at + count]
            result[:, at : at + count] = self._out[:, position : position + count]
            at += count
            self._position = position + count
            if self._position == hop:
                self._hop()
                self._position = 0
        return result.reshape(block.shape)

    def _hop(self) -> None:
        """One full step, in a performance one hop: controls, graph, mix, limiter."""
        start = perf_counter_ns()
        stream, meters = self.stream, self.meters
        assert stream is not None
        x = stream.audio
        if self._goal is not self.controls:
            self._take(self.controls)
        old = self._gains
        if self._fade_left:
            self._fade()
        new = self._gains
        if self._noise is not None:
            self._noise.fill(x)
        if old.input != 1.0 or new.input != 1.0:
            x *= self._slope(old.input, new.input)
        flat = self._flat_in
        energy = float(flat.dot(flat))  # a method: np.vdot has more of Python to it
        if not energy < self._loudest_energy:  # NaN compares as no number does
            meters.bad_input_hops += self.hops_per_step
            np.nan_to_num(x, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
            np.clip(x, -1.0, 1.0, out=x)
            energy = float(flat.dot(flat))
        # Dry waits as long as the wet signal does.
        if self._dry_swaps:
            self._dry_now, self._dry_newest = self._dry_newest, self._dry_now
        else:
            self._dry_past[:] = self._dry_shifted
        self._dry_newest[:] = x if self._noise is None else 0.0
        dry = self._dry_now
        before = perf_counter_ns()
        wet, late = None, False
        try:
            wet = stream.step()
        except LateError:
            late = True
        except Exception as error:
            meters.fault = f"{type(error).__name__}: {error}"
        after = perf_counter_ns()
        out, self._out, self._spare = self._spare, self._spare, self._out
        flat, self._flat_out, self._flat_spare = self._flat_spare, self._flat_spare, self._flat_out
        energy_out, trusted = math.nan, self._trust
        trust = trusted
        if wet is not None:
            trust = trusted if trusted == 1.0 else min(1.0, trusted + 1.0 / self._fade_steps)
            if old is new and trusted == 1.0 and not new.dry:  # nothing moves: the usual hop
                np.multiply(wet, new.wet, out)
            else:
                self._mix(wet, dry, old.under(trusted), new.under(trust))
            energy_out = float(flat.dot(flat))  # not a number if one sample is none
        if energy_out < self._loudest_energy:
            self._trust = trust
        else:
            self._fall_back(dry, old.under(0.0), new.under(0.0), late)
            energy_out = float(flat.dot(flat))
        if energy_out > LIMITER_KNEE**2:  # otherwise no sample is above the knee
            limit(out)
        meters.input_energy, meters.output_energy = energy, energy_out
        row = meters.hops % TIMES_KEPT
        meters.hops += 1
        self._times[row, 1] = (after - before) * 1e-6
        self._times[row, 0] = (perf_counter_ns() - start) * 1e-6

    def _placed(self, controls: Controls) -> Controls:
        """With the level match where it is to be applied."""
        return controls.with_level_in_style() if self.bundle.level_in_style else controls

    def _take(self, controls: Controls) -> None:
        """Start to fade towards a new snapshot."""
        placed = self._placed(controls)
        self._goal, self._gains_goal, self._style_goal = controls, _Gains.of(placed), placed.style
        self._fade_left = self._fade_steps
        if self.journal is not None:
            self.journal.append((self.meters.hops, controls))

    def _fade(self) -> None:
        """One hop nearer to the goal, in a straight line."""
        assert self.stream is not None
        share = 1.0 / self._fade_left
        self._fade_left -= 1
        self._gains = self._gains.towards(self._gains_goal, share) if self._fade_left else self._gains_goal
        self._style += (self._style_goal - self._style) * share
        self.stream.style[:] = self._style

    def _slope(self, start: float, stop: float) -> NDArray[np.float32] | float:
        """Gain over one hop: a straight line, or one number where nothing moves."""
        if start == stop:
            return stop
        return self._ramp * np.float32(stop - start) + np.float32(start)

    def _mix(self, wet: NDArray[np.float32], dry: NDArray[np.float32], old: _Gains, new: _Gains) -> None:
        """wet and dry [channels, hop] into the output, each under its gain."""
        out = self._out
        if old.wet == 1.0 and new.wet == 1.0:
            out[:] = wet
        else:
            np.multiply(wet, self._slope(old.wet, new.wet), out)
        if old.dry or new.dry:
            np.multiply(dry, self._slope(old.dry, new.dry), out=self._scratch)
            out += self._scratch

    def _fall_back(self, dry: NDArray[np.float32], old: _Gains, new: _Gains, late: bool) -> None:
        """There is no usable hop: the dry signal at the same delay, joined without a step, and a fresh start."""
        assert self.stream is not None
        if late:
            self.meters.late_hops += self.hops_per_step
        else:
            self.meters.bad_output_hops += self.hops_per_step
        if self.journal is not None:
            self.journal.append((self.meters.hops, "late" if late else "bad"))
        out, last = self._out, self._spare[:, -1:]
        np.multiply(dry, self._slope(old.dry, new.dry), out=out)
        if self._trust > 0.0:
            out += (last - out[:, :1]) * (1.0 - self._ramp)
        self._trust = 0.0
        try:
            self.stream.reset()
        except Exception as error:
            # A device that is gone: the next hop tries again.
            self.meters.fault = f"{type(error).__name__}: {error}"
