"""The streaming recogniser keeps the streaming contract, hears no loudness, and is the same file in onnxruntime."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from realtime.spectral import SpectralSpec  # noqa: E402
from tests.streaming_contract import Streaming, assert_streaming_contract  # noqa: E402
from training.models.streaming_recogniser import (  # noqa: E402
    StreamingRecogniser,
    StreamingRecogniserConfig,
    mel_weights,
)

SPEC = SpectralSpec(sample_rate=8_000, hop_samples=128, analysis_window_samples=256)
TINY = StreamingRecogniserConfig(
    band_count=16, highest_hz=4_000.0, channels=(4, 6, 6, 8), feature_count=8, embedding_dim=4, window_seconds=0.2
)
STYLES = 3


def recogniser(seed: int = 0) -> StreamingRecogniser:
    """Untrained, but as if batches had been seen: whatever normalisation does in use, it does here."""
    torch.manual_seed(seed)
    net = StreamingRecogniser(SPEC, TINY, STYLES)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.get_buffer("running_mean").uniform_(-0.2, 0.2)
            module.get_buffer("running_var").uniform_(0.1, 0.5)
    return net.eval()


def playing(batch: int, hops: int, seed: int = 0) -> Tensor:
    noise = torch.randn(batch, hops * SPEC.hop_samples, generator=torch.Generator().manual_seed(seed))
    return noise * torch.linspace(0.01, 0.5, noise.shape[1])


def said(net: StreamingRecogniser, audio: Tensor) -> Tensor:
    """Probabilities and embedding after each hop [batch, n, styles + embedding_dim]."""
    with torch.no_grad():
        return torch.cat(net(audio, net.init_state(len(audio)))[0], dim=2)


def test_the_recogniser_keeps_the_streaming_contract() -> None:
    net = recogniser()

    def step(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        both, state = net(x, state)
        return torch.cat(both, dim=2).transpose(1, 2), state

    assert_streaming_contract(
        Streaming(
            net.init_state, step, 8.0 * playing(2, 20), SPEC.hop_samples, 1, net.latency_samples, SPEC.hop_samples
        )
    )


def test_what_lies_further_back_than_the_window_is_forgotten() -> None:
    net = recogniser()
    frames = 7 + -(-SPEC.analysis_window_samples // SPEC.hop_samples)  # what convolutions and frames look back, in hops
    late = playing(1, 3 * net.window_hops + frames)
    one, other = (torch.cat([playing(1, 20, seed), late], dim=1) for seed in (1, 2))
    assert not torch.allclose(said(net, one)[:, 20], said(net, other)[:, 20], atol=1e-3)
    assert torch.allclose(said(net, one)[:, -1], said(net, other)[:, -1], atol=1e-5)


@pytest.mark.parametrize("gain_db", [-40.0, -6.0, 12.0])
def test_loudness_is_not_heard(gain_db: float) -> None:
    net, audio = recogniser(), playing(1, 20)
    assert torch.allclose(said(net, audio * 10.0 ** (gain_db / 20.0)), said(net, audio), atol=1e-4)


def test_silence_after_playing_changes_little_and_never_gives_bad_numbers() -> None:
    net, audio = recogniser(), playing(1, 8)
    silent = torch.zeros(1, 200 * SPEC.hop_samples)
    both = said(net, torch.cat([audio, silent], dim=1))
    assert bool(both.isfinite().all())
    assert torch.equal(both[:, -1], said(net, silent)[:, -1])


def test_probabilities_add_up_to_one_and_a_temperature_evens_them() -> None:
    net, audio = recogniser(), playing(2, 10)
    (cold, _), _ = net(audio, net.init_state(2))
    net.temperature.fill_(10.0)
    (warm, _), _ = net(audio, net.init_state(2))
    assert torch.allclose(warm.sum(dim=2), torch.ones(2, 10), atol=1e-6)
    assert torch.equal(warm.argmax(dim=2), cold.argmax(dim=2)) and bool((warm.amax(dim=2) < cold.amax(dim=2)).all())


def test_every_band_hears_something_and_what_it_hears_adds_up_to_one() -> None:
    config = StreamingRecogniserConfig()
    for size in (1024, 4096):
        weights = mel_weights(48_000, size, config)
        assert weights.shape == (size // 2 + 1, 64)
        assert weights.sum(axis=0) == pytest.approx(np.ones(64))
        heard_hz = weights.argmax(axis=0) * 48_000 / size
        assert np.all(np.diff(heard_hz) >= 0) and heard_hz[0] < 120 and 11_000 < heard_hz[-1] < 12_000


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"analysis_window_samples": 512}, "analysis_window_samples: must be the square of a multiple of 4"),
        ({"hop_samples": 64, "synthesis_window_samples": 64, "analysis_window_samples": 4096}, "hop_samples: must be"),
        ({"sample_rate": 6_000}, "highest_hz: must be at most half the sample rate of 6000"),
    ],
)
def test_a_geometry_that_it_cannot_have_is_refused_by_name(change: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        StreamingRecogniser(replace(SPEC, **change), TINY, STYLES)
