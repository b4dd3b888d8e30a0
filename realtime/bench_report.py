"""The figures of a bench as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

LANES = ("processor", "paced", "graph", "copy_in", "copy_out", "matmul", "compare")
RED = "#b03030"
BLUE = "#1f5f8b"


def _spread(value: Mapping[str, float], unit: str = "ms", digits: int = 3) -> str:
    return (
        f"p50 {value['p50']:.{digits}f}  p99 {value['p99']:.{digits}f}  p99.9 {value['p999']:.{digits}f}  "
        f"max {value['max']:.{digits}f} {unit}"
    )


def table(figures: dict[str, Any]) -> Table:
    """The figures for a terminal, as many as were measured."""
    title = f"{figures['model']} on {figures['machine']} ({figures['provider']}), {figures['commit']}"
    grid = Table("figure", "value", title=escape(title))
    for part, rows in (
        ("compute_ms", _compute_rows),
        ("channels", _channel_rows),
        ("compare", _compare_rows),
        ("live_start_s", _start_rows),
        ("jack", _jack_rows),
        ("soak", _soak_rows),
    ):
        if part in figures:
            for label, text in rows(figures):
                grid.add_row(escape(label), escape(text))
    return grid


Rows = list[tuple[str, str]]


def _compute_rows(figures: dict[str, Any]) -> Rows:
    rows: Rows = []
    for name, label in (
        ("algorithmic_latency_samples", "algorithmic latency"),
        ("processor_latency_samples", "delay of the processor"),
    ):
        value = figures[name]
        milliseconds = 1e3 * value["measured"] / figures["sample_rate"]
        text = f"{value['measured']} samples ({milliseconds:.2f} ms) measured, {value['declared']} declared"
        rows.append((label, text))
    split = figures["split_ms"]
    rows += [
        ("processor per hop", _spread(split["processor"])),
        ("the same at the pace of a performance", _spread(figures["paced_ms"])),
        ("copy in", _spread(split["copy_in"], digits=4)),
        ("graph", _spread(split["graph"])),
        ("copy out", _spread(split["copy_out"], digits=4)),
        ("one MatMul", _spread(figures["matmul_ms"])),
        ("share of the hop", f"{figures['hop_share_p50']:.1%} of {figures['hop_ms']:.2f} ms at p50"),
        ("late hops", f"{figures['late_hops']} of {figures['hops']}"),
        ("processor over graph", f"{figures['overhead_ratio'] - 1:+.1%} at p50"),
        ("graph over MatMul", f"{figures['matmul_ratio']:.2f} times, with as many weights"),
        ("model loaded and warm", f"{figures['load_s']:.2f} s"),
    ]
    return rows


def _channel_rows(figures: dict[str, Any]) -> Rows:
    rows = [
        (f"{row['channels']} performers", f"{_spread(row['processor_ms'])}, {row['late_hops']} late")
        for row in figures["channels"]
    ]
    device = "core" if figures["provider"] == "cpu" else "GPU"
    return [*rows, (f"performers on one {device}", f"{figures['performers_in_real_time']} with p99 within the hop")]


def _compare_rows(figures: dict[str, Any]) -> Rows:
    other = figures["compare"]
    pairs = ", ".join(f"{before} -> {after}" for before, after in other["states"]) or "none"
    label = f"{other['file']}, hop {other['hop_samples']} at {other['sample_rate']} Hz"
    return [
        (label, f"{_spread(other['step_ms'])} a step"),
        ("its states", pairs),
        (
            "computing per s of audio",
            f"ours {other['our_ms_per_second']['p50']:.1f}, theirs {other['ms_per_second']['p50']:.1f} ms at p50",
        ),
        ("ours over theirs", f"{other['ratio']['p50']:.2f} times at p50, {other['ratio']['p99']:.2f} at p99"),
    ]


def _start_rows(figures: dict[str, Any]) -> Rows:
    cold = figures["cold_start_s"]
    return [
        ("import realtime", f"{figures['import_realtime_s']:.3f} s"),
        (
            "cold start to the first hop",
            f"{cold['total']:.2f} s: import {cold['import']:.2f}, load {cold['load']:.2f}, "
            f"first hop {cold['first_hop']:.4f}",
        ),
        ("live until it sounds", f"{figures['live_start_s']:.2f} s"),
        ("render", f"{figures['render_times_real_time']:.1f} times real time"),
    ]


def _jack_rows(figures: dict[str, Any]) -> Rows:
    rows = [
        (
            f"round trip, JACK period {trip['period_samples']}",
            f"{trip['measured_samples']} samples measured, {trip['expected_samples']} expected "
            f"(algorithmic {trip['algorithmic_samples']} + buffers {trip['buffer_samples']}): "
            + ("equal" if trip["equal"] else "NOT EQUAL")
            + ("" if trip["same_sound"] else ", and the sound came back CHANGED"),
        )
        for trip in figures["jack"]["round_trip"]
    ]
    heard = figures["jack"]["midi_to_sound"]
    return [
        *rows,
        ("MIDI to sound", f"{_spread(heard['ms'], digits=2)}, {heard['heard']} of {heard['switches']} switches"),
        ("MIDI to sound, frame clock", _spread(heard["samples"], "samples", 0)),
    ]


def _soak_rows(figures: dict[str, Any]) -> Rows:
    soak = figures["soak"]
    rows: Rows = [("soak", f"{soak['seconds']:.0f} s measured in slices of {soak['slice_s']:g} s")]
    for period in soak["periods"]:
        for kind in ("restyle", "idle"):
            one = period[kind]
            rows.append(
                (
                    f"period {period['period_samples']}, "
                    + ("do-nothing" if kind == "idle" else f"{kind}, inference {period['inference']}"),
                    f"{one['xruns']} xruns, {one['misses']} misses in {one['seconds']:.0f} s, "
                    f"{one['kept_share']:.2%} of the frames"
                    + (f", {one['restarts']} restarts" * bool(one["restarts"]))
                    + (f", {one['midi_restarts']} restarts of MIDI" * bool(one["midi_restarts"]))
                    + (f", {one['lost_messages']} MIDI messages lost" * bool(one["lost_messages"]))
                    + (f", {one['failures']} FAILED" * bool(one["failures"])),
                )
            )
        memory = period["memory"]
        rows.append(
            (
                f"period {period['period_samples']}, ratios",
                f"xruns {period['xrun_ratio']:.2f}, misses {period['miss_ratio']:.2f} (1.00 is the goal)",
            )
        )
        rows.append(
            (
                f"period {period['period_samples']}, memory",
                f"{memory['growth_kib']:+.0f} KiB in {memory['seconds']:.0f} s after warm-up, "
                f"slope {memory['slope_kib_per_s']:+.3f} KiB/s",
            )
        )
    return rows


def draw(path: Path, figures: dict[str, Any], times: Mapping[str, NDArray[np.float64]]) -> None:
    """All that was measured in one PNG; ``times`` are ms per hop by name. Raises OSError."""
    from matplotlib.figure import Figure

    panels = []
    if times:
        panels += [_draw_histogram, _draw_split, _draw_course]
    if figures.get("channels"):
        panels.append(_draw_channels)
    if "jack" in figures:
        panels.append(_draw_midi)
    if "soak" in figures:
        panels += [_draw_slices, _draw_memory]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7.0 * columns, 0.5 + 3.7 * rows), layout="constrained")
    figure.suptitle(f"{figures['model']} on {figures['machine']} ({figures['provider']}), {figures['commit']}")
    grid = figure.add_gridspec(rows, columns)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        last_alone = number == len(panels) - 1 and column == 0
        panel(figure.add_subplot(grid[row, :] if last_alone else grid[row, column]), figures, times)
    figure.savefig(path, dpi=110, format="png")


def _draw_histogram(axis: Any, figures: dict[str, Any], times: Mapping[str, NDArray[np.float64]]) -> None:
    edges = np.geomspace(
        min(float(lane.min()) for lane in times.values()), max(float(lane.max()) for lane in times.values()), 160
    )
    for name in LANES:
        if name in times:
            label = f"{name.replace('_', ' ')}: p50 {np.median(times[name]):.4f} ms"
            axis.hist(times[name], bins=edges.tolist(), histtype="step", label=label)
    axis.axvline(figures["hop_ms"], color=RED, linewidth=1, label=f"one hop: {figures['hop_ms']:.2f} ms")
    axis.set(xscale="log", yscale="log", xlabel="ms per hop", ylabel="hops", title="time per hop")
    axis.legend(fontsize=7)


def _draw_split(axis: Any, figures: dict[str, Any], times: Mapping[str, NDArray[np.float64]]) -> None:
    del times
    names = ("processor", "copy_out", "graph", "copy_in")
    labels = [name.replace("_", " ") for name in names]
    microseconds = {key: [1e3 * figures["split_ms"][name][key] for name in names] for key in ("p50", "p99", "max")}
    bars = axis.barh(labels, microseconds["p50"], color=BLUE, label="p50")
    axis.bar_label(bars, [f" {value:.1f}" for value in microseconds["p50"]], fontsize=8, label_type="center", color="w")
    axis.plot(microseconds["p99"], labels, "|", color="black", markersize=18, label="p99")
    axis.plot(microseconds["max"], labels, "x", color=RED, label="max")
    axis.set(
        xscale="log",
        xlabel="microseconds",
        title=f"where a hop goes; processor over graph: {figures['overhead_ratio'] - 1:+.1%} at p50",
    )
    axis.set_xlim(0.5 * min(microseconds["p50"]), 10.0 * max(microseconds["max"]))
    axis.legend(fontsize=7, loc="upper right", markerscale=0.5)


def _draw_course(axis: Any, figures: dict[str, Any], times: Mapping[str, NDArray[np.float64]]) -> None:
    axis.plot(times["processor"], ".", markersize=1.5, color=BLUE)
    axis.axhline(figures["hop_ms"], color=RED, linewidth=1)
    title = f"late hops: {figures['late_hops']} of {figures['hops']} (red: one hop)"
    axis.set(xlabel="hop", ylabel="processor, ms", yscale="log", title=title)
    _plain_ticks(axis)


def _plain_ticks(axis: Any) -> None:
    """Numbers, not powers of ten, at 1, 2 and 5 of each decade."""

    def text(value: float, _: object) -> str:
        return f"{value:g}" if f"{value:e}"[0] in "125" else ""

    axis.yaxis.set_major_formatter(text)
    axis.yaxis.set_minor_formatter(text)
    axis.tick_params(axis="y", which="both", labelsize=8)


def _draw_channels(axis: Any, figures: dict[str, Any], times: Mapping[str, NDArray[np.float64]]) -> None:
    del times
    rows = figures["channels"]
    channels = [row["channels"] for row in rows]
    for name in ("p50", "p99", "max"):
        axis.plot(channels, [row["processor_ms"][name] for row in rows], "o-", markersize=4, label=f"processor {name}")
    axis.plot(channels, [row["graph_ms"]["p50"] for row in rows], "--", color="#777777", label="graph p50")
    axis.axhline(figures["hop_ms"], color=RED, linewidth=1, label="one hop")
    axis.set_xscale("log", base=2)
    axis.set_xticks(channels, [str(count) for count in channels])
    title = f"performers with p99 within the hop: {figures['performers_in_real_time']}"
    axis.set(yscale="log", xlabel="channels (performers) at once", ylabel="ms per hop", title=title)
    _plain_ticks(axis)
    axis.legend(fontsize=7)


def _draw_midi(axis: Any, figures: dict[str, Any], times: Mapping[str, NDArray[np.float64]]) -> None:
    del times
    heard = figures["jack"]["midi_to_sound"]
    axis.hist(heard["all_ms"], bins=40, color=BLUE)
    for name, style in (("p50", "-"), ("p99", "--")):
        axis.axvline(heard["ms"][name], color=RED, linestyle=style, label=f"{name} {heard['ms'][name]:.2f} ms")
    trips = ", ".join(
        f"{trip['measured_samples']} at {trip['period_samples']}" for trip in figures["jack"]["round_trip"]
    )
    axis.set(
        xlabel=f"ms from a MIDI message to the first sample of the new style (JACK period {heard['period_samples']})",
        ylabel="switches",
        title=f"MIDI to sound; round trip in samples: {trips}",
    )
    axis.legend(fontsize=8)


def _draw_slices(axis: Any, figures: dict[str, Any], times: Mapping[str, NDArray[np.float64]]) -> None:
    del times
    slices = figures["soak"]["slices"]
    for kind, label, colour in (("restyle", "restyle", BLUE), ("idle", "do-nothing client", "#999999")):
        numbers = [number for number, one in enumerate(slices) if one["kind"] == kind]
        axis.bar(numbers, [slices[n]["xruns"] for n in numbers], color=colour, label=f"{label}: xruns")
        misses = [slices[n]["misses"] for n in numbers]
        axis.plot(numbers, misses, "x", color=RED if kind == "restyle" else "black", label=f"{label}: misses")
    for number in range(1, len(slices)):
        if slices[number]["period_samples"] != slices[number - 1]["period_samples"]:
            axis.axvline(number - 0.5, color="black", linestyle=":", linewidth=1)
    ratios = ", ".join(
        f"{period['period_samples']}: {period['xrun_ratio']:.2f} and {period['miss_ratio']:.2f}"
        for period in figures["soak"]["periods"]
    )
    periods = " | ".join(str(period["period_samples"]) for period in figures["soak"]["periods"])
    axis.set(
        xlabel=f"slice; JACK period {periods}",
        ylabel="count",
        yscale="symlog",
        title=f"ratios of xruns and misses at {ratios}",
    )
    axis.set_xticks(range(0, len(slices), max(1, len(slices) // 16)))
    axis.set_ylim(bottom=-0.1)
    axis.legend(fontsize=7)


def _draw_memory(axis: Any, figures: dict[str, Any], times: Mapping[str, NDArray[np.float64]]) -> None:
    del times
    colours = {period["period_samples"]: f"C{number}" for number, period in enumerate(figures["soak"]["periods"])}
    for period, colour in colours.items():
        label = f"period {period}"
        for one in figures["soak"]["slices"]:
            if one["memory_kib"] and one["period_samples"] == period:
                seconds, kib = np.array(one["memory_kib"]).T
                axis.plot(seconds, kib / 1024, linewidth=1, color=colour, label=label)
                label = None
    slopes = ", ".join(f"{p['memory']['slope_kib_per_s']:+.3f}" for p in figures["soak"]["periods"])
    axis.set(
        xlabel="s since the first block",
        ylabel="private memory, MiB",
        title=f"audio, graph and MIDI processes, a line a slice; slopes {slopes} KiB/s",
    )
    axis.legend(fontsize=7)
