"""Any other streaming ONNX model, made to run beside ours: which input is audio, which pairs are states."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from realtime.bundle import Bundle, BundleError, ProviderError, read_bundle
from realtime.processes import start_process
from realtime.show import percentiles_ms
from realtime.stream import Stream, device_memory, make_session

AUDIO_WORDS = ("audio", "wav", "signal", "sound", "noisy", "mix", "frame", "input", "output", "enh")
"""Parts of the names that audio usually has, the surest first."""
STATE_WORDS = ("state", "next", "hidden", "cache", "buf", "mem", "prev", "past", "present")


class CompareError(ValueError):
    """A model that cannot be run beside ours; the text names the file, what does not fit, and what would."""


@dataclass(frozen=True)
class CompareSettings:
    """The other file; ``hop_samples`` and ``sample_rate`` are what one step of it takes in, None to find out."""

    path: Path
    hop_samples: int | None = None
    sample_rate: int | None = None
    trial_s: float = 300.0  # loading and its first step may take so long, in a process of its own


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph; a dimension that is not fixed is None."""

    name: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Pairing:
    """How a graph streams: audio in and out, and the states as (input, output)."""

    audio_in: Tensor
    audio_out: Tensor
    states: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class OtherModel:
    """Another model at its own pace: each ``step`` takes ``hop_samples`` further, with its states carried over."""

    path: Path
    hop_samples: int
    sample_rate: int
    states: tuple[tuple[str, str], ...]
    step: Callable[[], object]

    def figures(
        self, step_ms: NDArray[np.float64], our_step_ms: NDArray[np.float64], our_hop_ms: float
    ) -> dict[str, Any]:
        """Ours beside theirs, in ms of computing per second of audio, since hops may differ; the ratios are ours to
        theirs, below 1 where ours is faster."""
        theirs = {name: value * self.sample_rate / self.hop_samples for name, value in percentiles_ms(step_ms).items()}
        ours = {name: value * 1e3 / our_hop_ms for name, value in percentiles_ms(our_step_ms).items()}
        return {
            "file": self.path.name,
            "hop_samples": self.hop_samples,
            "sample_rate": self.sample_rate,
            "states": [list(pair) for pair in self.states],
            "step_ms": percentiles_ms(step_ms),
            "ms_per_second": {name: round(value, 3) for name, value in theirs.items()},
            "our_ms_per_second": {name: round(value, 3) for name, value in ours.items()},
            "ratio": {name: round(ours[name] / theirs[name], 4) for name in theirs},
        }


def other_model(settings: CompareSettings, provider: str, sample_rate: int, hop_samples: int) -> OtherModel:
    """The model ready to run; ``sample_rate`` and ``hop_samples`` are ours, taken where its own cannot be found out.

    Raises CompareError, ProviderError.
    """
    if not settings.path.is_file():
        raise CompareError(f"{settings.path}: there is no such file; check the path")
    try:
        bundle = read_bundle(settings.path)
    except BundleError:
        _try_apart(settings, provider, sample_rate, hop_samples)
        return _foreign(settings, provider, sample_rate, hop_samples)
    return _ours(settings, bundle, provider)


def _try_apart(settings: CompareSettings, provider: str, sample_rate: int, hop_samples: int) -> None:
    """Its first step in a process that may hang, crash or run out of memory in our place. Raises as `other_model`."""
    arguments = (settings, provider, sample_rate, hop_samples)
    process, pipe = start_process(multiprocessing.get_context("spawn"), _first_step, arguments, "restyle-compare")
    try:
        pipe.recv()  # imported: from here on it is the model that takes time
        if not pipe.poll(settings.trial_s):
            raise CompareError(
                f"{settings.path}: was not loaded and through its first step within {settings.trial_s:g} s; "
                "a graph that loops cannot be compared"
            )
        error = pipe.recv()
    except (EOFError, OSError):
        process.join()
        raise CompareError(
            f"{settings.path}: ended the process that tried it with exit code {process.exitcode}; it cannot be compared"
        ) from None
    finally:
        process.kill()
        process.join()
        pipe.close()
    if error is not None:
        raise error


