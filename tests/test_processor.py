"""The engine computes what the model computes, whatever the block length, and stays safe when something is wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from realtime import stream as stream_module
from realtime.bench import measure_algorithmic_latency, measure_processor_latency
from realtime.bundle import DEFAULT_MODEL, DEMO_CLIP, LONG_MODEL, Bundle, Golden, ProviderError, read_bundle
from realtime.controls import PARAMETERS, Controls, Performer, mix_controls
from realtime.engine import HOP_FIELDS, METER_COUNT, Engine, EngineMeters, EngineSettings
from realtime.limiter import LIMITER_KNEE, limit
from realtime.processor import FADE_HOPS, Processor, RateError
from realtime.resample import at_rate
from realtime.ring import Mailbox, Ring
from realtime.stream import Stream, make_session

HOP = 128
RATE = 48_000
AWKWARD = (1, 17, 64, 65, 127, 128, 512, 8193)
LATENCY = read_bundle(DEFAULT_MODEL).manifest.latency_samples
BOTH_KINDS = pytest.mark.parametrize("model", [LONG_MODEL, DEFAULT_MODEL], ids=["overlapping", "one hop"])


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def guitar() -> NDArray[np.float32]:
    audio, rate = soundfile.read(DEMO_CLIP, dtype="float32")
    assert rate == RATE
    return np.asarray(audio[RATE // 4 :], np.float32)


def controls(bundle: Bundle, style: str = "violin", **values: float) -> Controls:
    """Controls with the level match taken out, so that wet is the graph's own output."""
    chosen = {p.id: p.default for p in PARAMETERS} | values
    matched = mix_controls({bundle.manifest.style(style): 1.0}, chosen)
    return Controls(matched.style, 0.0, matched.dry_wet, matched.input_gain_db, matched.output_gain_db)


def prepared(bundle: Bundle, channels: int = 1, max_block: int = 8193, **values: float) -> Processor:
    processor = Processor(bundle)
    processor.controls = controls(bundle, **values)  # pyright: ignore[reportArgumentType]
    processor.prepare(RATE, max_block, channels)
    return processor


def run(processor: Processor, audio: NDArray[np.float32], *blocks: int) -> NDArray[np.float32]:
    """Audio [channels, n] through ``process`` in blocks of these lengths, over and over."""
    out, at, turn = [], 0, 0
    while at < audio.shape[1]:
        block = audio[:, at : at + blocks[turn % len(blocks)]]
        out.append(processor.process(block).copy())
        at += block.shape[1]
        turn += 1
    return np.concatenate(out, axis=1)


