"""The ``restyle`` command. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

COMMAND_GROUP = "restyle.commands"
PLAIN: dict[str, Any] = {"soft_wrap": True, "highlight": False, "markup": False}
"""How text that holds names of the user's goes to a console: as it is."""
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class _Commands(TyperGroup):
    """Commands of this file, and those that other packages add through entry points, loaded when asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *(point.name for point in entry_points(group=COMMAND_GROUP))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for point in entry_points(group=COMMAND_GROUP, name=cmd_name):
            single = typer.Typer(add_completion=False)
            single.command(cmd_name)(point.load())
            return typer.main.get_command(single)
        return None


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ModelOption = Annotated[Path | None, typer.Option("--model", "-m", help="Model file; default: the shipped one.")]
LearnedOption = Annotated[
    list[Path] | None, typer.Option(help="Style file of 'restyle learn'; give it again for more.")
]
InputOption = Annotated[str | None, typer.Option("--input", help="Audio input: index or part of the name.")]
OutputOption = Annotated[str | None, typer.Option(help="Audio output: index or part of the name.")]
ChannelsOption = Annotated[int, typer.Option(min=1, max=64, help="Input channels to restyle.")]
BlockOption = Annotated[
    int, typer.Option(min=0, max=8192, help="Block in samples; 0: one hop, with JACK the server's period.")
]
MidiOption = Annotated[
    str | None, typer.Option(help="MIDI port (index, part of the name, 'virtual') or file; default: all ports.")
]
MapOption = Annotated[Path | None, typer.Option("--map", help="TOML file: which controller moves what.")]
ProviderOption = Annotated[str, typer.Option(help="cpu, cuda or tensorrt.")]


@app.callback()
def _about() -> None:
    """Play one instrument, hear another, 5 ms later."""


def _model(path: Path | None) -> Path:
    from realtime.bundle import DEFAULT_MODEL

    return DEFAULT_MODEL if path is None else path


def _recogniser(path: Path | None) -> Path:
    from realtime.bundle import DEFAULT_RECOGNISER

    return DEFAULT_RECOGNISER if path is None or str(path) == "shipped" else path


def _fail(what: str, error: object) -> typer.Exit:
    Console(stderr=True).print(f"[red]{what}:[/] ", end="")
    Console(stderr=True).print(str(error), **PLAIN)
    return typer.Exit(1)


@app.command()
def devices(as_json: JsonOption = False) -> None:
    """Audio devices and MIDI ports, with the defaults marked.

    Example: restyle devices
    """
    from realtime import midi
    from realtime.audio import DeviceError, list_devices

    problem = ""
    try:
        audio = list_devices()
    except DeviceError as error:
        audio, problem = [], str(error)
    ports_in, ports_out = midi.list_ports("input"), midi.list_ports("output")
    if as_json:
        listing = {
            "audio": [asdict(device) for device in audio],
            "midi_inputs": [{"index": i, "api": api, "name": name} for i, (api, name) in enumerate(ports_in)],
            "midi_outputs": [{"index": i, "api": api, "name": name} for i, (api, name) in enumerate(ports_out)],
            "problem": problem,
        }
        print(json.dumps(listing))
        return
    console = Console()
    if audio:
        table = Table("index", "audio device", "host API", "in", "out", "rate", "default")
        for device in audio:
            marks = " ".join(
                mark for mark, on in (("input", device.default_input), ("output", device.default_output)) if on
            )
            table.add_row(
                str(device.index),
                escape(device.name),
                escape(device.host_api),
                str(device.inputs),
                str(device.outputs),
                f"{device.sample_rate:g}",
                marks,
            )
        console.print(table)
    else:
        console.print(f"no audio device{f' ({problem})' if problem else ''}", markup=False)
    for title, ports in (("MIDI inputs", ports_in), ("MIDI outputs", ports_out)):
        console.print(f"{title}: {'' if ports else 'none'}")
        for index, (api, name) in enumerate(ports):
            console.print(f"  {index}: {name} ({api})", **PLAIN)


@app.command()
def info(
    model: Annotated[Path | None, typer.Argument(help="Model file; default: the shipped one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """The model card: styles, latency, states, training, licences.

    Example: restyle info violin.onnx
    """
    from realtime.bundle import BundleError, read_bundle

    path = _model(model)
    try:
        bundle = read_bundle(path)
    except BundleError as error:
        raise _fail("cannot read the model", error) from None
    manifest = bundle.manifest
    if as_json:
        print(manifest.to_json())
        return
    console, spec, card = Console(), manifest.spectral, manifest.card
    console.print(f"[bold]{escape(manifest.name)}[/] ({manifest.kind}), {len(bundle.graph) / 1e6:.2f} MB: ", end="")
    console.print(card.description, markup=False)
    console.print(
        f"{spec.sample_rate} Hz, hop {spec.hop_samples}, windows {spec.analysis_window_samples} and "
        f"{spec.synthesis_window_samples}; latency {manifest.latency_samples} samples "
        f"({1e3 * manifest.latency_samples / spec.sample_rate:.2f} ms); {manifest.weight_count:,} weights"
    )
    made = manifest.kind == "transfer"  # other kinds have no sound of their own
    table = Table("style", "label", "MIDI program", *(["loudness LUFS"] if made else []))
    for style in manifest.styles:
        loudness = [f"{style.loudness_lufs:.1f}"] if made else []
        table.add_row(escape(style.id), escape(style.label), str(style.program), *loudness)
    console.print(table)
    states = ", ".join(f"{state.name} {list(state.shape)}" for state in manifest.states)
    console.print(f"states: {states}", **PLAIN)
    console.print(
        f"trained: objective {card.objective}, {card.steps} steps, {card.training_minutes:g} minutes, {card.date}, "
        f"commit {card.commit or 'unknown'}",
        markup=False,
    )
    console.print("metrics: " + ", ".join(f"{name} {value:g}" for name, value in card.metrics.items()), markup=False)
    console.print("training recordings:")
    for source in card.sources:
        console.print(
            f"  {source.style}: {source.recordings} recordings, {source.minutes:g} minutes, {source.licence}: "
            f"{source.attribution}",
            **PLAIN,
        )


@app.command()
def live(
    model: ModelOption = None,
    learned: LearnedOption = None,
    style: Annotated[str | None, typer.Option(help="First style, or a mix: violin=0.7,choir=0.3")] = None,
    morph_to: Annotated[str | None, typer.Option(help="The second style, which the morph control moves to.")] = None,
    dry_wet: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="0 dry, 1 wet.")] = None,
    input_: InputOption = None,
    output: OutputOption = None,
    channels: ChannelsOption = 1,
    block: BlockOption = 0,
    midi: MidiOption = None,
    midi_map: MapOption = None,
    provider: ProviderOption = "cpu",
    record: Annotated[Path | None, typer.Option(help="Folder for input.wav, output.wav and performance.png.")] = None,
    clip: Annotated[
        Path | None, typer.Option(help="Perform a sound file at real-time pace instead of a device.")
    ] = None,
    loop: Annotated[bool, typer.Option(help="Play the clip round and round.")] = False,
    inference: Annotated[
        str,
        typer.Option(
            help="Where the graph runs: 'worker', a process that the audio callback waits for; 'deferred', one whose "
            "answer it takes a hop later, for the smallest blocks; 'callback', in the callback itself."
        ),
    ] = "worker",
    patience: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="MS", help="How long to wait for a hop before the dry signal takes its place."),
    ] = None,
    recognise: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL", help="Show which style goes in and which comes out: a recogniser's file, or 'shipped'."
        ),
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="Stop after this time; default: at Ctrl-C.")] = None,
) -> None:
    """Perform: audio in, restyled audio out, MIDI in command. Ctrl-C ends.

    Example: restyle live --style violin --midi pad --record take1
    """
    from realtime.audio import AudioFileError
    from realtime.bundle import BundleError, StyleError
    from realtime.learned import LearnError
    from realtime.live import LiveSettings, NoAudioDeviceError, Performance, PerformanceError
    from realtime.midi import MidiError, MidiMap

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    console = Console()
    if record is not None and (record / "output.wav").exists():
        raise _fail("cannot perform", f"{record} holds a recording already; choose another folder for --record")
    try:
        settings = LiveSettings(
            model=_model(model),
            learned=tuple(learned or ()),
            style=style,
            second_style=morph_to,
            dry_wet=dry_wet,
            input_device=input_,
            output_device=output,
            channels=channels,
            block=block,
            midi=midi,
            midi_map=MidiMap.load(midi_map) if midi_map else MidiMap(),
            provider=provider,
            record=record,
            clip=clip,
            loop=loop,
            inference=inference,
            patience_ms=patience,
            recognise=_recogniser(recognise) if recognise else None,
        )
        try:
            _perform(Performance(settings), console, seconds)
        except NoAudioDeviceError as error:
            settings = settings.without_device()
            console.print(
                f"{error}: performing the bundled clip at real-time pace, into {settings.record}/",
                **PLAIN,
            )
            _perform(Performance(settings), console, seconds)
    except (BundleError, LearnError, StyleError, MidiError, AudioFileError, PerformanceError) as error:
        raise _fail("cannot perform", error) from None


def _perform(performance: Any, console: Console, seconds: float | None) -> None:
    """Run until the clip ends, the time is over or Ctrl-C."""
    from rich.live import Live

    from realtime.panel import panel, source_line, status_line

    stop_asked = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal stop_asked
        del number, frame
        stop_asked = True

    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        with performance:
            if not console.is_terminal:
                console.print(f"performing: {source_line(performance)}", **PLAIN)
            started, said = time.monotonic(), 0.0
            screen = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
            if screen:
                screen.start()
            try:
                while not performance.poll() and not stop_asked:
                    now = time.monotonic()
                    if seconds is not None and now - started >= seconds:
                        break
                    if screen:
                        screen.update(panel(performance, performance.status()), refresh=True)
                    elif now - said >= 2.0:
                        said = now
                        console.print(status_line(performance.status()), **PLAIN)
                    time.sleep(0.1)
            finally:
                if screen:
                    screen.stop()
                _farewell(performance, console)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _farewell(performance: Any, console: Console) -> None:
    """Stop, and say how it went and what was left, whether the performance ended well or not."""
    from realtime.panel import latency_line, status_line

    summary = performance.stop()
    status = summary.status
    console.print(status_line(status), **PLAIN)
    console.print(f"latency {latency_line(performance, int(status.meters.block))}", **PLAIN)
    if status.recorder_problem:
        console.print("[yellow]recording:[/] ", end="")
        console.print(status.recorder_problem, **PLAIN)
    for path in summary.files:
        console.print(f"left: {path}", **PLAIN)


@app.command()
def render(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Sound file or folder.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Sound file or folder.")],
    model: ModelOption = None,
    learned: LearnedOption = None,
    style: Annotated[str | None, typer.Option(help="Style, or a mix: violin=0.7,choir=0.3")] = None,
    midi: Annotated[Path | None, typer.Option(help="MIDI file that performs the styles.")] = None,
    midi_map: MapOption = None,
    dry_wet: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="0 dry, 1 wet.")] = None,
    provider: ProviderOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Files or folders through the engine, faster than real time; output lines up with input to the sample.

    Example: restyle render guitar.wav violin.wav --style violin
    """
    from rich.progress import Progress

    from realtime.audio import AudioFileError
    from realtime.bundle import BundleError, ProviderError, StyleError, read_bundle
    from realtime.controls import Performer, select_mix
    from realtime.learned import LearnError, add_styles
    from realtime.midi import MidiError, MidiMap, read_midi_file
    from realtime.render import plan_files, render_file

    console = Console(stderr=True)
    done, failed = [], []
    try:
        bundle = add_styles(read_bundle(_model(model)), learned or ())
        events = read_midi_file(midi) if midi else []
        mapped = MidiMap.load(midi_map) if midi_map else MidiMap()
        pairs = plan_files(source, target)

        def performer() -> Performer:
            fresh = Performer(bundle.manifest)
            if style:
                select_mix(fresh, style)
            if dry_wet is not None:
                fresh.set("dry_wet", dry_wet)
            return fresh

        performer()
        with Progress(console=console, transient=True, disable=as_json) as progress:
            for path, out in pairs:
                task = progress.add_task(escape(path.name), total=1.0)
                try:
                    started = time.perf_counter()
                    result = render_file(
                        bundle,
                        path,
                        out,
                        performer(),
                        events,
                        mapped,
                        provider,
                        lambda at, of, task=task: progress.update(task, completed=at / of),
                    )
                    elapsed = time.perf_counter() - started
                    speed = result.frames / result.sample_rate / elapsed
                    done.append({**asdict(result), "source": str(path), "target": str(out), "speed": round(speed, 2)})
                except AudioFileError as error:
                    if len(pairs) == 1:
                        raise
                    failed.append(str(error))
    except (BundleError, LearnError, StyleError, MidiError, AudioFileError, ProviderError) as error:
        raise _fail("cannot render", error) from None
    if as_json:
        print(json.dumps({"rendered": done, "failed": failed}))
    else:
        for item in done:
            seconds = item["frames"] / item["sample_rate"]
            print(f"{item['target']}: {seconds:.2f} s, {item['speed']:.1f} times real time")
            if item["bad_input_hops"]:
                print(f"  {item['bad_input_hops']} hops of the input hold NaN or infinity, which became silence")
            if item["bad_output_hops"]:
                why = item["fault"] or "the model gave NaN or infinity"
                print(f"  {item['bad_output_hops']} hops are the dry signal: {why}")
        for problem in failed:
            console.print("[yellow]skipped:[/] ", end="")
            console.print(problem, **PLAIN)
        if len(pairs) > 1:
            print(f"{len(done)} rendered, {len(failed)} skipped")
    if failed:
        raise typer.Exit(1)


