"""A trained composer -> the one model file: a graph of one event, manifest, card, golden vector; verified first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from export.graph import OPSET, quietly
from export.verify import TOLERANCE, VerifyError
from export.writer import card_of, finish_graph, save_graph
from realtime.bundle import SCHEMA_VERSION, Golden, Manifest, StateSpec, read_bundle
from realtime.compose import NoteStream
from realtime.files import NewFile
from realtime.notes import DURATIONS_TICKS, Note, Vocabulary
from training.checkpoint import TrainedComposer
from training.models.composer import Composer, ComposerState

VERIFIED_NOTES = 512
GOLDEN_EVENTS = 64


@dataclass(frozen=True)
class NotesVerification:
    """Largest difference of a logit over ``events`` events, one after the other with the state carried."""

    events: int
    largest_difference: float


class _OneEvent(nn.Module):
    """The composer for one event, with its state as tensors, as ONNX wants it."""

    def __init__(self, composer: Composer) -> None:
        super().__init__()
        self.composer = composer

    def forward(self, token: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, state = self.composer(token[:, None], ComposerState(hidden, cell))
        return logits[:, 0], state.hidden, state.cell


def build_notes_graph(composer: Composer) -> onnx.ModelProto:
    """Trace one step: ``token [tunes]``, ``state.*`` -> ``logits [tunes, vocabulary]``, ``next.*``; tunes are dynamic.

    One event, and never a number of them: the exporter turns the time axis of an LSTM into a constant.
    """
    tunes = 3  # neither 0 nor 1 nor equal to any other size, which torch.export would take for a constant
    state = composer.init_state(tunes)
    batch = torch.export.Dim("tunes", min=1, max=4096)
    with quietly(), torch.no_grad():
        program = torch.onnx.export(
            _OneEvent(composer).eval(),
            (torch.zeros(tunes, dtype=torch.int64), state.hidden, state.cell),
            dynamo=True,
            dynamic_shapes=({0: batch}, {0: batch}, {0: batch}),
            opset_version=OPSET,
            input_names=["token", "state.hidden", "state.cell"],
            output_names=["logits", "next.hidden", "next.cell"],
            external_data=False,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def wandering_notes(vocabulary: Vocabulary, count: int) -> list[Note]:
    """Notes of all lengths and loudnesses up and down the range, with chords and rests; always the same."""
    random = np.random.default_rng(0)
    notes: list[Note] = []
    pitch, now = (vocabulary.lowest_pitch + vocabulary.highest_pitch) // 2, 0
    for _ in range(count):
        pitch = int(np.clip(pitch + random.integers(-5, 6), vocabulary.lowest_pitch, vocabulary.highest_pitch))
        duration = int(random.choice(DURATIONS_TICKS))
        notes.append(Note(now, duration, pitch, int(random.integers(1, 128))))
        now += int(random.choice([0, duration, duration + int(random.integers(0, 48))]))
    return notes


def export_composer(trained: TrainedComposer, path: Path, description: str = "") -> NotesVerification:
    """Write the model file of a run that composes. Raises VerifyError or OSError and then leaves no file."""
    recipe, vocabulary, composer = trained.recipe, trained.vocabulary, trained.composer
    spec = recipe.spectral  # a manifest has one; notes have no samples and no latency of their own
    tokens = torch.tensor([[vocabulary.end, *vocabulary.encode(wandering_notes(vocabulary, VERIFIED_NOTES))]])
    with torch.no_grad():
        logits, state = composer(tokens, composer.init_state(1))
    expected = logits[0].numpy()
    labels = ", ".join(entry.label for entry in recipe.style)
    manifest = Manifest(
        schema=SCHEMA_VERSION,
        kind="notes",
        name=recipe.name,
        spectral=spec,
        latency_samples=spec.latency_samples,
        stream_delay_samples=spec.stream_delay_samples,
        style_dim=0,
        states=(
            StateSpec("hidden", tuple(state.hidden.shape[1:])),
            StateSpec("cell", tuple(state.cell.shape[1:])),
        ),
        styles=(),
        parameters=(),
        card=card_of(trained, description or f"Continues tunes; learned from: {labels}"),
        golden=Golden(
            "",
            Golden.pack(tokens[0, :GOLDEN_EVENTS].numpy().astype(np.float32)),
            Golden.pack(expected[:GOLDEN_EVENTS]),
        ),
        weight_count=sum(parameter.numel() for parameter in composer.parameters()),
        vocabulary=vocabulary,
    )
    graph = build_notes_graph(composer)
    finish_graph(graph, manifest)
    with NewFile(path.absolute()) as part:
        save_graph(graph, part)
        stream = NoteStream(read_bundle(part))
        found = np.stack([stream.step(token) for token in tokens[0].tolist()])
        difference = float(np.abs(found - expected).max())
        if not difference < TOLERANCE:
            raise VerifyError(
                f"torch and onnxruntime differ by {difference:.2e} in a logit over {tokens.shape[1]} events "
                f"(limit {TOLERANCE:.0e}); no file was written"
            )
    return NotesVerification(tokens.shape[1], difference)
