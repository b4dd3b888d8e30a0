"""Which styles have a trait, and gains that take their time in those that want it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor  # noqa: E402

from export.verify import run_torch  # noqa: E402
from export.writer import NamedStyle, write_model  # noqa: E402
from realtime.bundle import BOWED_CLIP, Card, read_bundle  # noqa: E402
from realtime.spectral import SpectralSpec  # noqa: E402
from realtime.stream import Stream  # noqa: E402
from tests.streaming_contract import Streaming, assert_streaming_contract  # noqa: E402
from training.library import read_mono  # noqa: E402
from training.models.generator import Generator, GeneratorConfig  # noqa: E402
from training.models.traits import TRAITS, Ballistics, Traits, apart  # noqa: E402

HOP_SECONDS, ATTACK_S, ATTACK_DB, RELEASE_S = 1.0 / 375.0, 0.05, 7.0, 0.1
STYLES = torch.eye(3)
BOWED, STRUCK, PLAIN = STYLES[:, None]
CARD = Card("", "restore", "", "2026-11-30", 0, 0.0, (), {}, ())


ATTACKS, RELEASES = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])  # of these three styles


@pytest.fixture
def ballistics() -> Ballistics:
    return Ballistics(HOP_SECONDS, ATTACK_S, ATTACK_DB, RELEASE_S)


def settled(
    ballistics: Ballistics,
    gains: Tensor,
    style: Tensor,
    state: Any = None,
    level: Tensor | None = None,
    before: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """gains [n] of one channel, level [n] of what is played, steady if None -> gains [n] and the state after them.

    ``style`` [1, 3] is a mix of the three, after ``before``, the same if None.
    """
    played = torch.zeros_like(gains) if level is None else level
    moved = apart(style, torch.zeros_like(style) if state is None else style if before is None else before)
    shares = [torch.matmul(style, wanted[:, None]) for wanted in (ATTACKS, RELEASES)]
    state = state or ballistics.init_state(1, 1)
    out, state = ballistics(gains[None, :, None], played[None, :, None], *shares, moved, state)
    return out[0, :, 0], state


def step(before: float, after: float, hops: int = 375) -> Tensor:
    """A second at one gain, and a second at the other."""
    return torch.tensor([before, after]).repeat_interleave(hops)


def test_traits_are_told_apart_by_vectors_that_are_learned() -> None:
    vectors = torch.randn(17, 16, generator=torch.Generator().manual_seed(0))
    traits = Traits(16)
    assert not traits(vectors).any()
    wanted = {"oscillator": [row == 5 for row in range(17)], "slow_release": [row in (3, 8) for row in range(17)]}
    traits.fit(vectors, wanted)
    expected = [wanted.get(name, [False] * 17) for name in TRAITS]
    assert torch.equal(traits(vectors).round(decimals=3), torch.tensor(expected).T.float())


def test_blends_have_some_of_a_trait_and_an_overdone_style_keeps_it() -> None:
    traits = Traits(3)
    traits.fit(STYLES, {TRAITS[0]: [True, False, False]})
    blended, overdone = torch.tensor([[0.5, 0.5, 0.0], [1.15, -0.1, -0.1]])
    assert traits(blended[None])[0].tolist() == pytest.approx([0.5, 0.0, 0.0], abs=0.01)
    assert traits(overdone[None])[0].tolist() == [1.0, 0.0, 0.0]


def test_gains_keep_the_streaming_contract(ballistics: Ballistics) -> None:
    heard = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0))

    def in_time(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        half, still = (torch.full((len(x), 1), number) for number in (0.5, 0.0))
        gains, level = x.transpose(1, 2).split([5, 1], dim=2)
        out, state = ballistics(gains, level, half, half, still, state)
        return out.transpose(1, 2), state

    def init_state(batch: int) -> Any:
        return ballistics.init_state(batch, 5)

    assert_streaming_contract(Streaming(init_state, in_time, heard, 1, 1, 0, 1))


@settings(max_examples=20, deadline=None)
@given(low=st.floats(-9.0, -0.5), rise=st.floats(0.1, 0.8))
def test_a_rise_takes_the_attack_time_and_a_fall_the_release_time(low: float, rise: float) -> None:
    ballistics = Ballistics(HOP_SECONDS, ATTACK_S, ATTACK_DB, RELEASE_S)
    for style, seconds, before, after in ((BOWED, ATTACK_S, low, low + rise), (STRUCK, RELEASE_S, low + rise, low)):
        out, _ = settled(ballistics, step(before, after), style)
        torch.testing.assert_close(out[:375], torch.full((375,), before))
        hops = torch.arange(1, 376) * HOP_SECONDS
        torch.testing.assert_close(out[375:], after + (before - after) * torch.exp(-hops / seconds), atol=1e-3, rtol=0)


def test_a_slow_attack_holds_back_half_of_a_pluck_and_a_slow_release_nothing_of_it(ballistics: Ballistics) -> None:
    steady, plucked = torch.zeros(750), step(-3.0, -2.0)
    held, _ = settled(ballistics, steady, BOWED, level=plucked)
    hops = torch.arange(1, 376) * HOP_SECONDS
    torch.testing.assert_close(held[375:], -0.5 * torch.exp(-hops / ATTACK_S), atol=1e-3, rtol=0)
    assert not held[:375].any()
    released = step(-2.0, -3.0)
    for style, level in ((BOWED, released), (STRUCK, plucked), (STRUCK, released), (PLAIN, plucked)):
        assert not settled(ballistics, steady, style, level=level)[0].any()


def test_what_begins_in_silence_is_heard_at_once(ballistics: Ballistics) -> None:
    """However far it rises, no more than a few dB are held back, and after a third of a second nothing is."""
    held, _ = settled(ballistics, step(-9.0, 3.0), BOWED, level=step(-8.0, 0.0))
    missing_db = (3.0 - held[375:]) * 20.0 / np.log(10.0)
    assert float(missing_db.max()) == pytest.approx(ATTACK_DB, abs=1e-4)
    assert float(missing_db[round(0.3 / HOP_SECONDS)]) < 0.5


def test_the_other_way_and_in_other_styles_gains_move_at_once(ballistics: Ballistics) -> None:
    rise, fall = step(-2.0, 1.0), step(1.0, -2.0)
    for style, gains in ((BOWED, fall), (STRUCK, rise), (PLAIN, rise), (PLAIN, fall)):
        torch.testing.assert_close(settled(ballistics, gains, style)[0], gains)


def test_gains_of_another_style_owe_nothing_to_those_of_the_one_before(ballistics: Ballistics) -> None:
    """Where a new style begins is no rise and no fall of the old one's."""
    for before, after in ((STRUCK, BOWED), (BOWED, STRUCK)):
        _, state = settled(ballistics, torch.full((375,), -2.0), before)
        for gain in (-9.0, 1.0):
            gains = torch.full((375,), gain)
            torch.testing.assert_close(settled(ballistics, gains, after, state, before=before)[0], gains)


