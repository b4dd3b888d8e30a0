"""Files through the very same engine, faster than real time, with the latency removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from realtime import midi
from realtime.audio import AUDIO_SUFFIXES, AudioFileError, AudioWriter, FileInfo, file_info, read_blocks, resampled
from realtime.bundle import Bundle, BundleError
from realtime.controls import Performer
from realtime.processor import Processor

BLOCK = 8192
MAX_CHANNELS = 64
STEADY_HOPS_PER_STEP = 16


@dataclass(frozen=True)
class Rendered:
    """One file done: as many frames out as in, at the same rate.

    Hops of the input with numbers that are no sound were silenced or clipped, those for which the model failed are dry;
    ``fault`` says why if it raised.
    """

    source: Path
    target: Path
    frames: int
    sample_rate: int
    channels: int
    bad_input_hops: int
    bad_output_hops: int
    fault: str


def through(
    processor: Processor,
    blocks: Iterator[NDArray[np.float32]],
    performer: Performer,
    events: list[tuple[int, bytes]],
    midi_map: midi.MidiMap,
) -> Iterator[NDArray[np.float32]]:
    """Blocks through the engine, events at their samples, the latency taken off the front and pushed out at the end."""
    skip = processor.latency_samples
    at, coming = 0, 0

    def run(block: NDArray[np.float32]) -> NDArray[np.float32]:
        nonlocal skip
        out = processor.process(block)
        cut = min(skip, out.shape[1])
        skip -= cut
        return out[:, cut:].copy()

    for block in blocks:
        start = 0
        while start < block.shape[1]:
            while coming < len(events) and events[coming][0] <= at:
                message = midi.decode(events[coming][1])
                if message is not None and midi.apply(message, performer, midi_map):
                    processor.controls = performer.controls()
                coming += 1
            stop = min(block.shape[1], start + BLOCK)
            if coming < len(events):
                stop = min(stop, start + max(1, events[coming][0] - at))
            yield run(np.ascontiguousarray(block[:, start:stop]))
            at += stop - start
            start = stop
    yield run(np.zeros((processor.channels, processor.latency_samples), np.float32))


def render_samples(processor: Processor, audio: NDArray[np.float32]) -> NDArray[np.float32]:
    """audio [channels, samples] at the model's rate through a prepared, reset processor: as long, and aligned to it."""
    performer = Performer(processor.manifest)  # never asked: nothing moves without MIDI
    return np.concatenate(list(through(processor, iter([audio]), performer, [], midi.MidiMap())), axis=1)


def checked_source(source: Path, target: Path) -> FileInfo:
    """What ``source`` is. Raises AudioFileError where it cannot be rendered to ``target``."""
    info = file_info(source)
    if info.channels > MAX_CHANNELS:
        raise AudioFileError(f"{source}: {info.channels} channels are above {MAX_CHANNELS}")
    if target.exists() and target.samefile(source):
        raise AudioFileError(f"{target}: is the input itself; choose another output")
    return info


def restyled(
    processor: Processor,
    info: FileInfo,
    performer: Performer,
    events: list[tuple[float, bytes]] | None = None,
    midi_map: midi.MidiMap | None = None,
) -> Iterator[NDArray[np.float32]]:
    """Blocks of a file through a prepared, reset processor, at the model's rate and aligned to the file."""
    rate = processor.manifest.spectral.sample_rate
    timed = [(round(seconds * rate), data) for seconds, data in events or []]
    blocks = resampled(read_blocks(info.path, BLOCK), info.sample_rate, rate, info.channels)
    return through(processor, blocks, performer, timed, midi_map or midi.MidiMap())


def render_file(
    bundle: Bundle,
    source: Path,
    target: Path,
    performer: Performer,
    events: list[tuple[float, bytes]] | None = None,
    midi_map: midi.MidiMap | None = None,
    provider: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Rendered:
    """One file through the engine: output lines up with the input to the sample and has its rate, channels and length.

    ``events`` are (seconds, MIDI bytes) as ``read_midi_file`` gives them; ``progress`` is told (frames done, in all).
    Raises AudioFileError and then leaves no file, BundleError for a model that restyles nothing.
    """
    if bundle.manifest.kind == "generate":
        raise BundleError(
            bundle.path, "manifest.kind", "'generate' makes sound of noise, not of a file", "use 'restyle generate'"
        )
    info, rate = checked_source(source, target), bundle.manifest.spectral.sample_rate
    # Nothing moves without MIDI, so many hops at once give the same samples for a third of the time.
    processor = Processor(bundle, provider, hops_per_step=1 if events else STEADY_HOPS_PER_STEP)
    processor.controls = performer.controls()
    processor.prepare(rate, BLOCK, info.channels)
    wet, done = restyled(processor, info, performer, events, midi_map), 0
    with AudioWriter(target, info.sample_rate, info.channels) as writer:
        for block in resampled(wet, rate, info.sample_rate, info.channels):
            keep = block[:, : info.frames - done]
            if keep.shape[1]:
                writer.write(keep)
                done += keep.shape[1]
            if progress:
                progress(done, info.frames)
        if done < info.frames:
            # Resampling there and back may end a frame or two short.
            writer.write(np.zeros((info.channels, info.frames - done), np.float32))
    meters = processor.meters
    return Rendered(
        source,
        target,
        info.frames,
        info.sample_rate,
        info.channels,
        meters.bad_input_hops,
        meters.bad_output_hops,
        meters.fault,
    )


def plan_files(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """(input, output) pairs: file to file, file into a folder, or a folder to a folder of the same structure.

    Raises AudioFileError when there is nothing to render.
    """
    if source.is_dir():
        inside = target.resolve()
        if inside == source.resolve():
            raise AudioFileError(f"{target}: is the input itself; choose another output")
        found = sorted(p for p in source.rglob("*") if p.is_file() and p.suffix.lower() in AUDIO_SUFFIXES)
        found = [p for p in found if not p.name.startswith(".") and inside not in p.resolve().parents]
        if not found:
            raise AudioFileError(f"{source}: has no sound files ({', '.join(AUDIO_SUFFIXES)})")
        return [(path, target / path.relative_to(source)) for path in found]
    if not source.is_file():
        raise AudioFileError(f"{source}: there is no such file or folder; check the path")
    if target.is_dir() or (target.suffix.lower() not in AUDIO_SUFFIXES and not target.suffix):
        return [(source, target / source.name)]
    return [(source, target)]