def offline(bundle: Bundle, audio: NDArray[np.float32], style: str = "violin") -> NDArray[np.float32]:
    """The model over the whole recording [channels, n*hop] in one step, on the input's own time axis."""
    stream = Stream(bundle, audio.shape[0], hops_per_step=audio.shape[1] // HOP)
    stream.audio[:] = audio
    stream.style[:] = np.array(bundle.manifest.style(style).vector, np.float32)
    return stream.step()[:, bundle.manifest.stream_delay_samples :].copy()


def clip(guitar: NDArray[np.float32], hops: int, channels: int = 1, level: float = 0.5) -> NDArray[np.float32]:
    mono = guitar[: hops * HOP] * level
    return np.stack([mono, 0.7 * mono[::-1]])[:channels].copy()


@BOTH_KINDS
@pytest.mark.parametrize("block", AWKWARD)
def test_any_block_length_gives_the_offline_model_output_later_by_the_declared_latency(
    model: Path, guitar: NDArray[np.float32], block: int
) -> None:
    bundle = read_bundle(model)
    audio = clip(guitar, 150 if block > 1 else 40)
    processor = prepared(bundle)
    out = run(processor, audio, block)
    expected = offline(bundle, audio)
    latency = processor.latency_samples
    assert latency == bundle.manifest.latency_samples
    assert not out[:, : latency - HOP].any()
    common = out.shape[1] - latency
    difference = np.abs(out[:, latency:] - expected[:, :common]).max()
    assert difference < 1e-5 and np.abs(expected).max() > 0.01


@settings(max_examples=15, deadline=None)
@given(blocks=st.lists(st.integers(1, 700), min_size=1, max_size=6))
def test_varying_block_lengths_change_nothing(blocks: list[int]) -> None:
    bundle = read_bundle(DEFAULT_MODEL)
    audio, _ = soundfile.read(DEMO_CLIP, dtype="float32", frames=60 * HOP, start=RATE // 4)
    planar = np.asarray(audio, np.float32)[None]
    one = run(prepared(bundle), planar, 128)
    other = run(prepared(bundle), planar, *blocks)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("hops_per_step", [2, 16])
@pytest.mark.parametrize("dry_wet", [1.0, 0.3])
def test_many_hops_at_once_give_the_same_samples_later(
    bundle: Bundle, guitar: NDArray[np.float32], hops_per_step: int, dry_wet: float
) -> None:
    audio = clip(guitar, 160, channels=2)
    one = run(prepared(bundle, channels=2, dry_wet=dry_wet), audio, 512)
    many = Processor(bundle, hops_per_step=hops_per_step)
    many.controls = controls(bundle, dry_wet=dry_wet)
    many.prepare(RATE, 512, 2)
    assert many.latency_samples == hops_per_step * HOP + LATENCY - HOP
    out = run(many, audio, 512)
    length = audio.shape[1] - many.latency_samples
    np.testing.assert_allclose(out[:, many.latency_samples :], one[:, LATENCY : LATENCY + length], atol=1e-5)


def test_stereo_channels_are_two_independent_players(bundle: Bundle, guitar: NDArray[np.float32]) -> None:
    audio = clip(guitar, 80, channels=2)
    both = run(prepared(bundle, channels=2), audio, 65)
    for channel in range(2):
        alone = run(prepared(bundle), audio[channel : channel + 1], 65)
        np.testing.assert_allclose(both[channel], alone[0], atol=1e-5)


@pytest.mark.parametrize("block", [128, 100, 512])
def test_the_result_may_take_the_place_of_the_block(bundle: Bundle, guitar: NDArray[np.float32], block: int) -> None:
    audio = clip(guitar, 40)
    apart, in_place = prepared(bundle), prepared(bundle)
    for start in range(0, audio.shape[1] - block, block):
        part = audio[:, start : start + block].copy()
        expected = apart.process(part).copy()
        assert in_place.process(part, part) is not None
        np.testing.assert_array_equal(part, expected)


def test_a_mono_block_may_come_without_a_channel_axis(bundle: Bundle, guitar: NDArray[np.float32]) -> None:
    audio = clip(guitar, 8)
    flat = prepared(bundle).process(audio[0])
    assert flat.shape == audio[0].shape
    np.testing.assert_array_equal(flat, prepared(bundle).process(audio)[0])


@BOTH_KINDS
def test_measured_latency_is_the_declared_one(model: Path) -> None:
    bundle = read_bundle(model)
    assert bundle.manifest.latency_samples == {LONG_MODEL: 2 * HOP, DEFAULT_MODEL: HOP}[model]
    assert measure_algorithmic_latency(bundle) == bundle.manifest.latency_samples
    for block in (1, 61, 128, 500):
        assert measure_processor_latency(bundle, block=block) == bundle.manifest.latency_samples


@BOTH_KINDS
def test_dry_is_the_input_delayed_by_exactly_the_latency(model: Path, guitar: NDArray[np.float32]) -> None:
    bundle = read_bundle(model)
    audio, latency = clip(guitar, 50, channels=2), bundle.manifest.latency_samples
    out = run(prepared(bundle, channels=2, dry_wet=0.0), audio, 77)
    np.testing.assert_array_equal(out[:, latency:], audio[:, :-latency])


def test_half_wet_is_the_mean_of_both_at_the_same_delay(bundle: Bundle, guitar: NDArray[np.float32]) -> None:
    audio = clip(guitar, 60)
    wet = run(prepared(bundle), audio, 128)
    half = run(prepared(bundle, dry_wet=0.5), audio, 128)
    np.testing.assert_allclose(half[:, LATENCY:], 0.5 * wet[:, LATENCY:] + 0.5 * audio[:, :-LATENCY], atol=1e-6)


def test_gains_are_decibels(bundle: Bundle, guitar: NDArray[np.float32]) -> None:
    audio = clip(guitar, 30, level=0.2)
    out = run(prepared(bundle, dry_wet=0.0, input_gain_db=6.0, output_gain_db=-12.0), audio, 128)
    np.testing.assert_allclose(out[:, LATENCY:], audio[:, :-LATENCY] * 10 ** (-6 / 20), rtol=1e-5, atol=1e-8)


def test_reset_after_anything_is_a_fresh_start(bundle: Bundle, guitar: NDArray[np.float32]) -> None:
    audio = clip(guitar, 40)
    processor = prepared(bundle)
    first = run(processor, audio, 100)
    run(processor, np.full((1, 777), np.nan, np.float32), 100)
    processor.reset()
    np.testing.assert_array_equal(run(processor, audio, 100), first)
    assert processor.meters.bad_input_hops == 0


def test_prepared_again_it_starts_afresh_on_the_graph_that_is_loaded(
    bundle: Bundle, guitar: NDArray[np.float32]
) -> None:
    """Also for a device of another rate; only another number of channels needs another graph."""
    fresh, again = Processor(bundle), Processor(bundle)
    fresh.prepare(RATE, 1024, 1)
    expected = fresh.process(guitar[None, :1024])
    again.prepare(RATE, 64, 1)
    loaded = again.stream
    again.process(guitar[None, 4096:4160])
    again.prepare(RATE, 1024, 1)
    np.testing.assert_array_equal(again.process(guitar[None, :1024]), expected)
    at_rate(again, 44_100).prepare(44_100, 64, 1)
    assert again.stream is loaded
    again.prepare(RATE, 64, 2)
    assert again.stream is not loaded and again.process(np.zeros((2, 64), np.float32)).shape == (2, 64)


def test_golden_vector_is_reproduced(bundle: Bundle) -> None:
    golden = bundle.manifest.golden
    audio, expected = Golden.unpack(golden.audio), Golden.unpack(golden.audio_out)
    stream = Stream(bundle)
    stream.style[:] = np.array(bundle.manifest.style(golden.style).vector, np.float32)
    out = np.zeros_like(expected)
    for at in range(0, len(audio), HOP):
        stream.audio[:] = audio[at : at + HOP]
        out[at : at + HOP] = stream.step()[0]
    assert np.abs(expected).max() > 0.005
    np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, 1e17])
