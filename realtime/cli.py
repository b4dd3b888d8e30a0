"""The ``restyle`` command. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
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
# Under nohup a closed terminal ends nothing; Ctrl-C is ignored in every job of a script, and meant all the same.
STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name) and not (name == "SIGHUP" and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN)
]


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
ModelOption = Annotated[Path | None, typer.Option("--model", "-m", help="Model file, or bank, bank256; default: bank.")]
LearnedOption = Annotated[
    list[Path] | None, typer.Option(help="Style file of 'restyle learn'; give it again for more.")
]
InputOption = Annotated[
    str | None, typer.Option("--input", help="Audio input: index, part of the name, host API or API:part.")
]
OutputOption = Annotated[str | None, typer.Option(help="Audio output: index, part of the name, host API or API:part.")]
ChannelsOption = Annotated[int, typer.Option(min=1, max=64, help="Input channels to restyle.")]
BlockOption = Annotated[
    int, typer.Option(min=0, max=8192, help="Block in samples; 0: one hop, with JACK the server's period.")
]
MidiOption = Annotated[
    str | None, typer.Option(help="MIDI port (index, part of the name, 'virtual') or file; default: all ports.")
]
MapOption = Annotated[Path | None, typer.Option("--map", help="TOML file: which controller moves what.")]
InferenceOption = Annotated[
    str,
    typer.Option(
        help="Where the graph runs: 'worker', a process that the audio callback waits for; 'deferred', one whose "
        "answer it takes a hop later, for the smallest blocks; 'callback', in the callback itself."
    ),
]
ProviderOption = Annotated[str, typer.Option(help="cpu, cuda or tensorrt.")]
ThenOption = Annotated[
    list[Path] | None, typer.Option(help="A model that comes after --model, in series; again for one after that.")
]
ThenStyleOption = Annotated[
    list[str] | None, typer.Option(help="Style or mix of --then; once for each, in their order. Default: its first.")
]
WithOption = Annotated[
    list[Path] | None, typer.Option("--with", help="A model that plays beside --model; again for more.")
]
WithStyleOption = Annotated[
    list[str] | None, typer.Option(help="Style or mix of --with; once for each, in their order. Default: its first.")
]
MixOption = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Share of what --with adds, of all together; default: 0.5.")
]


@app.callback()
def _about() -> None:
    """Play one instrument, hear another, 3 ms later."""


def model_file(path: Path | None) -> Path:
    """The model that ``--model`` names, a file or the name of a shipped one; without a name the default."""
    from realtime.bundle import named_model

    return named_model(path)


def ensemble_parts(
    then: list[Path] | None,
    then_style: list[str] | None,
    beside: list[Path] | None,
    with_style: list[str] | None,
    mix: float | None,
) -> Any:
    """The models beside and after the first, as the options name them; a usage error where they do not fit."""
    from realtime.ensemble import Part, Parts

    def paired(models: list[Path], styles: list[str], name: str, share: float) -> tuple[Part, ...]:
        if len(styles) > len(models):
            raise typer.BadParameter(
                f"--{name}-style is given {len(styles)} times, --{name} {len(models)} times: each style needs its model"
            )
        chosen = [*styles, *[None] * (len(models) - len(styles))]
        return tuple(Part(model_file(model), style, share) for model, style in zip(models, chosen, strict=True))

    beside = beside or []
    if mix is not None and not beside:
        raise typer.BadParameter("--mix is the share of another model: name it, --with MODEL")
    share = (0.5 if mix is None else mix) / max(1, len(beside))
    return Parts(paired(then or [], then_style or [], "then", 0.0), paired(beside, with_style or [], "with", share))


def recogniser_file(path: Path | None) -> Path:
    """The recogniser that a command is about: the shipped one where none is named, or where it is called so."""
    from realtime.bundle import DEFAULT_RECOGNISER

    return DEFAULT_RECOGNISER if path is None or str(path) == "shipped" else path


def failure(what: str, error: object) -> typer.Exit:
    """To be raised: what cannot be done and why, said on standard error; exit code 1."""
    Console(stderr=True).print(f"[red]{what}:[/] ", end="")
    Console(stderr=True).print(str(error), **PLAIN)
    return typer.Exit(1)


@app.command()
def devices(as_json: JsonOption = False) -> None:
    """Audio devices and MIDI ports, with the defaults marked.

    Example: restyle devices
    """
    from realtime.audio import DeviceError, list_devices
    from realtime.midi_ports import list_ports

    problem = ""
    try:
        audio = list_devices()
    except DeviceError as error:
        audio, problem = [], str(error)
    ports_in, ports_out = list_ports("input"), list_ports("output")
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

    path = model_file(model)
    try:
        bundle = read_bundle(path)
    except BundleError as error:
        raise failure("cannot read the model", error) from None
    manifest = bundle.manifest
    if as_json:
        print(manifest.to_json())
        return
    console, spec, card = Console(), manifest.spectral, manifest.card
    console.print(f"[bold]{escape(manifest.name)}[/] ({manifest.kind}), {len(bundle.graph) / 1e6:.2f} MB: ", end="")
    console.print(card.description, markup=False)
    if manifest.vocabulary is not None:
        words = manifest.vocabulary
        console.print(
            f"{len(words.tokens)} events, {words.ticks_per_quarter} ticks to the quarter note, pitches "
            f"{words.lowest_pitch} to {words.highest_pitch}; {manifest.weight_count:,} weights",
            highlight=False,
        )
    else:
        console.print(
            f"{spec.sample_rate} Hz, hop {spec.hop_samples}, windows {spec.analysis_window_samples} and "
            f"{spec.synthesis_window_samples}; latency {manifest.latency_samples} samples "
            f"({1e3 * manifest.latency_samples / spec.sample_rate:.2f} ms); {manifest.weight_count:,} weights"
        )
        if manifest.code_levels:
            console.print(
                f"plays from a code: {manifest.code_numbers_per_second:,.0f} numbers, "
                f"{manifest.code_bits_per_second / 1000:.1f} kbit a second",
                highlight=False,
            )
        made = manifest.kind in ("transfer", "generate")  # a recogniser has no sound of its own
        table = Table("style", "label", "MIDI program", *(["loudness LUFS"] if made else []))
        for style in manifest.styles:
            loudness = [f"{style.loudness_lufs:.1f}"] if made else []
            table.add_row(escape(style.id), escape(style.label), str(style.program), *loudness)
        console.print(table)
    if manifest.noise_dims:
        console.print(
            f"noise: {manifest.noise_dims} numbers, for '--seed' of 'live' and 'render' and '--candidates' of 'render'",
            **PLAIN,
        )
    carried = {
        "a style encoder for 'restyle learn'": bundle.encoder,
        "a critic for 'render --candidates'": bundle.critic,
        "weights for 'restyle train --from'": bundle.weights,
    }
    if any(carried.values()):
        console.print(f"carries {', '.join(what for what, data in carried.items() if data)}", **PLAIN)
    states = ", ".join(f"{state.name} {list(state.shape)}" for state in manifest.states)
    console.print(f"states: {states}", **PLAIN)
    console.print(
        f"trained: objective {card.objective}, {card.steps} steps, {card.training_minutes:g} minutes, {card.date}, "
        f"commit {card.commit or 'unknown'}",
        markup=False,
    )
    if card.metrics:
        metrics = ", ".join(f"{name} {value:g}" for name, value in card.metrics.items())
        console.print(f"metrics: {metrics}", markup=False)
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
    then: ThenOption = None,
    then_style: ThenStyleOption = None,
    with_: WithOption = None,
    with_style: WithStyleOption = None,
    mix: MixOption = None,
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
    inference: InferenceOption = "worker",
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
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**63 - 1,
            help="Which noise, for models that have some. Default: 0 for one that is a source, none for others.",
        ),
    ] = None,
    intensity: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="With a source (kind 'generate'): how loud it plays at first."),
    ] = None,
    drone: Annotated[
        bool,
        typer.Option(
            "--drone", help="With a source (kind 'generate'): sound all the time, not only while a note is held."
        ),
    ] = False,
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
    from realtime.processes import StoppedError
    from realtime.show import holds_recording

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    console = Console()
    parts = ensemble_parts(then, then_style, with_, with_style, mix)
    if record is not None and holds_recording(record):
        raise failure("cannot perform", f"{record} holds a recording already; choose another folder for --record")
    try:
        settings = LiveSettings(
            model=model_file(model),
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
            recognise=recogniser_file(recognise) if recognise else None,
            parts=parts,
            seed=seed,
            intensity=intensity,
            drone=drone,
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
    except (BundleError, LearnError, StyleError, MidiError, AudioFileError, PerformanceError, StoppedError) as error:
        raise failure("cannot perform", error) from None


def _perform(performance: Any, console: Console, seconds: float | None) -> None:
    """Run until the clip ends, the time is over or Ctrl-C."""
    from realtime.panel import Screen, panel, source_line, status_line

    def on_signal(number: int, frame: FrameType | None) -> None:
        del number, frame
        performance.stop_asked.set()

    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        with performance, Screen(console) as screen:
            if not console.is_terminal:
                screen.say(f"performing: {source_line(performance)}")
            started, said = time.monotonic(), 0.0
            try:
                while not performance.poll() and not performance.stop_asked.is_set():
                    now = time.monotonic()
                    if seconds is not None and now - started >= seconds:
                        break
                    if console.is_terminal:
                        screen.show(panel(performance, performance.status()))
                    elif now - said >= 2.0:
                        said = now
                        screen.say(status_line(performance.status()))
                    time.sleep(0.1)
            finally:
                screen.show(None)
                _farewell(performance, screen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _farewell(performance: Any, screen: Any) -> None:
    """Stop, and say how it went and what was left, whether the performance ended well or not."""
    from realtime.panel import latency_line, status_line

    summary = performance.stop()
    status = summary.status
    screen.say(status_line(status))
    screen.say(f"latency {latency_line(performance, int(status.meters.block))}")
    if status.recorder_problem:
        screen.say(f"recording: {status.recorder_problem}")
    for path in summary.files:
        screen.say(f"left: {path}")


@app.command()
def render(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Sound file or folder.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Sound file or folder.")],
    model: ModelOption = None,
    learned: LearnedOption = None,
    style: Annotated[str | None, typer.Option(help="Style, or a mix: violin=0.7,choir=0.3")] = None,
    then: ThenOption = None,
    then_style: ThenStyleOption = None,
    with_: WithOption = None,
    with_style: WithStyleOption = None,
    mix: MixOption = None,
    midi: Annotated[Path | None, typer.Option(help="MIDI file that performs the styles.")] = None,
    midi_map: MapOption = None,
    dry_wet: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="0 dry, 1 wet.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of a model's noise: the same seed, the same sound; default: no noise.")
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            min=1, max=1000, help="Draw so many by noise, from --seed (0) on; keep what the critic rates highest."
        ),
    ] = None,
    provider: ProviderOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Files or folders through the engine, faster than real time; output lines up with input to the sample.

    With --candidates it goes through the engine so many times and once more, and prints the critic's ratings.

    Example: restyle render guitar.wav violin.wav --style violin
    """
    from rich.progress import Progress

    from realtime.audio import AudioFileError
    from realtime.bundle import Bundle, BundleError, ProviderError, StyleError, read_bundle
    from realtime.candidates import rate_candidates, with_noise
    from realtime.controls import Performer, select_mix
    from realtime.ensemble import join
    from realtime.learned import LearnError, add_styles
    from realtime.midi import MidiError, MidiMap, read_midi_file
    from realtime.render import plan_files, render_file

    if candidates and midi:
        raise typer.BadParameter("not with --midi: the critic rates one style; use --seed", param_hint="--candidates")
    if candidates and learned:
        raise typer.BadParameter("not with --learned: the critic does not know that style", param_hint="--candidates")
    if candidates and (then or with_):
        raise typer.BadParameter("not with --then or --with: the critic rates one model", param_hint="--candidates")
    console = Console(stderr=True)
    parts = ensemble_parts(then, then_style, with_, with_style, mix)
    done, failed = [], []
    try:
        bundle = add_styles(read_bundle(model_file(model)), learned or ())
        if seed is not None or candidates:
            bundle = with_noise(bundle, seed or 0)
        bundle = join(bundle, parts)
        events = read_midi_file(midi) if midi else []
        mapped = MidiMap.load(midi_map) if midi_map else MidiMap()
        pairs = plan_files(source, target)

        def perform(model: Bundle) -> Performer:
            fresh = Performer(model.manifest)
            if style:
                select_mix(fresh, style)
            if dry_wet is not None:
                fresh.set("dry_wet", dry_wet)
            return fresh

        perform(bundle)
        with Progress(console=console, transient=True, disable=as_json) as progress:
            for path, out in pairs:
                task = progress.add_task(escape(path.name), total=1.0)
                try:
                    started = time.perf_counter()
                    drawn: dict[str, Any] = {} if seed is None else {"seed": seed}
                    if candidates:
                        seeds = range(seed or 0, (seed or 0) + candidates)
                        rated = rate_candidates(
                            bundle,
                            path,
                            out,
                            seeds,
                            perform,
                            provider,
                            lambda share, task=task: progress.update(task, completed=share),
                        )
                        kept = max(rated, key=lambda each: each.rating).seed
                        drawn = {"seed": kept, "candidates": [asdict(each) for each in rated]}
                        bundle = with_noise(bundle, kept)
                    result = render_file(
                        bundle,
                        path,
                        out,
                        perform(bundle),
                        events,
                        mapped,
                        provider,
                        lambda at, of, task=task: progress.update(task, completed=at / of),
                    )
                    elapsed = time.perf_counter() - started
                    item = {**asdict(result), "source": str(path), "target": str(out), **drawn}
                    item["speed"] = round(result.frames / result.sample_rate / elapsed, 2)
                    done.append(item)
                except AudioFileError as error:
                    if len(pairs) == 1:
                        raise
                    failed.append(str(error))
    except (BundleError, LearnError, StyleError, MidiError, AudioFileError, ProviderError) as error:
        raise failure("cannot render", error) from None
    if as_json:
        print(json.dumps({"rendered": done, "failed": failed}))
    else:
        for item in done:
            seconds = item["frames"] / item["sample_rate"]
            print(f"{item['target']}: {seconds:.2f} s, {item['speed']:.1f} times real time")
            if "candidates" in item:
                print("    seed   rating")
                for each in item["candidates"]:
                    kept = "  kept" if each["seed"] == item["seed"] else ""
                    print(f"  {each['seed']:>6}  {each['rating']:>7.4f}{kept}")
            if item["bad_input_hops"]:
                print(
                    f"  {item['bad_input_hops']} hops of the input hold numbers that are no sound (NaN, infinity, "
                    "60 dB above full scale): silenced or clipped"
                )
            if item["bad_output_hops"]:
                why = item["fault"] or "the model gave numbers that are no sound"
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
        raise failure("cannot replay", error) from None
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
def check(
    model: ModelOption = None,
    then: ThenOption = None,
    then_style: ThenStyleOption = None,
    with_: WithOption = None,
    with_style: WithStyleOption = None,
    mix: MixOption = None,
    input_: InputOption = None,
    output: OutputOption = None,
    channels: ChannelsOption = 1,
    block: BlockOption = 0,
    midi: MidiOption = None,
    midi_map: MapOption = None,
    provider: ProviderOption = "cpu",
    inference: InferenceOption = "worker",
    record: Annotated[Path | None, typer.Option(help="Folder that 'live' would record into.")] = None,
    seconds: Annotated[float, typer.Option(min=1.0, max=3600.0, help="How long to play for the time per hop.")] = 30.0,
    as_json: JsonOption = False,
) -> None:
    """The sound check before doors: one line each for what 'live' needs, pass, warn or fail, and what to do.

    It plays at -60 dB through the real devices. Exit code 0 when nothing failed, 1 otherwise.

    Example: restyle check --input scarlett --midi pad --record take1
    """
    from realtime.bundle import BundleError, StyleError
    from realtime.check import sound_check
    from realtime.live import LiveSettings, PerformanceError
    from realtime.midi import MidiError, MidiMap

    parts = ensemble_parts(then, then_style, with_, with_style, mix)
    console, colours = Console(stderr=as_json), {"pass": "green", "warn": "yellow", "fail": "red"}
    findings = []
    try:
        settings = LiveSettings(
            model=model_file(model),
            input_device=input_,
            output_device=output,
            channels=channels,
            block=block,
            midi=midi,
            midi_map=MidiMap.load(midi_map) if midi_map else MidiMap(),
            provider=provider,
            inference=inference,
            record=record,
            parts=parts,
        )
        with console.status(f"checking, of which {seconds:g} s playing"):
            for finding in sound_check(settings, seconds):
                findings.append(finding)
                if not as_json:
                    console.print(f"[{colours[finding.verdict]}]{finding.verdict}[/]  {finding.id:<9}", end="")
                    console.print(finding.text + (f" -> {finding.remedy}" if finding.remedy else ""), **PLAIN)
    except (BundleError, StyleError, MidiError, PerformanceError) as error:
        raise failure("cannot check", error) from None
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
