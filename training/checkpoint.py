"""Checkpoints: written whole or not at all, read without trusting them, and complete enough to export from.

Beside Lightning's own entries a checkpoint holds ``restyle``: plain values only, with the recipe, the styles in the
order of the style table, the recordings of each split with their hashes, steps, wall time, metrics and versions.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dacite
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from realtime.notes import Vocabulary
from training.models.autoencoder import Autoencoder
from training.models.composer import Composer
from training.models.critic import Critic, Ratings
from training.models.encoder import StyleEncoder
from training.models.generator import Generator, SpectrumGenerator
from training.models.kinds import make_generator
from training.models.noise_player import NoisePlayer
from training.models.streaming_recogniser import StreamingRecogniser
from training.recipe import Recipe, RecipeError, recipe_from_dict

CHECKPOINT_KEY = "restyle"
CHECKPOINT_FORMAT = 2
SECTIONS = {"compose": ("composer", "tunes"), "recognise": ("spectral", "recogniser")}
"""Of a recipe, by its objective, that a run may not change; of all other objectives: spectral, model."""
AVERAGE = "average_"  # before the name of a weight: its average
# Fields of a recipe that a run may not change and no weight depends on.
NOT_LEARNED = ("model.attack_", "model.release_", "data.split_seed", "trainer.average_decay")


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, foreign or of another recipe; the text names the file and the remedy."""


@dataclass(frozen=True)
class TrainedModel:
    """What export needs. ``style_vectors`` [styles, style_dim] in the order of ``recipe.style``."""

    # In evaluation mode, on the CPU; averaged weights where the run averaged.
    generator: Generator | SpectrumGenerator | Autoencoder | NoisePlayer
    encoder: StyleEncoder | None  # likewise, if the run trained one
    critic: Ratings | None  # of a model with noise, as it stood at the end
    style_vectors: Tensor
    recipe: Recipe
    card: dict[str, Any]


@dataclass(frozen=True)
class TrainedComposer:
    """What export needs of a run that composes."""

    composer: Composer  # in evaluation mode, on the CPU; averaged weights where the run averaged
    vocabulary: Vocabulary
    recipe: Recipe
    card: dict[str, Any]


@dataclass(frozen=True)
class TrainedRecogniser:
    """What the export of a recogniser needs."""

    recogniser: StreamingRecogniser  # in evaluation mode, on the CPU; averaged weights where the run averaged
    recipe: Recipe
    card: dict[str, Any]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves under a temporary name, then renames: a process killed at any moment leaves the last whole file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        del storage_options
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        for left_over in target.parent.glob(f".{target.name}.*.tmp"):  # of a process that was killed
            left_over.unlink(missing_ok=True)
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        del weights_only  # nothing but tensors and plain values, whatever the caller says
        checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        for state in checkpoint.get("callbacks", {}).values():
            if "dirpath" in state:
                _move_home(state, Path(path).resolve().parent)
        return checkpoint


def _move_home(state: dict[str, Any], folder: Path) -> None:
    """Let what ModelCheckpoint remembers lie in ``folder``: in a run folder that was moved, best stays best.

    Lightning otherwise forgets the best score as soon as the folder has another name.
    """

    state["dirpath"] = str(folder)
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        if state.get(name):
            state[name] = str(folder / Path(state[name]).name)
    scores = state.get("best_k_models", {})
    state["best_k_models"] = {str(folder / Path(path).name): score for path, score in scores.items()}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The whole checkpoint as plain values and tensors on the CPU. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint; train first, or check the path")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged and foreign files
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}); it is damaged or not a checkpoint: "
            "use another one, or train again with --fresh"
        ) from error
    card = checkpoint.get(CHECKPOINT_KEY) if isinstance(checkpoint, dict) else None
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(card, dict) or not isinstance(weights, dict):
        raise CheckpointError(f"{path}: holds no '{CHECKPOINT_KEY}' entry; it was not written by 'restyle train'")
    if card.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path}: format: is {card.get('format')}, this version reads {CHECKPOINT_FORMAT}; "
            "use the version that wrote it, or train again"
        )
    for name, value in weights.items():
        if not isinstance(value, Tensor) or not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{path}: state_dict.{name}: holds something other than finite numbers; the file is damaged: "
                "use another one, or train again with --fresh"
            )
    return checkpoint


