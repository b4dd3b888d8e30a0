"""Losses against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import soundfile

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor  # noqa: E402

from realtime.loudness import loudness_lufs  # noqa: E402
from training.losses import (  # noqa: E402
    CONVERGENCE_FLOOR,
    MAGNITUDE_FLOOR,
    SSIM_SIGMA,
    SSIM_WEIGHTS,
    SSIM_WINDOW,
    SpectralLoss,
    gram,
    gram_distance,
    level_l1,
    log_l1,
    log_l2,
    mel_magnitude,
    mel_matrix,
    ms_ssim,
    onset_loss,
    pitch_loss,
    relative_mse,
    spectral_convergence,
    stft_magnitude,
    stroke_loss,
)
from training.recipe import LossConfig  # noqa: E402

RATE = 48_000
CONFIG = LossConfig(fft_sizes=(256, 1024), mel_band_counts=(16, 64))


def note() -> Tensor:
    audio, _ = soundfile.read(Path(__file__).parent / "data" / "alto_sax_a3.flac", dtype="float32")
    return torch.from_numpy(audio[: RATE // 2])[None]


def test_a_full_scale_sine_has_magnitude_one_half_at_every_size() -> None:
    time = torch.arange(RATE) / RATE
    for size in (256, 1024, 4096):
        frequency = 32 * RATE / size
        audio = torch.sin(2 * math.pi * frequency * time)[None]
        magnitude = stft_magnitude(audio, size, torch.hann_window(size))
        assert magnitude.shape == (1, size // 2 + 1, RATE // (size // 4) + 1)
        assert magnitude[0, 32, 10].item() == pytest.approx(0.5, abs=1e-3)
        assert magnitude.min().item() == pytest.approx(MAGNITUDE_FLOOR)


def test_spectral_convergence_by_hand() -> None:
    target = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    predicted = torch.tensor([[[3.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [1.0, 1.0]]])
    # 2 / sqrt(9 + 16) and 1 / sqrt(4)
    assert spectral_convergence(predicted, target).tolist() == pytest.approx([0.4, 0.5])


def test_log_l1_by_hand() -> None:
    target = torch.tensor([[[1.0, 1.0], [1.0, 1.0]]])
    predicted = torch.tensor([[[math.e, 1.0], [1.0, math.e**-3]]])
    assert log_l1(predicted, target).tolist() == pytest.approx([1.0])  # (1 + 0 + 0 + 3) / 4


def sine(amplitude: float, hertz: float = 997.0) -> Tensor:
    return amplitude * torch.sin(2 * math.pi * hertz * torch.arange(RATE) / RATE)[None]


def test_relative_mse_by_hand() -> None:
    target = torch.tensor([[1.0, -1.0], [0.5, 0.5], [0.0, 0.0]])
    predicted = torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.001, -0.001]])
    torch.testing.assert_close(relative_mse(predicted, target), torch.tensor([2.0, 0.0, 1.0]))


def test_log_l2_by_hand() -> None:
    e = math.e
    ours, theirs = torch.tensor([[[1.0, e], [e, e]]]), torch.tensor([[[1.0, 1.0], [1.0, e**3]]])
    assert log_l2(ours, theirs).item() == pytest.approx((0 + 1 + 1 + 4) / 4)


def test_gram_matrix_by_hand() -> None:
    features = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]]])  # two channels, three places
    torch.testing.assert_close(gram(features), torch.tensor([[[5.0, 2.0], [2.0, 10.0]]]) / 6)


def test_gram_distance_is_about_what_sounds_together_and_not_when() -> None:
    loud, quiet = 0.5, 0.5e-4  # a full-scale sine, and what is too quiet for the picture
    chord = torch.tensor([[[loud, quiet, loud], [loud, quiet, loud]]])
    later = chord.roll(1, dims=2)
    apart = torch.tensor([[[loud, quiet, loud], [quiet, loud, quiet]]])
    assert gram_distance(later, chord).item() == pytest.approx(0.0, abs=1e-6)
    # Gram matrices times six: all 2 together; 2 and 1 and nothing beside the diagonal apart.
    assert gram_distance(apart, chord).item() == pytest.approx((0 + 1 + 4 + 4) / 16, rel=1e-3)


def test_gram_distance_to_a_silent_target_stays_small() -> None:
    silent, soft, loud = (torch.full((1, 6, 9), 0.5 * 10 ** (level_db / 20)) for level_db in (-80.0, -72.0, -40.0))
    assert gram_distance(silent, silent).item() == pytest.approx(0.0, abs=1e-6)
    assert gram_distance(soft, silent).item() == pytest.approx(0.1**4 / 1e-2, rel=1e-3)
    assert gram_distance(loud, silent).item() == pytest.approx(0.5**4 / 1e-2, rel=1e-3)
    assert gram_distance(silent, loud).item() == pytest.approx(1.0, rel=1e-3)


def test_ms_ssim_of_flat_pictures_by_hand() -> None:
    """Without any contrast only luminance is left, at the coarsest scale, to the power of that scale's weight."""
    dark, bright = torch.full((1, 64, 64), 0.2), torch.full((1, 64, 64), 0.6)
    luminance = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    weights = (0.0448, 0.2856, 0.3001)  # Wang et al., 2003, section 3.2
    assert ms_ssim(dark, bright).item() == pytest.approx(luminance ** (weights[2] / sum(weights)), rel=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
def test_structural_similarity_is_that_of_another_implementation(noise: float) -> None:
    from pytorch_msssim import ms_ssim as reference

    random = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(3, 1, 16, 24, generator=random), (168, 192), mode="bilinear")
    seen = (smooth + noise * torch.randn(smooth.shape, generator=random)).clamp(0.0, 1.0)
    expected = reference(
        seen,
        smooth,
        data_range=1.0,
        size_average=False,
        win_size=SSIM_WINDOW,
        win_sigma=SSIM_SIGMA,
        weights=list(SSIM_WEIGHTS),
    )
    torch.testing.assert_close(ms_ssim(seen[:, 0], smooth[:, 0]), expected, atol=1e-5, rtol=0)


