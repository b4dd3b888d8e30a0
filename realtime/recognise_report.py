"""What a recogniser says of recordings, as tables, as plain values for JSON, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from realtime.bundle import Style
from realtime.recognise import CALIBRATION_BINS, Evaluation, Recognition

if TYPE_CHECKING:
    from realtime.nearest import Neighbour

BLUE = "#1f5f8b"


def best(probabilities: NDArray[np.float32], styles: Sequence[Style]) -> tuple[Style, float]:
    """The likeliest style, and how likely it is."""
    number = int(probabilities.argmax())
    return styles[number], float(probabilities[number])


def recognition_table(recognition: Recognition, styles: Sequence[Style]) -> Table:
    """The whole and each excerpt, with the two likeliest styles."""
    table = Table("seconds", "style", "probability", "else", title=escape(str(recognition.path)), title_justify="left")

    def row(place: str, probabilities: NDArray[np.float32] | None, mark: str = "") -> None:
        if probabilities is None:
            table.add_row(place, "[dim]a pause[/]", "", "")
            return
        first, second = np.argsort(-probabilities, kind="stable")[:2].tolist()
        table.add_row(
            place,
            f"{mark}{escape(styles[first].label)}",
            f"{mark}{probabilities[first]:.0%}",
            f"{escape(styles[second].label)} {probabilities[second]:.0%}",
        )

    row(f"all {recognition.seconds:.1f}", recognition.probabilities, "[bold]")
    for excerpt in recognition.excerpts:
        start = excerpt.start_seconds
        row(f"{start:.1f} to {start + excerpt.seconds:.1f}", excerpt.probabilities)
    return table


def recognition_values(recognition: Recognition, styles: Sequence[Style]) -> dict[str, Any]:
    """The same for JSON; the style of a pause is null."""

    def said(probabilities: NDArray[np.float32] | None) -> dict[str, Any]:
        if probabilities is None:
            return {"style": None, "probability": None, "probabilities": None}
        style, probability = best(probabilities, styles)
        by_style = {each.id: round(float(value), 6) for each, value in zip(styles, probabilities, strict=True)}
        return {"style": style.id, "probability": round(probability, 6), "probabilities": by_style}

    return {
        "file": str(recognition.path),
        "seconds": round(recognition.seconds, 3),
        **said(recognition.probabilities),
        "excerpts": [
            {
                "start_seconds": round(excerpt.start_seconds, 3),
                "seconds": round(excerpt.seconds, 3),
                **said(excerpt.probabilities),
            }
            for excerpt in recognition.excerpts
        ],
    }


def nearest_table(recognition: Recognition, neighbours: Sequence[Neighbour]) -> Table:
    """Recordings by how near they are."""
    table = Table(
        "", "recording", "similarity", title=f"nearest to {escape(str(recognition.path))}", title_justify="left"
    )
    for rank, neighbour in enumerate(neighbours, 1):
        table.add_row(str(rank), escape(neighbour.name), f"{neighbour.similarity:.3f}")
    return table


def evaluation_table(evaluation: Evaluation) -> Table:
    """Per style how many excerpts were recognised, and what the others were taken for."""
    table = Table("style", "excerpts", "recognised", "otherwise taken for")
    for number, counts in enumerate(evaluation.confusion):
        total = int(counts.sum())
        if not total:
            continue
        others = [i for i in np.argsort(-counts, kind="stable").tolist() if i != number and counts[i]]
        taken = ", ".join(f"{evaluation.styles[i]} {counts[i]}" for i in others[:3])
        table.add_row(escape(evaluation.styles[number]), str(total), f"{counts[number] / total:.0%}", escape(taken))
    return table


def evaluation_values(evaluation: Evaluation) -> dict[str, Any]:
    """Figures for JSON; ``confusion`` counts excerpts, by what they are and then by what they were taken for."""
    present = [i for i, counts in enumerate(evaluation.confusion) if counts.any()]
    return {
        "recordings": evaluation.recordings,
        "recordings_accuracy": round(evaluation.recordings_right / evaluation.recordings, 6),
        "excerpts": len(evaluation.right),
        "accuracy": round(evaluation.accuracy, 6),
        "mean_style_accuracy": round(evaluation.mean_style_accuracy, 6),
        "expected_calibration_error": round(evaluation.calibration_error, 6),
        "confusion": {
            evaluation.styles[i]: {
                evaluation.styles[j]: int(count) for j, count in enumerate(evaluation.confusion[i]) if count
            }
            for i in present
        },
    }


def draw(path: Path, evaluation: Evaluation, title: str) -> None:
    """Confusion matrix, and how often each confidence is right, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7.5), layout="constrained")
    matrix, reliability = figure.subplots(1, 2, width_ratios=[1.7, 1.0])
    counts, styles = evaluation.confusion, evaluation.styles
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = matrix.imshow(shares, cmap="magma", vmin=0, vmax=1)
    for row, column in np.argwhere(counts > 0).tolist():
        bright = shares[row, column] > 0.6
        matrix.text(
            column, row, counts[row, column], ha="center", va="center", fontsize=7, color="k" if bright else "w"
        )
    matrix.set_xticks(range(len(styles)), styles, rotation=60, ha="right", fontsize=8)
    matrix.set_yticks(range(len(styles)), styles, fontsize=8)
    matrix.set(title="excerpts: what they are (row), what they were taken for (column)")
    figure.colorbar(image, ax=matrix, shrink=0.8)
    bins = np.minimum((evaluation.confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    number = np.bincount(bins, minlength=CALIBRATION_BINS)
    right = np.bincount(bins, weights=evaluation.right, minlength=CALIBRATION_BINS)
    filled = number > 0
    centres = (np.arange(CALIBRATION_BINS) + 0.5) / CALIBRATION_BINS
    reliability.bar(centres[filled], right[filled] / number[filled], 0.9 / CALIBRATION_BINS, color=BLUE)
    reliability.plot([0, 1], [0, 1], "k--", linewidth=1)
    for centre, share, count in zip(centres[filled], right[filled] / number[filled], number[filled], strict=True):
        reliability.text(centre, share + 0.01, str(count), ha="center", fontsize=7)
    reliability.set(xlim=(0, 1), ylim=(0, 1.06), xlabel="confidence", ylabel="share that is right (number of excerpts)")
    reliability.set_title(f"expected calibration error {evaluation.calibration_error:.3f}")
    figure.suptitle(title)
    figure.savefig(path, dpi=100, format="png")
