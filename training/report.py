"""What an evaluation found, for a terminal and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from training.evaluate import Evaluation
from training.playing import mean_of

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("style_accuracy", "style", ".0%"),
    ("frechet_ratio", "FD\nratio", ".2f"),
    ("pitch_kept", "pitch\nkept", ".0%"),
    ("onset_f1", "onset\nF1", ".2f"),
    ("chroma_correlation", "chroma\ncorr.", ".2f"),
    ("loudness_correlation", "loud.\ncorr.", ".2f"),
    ("hop_buzz_db", "buzz\ndB", ".0f"),
    ("hop_buzz_tone_db", "tones\ndB", ".0f"),
    ("clicks_per_minute", "clicks\n/min", ".1f"),
    ("silence_peak_dbfs", "quiet\ndBFS", ".0f"),
)
BESIDE_RECORDINGS = {
    "partials_db": "How far partials stand out from 3 to 7.5 kHz, dB (noise: 6.3)",
    "flutter_db": "How much bands move from one 20 ms to the next, dB (a steady tone: 0)",
}
"""What has no best value but that of the style's recordings."""
OF_ALL_INPUTS = ("frechet_ratio", "hop_buzz_tone_db")


def _grid(title: str, name: str, *headings: str) -> Table:
    """A table of numbers that fits into 80 columns."""
    grid = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    grid.add_column(name, overflow="fold", min_width=12)
    for heading in headings:
        grid.add_column(heading, justify="right", no_wrap=True)
    return grid


