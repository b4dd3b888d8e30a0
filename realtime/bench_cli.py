"""``restyle bench``: figures as a table, JSON, log line and picture."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from realtime.cli import PLAIN, STOP_SIGNALS, ProviderOption, failure, model_file


def bench(
    model: Annotated[Path | None, typer.Argument(help="Model file; default: the shipped one.")] = None,
    provider: ProviderOption = "cpu",
    hops: Annotated[int, typer.Option(min=500, help="Hops to time.")] = 10_000,
    startup: Annotated[bool, typer.Option(help="Also time imports, 'restyle live' and 'restyle render'.")] = True,
    max_channels: Annotated[
        int, typer.Option(min=0, max=4096, help="Try 1, 2, 4 ... performers up to this many; 0: none.")
    ] = 128,
    jack: Annotated[
        bool, typer.Option("--jack", help="Also through a JACK server: round trip, MIDI to sound.")
    ] = False,
    switches: Annotated[int, typer.Option(min=1, max=10_000, help="Switches of style for MIDI to sound.")] = 200,
    compare: Annotated[Path | None, typer.Option(help="Another streaming ONNX model to run in turns.")] = None,
    compare_hop: Annotated[
        int | None, typer.Option(min=1, help="Samples that one step of it takes; default: as it says, else ours.")
    ] = None,
    compare_rate: Annotated[
        int | None, typer.Option(min=1, help="Its sample rate; default: as it says, else ours.")
    ] = None,
    soak_minutes: Annotated[
        float | None, typer.Option("--soak", min=0.05, help="Only this: minutes of drop-outs beside an idle client's.")
    ] = None,
    inference: Annotated[
        str | None,
        typer.Option(
            help="With --soak: as 'live' takes it; default: deferred for periods shorter than a hop, else worker."
        ),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    log: Annotated[Path | None, typer.Option(help="Append the figures to this file, one line of JSON a run.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures to this PNG.")] = None,
) -> None:
    """Where the time goes: latency measured by perturbation, time per hop, overhead, performers, start-up, JACK.

    Example: restyle bench --jack --json bench.json --plot bench.png --log bench.jsonl
    """
    from realtime.bench import BenchSettings, MeasureError, append_log, measure
    from realtime.bench_compare import CompareError, CompareSettings
    from realtime.bench_report import draw, table
    from realtime.bundle import BundleError, ProviderError
    from realtime.files import NewFile, check_writable
    from realtime.jack_server import JackServerError
    from realtime.live import INFERENCES

    console = Console()
    if inference is not None and soak_minutes is None:
        raise typer.BadParameter("is for --soak; the rest measures the graph by itself", param_hint="--inference")
    if inference is not None and inference not in INFERENCES:
        raise typer.BadParameter(f"'{inference}' is none of {', '.join(INFERENCES)}", param_hint="--inference")
    for path in (json_path, plot, log):
        if path is not None:
            try:
                check_writable(path)
            except OSError as error:
                raise failure("cannot write", f"{path}: {error.strerror}; choose another file") from None
    if plot is not None and plot.suffix.lower() != ".png":
        raise failure("cannot write", f"{plot}: a picture ends in .png; choose another file")

    def write_json(figures: dict[str, Any]) -> None:
        if json_path:
            with NewFile(json_path) as part:
                part.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    times: dict[str, Any] = {}
    for number in STOP_SIGNALS:
        # However it is ended, the JACK server and the clients that it started go with it.
        signal.signal(number, signal.default_int_handler)
    try:
        if soak_minutes is not None:
            figures = _soak(model_file(model), provider, soak_minutes, inference, write_json)
        else:
            other = CompareSettings(compare, compare_hop, compare_rate) if compare else None
            settings = BenchSettings(model_file(model), provider, hops, startup, max_channels, other)
            with Console(stderr=True).status("measuring") as status:
                through = _jack_bench(settings.model, provider, switches) if jack else None
                figures, times = measure(settings, status.update)
                if through is not None:
                    figures["jack"] = through(status.update)
    except (BundleError, CompareError, ProviderError, MeasureError, JackServerError) as error:
        raise failure("cannot measure", error) from None
    console.print(table(figures))
    try:
        write_json(figures)
        if log:
            append_log(log, figures)
        if plot:
            with NewFile(plot) as part:
                draw(part, figures, times)
    except OSError as error:
        raise failure("cannot write", error) from None


def _jack_bench(model: Path, provider: str, switches: int) -> Callable[[Callable[[str], None]], dict[str, Any]]:
    """The JACK part of a bench, to be called later; what it lacks is said now, before the long work."""
    from realtime.bench_jack import JackSettings, measure_jack
    from realtime.bundle import read_bundle
    from realtime.jack_server import jack_library

    jack_library()
    return lambda say: measure_jack(read_bundle(model), JackSettings(provider, switches), say)


def _soak(
    model: Path, provider: str, minutes: float, inference: str | None, write_json: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The figures of a soak, written after every slice; Ctrl-C ends it with what there is."""
    from realtime.bench import MeasureError, origin, read_measurable
    from realtime.soak import SoakSettings, soak

    stop_asked = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal stop_asked
        del number, frame
        stop_asked = True

    console = Console(stderr=True)
    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        bundle = read_measurable(model)
        figures = origin(bundle, provider)
        slices = soak(
            bundle,
            SoakSettings(provider, minutes, inference),
            lambda: stop_asked,
            lambda text: console.print(text, **PLAIN),
        )
        for so_far in slices:
            figures["soak"] = so_far
            write_json(figures)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if "soak" not in figures:
        raise MeasureError("the soak was ended before its first slice was over")
    return figures