def test_bad_input_is_counted_and_forgotten(bundle: Bundle, guitar: NDArray[np.float32], bad: float) -> None:
    audio = clip(guitar, 60)
    audio[0, 20 * HOP + 5] = bad
    processor = prepared(bundle, dry_wet=0.5)
    out = run(processor, audio, 128)
    assert processor.meters.bad_input_hops == 1
    assert np.isfinite(out).all() and np.abs(out).max() <= 1.0
    late = out[0, 50 * HOP :]
    assert 0.002 < np.sqrt(np.mean(late**2)) < 0.5


def test_silence_in_is_silence_out(bundle: Bundle) -> None:
    for style in bundle.manifest.styles:
        processor = Processor(bundle)
        processor.controls = mix_controls({style: 1.0}, {p.id: p.default for p in PARAMETERS})
        processor.prepare(RATE, 512, 1)
        out = run(processor, np.zeros((1, 60 * HOP), np.float32), 512)
        assert np.abs(out).max() < 10 ** (-70 / 20), style.id


def test_silence_after_playing_falls_silent_in_every_style(bundle: Bundle, guitar: NDArray[np.float32]) -> None:
    audio = np.pad(clip(guitar, 40), ((0, 0), (0, 60 * HOP)))
    for style in bundle.manifest.styles:
        processor = prepared(bundle)
        processor.controls = controls(bundle, style.id)
        out = run(processor, audio, 512)
        assert processor.meters.bad_output_hops == 0, style.id
        assert np.abs(out[:, -20 * HOP :]).max() < 10 ** (-70 / 20), style.id


