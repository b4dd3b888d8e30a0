"""Every streaming layer and the generator keep the streaming contract; the transforms are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realtime.spectral import SpectralSpec
from tests.streaming_contract import Streaming, assert_streaming_contract
from training.layers import (
    CausalConvolutions,
    ChunkError,
    Envelope,
    EnvelopeState,
    FilterBank,
    Framer,
    FramerState,
    Gru,
    HopLowpass,
    Lstm,
    Noise,
    RealDft,
    band_curves,
)
from training.models.generator import SIGNALS, Generator, GeneratorConfig, band_matrix
from training.models.kinds import make_generator

SPEC = SpectralSpec()
HOP = SPEC.hop_samples
BANDS = band_matrix(24, np.fft.rfftfreq(SPEC.analysis_window_samples, 1 / SPEC.sample_rate))
TINY = GeneratorConfig(style_dim=4, band_count=12, hidden=16)
KINDS = [
    replace(TINY, body="lstm"),
    replace(TINY, body="convolutional"),
    replace(TINY, body="unet", band_count=16),
    replace(TINY, body="unet", band_count=32, scale="linear", signals=("input",)),
    replace(TINY, signals=("input",)),
    replace(TINY, signals=("pulses", "noise")),
    replace(TINY, answer="spectrum"),
    replace(TINY, answer="spectrum", body="convolutional"),
    replace(TINY, answer="autoencoder", code_size=3),
    replace(TINY, answer="autoencoder", body="convolutional"),
]


@dataclass(frozen=True)
class _Pair:
    framer: Any
    bank: Any


def spec_of(config: GeneratorConfig) -> SpectralSpec:
    return SpectralSpec(synthesis_window_samples=2 * HOP) if config.answer == "spectrum" else SPEC


def audio(batch: int, samples: int, seed: int = 0) -> torch.Tensor:
    return 0.2 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed))


def lowpass() -> Streaming:
    framer, layer = Framer(SPEC.analysis_window_samples, HOP, 1), HopLowpass(HOP, 64, 0.9)

    def step(x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        frames, state = framer(x[:, None], state)
        return layer(frames[:, :, 0]), state

    return Streaming(framer.init_state, step, audio(3, 10 * HOP), HOP, HOP, layer.latency_samples, 1)


@dataclass(frozen=True)
class Framed:
    framer: FramerState
    envelope: EnvelopeState


def envelope() -> Streaming:
    framer, layer = Framer(SPEC.analysis_window_samples, HOP, 1), Envelope(SPEC.analysis_window(), HOP, 4 * HOP)

    def init_state(batch: int) -> Framed:
        return Framed(framer.init_state(batch), layer.init_state(batch))

    def step(x: torch.Tensor, state: Framed) -> tuple[torch.Tensor, Framed]:
        frames, framed = framer(x[:, None], state.framer)
        level, reached = layer(frames[:, :, 0], state.envelope)
        return level, Framed(framed, reached)

    # The level is a straight line within a hop, so its first sample waits for the last of the hop.
    return Streaming(init_state, step, audio(3, 10 * HOP), HOP, HOP, layer.latency_samples, HOP)


def framer() -> Streaming:
    layer = Framer(SPEC.analysis_window_samples, HOP, 2)

    def step(x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        frames, state = layer(x, state)
        return frames.permute(0, 2, 3, 1), state

    return Streaming(layer.init_state, step, audio(6, 10 * HOP).reshape(3, 2, -1), HOP, 1, layer.latency_samples, HOP)


def gru() -> Streaming:
    layer = Gru(8, 16)

    def step(x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        y, state = layer(x.permute(2, 0, 1), state)
        return y.permute(1, 2, 0), state

    return Streaming(layer.init_state, step, audio(24, 40).reshape(3, 8, 40), 1, 1, layer.latency_samples, 1)


def lstm() -> Streaming:
    layer = Lstm(8, 16)

    def step(x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        y, state = layer(x.permute(2, 0, 1), state)
        return y.permute(1, 2, 0), state

    return Streaming(layer.init_state, step, audio(24, 40).reshape(3, 8, 40), 1, 1, layer.latency_samples, 1)


def convolutions() -> Streaming:
    torch.manual_seed(1)
    layer = CausalConvolutions(8, (1, 2, 4))

    def step(x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        y, state = layer(x.permute(2, 0, 1), state)
        return y.permute(1, 2, 0), state

    return Streaming(layer.init_state, step, audio(24, 40).reshape(3, 8, 40), 1, 1, layer.latency_samples, 1)


def filter_bank(gains: Callable[[int, int], torch.Tensor], signals: int = 1) -> Streaming:
    """``gains(first hop, hops)`` in nepers [n, signals, bands]; every signal is the input."""
    framer, dft = Framer(SPEC.analysis_window_samples, HOP, 1), RealDft(SPEC)
    bank = FilterBank(SPEC, dft, signals, BANDS)
    done = 0

    def init_state(batch: int) -> _Pair:
        nonlocal done
        done = 0
        return _Pair(framer.init_state(batch), bank.init_state(batch))

    def step(x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        nonlocal done
        frames, framed = framer(x[:, None], state.framer)
        batch, hops = frames.shape[:2]
        spectra = dft(frames).reshape(batch, hops, 1, 2, -1).expand(-1, -1, signals, -1, -1)
        now = gains(done, hops).expand(batch, -1, -1, -1)
        done += hops
        out, banked = bank(spectra, now, state.bank)
        return out, _Pair(framed, banked)

    return Streaming(
        init_state, step, audio(3, 12 * HOP), HOP, HOP, bank.latency_samples, SPEC.latency_samples, tolerance=1e-5
    )


def unchanged(first: int, hops: int) -> torch.Tensor:
    del first
    return torch.zeros(hops, 1, len(BANDS))


def steady_bank() -> Streaming:
    return filter_bank(unchanged)


def generator(config: GeneratorConfig = TINY) -> Streaming:
    torch.manual_seed(1)
    spec = spec_of(config)
    model = make_generator(spec, config).eval()
    style = torch.randn(1, TINY.style_dim)

    def step(x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        return model(x, style.expand(x.shape[0], -1), state)

    return Streaming(
        model.init_state,
        step,
        audio(3, 12 * HOP),
        HOP,
        HOP,
        model.latency_samples,
        spec.latency_samples,
        tolerance=1e-5,
    )


@pytest.mark.parametrize(
    "make", [lowpass, envelope, framer, gru, lstm, convolutions, steady_bank, generator], ids=lambda make: make.__name__
)
def test_streaming_contract(make: Callable[[], Streaming]) -> None:
    assert_streaming_contract(make())


@pytest.mark.parametrize("config", KINDS, ids=repr)
def test_streaming_contract_of_every_kind_of_generator(config: GeneratorConfig) -> None:
    assert_streaming_contract(generator(config))


def test_noise_is_the_same_whole_and_in_chunks_white_and_without_a_mean() -> None:
    noise = Noise(HOP)
    like = torch.zeros(2, 4000 * HOP)
    whole, _ = noise(like, noise.init_state(2))
    state = noise.init_state(2)
    pieces = []
    for piece in like.split(500 * HOP, dim=1):
        out, state = noise(piece, state)
        pieces.append(out)
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(whole[0], whole[1])
    x = whole[0].double().numpy()
    assert abs(x.mean()) < 2e-3 and abs(x.var() - 1 / 3) < 2e-3
    power = np.abs(np.fft.rfft(x)) ** 2
    smooth = power[1:].reshape(-1, 4000).mean(axis=1)
    assert smooth.min() / smooth.mean() > 0.85 and smooth.max() / smooth.mean() < 1.15
    correlation = np.fft.irfft(power) / (len(x) * x.var())
    assert np.abs(correlation[1 : len(x) // 2]).max() < 0.02


def test_noise_stays_exact_at_the_end_of_its_period() -> None:
    noise = Noise(HOP)
    start = type(noise.init_state(1))(torch.tensor([[float(noise.period_hops - 2)]]))
    late, after = noise(torch.zeros(1, 4 * HOP), start)
    fresh, _ = noise(torch.zeros(1, 2 * HOP), noise.init_state(1))
    assert torch.equal(late[:, 2 * HOP :], fresh)
    assert after.count.item() == 2.0


def test_dft_is_the_discrete_fourier_transform() -> None:
    dft = RealDft(SPEC)
    frames = audio(5, SPEC.analysis_window_samples)
    got = dft(frames)
    expected = np.fft.rfft(frames.numpy())
    np.testing.assert_allclose(got.numpy(), np.stack([expected.real, expected.imag], axis=1), atol=2e-4)
    assert got.shape[-1] == SPEC.analysis_window_samples // 2 + 1
    np.testing.assert_allclose(dft.inverse(got).numpy(), frames[:, -HOP:].numpy(), atol=1e-5)


def test_the_exported_products_are_the_same_transform_in_their_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    dft = RealDft(SPEC)
    frames = audio(5, SPEC.analysis_window_samples)
    spectra, back = dft(frames), dft.inverse(dft(frames))
    weights = np.random.default_rng(0).uniform(size=(spectra.shape[-1], 3))
    power = spectra.square().sum(dim=1).double().numpy()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    products = dft(frames).flatten(2)
    bins = (np.arange(17)[:, None] + 32 * np.arange(32)).flatten() % 1024
    expected = np.fft.fft(frames.double().numpy())[:, bins]
    np.testing.assert_allclose(products.numpy(), np.stack([expected.real, expected.imag], axis=1), atol=2e-4)
    usual = torch.fft.rfft(frames.double())
    ordered = dft.product_order(usual)
    np.testing.assert_allclose(ordered.numpy(), np.stack([expected.real, expected.imag], axis=1), atol=1e-9)
    torch.testing.assert_close(dft.usual_order(ordered), usual)
    torch.testing.assert_close(dft.inverse(products), back, atol=1e-5, rtol=0)
    shared = products.square().sum(dim=1).double().numpy() @ dft.product_shares(weights)
    np.testing.assert_allclose(shared, power @ weights, rtol=1e-4)


def response(gains: np.ndarray) -> np.ndarray:
    """The filter [bins] of gains in nepers [bands]."""
    return np.exp(gains @ band_curves(SPEC, BANDS))


def test_the_same_gain_in_every_band_is_a_gain_and_no_filter() -> None:
    np.testing.assert_allclose(response(np.full(len(BANDS), 0.7)), np.exp(0.7), rtol=1e-9)


def test_filters_have_the_level_that_gains_ask_for_and_the_least_phase() -> None:
    random = np.random.default_rng(0)
    centres = np.linspace(0.0, 1.0, len(BANDS))
    for _ in range(20):
        gains = random.normal(size=4) @ np.cos(np.pi * np.arange(4)[:, None] * centres) + random.normal(size=len(BANDS))
        made = response(gains)
        asked = gains @ BANDS
        assert np.abs(np.log(np.abs(made)) - asked).mean() < 0.25  # fine detail is smoothed
        for causal in (np.fft.irfft(made), np.fft.irfft(1.0 / made)):
            late = np.square(causal[-HOP:]).sum() / np.square(causal).sum()
            assert late < 1e-5  # nothing comes before its cause, and it dies away within the frame


def test_gains_of_zero_nepers_give_the_input_back_at_once() -> None:
    layer = steady_bank()
    x = audio(2, 40 * HOP)
    out, _ = layer.step(x, layer.init_state(2))
    assert layer.latency_samples == SPEC.stream_delay_samples == 0
    assert float((out[:, HOP:] - x[:, HOP:]).abs().max()) < 5e-6


def test_steady_gains_leave_nothing_at_the_hop_rate() -> None:
    shape = torch.rand(1, 1, len(BANDS), generator=torch.Generator().manual_seed(3)) * 3
    layer = filter_bank(lambda _, hops: shape.expand(hops, -1, -1))
    time_s = torch.arange(48_000 // HOP * HOP) / SPEC.sample_rate
    out, _ = layer.step(0.3 * torch.sin(2 * torch.pi * 220 * time_s)[None], layer.init_state(1))
    steady = out[0, -32_000:].double().numpy() * np.blackman(32_000)
    decibels = 20 * np.log10(np.abs(np.fft.rfft(steady)) / np.abs(np.fft.rfft(steady)).max() + 1e-12)
    assert decibels[[round(f * 32_000 / 48_000) for f in (155, 595, 375, 750)]].max() < -100


def test_a_bank_of_several_signals_is_the_sum_of_their_banks() -> None:
    random = torch.Generator().manual_seed(5)
    moving = torch.rand(12, 3, len(BANDS), generator=random)
    x = audio(1, 12 * HOP)

    def heard(gains: torch.Tensor) -> torch.Tensor:
        layer = filter_bank(lambda first, hops: gains[first : first + hops], gains.shape[1])
        return layer.step(x, layer.init_state(1))[0]

    torch.testing.assert_close(heard(moving), sum(heard(moving[:, i : i + 1]) for i in range(3)), atol=1e-5, rtol=0)


def test_lowpass_has_unit_gain_at_zero_frequency() -> None:
    out = HopLowpass(HOP, 64, 0.9)(torch.ones(1, 1, SPEC.analysis_window_samples))
    np.testing.assert_allclose(out.numpy(), 1.0, atol=1e-5)


def test_envelope_of_a_steady_sine_is_its_root_mean_square() -> None:
    framer, layer = Framer(SPEC.analysis_window_samples, HOP, 1), Envelope(SPEC.analysis_window(), HOP, 4 * HOP)
    for hertz, ripple in ((110.0, 2e-2), (220.0, 2e-3), (1500.0, 1e-4)):
        sine = 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(60 * HOP) / 48_000)[None, None]
        frames, _ = framer(sine, framer.init_state(1))
        level, _ = layer(frames[:, :, 0], layer.init_state(1))
        steady = level[0, 10 * HOP :] * 2**1.5
        assert float((steady - 1.0).abs().max()) < ripple, hertz


def test_envelope_is_not_late_at_an_attack() -> None:
    framer, layer = Framer(SPEC.analysis_window_samples, HOP, 1), Envelope(SPEC.analysis_window(), HOP, 4 * HOP)
    sine = torch.sin(2 * torch.pi * 1500 * torch.arange(20 * HOP) / 48_000)[None, None]
    frames, _ = framer(sine, framer.init_state(1))
    level, _ = layer(frames[:, :, 0], layer.init_state(1))
    assert float(level[0, 4 * HOP - 1]) > 0.49  # half the energy, four hops after the onset
    assert not layer(torch.zeros(1, 3, SPEC.analysis_window_samples), layer.init_state(1))[0].gt(1.01e-5).any()


def test_bands_add_up_to_one_everywhere() -> None:
    matrix = band_matrix(64, np.linspace(0, 24_000, 513))
    np.testing.assert_allclose(matrix.sum(axis=0), 1.0)
    assert (matrix >= 0).all() and matrix.shape == (64, 513)


def test_linear_bands_are_evenly_spaced_and_add_up_to_one() -> None:
    matrix = band_matrix(5, np.linspace(0, 24_000, 9), "linear")
    np.testing.assert_allclose(matrix.sum(axis=0), 1.0)
    assert matrix.argmax(axis=1).tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("config", [TINY, *KINDS], ids=repr)
def test_silence_in_is_silence_out_whatever_the_style(config: GeneratorConfig) -> None:
    torch.manual_seed(0)
    model = make_generator(spec_of(config), config).eval()
    with torch.no_grad():
        torch.nn.init.constant_(model.get_parameter(f"{'body.' * (config.body == 'unet')}leave.bias"), 3.0)
        out, _ = model(torch.zeros(2, 50 * HOP), 5 * torch.randn(2, 4), model.init_state(2))
    assert float(out.abs().max()) < 10 ** (-70 / 20)


@pytest.mark.parametrize("config", [TINY, *KINDS], ids=repr)
def test_output_follows_the_level_of_the_input(config: GeneratorConfig) -> None:
    torch.manual_seed(0)
    model = make_generator(spec_of(config), config).eval()
    x, style = audio(1, 100 * HOP), torch.randn(1, 4)
    with torch.no_grad():
        loud, _ = model(x, style, model.init_state(1))
        quiet, _ = model(0.25 * x, style, model.init_state(1))
    ratio = (loud.square().mean() / quiet.square().mean()).sqrt().item()
    assert 3.0 < ratio < 5.5


@pytest.mark.parametrize("samples", [0, 1, HOP - 1, HOP + 1])
def test_a_chunk_that_is_no_whole_hop_is_refused_with_the_layer_named(samples: int) -> None:
    model = Generator(SPEC, TINY)
    with pytest.raises(ChunkError, match=r"Generator: got \d+ samples, needs a multiple of 128; buffering"):
        model(torch.zeros(1, samples), torch.zeros(1, 4), model.init_state(1))


def test_excitations_scale_with_the_input() -> None:
    model = Generator(SPEC, TINY)
    x = audio(1, 30 * HOP)
    start = model.init_state(1)
    frames, _ = model.framer(x[:, None], start.framer)
    frames = frames[:, :, 0]
    level, noise = model.envelope.init_state(1), model.noise.init_state(1)
    one, *_ = model._excite(x, frames, 0.5 * x, level, noise)
    half, *_ = model._excite(0.5 * x, 0.5 * frames, 0.25 * x, level, noise)
    assert one.shape[1] == len(SIGNALS) - 1
    torch.testing.assert_close(half[..., 5 * HOP :], 0.5 * one[..., 5 * HOP :], rtol=2e-2, atol=2e-4)


@settings(max_examples=40, deadline=None)
@given(hop=st.sampled_from([16, 32, 64, 128, 256]), multiple=st.integers(2, 16), hops=st.integers(1, 2))
def test_the_analysis_window_is_smooth_for_every_geometry(hop: int, multiple: int, hops: int) -> None:
    spec = SpectralSpec(48_000, hop, hop * multiple, hops * hop)
    window = spec.analysis_window()
    assert len(window) == hop * multiple and window.max() <= 1.0 and window.min() > 0.0
    assert np.abs(np.diff(window, prepend=0.0, append=0.0)).max() < 4.0 / hop
    assert spec.latency_samples == hops * hop and spec.stream_delay_samples == (hops - 1) * hop
