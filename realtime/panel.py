"""What a performer sees in the terminal."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
from queue import SimpleQueue
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from realtime.ensemble import EnsembleSpec
from realtime.listener import Heard
from realtime.live import Performance, Status
from realtime.spectral import SpectralSpec

BAR_WIDTH = 30
STILL_S = 2.0
"""How long a terminal may stand still at the end before what it has not taken is given up."""


class Screen(logging.Handler):
    """Context: draws, prints and logs on a thread of its own, since a terminal that stands still (Ctrl-S, a connection
    that is cut) must hold up nobody. Where it still does at the end, the process ends there and then.

    Whatever is logged meanwhile goes to standard error. Any thread.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        self._console = console
        self._lines: SimpleQueue[tuple[str, bool] | None] = SimpleQueue()  # text, whether it is an error; None ends
        self._panel: RenderableType | None = None
        self._thread = threading.Thread(target=self._draw, name="screen", daemon=True)
        self._others: list[logging.Handler] = []

    def __enter__(self) -> Self:
        root = logging.getLogger()
        root.handlers, self._others = [self], root.handlers
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        logging.getLogger().handlers = self._others
        self._lines.put(None)
        self._thread.join(STILL_S)
        if self._thread.is_alive():
            os._exit(1 if kind else 0)  # at a usual end Python waits for what is being written

    def show(self, panel: RenderableType | None) -> None:
        """From now on this picture in place of the one before; nothing where it is None, before what is said next."""
        if panel is None and self._panel is None:
            return
        self._panel = panel
        self._lines.put(("", False))

    def say(self, text: str) -> None:
        """Print a line."""
        self._lines.put((text, False))

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put((self.format(record), True))

    def _draw(self) -> None:
        live: Live | None = None
        while (line := self._lines.get()) is not None:
            text, is_error = line
            panel = self._panel
            if panel is None and live is not None:
                live.stop()
                live = None
            if text:
                # Above the picture, unless errors go elsewhere.
                apart = is_error and not (self._console.is_terminal and sys.stderr.isatty())
                where = Console(stderr=True) if apart else self._console
                where.print(text, markup=False, highlight=False, soft_wrap=True)
            elif panel is not None and self._lines.empty():
                live = live or Live(console=self._console, auto_refresh=False, transient=True, redirect_stderr=False)
                live.start()
                live.update(panel, refresh=True)
        if live is not None:
            live.stop()


def level_db(rms: float) -> float:
    """Root mean square in dBFS, not below -100."""
    return 20.0 * math.log10(max(rms, 1e-5))


def _bar(share: float, colour: str) -> Text:
    filled = round(min(1.0, max(0.0, share)) * BAR_WIDTH)
    return Text("█" * filled, style=colour) + Text("·" * (BAR_WIDTH - filled), style="dim")


def latency_terms(spec: SpectralSpec, ready: dict[str, Any], block: int) -> dict[str, int]:
    """Samples of latency by name, in the order of the signal; their sum is the whole latency.

    ``ready`` is what the audio process said at its start, ``block`` what the device brings at once: with JACK, the
    round trip is one period of the server, and a fixed length of ours comes on top of it.
    """
    own = {"hop": spec.hop_samples}
    then = spec.then_delay_samples if isinstance(spec, EnsembleSpec) else 0
    overlaps = {"overlap": spec.stream_delay_samples - then, "overlap of what follows": then}
    own |= {name: samples for name, samples in overlaps.items() if samples}
    if ready.get("deferred_samples"):
        own["deferred"] = ready["deferred_samples"]
    if ready.get("sample_rate", spec.sample_rate) != spec.sample_rate:
        model = round(sum(own.values()) * ready["sample_rate"] / spec.sample_rate)
        own = {"model": model, "resampling": ready["latency_samples"] - model}
    if "input" not in ready:
        return own
    if ready["device_samples"] is None:
        return ({"block": ready["block"]} if ready["block"] else {"JACK period": block}) | own
    device_in, device_out = ready["device_samples"]
    return {"device in": device_in} | own | {"device out": device_out}


def latency_line(performance: Performance, block: int) -> str:
    """The latency as a sum with named terms, in samples and ms."""
    spec, ready = performance.manifest.spectral, performance.ready
    terms = latency_terms(spec, ready, block)
    total = sum(terms.values())
    text = f"{total} samples ({1e3 * total / performance.sample_rate:.2f} ms) = "
    text += " + ".join(f"{name} {samples}" for name, samples in terms.items())
    return f"{text} + JACK period" if "block" in terms else text


def source_line(performance: Performance) -> str:
    """Where sound comes from and goes to."""
    ready = performance.ready
    if "clip" in ready:
        return f"clip {ready['clip']}, at real-time pace"
    return f"{ready['input']['name']} -> {ready['output']['name']} ({ready['input']['host_api']})"