@pytest.mark.parametrize("how", ["nan", "finite garbage", "raises"])
def test_a_hop_that_the_graph_fails_falls_back_to_dry_without_a_click_and_comes_back(
    bundle: Bundle, guitar: NDArray[np.float32], how: str
) -> None:
    audio = clip(guitar, 120)
    healthy = run(prepared(bundle), audio, 128)
    processor = prepared(bundle)
    stream = processor.stream
    assert stream is not None
    step, calls = stream.step, 0

    def failing_step() -> NDArray[np.float32]:
        nonlocal calls
        calls += 1
        if 30 < calls <= 34 and how == "raises":
            raise RuntimeError("the device is gone")
        out = step()
        if 30 < calls <= 34:
            out[:] = np.nan if how == "nan" else 1e17
        return out

    stream.step = failing_step
    out = run(processor, audio, 128)
    assert processor.meters.bad_output_hops == 4
    assert processor.meters.fault == ("RuntimeError: the device is gone" if how == "raises" else "")
    assert np.isfinite(out).all()
    # Hop k goes out one hop later. Four hops of dry at the same delay, the first joined by a ramp ...
    at = slice(32 * HOP, 35 * HOP)
    np.testing.assert_allclose(out[0, at], audio[0, at.start - LATENCY : at.stop - LATENCY], atol=1e-6)
    np.testing.assert_array_equal(out[:, : 31 * HOP], healthy[:, : 31 * HOP])
    # ... and never a step beyond what dry and wet have of their own.
    own = max(np.abs(np.diff(audio)).max(), np.abs(np.diff(healthy)).max())
    assert np.abs(np.diff(out)).max() < 1.5 * own
    # Back by itself: the model has forgotten, but it plays.
    settled = slice((35 + FADE_HOPS + 40) * HOP, None)
    assert np.corrcoef(out[0, settled], healthy[0, settled])[0, 1] > 0.9


