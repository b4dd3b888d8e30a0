"""Where the time goes, and how much latency there is: measured, with the outliers shown."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from realtime.audio import demo_playing
from realtime.bundle import DEMO_CLIP, Bundle, read_bundle
from realtime.controls import PARAMETERS, Performer, mix_controls
from realtime.processor import Processor
from realtime.show import percentiles_ms
from realtime.stream import Stream

TURN_HOPS = 50
"""Hops timed in one go before the other candidate has its turn."""
FRESH_TIMEOUT_S = 60.0


class MeasureError(RuntimeError):
    """A figure that cannot be measured here; the text says which, why, and how to leave it out."""


def measure_algorithmic_latency(bundle: Bundle, provider: str = "cpu") -> int:
    """How many samples must arrive before an output sample is final, in samples, by perturbing the input.

    For every place in a hop, one input sample is moved; the first output sample that changes, on the input's own time
    axis, is as far ahead of it as the algorithm looks. That reach plus the sample itself is the latency.
    """
    hop, delay = bundle.manifest.spectral.hop_samples, bundle.manifest.stream_delay_samples
    hops, moved = 12, 6
    stream = Stream(bundle, channels=hop + 1, provider=provider)
    # Quiet around a large move, so that the faint ends of the windows are not lost in rounding.
    audio = np.tile(np.random.default_rng(0).standard_normal(hops * hop).astype(np.float32) * 1e-3, (hop + 1, 1))
    places = moved * hop + np.arange(hop)
    audio[np.arange(hop), places] += 0.9
    stream.style[:] = np.array(bundle.manifest.styles[0].vector, np.float32)
    outs = []
    for at in range(hops):
        stream.audio[:] = audio[:, at * hop : (at + 1) * hop]
        outs.append(stream.step().copy())
    out = np.concatenate(outs, axis=1)
    first = (out[:hop] != out[hop]).argmax(axis=1) - delay
    return int((places - first).max()) + 1


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


def measure_compute(bundle: Bundle, provider: str, hops: int) -> dict[str, NDArray[np.float64]]:
    """Milliseconds per hop of 'processor', 'graph' and 'matmul', taken in turns of TURN_HOPS in one run."""
    hop = bundle.manifest.spectral.hop_samples
    processor = Processor(bundle, provider)
    processor.prepare(bundle.manifest.spectral.sample_rate, hop, 1)
    bare = Stream(bundle, 1, provider=provider)
    bare.style[:] = processor.controls.style
    bare.warm_up()
    matmul = _MatMul(bundle.manifest.weight_count)
    audio = _playing(bundle, hop)
    times = {name: np.zeros(hops) for name in ("processor", "graph", "matmul")}
    # Let caches and clocks settle before anything counts.
    for at in range(-2 * TURN_HOPS, hops, TURN_HOPS):
        for name, lane in times.items():
            for number in range(at, min(at + TURN_HOPS, hops)):
                block = audio[:, number % audio.shape[1]]
                if name == "graph":
                    bare.audio[:] = block
                start = perf_counter_ns()
                if name == "processor":
                    processor.process(block)
                elif name == "graph":
                    bare.step()
                else:
                    matmul.step()
                elapsed = perf_counter_ns() - start
                if number >= 0:
                    lane[number] = elapsed * 1e-6
    return times


def _playing(bundle: Bundle, hop: int) -> NDArray[np.float32]:
    """The bundled clip as blocks [1, hops, hop]."""
    audio = demo_playing(bundle.manifest.spectral.sample_rate)
    return audio[: len(audio) // hop * hop].reshape(1, -1, hop)


def _fresh_python(what: str, *arguments: str) -> float:
    """The last number that a fresh interpreter prints. Raises MeasureError when it fails or takes too long."""
    try:
        result = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=True, timeout=FRESH_TIMEOUT_S
        )
        return float(result.stdout.split()[-1])
    except subprocess.TimeoutExpired:
        raise MeasureError(f"{what}: not done within {FRESH_TIMEOUT_S:g} s; --no-startup leaves it out") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise MeasureError(f"{what}: {last}; --no-startup leaves it out") from None


def measure_import_s(runs: int = 5) -> float:
    """Median seconds of ``import realtime`` in a fresh interpreter, beyond the interpreter's own start."""
    code = "import time; t = time.perf_counter(); import realtime; print(time.perf_counter() - t)"
    return float(np.median([_fresh_python("import realtime", "-c", code) for _ in range(runs)]))


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
        return float(np.median([_fresh_python("restyle live", *arguments) for _ in range(runs)]))


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


