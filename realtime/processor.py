"""The plugin: any block in, the same block out, restyled, exactly ``latency_samples`` later."""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from realtime.bundle import Bundle, Parameter
from realtime.controls import PARAMETERS, Controls, db_to_gain, mix_controls
from realtime.stream import Stream

FADE_HOPS = 8
LIMITER_KNEE = 0.89
"""Amplitude (-1 dBFS) above which the limiter bends; below it, samples pass unchanged."""


class RateError(ValueError):
    """A sample rate that the model was not made for."""


@dataclass
class Meters:
    """What the engine counts, written by the thread that calls ``process``; readers only look."""

    hops: int = 0
    hop_ms: float = 0.0
    graph_ms: float = 0.0
    input_rms: float = 0.0
    output_rms: float = 0.0
    bad_input_hops: int = 0
    bad_output_hops: int = 0


def limit(x: NDArray[np.float32]) -> None:
    """Bend samples above the knee smoothly towards full scale, in place; memoryless, so it adds no latency."""
    magnitude = np.abs(x)
    if magnitude.max() <= LIMITER_KNEE:
        return
    room = 1.0 - LIMITER_KNEE
    bent = LIMITER_KNEE + room * np.tanh((magnitude - LIMITER_KNEE) / room)
    np.copyto(x, np.copysign(bent, x), where=magnitude > LIMITER_KNEE)


class Processor:
    """``prepare`` once, then ``process`` blocks of any length. No threads, no devices; one caller thread at a time.

    A hop must be full before it is computed (``hop`` samples), and the synthesis window overlaps the next
    (``synthesis window - hop``); their sum is the constant delay of wet and dry alike, whatever the block length.
    Style and gains fade towards the newest ``controls`` hop by hop. A hop of NaN in the output fades to the dry signal
    at the same delay, resets the model and fades back.
    """

    parameters: tuple[Parameter, ...] = PARAMETERS

    def __init__(self, bundle: Bundle, provider: str = "cpu") -> None:
        self.bundle, self.provider = bundle, provider
        self.manifest = bundle.manifest
        self.hop_samples = self.manifest.spectral.hop_samples
        self.controls = mix_controls({self.manifest.styles[0]: 1.0}, {p.id: p.default for p in PARAMETERS})
        """The snapshot that the next hop takes; assign a new one at any time, from any thread."""
        self.meters = Meters()
        self.stream: Stream | None = None

    @property
    def latency_samples(self) -> int:
        """Output sample i is made from input sample i - latency_samples (and what came before it)."""
        return self.hop_samples + self.manifest.stream_delay_samples

    def prepare(self, sample_rate: int, max_block: int, channels: int) -> None:
        """Allocate everything for blocks [channels, up to max_block], warm up and reset. Not for the audio thread.

        Raises RateError for a rate that is not the model's.
        """
        if sample_rate != self.manifest.spectral.sample_rate:
            raise RateError(
                f"model '{self.manifest.name}' runs at {self.manifest.spectral.sample_rate} Hz, not {sample_rate} Hz; "
                f"set the device to {self.manifest.spectral.sample_rate} Hz"
            )
        if max_block < 1 or channels < 1:
            raise ValueError(f"max_block and channels: must be at least 1, got {max_block} and {channels}")
        self.channels, self.max_block = channels, max_block
        self.stream = Stream(self.bundle, channels, provider=self.provider)
        hop = self.hop_samples
        self._ramp = (np.arange(1, hop + 1, dtype=np.float32) / hop)[None]
        self._dry = np.zeros((channels, self.manifest.stream_delay_samples + hop), np.float32)
        self._out = np.zeros((channels, hop), np.float32)
        self._scratch = np.zeros((channels, hop), np.float32)
        self._block_out = np.zeros((channels, max_block), np.float32)
        self.stream.warm_up()
        self.reset()

    def reset(self) -> None:
        """Back to the moment after ``prepare``: silence in the past, controls in place without a fade."""
        assert self.stream is not None, "prepare comes first"
        self.stream.reset()
        self.stream.audio[:] = 0.0
        self._dry[:] = 0.0
        self._out[:] = 0.0
        self._position = 0
        self._seen: Controls | None = None
        self._fade_left = 0
        self._trust = 1.0
        self.meters.__init__()

    def process(self, block: NDArray[np.float32], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """block [channels, n] (or [n] for one channel), n at most ``max_block`` -> the same shape.

        The result is ``out`` if given, else a buffer that the next call overwrites.
        """
        assert self.stream is not None, "prepare comes first"
        samples = block.shape[-1]
        planar = block.reshape(self.channels, samples)
        if out is None:
            if samples > self.max_block:
                raise ValueError(f"block: {samples} samples are above max_block, {self.max_block}")
            out = self._block_out[:, :samples]
        result = out.reshape(self.channels, samples)
        gathered, hop, at = self.stream.audio, self.hop_samples, 0
        while at < samples:
            position = self._position
            count = min(hop - position, samples - at)
            result[:, at : at + count] = self._out[:, position : position + count]
            gathered[:, position : position + count] = planar[:, at : at + count]
            at += count
            self._position = position + count
            if self._position == hop:
                self._hop()
                self._position = 0
        return result.reshape(block.shape)

    def _hop(self) -> None:
        """One full hop: controls, graph, mix, gain, limiter."""
        start = perf_counter_ns()
        stream, meters, hop = self.stream, self.meters, self.hop_samples
        assert stream is not None
        x = stream.audio
        if self._seen is not self.controls:
            self._take(self.controls)
        faded = self._fade_left > 0
        if faded:
            self._fade()
        if self._input_from != 1.0 or self._input_gain != 1.0:
            x *= self._slope(self._input_from, self._input_gain)
        energy = float(np.vdot(x, x))
        if not math.isfinite(energy):
            meters.bad_input_hops += 1
            np.nan_to_num(x, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
            np.clip(x, -1.0, 1.0, out=x)
            energy = float(np.vdot(x, x))
        dry = self._dry
        dry[:, :-hop] = dry[:, hop:]
        dry[:, -hop:] = x
        before = perf_counter_ns()
        wet = stream.step()
        after = perf_counter_ns()
        out, last = self._out, self._last
        last[:] = out[:, -1:]
        power = float(np.vdot(wet, wet))
        if not math.isfinite(power):
            self._fall_back(dry[:, :hop])
        elif self._trust < 1.0 or faded or self._wet_gain != 1.0 or self._dry_gain != 0.0:
            trust = self._trust
            self._trust = min(1.0, trust + 1.0 / FADE_HOPS)
            np.multiply(wet, self._slope(self._wet_from * trust, self._wet_gain * self._trust), out=out)
            dry_from = self._dry_from * trust + self._whole_from * (1.0 - trust)
            dry_to = self._dry_gain * self._trust + self._whole_gain * (1.0 - self._trust)
            if dry_from or dry_to:
                np.multiply(dry[:, :hop], self._slope(dry_from, dry_to), out=self._scratch)
                out += self._scratch
        else:
            out[:] = wet
        limit(out)
        if faded:
            self._settle()
        meters.hops += 1
        meters.input_rms = math.sqrt(energy / x.size)
        meters.output_rms = math.sqrt(float(np.vdot(out, out)) / out.size)
        meters.graph_ms = (after - before) * 1e-6
        meters.hop_ms = (perf_counter_ns() - start) * 1e-6
