"""The streaming contract, once for every layer and model: causal, chunkable, honest about its latency and its state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Streaming:
    """A layer as the contract sees it: time last, in whole chunks of ``chunk`` samples (or frames).

    ``chunk_out`` is how many output samples a chunk gives; ``reach`` how many input samples, itself included, must
    have arrived before an output sample on the input's time axis is final: the algorithmic latency.
    """

    init_state: Callable[[int], Any]
    step: Step
    x: Tensor  # [batch, ..., chunks * chunk]
    chunk: int
    chunk_out: int
    latency_samples: int
    reach: int
    tolerance: float = 2e-6


def tensors(state: Any) -> list[Tensor]:
    """All tensors of a state, nested or not, in order."""
    if isinstance(state, Tensor):
        return [state]
    assert is_dataclass(state), f"a state is a dataclass of tensors, not {type(state)}"
    return [tensor for field in fields(state) for tensor in tensors(getattr(state, field.name))]


def run(layer: Streaming, x: Tensor, sizes: list[int] | None = None) -> tuple[Tensor, Any]:
    """x in one piece, or in pieces of so many chunks each."""
    state = layer.init_state(x.shape[0])
    pieces = [x] if sizes is None else list(x.split([size * layer.chunk for size in sizes], dim=-1))
    outs = []
    with torch.no_grad():
        for piece in pieces:
            out, state = layer.step(piece, state)
            outs.append(out)
    return torch.cat(outs, dim=-1), state


def random_sizes(chunks: int, generator: torch.Generator) -> list[int]:
    sizes = []
    while sum(sizes) < chunks:
        sizes.append(min(int(torch.randint(1, 6, (1,), generator=generator)), chunks - sum(sizes)))
    return sizes


def assert_streaming_contract(layer: Streaming, seed: int = 0) -> None:
    """Everything that a streaming layer promises; AssertionError says which promise is broken."""
    chunks = layer.x.shape[-1] // layer.chunk
    assert chunks * layer.chunk == layer.x.shape[-1] and chunks >= 8 and layer.x.shape[0] >= 2
    whole, end = run(layer, layer.x)
    assert whole.shape[-1] == chunks * layer.chunk_out, "a chunk in is a chunk out"
    assert bool(whole.isfinite().all()), "finite in, finite out"
    scale = max(1.0, float(whole.abs().max()))

    generator = torch.Generator().manual_seed(seed)
    for _ in range(4):
        sizes = random_sizes(chunks, generator)
        pieces, piece_end = run(layer, layer.x, sizes)
        assert float((pieces - whole).abs().max()) <= layer.tolerance * scale, (
            f"chunks of {sizes} differ from the whole"
        )
        for one, other in zip(tensors(end), tensors(piece_end), strict=True):
            assert float((one - other).abs().max()) <= 1e-4 * max(1.0, float(one.abs().max())), "end states differ"

    _assert_causal(layer, whole, chunks)
    assert measured_reach(layer, chunks) == layer.reach, "measured latency is not the declared one"

    rows = torch.cat([run(layer, layer.x[i : i + 1])[0] for i in range(layer.x.shape[0])])
    assert float((rows - whole).abs().max()) <= layer.tolerance * scale, "rows of a batch influence each other"

    first = layer.init_state(layer.x.shape[0])
    assert all(not tensor.any() for tensor in tensors(first)), "a state starts at zeros"
    before = [tensor.clone() for tensor in tensors(first)]
    with torch.no_grad():
        _, after = layer.step(layer.x[..., : layer.chunk], first)
    for tensor, copy, new in zip(tensors(first), before, tensors(after), strict=True):
        assert torch.equal(tensor, copy), "a step changed the state that it was given"
        assert tensor.shape == new.shape and tensor.dtype == new.dtype, "a state changed its shape or dtype"

    run(layer, torch.randn(layer.x.shape, generator=generator) * 10)
    again, _ = run(layer, layer.x)
    assert torch.equal(again, whole), "something was remembered outside the state"


def _assert_causal(layer: Streaming, whole: Tensor, chunks: int) -> None:
    for cut in (1, chunks // 2, chunks - 1):
        x = layer.x.clone()
        x[..., cut * layer.chunk :] = torch.nan
        out, _ = run(layer, x)
        past, expected = out[..., : cut * layer.chunk_out], whole[..., : cut * layer.chunk_out]
        assert torch.equal(past, expected), "the future reaches the past"


def measured_reach(layer: Streaming, chunks: int) -> int:
    """How many input samples an output sample waits for, by moving every sample of one chunk in turn."""
    moved = chunks // 2
    # Faint around a large move, so that rounding hides nothing.
    base = layer.x[:1] * 1e-3
    reference, _ = run(layer, base)
    latest = 0
    for place in range(moved * layer.chunk, (moved + 1) * layer.chunk):
        x = base.clone()
        x[..., place] += 0.9
        out, _ = run(layer, x)
        changed = (out != reference).flatten(0, -2).any(dim=0)
        assert bool(changed.any()), "an input sample changes nothing"
        first = int(changed.int().argmax())
        latest = max(latest, place - (first * layer.chunk // layer.chunk_out - layer.latency_samples))
    return latest + 1