def _first_step(settings: CompareSettings, provider: str, sample_rate: int, hop_samples: int, pipe: Connection) -> None:
    """What the process of `_try_apart` does: None into the pipe, or the error."""
    if provider == "cpu" and hasattr(os, "sysconf"):  # a GPU's driver maps far more than it uses
        import resource

        most, hard = (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2,
            resource.getrlimit(resource.RLIMIT_DATA)[1],
        )
        resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    pipe.send("imported")
    try:
        _foreign(settings, provider, sample_rate, hop_samples).step()
    except (CompareError, ProviderError) as error:
        pipe.send(error)
    except Exception as error:
        pipe.send(CompareError(f"{settings.path}: cannot be run ({_first_line(error)})"))
    else:
        pipe.send(None)


def _ours(settings: CompareSettings, bundle: Bundle, provider: str) -> OtherModel:
    stream = Stream(bundle, provider=provider)
    stream.warm_up()
    stream.audio[:] = _noise(stream.audio.shape)
    stream.style[:] = np.array(bundle.manifest.styles[0].vector, np.float32)
    states = tuple((f"state.{state.name}", f"next.{state.name}") for state in bundle.manifest.states)
    spec = bundle.manifest.spectral
    return OtherModel(settings.path, spec.hop_samples, spec.sample_rate, states, stream.step)


def _foreign(settings: CompareSettings, provider: str, sample_rate: int, hop_samples: int) -> OtherModel:
    path = settings.path
    try:
        session = make_session(path.read_bytes(), provider)
    except ProviderError:
        raise
    except Exception as error:
        raise CompareError(f"{path}: onnxruntime refuses it: {_first_line(error)}") from None
    for node in (*session.get_inputs(), *session.get_outputs()):
        if node.type != "tensor(float)":
            raise CompareError(f"{path}: '{node.name}' is {node.type}; only float32 audio and states can be compared")
    inputs, outputs = ([_tensor(node) for node in nodes] for nodes in (session.get_inputs(), session.get_outputs()))
    try:
        pairing = pair_states(inputs, outputs)
    except CompareError as error:
        raise CompareError(f"{path}: {error}") from None
    chunk = settings.hop_samples or hop_samples
    shape = audio_shape(pairing.audio_in.shape, chunk)
    if settings.hop_samples is None and pairing.audio_in.shape and pairing.audio_in.shape[-1] is not None:
        chunk = shape[-1]
    arrays = {pairing.audio_in.name: _noise(shape)}
    arrays |= {one.name: np.zeros([n or 1 for n in one.shape], np.float32) for one, _ in pairing.states}
    try:
        results = dict(zip([one.name for one in outputs], map(np.asarray, session.run(None, arrays)), strict=True))
    except Exception as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise CompareError(
            f"{path}: cannot be run on {shapes}; --compare-hop sets the samples of one step ({_first_line(error)})"
        ) from None
    for one, other in pairing.states:
        before, after = arrays[one.name].shape, results[other.name].shape
        if before != after:
            raise CompareError(
                f"{path}: state '{one.name}' goes in as {list(before)} and '{other.name}' comes out as {list(after)}, "
                "so they are no pair"
            )
    try:
        rate = settings.sample_rate or int(session.get_modelmeta().custom_metadata_map.get("sample_rate", sample_rate))
    except ValueError:
        rate = sample_rate
    names = tuple((one.name, other.name) for one, other in pairing.states)
    step = _stepper(session, pairing, arrays, results[pairing.audio_out.name].shape, provider)
    return OtherModel(path, chunk, rate, names, step)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _noise(shape: Sequence[int]) -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32) * np.float32(0.1)


def _tensor(node: Any) -> Tensor:
    return Tensor(node.name, tuple(n if isinstance(n, int) and n > 0 else None for n in node.shape))


def audio_shape(shape: tuple[int | None, ...], chunk_samples: int) -> tuple[int, ...]:
    """A shape without gaps: the last open dimension is time and gets the chunk, the others are 1."""
    open_axes = [axis for axis, size in enumerate(shape) if size is None]
    time_axis = open_axes[-1] if len(open_axes) == len(shape) or shape[-1] is None else None
    return tuple(
        size if size is not None else chunk_samples if axis == time_axis else 1 for axis, size in enumerate(shape)
    )


