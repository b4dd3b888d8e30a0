"""A model on devices of other rates: one exact delay whatever the blocks, clean to 18 kHz, never a sample short."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from realtime.bundle import DEFAULT_MODEL, DEMO_CLIP, read_bundle
from realtime.controls import PARAMETERS, mix_controls
from realtime.processor import Processor, RateError
from realtime.resample import PASSBAND_HZ, RateAdapter, RatePlan, Resampler, at_rate, plan_rates

MODEL_RATE = 48_000
BUNDLE = read_bundle(DEFAULT_MODEL)
MODEL_LATENCY = BUNDLE.manifest.latency_samples
MAX_BLOCK = 4096
LATENCY = {44_100: 145, 88_200: 273, 96_000: 298}
"""Device samples; the model's own delay is 235.2, 470.4 and 512 of them."""
RATES = tuple(LATENCY)
PATTERNS = [(1,), (16,), (17,), (64,), (441,), (4096,), (1, 4096, 3, 128, 700)]


def adapter(rate: int, channels: int = 1, style: str = "violin", **values: float) -> RateAdapter:
    chosen = {p.id: p.default for p in PARAMETERS} | values
    made = RateAdapter(Processor(BUNDLE))
    made.controls = mix_controls({BUNDLE.manifest.style(style): 1.0}, chosen)
    made.prepare(rate, MAX_BLOCK, channels)
    return made


def run(plugin: RateAdapter | Processor, audio: NDArray[np.float32], blocks: Sequence[int]) -> NDArray[np.float32]:
    """Audio [channels, n] through ``process`` in blocks of these lengths, over and over."""
    out, at = [], 0
    for size in itertools.cycle(blocks):
        out.append(plugin.process(audio[:, at : at + size]).copy())
        assert out[-1].shape == audio[:, at : at + size].shape
        at += size
        if at >= audio.shape[1]:
            return np.concatenate(out, axis=1)
    raise AssertionError("no blocks")


def guitar(rate: int, seconds: float) -> NDArray[np.float32]:
    audio, own = soundfile.read(DEMO_CLIP, dtype="float32", start=12_000, frames=int(seconds * 48_000))
    return soxr.resample(0.5 * audio, own, rate, quality="VHQ").astype(np.float32)[None]


