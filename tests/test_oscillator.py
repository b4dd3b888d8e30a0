"""A tone in the input's place: at its pitch, as loud, steady, in the styles that want it and in no other."""

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
from training.measures import TRACK_RATE, flutter_db, pitch_kept, pitch_track  # noqa: E402
from training.models.generator import Generator, GeneratorConfig  # noqa: E402
from training.models.oscillator import Oscillator, wavetables  # noqa: E402
from training.playing import at_rate  # noqa: E402

SPEC = SpectralSpec()
RATE, HOP = SPEC.sample_rate, SPEC.hop_samples
WHOLE = torch.ones(1, 1)  # of the tone
CARD = Card("", "restore", "", "2026-11-30", 0, 0.0, (), {}, ())


@pytest.fixture
def oscillator() -> Oscillator:
    return Oscillator(SPEC, 4)


def tone(hertz: float, seconds: float = 1.0, partials: int = 12, vibrato: float = 0.0) -> Tensor:
    """[1, samples] at a level of 0.1, its pitch turning by ``vibrato`` each way, five times a second."""
    time = torch.arange(round(seconds * RATE / HOP) * HOP, dtype=torch.float64) / RATE
    angle = 2.0 * torch.pi * hertz * (time - vibrato * torch.cos(10.0 * torch.pi * time) / (10.0 * torch.pi))
    number = torch.arange(1, partials + 1)[:, None]
    wave = (torch.sin(number * angle + number) / number).sum(dim=0)
    return (0.1 * wave / wave.square().mean().sqrt()).float()[None]


def played(oscillator: Oscillator, audio: Tensor, share: float = 1.0) -> Tensor:
    return oscillator(audio, share * WHOLE.expand(len(audio), 1), oscillator.init_state(len(audio)))[0]


