"""Folders of recordings -> styles: decoding once, a cache on disk, splits by recording, excerpts with sound in them.

Identity is content: the SHA-256 of a file's bytes orders the split, and the SHA-256 of its decoded samples finds
copies (a WAV and a FLAC of one take), so that no sound is ever in two splits, whatever the files are called.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from realtime.loudness import loudness_lufs
from training.recipe import DataConfig, StyleEntry

log = logging.getLogger(__name__)

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".caf"})
SPLITS = ("train", "validation", "test")
CACHE_VERSION = 2
CLIPPED_SAMPLES = 3  # so many in a row at full scale are a run, as in Audacity's "Find Clipping"
SHORTEST_LOUDNESS_SECONDS = 0.4  # one block of BS.1770
LONGEST_LOUDNESS_SECONDS = 120.0  # of longer recordings the middle is measured: the filters work in float64
LOUDEST_PEAK = 1000.0  # 60 dB over full scale; integers stored as floats come out at 32,768
UNKNOWN_SIZE_BYTES = 0x7FFF_F000  # writers that cannot go back claim at least so much


class LibraryError(RuntimeError):
    """A style without a single usable recording; the text names the folder and the remedy."""


@dataclass(frozen=True)
class Skipped:
    """A file that is not used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Recording:
    """One decoded recording, mono at the library's rate, lying in the cache."""

    path: Path  # as found
    name: str  # relative to the style's folder
    sha256: str  # of the file's bytes
    audio_sha256: str  # of the decoded samples
    cache_path: Path  # .npy float32 [samples]
    samples: int
    sample_rate: int

    @property
    def seconds(self) -> float:
        return self.samples / self.sample_rate

    def audio(self) -> NDArray[np.float32]:
        """The samples [samples], mapped from disk, read-only."""
        return _mapped(str(self.cache_path))


@lru_cache(maxsize=256)  # every map holds a file descriptor
def _mapped(path: str) -> NDArray[np.float32]:
    return np.load(path, mmap_mode="r")


@dataclass(frozen=True)
class StyleRecordings:
    """The recordings of one style in three splits, none in two of them."""

    id: str
    folder: Path
    train: tuple[Recording, ...]
    validation: tuple[Recording, ...]
    test: tuple[Recording, ...]

    def split(self, name: str) -> tuple[Recording, ...]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


