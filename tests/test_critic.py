"""The judges' losses by hand, and what judges and encoder hear: timbre, not loudness."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import example, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from training.models.classifier import (  # noqa: E402
    RANGE_DB,
    SpectrogramClassifier,
    StyleClassifier,
    at_other_speeds,
    attacked,
    coloured,
    hit_rate,
    in_chorus,
    style_loss,
)
from training.models.critic import COSTS, Critic, Verdict, critic_loss, deception_loss, feature_loss  # noqa: E402
from training.models.encoder import StyleEncoder  # noqa: E402
from training.models.spectrogram import RelativeMel, RelativeMelPower  # noqa: E402
from training.objectives.judges import missing_style  # noqa: E402
from training.recipe import ADVERSARIAL_LOSSES, AdversaryConfig  # noqa: E402

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


@pytest.mark.parametrize(
    ("kind", "critics", "generators"),
    [
        ("least_squares", (2 - 1) ** 2 + 0.5**2 + 0.25**2, (0.25 - 1) ** 2),
        ("bce", math.log1p(math.exp(-2)) + math.log1p(math.exp(0.5)) + math.log1p(math.exp(0.25)), 0.575939),
        ("hinge", 0.0 + 1.5 + 1.25, -0.25),
    ],
)
def test_every_adversarial_loss_by_hand(kind: str, critics: float, generators: float) -> None:
    style = torch.tensor([0])
    real, made = scored((2.0, 0.5)), scored((0.25, 7.0))
    assert float(critic_loss(real, style, made, style, kind)) == pytest.approx(critics, abs=1e-5)
    assert float(deception_loss(made, style, kind)) == pytest.approx(generators, abs=1e-5)


def test_a_recipe_can_ask_for_every_adversarial_loss() -> None:
    assert set(COSTS) == set(ADVERSARIAL_LOSSES)


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_every_adversarial_loss_falls_where_its_side_gets_better(kind: str) -> None:
    style = torch.tensor([0])
    worse, better = scored((0.1, 0.0)), scored((0.9, 0.0))
    assert float(deception_loss(better, style, kind)) < float(deception_loss(worse, style, kind))
    assert float(critic_loss(better, style, worse, style, kind)) < float(critic_loss(worse, style, better, style, kind))


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


def test_missing_the_style_costs_what_its_share_says() -> None:
    style = torch.tensor([0, 1])
    even = torch.zeros(2, 2, 2)  # two parts that cannot decide
    assert style_loss(even, style).tolist() == pytest.approx([np.log(2.0)] * 2)
    sure = torch.tensor([[[9.0, 0.0], [9.0, 0.0]], [[9.0, 0.0], [0.0, 9.0]]])  # one part is wrong about the second
    first, second = style_loss(sure, style).tolist()
    assert first < 0.3 < 4.0 < second
    assert float(hit_rate(sure, style)) == 0.75


def test_cross_entropy_urges_on_what_is_hopeless_and_an_exponent_what_is_in_doubt() -> None:
    style = torch.tensor([0, 0, 0])
    scores = torch.tensor([[[-9.0, 0.0], [-0.5, 0.0], [2.0, 0.0]]])  # hopeless, in doubt, right

    def urge(exponent: float) -> list[float]:
        said = scores.clone().requires_grad_()
        missing_style(said, style, exponent).sum().backward()
        assert said.grad is not None
        return (-said.grad[0, :, 0]).tolist()

    hopeless, doubted, right = urge(0.0)
    assert hopeless > doubted > right > 0.0
    hopeless, doubted, right = urge(0.7)
    assert doubted > 10 * hopeless > 0.0 and doubted > 2 * right > 0.0
    believed = torch.softmax(scores[0], dim=-1)[:, 0]
    torch.testing.assert_close(missing_style(scores, style, 1.0), 1.0 - believed)
    torch.testing.assert_close(missing_style(scores, style, 1e-3), -believed.log(), atol=0.05, rtol=0.0)


def test_an_exponent_needs_somebody_who_knows_styles() -> None:
    with pytest.raises(ValueError, match=r"adversary\.style_exponent: needs adversary\.style_weight"):
        AdversaryConfig(weight=1.0, style_exponent=0.5)


@given(seed=st.integers(0, 2**31), gain_db=st.floats(-60.0, 30.0, allow_subnormal=False))
@example(seed=252653, gain_db=-59.0)
def test_colours_keep_to_the_range_and_do_not_hear_loudness(seed: int, gain_db: float) -> None:
    power = torch.rand(2, 40, 9, generator=torch.Generator().manual_seed(seed)) ** 8
    seen, again = (
        coloured(gain * power, torch.Generator().manual_seed(seed)) for gain in (1.0, 10.0 ** (gain_db / 10.0))
    )
    assert seen.shape == (2, 1, 40, 9)
    assert float(seen.amax()) <= 1.0 and float(seen.amin()) >= -1.0
    assert torch.allclose(seen, again, atol=1e-3)


def test_some_bands_and_frames_are_hidden_and_most_are_not() -> None:
    seen = coloured(torch.ones(64, 40, 50), torch.Generator().manual_seed(0))[:, 0]
    bands, frames = ((seen == -1.0).all(dim=dim).float().mean(dim=1) for dim in (2, 1))
    for share in (bands, frames):
        assert float(share.max()) <= 0.17 and float(share.min()) < 0.03 and 0.04 < float(share.mean()) < 0.11


def test_colours_differ_each_time() -> None:
    random = torch.Generator().manual_seed(0)
    sax = RelativeMelPower(RATE, 1024, 64)(note("alto_sax_a3", 0.8))
    once, again = coloured(sax, random), coloured(sax, random)
    assert float((again - once).abs().mean()) > 0.05


def test_sounds_at_other_speeds_keep_their_shape_at_another_pitch() -> None:
    random = torch.Generator().manual_seed(0)
    tone = torch.sin(2 * math.pi * 1000.0 * torch.arange(RATE) / RATE)
    heard = at_other_speeds(tone.repeat(16, 1), 4.0, random)
    assert heard.shape == (16, int((RATE - 1) / 2 ** (4 / 12)))
    spectrum = torch.fft.rfft(heard * torch.hann_window(heard.shape[1])).abs()
    hz = spectrum.argmax(dim=1) * RATE / heard.shape[1]
    semitones = 12 * torch.log2(hz / 1000.0)
    assert float(semitones.min()) >= -4.1 and float(semitones.max()) <= 4.1 and float(semitones.std()) > 1.0
    assert float(spectrum.amax(dim=1).square().min() / spectrum.square().sum(dim=1).max()) > 0.3


def test_a_classifier_learns_from_real_sounds_which_is_which() -> None:
    torch.manual_seed(0)
    classifier, random = StyleClassifier(RATE, 2), torch.Generator().manual_seed(0)
    real, style = torch.cat([note("alto_sax_a3", 0.4), note("vibraphone_418hz", 0.4)]), torch.tensor([0, 1])
    optimiser = torch.optim.Adam(classifier.parameters(), lr=2e-3)
    for _ in range(12):
        optimiser.zero_grad()
        style_loss(classifier(real, random).scores, style).mean().backward()
        optimiser.step()
    assert float(hit_rate(classifier(0.01 * real, random).scores, style)) == 1.0


def test_an_attack_misleads_more_than_hiss_as_loud_and_stays_within_its_decibels() -> None:
    torch.manual_seed(0)
    part, random = SpectrogramClassifier(RATE, 1024, 64, 2), torch.Generator().manual_seed(0)
    real, style = torch.cat([note("alto_sax_a3", 0.4), note("vibraphone_418hz", 0.4)]), torch.tensor([0, 1])
    seen = coloured(part.power(real), random)
    most = 3.0 * 2.0 / RANGE_DB
    misled = attacked(lambda x: part.judge_seen(x, random)[0], seen, style, most, random)
    assert float((misled - seen).abs().max()) == pytest.approx(most, rel=1e-4)
    hiss = seen + most * (2.0 * torch.rand(seen.shape, generator=random) - 1.0).sign()
    losses = [style_loss(part.judge_seen(each, random)[1][None], style).mean().item() for each in (seen, hiss, misled)]
    assert losses[2] > max(losses[:2]) + 0.5 * abs(losses[1] - losses[0])


def test_of_several_classifiers_each_resolution_has_one_drawn_each_time() -> None:
    insisting = [StyleClassifier(RATE, 2), StyleClassifier(RATE, 2)]
    for style, classifier in enumerate(insisting):
        for name, value in classifier.named_parameters():
            if name.endswith("score.bias"):
                value.data[style] = 100.0
    chorus, random = in_chorus(insisting, RATE, 2), torch.Generator().manual_seed(0)
    said = torch.stack([chorus(note("alto_sax_a3", 0.2), random).scores.argmax(dim=-1)[:, 0] for _ in range(12)])
    assert said.shape == (12, 3)
    assert bool((said.float().mean(dim=0) > 0.1).all()) and bool((said.float().mean(dim=0) < 0.9).all())
    assert len({tuple(row) for row in said.tolist()}) > 2  # resolutions are drawn one by one
