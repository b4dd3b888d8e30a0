"""Where the time goes, and how much latency there is: measured, with the outliers shown."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from realtime.audio import demo_playing
from realtime.bench_compare import CompareSettings, other_model
from realtime.bundle import DEMO_CLIP, Bundle, check_kind, read_bundle
from realtime.controls import PARAMETERS, Performer, mix_controls
from realtime.ensemble import make_stream
from realtime.processor import AnyStream, Processor
from realtime.show import percentiles_ms
from realtime.stream import Stream

TURN_HOPS = 50
"""Hops timed in one go before the other candidate has its turn."""
FRESH_TIMEOUT_S = 60.0
PACED_S = 5.0
"""How long hops are timed at the pace of a performance, at most."""
CHANNEL_HOPS = 1_000
"""Hops timed at each number of channels, at most."""
HISTOGRAM_EDGES_MS = np.geomspace(1e-4, 1e3, 141)
"""Twenty bins a decade, from a tenth of a microsecond to a second; what lies beyond counts in the outermost."""


class MeasureError(RuntimeError):
    """A figure that cannot be measured here; the text says which, why, and how to leave it out."""


def measure_algorithmic_latency(bundle: Bundle, provider: str = "cpu") -> int:
    """How many samples must arrive before an output sample is final, in samples, by perturbing the input.

    For every place in a hop, one input sample is moved; the first output sample that changes, on the input's own time
    axis, is as far ahead of it as the algorithm looks. That reach, the longest that noise of three levels shows, plus
    the sample itself is the latency.
    """
    stream = make_stream(bundle, channels=bundle.manifest.spectral.hop_samples + 1, provider=provider)
    return max(_reach_samples(bundle, stream, quiet, seed) for seed, quiet in enumerate((1e-3, 1e-2, 1e-4))) + 1


def _reach_samples(bundle: Bundle, stream: AnyStream, quiet: float, seed: int) -> int:
    """How far ahead of an output sample the algorithm looks, as one background of noise shows it.

    Quiet around a large move, so that the faint ends of the windows are not lost in rounding; some may be all the same.
    """
    hop, delay = bundle.manifest.spectral.hop_samples, bundle.manifest.stream_delay_samples
    hops, moved = 12, 6
    stream.reset()
    audio = np.tile(np.random.default_rng(seed).standard_normal(hops * hop).astype(np.float32) * quiet, (hop + 1, 1))
    places = moved * hop + np.arange(hop)
    audio[np.arange(hop), places] += 0.9
    stream.style[:] = np.array(bundle.manifest.styles[0].vector, np.float32)
    outs = []
    for at in range(hops):
        stream.audio[:] = audio[:, at * hop : (at + 1) * hop]
        outs.append(stream.step().copy())
    out = np.concatenate(outs, axis=1)
    first = (out[:hop] != out[hop]).argmax(axis=1) - delay
    return int((places - first).max())


def measure_processor_latency(bundle: Bundle, provider: str = "cpu", block: int = 61) -> int:
    """The delay of the processor in samples: where an impulse comes out on the dry path, in blocks that fit no hop."""
    processor = Processor(bundle, provider)
    processor.controls = mix_controls(
        {bundle.manifest.styles[0]: 1.0}, {p.id: p.default for p in PARAMETERS} | {"dry_wet": 0.0}
    )
    processor.prepare(bundle.manifest.spectral.sample_rate, block, 1)
    audio = np.zeros((1, 40 * block + 1000), np.float32)
    audio[0, 100] = 0.5
    out = np.concatenate(
        [processor.process(audio[:, i : i + block]).copy() for i in range(0, audio.shape[1], block)], 1
    )
    return int(np.abs(out[0]).argmax()) - 100


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def matmul_model(rows: int, columns: int) -> bytes:
    """An ONNX file of one MatMul, [1, rows] by [rows, columns] weights; by hand, so that the engine needs no onnx.

    Field numbers: onnx/onnx.proto.
    """

    def tensor_type(name: bytes, size: int) -> bytes:
        dims = b"".join(_field(1, _field(1, n)) for n in (1, size))
        return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, dims)))

    weights = np.random.default_rng(1).standard_normal((rows, columns)).astype("<f4")
    node = _field(1, b"x") + _field(1, b"w") + _field(2, b"y") + _field(4, b"MatMul")
    initializer = _field(1, rows) + _field(1, columns) + _field(2, 1) + _field(8, b"w") + _field(9, weights.tobytes())
    graph = (
        _field(1, node)
        + _field(2, b"matmul")
        + _field(5, initializer)
        + _field(11, tensor_type(b"x", rows))
        + _field(12, tensor_type(b"y", columns))
    )
    return _field(1, 9) + _field(7, graph) + _field(8, _field(2, 18))


class _MatMul:
    """One onnxruntime MatMul with as many weights as the model, bound like the model is."""

    def __init__(self, weight_count: int) -> None:
        columns = 1024
        rows = max(1, round(weight_count / columns))
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(matmul_model(rows, columns), options, providers=["CPUExecutionProvider"])
        self._x = np.random.default_rng(2).standard_normal((1, rows)).astype(np.float32)
        self._y = np.zeros((1, columns), np.float32)
        self._binding = self._session.io_binding()
        self._binding.bind_input("x", "cpu", 0, np.float32, self._x.shape, self._x.ctypes.data)
        self._binding.bind_output("y", "cpu", 0, np.float32, self._y.shape, self._y.ctypes.data)

    def step(self) -> None:
        self._session.run_with_iobinding(self._binding)


def measure_compute(
    bundle: Bundle,
    provider: str,
    hops: int,
    channels: int = 1,
    others: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Milliseconds per hop [hops] by name, taken in turns of TURN_HOPS in one run.

    'processor' is the whole of Processor.process; 'copy_in' (audio and style into the bound buffers), 'graph' and
    'copy_out' are its parts without the plugin around them; each of ``others`` is timed per call. On a GPU, 'graph'
    holds the transfers to the device and back.
    """
    hop = bundle.manifest.spectral.hop_samples
    processor = Processor(bundle, provider)
    processor.prepare(bundle.manifest.spectral.sample_rate, hop, channels)
    bare = Stream(bundle, channels, provider=provider)
    bare.warm_up()
    style, out = processor.controls.style, np.zeros((channels, hop), np.float32)
    audio = _playing(bundle, hop, channels)
    blocks = audio.shape[1]
    clock = perf_counter_ns

    def run_processor(number: int) -> tuple[int, ...]:
        block = audio[:, number % blocks]
        start = clock()
        processor.process(block)
        return (clock() - start,)

    def run_bare(number: int) -> tuple[int, ...]:
        block = audio[:, number % blocks]
        start = clock()
        bare.audio[:] = block
        bare.style[:] = style
        copied_in = clock()
        result = bare.step()
        done = clock()
        out[:] = result
        return copied_in - start, done - copied_in, clock() - done

    def run_other(step: Callable[[], object]) -> Callable[[int], tuple[int, ...]]:
        def run(_: int) -> tuple[int, ...]:
            start = clock()
            step()
            return (clock() - start,)

        return run

    turns: dict[tuple[str, ...], Callable[[int], tuple[int, ...]]] = {
        ("processor",): run_processor,
        ("copy_in", "graph", "copy_out"): run_bare,
    } | {(name,): run_other(step) for name, step in (others or {}).items()}
    times = {names: np.zeros((hops, len(names))) for names in turns}
    # Let caches and clocks settle before anything counts.
    for at in range(-2 * TURN_HOPS, hops, TURN_HOPS):
        for names, run in turns.items():
            for number in range(at, min(at + TURN_HOPS, hops)):
                elapsed_ns = run(number)
                if number >= 0:
                    times[names][number] = elapsed_ns
    return {name: lane[:, i] * 1e-6 for names, lane in times.items() for i, name in enumerate(names)}


