"""``restyle compose``: notes that continue a tune, in a file or live with a player."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from realtime.cli import PLAIN, STOP_SIGNALS

if TYPE_CHECKING:
    from realtime.compose import NoteStream, Sampling

LONGEST_WAIT_S = 0.01


def compose(
    out: Annotated[Path | None, typer.Argument(metavar="OUT.mid", help="MIDI file to write.")] = None,
    seed: Annotated[Path | None, typer.Option(help="MIDI file of the tune to continue.")] = None,
    bars: Annotated[
        int | None, typer.Option(min=1, max=1000, help="New bars; default: 8, with --live until the player plays.")
    ] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Model file; default: the shipped one.")] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=10.0, help="0: always the likeliest; above 1: bolder.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many of the likeliest events; 0: from all.")] = 0,
    key: Annotated[str | None, typer.Option(help="Only notes of this key: 'D dorian', 'F# minor', 'Bb'.")] = None,
    random_seed: Annotated[int, typer.Option(min=0, help="The same number gives the same notes.")] = 0,
    alone: Annotated[bool, typer.Option("--alone", help="Write the new bars only, without the tune before.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Listen to a player and take over when they stop, until they play again.")
    ] = False,
    input_: Annotated[
        str | None, typer.Option("--input", help="With --live: MIDI port (index, part of the name, 'virtual').")
    ] = None,
    output: Annotated[
        str, typer.Option(help="With --live: MIDI port to play to (index, part of the name, 'virtual').")
    ] = "virtual",
    channel: Annotated[int, typer.Option(min=1, max=16, help="With --live: MIDI channel to play on.")] = 1,
    silence: Annotated[
        float, typer.Option(min=0.5, max=64.0, help="With --live: quarters of silence before it takes over.")
    ] = 2.0,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="With --live: stop after this time.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Notes that continue a tune: into a MIDI file, or live, in time with a player who has stopped.

    Example: restyle compose --seed tune.mid --bars 16 --key "D dorian" more.mid

    Example: restyle compose --live --input keys --output synth
    """
    from realtime.bundle import COMPOSER_MODEL, BundleError, read_bundle
    from realtime.compose import NoteStream, Sampling
    from realtime.midi import MidiError
    from realtime.notes import KeyNameError, pitch_classes

    console = Console(stderr=as_json)
    if live and (out is not None or seed is not None or alone):
        raise typer.BadParameter("--live takes neither OUT.mid nor --seed nor --alone")
    if not live and (out is None or seed is None):
        raise typer.BadParameter("give --seed TUNE.mid and OUT.mid, or --live")
    try:
        scale = pitch_classes(key) if key is not None else None
    except KeyNameError as error:
        raise typer.BadParameter(str(error), param_hint="--key") from None
    sampling = Sampling(temperature, top_k, scale)
    try:
        stream = NoteStream(read_bundle(COMPOSER_MODEL if model is None else model))
        if live:
            from realtime.continuator import ContinuatorSettings

            settings = ContinuatorSettings(sampling, random_seed, silence, bars or 0, channel - 1)
            figures = _perform(stream, settings, input_, output, seconds, console)
        else:
            assert out is not None and seed is not None
            figures = _write(stream, seed, out, bars or 8, sampling, random_seed, alone, console)
    except (BundleError, MidiError) as error:
        raise _fail(console, str(error)) from None
    except OSError as error:
        raise _fail(console, f"{out}: {error.strerror or error}; nothing was written") from None
    if as_json:
        typer.echo(json.dumps(figures))


def _fail(console: Console, why: str) -> typer.Exit:
    console.print("[red]cannot compose:[/] ", end="")
    console.print(why, **PLAIN)
    return typer.Exit(1)


def _write(
    stream: NoteStream,
    seed: Path,
    out: Path,
    bars: int,
    sampling: Sampling,
    random_seed: int,
    alone: bool,
    console: Console,
) -> dict[str, Any]:
    """Continue the tune in a file; the figures."""
    from realtime.compose import compose_bars
    from realtime.files import check_writable
    from realtime.midi import MidiError
    from realtime.tunes import read_tune, write_tune

    if out.suffix.lower() not in (".mid", ".midi"):
        raise MidiError(f"{out}: a MIDI file ends in .mid")
    tune = read_tune(seed)
    if out.exists() and out.samefile(seed):
        raise MidiError(f"{out}: is the tune itself; choose another file")
    check_writable(out)
    started = time.perf_counter()
    with console.status(f"composing {bars} bars"):
        made = compose_bars(stream, tune, bars, sampling, random_seed)
    elapsed_s = time.perf_counter() - started
    start = made.notes[0].start_ticks
    notes = tuple(replace(note, start_ticks=note.start_ticks - start) for note in made.notes)
    write_tune(out, replace(made, notes=notes if alone else (*tune.notes, *made.notes)))
    beats, part = tune.metre
    figures = {
        "out": str(out),
        "bars": bars,
        "notes": len(made.notes),
        "seed_notes": len(tune.notes),
        "tempo_bpm": tune.tempo_bpm,
        "metre": f"{beats}/{part}",
        "random_seed": random_seed,
        "seconds_to_compose": round(elapsed_s, 3),
    }
    console.print(
        f"{out}: {len(made.notes)} notes in {bars} bars of {beats}/{part} at {tune.tempo_bpm:g} quarters a minute, "
        f"after {len(tune.notes)} of {seed.name}",
        **PLAIN,
    )
    return figures


def _perform(
    stream: NoteStream, settings: Any, input_: str | None, output: str, seconds: float | None, console: Console
) -> dict[str, Any]:
    """Listen and answer until the time is over or a signal comes; the figures."""
    from realtime.continuator import Continuator
    from realtime.midi_inputs import MidiInputs
    from realtime.midi_ports import MidiOutput

    stop_asked = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal stop_asked
        del number, frame
        stop_asked = True

    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        with contextlib.ExitStack() as opened:
            port = MidiOutput(output)
            opened.callback(port.close)
            partner = Continuator(stream, settings, port.send)
            inputs = MidiInputs(input_, lambda data: partner.hear(data, time.monotonic()))
            opened.callback(inputs.close)
            opened.callback(partner.close)  # first of all: silence
            names = ", ".join(inputs.names)
            console.print(f"listens to {names or 'no port yet'}; plays to {port.name}; Ctrl-C ends", **PLAIN)
            started, told, was_playing = time.monotonic(), 0, False
            while not stop_asked and (seconds is None or time.monotonic() - started < seconds):
                time.sleep(min(LONGEST_WAIT_S, max(0.0, partner.tick(time.monotonic()))))
                if partner.playing != was_playing:
                    was_playing = not was_playing
                    phrases = partner.phrases
                    if was_playing and len(phrases) > told:
                        told = len(phrases)
                        heard = phrases[-1]
                        console.print(
                            f"heard {heard.notes_heard} notes at {heard.tempo_bpm:g} quarters a minute: its turn"
                        )
                    elif not was_playing:
                        console.print(f"played {phrases[-1].notes_played} notes: listens")
        return {"inputs": names, "output": port.name, "phrases": [asdict(phrase) for phrase in partner.phrases]}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