def test_the_same_picture_is_wholly_similar_and_its_negative_is_not() -> None:
    image = torch.rand(1, 48, 60, generator=torch.Generator().manual_seed(0))
    assert ms_ssim(image, image).item() == pytest.approx(1.0, abs=1e-5)
    assert ms_ssim(image, 1.0 - image).item() < 0.1


def test_level_by_hand() -> None:
    target = sine(0.1)
    # Twice the amplitude is log 2 more, whatever the timbre.
    assert level_l1(2 * target, target, RATE).item() == pytest.approx(math.log(2), abs=1e-4)
    assert level_l1(-target, target, RATE).item() == 0.0


def test_mel_rows_are_means_over_bins_and_keep_a_flat_spectrum_flat() -> None:
    matrix = mel_matrix(RATE, 1024, 64)
    assert matrix.shape[1] == 513
    assert torch.allclose(matrix.sum(dim=1), torch.ones(len(matrix)))
    flat = torch.full((2, 513, 3), 0.25)
    assert torch.allclose(mel_magnitude(flat, matrix), torch.full((2, len(matrix), 3), 0.25))


def test_bands_too_narrow_for_a_bin_are_left_out() -> None:
    matrix = mel_matrix(RATE, 256, 128)
    assert 0 < len(matrix) < 128
    assert torch.isfinite(matrix).all()


def test_zero_at_equality_and_only_there() -> None:
    loss = SpectralLoss(CONFIG, RATE)
    audio = note()
    same = loss(audio, audio)
    assert same.total.tolist() == [0.0]
    assert all(value.tolist() == [0.0] for value in same.terms.values())
    other = loss(0.5 * audio, audio)
    # Half the amplitude: convergence 1/2; logs off by log 2 wherever neither side is at the floor.
    assert other.terms["spectral_convergence"].item() == pytest.approx(0.5, abs=1e-3)
    assert other.terms["log_mel"].item() == pytest.approx(math.log(2), rel=0.1)
    assert other.terms["level"].item() == pytest.approx(math.log(2), rel=1e-3)


def test_the_total_is_the_weighted_sum_and_a_zero_weight_leaves_out() -> None:
    audio = note()
    config = LossConfig((256,), (16,), spectral_convergence=2.0, log_magnitude=0.0, log_mel=3.0, level=0.0)
    result = SpectralLoss(config, RATE)(0.3 * audio, audio)
    assert set(result.terms) == {"spectral_convergence", "log_mel"}
    expected = 2.0 * result.terms["spectral_convergence"] + 3.0 * result.terms["log_mel"]
    assert torch.allclose(result.total, expected)


def test_items_of_a_batch_do_not_mix() -> None:
    loss, audio = SpectralLoss(CONFIG, RATE), note()
    noise = 0.1 * torch.randn(audio.shape, generator=torch.Generator().manual_seed(0))
    pair = loss(torch.cat([noise, audio]), torch.cat([audio, audio])).total
    assert pair[1].item() == pytest.approx(0.0, abs=1e-6)
    assert pair[0].item() == pytest.approx(loss(noise, audio).total.item(), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.floats(-20.0, 20.0, allow_subnormal=False))
