"""What a new run can begin with: another run's checkpoint, or a model file that carries its weights."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realtime.bundle import BundleError, named_model, read_bundle
from training.checkpoint import (
    NOT_LEARNED,
    CheckpointError,
    TrainedModel,
    assembled,
    card_and_weights,
    lineage,
)
from training.models.generator import GeneratorConfig
from training.recipe import Recipe

EMPHASIS_METRIC = "style_emphasis"  # how what a model card says of emphasis begins
CARD = "card"
"""The array of a model file's weights that is JSON and no weight."""
MODEL = "model"
"""In that, the [model] of the recipe that it was trained by."""
KEPT_OF_A_RECORDING = ("sha256", "audio_sha256", "seconds")
"""A file that is given away says what was heard and not what it was called."""


@dataclass(frozen=True)
class Beginning:
    """What an earlier run learned, for another run to begin with."""

    path: Path
    weights: dict[str, Tensor]  # by their names in a run, averaged where that run averaged
    card: dict[str, Any]


def load_beginning(path: Path) -> Beginning:
    """The weights and the history of the run at ``path``: a checkpoint, a model file or the name of a shipped one.

    Of a model file they lack the judges. Raises CheckpointError.
    """
    model = named_model(path)
    if model.suffix == ".onnx":
        return _of_model(model)
    card, weights = card_and_weights(path)
    return Beginning(path, weights, card)


def load_model_for_export(path: Path, recipe: Recipe) -> TrainedModel:
    """What a model file, or a shipped one by its name, carries of the run by this ``recipe``. Raises CheckpointError.

    All but a critic, so nothing of a model with noise.
    """
    beginning = _of_model(named_model(path))
    if recipe.noise_dims:
        raise CheckpointError(f"{path}: does not carry the critic of a model with noise; export its checkpoint")
    known, wanted = ([style["id"] for style in beginning.card["styles"]], [style.id for style in recipe.style])
    if known != wanted:
        raise CheckpointError(f"{path}: was trained by another recipe (style.id: {', '.join(known)}); take that one")
    manifest = read_bundle(beginning.path).manifest
    if manifest.spectral != recipe.spectral:
        raise CheckpointError(f"{path}: was trained by another recipe (spectral: {manifest.spectral}); take that one")
    then, now = beginning.card.get(MODEL, {}), _plain(recipe.model)
    changed = [
        f"model.{name}: {then[name]} -> {value}" for name, value in now.items() if then.get(name, value) != value
    ]
    if changed := [what for what in changed if not what.startswith(NOT_LEARNED)]:
        raise CheckpointError(f"{path}: was trained by another recipe ({'; '.join(changed)}); take that one")
    metrics = manifest.card.metrics
    own = {name: value for name, value in metrics.items() if not name.startswith(EMPHASIS_METRIC)}
    return assembled(path, beginning.weights, recipe, beginning.card | {"metrics": own})


WIDENED = ("generator.enter.", "generator.body.cell.", "generator.steer.", "generator.leave.")
"""Weights of a generator with a GRU or LSTM that have its ``hidden`` size, once or several times, in their shapes."""


def widened(name: str, learned: Tensor, fresh: Tensor, hidden: int, wider: int) -> Tensor:
    """What a body of ``hidden`` units has ``learned``, within ``fresh`` weights of one that is ``wider``; same output.

    New units hear what they like, and nobody hears them yet (Chen, Goodfellow and Shlens, "Net2Net: accelerating
    learning via knowledge transfer", 2016, section 2.3, with zeros in place of copies). What does not
    fit comes back as it is.
    """
    if not name.startswith(WIDENED) or learned.ndim != fresh.ndim:
        return learned
    places = []
    for old, new in zip(learned.shape, fresh.shape, strict=True):
        if old == new:
            places.append(torch.arange(old))
            continue
        blocks, rest = divmod(old, hidden)
        if rest or new != blocks * wider:
            return learned
        places.append((torch.arange(blocks)[:, None] * wider + torch.arange(hidden)).flatten())
    grown = fresh.clone()
    grown[places[0]] = 0.0
    grown[tuple(torch.meshgrid(*places, indexing="ij"))] = learned
    return grown


def pack_beginning(trained: TrainedModel) -> str:
    """Generator, encoder and style vectors, and the history of their run, as text for a model file."""
    parts = {"generator": trained.generator, "encoder": trained.encoder}
    arrays = {
        f"{part}.{name}": value.numpy()
        for part, module in parts.items()
        if module is not None
        for name, value in module.state_dict().items()
    }
    arrays["styles.weight"] = trained.style_vectors.numpy()
    cards = [_without_names(card) for card in lineage(trained.card)]
    for card, before in itertools.pairwise(cards):
        card["began_with"] = before
    cards[0][MODEL] = _plain(trained.recipe.model)
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **{CARD: np.array(json.dumps(cards[0]))}, **arrays)
    return base64.b64encode(packed.getvalue()).decode()


def _plain(config: GeneratorConfig) -> dict[str, Any]:
    """As JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _without_names(card: dict[str, Any]) -> dict[str, Any]:
    recordings = {
        style: {
            split: [{name: recording[name] for name in KEPT_OF_A_RECORDING if name in recording} for recording in heard]
            for split, heard in splits.items()
        }
        for style, splits in card["recordings"].items()
    }
    kept = ("styles", "tunes", "steps", "wall_seconds")
    return {name: card[name] for name in kept if name in card} | {"recordings": recordings}


def _of_model(path: Path) -> Beginning:
    try:
        bundle = read_bundle(path)
    except BundleError as error:
        raise CheckpointError(str(error)) from None
    if not bundle.weights:
        raise CheckpointError(
            f"{path}: weights: are missing, so no run can begin with it; export it again, or begin with a checkpoint"
        )
    try:
        with np.load(io.BytesIO(base64.b64decode(bundle.weights, validate=True)), allow_pickle=False) as arrays:
            weights = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != CARD}
            card = json.loads(str(arrays[CARD]))
        whole = isinstance(card, dict) and isinstance(card.get("styles"), list) and bool(card.get("recordings"))
        if not whole or not all(bool(torch.isfinite(value).all()) for value in weights.values()):
            raise ValueError("a part is missing, or no number")
    except Exception as error:  # numpy and zipfile raise many kinds for damaged files
        raise CheckpointError(f"{path}: weights: are damaged ({error}); copy or export the file again") from None
    return Beginning(path, weights, card)