def _systems(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The model and its baselines, by their names."""
    return {figures["file"]: figures, **figures["baselines"]}


def tables(figures: dict[str, Any]) -> list[Table]:
    """For a terminal: the recogniser itself, the model per input and per style, and all systems in the mean."""

    def cells(values: dict[str, Any], without: Sequence[str] = ()) -> list[str]:
        return [
            "-" if values.get(key) is None else format(values[key], form)
            for key, _, form in COLUMNS
            if key not in without
        ]

    judge = _grid("The recogniser on real recordings", "style", "excerpts", "in phrases", "trained on", "held out")
    for style, values in figures["recogniser"]["styles"].items():
        shares = (f"{values[name]:.0%}" for name in ("excerpts", "phrases"))
        judge.add_row(style, *shares, *(str(values[f"{part}_recordings"]) for part in ("training", "held_out")))
    overall = figures["recogniser"]
    judge.add_row("mean", f"{overall['accuracy']:.0%}", f"{overall['phrase_accuracy']:.0%}", "", "", style="bold")
    short = [heading for key, heading, _ in COLUMNS if key not in OF_ALL_INPUTS]
    per_input = _grid(f"{figures['file']}, per input", "input", *short, "one\npitch")
    for name, values in figures["inputs"].items():
        used = figures["inputs_used"][name]
        pitched = f"{'yes' if used['pitched'] else 'no'} {used['pitch_agreement']:.2f}"
        per_input.add_row(name, *cells(values, OF_ALL_INPUTS), pitched)
    headings = [heading for _, heading, _ in COLUMNS]
    per_style, means = [], []
    for kind, of in (("", "all inputs"), ("_of_voices", "the inputs of one pitch at a time")):
        key = f"mean{kind}"
        if figures[key] is None:
            continue
        per_style.append(_grid(f"{figures['file']}, per style, {of}", "style", *headings, "level\nLU"))
        for style, values in figures[f"styles{kind}"].items():
            per_style[-1].add_row(style, *cells(values), f"{values['level_difference_lu']:+.1f}")
        title = f"{figures['file']} beside its baselines, mean over styles, {of}"
        means.append(_grid(title, "", *headings, "levels\nLU"))
        captions = _first_and_later(figures[key]), _added_strokes(figures[f"styles{kind}"])
        means[-1].caption, means[-1].caption_justify = "\n".join(filter(None, captions)), "left"
        for name, system in _systems(figures).items():
            means[-1].add_row(name, *cells(system[key]), f"{system[key]['level_spread_lu']:.1f}")
    return [
        judge,
        per_input,
        *per_style,
        *means,
        *_beside_recordings(figures),
        *_tunes(figures),
        *_reconstruction(figures),
    ]


def _first_and_later(mean: dict[str, Any]) -> str:
    first, later = mean["style_accuracy_first"], mean["style_accuracy_later"]
    return "" if later is None else f"style in the first excerpt of each input {first:.0%}, in later ones {later:.0%}"


def _added_strokes(styles: dict[str, dict[str, Any]]) -> str:
    """What is struck where nothing begins in the input: a fault that no mean over styles shows."""
    found = {style: values["added_strokes_db"] for style, values in styles.items()}
    most = sorted((style for style, value in found.items() if value is not None), key=lambda style: -found[style])[:3]
    worst = ", ".join(f"{style} {found[style]:.2f}" for style in most)
    return worst and f"strokes that the input does not have, dB (held playing: 0.01): {worst}"


def _beside_recordings(figures: dict[str, Any]) -> list[Table]:
    """Whether what is made has what recordings have, of the inputs of one pitch if there are any."""
    kind = "" if figures["styles_of_voices"] is None else "_of_voices"
    systems = _systems(figures)
    grids = []
    for name, title in BESIDE_RECORDINGS.items():
        grids.append(_grid(title, "style", "recordings", *systems))
        for style, real in figures["recordings"][name].items():
            made = (system[f"styles{kind}"].get(style, {}).get(name) for system in systems.values())
            grids[-1].add_row(style, *("-" if value is None else f"{value:.1f}" for value in (real, *made)))
    return grids


def _tunes(figures: dict[str, Any]) -> list[Table]:
    """What the recordings themselves reach by the figures that the model is measured by; nothing unless asked for."""
    if "tunes" not in figures:
        return []
    title = f"Tunes played on the recordings themselves / {figures['file']}; Fréchet ratios"
    grid = _grid(title, "style", "recognised", "ratio", "one pitch", "onsets")
    of_voices = figures["styles_of_voices"] or {}
    rows = {}
    for style, played in figures["tunes"]["styles"].items():
        made, voices = figures["styles"][style], of_voices.get(style, {})
        rows[style] = (
            played["style_accuracy"],
            made["style_accuracy"],
            played["frechet_ratio"],
            made["frechet_ratio"],
            played["frechet_ratio_of_voices"],
            voices.get("frechet_ratio"),
            played["onset_f1"],
            voices.get("onset_f1"),
        )
    rows["mean"] = tuple(mean_of(column) for column in zip(*rows.values(), strict=True))
    for style, values in rows.items():
        forms = (".0%", ".0%", ".2f", ".2f", ".2f", ".2f", ".2f", ".2f")
        shown = ["-" if value is None else format(value, form) for value, form in zip(values, forms, strict=True)]
        pairs = (" / ".join(shown[at : at + 2]) for at in range(0, len(shown), 2))
        grid.add_row(style, *pairs, style="bold" if style == "mean" else None)
    return [grid]


def _reconstruction(figures: dict[str, Any]) -> list[Table]:
    """What an autoencoder makes of recordings that it has not heard, in their own style; nothing of other models."""
    if "code" not in figures:
        return []
    rate, made = figures["code"], figures["reconstruction"]
    title = (
        f"Through a code of {rate['bits_per_second'] / 1000:.1f} kbit ({rate['numbers_per_second']:,.0f} numbers) a "
        "second and back, recordings not trained on"
    )
    grid = _grid(title, "style", "excerpts", "recognised", "unchanged", "log mel\ndB")
    for style, values in {**made["styles"], "mean": {"excerpts": "", **made["mean"]}}.items():
        names = {"style_accuracy": ".0%", "style_accuracy_unchanged": ".0%", "log_mel_distance_db": ".1f"}
        shown = ("-" if values[name] is None else format(values[name], form) for name, form in names.items())
        grid.add_row(style, str(values["excerpts"]), *shown, style="bold" if style == "mean" else None)
    return [grid]


def draw(path: Path, evaluation: Evaluation) -> None:
    """Style accuracy of every system, what outputs are taken for, and the spectrograms of one example, as a PNG."""
    from matplotlib.figure import Figure

    figures, example = evaluation.figures, evaluation.example
    styles, systems = list(figures["styles"]), _systems(figures)
    columns = 4
    rows = 1 + math.ceil((len(example.sounds) - 1) / columns)
    figure = Figure(figsize=(16, 6 + 2 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, 2 * columns, height_ratios=[2.0] + rows * [1.0])
    bars, matrix = figure.add_subplot(grid[0, :columns]), figure.add_subplot(grid[0, columns:])
    width = 0.8 / len(systems)
    for number, (name, system) in enumerate(systems.items()):
        values = [system["styles"].get(style, {}).get("style_accuracy") or 0.0 for style in styles]
        bars.bar(np.arange(len(styles)) + (number + 0.5) * width - 0.4, values, width, label=name)
    phrases = [figures["recogniser"]["styles"][style]["phrases"] for style in styles]
    bars.plot(range(len(styles)), phrases, "k_", markersize=28, label="real, held out")
    bars.set_xticks(range(len(styles)), styles, rotation=30, ha="right")
    bars.set(ylim=(0, 1.15), ylabel="share taken for the style", title="style accuracy")
    bars.legend(fontsize=8, loc="upper left", ncols=1 + len(systems))  # in the room above the bars
    classes = list(figures["recogniser"]["styles"])
    shares = np.array([[figures["taken_for"][style][name] for name in classes] for style in styles])
    image = matrix.imshow(shares, cmap="magma", vmin=0, vmax=1, aspect="auto")
    matrix.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
    matrix.set_yticks(range(len(styles)), styles)
    matrix.set(title=f"{figures['file']}: asked for (row), taken for (column)")
    figure.colorbar(image, ax=matrix)
    for number, (name, audio) in enumerate(example.sounds):
        row, column = divmod(number + columns - 1 if number else 0, columns)  # the input has a row to itself
        axes = figure.add_subplot(grid[1 + row, 2 * column : 2 * column + 2])
        axes.specgram(audio + 1e-9, NFFT=2048, Fs=example.sample_rate, noverlap=1536, vmin=-140, vmax=-30)
        axes.set(
            title=name if number else f"{example.title}, the input", ylim=(0, 10_000), xlabel="seconds", ylabel="Hz"
        )
    figure.savefig(path, dpi=80, format="png")