def measure(
    model: Path, provider: str, hops: int, startup: bool
) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """All figures as plain values, and the times in ms that they come from.

    Raises BundleError, ProviderError, MeasureError.
    """
    begin = time.perf_counter()
    bundle = read_bundle(model)
    Processor(bundle, provider).prepare(bundle.manifest.spectral.sample_rate, 128, 1)
    load_s = time.perf_counter() - begin
    manifest, spec = bundle.manifest, bundle.manifest.spectral
    times = measure_compute(bundle, provider, hops)
    processor, graph, matmul = (np.median(times[name]) for name in ("processor", "graph", "matmul"))
    budget = 1e3 * spec.hop_seconds
    figures: dict[str, Any] = {
        "model": manifest.name,
        "provider": provider,
        "machine": _machine(),
        "date": time.strftime("%Y-%m-%d"),
        "onnxruntime": ort.__version__,
        "sample_rate": spec.sample_rate,
        "hop_samples": spec.hop_samples,
        "hop_ms": round(budget, 4),
        "algorithmic_latency_samples": {
            "declared": manifest.latency_samples,
            "measured": measure_algorithmic_latency(bundle, provider),
        },
        "processor_latency_samples": {
            "declared": manifest.latency_samples,
            "measured": measure_processor_latency(bundle, provider),
        },
        "hops": hops,
        "compute_ms": percentiles_ms(times["processor"]),
        "graph_ms": percentiles_ms(times["graph"]),
        "matmul_ms": percentiles_ms(times["matmul"]),
        "hop_share_p50": round(float(processor / budget), 4),
        "real_time_factor": round(float(times["processor"].mean() / budget), 4),
        "late_hops": int((times["processor"] > budget).sum()),
        "overhead_ratio": round(float(processor / graph), 4),
        "matmul_ratio": round(float(graph / matmul), 4),
        "load_s": round(load_s, 3),
    }
    if startup:
        figures["import_realtime_s"] = round(measure_import_s(), 4)
        figures["live_start_s"] = round(measure_live_start_s(model, provider), 3)
        figures["render_times_real_time"] = round(measure_render_speed(bundle, provider), 2)
    return figures, times


def table(figures: dict[str, Any]) -> Table:
    """The figures for a terminal."""
    rate, budget = figures["sample_rate"], figures["hop_ms"]
    grid = Table("figure", "value", title=escape(f"{figures['model']} on {figures['machine']} ({figures['provider']})"))
    for name, label in (
        ("algorithmic_latency_samples", "algorithmic latency"),
        ("processor_latency_samples", "processor"),
    ):
        value = figures[name]
        milliseconds = 1e3 * value["measured"] / rate
        text = f"{value['measured']} samples ({milliseconds:.2f} ms) measured, {value['declared']} declared"
        grid.add_row(label, text)
    for name, label in (("compute_ms", "processor per hop"), ("graph_ms", "graph alone"), ("matmul_ms", "one MatMul")):
        value = figures[name]
        grid.add_row(
            label,
            f"p50 {value['p50']:.3f}  p99 {value['p99']:.3f}  p99.9 {value['p999']:.3f}  max {value['max']:.3f} ms",
        )
    grid.add_row("share of the hop", f"{figures['hop_share_p50']:.1%} of {budget:.2f} ms at p50")
    grid.add_row("late hops", f"{figures['late_hops']} of {figures['hops']}")
    grid.add_row("processor over graph", f"{figures['overhead_ratio'] - 1:+.1%} at p50")
    grid.add_row("graph over MatMul", f"{figures['matmul_ratio']:.2f} times, with as many weights")
    grid.add_row("model loaded and warm", f"{figures['load_s']:.2f} s")
    if "live_start_s" in figures:
        grid.add_row("import realtime", f"{figures['import_realtime_s']:.3f} s")
        grid.add_row("live until it sounds", f"{figures['live_start_s']:.2f} s")
        grid.add_row("render", f"{figures['render_times_real_time']:.1f} times real time")
    return grid


def draw(path: Path, figures: dict[str, Any], times: dict[str, NDArray[np.float64]]) -> None:
    """Histogram and course of the time per hop, as a PNG. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    top = max(float(np.percentile(lane, 99.9)) for lane in times.values()) * 1.3
    for name, lane in times.items():
        upper.hist(
            lane, bins=np.linspace(0, top, 200).tolist(), histtype="step", label=f"{name}: p50 {np.median(lane):.3f} ms"
        )
    upper.set(yscale="log", xlabel="ms per hop", ylabel="hops", title=f"{figures['model']} on {figures['machine']}")
    upper.legend()
    lower.plot(times["processor"], ".", markersize=1.5)
    lower.axhline(figures["hop_ms"], color="#b03030")
    lower.set(xlabel="hop", ylabel="processor, ms", yscale="log")
    figure.savefig(path, dpi=110, format="png")
