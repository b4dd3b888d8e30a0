"""What a body remembers is carried over when the style changes, and left alone while it stays."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from realtime.bundle import BOWED_CLIP  # noqa: E402
from realtime.spectral import SpectralSpec  # noqa: E402
from training.layers import GruState  # noqa: E402
from training.library import read_mono  # noqa: E402
from training.models.generator import Generator, GeneratorConfig  # noqa: E402
from training.models.memory import Memory  # noqa: E402
from training.models.traits import apart  # noqa: E402

SPEC = SpectralSpec()
STYLES = 4.0 * torch.eye(3)  # as far apart as styles come to lie
USUAL = torch.rand(3, 24, generator=torch.Generator().manual_seed(0)) - 0.5


@pytest.fixture
def memory() -> Memory:
    made = Memory(3, 24)
    made.usual.fit(STYLES, USUAL)
    return made


def carried(memory: Memory, hidden: Tensor, styles: Tensor) -> Tensor:
    """hidden [1, 24] through the moves of the style vector [hops, 3]."""
    for before, style in zip(styles[:-1, None], styles[1:, None], strict=True):
        hidden = memory(hidden, style, before, apart(style, before))
    return hidden


def line(start: Tensor, stop: Tensor, hops: int) -> Tensor:
    return start + torch.arange(hops + 1)[:, None] / hops * (stop - start)


def test_as_long_as_a_style_stays_nothing_is_forgotten(memory: Memory) -> None:
    hidden = torch.randn(1, 24)
    assert torch.equal(carried(memory, hidden, STYLES[:1].expand(100, -1)), hidden)


def test_at_the_start_there_is_nothing_to_forget(memory: Memory) -> None:
    hidden = torch.zeros(1, 24)
    assert not carried(memory, hidden, torch.stack([torch.zeros(3), STYLES[0]])).any()


def test_a_switch_ends_near_the_usual_state_of_the_new_style(memory: Memory) -> None:
    """From wherever: what one style remembers is not what another would."""
    for hidden in (USUAL[:1] + 0.3, USUAL[:1] - 0.3):
        near = carried(memory, hidden, line(STYLES[0], STYLES[1], 8)) - USUAL[1]
        assert float(near.abs().mean()) < 0.5 * 0.3


def test_a_slow_morph_forgets_nothing_and_moves_half_as_far_as_styles_lie_apart(memory: Memory) -> None:
    hidden = USUAL[:1] + 0.3
    expected = hidden + 0.5 * (USUAL[1] - USUAL[0])
    torch.testing.assert_close(carried(memory, hidden, line(STYLES[0], STYLES[1], 4_000)), expected, atol=2e-3, rtol=0)


def test_a_generator_finds_out_what_it_usually_remembers() -> None:
    """The mean of its states, the louder the more, in every style; one that does not recur has none."""
    torch.manual_seed(0)
    model = Generator(SPEC, GeneratorConfig(style_dim=3, band_count=12, hidden=16)).eval()
    audio = torch.from_numpy(read_mono(BOWED_CLIP, SPEC.sample_rate)[: 64 * SPEC.hop_samples])[None]
    with torch.no_grad():
        model.fit_memory(STYLES, audio)
        state, states = model.init_state(3), []
        for hop in audio.expand(3, -1).split(SPEC.hop_samples, dim=1):
            state = model(hop, STYLES, state)[1]
            assert isinstance(state.body, GruState)
            states.append(state.body.hidden)
    assert model.memory is not None
    found = model.memory.usual(STYLES)
    window = torch.from_numpy(SPEC.analysis_window()).float()
    padded = torch.nn.functional.pad(audio, (SPEC.analysis_window_samples - SPEC.hop_samples, 0))
    level = (padded.unfold(1, SPEC.analysis_window_samples, SPEC.hop_samples) * window).square().mean(dim=2).sqrt()[0]
    expected = (torch.stack(states) * (level / level.sum())[:, None, None]).sum(dim=0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    other = Generator(SPEC, dataclasses.replace(model.config, body="convolutional"))
    other.fit_memory(STYLES, audio)
    assert other.memory is None
