"""What a style's own recordings reach when tunes are played on them: a measure for what an evaluation can ask for.

A style's recordings are mostly single notes, and the Fréchet distance to them is one of tunes to notes as well, which
no instrument could make up for. Real notes playing real tunes say how much of it there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realtime.bundle import Bundle
from training import measures
from training.instrument import Instrument, MeasuredNotes, articulation, build_instrument, measure_all
from training.library import Recording
from training.models.recogniser import SAMPLE_RATE, Recogniser, cut_excerpts, loud_enough
from training.phrases import LEAST_NOTES, PhraseError, plan_phrases, render
from training.playing import at_rate, judged, mean_of, rounded, share_taken_for
from training.recipe import PhrasesConfig

TUNES_PER_STYLE = 12
LONGEST_TUNE_S = 60.0


def tunes_figures(
    bundle: Bundle,
    styles: Sequence[str],
    recordings: Mapping[str, Sequence[Recording]],
    tunes: Sequence[Path],
    recogniser: Recogniser,
    real: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    before: Mapping[str, Sequence[float]],
    seconds: float,
    cache_folder: Path,
    tell: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """What "tunes" says: melodies of MIDI files, ``seconds`` of each at most, on the notes among a style's recordings.

    ``real``: each style's embeddings as a Gaussian; ``before``: distances that are a ratio of 1, those of the inputs
    unchanged, of all and of those of one pitch if there are any. "onset_f1" is of a style's playing against the next
    style's of the same tune. Nothing of styles without pitch (drums) or with fewer than LEAST_NOTES notes. Raises
    PhraseError where no style has any.
    """
    rate, seconds, found = bundle.manifest.spectral.sample_rate, min(seconds, LONGEST_TUNE_S), {}
    notes = MeasuredNotes(cache_folder, rate)
    minutes = 3 * TUNES_PER_STYLE * seconds / 60.0  # a phrase counts for its two takes and for one partner
    config = PhrasesConfig(minutes_per_style=minutes, phrase_seconds=seconds, partners=1)
    instruments: dict[str, Instrument] = {}
    for style in styles:
        manner, group = articulation(bundle.manifest.style(style).program), recordings[style]
        if manner is not None:
            instrument = build_instrument(style, manner, group, measure_all(group, notes))
            if len(instrument.notes) >= LEAST_NOTES:
                instruments[style] = instrument
    others = dict(zip(instruments, [*instruments.values()][1:] + [*instruments.values()][:1], strict=True))
    for number, (style, instrument) in enumerate(instruments.items()):
        tell("playing tunes on the recordings", number, len(instruments))
        excerpts, alike = [], []
        for phrase in plan_phrases([instrument], tunes, config, seed=0, textures=("melody",)):
            played, by_other = (render(phrase.notes, who, seconds, rate) for who in (instrument, others[style]))
            cut = cut_excerpts(at_rate(played, rate, SAMPLE_RATE))
            excerpts.append(cut[loud_enough(cut)])
            theirs, ours = (measures.onsets_s(at_rate(who, rate, measures.TRACK_RATE)) for who in (by_other, played))
            alike.append(measures.onset_f1(theirs, ours))
        if excerpts:
            judgement = judged(recogniser, np.concatenate(excerpts))
            distance = measures.frechet_distance(measures.gaussian_of(judgement.embeddings), real[style])
            ratios = [rounded(distance / unchanged) for unchanged in before[style]]
            found[style] = {
                "style_accuracy": share_taken_for(judgement, recogniser.styles.index(style)),
                "frechet_ratio": ratios[0],
                "frechet_ratio_of_voices": ratios[1] if len(ratios) > 1 else None,
                "onset_f1": mean_of(alike) if len(instruments) > 1 else None,
            }
    notes.save()
    if not found:
        raise PhraseError(
            f"--tunes: none of the styles {', '.join(styles)} has {LEAST_NOTES} recordings of single notes to play on; "
            "add such recordings, or leave it out"
        )
    tell("playing tunes on the recordings", len(instruments), len(instruments))
    names = ("style_accuracy", "frechet_ratio", "frechet_ratio_of_voices", "onset_f1")
    return {
        "tunes": {
            "styles": found,
            "mean": {name: mean_of(values[name] for values in found.values()) for name in names},
        }
    }
