"""Sound made of seeded noise, through the very same engine as a performance: into a file, or endlessly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from realtime.audio import AudioWriter
from realtime.bundle import Bundle, check_kind
from realtime.controls import Performer
from realtime.midi import MidiMap
from realtime.processor import Meters, Processor
from realtime.render import BLOCK, STEADY_HOPS_PER_STEP, through


@dataclass(frozen=True)
class Generated:
    """One file made. Hops for which the model failed are silent; ``fault`` says why if it raised."""

    target: Path
    frames: int
    sample_rate: int
    channels: int
    seed: int
    bad_output_hops: int
    fault: str


def check_generates(bundle: Bundle) -> None:
    """BundleError for a model that makes no sound by itself."""
    remedy = "give a model of kind 'generate', or see 'restyle render'"
    check_kind(bundle, "generate", "makes no sound of noise", remedy)


class Generation:
    """Blocks of sound, one after the other, without an end and in constant memory; one thread at a time.

    The same seed, styles and events give the same samples, however long they are asked for.
    """

    def __init__(
        self,
        bundle: Bundle,
        performer: Performer,
        seed: int = 0,
        channels: int = 1,
        events: list[tuple[float, bytes]] | None = None,
        midi_map: MidiMap | None = None,
        provider: str = "cpu",
    ) -> None:
        """``events``: (seconds, MIDI bytes) as ``read_midi_file`` gives them. Raises BundleError, ProviderError."""
        check_generates(bundle)
        self.sample_rate = rate = bundle.manifest.spectral.sample_rate
        steps = 1 if events else STEADY_HOPS_PER_STEP
        self.processor = Processor(bundle, provider, hops_per_step=steps, seed=seed)
        self.processor.controls = performer.controls()
        self.processor.prepare(rate, BLOCK, channels)
        self._performer, self._map = performer, midi_map or MidiMap()
        self._events = [(round(seconds * rate), data) for seconds, data in events or []]

    @property
    def meters(self) -> Meters:
        """The engine's."""
        return self.processor.meters

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """[channels, n] each, for ever. Ask once."""
        silence = np.zeros((self.processor.channels, BLOCK), np.float32)

        def endless() -> Iterator[NDArray[np.float32]]:
            while True:
                yield silence

        return through(self.processor, endless(), self._performer, self._events, self._map)


def generate_file(
    generation: Generation, target: Path, frames: int, progress: Callable[[int, int], None] | None = None
) -> Generated:
    """The first ``frames`` samples of a generation as a sound file. Raises AudioFileError and then leaves no file.

    ``progress`` is told (frames done, in all).
    """
    processor = generation.processor
    with AudioWriter(target, generation.sample_rate, processor.channels) as writer:
        for block in generation.blocks():
            writer.write(block[:, : frames - writer.frames])
            if progress:
                progress(writer.frames, frames)
            if writer.frames >= frames:
                break
    meters = generation.meters
    return Generated(
        target,
        frames,
        generation.sample_rate,
        processor.channels,
        processor.seed,
        meters.bad_output_hops,
        meters.fault,
    )
