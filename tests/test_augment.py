"""Hiding a style: aligned, causal, level for level, repeatable."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import soundfile

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Generator, Tensor  # noqa: E402

from training.augment import (  # noqa: E402
    FILTER_FFT_SIZE,
    apply_filter,
    bend_pitch,
    change_pitch,
    flatten_envelope,
    hide_style,
    make_pair,
    minimum_phase,
    random_timbre,
    raw_samples,
    rms,
    saturate,
    steady_tones,
)
from training.recipe import AugmentConfig  # noqa: E402

RATE = 48_000
SAMPLES = 24_000
QUIET = AugmentConfig(noise_snr_db=(200.0, 200.0))  # no noise, to see the rest exactly
# Everything but the filters.
UNFILTERED = dataclasses.replace(
    QUIET,
    octave_gain_db=0.0,
    bump_count=0,
    lowpass_chance=0.0,
    comb_chance=0.0,
    flatten_chance=1.0,
    saturate_chance=1.0,
)


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def notes(samples: int) -> Tensor:
    """Real notes [3, samples]."""
    rows = []
    for path in sorted((Path(__file__).parent / "data").glob("*.flac")):
        audio, _ = soundfile.read(path, dtype="float32")
        rows.append(torch.from_numpy(audio[:samples]))
    return torch.stack(rows)


def noise_burst(batch: int) -> Tensor:
    audio = torch.randn(batch, SAMPLES, generator=seeded(9)) * 0.1
    audio[:, : SAMPLES // 3] = 0.0
    return audio


def lag_samples(later: Tensor, reference: Tensor) -> list[int]:
    """Shift of the highest absolute cross-correlation, per row; positive if ``later`` is the later one."""
    size = 2 * later.shape[-1]
    product = torch.fft.rfft(later, n=size) * torch.fft.rfft(reference, n=size).conj()
    peak = torch.fft.irfft(product, n=size).abs().argmax(dim=-1)
    return [p if p < size // 2 else p - size for p in peak.tolist()]


def pitch_hz(audio: Tensor) -> float:
    spectrum = torch.fft.rfft(audio * torch.hann_window(audio.shape[-1]), n=1 << 19).abs()
    return spectrum.argmax().item() * RATE / (1 << 19)


@settings(max_examples=20, deadline=None)
@given(st.integers(-16, 16), st.floats(100.0, 8000.0, allow_subnormal=False))
def test_pitch_changes_by_the_semitones_asked_for(quarters: int, frequency: float) -> None:
    raw = raw_samples(SAMPLES, AugmentConfig())
    audio = torch.sin(2 * math.pi * frequency * torch.arange(raw) / RATE)[None]
    shifted = change_pitch(audio, torch.tensor([quarters / 4]), SAMPLES)
    assert shifted.shape == (1, SAMPLES)
    assert pitch_hz(shifted[0]) == pytest.approx(frequency * 2 ** (quarters / 48), rel=2e-3)
    assert rms(shifted).item() == pytest.approx(math.sqrt(0.5), rel=0.01)


@pytest.mark.parametrize(("semitones", "ratio"), [(12.0, 2.0), (-12.0, 0.5), (7.0, 1.49831), (-5.0, 0.74915)])
def test_octaves_fourths_and_fifths_of_a_real_note(semitones: float, ratio: float) -> None:
    raw = raw_samples(SAMPLES, AugmentConfig(pitch_semitones=12.0))
    note = notes(raw)[:1]  # 440 Hz
    shifted = change_pitch(note, torch.tensor([semitones]), SAMPLES)
    assert shifted.shape == (1, SAMPLES)
    before, after = pitch_hz(note[0]), pitch_hz(shifted[0])
    assert after / before == pytest.approx(ratio, rel=3e-3)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.0, 24.0, allow_subnormal=False), st.integers(1, 2000), st.booleans())
def test_there_are_always_samples_enough_for_the_largest_change(spread: float, hops: int, up: bool) -> None:
    samples = 128 * hops
    config = AugmentConfig(pitch_semitones=spread)
    ones = torch.ones(1, raw_samples(samples, config))
    shifted = change_pitch(ones, torch.tensor([spread if up else -spread]), samples)
    assert shifted.shape == (1, samples)
    # The soft ends, which keep the transform from wrapping around, stay outside.
    assert (shifted - 1.0).abs().max().item() < 0.05


def test_rows_change_pitch_each_by_itself() -> None:
    raw = raw_samples(SAMPLES, AugmentConfig())
    audio = torch.randn(1, raw, generator=seeded()).repeat(3, 1)
    together = change_pitch(audio, torch.tensor([2.0, -3.0, 2.0]), SAMPLES)
    alone = [change_pitch(audio[:1], torch.tensor([s]), SAMPLES) for s in (2.0, -3.0, 2.0)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_no_change_of_pitch_is_a_cut_from_the_middle() -> None:
    raw = raw_samples(SAMPLES, AugmentConfig())
    audio = torch.randn(2, raw, generator=seeded())
    start = (raw - SAMPLES) // 2
    same = change_pitch(audio, torch.zeros(2), SAMPLES)
    assert torch.allclose(same, audio[:, start : start + SAMPLES], atol=1e-4)


def test_minimum_phase_keeps_the_magnitude_and_comes_before_nothing() -> None:
    log_magnitude = random_timbre(32, RATE, AugmentConfig(), seeded(3))
    spectrum = minimum_phase(log_magnitude)
    decibels = (spectrum.abs().log() - log_magnitude) * 20 / math.log(10)
    assert decibels.abs().max().item() < 0.1
    impulse = torch.zeros(32, SAMPLES)
    impulse[:, 5000] = 1.0
    response = apply_filter(impulse, spectrum)
    before, after = response[:, :5000].abs().amax(dim=1), response.abs().amax(dim=1)
    assert (before < 1e-5 * after).all()
    # Not one of these filters rings on to the end of its taps, where the transform would wrap.
    taps = torch.fft.irfft(spectrum)
    assert (taps[:, FILTER_FFT_SIZE // 2 :].abs().amax(dim=1) < 1e-2 * taps.abs().amax(dim=1)).all()


def test_a_flat_magnitude_is_no_filter() -> None:
    audio = notes(SAMPLES)
    flat = torch.zeros(3, FILTER_FFT_SIZE // 2 + 1)
    assert torch.allclose(apply_filter(audio, minimum_phase(flat)), audio, atol=1e-6)


def test_without_filters_the_correlation_peaks_at_lag_zero() -> None:
    audio = torch.cat([noise_burst(6), notes(SAMPLES)])
    for seed in range(5):
        hidden = hide_style(audio, RATE, UNFILTERED, seeded(seed))
        assert lag_samples(hidden, audio) == [0] * 9


def test_filters_delay_by_less_than_a_hop_and_never_lead() -> None:
    audio = noise_burst(16)
    lags = [lag for seed in range(6) for lag in lag_samples(hide_style(audio, RATE, QUIET, seeded(seed)), audio)]
    assert min(lags) >= 0
    assert max(lags) < 128
    assert sorted(lags)[len(lags) // 2] <= 8


def test_nothing_is_heard_before_its_cause() -> None:
    audio = noise_burst(16)
    onset = SAMPLES // 3
    for seed in range(6):
        hidden = hide_style(audio, RATE, QUIET, seeded(seed))
        assert hidden[:, :onset].abs().max().item() < 1e-4 * hidden.abs().max().item()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_a_click_in_the_target_is_never_heard_earlier_in_the_input(seed: int) -> None:
    # Filters and their order as in training; noise is no answer to anything and left out, envelopes have no delay.
    audio = torch.zeros(4, SAMPLES)
    audio[:, 7000] = 0.5
    hidden = hide_style(audio, RATE, QUIET, seeded(seed))
    assert hidden[:, :7000].abs().max().item() < 1e-4 * hidden.abs().max().item()
    assert (hidden[:, 7000:7128].abs().amax(dim=1) > 0.3 * hidden.abs().amax(dim=1)).all()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_input_and_target_share_level_length_and_full_scale(seed: int) -> None:
    config = AugmentConfig(silence_chance=0.0)
    raw = notes(raw_samples(48_000, config))
    pair = make_pair(raw, 48_000, RATE, config, seeded(seed))
    assert pair.input.shape == pair.target.shape == (3, 48_000)
    assert torch.isfinite(pair.input).all()
    assert pair.input.abs().max() <= 0.9901
    assert pair.target.abs().max() <= 0.9901
    ratio_db = 20 * torch.log10(rms(pair.input) / rms(pair.target))
    assert ratio_db.abs().max().item() < 0.05  # noise at 30 dB below adds 0.004 dB
    level_db = 20 * torch.log10(rms(pair.target))
    assert (level_db <= config.level_dbfs[1] + 0.01).all()
    assert (level_db >= config.level_dbfs[0] - 0.01).all()


def test_a_peak_at_full_scale_lowers_both_alike() -> None:
    config = AugmentConfig(level_dbfs=(0.0, 0.0), silence_chance=0.0)  # more than music can have
    pair = make_pair(notes(raw_samples(SAMPLES, config)), SAMPLES, RATE, config, seeded(2))
    peaks = torch.maximum(pair.input.abs().amax(dim=1), pair.target.abs().amax(dim=1))
    assert peaks.tolist() == pytest.approx([0.99] * 3, rel=1e-4)
    assert (20 * torch.log10(rms(pair.input) / rms(pair.target))).abs().max().item() < 0.05


def test_seeds_decide_everything() -> None:
    config = AugmentConfig()
    raw = notes(raw_samples(SAMPLES, config))
    first, again = (make_pair(raw, SAMPLES, RATE, config, seeded(5)) for _ in range(2))
    other = make_pair(raw, SAMPLES, RATE, config, seeded(6))
    assert torch.equal(first.input, again.input)
    assert torch.equal(first.target, again.target)
    assert not torch.equal(first.input, other.input)


def test_a_style_is_hidden_but_for_the_rows_left_as_they_are() -> None:
    hide = AugmentConfig(identity_chance=0.0, silence_chance=0.0)
    raw = notes(raw_samples(SAMPLES, hide))
    hidden = make_pair(raw, SAMPLES, RATE, hide, seeded(1))
    assert (rms(hidden.input - hidden.target) > 0.1 * rms(hidden.target)).all()
    same = make_pair(raw, SAMPLES, RATE, dataclasses.replace(hide, identity_chance=1.0), seeded(1))
    assert torch.equal(same.input, same.target)
    silent = make_pair(raw, SAMPLES, RATE, dataclasses.replace(hide, silence_chance=1.0), seeded(1))
    assert not silent.input.any()
    assert not silent.target.any()


def test_silent_recordings_stay_finite_and_silent() -> None:
    config = AugmentConfig()
    raw = torch.zeros(4, raw_samples(SAMPLES, config))
    pair = make_pair(raw, SAMPLES, RATE, config, seeded())
    assert not pair.input.any()
    assert not pair.target.any()


def test_a_flattened_envelope_is_flatter_and_pauses_stay_pauses() -> None:
    audio = torch.sin(2 * math.pi * 440 * torch.arange(SAMPLES) / RATE)[None].repeat(2, 1)
    audio[:, : SAMPLES // 2] *= 0.1
    flat = flatten_envelope(audio, torch.tensor([[0.0], [1.0]]), 2)
    assert torch.allclose(flat[0], audio[0])
    halves = rms(flat[1].reshape(2, -1))
    assert (halves[1] / halves[0]).item() == pytest.approx(1.0, abs=0.1)
    audio[:, : SAMPLES // 2] = 0.0
    assert not flatten_envelope(audio, torch.ones(2, 1), 2)[:, : SAMPLES // 2 - 4096].any()


def test_saturation_leaves_soft_sounds_alone_and_bounds_loud_ones() -> None:
    audio = torch.sin(2 * math.pi * 440 * torch.arange(SAMPLES) / RATE)[None]
    soft, hard = saturate(audio, torch.tensor([[-40.0]])), saturate(audio, torch.tensor([[40.0]]))
    assert torch.allclose(soft, audio, atol=1e-3)
    # tanh at 40 dB over the root mean square: a square wave, whose root mean square is its peak.
    assert (rms(hard) / hard.abs().max()).item() == pytest.approx(1.0, abs=0.01)


def test_steady_tones_stand_still() -> None:
    tones = steady_tones(12, RATE, RATE, seeded(3))
    assert tones.shape == (12, RATE)
    assert torch.equal(tones, steady_tones(12, RATE, RATE, seeded(3)))
    halves = [rms(part) for part in tones.split(RATE // 2, dim=1)]
    torch.testing.assert_close(halves[0], halves[1], rtol=0.03, atol=0.0)
    level = 20 * torch.log10(rms(tones))
    assert level.min() > -43.0 and level.max() < -11.0
    strongest = torch.fft.rfft(tones).abs().argmax(dim=1)  # Hz, as the tones last a second
    assert int(strongest.min()) >= 59 and len(set(strongest.tolist())) > 8


@given(st.integers(0, 2**31), st.floats(0.1, 6.0))
@settings(max_examples=20, deadline=None)
def test_a_bent_pitch_strays_and_comes_back(seed: int, semitones: float) -> None:
    hertz = 300.0
    tone = torch.sin(2.0 * math.pi * hertz * torch.arange(SAMPLES) / RATE)[None].repeat(3, 1)
    bent = bend_pitch(tone, RATE, semitones, seeded(seed))
    assert torch.equal(bent[:, 0], tone[:, 0])
    assert torch.allclose(bent[:, -1], tone[:, -1], atol=0.01)
    # Between two crossings of zero lies half a period.
    widest, narrowest = 1.25 * semitones + 0.5, -1.25 * semitones - 0.5
    for row in bent:
        crossings = ((row[1:] * row[:-1]) < 0).nonzero()[:, 0].double()
        strays = 12.0 * torch.log2(RATE / (2.0 * crossings.diff()) / hertz)
        assert narrowest <= float(strays.min()) and float(strays.max()) <= widest
        assert abs(len(crossings) - 2.0 * hertz * SAMPLES / RATE) <= 2


def test_every_row_bends_its_own_way_and_again_alike() -> None:
    tone = torch.sin(0.05 * torch.arange(SAMPLES))[None].repeat(3, 1)
    bent = bend_pitch(tone, RATE, 2.0, seeded(4))
    assert torch.equal(bent, bend_pitch(tone, RATE, 2.0, seeded(4)))
    assert min(float((bent[i] - bent[j]).abs().max()) for i, j in ((0, 1), (1, 2), (0, 2))) > 0.1