@app.command()
def replay(
    show: Annotated[Path, typer.Argument(help="Folder that 'restyle live --record' left.")],
    out: Annotated[Path | None, typer.Option(help="Write what is played to this WAV file.")] = None,
    model: Annotated[Path | None, typer.Option(help="The show's model file, if it is no longer where it was.")] = None,
    as_json: JsonOption = False,
) -> None:
    """A recorded show again, sample for sample: the same input, controls and faults through the same engine.

    Exit code 0 when every sample is the recorded one, 1 otherwise.

    Example: restyle replay take1 --out again.wav
    """
    from rich.progress import Progress

    from realtime.audio import AudioFileError
    from realtime.bundle import BundleError
    from realtime.replay import ShowError, find_model, read_show
    from realtime.replay import replay as play_again

    try:
        found = read_show(show)
        bundle = find_model(found, model)
        with Progress(console=Console(stderr=True), transient=True, disable=as_json) as progress:
            task = progress.add_task(escape(show.name), total=found.frames)
            result = play_again(found, bundle, out, lambda at, _: progress.update(task, completed=at))
    except (ShowError, BundleError, AudioFileError) as error:
        raise _fail("cannot replay", error) from None
    if as_json:
        print(json.dumps({**asdict(result), "whole": found.whole, "dropped_frames": found.dropped_frames}))
    else:
        rate = found.heading.sample_rate
        print(
            f"{result.frames / rate:.2f} s, {result.fault_hops} dry hops and {result.outages} outages as recorded"
            + ("" if found.whole else "; the recording was cut off")
        )
        if result.equal == result.compared:
            print(f"all {result.compared} samples are the recorded ones")
        else:
            print(
                f"{result.compared - result.equal} of {result.compared} samples differ, the first at "
                f"{(result.first_difference or 0) / rate:.3f} s, by {result.largest_difference:.2g} at most"
            )
        if found.dropped_frames:
            print(f"the disk was too slow for {found.dropped_frames} frames, which are missing from the recording")
        if out is not None:
            print(f"left: {out}")
    if result.equal != result.compared:
        raise typer.Exit(1)