def test_what_is_held_back_at_a_switch_comes_back_without_a_jump(ballistics: Ballistics) -> None:
    """While the style vector moves, as it does when styles cross-fade, and sooner than the attack time."""
    moving = torch.linspace(0.0, 1.0, 9)[1:, None] * (PLAIN - BOWED) + BOWED
    gains = step(-2.0, -1.4)[:377]  # two hops after a rise, most of which is held back
    _, state = settled(ballistics, gains, BOWED)
    heard, before = [], BOWED
    for style in moving[:, None]:
        out, state = settled(ballistics, gains[-1:], style, state, before=before)
        heard.append(float(out))
        before = style
    assert max(np.diff(heard)) < 0.2 and heard[-1] == pytest.approx(-1.4, abs=0.01)


def test_real_playing_swells_in_one_style_and_the_graph_says_the_same(tmp_path: Any) -> None:
    """A violin in three styles, hop by hop; the third sounds as by a model without traits."""
    torch.manual_seed(0)
    spec = SpectralSpec()
    model = Generator(spec, GeneratorConfig(style_dim=4, band_count=12, hidden=16), ["slow_attack", "slow_release"])
    vectors = np.eye(3, 4, dtype=np.float32)
    wanted = {"slow_attack": [True, False, False], "slow_release": [False, True, False]}
    model.eval().fit_traits(torch.from_numpy(vectors), wanted)
    with torch.no_grad():
        model.leave.weight.mul_(30.0)  # gains that move
    styles = [NamedStyle(name, name, row, vectors[row]) for row, name in enumerate(("strings", "harp", "guitar"))]
    result = write_model(model, spec, styles, CARD, tmp_path / "traits.onnx", "traits", verify_hops=600)
    assert result.largest_difference < 1e-4 and not result.without_cuda_kernel
    audio = read_mono(BOWED_CLIP, spec.sample_rate)[: spec.sample_rate]
    three = np.stack([audio] * 3)
    stream = Stream(read_bundle(tmp_path / "traits.onnx"), channels=3)
    stream.style[:] = vectors
    made = stream.play(three)
    of_hops = torch.from_numpy(vectors)[None].expand(1_000, -1, -1)
    expected = run_torch(model, torch.from_numpy(three), of_hops, spec.hop_samples)
    np.testing.assert_allclose(made, expected.numpy(), atol=1e-4)
    torch.manual_seed(0)
    without = Generator(spec, model.config).eval()
    without.load_state_dict(model.state_dict())
    plain = run_torch(without, torch.from_numpy(three), of_hops, spec.hop_samples).numpy()
    np.testing.assert_allclose(made[2], plain[2], atol=2e-5)
    loudness = np.sqrt(np.square(made - plain).mean(axis=1)) / np.sqrt(np.square(plain).mean(axis=1))
    assert loudness[0] > 0.02 and loudness[1] > 0.02
    for row, sign in ((0, -1.0), (1, 1.0)):  # a slow rise is quieter, a slow fall louder
        assert sign * np.log(np.square(made[row]).mean() / np.square(plain[row]).mean()) > 0.0