def level(audio: Tensor) -> float:
    return float(audio[:, RATE // 4 :].square().mean().sqrt())


def test_streaming_contract(oscillator: Oscillator) -> None:
    def step(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return oscillator(x, WHOLE.expand(len(x), 1), state)

    notes = torch.cat([tone(hertz, 12 * HOP / RATE) for hertz in (311.0, 440.0)])
    noise = 1e-3 * torch.randn(notes.shape, generator=torch.Generator().manual_seed(0))
    assert_streaming_contract(Streaming(oscillator.init_state, step, notes + noise, HOP, HOP, 0, HOP, tolerance=1e-4))


@settings(max_examples=8, deadline=None)
@given(hertz=st.floats(90.0, 1100.0), partials=st.integers(1, 20), vibrato=st.sampled_from([0.0, 0.01, 0.03]))
def test_the_tone_has_the_pitch_and_the_loudness_of_what_comes_in(hertz: float, partials: int, vibrato: float) -> None:
    made = Oscillator(SPEC, 4)
    heard = tone(hertz, 1.5, partials, vibrato)
    out = played(made, heard)
    assert 20.0 * abs(np.log10(level(out) / level(heard))) < 1.0
    tracks = [at_rate(side[0].numpy(), RATE, TRACK_RATE) for side in (heard, out)]
    assert pitch_kept(pitch_track(tracks[0]), tracks[1]) > 0.95
    assert float((out - heard).abs().max()) > 0.01  # it is another sound


def test_what_hisses_and_wavers_becomes_steady(oscillator: Oscillator) -> None:
    random = torch.Generator().manual_seed(0)
    time = torch.arange(2 * RATE // HOP * HOP) / RATE
    wavering = sum(
        (1.0 + 0.6 * torch.sin(2.0 * torch.pi * (5.0 + 3.0 * number) * time))
        * torch.sin(2.0 * torch.pi * 220.0 * number * time)
        / number
        for number in range(1, 9)
    )
    heard = (0.05 * wavering + 0.005 * torch.randn(time.shape, generator=random))[None]
    out = played(oscillator, heard)
    before, after = (flutter_db(side[0, RATE // 4 :].numpy(), RATE) for side in (heard, out))
    assert after < 0.6 * before


def test_what_has_no_clear_pitch_passes_as_it_is(oscillator: Oscillator) -> None:
    noise = 0.1 * torch.randn(1, RATE // HOP * HOP, generator=torch.Generator().manual_seed(0))
    chord = torch.stack([tone(hertz) for hertz in (261.6, 329.6, 392.0, 466.2, 587.3)]).sum(dim=0)
    for heard, most in ((noise, 0.01), (chord, 0.5)):
        out = played(oscillator, heard)
        changed = (out - heard).square().mean().sqrt() / heard.square().mean().sqrt()
        assert float(changed) < most
    silence = torch.cat([tone(220.0), torch.zeros(1, RATE // HOP * HOP)], dim=1)
    assert float(played(oscillator, silence)[:, RATE + 2 * 1024 :].abs().max()) == 0.0


def test_other_styles_hear_the_input_itself_and_blends_some_of_each(oscillator: Oscillator) -> None:
    heard = tone(220.0)
    assert torch.equal(played(oscillator, heard, 0.0), heard)
    blended = played(oscillator, heard, 0.5)
    torch.testing.assert_close(blended, 0.5 * (heard + played(oscillator, heard)), atol=1e-3, rtol=0.0)


def test_wavetables_are_periods_of_unit_power_that_never_fold_back() -> None:
    tables = wavetables()
    np.testing.assert_allclose(np.square(tables[:, :-1]).mean(axis=1), 1.0)
    np.testing.assert_allclose(tables[:, 0], tables[:, -1], atol=1e-9)
    harmonics = [int(np.flatnonzero(np.abs(np.fft.rfft(row[:-1])) > 1e-6).max()) for row in tables]
    assert harmonics == sorted(harmonics, reverse=True) and harmonics[0] == 59 and harmonics[-1] >= 1


def test_real_playing_is_followed_and_the_graph_says_the_same(tmp_path: Any) -> None:
    """A recording of a violin, in a style that wants the tone and in one that does not, hop by hop and in chunks."""
    torch.manual_seed(0)
    model = Generator(SPEC, GeneratorConfig(style_dim=4, band_count=12, hidden=16), ["oscillator"]).eval()
    vectors = np.eye(2, 4, dtype=np.float32)
    model.fit_traits(torch.from_numpy(vectors), {"oscillator": [True, False]})
    styles = [NamedStyle(name, name, number, vectors[number]) for number, name in enumerate(("sax", "strings"))]
    result = write_model(model, SPEC, styles, CARD, tmp_path / "tone.onnx", "tone", verify_hops=600)
    assert result.largest_difference < 1e-4
    audio = read_mono(BOWED_CLIP, RATE)[: RATE // HOP * HOP]
    stereo = np.stack([audio, audio])
    stream = Stream(read_bundle(tmp_path / "tone.onnx"), channels=2)
    stream.style[:] = vectors
    made = stream.play(stereo)
    expected = run_torch(model, torch.from_numpy(stereo), torch.from_numpy(vectors)[None].expand(10_000, -1, -1), HOP)
    np.testing.assert_allclose(made, expected.numpy(), atol=1e-4)
    torch.manual_seed(0)
    without = Generator(SPEC, model.config).eval()
    out, _ = without(torch.from_numpy(stereo), torch.from_numpy(vectors), without.init_state(2))
    np.testing.assert_allclose(made[1], out[1].detach().numpy(), atol=2e-5)
    assert np.abs(made[0] - out[0].detach().numpy()).max() > 1e-3


def test_angles_are_right_all_the_way_round(oscillator: Oscillator) -> None:
    turns = torch.linspace(-0.5, 0.5, 100_001, dtype=torch.float64)[1:, None]
    parts = torch.cat([torch.cos(2.0 * np.pi * turns), torch.sin(2.0 * np.pi * turns)], dim=1)
    for size in (1e-9, 0.01, 300.0):
        found = oscillator.turns((size * parts).float())
        apart = found.double() - turns
        assert (apart - apart.round()).abs().max() < 2e-7
    assert oscillator.turns(torch.zeros(1, 2)).item() == 0.0
