"""A streaming model and its state -> one ONNX graph with every state a named pair ``state.x`` -> ``next.x``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, nn

OPSET = 18


def state_tensors(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dataclass in order of their fields, each with its dotted name."""
    for field in fields(state):
        value, name = getattr(state, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from state_tensors(value, f"{name}.")
        else:
            yield name, value


def state_from_tensors(like: Any, tensors: Iterator[Tensor]) -> Any:
    """A state of the same shape as ``like`` from tensors in the order of ``state_tensors``."""
    values = {}
    for field in fields(like):
        value = getattr(like, field.name)
        values[field.name] = state_from_tensors(value, tensors) if is_dataclass(value) else next(tensors)
    return type(like)(**values)


class _Flat(nn.Module):
    """The model with its state as a flat list of tensors, as ONNX wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.like = model.init_state(1)  # pyright: ignore[reportCallIssue]

    def forward(self, audio: Tensor, style: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        out, state = self.model(audio, style, state_from_tensors(self.like, iter(states)))
        return (out, *(t for _, t in state_tensors(state)))


class _FlatRecogniser(nn.Module):
    """A recogniser with its state as a flat list of tensors; what it says after the last hop is enough."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.like = model.init_state(1)  # pyright: ignore[reportCallIssue]

    def forward(self, audio: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        (probabilities, embedding), state = self.model(audio, state_from_tensors(self.like, iter(states)))
        return (probabilities[:, -1], embedding[:, -1], *(t for _, t in state_tensors(state)))


@contextmanager
def quietly() -> Iterator[None]:
    """Without what torch's exporter says about itself: packages that it would know too, and how it will change."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def build_clip_graph(model: nn.Module, clip_samples: int, output: str) -> onnx.ModelProto:
    """Trace a style encoder or a critic: ``audio [clips, clip_samples]`` -> ``output [clips, numbers]``."""
    with quietly(), torch.no_grad():
        program = torch.onnx.export(
            model.eval(),
            (torch.zeros(3, clip_samples),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("clips", min=1, max=4096)},),
            opset_version=OPSET,
            input_names=["audio"],
            output_names=[output],
            external_data=False,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def build_graph(model: nn.Module, style_dim: int, hop_samples: int) -> onnx.ModelProto:
    """Trace the model to ONNX with dynamic ``channels`` and number of hops ``n`` (the time axis is ``n*hop``).

    Inputs ``audio [channels, n*hop]``, ``style [channels, style_dim]``, ``state.*``; outputs ``audio_out``, which
    ONNX does not allow to be called ``audio`` too, and ``next.*``.
    """
    model = model.eval()
    return _trace(_Flat(model), model, {"style": style_dim}, ["audio_out"], hop_samples)


def build_recogniser_graph(model: nn.Module, hop_samples: int) -> onnx.ModelProto:
    """Trace a recogniser: inputs ``audio [channels, n*hop]`` and ``state.*``, outputs ``probabilities [channels,
    styles]`` and ``embedding [channels, embedding_dim]`` after the last hop, and ``next.*``."""
    model = model.eval()
    return _trace(_FlatRecogniser(model), model, {}, ["probabilities", "embedding"], hop_samples)


def _trace(
    flat: nn.Module, model: nn.Module, vectors: dict[str, int], outputs: list[str], hop_samples: int
) -> onnx.ModelProto:
    """``flat`` as a graph: audio, ``vectors`` (name -> size) and states in, ``outputs`` and states out."""
    # Example sizes that are neither 0 nor 1 nor equal to any other size, which torch.export would take for constants.
    channels, hops = 3, 5
    state = model.init_state(channels)  # pyright: ignore[reportCallIssue]
    names = [name for name, _ in state_tensors(state)]
    arguments = (
        torch.zeros(channels, hops * hop_samples),
        *(torch.zeros(channels, size) for size in vectors.values()),
        *(t for _, t in state_tensors(state)),
    )
    batch = torch.export.Dim("channels", min=1, max=4096)
    count = torch.export.Dim("n", min=1, max=65536)
    leading = tuple({0: batch} for _ in vectors)
    shapes = ({0: batch, 1: hop_samples * count}, *leading, tuple({0: batch} for _ in names))
    with quietly(), torch.no_grad():
        program = torch.onnx.export(
            flat,
            arguments,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            input_names=["audio", *vectors, *(f"state.{name}" for name in names)],
            output_names=[*outputs, *(f"next.{name}" for name in names)],
            external_data=False,
            verbose=False,
        )
    assert program is not None
    return program.model_proto
