"""Checkpoint -> the one model file: graph, manifest, card, golden vector; verified before it gets its name."""

from __future__ import annotations

import base64
import datetime as dt
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from export.graph import build_clip_graph, build_graph, state_tensors
from export.verify import MINIMUM_HOPS, Verification, run_torch, verify, verify_critic, verify_encoder
from realtime.audio import demo_playing
from realtime.bundle import (
    CRITIC_KEY,
    ENCODER_KEY,
    MANIFEST_KEY,
    SCHEMA_VERSION,
    WEIGHTS_KEY,
    Bundle,
    Card,
    Golden,
    Manifest,
    Source,
    StateSpec,
    Style,
)
from realtime.controls import PARAMETERS, SOURCE_PARAMETERS, TARGET_LOUDNESS_LUFS
from realtime.files import NewFile
from realtime.loudness import at_common_loudness, reference_playings, styles_loudness_lufs
from realtime.noise import SeededNoise
from realtime.spectral import SpectralSpec
from training.beginning import EMPHASIS_METRIC, pack_beginning
from training.checkpoint import TrainedComposer, TrainedModel, TrainedRecogniser, lineage
from training.models.encoder import CLIP_SAMPLES
from training.models.generator import Generator

GOLDEN_HOPS = 64
MOST_BLENDED_STYLES = 32
"""Of whose blends levels are measured: pairs grow with the square."""
BLENDED = slice(1, 4)
"""The playings that blends are measured on: what is plucked, in the registers in the middle."""
NOISE_PLAYINGS, NOISE_SECONDS = 3, 8.0
LEAST_EMPHASIS, MOST_EMPHASIS = 0.1, 3.0


@dataclass(frozen=True)
class NamedStyle:
    """One style of the style table, as the manifest will name it."""

    id: str
    label: str
    program: int
    vector: NDArray[np.float32]


@dataclass(frozen=True)
class Noise:
    """What makes one playing sound in many ways, and what chooses between them."""

    dims: int  # at the end of a style vector
    critic: nn.Module  # audio [clips, clip_samples] -> ratings [clips, styles]
    clip_samples: int  # as long as in training


class EmphasisError(ValueError):
    """An emphasis that is none, or of a style that the model does not have."""


@dataclass(frozen=True)
class Emphasis:
    """How far style vectors lie from their mean, times this; ``of`` are styles, by id, with one of their own."""

    usual: float = 1.0
    of: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Emphasis:
        """'1.15', 'choir=1.3' or '1.15,choir=1.3'. Raises EmphasisError."""
        usual, of = 1.0, dict[str, float]()
        for part in text.split(","):
            style, equals, number = part.rpartition("=")
            try:
                value = float(number)
            except ValueError:
                raise EmphasisError(f"'{part}' is no number; write it as 1.15 or 1.15,choir=1.3") from None
            if not LEAST_EMPHASIS <= value <= MOST_EMPHASIS:
                raise EmphasisError(f"{value:g} is outside {LEAST_EMPHASIS:g}..{MOST_EMPHASIS:g}")
            if equals:
                of[style.strip()] = value
            else:
                usual = value
        return cls(usual, of)

    def metrics(self) -> dict[str, float]:
        """What the model card says of it; nothing where nothing is overdone."""
        named = {f"{EMPHASIS_METRIC}_{style}": value for style, value in self.of.items()}
        return ({} if self.usual == 1.0 else {EMPHASIS_METRIC: self.usual}) | named


def export_checkpoint(
    trained: TrainedModel, path: Path, description: str = "", emphasis: Emphasis = Emphasis()
) -> Verification:
    """Write the model file of a training run. Raises EmphasisError, VerifyError or OSError and then leaves no file.

    What the file keeps to train on stays as it is, whatever the ``emphasis``.
    """
    recipe = trained.recipe
    known = [recipe.style[row].id for row in recipe.performed]
    if unknown := [style for style in emphasis.of if style not in known]:
        raise EmphasisError(f"there is no style '{unknown[0]}'; there are: {', '.join(known)}")
    mean = trained.style_vectors.mean(dim=0)
    factors = torch.tensor([emphasis.of.get(entry.id, emphasis.usual) for entry in recipe.style])[:, None]
    vectors = (mean + factors * (trained.style_vectors - mean)).numpy().astype(np.float32)
    if isinstance(trained.generator, Generator):
        # Before any tracing: what the body remembers is of the vectors that are performed.
        performed = torch.from_numpy(vectors[list(recipe.performed)])
        trained.generator.fit_memory(performed, _usual_playing(recipe.spectral))
    styles = [
        NamedStyle(entry.id, entry.label, entry.midi_program, vectors[row])
        for row, entry in enumerate(recipe.style)
        if row in recipe.performed
    ]
    card = card_of(trained, description)
    card = replace(card, metrics=card.metrics | emphasis.metrics())
    return write_model(
        trained.generator,
        recipe.spectral,
        styles,
        card,
        path,
        name=recipe.name,
        encoder=trained.encoder,
        noise=Noise(recipe.noise_dims, trained.critic, recipe.segment_samples) if trained.critic is not None else None,
        kind="generate" if recipe.objective == "generate" else "transfer",
        weights=pack_beginning(trained),
    )