def card_and_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The history of a checkpoint's run, and what it learned, by names in a run; averages where it averaged.

    Raises CheckpointError.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint["state_dict"]
    averages = {name.removeprefix(AVERAGE): value for name, value in state.items() if name.startswith(AVERAGE)}
    plain = {name: value for name, value in state.items() if not name.startswith(AVERAGE)}
    return checkpoint[CHECKPOINT_KEY], plain | averages


def changed_fields(then: Recipe, now: Recipe) -> list[str]:
    """Fields that a resumed run may not change, as 'field: old -> new'."""
    changed = [] if then.objective == now.objective else [f"objective: {then.objective} -> {now.objective}"]
    for section in SECTIONS.get(now.objective, ("spectral", "model")):
        old, new = getattr(then, section), getattr(now, section)
        changed += [
            f"{section}.{item.name}: {getattr(old, item.name)} -> {getattr(new, item.name)}"
            for item in dataclasses.fields(old)
            if getattr(old, item.name) != getattr(new, item.name)
        ]
    if then.noise_dims != now.noise_dims:
        changed.append(f"cycle.noise_dims: {then.noise_dims} -> {now.noise_dims}")
    old_ids, new_ids = [item.id for item in then.style], [item.id for item in now.style]
    if old_ids != new_ids:
        changed.append(f"style.id: {', '.join(old_ids)} -> {', '.join(new_ids)}")
    if then.data.split_seed != now.data.split_seed:
        changed.append(f"data.split_seed: {then.data.split_seed} -> {now.data.split_seed}")
    if bool(then.trainer.average_decay) != bool(now.trainer.average_decay):
        changed.append(f"trainer.average_decay: {then.trainer.average_decay} -> {now.trainer.average_decay}")
    return changed


def check_resumable(path: Path, recipe: Recipe) -> int:
    """Steps done in the checkpoint that ``recipe`` wants to continue. Raises CheckpointError if it cannot."""
    checkpoint = read_checkpoint(path)
    card = checkpoint[CHECKPOINT_KEY]
    for field, kind in {
        "recipe": dict,
        "steps": int,
        "wall_seconds": float,
        "metrics": dict,
        "recordings": dict,
    }.items():
        if not isinstance(card.get(field), kind):
            raise CheckpointError(
                f"{path}: {CHECKPOINT_KEY}.{field}: is missing or no {kind.__name__}; the file is damaged: "
                "start anew with --fresh"
            )
    if not all(checkpoint.get(entry) for entry in ("optimizer_states", "lr_schedulers", "loops")):
        raise CheckpointError(f"{path}: holds weights but not where training stood; start anew with --fresh")
    try:
        then = recipe_from_dict(card["recipe"], f"{path}: recipe")
    except RecipeError as error:
        raise CheckpointError(f"{path}: its recipe cannot be read ({error}); start anew with --fresh") from error
    changed = changed_fields(then, recipe)
    if changed:
        raise CheckpointError(
            f"{path}: the recipe has changed since ({'; '.join(changed)}); "
            "undo that, start anew with --fresh, or choose another --out"
        )
    return card["steps"]


def lineage(card: dict[str, Any]) -> list[dict[str, Any]]:
    """The cards of a run and of the runs that it began with, the latest first."""
    before = card.get("began_with")
    return [card, *(lineage(before) if before else [])]


def new_generator(recipe: Recipe) -> Generator | SpectrumGenerator | Autoencoder | NoisePlayer:
    """What the recipe has learn to sound, untrained."""
    if recipe.objective == "generate":
        return NoisePlayer(recipe.spectral, recipe.model)
    return make_generator(recipe.spectral, recipe.model, recipe.traits)


def fit_traits(generator: nn.Module, vectors: Tensor, recipe: Recipe) -> None:
    """Tell ``generator`` which of the styles, by their ``vectors`` [styles, style_dim], have which trait."""
    if isinstance(generator, Generator):
        generator.fit_traits(vectors, recipe.traits)


def objective_of(path: Path) -> str:
    """The objective of the run that wrote a checkpoint. Raises CheckpointError."""
    return str(read_checkpoint(path)[CHECKPOINT_KEY].get("objective"))


def load_for_export(path: Path, *others: Path, recipe: Recipe | None = None) -> TrainedModel:
    """The trained generator with everything that travels with it. Raises CheckpointError.

    ``others``: more checkpoints of the same run; the weights are the mean of all (Izmailov et al., "Averaging weights
    leads to wider optima and better generalization", 2018), all else is that of ``path``. ``recipe``: in place of the
    checkpoint's own, with the same weights: names, licences and what is not learned may be others.
    """
    card, weights = card_and_weights(path)
    try:
        then = recipe_from_dict(card["recipe"], f"{path}: recipe")
    except (RecipeError, KeyError) as error:
        raise CheckpointError(f"{path}: does not fit this version's model ({error}); train again") from error
    changed = changed_fields(then, recipe) if recipe is not None else []
    if changed := [what for what in changed if not what.startswith(NOT_LEARNED)]:
        raise CheckpointError(f"{path}: was trained by another recipe ({'; '.join(changed)}); undo that")
    return assembled(path, weights | _mean_weights(path, weights, others, then), recipe or then, card)