@app.command()
def recognise(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Sound files, folders of them, or one of style folders.")
    ],
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="A recogniser's model file; default: the shipped one.")
    ] = None,
    nearest: Annotated[
        Path | None, typer.Option(metavar="LIBRARY", help="Rank the recordings of this folder by how near they are.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="With --nearest: how many.")] = 10,
    cache: Annotated[Path, typer.Option(help="With --nearest: where the index is kept.")] = Path(".restyle-cache"),
    with_known: Annotated[
        bool,
        typer.Option("--with-known", help="In style folders: also the recordings that the recogniser learned from."),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Of style folders: draw confusions and calibration to this PNG.")
    ] = None,
    provider: ProviderOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Which style is this: every three seconds and the whole; of a folder of style folders, how often that is right.

    Example: restyle recognise take1/input.wav --nearest recordings
    """
    from rich.progress import Progress

    from realtime.audio import AudioFileError
    from realtime.bundle import BundleError, ProviderError, read_bundle
    from realtime.files import NewFile, check_writable
    from realtime.recognise import (
        RecogniseError,
        Recogniser,
        evaluate,
        file_sha256,
        find_labelled,
        plan_recordings,
        recognise_all,
    )
    from realtime.recognise_report import (
        draw,
        evaluation_table,
        evaluation_values,
        nearest_table,
        recognition_table,
        recognition_values,
    )

    console, errors = Console(), Console(stderr=True)
    if plot is not None:
        try:
            check_writable(plot)
        except OSError as error:
            raise _fail("cannot write", f"{plot}: {error.strerror}; choose another file") from None
    failed: list[str] = []
    library = labelled = evaluation = None
    try:
        recogniser = Recogniser(read_bundle(_recogniser(model)), provider)
        styles = recogniser.manifest.styles
        if nearest is None and len(files) == 1 and files[0].is_dir():
            labelled = find_labelled(files[0], recogniser.manifest, with_known)
        if plot is not None and labelled is None:
            raise RecogniseError("--plot: draws one folder of folders that are named as styles are; give one")
        paths = [path for path, _ in labelled.recordings] if labelled else plan_recordings(files)
        with Progress(console=errors, transient=True, disable=as_json) as progress:

            def told(what: str) -> Callable[[int, int], None]:
                task = progress.add_task(what, total=None)
                return lambda done, of: progress.update(task, completed=done, total=of)

            if nearest is not None:
                library = _library(nearest, recogniser, cache)
                failed += library.update(told("hearing the library"))
            heard, problems = recognise_all(recogniser, paths, told("recognising"))
        failed += problems
        result: dict[str, Any] = {"model": recogniser.manifest.name, "failed": failed}
        if labelled:
            known = [(heard[path], number) for path, number in labelled.recordings if path in heard]
            if not known:
                raise RecogniseError(f"{files[0]}: none of its recordings can be heard ({problems[0]})")
            evaluation = evaluate(known, [style.id for style in styles])
            result |= {"left_out_known": labelled.known, "left_out_folders": list(labelled.foreign)}
            result |= evaluation_values(evaluation)
            if plot:
                with NewFile(plot) as part:
                    draw(part, evaluation, f"'{recogniser.manifest.name}' on {files[0]}")
        result["files"] = [recognition_values(heard[path], styles) for path in paths if path in heard]
        neighbours = {
            path: library.nearest(found.embedding, count, without=file_sha256(path))
            for path, found in heard.items()
            if library is not None
        }
        for values in result["files"] if library is not None else ():
            values["nearest"] = [asdict(neighbour) for neighbour in neighbours[Path(values["file"])]]
    except (BundleError, ProviderError, AudioFileError, RecogniseError, OSError) as error:
        raise _fail("cannot recognise", error) from None
    if as_json:
        print(json.dumps(result))
    elif labelled and evaluation:
        console.print(evaluation_table(evaluation))
        print(
            f"{evaluation.accuracy:.1%} of {len(evaluation.right)} excerpts, {evaluation.mean_style_accuracy:.1%} in "
            f"the mean of styles, {evaluation.recordings_right} of {evaluation.recordings} whole recordings; expected "
            f"calibration error {evaluation.calibration_error:.3f}"
        )
        if labelled.known:
            print(f"{labelled.known} recordings that it learned from are left out; --with-known takes them in")
        for name in labelled.foreign:
            console.print(f"left out: {name}, no style of '{recogniser.manifest.name}'", **PLAIN)
    else:
        for path, found in heard.items():
            console.print(recognition_table(found, styles))
            if library is not None:
                console.print(nearest_table(found, neighbours[path]))
    for problem in failed:
        errors.print("[yellow]skipped:[/] ", end="")
        errors.print(problem, **PLAIN)
    if failed or not heard:
        raise typer.Exit(1)


def _library(folder: Path, recogniser: Any, cache: Path) -> Any:
    """The index of a folder's recordings. Raises RecogniseError, also where faiss is not installed."""
    from realtime.recognise import RecogniseError

    try:
        from realtime.nearest import RecordingLibrary
    except ModuleNotFoundError as error:
        raise RecogniseError(f"--nearest needs {error.name}; install it with: pip install 'restyle[nearest]'") from None
    return RecordingLibrary(folder, recogniser, cache)


@app.command()
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

    console = Console()
    for path in (json_path, plot, log):
        if path is not None:
            try:
                check_writable(path)
            except OSError as error:
                raise _fail("cannot write", f"{path}: {error.strerror}; choose another file") from None

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
            figures = _soak(_model(model), provider, soak_minutes, write_json)
        else:
            other = CompareSettings(compare, compare_hop, compare_rate) if compare else None
            settings = BenchSettings(_model(model), provider, hops, startup, max_channels, other)
            with Console(stderr=True).status("measuring") as status:
                through = _jack_bench(settings.model, provider, switches) if jack else None
                figures, times = measure(settings, status.update)
                if through is not None:
                    figures["jack"] = through(status.update)
    except (BundleError, CompareError, ProviderError, MeasureError) as error:
        raise _fail("cannot measure", error) from None
    console.print(table(figures))
    try:
        write_json(figures)
        if log:
            append_log(log, figures)
        if plot:
            with NewFile(plot) as part:
                draw(part, figures, times)
    except OSError as error:
        raise _fail("cannot write", error) from None


def _jack_bench(model: Path, provider: str, switches: int) -> Callable[[Callable[[str], None]], dict[str, Any]]:
    """The JACK part of a bench, to be called later; what it lacks is said now, before the long work."""
    from realtime.bench_jack import JackSettings, jack_library, measure_jack
    from realtime.bundle import read_bundle

    jack_library()
    return lambda say: measure_jack(read_bundle(model), JackSettings(provider, switches), say)


def _soak(model: Path, provider: str, minutes: float, write_json: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The figures of a soak, written after every slice; Ctrl-C ends it with what there is."""
    from realtime.bench import MeasureError, origin
    from realtime.bundle import read_bundle
    from realtime.soak import SoakSettings, soak

    stop_asked = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal stop_asked
        del number, frame
        stop_asked = True

    console = Console(stderr=True)
    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        bundle = read_bundle(model)
        figures = origin(bundle, provider)
        slices = soak(
            bundle,
            SoakSettings(provider, minutes),
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


@app.command()
def check(
    model: ModelOption = None,
    input_: InputOption = None,
    output: OutputOption = None,
    channels: ChannelsOption = 1,
    block: BlockOption = 0,
    midi: MidiOption = None,
    midi_map: MapOption = None,
    provider: ProviderOption = "cpu",
    record: Annotated[Path | None, typer.Option(help="Folder that 'live' would record into.")] = None,
    seconds: Annotated[float, typer.Option(min=1.0, max=3600.0, help="How long to play for the time per hop.")] = 30.0,
    as_json: JsonOption = False,
) -> None:
    """The sound check before doors: one line each for what 'live' needs, pass, warn or fail, and what to do.

    It plays at -60 dB through the real devices. Exit code 0 when nothing failed, 1 otherwise.

    Example: restyle check --input scarlett --midi pad --record take1
    """
    from realtime.bundle import BundleError
    from realtime.check import sound_check
    from realtime.live import LiveSettings
    from realtime.midi import MidiError, MidiMap

    console, colours = Console(stderr=as_json), {"pass": "green", "warn": "yellow", "fail": "red"}
    findings = []
    try:
        settings = LiveSettings(
            model=_model(model),
            input_device=input_,
            output_device=output,
            channels=channels,
            block=block,
            midi=midi,
            midi_map=MidiMap.load(midi_map) if midi_map else MidiMap(),
            provider=provider,
            record=record,
        )
        with console.status(f"checking, of which {seconds:g} s playing"):
            for finding in sound_check(settings, seconds):
                findings.append(finding)
                if not as_json:
                    console.print(f"[{colours[finding.verdict]}]{finding.verdict}[/]  {finding.id:<9}", end="")
                    console.print(finding.text + (f" -> {finding.remedy}" if finding.remedy else ""), **PLAIN)
    except (BundleError, MidiError) as error:
        raise _fail("cannot check", error) from None
    failed = [finding.id for finding in findings if finding.verdict == "fail"]
    if as_json:
        print(json.dumps({"passed": not failed, "findings": [asdict(finding) for finding in findings]}))
    if failed:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 usage."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