def write_model(
    model: nn.Module,
    spec: SpectralSpec,
    styles: Sequence[NamedStyle],
    card: Card,
    path: Path,
    name: str,
    verify_hops: int = MINIMUM_HOPS,
    encoder: nn.Module | None = None,
    noise: Noise | None = None,
    kind: str = "transfer",
    weights: str = "",
) -> Verification:
    """Trace, describe, verify against ``model`` and only then put the file at ``path``.

    A model of kind ``generate`` plays seeded noise wherever one of kind ``transfer`` plays recordings. ``weights``:
    what ``pack_beginning`` made.

    The file is written beside its place under a temporary name, so a failure or a full disk leaves nothing behind.
    """
    vectors = [style.vector for style in styles]
    if kind == "generate":
        playings = list(noise_playings(spec))
        playing = playings[0]
    else:
        playings = reference_playings(spec.sample_rate)
        playing = at_common_loudness(demo_playing(spec.sample_rate), spec.sample_rate)
    start = int(np.argmax(np.abs(playing) > 0.05)) // spec.hop_samples * spec.hop_samples
    golden_in = playing[start : start + GOLDEN_HOPS * spec.hop_samples]
    vector = torch.from_numpy(vectors[0])[None]
    golden_out = run_torch(
        model, torch.from_numpy(golden_in)[None], vector.expand(GOLDEN_HOPS, 1, -1), spec.hop_samples
    )
    state: Any = model.init_state(1)  # pyright: ignore[reportCallIssue]
    unmeasured = Manifest(
        schema=SCHEMA_VERSION,
        kind=kind,
        name=name,
        spectral=spec,
        latency_samples=spec.latency_samples,
        stream_delay_samples=spec.stream_delay_samples,
        style_dim=len(vectors[0]),
        states=tuple(StateSpec(label, tuple(tensor.shape[1:])) for label, tensor in state_tensors(state)),
        styles=tuple(
            Style(style.id, style.label, tuple(float(v) for v in style.vector), TARGET_LOUDNESS_LUFS, style.program)
            for style in styles
        ),
        parameters=PARAMETERS + (SOURCE_PARAMETERS if kind == "generate" else ()),
        card=card,
        golden=Golden(styles[0].id, Golden.pack(golden_in), Golden.pack(golden_out[0].numpy())),
        weight_count=sum(parameter.numel() for parameter in model.parameters()),
        noise_dims=noise.dims if noise else 0,
        code_levels=getattr(model, "code_levels", ()),
    )
    graph = build_graph(model, unmeasured.style_dim, spec.hop_samples)
    finish_graph(graph, unmeasured)
    bundle = Bundle(path, unmeasured, graph.SerializeToString())
    manifest = _with_measured_levels(bundle, playings, vectors)
    finish_graph(graph, manifest)
    if encoder is not None:
        _attach(graph, ENCODER_KEY, build_clip_graph(encoder, CLIP_SAMPLES, "vector"))
    if noise is not None:
        _attach(graph, CRITIC_KEY, build_clip_graph(noise.critic, noise.clip_samples, "ratings"))
    if weights:
        graph.metadata_props.add(key=WEIGHTS_KEY, value=weights)
    path = path.absolute()
    with NewFile(path) as part:
        save_graph(graph, part)
        if encoder is not None:
            verify_encoder(encoder, part, playing)
        if noise is not None:
            verify_critic(noise.critic, part, playing)
        return verify(model, part, playing, verify_hops)


def _usual_playing(spec: SpectralSpec) -> torch.Tensor:
    """[2, n*hop]: something plucked and something bowed, in the middle registers."""
    playings = reference_playings(spec.sample_rate, speeds=(1.0,))
    hops = min(map(len, playings)) // spec.hop_samples
    return torch.from_numpy(np.stack([playing[: hops * spec.hop_samples] for playing in playings]))


def noise_playings(spec: SpectralSpec) -> NDArray[np.float32]:
    """[3, samples]: what a source hears at its usual intensity, from three seeds."""
    hops = round(NOISE_SECONDS / spec.hop_seconds)
    noise = np.zeros((NOISE_PLAYINGS, hops * spec.hop_samples), np.float32)
    SeededNoise(0, NOISE_PLAYINGS, spec.hop_samples).fill(noise)
    return np.float32(SOURCE_PARAMETERS[0].default) * noise