def measure_paced(bundle: Bundle, provider: str, hops: int) -> NDArray[np.float64]:
    """Milliseconds [hops] of Processor.process, each hop at the instant at which a device would bring it.

    In between the processor sleeps, and caches and clock cool down: what a loop without a pause does not show.
    """
    spec = bundle.manifest.spectral
    processor = Processor(bundle, provider)
    processor.prepare(spec.sample_rate, spec.hop_samples, 1)
    audio = _playing(bundle, spec.hop_samples, 1)
    times = np.zeros(hops)
    start = time.perf_counter()
    for number in range(hops):
        wait = start + number * spec.hop_seconds - time.perf_counter()
        if wait > 0.0:
            time.sleep(wait)
        else:
            start -= wait  # time slips, as it would on a device
        block = audio[:, number % audio.shape[1]]
        before = perf_counter_ns()
        processor.process(block)
        times[number] = perf_counter_ns() - before
    return times * 1e-6


def measure_channels(
    bundle: Bundle, provider: str, hops: int, limit: int, say: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """The split of the time per hop at 1, 2, 4, 8 ... channels, each one performer.

    Ends after the first number whose p99 is longer than the hop, or at ``limit``.
    """
    budget_ms = 1e3 * bundle.manifest.spectral.hop_seconds
    rows: list[dict[str, Any]] = []
    channels = 1
    while channels <= limit and not (rows and rows[-1]["processor_ms"]["p99"] > budget_ms):
        say(f"{channels} channels")
        times = measure_compute(bundle, provider, hops, channels)
        rows.append(
            {"channels": channels}
            | {f"{name}_ms": percentiles_ms(lane) for name, lane in times.items()}
            | {"late_hops": int((times["processor"] > budget_ms).sum())}
        )
        channels *= 2
    return rows


def performers_in_real_time(rows: list[dict[str, Any]], budget_ms: float) -> int:
    """The largest number of channels tried whose p99 is within the hop; 0 if not even one is."""
    return max((row["channels"] for row in rows if row["processor_ms"]["p99"] <= budget_ms), default=0)


def histogram(times: Mapping[str, NDArray[np.float64]], edges: NDArray[np.float64]) -> dict[str, Any]:
    """Counts by name between ``edges``, in the unit of the times; only the bins from the first to the last in use."""
    counts = {name: np.histogram(np.clip(lane, edges[0], edges[-1]), edges)[0] for name, lane in times.items()}
    used = np.flatnonzero(sum(counts.values()))
    bins = slice(used[0], used[-1] + 1) if len(used) else slice(0, 0)
    return {
        "edges": [float(f"{edge:.4g}") for edge in edges[bins.start : bins.stop + 1]],
        "counts": {name: lane[bins].tolist() for name, lane in counts.items()},
    }


def _playing(bundle: Bundle, hop: int, channels: int) -> NDArray[np.float32]:
    """The bundled clip as blocks [channels, hops, hop]; each channel is at another place in it."""
    audio = demo_playing(bundle.manifest.spectral.sample_rate)
    blocks = audio[: len(audio) // hop * hop].reshape(-1, hop)
    return np.stack([np.roll(blocks, -97 * channel, axis=0) for channel in range(channels)])


def _fresh_python(what: str, *arguments: str) -> list[float]:
    """The numbers that a fresh interpreter prints. Raises MeasureError when it fails or takes too long."""
    try:
        result = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=True, timeout=FRESH_TIMEOUT_S
        )
        return [float(number) for number in result.stdout.split()]
    except subprocess.TimeoutExpired:
        raise MeasureError(f"{what}: not done within {FRESH_TIMEOUT_S:g} s; --no-startup leaves it out") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise MeasureError(f"{what}: {last}; --no-startup leaves it out") from None


def measure_import_s(runs: int = 5) -> float:
    """Median seconds of ``import realtime`` in a fresh interpreter, beyond the interpreter's own start."""
    code = "import time; t = time.perf_counter(); import realtime; print(time.perf_counter() - t)"
    return float(np.median([_fresh_python("import realtime", "-c", code)[-1] for _ in range(runs)]))


def measure_cold_start_s(model: Path, provider: str, runs: int = 3) -> dict[str, float]:
    """Median seconds of a fresh process: 'import' of the engine, 'load' (model read, session made, warmed up) and
    'first_hop', and the 'total' from starting the interpreter to the end of that hop."""
    code = (
        "import sys, time; clock = time.perf_counter; t = [clock()]\n"
        "import numpy as np; from realtime.bundle import read_bundle; from realtime.processor import Processor\n"
        "t.append(clock()); processor = Processor(read_bundle(sys.argv[1]), sys.argv[2]); hop = processor.hop_samples\n"
        "processor.prepare(processor.manifest.spectral.sample_rate, hop, 1)\n"
        "t.append(clock()); processor.process(np.zeros((1, hop), np.float32))\n"
        "t.append(clock()); print(*np.diff(t), time.time() - float(sys.argv[3]))\n"
    )
    taken = [_fresh_python("cold start", "-c", code, str(model), provider, repr(time.time())) for _ in range(runs)]
    names = ("import", "load", "first_hop", "total")
    return {name: round(float(value), 6) for name, value in zip(names, np.median(taken, axis=0), strict=True)}


def measure_live_start_s(model: Path, provider: str, runs: int = 3) -> float:
    """Median seconds from starting ``restyle live`` until its audio process has put out its first block."""
    code = (
        "import time; t = time.time() - time.process_time()\n"
        "import sys; from pathlib import Path\n"
        "from realtime.live import LiveSettings, Performance; from realtime.bundle import DEMO_CLIP, DEMO_MIDI\n"
        "import realtime.cli\n"
        "if __name__ == '__main__':\n"
        " s = LiveSettings(Path(sys.argv[1]), provider=sys.argv[2], clip=DEMO_CLIP, midi=str(DEMO_MIDI))\n"
        " with Performance(s) as p:\n"
        "  while p.status().meters.frames == 0:\n"
        "   if p.poll(): sys.exit('the performance ended without a sound')\n"
        "   time.sleep(0.002)\n"
        "  print(time.time() - t)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "start.py"
        script.write_text(code)
        arguments = (str(script), str(model), provider)
        return float(np.median([_fresh_python("restyle live", *arguments)[-1] for _ in range(runs)]))


def measure_render_speed(bundle: Bundle, provider: str) -> float:
    """Times real time of ``render`` on the bundled clip."""
    from realtime.audio import file_info
    from realtime.render import render_file

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        render_file(bundle, DEMO_CLIP, Path(folder) / "out.wav", Performer(bundle.manifest), provider=provider)
        elapsed = time.perf_counter() - start
    info = file_info(DEMO_CLIP)
    return info.frames / info.sample_rate / elapsed


def _machine() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def _commit() -> str:
    """``git describe`` of the checkout that holds this package, else the installed version."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        # An installed package may lie in somebody else's checkout.
        for arguments in (("ls-files", "--error-unmatch", "bench.py"), ("describe", "--always", "--dirty", "--tags")):
            result = subprocess.run([*git, *arguments], capture_output=True, text=True, check=True, timeout=10)
        return result.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return _version()


def _version() -> str:
    try:
        return metadata.version("restyle")
    except metadata.PackageNotFoundError:
        return "unknown"


def origin(bundle: Bundle, provider: str) -> dict[str, Any]:
    """What was measured, where and when; every log line starts with it."""
    spec = bundle.manifest.spectral
    return {
        "model": bundle.manifest.name,
        "provider": provider,
        "machine": _machine(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
        "sample_rate": spec.sample_rate,
        "hop_samples": spec.hop_samples,
        "hop_ms": round(1e3 * spec.hop_seconds, 4),
    }


def append_log(path: Path, figures: dict[str, Any]) -> None:
    """One line of JSON at the end of a file, which is made if it is not there. Raises OSError."""
    with path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(figures, separators=(",", ":")) + "\n")


@dataclass(frozen=True)
class BenchSettings:
    """What to measure; ``max_channels`` 0 leaves out the channels, ``compare`` is another model to run in turns."""

    model: Path
    provider: str = "cpu"
    hops: int = 10_000
    startup: bool = True
    max_channels: int = 128
    compare: CompareSettings | None = None


def read_measurable(path: Path) -> Bundle:
    """A model whose way from input to output can be measured. Raises BundleError."""
    bundle = read_bundle(path)
    remedy = "give a model of kind 'transfer'; 'restyle check --model FILE' times the hops of one of kind 'generate'"
    check_kind(bundle, "transfer", "has no way from an input to an output that could be measured", remedy)
    return bundle


def measure(
    settings: BenchSettings, say: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """All figures of this process as plain values, and the times in ms that they come from; ``say`` hears what is next.

    Raises BundleError, CompareError, ProviderError, MeasureError.
    """
    provider, hops = settings.provider, settings.hops
    begin = time.perf_counter()
    bundle = read_measurable(settings.model)
    loaded = Processor(bundle, provider)
    loaded.prepare(bundle.manifest.spectral.sample_rate, 128, 1)
    load_s = time.perf_counter() - begin
    manifest, spec = bundle.manifest, bundle.manifest.spectral
    others: dict[str, Callable[[], object]] = {"matmul": _MatMul(manifest.weight_count).step}
    other = None
    if settings.compare is not None:
        other = other_model(settings.compare, provider, spec.sample_rate, spec.hop_samples)
        others["compare"] = other.step
    say("latency")
    latency = {
        "algorithmic_latency_samples": {
            "declared": manifest.latency_samples,
            "measured": measure_algorithmic_latency(bundle, provider),
        },
        "processor_latency_samples": {
            "declared": manifest.latency_samples,
            "measured": measure_processor_latency(bundle, provider),
        },
    }
    say("time per hop")
    times = measure_compute(bundle, provider, hops, others=others)
    say("time per hop at the pace of a performance")
    times["paced"] = measure_paced(bundle, provider, min(hops, round(PACED_S / spec.hop_seconds)))
    processor, graph, matmul = (np.median(times[name]) for name in ("processor", "graph", "matmul"))
    budget_ms = 1e3 * spec.hop_seconds
    figures = origin(bundle, provider) | latency
    figures |= {
        "hops": hops,
        "compute_ms": percentiles_ms(times["processor"]),
        "paced_ms": percentiles_ms(times["paced"]),
        "graph_ms": percentiles_ms(times["graph"]),
        "matmul_ms": percentiles_ms(times["matmul"]),
        "split_ms": {name: percentiles_ms(times[name]) for name in ("copy_in", "graph", "copy_out", "processor")},
        "histogram_ms": histogram(times, HISTOGRAM_EDGES_MS),
        "hop_share_p50": round(float(processor / budget_ms), 4),
        "real_time_factor": round(float(times["processor"].mean() / budget_ms), 4),
        "late_hops": int((times["processor"] > budget_ms).sum()),
        "overhead_ratio": round(float(processor / graph), 4),
        "matmul_ratio": round(float(graph / matmul), 4),
        "load_s": round(load_s, 3),
        "cuda_graphs": isinstance(loaded.stream, Stream) and loaded.stream.captured,
    }
    if other is not None:
        figures["compare"] = other.figures(times["compare"], times["graph"], budget_ms)
    if settings.max_channels:
        rows = measure_channels(bundle, provider, min(hops, CHANNEL_HOPS), settings.max_channels, say)
        figures["channels"] = rows
        figures["performers_in_real_time"] = performers_in_real_time(rows, budget_ms)
    if settings.startup:
        say("start-up")
        figures["import_realtime_s"] = round(measure_import_s(), 4)
        figures["cold_start_s"] = measure_cold_start_s(settings.model, provider)
        figures["live_start_s"] = round(measure_live_start_s(settings.model, provider), 3)
        say("render")
        figures["render_times_real_time"] = round(measure_render_speed(bundle, provider), 2)
    return figures, times