@dataclass(frozen=True)
class Library:
    """All styles in the recipe's order, and what was left out."""

    styles: tuple[StyleRecordings, ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """Plain values for the model card: every recording of every split with its hashes."""
        return {
            style.id: {
                split: [
                    {
                        "name": recording.name,
                        "sha256": recording.sha256,
                        "audio_sha256": recording.audio_sha256,
                        "seconds": round(recording.seconds, 3),
                    }
                    for recording in style.split(split)
                ]
                for split in SPLITS
            }
            for style in self.styles
        }


def split_sizes(count: int) -> tuple[int, int, int]:
    """How many of ``count`` recordings go to train, validation and test: 8:1:1.

    From three on, each split has at least one; of two, one each to train and validation; one alone to train.
    """
    if count < 3:
        return min(count, 1), max(count - 1, 0), 0
    tenth = max(1, round(count / 10))
    return count - 2 * tenth, tenth, tenth


def split_recordings(
    recordings: Sequence[Recording], seed: int
) -> tuple[tuple[Recording, ...], tuple[Recording, ...], tuple[Recording, ...]]:
    """Train, validation and test, decided by content and seed alone: file names and their order do not matter."""
    ordered = sorted(recordings, key=lambda item: hashlib.sha256(f"{seed}:{item.sha256}".encode()).hexdigest())
    _, validation, test = split_sizes(len(ordered))
    return (
        tuple(ordered[validation + test :]),
        tuple(ordered[:validation]),
        tuple(ordered[validation : validation + test]),
    )


def is_cut_short(file: soundfile.SoundFile, path: Path) -> bool:
    """Whether the end of a file is missing, where its container can tell: not in MP3."""
    if file.format == "OGG":
        content = path.read_bytes()
        page = content[content.rfind(b"OggS") :]  # the last one; RFC 3533, section 6
        whole = len(page) > 26 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
        return not whole or not page[5] & 4  # the end-of-stream flag
    # libsndfile's log on WAV and AIFF: bytes of sound that the header claims, and that are there.
    sizes = re.search(r"\b(?:data|SSND) : (\d+) \(should be (\d+)\)", file.extra_info)
    return sizes is not None and int(sizes[2]) < int(sizes[1]) < UNKNOWN_SIZE_BYTES


@dataclass(frozen=True)
class Source:
    """What a file holds, before anything is done to it."""

    sample_rate: int
    channels: int
    format: str  # libsndfile's names: WAV, FLAC, OGG, MP3, ...
    subtype: str  # PCM_16, FLOAT, VORBIS, ...
    clipped_runs: int  # see clipped_runs


def clipped_runs(audio: NDArray[np.float32], full_scale: float) -> int:
    """How many runs of CLIPPED_SAMPLES or more samples at or beyond full scale [samples, channels] holds."""
    at = np.abs(audio) >= full_scale
    inside = at[2:] & at[1:-1] & at[:-2]
    starts = inside.copy()
    starts[1:] &= ~inside[:-1]
    return int(np.count_nonzero(starts))


def decode_file(path: Path) -> tuple[NDArray[np.float32], Source]:
    """A file's sound as it is: [samples, channels] at its own rate. ValueError says what is wrong."""
    try:
        with soundfile.SoundFile(path) as file:
            rate, form, subtype, cut_short = file.samplerate, file.format, file.subtype, is_cut_short(file, path)
            audio = np.asarray(file.read(dtype="float32", always_2d=True), dtype=np.float32)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        raise ValueError(f"cannot be decoded: {error}") from error
    if cut_short:
        raise ValueError("is cut short: its end is missing; copy it again")
    if audio.shape[0] == 0:
        raise ValueError("is empty")
    if not np.isfinite(audio).all():
        raise ValueError("holds samples that are not numbers (NaN or infinity)")
    peak = float(np.abs(audio).max())
    if peak > LOUDEST_PEAK:
        raise ValueError(f"is far above full scale (peak {peak:.3g}, full scale is 1); scale it down")
    # The highest value of the coarsest format: eight bits end at 127/128, sixteen at 32767/32768.
    full_scale = 127 / 128 if subtype in ("PCM_S8", "PCM_U8") else 32_767 / 32_768
    runs = clipped_runs(audio, full_scale) if peak >= full_scale else 0
    return audio, Source(rate, audio.shape[1], form, subtype, runs)


def read_recording(path: Path, sample_rate: int) -> tuple[NDArray[np.float32], Source]:
    """Decode, mix to mono by the mean, resample with soxr's HQ setting: [samples]. ValueError says what is wrong."""
    audio, source = decode_file(path)
    mono = audio.mean(axis=1)
    if source.sample_rate != sample_rate:
        mono = soxr.resample(mono, source.sample_rate, sample_rate, quality="HQ")
    return np.ascontiguousarray(mono, dtype=np.float32), source


def read_mono(path: Path, sample_rate: int) -> NDArray[np.float32]:
    """The sound alone of ``read_recording``: [samples]. ValueError says what is wrong."""
    return read_recording(path, sample_rate)[0]


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary name, then rename: readers and other processes never see half a file."""
    # Copies of one file may be decoded by two threads at once, into one and the same path.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp.npy")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_sound(path: Path, sound: NDArray[np.float32], sample_rate: int, subtype: str) -> None:
    """A sound file of [samples, channels]. Raises OSError, also where libsndfile has a kind of its own."""
    try:
        soundfile.write(path, sound, sample_rate, subtype=subtype)
    except soundfile.SoundFileError as error:
        raise OSError(errno.EIO, f"cannot be written ({error})", str(path)) from None


@dataclass(frozen=True)
class Decoded:
    """What is known of a file once it was decoded into the cache."""

    sha256: str  # of the file's bytes
    audio_sha256: str  # of the decoded samples
    samples: int
    level_dbfs: float  # loudest tenth of a second
    loudness_lufs: float | None  # see _loudness
    source: Source | None
    problem: str = ""  # why it could not be decoded; then nothing else is known


class RecordingCache:
    """Decoded recordings on disk, by content hash and rate; an index by path, size and time spares hashing again."""

    def __init__(self, folder: Path, sample_rate: int) -> None:
        self.folder, self.sample_rate = folder, sample_rate
        folder.mkdir(parents=True, exist_ok=True)
        self._index_path = folder / f"index-{sample_rate}.json"
        self._index: dict[str, list[Any]] = {}
        try:
            stored = json.loads(self._index_path.read_text(encoding="utf-8"))
            if stored["version"] == CACHE_VERSION:
                self._index = dict(stored["files"])
        except (OSError, ValueError, KeyError, TypeError):
            log.debug("no usable cache index at %s", self._index_path)

    def audio_path(self, sha256: str) -> Path:
        return self.folder / f"{sha256[:40]}-{self.sample_rate}.npy"

    def _find(self, key: str) -> Decoded | None:
        """What the index says of a file, if the cache really holds it."""
        try:
            entry = self._index[key]
            sha256, audio_sha256, samples, level_dbfs, loudness, (rate, channels, form, subtype, runs) = entry
            known = Decoded(
                str(sha256),
                str(audio_sha256),
                int(samples),
                float(level_dbfs),
                None if loudness is None else float(loudness),
                Source(int(rate), int(channels), str(form), str(subtype), int(runs)),
            )
            stored = np.load(self.audio_path(known.sha256), mmap_mode="r")
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            return None
        return known if stored.shape == (known.samples,) and stored.dtype == np.float32 else None

    def decode(self, path: Path) -> Decoded:
        """Decode into the cache, or find it there."""
        try:
            status = path.stat()
            key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
            known = self._find(key)
            if known is not None:
                return known
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            audio, source = read_recording(path, self.sample_rate)
        except (OSError, ValueError) as error:
            return Decoded("", "", 0, -np.inf, None, None, str(error))
        target = self.audio_path(sha256)
        replace_file(target, lambda temporary: np.save(temporary, audio))
        result = Decoded(
            sha256,
            hashlib.sha256(audio.data).hexdigest(),
            len(audio),
            loudest_block(audio, self.sample_rate)[1],
            _loudness(audio, self.sample_rate),
            source,
        )
        self._index[key] = list(astuple(result)[:-1])
        return result

    def decode_all(self, paths: Sequence[Path], progress: Callable[[int, int], object] | None = None) -> list[Decoded]:
        """Decode in a few threads, in the given order; ``progress`` is told (files done, files in all)."""
        decoded: list[Decoded] = []
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for result in pool.map(self.decode, paths):
                decoded.append(result)
                if progress is not None:
                    progress(len(decoded), len(paths))
        self.save_index()
        return decoded

    def save_index(self) -> None:
        text = json.dumps({"version": CACHE_VERSION, "files": self._index})
        replace_file(self._index_path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _loudness(audio: NDArray[np.float32], sample_rate: int) -> float | None:
    """Integrated loudness in LUFS of the mono sound, of its middle two minutes at most; None of less than 0.4 s."""
    if len(audio) < SHORTEST_LOUDNESS_SECONDS * sample_rate:
        return None
    most = round(LONGEST_LOUDNESS_SECONDS * sample_rate)
    start = max(0, len(audio) - most) // 2
    return loudness_lufs(audio[start : start + most], sample_rate)


def loudest_block(audio: NDArray[np.float32], sample_rate: int) -> tuple[slice, float]:
    """The loudest tenth of a second: where it lies, and its root-mean-square level in dBFS; -200 for silence."""
    block = max(1, min(len(audio), sample_rate // 10))
    whole = audio[: len(audio) // block * block].reshape(-1, block)
    power = np.einsum("ij,ij->i", whole, whole, dtype=np.float64) / block  # no copy in float64: recordings are long
    loudest = int(power.argmax())
    return slice(loudest * block, (loudest + 1) * block), 10.0 * float(np.log10(max(float(power[loudest]), 1e-20)))


def find_audio(folder: Path) -> list[Path]:
    """All audio files below a folder, in a fixed order; hidden ones, and those in hidden folders, are passed over."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in AUDIO_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


@dataclass(frozen=True)
class Fault:
    """Why a recording is not used."""

    kind: str  # damaged, short, silent or copy
    reason: str  # continues a sentence that begins with the file's name


def find_faults(
    paths: Sequence[Path], decoded: Sequence[Decoded], config: DataConfig, sample_rate: int
) -> list[Fault | None]:
    """What is wrong with each of the files, in the given order; the first of several copies has no fault."""
    faults: list[Fault | None] = []
    first_seen: dict[str, Path] = {}
    for path, result in zip(paths, decoded, strict=True):
        seconds = result.samples / sample_rate
        fault = None
        if result.problem:
            fault = Fault("damaged", result.problem)
        elif seconds < config.minimum_seconds:
            reason = f"is too short ({seconds:.3f} s, at least {config.minimum_seconds:g} s are needed)"
            fault = Fault("short", reason)
        elif result.level_dbfs < config.audible_dbfs:
            fault = Fault("silent", f"is silent (never above {config.audible_dbfs:g} dBFS)")
        elif result.audio_sha256 in first_seen:
            fault = Fault("copy", f"is a copy of {first_seen[result.audio_sha256]}")
        else:
            first_seen[result.audio_sha256] = path
        faults.append(fault)
    return faults


def load_library(
    entries: Sequence[StyleEntry],
    data_folder: Path,
    config: DataConfig,
    sample_rate: int,
    cache_folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Library:
    """Decode, check and split the recordings of every style.

    ``progress`` is told (files done, files in all). Raises LibraryError for a style without a usable recording.
    """
    files: list[tuple[StyleEntry, Path, Path]] = []
    for entry in entries:
        folder = data_folder / entry.folder
        if not folder.is_dir():
            raise LibraryError(
                f"style '{entry.id}': there is no folder {folder}; create it, or point --data at its parent"
            )
        found = find_audio(folder)
        if not found:
            raise LibraryError(
                f"style '{entry.id}': no recordings in {folder}; put files there ({', '.join(sorted(AUDIO_SUFFIXES))})"
            )
        files += [(entry, folder, path) for path in found]

    cache = RecordingCache(cache_folder, sample_rate)
    paths = [path for _, _, path in files]
    decoded = cache.decode_all(paths, progress)
    skipped: list[Skipped] = []
    usable: dict[str, list[Recording]] = {entry.id: [] for entry in entries}
    faults = find_faults(paths, decoded, config, sample_rate)
    for (entry, folder, path), result, fault in zip(files, decoded, faults, strict=True):
        if fault is not None:
            skipped.append(Skipped(path, fault.reason))
            log.info("skipped %s: %s", path, fault.reason)
            continue
        usable[entry.id].append(
            Recording(
                path=path,
                name=path.relative_to(folder).as_posix(),
                sha256=result.sha256,
                audio_sha256=result.audio_sha256,
                cache_path=cache.audio_path(result.sha256),
                samples=result.samples,
                sample_rate=sample_rate,
            )
        )

    styles: list[StyleRecordings] = []
    warnings: list[str] = []
    for entry in entries:
        folder, recordings = data_folder / entry.folder, usable[entry.id]
        if not recordings:
            reasons = [f"{item.path.name} {item.reason}" for item in skipped if folder in item.path.parents]
            raise LibraryError(
                f"style '{entry.id}': none of the recordings in {folder} can be used "
                f"({'; '.join(reasons[:3])}{'; ...' if len(reasons) > 3 else ''}); "
                "replace them with sound recordings of this style alone"
            )
        if len(recordings) < 3:
            missing = "validation and test splits are" if len(recordings) == 1 else "test split is"
            warnings.append(
                f"style '{entry.id}': only {len(recordings)} usable recording(s), so its {missing} empty; "
                "add recordings to have figures for it"
            )
        styles.append(StyleRecordings(entry.id, folder, *split_recordings(recordings, config.split_seed)))
    return Library(tuple(styles), tuple(skipped), tuple(warnings))


class ExcerptSampler:
    """Draws stretches of sound of one style, of any length, reproducibly."""

    def __init__(self, recordings: Sequence[Recording], config: DataConfig) -> None:
        assert recordings
        self.recordings, self.config = tuple(recordings), config
        seconds = np.array([item.seconds for item in recordings])
        self._weights = seconds / seconds.sum()
        self._loudest: dict[int, slice] = {}  # by number of the recording, found when first needed

    def draw(self, samples: int, random: np.random.Generator) -> NDArray[np.float32]:
        """[samples] of this style: pieces of recordings, joined by crossfades or short gaps. Never all silent."""
        rate = self.recordings[0].sample_rate
        config = self.config
        fade = max(2, round(config.fade_seconds * rate))
        rise = np.sin(0.5 * np.pi * (np.arange(fade, dtype=np.float32) + 0.5) / fade)
        out = np.zeros(samples, dtype=np.float32)
        position = 0
        while position < samples:
            wanted = round(random.uniform(*config.piece_seconds) * rate)
            piece, from_onset = self._piece(wanted, samples - position, random)
            piece = piece.copy()
            edge = min(fade, len(piece) // 2)
            # An onset keeps its attack; a cut into the middle of a sound gets a soft edge.
            if not from_onset:
                piece[:edge] *= rise[:edge]
            piece[-edge:] *= rise[:edge][::-1]
            stop = min(position + len(piece), samples)
            out[position:stop] += piece[: stop - position]
            position += len(piece)
            if random.uniform() < config.gap_chance:
                position += round(random.uniform(*config.gap_seconds) * rate)
            else:
                position -= edge
        return out

    def _place(self, wanted: int, random: np.random.Generator) -> tuple[int, int]:
        """Number of a recording, and where in it a piece of ``wanted`` samples may start."""
        number = int(random.choice(len(self.recordings), p=self._weights))
        recording = self.recordings[number]
        last = max(0, recording.samples - wanted)
        onset = last == 0 or (recording.seconds <= self.config.note_seconds and random.uniform() < 0.5)
        return number, 0 if onset else int(random.integers(0, last + 1))

    def _piece(self, wanted: int, kept: int, random: np.random.Generator) -> tuple[NDArray[np.float32], bool]:
        """Up to ``wanted`` samples, with sound in the first ``kept``, and whether they are the start of a recording."""
        number = 0
        for _ in range(8):
            number, start = self._place(wanted, random)
            piece = np.asarray(self.recordings[number].audio()[start : start + wanted])
            level = 10.0 * np.log10(max(float(np.square(piece[:kept]).mean()), 1e-20))
            if level >= self.config.audible_dbfs:
                return piece, start == 0
        # Long pauses with little between them: go where the last of the recordings is loudest.
        recording = self.recordings[number]
        if number not in self._loudest:
            self._loudest[number] = loudest_block(recording.audio(), recording.sample_rate)[0]
        loudest, last = self._loudest[number], max(0, recording.samples - wanted)
        low, high = sorted((loudest.start, max(0, loudest.stop - min(wanted, kept))))
        start = min(int(random.integers(low, high + 1)), last)
        return np.asarray(recording.audio()[start : start + wanted]), start == 0