def panel(performance: Performance, status: Status) -> RenderableType:
    """The whole panel: mix, levels, latency, time per hop, faults."""
    meters, hop, budget = status.meters, status.hop_ms, status.hop_budget_ms
    table = Table.grid(padding=(0, 2))
    for label, weight in status.mix.items():
        table.add_row("style", _bar(weight, "cyan"), Text(f"{label} {weight:.0%}"))
    values = status.values
    if "intensity" in values:
        silent = "" if performance.performer.sounding else ", silent until a note is held"
        table.add_row("intensity", _bar(values["intensity"], "cyan"), f"{values['intensity']:.0%}{silent}")
    table.add_row("wet", _bar(values["dry_wet"], "cyan"), f"{values['dry_wet']:.0%}")
    for name, rms, gain in (
        ("in", meters.input_rms, values["input_gain_db"]),
        ("out", meters.output_rms, values["output_gain_db"]),
    ):
        level = level_db(rms)
        table.add_row(name, _bar((level + 60) / 60, "green"), f"{level:6.1f} dBFS, gain {gain:+.1f} dB")
    if status.heard is not None:
        for name, said in (("hears in", status.heard.going_in), ("hears out", status.heard.coming_out)):
            label, probability = said or ("nothing", 0.0)
            table.add_row(name, _bar(probability, "magenta"), Text(f"{label} {probability:.0%}" if said else label))
    colour = "green" if hop["p99"] < 0.5 * budget else "yellow" if hop["p99"] < budget else "red"
    table.add_row(
        "hop",
        _bar(hop["p99"] / budget, colour),
        f"p50 {hop['p50']:.2f}  p99 {hop['p99']:.2f}  max {hop['max']:.2f} of {budget:.2f} ms, "
        f"headroom {max(0.0, status.headroom):.0%}",
    )
    always = {"xruns": meters.xruns, "late hops": meters.misses}
    extra = {
        "dry for want of time": meters.late_hops,
        "graph restarts": status.restarts,
        "audio outages": status.outages,
        "MIDI ports lost": status.lost_ports,
        "MIDI restarts": status.midi_restarts,
        "MIDI messages lost": status.lost_messages,
        "bad input": meters.bad_input_hops,
        "bad output": meters.bad_output_hops,
        "errors": meters.errors,
        "recording dropped frames": status.dropped_frames,
    }
    counts = always | {name: count for name, count in extra.items() if count}
    faults = ", ".join(f"{name} {count:.0f}" for name, count in counts.items())
    lines: list[RenderableType] = [
        Text(f"restyle  {performance.bundle.title}  {status.seconds:6.1f} s", style="bold"),
        table,
        Text(f"latency  {latency_line(performance, int(meters.block))}"),
        Text(f"faults   {faults}", style="red" if any(counts.values()) else ""),
        Text(f"sound    {source_line(performance)}"),
        Text(f"MIDI     {', '.join(performance.midi_names) or 'none'}"),
    ]
    if status.fault:
        lines.append(Text(f"raised   {status.fault}", style="red"))
    if status.waiting_s is not None:
        lines.append(Text(f"waiting  for the audio device, {status.waiting_s:.0f} s", style="bold red"))
    elif status.last_event is not None:
        lines.append(Text(f"event    {status.last_event.seconds:.0f} s: {status.last_event.text}", style="yellow"))
    if status.recorded_seconds is not None:
        text = status.recorder_problem or f"{status.recorded_seconds:.1f} s into {performance.settings.record}"
        lines.append(Text(f"record   {text}", style="red" if status.recorder_problem else ""))
    return Group(*lines)


def heard_text(heard: Heard) -> str:
    """What goes in -> what comes out."""
    sides = [f"{said[0]} {said[1]:.0%}" if said else "nothing" for said in (heard.going_in, heard.coming_out)]
    return " -> ".join(sides)


def status_line(status: Status) -> str:
    """One line for a log or a pipe."""
    mix = " + ".join(f"{label} {weight:.0%}" for label, weight in status.mix.items())
    hop = status.hop_ms
    return (
        f"{status.seconds:6.1f} s  {mix}  in {level_db(status.meters.input_rms):.0f} out "
        f"{level_db(status.meters.output_rms):.0f} dBFS  hop p50 {hop['p50']:.2f} p99 {hop['p99']:.2f} ms  "
        f"headroom {max(0.0, status.headroom):.0%}  xruns {status.meters.xruns:.0f}  "
        f"late {status.meters.misses:.0f}  bad in {status.meters.bad_input_hops:.0f} "
        f"out {status.meters.bad_output_hops:.0f}  dry {status.meters.late_hops:.0f}  "
        f"errors {status.meters.errors:.0f}  restarts {status.restarts}  outages {status.outages}  "
        f"MIDI lost {status.lost_ports}  MIDI restarts {status.midi_restarts}  "
        f"MIDI messages lost {status.lost_messages}"
        + ("" if status.heard is None else f"  hears {heard_text(status.heard)}")
        + ("" if status.waiting_s is None else f"  waiting for the device {status.waiting_s:.0f} s")
        + (f"  raised: {status.fault}" if status.fault else "")
    )
