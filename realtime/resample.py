"""A model on a device of another rate: streaming resamplers with one exact delay, whatever the block length.

Both rates are counted in ticks of their least common multiple: at 44.1 and 48 kHz a device sample lasts 160 ticks and
a model sample 147. A filter is one Kaiser-windowed sinc of ``half_width`` ticks either side, of which each output
sample takes every ``step``-th tick (a polyphase filter: Crochiere and Rabiner, "Multirate Digital Signal Processing",
1983).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from realtime.bundle import Parameter
from realtime.controls import Controls
from realtime.limiter import LIMITER_KNEE, limit
from realtime.processor import Meters, Processor, RateError

PASSBAND_HZ = 18_000.0
"""Flat up to here. The fold of everything that is let through lies above it: a filter that also kept the last 4 kHz of
a 44.1 kHz device clean would be twice as long, for what few can hear."""
PASSBAND_SHARE = PASSBAND_HZ / 44_100
"""The same of slower rates, whose half is near or below 18 kHz."""
STOPBAND_DB = 82.0
MAX_STEPS = 640
"""Most phases of one filter; the rates in use need 320 (22.05 to 48 kHz)."""
CHUNK = 256
"""Output samples computed in one go."""


@dataclass(frozen=True)
class RatePlan:
    """How a model of one rate plays on a device of another; lengths in ticks, delays in device samples.

    Device sample i stands at tick ``i * device_step``, model sample j at ``j * model_step``. After n device samples,
    J(n) = ceil(n * device_step / model_step) model samples can be computed, of the input ``half_width`` ticks earlier.
    Those give every device sample up to n - 1 if the delays of both filters together are at least
    ``2 * half_width + 1 - device_step``: the last model sample stands at tick (J - 1) * model_step, the next one, which
    is not there, at J * model_step >= n * device_step, with equality for some n as the steps have no common divisor;
    output n - 1 reaches to tick (n - 1) * device_step - out_shift + half_width, which must lie below that. No queue
    besides: less would run dry at some n, and more is never needed, whatever blocks the n samples come in.
    """

    device_rate: int
    model_rate: int
    device_step: int
    model_step: int
    half_width: int
    latency_samples: int
    """From a device sample in to the same one out, the model's own delay included."""
    out_shift: int
    """Delay of the filter back to the device's rate; that of the other one is ``half_width``."""

    @property
    def added_samples(self) -> float:
        """What both filters add to the model's own delay, in device samples."""
        return (self.half_width + self.out_shift) / self.device_step

    def model_samples(self, device_samples: int) -> int:
        """The most model samples that a block of so many device samples can complete."""
        return -(-device_samples * self.device_step // self.model_step)


def plan_rates(device_rate: int, model_rate: int, model_latency_samples: int) -> RatePlan:
    """The smallest whole latency for these rates, in Hz. Raises RateError for rates that have too little in common."""
    common = math.gcd(device_rate, model_rate) if device_rate > 0 else 1
    device_step, model_step = model_rate // common, device_rate // common
    if device_rate < 8_000 or max(device_step, model_step) > MAX_STEPS:
        raise RateError(
            f"a model of {model_rate} Hz cannot be resampled to {device_rate} Hz; "
            f"set the device to {model_rate}, 44100, 88200 or 96000 Hz"
        )
    lower = min(device_rate, model_rate)
    passband = min(PASSBAND_HZ, PASSBAND_SHARE * lower)
    # Kaiser's rule: as long as the gap between passband and stopband is narrow.
    length_s = (STOPBAND_DB - 7.95) / (14.36 * (lower - 2.0 * passband))
    half_width = math.ceil(0.5 * length_s * device_rate * device_step)
    model_ticks = model_latency_samples * model_step
    latency = -(-(2 * half_width + 1 - device_step + model_ticks) // device_step)
    out_shift = latency * device_step - model_ticks - half_width
    return RatePlan(device_rate, model_rate, device_step, model_step, half_width, latency, out_shift)


def lowpass(plan: RatePlan, ticks: NDArray[np.int64]) -> NDArray[np.float64]:
    """The filter of both directions at these distances from its middle, in ticks; zero beyond ``half_width``.

    Half the slower rate is the middle of its transition band.
    """
    beta = 0.1102 * (STOPBAND_DB - 8.7)
    slower_step = max(plan.device_step, plan.model_step)
    window = np.i0(beta * np.sqrt(np.maximum(0.0, 1.0 - np.square(ticks / plan.half_width)))) / np.i0(beta)
    return np.where(np.abs(ticks) <= plan.half_width, np.sinc(ticks / slower_step) * window, 0.0)


class Resampler:
    """One direction: any number of samples in, those that can be computed of them out. One thread at a time.

    Output sample k is the input at tick ``k * target_step - shift``. What it remembers is ``taps`` samples.
    """

    def __init__(
        self, plan: RatePlan, source_step: int, target_step: int, shift: int, channels: int, max_input: int
    ) -> None:
        self._source, self._target = source_step, target_step
        self._first_edge = plan.half_width - shift
        self.taps = 2 * plan.half_width // source_step + 1
        rows = np.arange(source_step + CHUNK)
        edges = rows * target_step + self._first_edge  # the newest tick that each output sample reaches
        newest, back = edges // source_step, np.arange(self.taps)[::-1]
        bank = lowpass(plan, edges[:, None] - plan.half_width - (newest[:, None] - back) * source_step)
        # Each phase passes a constant exactly.
        self._bank = (bank / bank.sum(axis=1, keepdims=True)).astype(np.float32)
        self._newest = newest.astype(np.intp)
        self._buffer = np.zeros((channels, self.taps + max_input), np.float32)
        # The window that ends on each sample [channels, samples, taps], as views.
        self._windows = np.lib.stride_tricks.sliding_window_view(self._buffer, self.taps, axis=1)
        self.reset()

    def reset(self) -> None:
        """Silence in the past."""
        self._buffer[:] = 0.0
        self._row, self._edge = 0, self._first_edge

    def ready(self, samples: int) -> int:
        """How many output samples can be computed after so many more samples of input."""
        return max(0, -((self._edge - samples * self._source) // self._target))

    def process(self, block: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """block [channels, n] in, the next samples out [channels, k], k at most ``ready(n)``."""
        samples, count = block.shape[1], out.shape[1]
        assert count <= self.ready(samples)
        buffer, taps = self._buffer, self.taps
        buffer[:, taps : taps + samples] = block
        done = 0
        while done < count:
            rows = min(CHUNK, count - done)
            row = self._row
            newest = self._newest[row : row + rows]
            # Window w ends on buffer sample w + taps - 1; this block begins at sample ``taps``.
            windows = self._windows[:, newest + (1 + self._edge // self._source - newest[0])]
            np.einsum("ckt,kt->ck", windows, self._bank[row : row + rows], out=out[:, done : done + rows])
            done += rows
            self._row = (row + rows) % self._source
            self._edge += rows * self._target
        self._edge -= samples * self._source
        buffer[:, :taps] = buffer[:, samples : samples + taps]


class RateAdapter:
    """A Processor behind two resamplers: the plugin that it is, at the device's rate. One caller thread at a time.

    Wet and dry pass both filters, so they stay aligned. What the limiter lets through may rise between the samples;
    it is bent once more at the device's rate.
    """

    parameters: tuple[Parameter, ...] = Processor.parameters

    def __init__(self, processor: Processor) -> None:
        """``processor`` need not be prepared; from here on it belongs to the adapter."""
        self.processor = processor
        self.manifest, self.provider = processor.manifest, processor.provider
        self.plan: RatePlan | None = None

    @property
    def hop_samples(self) -> int:
        """The model's hop, in samples of the model."""
        return self.processor.hop_samples

    @property
    def latency_samples(self) -> int:
        """Device samples from in to out, filters and model together; known after ``prepare``."""
        assert self.plan is not None, "prepare comes first"
        return self.plan.latency_samples

    @property
    def controls(self) -> Controls:
        """The snapshot that the next hop takes; assign a new one at any time, from any thread."""
        return self.processor.controls

    @controls.setter
    def controls(self, controls: Controls) -> None:
        self.processor.controls = controls

    @property
    def meters(self) -> Meters:
        """The Processor's: hops and energies are counted at the model's rate."""
        return self.processor.meters

    def prepare(self, sample_rate: int, max_block: int, channels: int) -> None:
        """Allocate everything for blocks [channels, up to max_block] at ``sample_rate`` Hz. Not for the audio thread.

        Raises RateError for a rate that cannot be resampled to the model's.
        """
        if max_block < 1 or channels < 1:
            raise ValueError(f"max_block and channels: must be at least 1, got {max_block} and {channels}")
        model_rate = self.manifest.spectral.sample_rate
        self.plan = plan = plan_rates(sample_rate, model_rate, self.processor.latency_samples)
        self.channels, self.max_block = channels, max_block
        most = plan.model_samples(max_block)
        self.processor.prepare(model_rate, most, channels)
        self._to_model = Resampler(plan, plan.device_step, plan.model_step, plan.half_width, channels, max_block)
        self._to_device = Resampler(plan, plan.model_step, plan.device_step, plan.out_shift, channels, most)
        self._model_block = np.zeros((channels, most), np.float32)
        self._out = np.zeros((channels, max_block), np.float32)
        self.reset()

    def reset(self) -> None:
        """Back to the moment after ``prepare``."""
        assert self.plan is not None, "prepare comes first"
        self._to_model.reset()
        self._to_device.reset()
        self.processor.reset()
        self._resampling_ns = 0

    def process(self, block: NDArray[np.float32], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """block [channels, n] (or [n] for one channel), n at most ``max_block`` -> the same shape.

        The result is ``out`` if given, which may be ``block`` itself, else a buffer that the next call overwrites.
        """
        assert self.plan is not None, "prepare comes first"
        samples = block.shape[-1]
        if samples > self.max_block:
            raise ValueError(f"block: {samples} samples are above max_block, {self.max_block}")
        planar = block.reshape(self.channels, samples)
        result = self._out[:, :samples] if out is None else out.reshape(self.channels, samples)
        start = perf_counter_ns()
        model_block = self._model_block[:, : self._to_model.ready(samples)]
        self._to_model.process(planar, model_block)
        before = perf_counter_ns()
        self.processor.process(model_block, model_block)
        after = perf_counter_ns()
        self._to_device.process(model_block, result)
        if samples and (result.max() > LIMITER_KNEE or result.min() < -LIMITER_KNEE):
            limit(result)
        self._resampling_ns += before - start + perf_counter_ns() - after
        return result.reshape(block.shape)

    def take_hop_times(self) -> NDArray[np.float32]:
        """Milliseconds [hops, (whole hop, graph alone)] since the last call; each hop bears its share of resampling."""
        times = self.processor.take_hop_times()
        if len(times):
            times = times + np.array((1e-6 * self._resampling_ns / len(times), 0.0), np.float32)
            self._resampling_ns = 0
        return times


def at_rate(processor: Processor, sample_rate: int) -> Processor | RateAdapter:
    """The processor itself for a device of the model's rate, behind an adapter for any other; not yet prepared."""
    return processor if sample_rate == processor.manifest.spectral.sample_rate else RateAdapter(processor)
