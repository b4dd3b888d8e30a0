"""The critic's losses by hand, and what critic and encoder hear: timbre, not loudness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from training.models.critic import Critic, Verdict, critic_loss, deception_loss, feature_loss  # noqa: E402
from training.models.encoder import StyleEncoder  # noqa: E402
from training.models.spectrogram import RelativeMel  # noqa: E402

RATE = 44_100  # of the clips
CLIPS = Path(__file__).parent / "data"


def scored(*rows: tuple[float, float]) -> Verdict:
    """Two resolutions of the same scores of two styles, the second in two places; one layer of ones."""
    scores = torch.tensor(rows)[..., None]
    return Verdict((scores, scores.expand(-1, -1, 2)), ((torch.ones(len(rows), 1, 2, 3),),) * 2)


def note(name: str, seconds: float = 1.0) -> Tensor:
    audio, rate = soundfile.read(CLIPS / f"{name}.flac", dtype="float32", frames=round(seconds * RATE))
    assert rate == RATE
    return torch.from_numpy(audio if audio.ndim == 1 else audio.mean(axis=1))[None]


def test_the_critic_wants_real_above_one_and_everything_else_below_minus_one() -> None:
    style = torch.tensor([0, 1])
    sure = scored((1.0, -1.0), (-3.0, 2.0))  # of both real rows
    false = scored((-1.0, 9.0), (9.0, -2.0))  # only the score of the style meant counts
    assert critic_loss(sure, style, false, style).tolist() == [0.0, 0.0]
    assert critic_loss(scored((0.0, -1.0), (-1.0, 1.0)), style, false, style).tolist() == [1.0, 0.0]
    assert critic_loss(scored((1.0, 0.5), (-1.0, 1.0)), style, false, style).tolist() == [1.5, 0.0]
    assert critic_loss(sure, style, scored((0.25, 0.0), (0.0, -1.0)), style).tolist() == [1.25, 0.0]


def test_deceiving_is_a_high_score_for_the_style_meant() -> None:
    assert deception_loss(scored((3.0, -5.0), (-5.0, 4.0)), torch.tensor([0, 1])).tolist() == [-3.0, -4.0]


def test_features_of_one_sound_match_and_twice_as_large_ones_are_off_by_one() -> None:
    ones = scored((0.0, 0.0))
    twice = Verdict(ones.scores, tuple(tuple(2 * layer for layer in part) for part in ones.features))
    assert feature_loss(ones, ones).tolist() == [0.0]
    assert feature_loss(twice, ones).tolist() == [1.0]


@pytest.mark.parametrize("gain_db", [-40.0, -6.0])
def test_loudness_is_not_heard(gain_db: float) -> None:
    mel = RelativeMel(RATE, 1024, 64)
    audio = note("alto_sax_a3")
    assert torch.allclose(mel(audio * 10.0 ** (gain_db / 20.0)), mel(audio), atol=1e-3)
    assert float((mel(audio) - mel(note("vibraphone_418hz"))[..., : mel(audio).shape[-1]]).abs().mean()) > 0.05


def test_silence_is_as_dark_as_can_be_and_has_a_gradient() -> None:
    silence = torch.zeros(1, RATE, requires_grad=True)
    heard = RelativeMel(RATE, 1024, 64)(silence)
    assert float(heard.detach().max()) == pytest.approx(0.25 * np.log(1e-5) + 1.0, abs=1e-4)
    heard.sum().backward()
    assert torch.isfinite(silence.grad).all()


def test_a_critic_learns_two_real_sounds_apart() -> None:
    torch.manual_seed(0)
    critic = Critic(RATE, 2)
    real, style = torch.cat([note("alto_sax_a3", 0.4), note("vibraphone_418hz", 0.4)]), torch.tensor([0, 1])
    made = 0.1 * torch.randn(real.shape, generator=torch.Generator().manual_seed(1))
    optimiser = torch.optim.Adam(critic.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = critic_loss(critic(real), style, critic(made), style).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    for scores in critic(real).scores:
        assert (scores.mean(dim=2).argmax(dim=1) == style).all()
    assert losses[0] == pytest.approx(3.0, abs=0.2)
    assert losses[-1] < 1.5


def test_the_encoder_hears_the_same_whatever_is_louder_or_longer() -> None:
    torch.manual_seed(0)
    encoder = StyleEncoder(RATE, 16)
    audio = note("alto_sax_a3")
    with torch.no_grad():
        once, quiet, other = encoder(audio), encoder(0.05 * audio), encoder(note("vibraphone_418hz"))
        twice = encoder(torch.cat([audio, audio], dim=1))
    assert once.shape == (1, 16)
    assert torch.allclose(once, quiet, atol=1e-3)
    assert float((twice - once).norm()) < 0.5 * float((other - once).norm())