def test_the_engine_plays_dry_while_the_graph_raises_and_counts_it(
    bundle: Bundle, guitar: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = clip(guitar, 60)
    defaults = mix_controls({bundle.manifest.style("violin"): 1.0}, {p.id: p.default for p in PARAMETERS})
    with (
        Mailbox.create(4 + bundle.manifest.style_dim) as mailbox,
        Mailbox.create(METER_COUNT) as meters,
        Ring.create(100, len(HOP_FIELDS)) as hops,
    ):
        mailbox.write(defaults.pack())
        names = (mailbox.name, meters.name, hops.name, None)
        engine = Engine(EngineSettings(DEFAULT_MODEL, "cpu", 1, 0, None, None, None, False, *names))

        def fail() -> NDArray[np.float32]:
            raise RuntimeError("CUDA error 700")

        outs = []
        with monkeypatch.context() as patch:
            patch.setattr(engine.processor.stream, "step", fail)
            patch.setattr(engine.processor.stream, "reset", fail)
            outs += [engine.run_block(audio[:, at : at + 200]).copy() for at in range(0, 20 * HOP, 200)]
        outs += [engine.run_block(audio[:, at : at + 200]).copy() for at in range(2600, 60 * HOP, 200)]
        counted = EngineMeters.unpack(meters.read())
        engine.close()
    out = np.concatenate(outs, axis=1)
    assert (counted.bad_output_hops, counted.errors) == (20, 0)
    # The first hop of dry is joined to the silence before it without a step.
    np.testing.assert_allclose(out[0, LATENCY + HOP : 2600], audio[0, HOP : 2600 - LATENCY], atol=1e-6)
    difference = np.abs(out[0, LATENCY:] - audio[0, : out.shape[1] - LATENCY])
    assert difference[40 * HOP :].max() > 0.01 > difference[HOP : 18 * HOP].max()


def test_a_period_that_comes_in_parts_is_one_block_of_the_device(bundle: Bundle) -> None:
    """As PortAudio brings those of a JACK server, at one moment of its clock; the length may change."""
    with (
        Mailbox.create(4 + bundle.manifest.style_dim) as mailbox,
        Mailbox.create(METER_COUNT) as meters,
        Ring.create(1000, len(HOP_FIELDS)) as hops,
    ):
        mailbox.write(Performer(bundle.manifest).controls().pack())
        names = (mailbox.name, meters.name, hops.name, None)
        engine = Engine(EngineSettings(DEFAULT_MODEL, "cpu", 1, 0, None, None, None, False, *names))
        seen = []
        for seconds, parts in enumerate(([1024] * 4, [1024] * 4, [64], [64], [1024, 476], [1024, 476])):
            for frames in parts:
                silence = np.zeros((frames, 1), np.float32)
                engine.on_audio(silence, silence.copy(), frames, SimpleNamespace(currentTime=1.0 + seconds), None)
            seen.append(EngineMeters.unpack(meters.read()).block)
        engine.close()
    assert seen[1:] == [4096, 4096, 64, 64, 1500]


def test_switching_styles_never_clicks(bundle: Bundle, guitar: NDArray[np.float32]) -> None:
    audio = clip(guitar, 400, level=0.3)
    defaults = {p.id: p.default for p in PARAMETERS}
    own, outs = 0.0, []
    for style in bundle.manifest.styles:
        processor = Processor(bundle)
        processor.controls = mix_controls({style: 1.0}, defaults)
        processor.prepare(RATE, HOP, 1)
        steady = run(processor, audio, HOP)
        own = max(own, float(np.abs(np.diff(steady)).max()))
    processor = Processor(bundle)
    processor.prepare(RATE, HOP, 1)
    for hop in range(400):
        if hop % 19 == 0:  # 20 switches a second
            style = bundle.manifest.styles[hop // 19 * 3 % len(bundle.manifest.styles)]
            processor.controls = mix_controls({style: 1.0}, defaults)
        outs.append(processor.process(audio[:, hop * HOP : (hop + 1) * HOP]).copy())
    switching = np.concatenate(outs, axis=1)
    assert np.abs(np.diff(switching)).max() < 1.25 * own


def test_a_style_fades_over_a_few_hops_and_arrives_exactly(bundle: Bundle, guitar: NDArray[np.float32]) -> None:
    processor = prepared(bundle)
    audio = clip(guitar, 40)
    processor.process(audio[:, : 10 * HOP])
    processor.controls = controls(bundle, "choir", dry_wet=0.25)
    stream = processor.stream
    assert stream is not None
    goal = np.array(bundle.manifest.style("choir").vector, np.float32)
    before = stream.style[0].copy()
    distances = []
    for hop in range(10, 10 + FADE_HOPS):
        processor.process(audio[:, hop * HOP : (hop + 1) * HOP])
        distances.append(float(np.linalg.norm(stream.style[0] - goal)))
    whole = float(np.linalg.norm(before - goal))
    expected = [whole * (FADE_HOPS - 1 - i) / FADE_HOPS for i in range(FADE_HOPS)]
    np.testing.assert_allclose(distances, expected, atol=1e-4 * whole)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=64))
def test_the_limiter_bounds_everything_and_leaves_the_rest_alone(values: list[float]) -> None:
    x = np.array([values], np.float32)
    y = x.copy()
    limit(y)
    assert np.abs(y).max() <= 1.0
    below = np.abs(x) <= LIMITER_KNEE
    np.testing.assert_array_equal(y[below], x[below])
    assert (np.sign(y) == np.sign(x)).all()
    order = np.argsort(x[0], kind="stable")
    assert (np.diff(y[0][order]) >= -1e-6).all()