def test_convergence_does_not_depend_on_the_level_that_both_share(gain_db: float) -> None:
    config = LossConfig((1024,), (32,), spectral_convergence=1.0, log_magnitude=0.0, log_mel=0.0, level=0.0)
    loss, audio = SpectralLoss(config, RATE), note()
    gain = 10 ** (gain_db / 20)
    assert loss(0.5 * gain * audio, gain * audio).total.item() == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("level", [0.0, 1e-9, 1e-3])
def test_silence_as_target_gives_finite_values_and_gradients(level: float) -> None:
    predicted = (level * note()).requires_grad_()
    result = SpectralLoss(CONFIG, RATE)(predicted, torch.zeros_like(predicted))
    result.total.sum().backward()
    assert torch.isfinite(result.total).all()
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()
    if level == 0.0:
        assert result.total.item() == 0.0


def test_level_looks_at_short_stretches() -> None:
    target = sine(0.1)
    predicted = target.clone()
    predicted[:, RATE // 2 :] *= math.e
    # One natural log unit more over half of the time, and one stretch of 39 that lies across the change.
    assert level_l1(predicted, target, RATE).item() == pytest.approx(0.5, abs=0.02)
    # Levels under -80 dBFS count as -80 dBFS: 0.1 is -23 dBFS and weighted up by 0.65 dB.
    silent = level_l1(torch.zeros_like(target), target, RATE).item()
    assert silent == pytest.approx(3 * math.log(10) - 0.5 * math.log(2) + 0.65 * math.log(10) / 20, abs=0.01)


@pytest.mark.parametrize("hertz", [60.0, 440.0, 5000.0])
def test_levels_are_weighted_as_loudness_is(hertz: float) -> None:
    one, other = sine(0.1, 997.0), sine(0.1, hertz)
    louder = loudness_lufs(one[0].numpy(), RATE) - loudness_lufs(other[0].numpy(), RATE)
    assert level_l1(one, other, RATE).item() * 20 / math.log(10) == pytest.approx(abs(louder), abs=0.3)


def test_an_almost_silent_target_cannot_outweigh_everything() -> None:
    target = torch.full((1, 4, 5), MAGNITUDE_FLOOR)
    # Against its own size the difference would count 10^5 times; the floor is the target at -60 dB or so.
    assert spectral_convergence(target + 1.0, target).item() == pytest.approx(1.0 / CONVERGENCE_FLOOR)
    assert spectral_convergence(target, target).item() == 0.0


def test_gradients_at_silence_are_finite_for_a_sounding_target_too() -> None:
    predicted = torch.zeros(1, RATE // 2, requires_grad=True)
    result = SpectralLoss(CONFIG, RATE)(predicted, note())
    result.total.sum().backward()
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()
    # Everything is missing: the difference is as large as the target.
    assert result.terms["spectral_convergence"].item() == pytest.approx(1.0, abs=1e-3)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0.0, 10.0, allow_subnormal=False), min_size=8, max_size=8).filter(any))
def test_any_weights_are_respected(weights: list[float]) -> None:
    names = ("spectral_convergence", "log_magnitude", "log_mel", "l2", "gram", "ms_ssim", "level", "mse")
    chosen = dict(zip(names, weights, strict=True))
    audio = note()
    result = SpectralLoss(LossConfig((256,), (16,), **chosen), RATE)(0.3 * audio, audio)
    assert set(result.terms) == {name for name, weight in chosen.items() if weight}
    expected = sum(chosen[name] * value.item() for name, value in result.terms.items())
    assert result.total.item() == pytest.approx(expected, rel=1e-5)


def chord(*hertz: float, timbre: float = 1.0) -> Tensor:
    """Sixteen partials of each pitch, falling off with their number to the power of ``timbre``."""
    time = torch.arange(RATE) / RATE
    number = torch.arange(1, 17)
    tones = [torch.sin(2 * math.pi * f * number[:, None] * time) * number[:, None] ** -timbre for f in hertz]
    return 0.05 * torch.stack(tones).sum(dim=(0, 1))[None]