def assembled(path: Path, weights: Mapping[str, Tensor], recipe: Recipe, card: dict[str, Any]) -> TrainedModel:
    """The model of ``weights``, by their names in a run, that lay at ``path``. Raises CheckpointError."""
    try:
        generator = new_generator(recipe)
        generator.load_state_dict(_part(weights, "generator."))
        encoder = None
        if recipe.encoder.share:
            encoder = StyleEncoder(recipe.spectral.sample_rate, recipe.model.style_dim)
            encoder.load_state_dict(_part(weights, "encoder."))
            encoder.eval().requires_grad_(False)
        critic = None
        if recipe.noise_dims:
            judge = Critic(recipe.spectral.sample_rate, len(recipe.style))
            judge.load_state_dict(_part(weights, "critic."))
            critic = Ratings(judge).eval().requires_grad_(False)
        vectors = weights["styles.weight"].detach().clone()
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: does not fit this version's model ({error}); train again") from error
    if vectors.shape != (len(recipe.style), recipe.model.style_dim):
        raise CheckpointError(
            f"{path}: styles: shape {tuple(vectors.shape)} does not fit {len(recipe.style)} styles of "
            f"{recipe.model.style_dim} numbers; the file is damaged, train again"
        )
    fit_traits(generator, vectors, recipe)
    return TrainedModel(generator.eval().requires_grad_(False), encoder, critic, vectors, recipe, card)


def load_composer(path: Path) -> TrainedComposer:
    """The trained composer with everything that travels with it. Raises CheckpointError."""
    card, weights = card_and_weights(path)
    try:
        recipe = recipe_from_dict(card["recipe"], f"{path}: recipe")
        vocabulary = dacite.from_dict(Vocabulary, card["vocabulary"], dacite.Config(strict=True, cast=[tuple]))
        composer = Composer(recipe.composer, len(vocabulary.tokens))
        composer.load_state_dict(_part(weights, "composer."))
    except (RecipeError, KeyError, RuntimeError, ValueError, dacite.DaciteError) as error:
        raise CheckpointError(f"{path}: does not fit this version's model ({error}); train again") from error
    return TrainedComposer(composer.eval().requires_grad_(False), vocabulary, recipe, card)


def load_recogniser(path: Path) -> TrainedRecogniser:
    """The trained recogniser with everything that travels with it. Raises CheckpointError."""
    card, weights = card_and_weights(path)
    try:
        recipe = recipe_from_dict(card["recipe"], f"{path}: recipe")
        recogniser = StreamingRecogniser(recipe.spectral, recipe.recogniser, len(recipe.style))
        recogniser.load_state_dict(_part(weights, "recogniser."))
    except (RecipeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: does not fit this version's model ({error}); train again") from error
    return TrainedRecogniser(recogniser.eval().requires_grad_(False), recipe, card)


def _mean_weights(
    path: Path, weights: Mapping[str, Tensor], others: Sequence[Path], recipe: Recipe
) -> dict[str, Tensor]:
    """The mean of what ``path``, with these ``weights``, and the others say of those that are exported.

    Raises CheckpointError that names the other which does not fit.
    """
    every = [weights]
    for other in others:
        card, found = card_and_weights(other)
        try:
            changed = changed_fields(recipe, recipe_from_dict(card["recipe"], "its recipe"))
        except (RecipeError, KeyError) as error:
            raise CheckpointError(f"{other}: does not fit this version's model ({error}); leave it out") from error
        if changed:
            raise CheckpointError(f"{other}: is of another run than {path} ({'; '.join(changed)}); leave it out")
        every.append(found)
    names = [{name for name in known if name.startswith(("generator.", "encoder.", "styles."))} for known in every]
    for other, known in zip(others, names[1:], strict=True):
        if known != names[0]:
            raise CheckpointError(f"{other}: has other parts than {path} (an encoder, say); leave it out")
    return {name: torch.stack([known[name] for known in every]).mean(dim=0) for name in names[0]}


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of one part of a run, under their names within it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