def noise_below(limit_hz: float, rate: int, samples: int, seed: int = 0) -> NDArray[np.float32]:
    """Noise [1, samples] without anything above ``limit_hz``, at 0.1 of full scale."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(samples))
    spectrum[np.fft.rfftfreq(samples, 1 / rate) > limit_hz] = 0.0
    noise = np.fft.irfft(spectrum, samples)
    return (0.1 * noise / noise.std()).astype(np.float32)[None]


def first_underrun(plan: RatePlan) -> int | None:
    """After how many device samples, one at a time, an output is due that cannot be computed; by counting alone.

    The steps have no common divisor, so that everything comes round after ``model_step`` samples.
    """
    model_samples = 0
    for samples in range(1, 3 * plan.model_step + 200):
        while model_samples * plan.model_step < samples * plan.device_step:  # its newest tick is its own
            model_samples += 1
        reach = (samples - 1) * plan.device_step - plan.out_shift + plan.half_width
        if reach // plan.model_step > model_samples - 1:
            return samples
    return None


@settings(max_examples=60, deadline=None)
@given(
    device_rate=st.sampled_from([22_050, 32_000, 44_100, 64_000, 88_200, 96_000, 176_400, 192_000]),
    model_rate=st.sampled_from([44_100, 48_000, 96_000]),
    model_latency=st.integers(1, 5000),
)
def test_the_latency_is_the_smallest_that_never_runs_dry(device_rate: int, model_rate: int, model_latency: int) -> None:
    plan = plan_rates(device_rate, model_rate, model_latency)
    delay_ticks = plan.half_width + plan.out_shift + model_latency * plan.model_step
    assert delay_ticks == plan.latency_samples * plan.device_step
    assert first_underrun(plan) is None
    sooner = replace(plan, out_shift=plan.out_shift - plan.device_step)
    assert first_underrun(sooner) is not None


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("blocks", PATTERNS, ids=str)
def test_an_impulse_arrives_at_the_stated_sample(rate: int, blocks: Sequence[int]) -> None:
    plugin = adapter(rate, dry_wet=0.0)
    assert plugin.latency_samples == LATENCY[rate]
    for place in (0, 501, 1002):
        plugin.reset()
        audio = np.zeros((1, place + 700), np.float32)
        audio[0, place] = 0.8
        out = run(plugin, audio, blocks)
        assert np.abs(out[0]).argmax() == place + LATENCY[rate]


@pytest.mark.parametrize("rate", RATES)
def test_dry_is_the_input_later_to_the_sample(rate: int) -> None:
    audio = noise_below(17_900, rate, rate // 2)
    out = run(adapter(rate, dry_wet=0.0), audio, (128, 1, 500))
    delay = LATENCY[rate]
    middle = slice(2000, -2000)  # at its ends the noise goes round
    difference = (out[:, delay:] - audio[:, :-delay])[:, middle]
    assert 20 * np.log10(difference.std() / 0.1) < -75.0
    neighbours = [
        (out[:, delay + shift :][:, : audio.shape[1] - 2 * delay] - audio[:, : -2 * delay]).std() for shift in (-1, 1)
    ]
    assert min(neighbours) > 0.01


@settings(max_examples=12, deadline=None)
@given(
    rate=st.sampled_from(RATES),
    blocks=st.lists(st.integers(1, MAX_BLOCK) | st.integers(1, 40), min_size=1, max_size=8),
)
def test_the_blocks_change_nothing(rate: int, blocks: list[int]) -> None:
    audio = guitar(rate, 0.25)
    np.testing.assert_array_equal(run(adapter(rate), audio, blocks), run(adapter(rate), audio, (128,)))


def through(plan: RatePlan, to_model: bool, audio: NDArray[np.float32]) -> NDArray[np.float64]:
    """Audio [channels, n] through one of the two filters."""
    steps = (plan.device_step, plan.model_step) if to_model else (plan.model_step, plan.device_step)
    resampler = Resampler(plan, *steps, plan.half_width, audio.shape[0], audio.shape[1])
    out = np.zeros((audio.shape[0], resampler.ready(audio.shape[1])), np.float32)
    resampler.process(audio, out)
    return out.astype(np.float64)


def test_wet_is_the_models_own_at_the_same_delay() -> None:
    """At 96 kHz every second sample is the model's but for rounding: its answer to the first filter's output."""
    plugin = adapter(96_000)
    plan = plugin.plan
    assert plan is not None and (plan.half_width, plan.out_shift) == (21, 21)
    audio = np.pad(guitar(96_000, 1.0), ((0, 0), (1, 0)))
    out = run(plugin, audio, (128,))
    alone = Processor(BUNDLE)
    alone.controls = plugin.controls
    alone.prepare(MODEL_RATE, MAX_BLOCK, 1)
    expected = run(alone, through(plan, True, audio).astype(np.float32), (128,))[0]
    heard = out[0, 21::2]
    np.testing.assert_allclose(heard, expected[: len(heard)], rtol=0.0, atol=1e-9)
    assert len(heard) > 0.9 * MODEL_RATE and np.abs(heard).max() > 0.05


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("to_model", [True, False])
def test_flat_to_18_khz_and_aliases_below_80_db(rate: int, to_model: bool) -> None:
    plan = plan_rates(rate, MODEL_RATE, MODEL_LATENCY)
    source, target = (rate, MODEL_RATE) if to_model else (MODEL_RATE, rate)
    samples = 4096
    tones = np.concatenate([np.linspace(100, PASSBAND_HZ, 24), np.linspace(PASSBAND_HZ, source / 2 - 100, 24)])
    time_in = np.arange(samples * source // target + 600) / source
    out = through(plan, to_model, np.sin(2 * np.pi * tones[:, None] * time_in).astype(np.float32))
    out = out[:, 200 : 200 + samples] * np.kaiser(samples, 16)
    time_out, frequencies = np.arange(samples) / target, np.fft.rfftfreq(samples, 1 / target)
    full = np.kaiser(samples, 16).sum() / 2
    for tone, row in zip(tones, out, strict=True):
        rest = row
        if tone < target / 2:
            phases = 2 * np.pi * tone * time_out
            pair = np.stack([np.sin(phases), np.cos(phases)], axis=1) * np.kaiser(samples, 16)[:, None]
            parts = np.linalg.lstsq(pair, row)[0]
            rest = row - pair @ parts
            if tone <= PASSBAND_HZ:
                assert abs(20 * np.log10(np.hypot(*parts))) < 0.01, tone
        # What is heard below 18 kHz, whatever came in, and what becomes of that band, wherever it lands.
        heard = slice(None) if tone <= PASSBAND_HZ else frequencies <= PASSBAND_HZ
        assert 20 * np.log10(np.abs(np.fft.rfft(rest))[heard].max() / full) < -80.0, tone


def test_stereo_channels_are_two_independent_players() -> None:
    left = guitar(44_100, 0.2)
    both = np.concatenate([left, 0.7 * left[:, ::-1]])
    out = run(adapter(44_100, 2), both, (65,))
    for channel in range(2):
        alone = run(adapter(44_100), both[channel : channel + 1], (65,))
        np.testing.assert_allclose(out[channel], alone[0], atol=2e-5)


def test_the_result_may_take_the_place_of_the_block_and_mono_may_be_flat() -> None:
    audio = guitar(44_100, 0.2)
    apart, in_place, flat = adapter(44_100), adapter(44_100), adapter(44_100)
    for start in range(0, audio.shape[1] - 441, 441):
        part = audio[:, start : start + 441].copy()
        expected = apart.process(part).copy()
        np.testing.assert_array_equal(flat.process(part[0]), expected[0])
        in_place.process(part, part)
        np.testing.assert_array_equal(part, expected)
    assert apart.process(np.zeros((1, 0), np.float32)).shape == (1, 0)


def test_reset_is_a_fresh_start() -> None:
    audio = guitar(88_200, 0.1)
    plugin = adapter(88_200)
    first = run(plugin, audio, (77,))
    plugin.reset()
    np.testing.assert_array_equal(run(plugin, audio, (77,)), first)
    assert np.abs(first).max() > 0.01


def test_bad_numbers_are_silenced_and_forgotten() -> None:
    audio = noise_below(10_000, 44_100, 12_000)
    spoilt = audio.copy()
    spoilt[0, 3000], spoilt[0, 3001], spoilt[0, 3002] = np.nan, np.inf, -np.inf
    plugin = adapter(44_100, dry_wet=0.0)
    out, expected = run(plugin, spoilt, (128,)), run(adapter(44_100, dry_wet=0.0), audio, (128,))
    assert np.isfinite(out).all() and np.abs(out).max() <= 1.0
    assert 1 <= plugin.meters.bad_input_hops <= 3
    np.testing.assert_array_equal(out[:, 3000 + 800 :], expected[:, 3000 + 800 :])


@pytest.mark.parametrize("rate", RATES)
def test_no_sample_is_above_full_scale(rate: int) -> None:
    """A limited signal may rise above its samples when it is resampled."""
    square = np.sign(np.sin(np.arange(rate // 10) * 0.9)).astype(np.float32)[None]
    out = run(adapter(rate, dry_wet=0.0, output_gain_db=12.0), square, (128,))
    assert 0.9 < np.abs(out).max() <= 1.0


def test_hop_times_are_handed_over_once_and_bear_the_resampling() -> None:
    plugin = adapter(96_000)
    plugin.process(np.zeros((1, 2560), np.float32))
    times = plugin.take_hop_times()
    assert times.shape == (10, 2) and (times[:, 0] > times[:, 1]).all()
    assert len(plugin.take_hop_times()) == 0


def test_a_device_of_the_models_rate_has_the_model_alone() -> None:
    processor = Processor(BUNDLE)
    assert at_rate(processor, MODEL_RATE) is processor
    assert isinstance(at_rate(processor, 44_100), RateAdapter)


@pytest.mark.parametrize("rate", [44_101, 4_000, 0, -44_100])
def test_a_rate_that_has_nothing_in_common_is_refused(rate: int) -> None:
    with pytest.raises(RateError, match=rf"48000 Hz cannot be resampled to {rate} Hz; set the device to 48000, 44100"):
        RateAdapter(Processor(BUNDLE)).prepare(rate, 128, 1)


def test_a_block_above_the_prepared_maximum_is_refused() -> None:
    with pytest.raises(ValueError, match="4097 samples are above max_block, 4096"):
        adapter(44_100).process(np.zeros((1, 4097), np.float32))
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 1"):
        RateAdapter(Processor(BUNDLE)).prepare(44_100, 0, 1)
