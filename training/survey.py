"""What a folder of recordings holds, style by style, before anything is trained on it: figures, table and picture.

Files are decoded and judged as training does it (training/library.py); besides, recordings that are nearly the same,
such as an MP3 of a take that is there as WAV, are found by correlation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from scipy.signal import fftconvolve, resample_poly
from scipy.spatial import KDTree

from training.library import AUDIO_SUFFIXES, Decoded, Fault, RecordingCache, find_audio, find_faults
from training.measures import mean_spectrum
from training.recipe import DataConfig

SPECTRUM_SECONDS = 30.0  # from the middle of each recording
BAND_CENTRES_HZ = 1000.0 * 2.0 ** (np.arange(-15, 14) / 3.0)  # third octaves, 31 Hz to 20 kHz
NEAR_RATE = 8000
NEAR_SECONDS = 10.0
NEAR_LENGTH_SECONDS = 0.2  # by which encoders change a recording's length
NEAR_BANDS_DB = 8.0  # Euclidean distance of two spectra that are worth a closer look
NEAR_CORRELATION = 0.99  # MP3 and Ogg Vorbis leave 0.998 and more, two strokes on a tom 0.95
FAULT_KINDS = ("damaged", "silent", "short", "copy")


class SurveyError(ValueError):
    """A folder that holds nothing to survey; the text names the folder and the remedy."""


@dataclass(frozen=True)
class SurveyedRecording:
    """One file and what is known of it."""

    path: Path
    name: str  # relative to the folder of all styles
    decoded: Decoded
    sample_rate: int  # at which it was decoded
    fault: Fault | None  # why training skips it
    near_copy: str = ""  # of which other recording it is nearly the same

    @property
    def seconds(self) -> float:
        return self.decoded.samples / self.sample_rate

    @property
    def clipped(self) -> bool:
        return self.decoded.source is not None and self.decoded.source.clipped_runs > 0

    def remarks(self) -> list[str]:
        """Everything to say against it, each the end of a sentence that begins with its name."""
        found = [self.fault.reason] if self.fault else []
        if self.near_copy:
            found.append(f"is nearly the same as {self.near_copy}")
        if self.clipped and self.decoded.source is not None:
            found.append(f"is clipped in {self.decoded.source.clipped_runs} places")
        return found


@dataclass(frozen=True)
class StyleSurvey:
    """The recordings of one folder."""

    name: str
    recordings: tuple[SurveyedRecording, ...]
    bands_db: NDArray[np.float64] | None  # [BAND_CENTRES_HZ] mean spectrum of what can be used; None of nothing

    @property
    def usable(self) -> tuple[SurveyedRecording, ...]:
        return tuple(item for item in self.recordings if item.fault is None)

    @property
    def minutes(self) -> float:
        """Of what can be used."""
        return sum(item.seconds for item in self.usable) / 60.0

    @property
    def loudness_lufs(self) -> NDArray[np.float64]:
        """Of every usable recording that has a loudness."""
        return np.array([x for item in self.usable if (x := item.decoded.loudness_lufs) is not None])

    def count(self, kind: str) -> int:
        """How many recordings have a fault of this kind."""
        return sum(item.fault is not None and item.fault.kind == kind for item in self.recordings)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what does not exist is None."""
        loudness, sources = self.loudness_lufs, [s for item in self.recordings if (s := item.decoded.source)]
        spread = [round(float(x), 1) for x in np.percentile(loudness, [0, 50, 100])] if len(loudness) else [None] * 3
        return {
            "recordings": len(self.recordings),
            "usable": len(self.usable),
            "minutes": round(self.minutes, 3),
            "minutes_unusable": round(sum(i.seconds for i in self.recordings if i.fault) / 60.0, 3),
            "sample_rates": _counts(source.sample_rate for source in sources),
            "channels": _counts(source.channels for source in sources),
            "formats": _counts(f"{source.format} {source.subtype}" for source in sources),
            "clipped": sum(item.clipped for item in self.recordings),
            "damaged": self.count("damaged"),
            "silent": self.count("silent"),
            "short": self.count("short"),
            "copies": self.count("copy"),
            "near_copies": sum(bool(item.near_copy) for item in self.recordings),
            "loudness_lufs": dict(zip(("quietest", "median", "loudest"), spread, strict=True)),
            "files": [
                {
                    "name": item.name,
                    "seconds": round(item.seconds, 3),
                    "loudness_lufs": _rounded(item.decoded.loudness_lufs),
                    "level_dbfs": _rounded(item.decoded.level_dbfs) if item.decoded.source else None,
                    "clipped_runs": item.decoded.source.clipped_runs if item.decoded.source else None,
                    "fault": item.fault.kind if item.fault else None,
                    "remarks": item.remarks(),
                }
                for item in self.recordings
            ],
        }


