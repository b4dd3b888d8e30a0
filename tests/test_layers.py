"""Every streaming layer and the generator keep the streaming contract; the transforms are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    CausalFir,
    ChunkError,
    Envelope,
    Framer,
    Gru,
    Noise,
    OverlapAdd,
    RealDft,
)
from training.models.generator import SIGNALS, Generator, GeneratorConfig, band_matrix

SPEC = SpectralSpec()
HOP = SPEC.hop_samples
TINY = GeneratorConfig(style_dim=4, band_count=12, hidden=16)


@dataclass(frozen=True)
class _Pair:
    framer: Any
    overlap: Any


def audio(batch: int, samples: int, seed: int = 0) -> torch.Tensor:
    return 0.2 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed))


def fir() -> Streaming:
    layer = CausalFir(1, 128, 0.9)
    return Streaming(layer.init_state, layer, audio(3, 10 * HOP)[:, None], HOP, HOP, layer.latency_samples, 1)


def envelope() -> Streaming:
    layer = Envelope(2, HOP, 4)
    x = audio(6, 10 * HOP).reshape(3, 2, -1)
    # The level is a straight line within a hop, so its first sample waits for the last of the hop.
    return Streaming(layer.init_state, layer, x, HOP, HOP, layer.latency_samples, HOP)


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


def overlap_add() -> Streaming:
    layer = OverlapAdd(HOP)

    def step(x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        return layer(x.transpose(1, 2), state)

    # In frames: the head of a frame goes out with the frame itself.
    return Streaming(layer.init_state, step, audio(3 * 2 * HOP, 10).reshape(3, 2 * HOP, 10), 1, HOP, 0, 1)


def analysis_synthesis() -> Streaming:
    framer, dft, overlap = Framer(SPEC.analysis_window_samples, HOP, 1), RealDft(SPEC), OverlapAdd(HOP)

    def init_state(batch: int) -> _Pair:
        return _Pair(framer.init_state(batch), overlap.init_state(batch))

    def step(x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        frames, framed = framer(x[:, None], state.framer)
        tails = dft.inverse(dft(frames)).reshape(x.shape[0], -1, 2 * HOP)
        out, overlapped = overlap(tails, state.overlap)
        return out, _Pair(framed, overlapped)

    # Without a change in between, each sample depends on itself alone.
    return Streaming(init_state, step, audio(3, 12 * HOP), HOP, HOP, overlap.latency_samples, 1, tolerance=1e-5)


def generator() -> Streaming:
    torch.manual_seed(1)
    model = Generator(SPEC, TINY).eval()
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
        SPEC.latency_samples,
        tolerance=1e-5,
    )


@pytest.mark.parametrize("make", [fir, envelope, framer, gru, overlap_add, generator], ids=lambda make: make.__name__)
def test_streaming_contract(make: Callable[[], Streaming]) -> None:
    assert_streaming_contract(make())


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
    assert np.abs(correlation[1 : len(x) // 2]).max() < 0.01


def test_noise_stays_exact_at_the_end_of_its_period() -> None:
    noise = Noise(HOP)
    period = noise.primes[0] * noise.primes[1]
    start = type(noise.init_state(1))(torch.tensor([[float(period - 2)]]))
    late, after = noise(torch.zeros(1, 4 * HOP), start)
    fresh, _ = noise(torch.zeros(1, 2 * HOP), noise.init_state(1))
    assert torch.equal(late[:, 2 * HOP :], fresh)
    assert after.count.item() == 2.0


def test_dft_is_the_discrete_fourier_transform() -> None:
    dft = RealDft(SPEC)
    frames = audio(5, SPEC.analysis_window_samples)
    got = dft(frames).numpy()
    window, _ = SPEC.windows()
    expected = np.fft.fft(frames.numpy() * window)
    bins = (np.arange(17)[:, None] + 32 * np.arange(32)) % 1024
    np.testing.assert_allclose(got[..., :32], expected[:, bins].real, atol=2e-4)
    np.testing.assert_allclose(got[..., 32:], expected[:, bins].imag, atol=2e-4)
    np.testing.assert_allclose(dft.frequencies_hz, np.minimum(bins, 1024 - bins) * SPEC.sample_rate / 1024)
    assert dft.weights.sum() == pytest.approx(513 - 1, abs=1.01)


def test_analysis_and_synthesis_give_the_input_back_one_hop_later() -> None:
    layer = analysis_synthesis()
    x = audio(2, 40 * HOP)
    out, _ = layer.step(x, layer.init_state(2))
    assert layer.latency_samples == SPEC.stream_delay_samples == HOP
    assert float((out[:, HOP:] - x[:, :-HOP]).abs().max()) < 2e-6
    assert float(out[:, :HOP].abs().max()) < 1e-6


def test_fir_has_unit_gain_at_zero_frequency() -> None:
    layer = CausalFir(1, 128, 0.9)
    out, _ = layer(torch.ones(1, 1, 512), layer.init_state(1))
    assert out[0, 0, -1].item() == pytest.approx(1.0, abs=1e-5)


def test_envelope_of_a_steady_sine_is_its_root_mean_square() -> None:
    layer = Envelope(1, HOP, 4)
    sine = 0.5 * torch.sin(2 * torch.pi * 1500 * torch.arange(48_00) / 48_000)[None, None, : 37 * HOP]
    level, _ = layer(sine, layer.init_state(1))
    assert level[0, 0, -HOP:].mean().item() == pytest.approx(0.5 / 2**0.5, rel=1e-3)


def test_bands_add_up_to_one_everywhere() -> None:
    matrix = band_matrix(64, np.linspace(0, 24_000, 513))
    np.testing.assert_allclose(matrix.sum(axis=0), 1.0)
    assert (matrix >= 0).all() and matrix.shape == (64, 513)


def test_silence_in_is_silence_out_whatever_the_style() -> None:
    torch.manual_seed(0)
    model = Generator(SPEC, TINY).eval()
    with torch.no_grad():
        model.leave.bias.fill_(3.0)
        out, _ = model(torch.zeros(2, 50 * HOP), 5 * torch.randn(2, 4), model.init_state(2))
    assert float(out.abs().max()) < 10 ** (-70 / 20)


def test_output_follows_the_level_of_the_input() -> None:
    torch.manual_seed(0)
    model = Generator(SPEC, TINY).eval()
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


def test_signals_scale_with_the_input() -> None:
    model = Generator(SPEC, TINY)
    x = audio(1, 30 * HOP)
    one, *_ = model._signals(x, model.init_state(1))
    half, *_ = model._signals(0.5 * x, model.init_state(1))
    assert one.shape[1] == len(SIGNALS)
    torch.testing.assert_close(half[..., 5 * HOP :], 0.5 * one[..., 5 * HOP :], rtol=2e-2, atol=2e-4)


@settings(max_examples=40, deadline=None)
@given(hop=st.sampled_from([16, 32, 64, 128, 256]), multiple=st.integers(2, 16))
def test_windows_reconstruct_for_every_geometry(hop: int, multiple: int) -> None:
    spec = SpectralSpec(48_000, hop, hop * multiple, 2 * hop)
    analysis, synthesis = spec.windows()
    product = analysis[-2 * hop :] * synthesis
    np.testing.assert_allclose(product[:hop] + product[hop:], 1.0, atol=1e-12)
    assert spec.latency_samples == 2 * hop and spec.stream_delay_samples == hop
    assert np.isfinite(synthesis).all() and synthesis.max() < 4.0
