"""The baselines of note composition: what a table of counts foretells of tunes that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def witten_bell(
    train: Sequence[Tokens], held_out: Sequence[Tokens], order: int, vocabulary_size: int
) -> NDArray[np.float64]:
    """Probability of every token of ``held_out``, one after the other, by the ``order`` tokens before it.

    Interpolated with all shorter contexts down to the uniform distribution (Witten and Bell, "The zero-frequency
    problem", IEEE Trans. Information Theory 37(4), 1991, method C; interpolated as in Chen and Goodman, "An empirical
    study of smoothing techniques for language modeling", 1998, section 2.5). Order 0 are the unigrams.
    """
    probability = np.full(sum(len(tokens) for tokens in held_out), 1.0 / vocabulary_size)
    for length in range(order + 1):
        contexts, pairs = _codes(train, length)
        known, counts = np.unique(contexts, return_counts=True)
        known_pairs, first, pair_counts = np.unique(pairs, return_index=True, return_counts=True)
        kinds_of, kinds = np.unique(contexts[first], return_counts=True)
        here, pairs_here = _codes(held_out, length)
        total, distinct = _look_up(known, counts, here), _look_up(kinds_of, kinds, here)
        seen = _look_up(known_pairs, pair_counts, pairs_here)
        heard = total > 0
        mixed = (seen + distinct * probability) / np.maximum(total + distinct, 1)
        probability = np.where(heard, mixed, probability)
    return probability


def _codes(sequences: Sequence[Tokens], length: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Of every token a number for the ``length`` tokens before it, and one for these and itself.

    Different contexts share a number of 64 bits with a chance that does not matter.
    """
    contexts, pairs = [], []
    for tokens in sequences:
        padded = np.concatenate([np.zeros(length, np.uint64), tokens.astype(np.uint64) + np.uint64(1)])
        code = np.full(len(tokens), length + 1, np.uint64)
        for at in range(length):
            code = _stirred(code, padded[at : at + len(tokens)])
        contexts.append(code)
        pairs.append(_stirred(code, padded[length:]))
    return np.concatenate(contexts), np.concatenate(pairs)


def _stirred(code: NDArray[np.uint64], value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # A multiplication alone would let neighbouring tokens cancel out; the shift breaks that.
    mixed = (code ^ value) * MULTIPLIER
    return mixed ^ (mixed >> np.uint64(29))


def _look_up(known: NDArray[np.uint64], counts: NDArray[np.int64], wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The count of each wanted number; 0 where it is not known."""
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[at] == wanted, counts[at], 0)


def perplexity(probability: NDArray[np.float64], count: int | None = None) -> float:
    """exp of the mean surprise per token, or per ``count`` of something else that they make up."""
    return float(np.exp(-np.log(probability).sum() / (count or len(probability))))