@settings(max_examples=8, deadline=None)
@given(hertz=st.floats(80.0, 900.0), timbre=st.floats(0.5, 3.0), level=st.floats(0.01, 4.0))
def test_another_timbre_keeps_the_pitch_and_another_pitch_does_not(hertz: float, timbre: float, level: float) -> None:
    heard = chord(hertz)
    kept = pitch_loss(level * chord(hertz, timbre=timbre), heard, RATE).item()
    assert kept < 0.03
    for ratio in (1.5, 1 / 1.5, 2.0):  # a fifth above, a fifth below, an octave
        assert pitch_loss(chord(hertz * ratio, timbre=timbre), heard, RATE).item() > kept + 0.08, ratio


def test_what_has_no_pitch_asks_for_none() -> None:
    noise = 0.1 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(0))
    assert pitch_loss(chord(200.0), noise, RATE).item() < 0.02
    assert pitch_loss(chord(200.0), torch.zeros(1, RATE), RATE).item() == 0.0


def test_losing_the_pitch_has_a_gradient_that_is_finite_in_silence_too() -> None:
    for made in (0.01 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(0)), torch.zeros(1, RATE)):
        made.requires_grad_()
        pitch_loss(made, chord(200.0), RATE).sum().backward()
        assert made.grad is not None and torch.isfinite(made.grad).all()


def plucks(*starts_s: float, hertz: float = 330.0, fall_s: float = 0.1) -> Tensor:
    """Notes that begin at once and die away, a second in all."""
    time = torch.arange(RATE)[:, None] / RATE - torch.tensor(starts_s)
    return (chord(hertz)[0, :, None] * torch.exp(-time / fall_s) * (time >= 0)).sum(dim=1)[None]


@settings(max_examples=4, deadline=None)
@given(hertz=st.floats(150.0, 900.0), level=st.floats(0.05, 4.0), fall_s=st.floats(0.05, 0.3))
def test_notes_that_begin_together_keep_the_onsets_and_others_do_not(hertz: float, level: float, fall_s: float) -> None:
    heard = plucks(0.1, 0.35, 0.5, 0.8)
    assert onset_loss(heard, heard, RATE).item() == pytest.approx(0.0, abs=1e-5)
    kept = onset_loss(level * plucks(0.105, 0.355, 0.505, 0.805, hertz=hertz, fall_s=fall_s), heard, RATE).item()
    moved = onset_loss(level * plucks(0.2, 0.45, 0.6, 0.9, hertz=hertz, fall_s=fall_s), heard, RATE).item()
    assert kept < 0.4 < moved
    assert onset_loss(plucks(0.1, 0.8, hertz=hertz), heard, RATE).item() > 0.1  # two of four are missing


def test_where_nothing_begins_no_onset_is_asked_for() -> None:
    noise = 0.1 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(0))
    for heard in (noise, chord(220.0)[:, 4800:-4800], torch.zeros(1, RATE)):
        made = plucks(0.3)[:, : heard.shape[1]].requires_grad_()
        loss = onset_loss(made, heard, RATE)
        assert loss.item() == 0.0
        loss.sum().backward()
    silent = torch.zeros(1, RATE, requires_grad=True)
    onset_loss(silent, plucks(0.3), RATE).sum().backward()
    assert silent.grad is not None and torch.isfinite(silent.grad).all()


@settings(max_examples=4, deadline=None)
@given(hertz=st.floats(150.0, 900.0), level=st.floats(0.05, 4.0))
def test_strokes_that_nobody_plays_stand_out_and_those_that_are_played_do_not(hertz: float, level: float) -> None:
    held = chord(220.0)
    noise = 0.02 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(0))
    turns = level * plucks(0.1, 0.27, 0.44, 0.61, 0.78, hertz=hertz)  # as fast as a vibrato
    assert stroke_loss(turns, held, RATE).item() > 0.3
    assert stroke_loss(turns, turns, RATE).item() == 0.0
    late = level * plucks(0.11, 0.28, 0.45, 0.62, 0.79, hertz=hertz)
    assert stroke_loss(late, turns, RATE).item() < 0.1
    for steady in (level * chord(hertz), held + noise, level * noise, torch.zeros(1, RATE)):
        assert stroke_loss(steady, held, RATE).item() < 0.05


def test_fewer_strokes_are_no_strokes_added_and_silence_has_a_finite_gradient() -> None:
    assert stroke_loss(plucks(0.1), plucks(0.1, 0.35, 0.8), RATE).item() < 0.02
    silent = torch.zeros(1, RATE, requires_grad=True)
    stroke_loss(silent, plucks(0.3), RATE).sum().backward()
    made = plucks(0.3).requires_grad_()
    stroke_loss(made, torch.zeros(1, RATE), RATE).sum().backward()
    for side in (silent, made):
        assert side.grad is not None and torch.isfinite(side.grad).all()