def _successors(name: str) -> list[str]:
    """The names that the output of the state ``name`` may have, by the usual conventions."""
    names = [f"{name}_out", f"{name}_next", f"{name}_new", f"next_{name}", f"new_{name}", f"out_{name}", f"{name}n"]
    for old, new in (("state.", "next."), ("_in", "_out"), ("in_", "out_"), ("_prev", "_next"), ("past", "present")):
        if old in name:
            names.insert(0, name.replace(old, new))
    return names


def _audio_rank(tensor: Tensor) -> int:
    """How sure it is that a tensor is audio, 0 the surest."""
    name = tensor.name.casefold()
    if any(word in name for word in STATE_WORDS):
        return len(AUDIO_WORDS) + 1
    return next((rank for rank, word in enumerate(AUDIO_WORDS) if word in name), len(AUDIO_WORDS))


def pair_states(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Pairing:
    """Audio and states of a graph, by their names, else by shape and order; CompareError says what is left over.

    ``audio`` -> ``audio_out`` looks like a state, too: of all that could be audio, what is called like it most, is.
    """
    free_in, free_out = list(inputs), list(outputs)
    if len(free_in) != len(free_out):
        raise CompareError(
            f"{len(free_in)} inputs ({_names(free_in)}) and {len(free_out)} outputs ({_names(free_out)}): "
            "audio and every state must go in and come out"
        )
    if not free_in:
        raise CompareError("it has neither inputs nor outputs")
    pairs: list[tuple[Tensor, Tensor]] = []
    by_name = {tensor.name: tensor for tensor in free_out}
    for one in inputs:
        for name in _successors(one.name):
            other = by_name.get(name)
            if other in free_out and other is not None:
                pairs.append((one, other))
                free_in.remove(one)
                free_out.remove(other)
                break
    candidates = list(pairs)
    if free_in:
        # min takes the first of equals, and audio usually comes first.
        candidates.insert(0, (min(free_in, key=_audio_rank), min(free_out, key=_audio_rank)))
    audio_in, audio_out = min(candidates, key=lambda pair: _audio_rank(pair[0]))
    if (audio_in, audio_out) in pairs:
        pairs.remove((audio_in, audio_out))
    else:
        free_in.remove(audio_in)
        free_out.remove(audio_out)
    for one in free_in:
        same = [other for other in free_out if other.shape == one.shape]
        if not same:
            raise CompareError(
                f"input '{one.name}' {_shape(one)} has no output of its name or shape; audio would be "
                f"'{audio_in.name}' -> '{audio_out.name}', and there remain {_names(free_out) or 'none'}; "
                "states are found as state.X -> next.X, X_in -> X_out, X -> X_out, or by shape in order"
            )
        pairs.append((one, same[0]))
        free_out.remove(same[0])
    return Pairing(audio_in, audio_out, tuple(pairs))


def _names(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{tensor.name} {_shape(tensor)}" for tensor in tensors)


def _shape(tensor: Tensor) -> list[int | str]:
    return ["?" if size is None else size for size in tensor.shape]


def _stepper(
    session: ort.InferenceSession,
    pairing: Pairing,
    arrays: dict[str, NDArray[np.float32]],
    out_shape: Sequence[int],
    provider: str,
) -> Callable[[], object]:
    """One step, bound as ours is: audio crosses to the device and back, states stay there in two sets of buffers."""
    device = device_memory(provider)

    def value(array: NDArray[np.float32], where: str = device) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(array, where, 0)

    audio_name = pairing.audio_in.name
    audio, out = value(arrays[audio_name]), value(np.zeros(out_shape, np.float32), "cpu")
    sets = [[value(arrays[one.name].copy()) for one, _ in pairing.states] for _ in range(2)]
    bindings = []
    for source, target in (sets, sets[::-1]):
        binding = session.io_binding()
        binding.bind_ortvalue_input(audio_name, audio)
        binding.bind_ortvalue_output(pairing.audio_out.name, out)
        for (one, other), before, after in zip(pairing.states, source, target, strict=True):
            binding.bind_ortvalue_input(one.name, before)
            binding.bind_ortvalue_output(other.name, after)
        bindings.append(binding)

    def step() -> ort.OrtValue:
        if device != "cpu":
            audio.update_inplace(arrays[audio_name])
        session.run_with_iobinding(bindings[0])
        bindings.reverse()
        return out

    return step