def finish_graph(graph: onnx.ModelProto, manifest: Manifest) -> None:
    """Give a traced graph its manifest, and take from it what nobody needs."""
    _strip(graph)
    _name_samples(graph, manifest.spectral.hop_samples)
    graph.producer_name = "restyle"
    graph.metadata_props.add(key=MANIFEST_KEY, value=manifest.to_json())


def _attach(graph: onnx.ModelProto, key: str, other: onnx.ModelProto) -> None:
    """Let another whole ONNX file travel in the metadata."""
    _strip(other)
    graph.metadata_props.add(key=key, value=base64.b64encode(other.SerializeToString()).decode())


def save_graph(graph: onnx.ModelProto, path: Path) -> None:
    """Write it, and wait until it is on the disk. Raises OSError."""
    with path.open("wb") as file:
        file.write(graph.SerializeToString())
        file.flush()
        os.fsync(file.fileno())


def _with_measured_levels(
    bundle: Bundle, playings: Sequence[NDArray[np.float32]], vectors: Sequence[NDArray[np.float32]]
) -> Manifest:
    """The bundle's manifest, saying how loud its styles and their blends are."""
    loudness = styles_loudness_lufs(bundle, vectors, playings)
    losses = _blend_losses_lu(bundle, playings[BLENDED], vectors, loudness[:, BLENDED].mean(axis=1))
    styles = zip(bundle.manifest.styles, loudness.mean(axis=1), strict=True)
    return replace(
        bundle.manifest,
        styles=tuple(replace(style, loudness_lufs=round(float(lufs), 2)) for style, lufs in styles),
        blend_losses_lu=tuple(tuple(round(float(loss), 2) for loss in row) for row in losses),
    )


def _blend_losses_lu(
    bundle: Bundle,
    playings: Sequence[NDArray[np.float32]],
    vectors: Sequence[NDArray[np.float32]],
    alone: NDArray[np.float64],
) -> NDArray[np.float64]:
    """[styles, styles]: by how many LU the even blend of two is quieter than both in the mean; none for many styles.

    ``alone`` [styles]: how loud the same playings are in each.
    """
    count = len(vectors)
    if not 2 <= count <= MOST_BLENDED_STYLES:
        return np.zeros((0, 0))
    pairs = [(i, j) for i in range(count) for j in range(i)]
    blends = styles_loudness_lufs(bundle, [0.5 * (vectors[i] + vectors[j]) for i, j in pairs], playings).mean(axis=1)
    losses = np.zeros((count, count))
    for (i, j), blended in zip(pairs, blends, strict=True):
        losses[i, j] = losses[j, i] = 0.5 * (alone[i] + alone[j]) - blended
    return losses


def card_of(trained: TrainedModel | TrainedComposer | TrainedRecogniser, description: str) -> Card:
    """The model card of a training run, with the sources as the recipe's licences ask them to be named."""
    recipe, cards = trained.recipe, lineage(trained.card)
    sources: dict[str, Source] = {}
    hashes: set[str] = set()
    for card in cards:  # the latest first: what it says of a style holds
        for style in card["styles"]:
            splits = card["recordings"][style["id"]]
            hashes.update(recording["sha256"] for name in ("train", "validation") for recording in splits[name])
            minutes = round(sum(recording["seconds"] for recording in splits["train"]) / 60, 2)
            source = Source(style["id"], style["licence"], style["attribution"], len(splits["train"]), minutes)
            sources.setdefault(source.style, source)
    tunes = {tune for card in cards for tune in card.get("tunes", [])}
    if tunes:
        sources["tunes"] = Source("tunes", recipe.phrases.licence, recipe.phrases.attribution, len(tunes), 0.0)
    return Card(
        description=description or f"Styles: {', '.join(recipe.style[row].label for row in recipe.performed)}",
        objective=recipe.objective,
        commit=_commit(),
        date=dt.datetime.now(dt.UTC).date().isoformat(),
        steps=sum(int(each["steps"]) for each in cards),
        training_minutes=round(sum(float(each["wall_seconds"]) for each in cards) / 60, 1),
        sources=tuple(sources.values()),
        metrics={name: float(value) for name, value in trained.card["metrics"].items()},
        recordings_sha256=tuple(sorted(hashes)),
    )


def _commit() -> str:
    """The commit of the code that exports, empty outside a checkout."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


def _name_samples(graph: onnx.ModelProto, hop_samples: int) -> None:
    """Call the time axis of input and output ``samples``; the tracer calls it by its arithmetic."""
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == f"{hop_samples}*n":
                dim.dim_param = "samples"


def _strip(graph: onnx.ModelProto) -> None:
    """Remove what tracing leaves behind (stack traces, names of source files): nobody's business, half the size."""
    del graph.metadata_props[:]
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for values in (graph.graph.value_info, graph.graph.input, graph.graph.output, graph.graph.initializer):
        for value in values:
            del value.metadata_props[:]
            value.doc_string = ""
    del graph.graph.metadata_props[:]