def test_another_rate_is_refused_with_the_remedy(bundle: Bundle) -> None:
    with pytest.raises(RateError, match="runs at 48000 Hz, not 44100 Hz; set the device to 48000 Hz"):
        Processor(bundle).prepare(44_100, 128, 1)


def test_a_block_above_the_prepared_maximum_is_refused(bundle: Bundle) -> None:
    processor = prepared(bundle, max_block=64)
    with pytest.raises(ValueError, match="65 samples are above max_block, 64"):
        processor.process(np.zeros((1, 65), np.float32))


def test_asking_for_a_gpu_that_is_not_there_is_an_error_with_the_remedy(
    bundle: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ProviderError, match=r"--provider cpu"):
        make_session(bundle.graph, "cuda")
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ProviderError, match="'gpu' is none of cpu, cuda, tensorrt"):
        make_session(bundle.graph, "gpu")


@pytest.fixture()
def device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound and states of the CPU provider go through buffers of a device, which here lies in the same memory."""
    monkeypatch.setitem(stream_module.DEVICE_MEMORY, "cpu", "cpu")


@pytest.mark.usefixtures("device_memory")
def test_sound_that_crosses_to_a_device_and_back_is_the_same(bundle: Bundle, guitar: NDArray[np.float32]) -> None:
    audio = clip(guitar, 40, channels=2)
    through = Stream(bundle, 2)
    through.warm_up()
    through.style[:] = np.array(bundle.manifest.style("violin").vector, np.float32)
    first = through.play(audio)
    through.reset()
    again = through.play(audio)
    np.testing.assert_array_equal(again, first)
    np.testing.assert_allclose(first[:, bundle.manifest.stream_delay_samples :], offline(bundle, audio), atol=2e-5)


class _Replaying:
    """A session that captures: its graphs may be off by ``error``, or fail where that is infinite."""

    def __init__(self, session: ort.InferenceSession, error: float) -> None:
        self._session, self._error, self.ran = session, error, list[str]()

    def io_binding(self) -> ort.IOBinding:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: ort.IOBinding, options: ort.RunOptions | None = None) -> None:
        self._session.run_with_iobinding(binding, options)
        number = options.get_run_config_entry("gpu_graph_id") if options else "none"
        self.ran.append(number)
        if number in ("1", "2"):
            if self._error == np.inf:
                raise RuntimeError("operation not permitted when stream is capturing")
            out = binding.get_outputs()[0]
            out.update_inplace(out.numpy() + np.float32(self._error))


@pytest.mark.usefixtures("device_memory")
@pytest.mark.parametrize(("error", "kept"), [(0.0, True), (1e-3, False), (np.inf, False)])
def test_cuda_graphs_are_kept_only_where_they_make_the_same_sound(
    bundle: Bundle, guitar: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch, error: float, kept: bool
) -> None:
    audio = clip(guitar, 20)
    expected = offline(bundle, audio)
    session = _Replaying(make_session(bundle.graph, sizes={"channels": 1, "samples": HOP}), error)
    monkeypatch.setattr(Stream, "_load", lambda *_: (session, True))
    stream = Stream(bundle)
    stream.warm_up()
    assert stream.captured is kept
    session.ran.clear()
    stream.style[:] = np.array(bundle.manifest.style("violin").vector, np.float32)
    out = stream.play(audio)
    # Each of the two sets of states has a graph of its own; -1 is none.
    assert session.ran == (["1", "2"] * 10 if kept else ["-1"] * 20)
    np.testing.assert_allclose(out[:, bundle.manifest.stream_delay_samples :], expected, atol=2e-5)


def test_hop_times_are_handed_over_once(bundle: Bundle) -> None:
    processor = prepared(bundle)
    processor.process(np.zeros((1, 10 * HOP), np.float32))
    times = processor.take_hop_times()
    assert times.shape == (10, 2)
    assert (times[:, 0] >= times[:, 1]).all() and (times[:, 1] > 0).all()
    assert len(processor.take_hop_times()) == 0