def _counts(values: Any) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 1)


@dataclass(frozen=True)
class Survey:
    """All styles of a folder by name."""

    folder: Path
    styles: tuple[StyleSurvey, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        every = [item for style in self.styles for item in style.recordings]
        return {
            "folder": str(self.folder),
            "styles": {style.name: style.as_dict() for style in self.styles},
            "recordings": len(every),
            "usable": sum(item.fault is None for item in every),
            "minutes": round(sum(style.minutes for style in self.styles), 3),
            "warnings": list(self.warnings),
        }


def survey_folder(
    folder: Path,
    cache_folder: Path,
    sample_rate: int,
    config: DataConfig | None = None,
    progress: Callable[[str, int, int], object] | None = None,
) -> Survey:
    """Look at every recording below ``folder``, one style per subfolder; recordings in ``folder`` alone are one style.

    ``progress`` is told (what is done, files done, files in all). Raises SurveyError where there is nothing to see.
    """
    if folder.is_file():
        raise SurveyError(f"{folder}: is a file; name the folder that holds a folder of recordings per style")
    if not folder.is_dir():
        raise SurveyError(
            f"{folder}: there is no such folder; name the one that holds a folder of recordings per style"
        )
    paths = find_audio(folder)
    if not paths:
        raise SurveyError(
            f"{folder}: no recordings in it or below; put a folder of them per style there "
            f"({', '.join(sorted(AUDIO_SUFFIXES))})"
        )
    cache, config = RecordingCache(cache_folder, sample_rate), config or DataConfig()
    decoded = cache.decode_all(paths, lambda done, of: progress("reading", done, of) if progress else None)
    faults = find_faults([path.relative_to(folder) for path in paths], decoded, config, sample_rate)
    sounding = [number for number, result in enumerate(decoded) if faults[number] is None]
    bands: dict[int, NDArray[np.float64]] = {}
    for done, number in enumerate(sounding):
        audio = np.load(cache.audio_path(decoded[number].sha256), mmap_mode="r")
        bands[number] = band_levels_db(_middle(audio, SPECTRUM_SECONDS, sample_rate), sample_rate)
        if progress is not None:
            progress("comparing", done + 1, len(sounding))
    near = _near_copies(sounding, decoded, bands, cache)
    groups: dict[str, list[int]] = {path.name: [] for path in sorted(folder.iterdir()) if _is_empty(path)}
    loose = folder.resolve().name or "."
    for number, path in enumerate(paths):
        inside = path.relative_to(folder).parts
        groups.setdefault(inside[0] if len(inside) > 1 else loose, []).append(number)
    styles = tuple(
        StyleSurvey(
            name,
            tuple(
                SurveyedRecording(
                    paths[i],
                    paths[i].relative_to(folder).as_posix(),
                    decoded[i],
                    sample_rate,
                    faults[i],
                    paths[near[i]].relative_to(folder).as_posix() if i in near else "",
                )
                for i in numbers
            ),
            _mean_bands([bands[i] for i in numbers if i in bands], [decoded[i].samples for i in numbers if i in bands]),
        )
        for name, numbers in groups.items()
    )
    in_none = sum(len(path.relative_to(folder).parts) == 1 for path in paths)
    return Survey(folder, styles, _warnings(styles, in_none if len(groups) > 1 else 0, folder))


def _is_empty(path: Path) -> bool:
    """Whether this is a folder for a style yet to come: one of other things, such as MIDI files, is no style."""
    return path.is_dir() and not path.name.startswith(".") and not any(item.is_file() for item in path.rglob("*"))


def _warnings(styles: Sequence[StyleSurvey], in_none: int, folder: Path) -> tuple[str, ...]:
    found = [
        f"style '{style.name}': holds no recordings; fill or remove it" for style in styles if not style.recordings
    ]
    for style in styles:
        if style.recordings and len(style.usable) < 3:
            found.append(
                f"style '{style.name}': only {len(style.usable)} usable recording(s), so no test split; add recordings"
            )
        loudness = style.loudness_lufs
        if len(loudness) and np.ptp(loudness) > 20.0:
            found.append(
                f"style '{style.name}': loudness differs by {np.ptp(loudness):.0f} LU from recording to recording; "
                "training levels excerpts, but the quiet ones bring their noise along"
            )
    if in_none:
        found.append(f"{in_none} recordings lie in {folder} itself; move them into the folder of their style")
    return tuple(found)


def _middle(audio: NDArray[np.float32], seconds: float, sample_rate: int) -> NDArray[np.float32]:
    most = round(seconds * sample_rate)
    start = max(0, len(audio) - most) // 2
    return np.asarray(audio[start : start + most])


def band_levels_db(audio: NDArray[np.float32], sample_rate: int) -> NDArray[np.float64]:
    """Share of the power of [samples] in each third octave [BAND_CENTRES_HZ], in dB, at least -80.

    Bands above half the sample rate have nothing; those narrower than a bin have their share of it.
    """
    power = mean_spectrum(audio, sample_rate)
    ends = (np.arange(len(power)) + 0.5) * sample_rate / (2.0 * (len(power) - 1))
    edges = BAND_CENTRES_HZ[:, None] * 2.0 ** (np.array([-1, 1]) / 6.0)
    below = np.interp(edges, ends, np.cumsum(power))
    return 10.0 * np.log10(np.maximum(below[:, 1] - below[:, 0], 1e-8))


def _mean_bands(bands: Sequence[NDArray[np.float64]], samples: Sequence[int]) -> NDArray[np.float64] | None:
    """Mean power per band over recordings, by their length, in dB."""
    if not bands:
        return None
    return 10.0 * np.log10(np.average(10.0 ** (np.stack(bands) / 10.0), axis=0, weights=samples))


def _near_copies(
    numbers: Sequence[int],
    decoded: Sequence[Decoded],
    bands: dict[int, NDArray[np.float64]],
    cache: RecordingCache,
) -> dict[int, int]:
    """By number of a recording: an earlier one that is nearly the same.

    Candidates are of one length and one spectrum up to what encoders change; their waveforms decide.
    """
    if len(numbers) < 2:
        return {}
    scale = NEAR_BANDS_DB / (NEAR_LENGTH_SECONDS * cache.sample_rate)
    # What a lossy encoder leaves of faint bands and of the highest ones is its own affair.
    low = slice(0, int(np.searchsorted(BAND_CENTRES_HZ, 8000.0)))
    points = np.stack([np.append(np.maximum(bands[i][low], -30.0), decoded[i].samples * scale) for i in numbers])
    sounds: dict[int, NDArray[np.float32]] = {}

    def sound(number: int) -> NDArray[np.float32]:
        if number not in sounds:
            audio = np.load(cache.audio_path(decoded[number].sha256), mmap_mode="r")
            start = np.asarray(audio[: round(NEAR_SECONDS * cache.sample_rate)])
            common = math.gcd(NEAR_RATE, cache.sample_rate)
            sounds[number] = resample_poly(start, NEAR_RATE // common, cache.sample_rate // common)
        return sounds[number]

    found: dict[int, int] = {}
    for one, other in sorted(KDTree(points).query_pairs(math.sqrt(2.0) * NEAR_BANDS_DB)):
        first, second = numbers[one], numbers[other]
        if second not in found and correlation(sound(first), sound(second)) >= NEAR_CORRELATION:
            found[second] = found[first] if first in found else first  # noqa: SIM401 - of its type
    return found


def correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The highest normalised cross-correlation of two sounds [samples] over all delays of one to the other, 0 to 1."""
    power = math.sqrt(float(np.square(one, dtype=np.float64).sum()) * float(np.square(other, dtype=np.float64).sum()))
    if power == 0.0:
        return 0.0
    return float(np.abs(fftconvolve(one, other[::-1])).max()) / power


def survey_table(survey: Survey) -> Table:
    """For a terminal, one row per style and their sum."""
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    grid.add_column("style", overflow="fold", min_width=10)
    headings = ("files", "used", "min", "kHz", "ch", "type", "LUFS\nmedian", "LU\nspan")
    for heading in (*headings, "clip-\nped", "dam-\naged", "si-\nlent", "too\nshort", "cop-\nies"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for style in survey.styles:
        values, loudness = style.as_dict(), style.loudness_lufs
        grid.add_row(
            style.name,
            str(values["recordings"]),
            str(values["usable"]),
            f"{style.minutes:.1f}",
            "\n".join(f"{int(rate) / 1000:g}" for rate in values["sample_rates"]) or "-",
            "\n".join(values["channels"]) or "-",
            "\n".join(sorted({name.split()[0] for name in values["formats"]})) or "-",
            f"{np.median(loudness):.0f}" if len(loudness) else "-",
            f"{np.ptp(loudness):.0f}" if len(loudness) else "-",
            *(_cell(values[name]) for name in ("clipped", "damaged", "silent", "short")),
            _cell(values["copies"] + values["near_copies"]),
        )
    every = [item for style in survey.styles for item in style.recordings]
    counts = [sum(style.count(kind) for style in survey.styles) for kind in FAULT_KINDS]
    copies = counts[-1] + sum(bool(item.near_copy) for item in every)
    grid.add_row(
        "all",
        str(len(every)),
        str(sum(item.fault is None for item in every)),
        f"{sum(style.minutes for style in survey.styles):.1f}",
        *[""] * 5,
        *(_cell(count) for count in (sum(item.clipped for item in every), *counts[:-1], copies)),
        style="bold",
    )
    return grid


def _cell(count: int) -> str:
    return str(count) if count else "·"


def draw_survey(path: Path, survey: Survey) -> None:
    """Minutes, loudness, lengths and mean spectrum of every style, as a PNG."""
    from matplotlib.figure import Figure

    styles = survey.styles
    rows = np.arange(len(styles))
    figure = Figure(figsize=(15, 3.5 + 0.55 * len(styles)), layout="constrained")
    (minutes, loudness), (lengths, spectrum) = figure.subplots(2, 2)
    unusable = [sum(item.seconds for item in style.recordings if item.fault) / 60.0 for style in styles]
    usable = [style.minutes for style in styles]
    minutes.barh(rows, usable, color="tab:blue", label="usable")
    minutes.barh(rows, unusable, left=usable, color="tab:red", label="skipped: damaged, silent, short or a copy")
    for row, style in enumerate(styles):
        minutes.text(usable[row] + unusable[row], row, f" {len(style.usable)} files", va="center", fontsize=8)
    minutes.set(title="minutes of sound", xlabel="minutes")
    minutes.set_xlim(0.0, 1.15 * max(0.01, *(one + other for one, other in zip(usable, unusable, strict=True))))
    minutes.legend(fontsize=8)
    scatter = np.random.default_rng(0)
    for row, style in enumerate(styles):
        values = [(i.seconds, i.decoded.loudness_lufs, i.clipped) for i in style.usable]
        height = row + scatter.uniform(-0.3, 0.3, len(values))
        colour = ["tab:red" if clipped else "tab:blue" for *_, clipped in values]
        lengths.scatter([seconds for seconds, *_ in values], height, s=9, c=colour, alpha=0.5, linewidths=0)
        loud = [math.nan if lufs is None else lufs for _, lufs, _ in values]
        loudness.scatter(loud, height, s=9, c=colour, alpha=0.5, linewidths=0)
        if len(style.loudness_lufs):
            loudness.plot([np.median(style.loudness_lufs)] * 2, [row - 0.4, row + 0.4], "k", linewidth=1.5)
    loudness.set(title="loudness of each recording, the median as a line; clipped ones red", xlabel="LUFS")
    lengths.set(title="length of each recording", xlabel="seconds", xscale="log")
    lengths.xaxis.set_major_formatter("{x:g}")
    nothing = np.full(len(BAND_CENTRES_HZ), np.nan)
    levels = np.stack([nothing if style.bands_db is None else style.bands_db for style in styles])
    levels -= np.nanmax(np.where(np.isnan(levels), -80.0, levels), axis=1, keepdims=True)
    image = spectrum.imshow(levels, aspect="auto", cmap="magma", vmin=-60, vmax=0, interpolation="nearest")
    ticks = [int(np.argmin(np.abs(BAND_CENTRES_HZ - hertz))) for hertz in (50, 100, 200, 500, 1000, 2000, 5000, 10_000)]
    spectrum.set_xticks(ticks, ["50", "100", "200", "500", "1k", "2k", "5k", "10k"])
    spectrum.set(title="mean spectrum in third octaves, dB below the strongest", xlabel="Hz")
    figure.colorbar(image, ax=spectrum)
    for axes in (minutes, loudness, lengths, spectrum):
        axes.set_yticks(rows, [style.name for style in styles], parse_math=False)
        axes.set_ylim(len(styles) - 0.5, -0.5)
        if axes is not spectrum:
            axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=80, format="png")
