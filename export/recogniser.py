"""A trained recogniser -> its model file, verified against torch before it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.graph import build_recogniser_graph, state_tensors
from export.verify import MINIMUM_HOPS, Verification, VerifyError, accepted, two_channels
from export.writer import card_of, finish_graph, save_graph
from realtime.audio import demo_playing
from realtime.bundle import SCHEMA_VERSION, Golden, Manifest, StateSpec, Style, read_bundle
from realtime.files import NewFile
from realtime.loudness import at_common_loudness
from realtime.recognise import Recogniser
from training.checkpoint import TrainedRecogniser
from training.models.streaming_recogniser import StreamingRecogniser

GOLDEN_HOPS = 8


def export_recogniser(
    trained: TrainedRecogniser, path: Path, description: str = "", verify_hops: int = MINIMUM_HOPS
) -> Verification:
    """Write the model file of a recogniser. Raises VerifyError or OSError and then leaves no file.

    The vector of a style is the direction in the embedding that speaks for it.
    """
    model, recipe = trained.recogniser, trained.recipe
    spec, config = recipe.spectral, recipe.recogniser
    playing = at_common_loudness(demo_playing(spec.sample_rate), spec.sample_rate)
    start = int(np.argmax(np.abs(playing) > 0.05)) // spec.hop_samples * spec.hop_samples
    golden_in = playing[start : start + GOLDEN_HOPS * spec.hop_samples]
    with torch.no_grad():
        (golden_out, _), _ = model(torch.from_numpy(golden_in)[None], model.init_state(1))
    vectors = model.classify.weight.detach().numpy().astype(np.float64)
    manifest = Manifest(
        schema=SCHEMA_VERSION,
        kind="recognise",
        name=recipe.name,
        spectral=spec,
        latency_samples=spec.latency_samples,
        stream_delay_samples=spec.stream_delay_samples,
        style_dim=config.embedding_dim,
        states=tuple(StateSpec(name, tuple(tensor.shape[1:])) for name, tensor in state_tensors(model.init_state(1))),
        styles=tuple(
            Style(entry.id, entry.label, tuple(round(float(v), 6) for v in vector), 0.0, entry.midi_program)
            for entry, vector in zip(recipe.style, vectors, strict=True)
        ),
        parameters=(),
        card=card_of(trained, description),
        golden=Golden(recipe.style[0].id, Golden.pack(golden_in), Golden.pack(golden_out[0].numpy().ravel())),
        weight_count=sum(parameter.numel() for parameter in model.parameters()),
    )
    graph = build_recogniser_graph(model, spec.hop_samples)
    finish_graph(graph, manifest)
    with NewFile(path.absolute()) as part:
        save_graph(graph, part)
        return verify_recogniser(model, part, playing, verify_hops)


def run_recogniser(model: StreamingRecogniser, audio: Tensor, step_samples: int) -> NDArray[np.float32]:
    """The model over audio [channels, time] in steps -> probabilities and embedding after each [steps, channels, _]."""
    state: Any = model.init_state(audio.shape[0])
    said = []
    with torch.no_grad():
        for chunk in audio.split(step_samples, dim=1):
            (probabilities, embedding), state = model(chunk, state)
            said.append(torch.cat([probabilities[:, -1], embedding[:, -1]], dim=1))
    return torch.stack(said).numpy()


def verify_recogniser(
    model: StreamingRecogniser, path: Path, audio: NDArray[np.float32], hops: int = MINIMUM_HOPS
) -> Verification:
    """Compare the file at ``path`` with the model on real audio [samples], two channels, the states carried.

    Of the embedding, differences count against its root mean square. Raises VerifyError when the largest difference
    reaches TOLERANCE or a number is not finite.
    """
    bundle = read_bundle(path)
    recogniser = Recogniser(bundle)
    styles, hop = len(recogniser.manifest.styles), recogniser.manifest.spectral.hop_samples
    worst: dict[int, float] = {}
    for hops_per_step in (1, 3, 16):
        steps = -(-hops // hops_per_step)
        step_samples = hops_per_step * hop
        stereo = two_channels(audio, steps * step_samples)
        expected = run_recogniser(model, torch.from_numpy(stereo), step_samples)
        size = np.ones(expected.shape[-1], np.float32)
        size[styles:] = np.sqrt(np.square(expected[:, :, styles:]).mean())
        states, difference = recogniser.silence(2), 0.0
        for i in range(steps):
            audio_in = stereo[:, i * step_samples : (i + 1) * step_samples]
            probabilities, embedding, states = recogniser.step(audio_in, states)
            found = np.concatenate([probabilities, embedding], axis=1)
            difference = max(difference, float((np.abs(found - expected[i]) / size).max()))
            if not np.isfinite(difference):
                raise VerifyError(f"output is not finite at hop {i * hops_per_step}; no file was written")
        worst[hops_per_step] = difference
    return accepted(bundle, hops, worst)
