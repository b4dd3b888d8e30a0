"""``restyle generate``: sound made of seeded noise in a style, into a file or endlessly into a pipe."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from realtime.cli import PLAIN, JsonOption, LearnedOption, MapOption, ProviderOption, failure

if TYPE_CHECKING:
    from realtime.generate import Generation

DEFAULT_SECONDS = 10.0
TAIL_SECONDS = 1.0
"""After the last event of a MIDI file."""
PIPE = Path("-")


def generate(
    out: Annotated[Path, typer.Argument(metavar="OUT.wav", help="Sound file to write; - : raw float32 to a pipe.")],
    model: Annotated[Path, typer.Option("--model", "-m", help="Model file of kind 'generate'.")],
    style: Annotated[str | None, typer.Option(help="Style, or a mix: violin=0.7,choir=0.3")] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=1e6, help="How long; default: 10, with --midi to its end, into a pipe until it is closed."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same number gives the same sound.")] = 0,
    intensity: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="How loud it plays; default: 0.7.")] = None,
    midi: Annotated[Path | None, typer.Option(help="MIDI file that plays it: notes choose styles, on and off.")] = None,
    midi_map: MapOption = None,
    learned: LearnedOption = None,
    channels: Annotated[int, typer.Option(min=1, max=64, help="Each with noise of its own.")] = 1,
    provider: ProviderOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Sound out of seeded noise in a style, faster than real time, in constant memory however long.

    Example: restyle generate --model generator.onnx --style violin --seconds 20 --seed 7 out.wav

    Example: restyle generate --model generator.onnx --style choir - | aplay -t raw -f FLOAT_LE -r 48000
    """
    from realtime.audio import AudioFileError
    from realtime.bundle import BundleError, ProviderError, StyleError, named_model, read_bundle
    from realtime.controls import Performer, select_mix
    from realtime.generate import Generation, check_generates, generate_file
    from realtime.learned import LearnError, add_styles
    from realtime.midi import MidiError, MidiMap, read_midi_file

    if out == PIPE and (as_json or sys.stdout.isatty()):
        raise typer.BadParameter("'-' writes sound to standard output: send it into a pipe, without --json")
    try:
        bundle = read_bundle(named_model(model))
        check_generates(bundle)
        bundle = add_styles(bundle, learned or ())
        performer = Performer(bundle.manifest)
        if style:
            select_mix(performer, style)
        if intensity is not None:
            performer.set("intensity", intensity)
        events = read_midi_file(midi) if midi else None
        if events is None:
            performer.set("drone", 1.0)
        mapped = MidiMap.load(midi_map) if midi_map else MidiMap()
        generation = Generation(bundle, performer, seed, channels, events, mapped, provider)
        if seconds is None and out != PIPE:
            seconds = DEFAULT_SECONDS if events is None else (events[-1][0] if events else 0.0) + TAIL_SECONDS
        frames = None if seconds is None else max(1, round(seconds * generation.sample_rate))
        if out == PIPE:
            _pour(generation, frames)
            return
        assert frames is not None
        started = time.perf_counter()
        with Progress(console=Console(stderr=True), transient=True, disable=as_json) as progress:
            task = progress.add_task(escape(out.name), total=frames)
            made = generate_file(generation, out, frames, lambda at, _: progress.update(task, completed=at))
        speed = frames / made.sample_rate / (time.perf_counter() - started)
    except (BundleError, LearnError, StyleError, MidiError, AudioFileError, ProviderError) as error:
        raise failure("cannot generate", error) from None
    if as_json:
        print(json.dumps({**asdict(made), "target": str(out), "speed": round(speed, 2)}))
        return
    console = Console()
    mix = " + ".join(f"{weight:.0%} {chosen.id}" for chosen, weight in performer.mix().items())
    how = f"played by {midi}" if midi else f"of {mix}"
    console.print(f"{out}: {frames / made.sample_rate:.2f} s {how}, seed {seed}, {speed:.1f} times real time", **PLAIN)
    if made.bad_output_hops:
        console.print(
            f"  {made.bad_output_hops} hops are silent: {made.fault or 'the model gave numbers that are no sound'}",
            **PLAIN,
        )


def _pour(generation: Generation, frames: int | None) -> None:
    """Samples, channels interleaved, to standard output: so many, or until nobody reads any more."""
    left = frames
    try:
        for block in generation.blocks():
            sys.stdout.buffer.write(block[:, :left].T.astype("<f4").tobytes())
            if left is not None:
                left -= block.shape[1]
                if left <= 0:
                    break
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
