"""Sound from noise: the streaming contract, silence, notes that begin, and phases that stay exact."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from realtime.spectral import SpectralSpec  # noqa: E402
from tests.streaming_contract import Streaming, assert_streaming_contract  # noqa: E402
from training.models.generator import GeneratorConfig  # noqa: E402
from training.models.noise_player import LOWEST_NOTE, NOTES, PHASE_STEPS, NoisePlayer, note_table  # noqa: E402

SPEC = SpectralSpec()
HOP = SPEC.hop_samples


def player() -> NoisePlayer:
    torch.manual_seed(0)
    return NoisePlayer(SPEC, GeneratorConfig(style_dim=4, band_count=12, hidden=16)).eval()


def signs(rows: int, hops: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randint(2, (rows, hops * HOP), generator=random) - 1.0


STYLE = torch.tensor([[0.5, -1.0, 0.2, 1.5]])


def test_the_streaming_contract() -> None:
    made = player()
    assert_streaming_contract(
        Streaming(
            made.init_state,
            lambda x, state: made(x, STYLE.expand(len(x), -1), state),
            0.5 * signs(2, 40),
            HOP,
            HOP,
            made.latency_samples,
            HOP,
            tolerance=2e-5,  # pulses are steep: what rounding moves in time it moves in height
        )
    )


def test_nothing_in_is_nothing_out_and_a_release_ends_in_exact_silence() -> None:
    made = player()
    with torch.no_grad():
        silent, state = made(torch.zeros(1, 20 * HOP), STYLE, made.init_state(1))
        loud, state = made(signs(1, 50), STYLE, state)
        after, _ = made(torch.zeros(1, 40 * HOP), STYLE, state)
    assert not silent.any() and float(loud.abs().max()) > 0.01
    assert not after[:, SPEC.analysis_window_samples :].any()


def test_loudness_follows_the_level() -> None:
    made = player()
    with torch.no_grad():
        loud, quiet = (made(level * signs(1, 400), STYLE, made.init_state(1))[0].std() for level in (1.0, 0.1))
    assert 0.03 < float(quiet / loud) < 0.3


def test_every_voice_begins_a_note_when_sound_begins() -> None:
    made = player()
    with torch.no_grad():
        _, before = made(signs(1, 300), STYLE, made.init_state(1))
        _, rest = made(torch.zeros(1, 5 * HOP), STYLE, before)
        _, after = made(signs(1, 1, seed=1), STYLE, rest)
    assert bool((rest.age >= 5.0).all()) and not after.age.any()
    assert not torch.equal(after.kept, rest.kept)


def test_phases_are_exact_however_long_it_plays() -> None:
    """Phases are multiples of one step, so adding them up loses nothing: hop by hop and all at once are the same."""
    made = player()
    start = replace(made.init_state(1), phase=torch.tensor([[12345.0, 65535.0]]) / PHASE_STEPS)
    noise = 0.5 * signs(1, 600)
    with torch.no_grad():
        _, whole = made(noise, STYLE, start)
        state = start
        for hop in noise.split(7 * HOP, dim=1):
            _, state = made(hop, STYLE, state)
    assert torch.equal(whole.phase, state.phase)
    assert torch.equal(whole.phase * PHASE_STEPS, (whole.phase * PHASE_STEPS).round())
    assert bool((whole.phase >= 0.0).all()) and bool((whole.phase < 1.0).all())


def test_notes_are_as_likely_as_the_style_says() -> None:
    made = player()
    with torch.no_grad():
        made.choose.weight.zero_()
        made.choose.bias.fill_(-30.0)
        made.choose.bias[10], made.choose.bias[40] = 0.0, 1.0986  # one to three
        notes = []
        for seed in range(20):
            _, state = made(signs(40, 1, seed), STYLE.expand(40, -1), made.init_state(40))
            notes.append(state.kept[..., -1].flatten())
    heard = torch.cat(notes)
    assert set(heard.tolist()) == {10.0, 40.0}
    assert float((heard == 40.0).float().mean()) == pytest.approx(0.75, abs=0.05)


def test_pulses_are_in_tune_of_unit_power_and_without_aliases() -> None:
    table = torch.tensor(note_table(SPEC))
    assert len(table) == NOTES
    for number in (0, 21, 45, NOTES - 1):
        turns, sharpness, mean, gain = table[number]
        hertz = float(turns) / SPEC.hop_seconds
        assert hertz == pytest.approx(440.0 * 2 ** ((LOWEST_NOTE + number - 69) / 12), abs=0.01)
        angle = 2.0 * torch.pi * torch.arange(8192, dtype=torch.float64) / 8192
        pulse = (torch.exp(sharpness * (angle.cos() - 1.0)) - mean) * gain
        assert float(pulse.mean()) == pytest.approx(0.0, abs=1e-6)
        assert float(pulse.square().mean()) == pytest.approx(1.0, abs=1e-3)
        partials = torch.fft.rfft(pulse).abs()
        above = int(SPEC.sample_rate / 2 / hertz) + 1
        assert float(partials[above:].max() / partials.max()) < 1e-4
