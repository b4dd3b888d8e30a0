"""torch and onnxruntime, sample by sample: the file is only written when they are the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from realtime.bundle import Bundle, read_bundle
from realtime.candidates import Critic
from realtime.learned import cut_windows, hear_windows
from realtime.stream import Stream

TOLERANCE = 1e-4
ENCODER_TOLERANCE = 1e-3  # of the size of a style vector
CRITIC_TOLERANCE = 1e-3  # of a rating; the critic learns to tell 0 from 1, or -1 from 1
MINIMUM_HOPS = 2_000
CUDA_OPERATORS = """
Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Clip Concat ConstantOfShape Conv
ConvTranspose Cos CumSum Div Elu Equal Erf Exp Expand Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm
GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual HardSigmoid Identity InstanceNormalization IsInf IsNaN
LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Min Mod Mul Neg Not OneHot
Or PRelu Pad Pow RNN Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Round ScatterElements ScatterND Selu Shape Sigmoid
Sign Sin Slice Softmax Softplus Softsign Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze
Where Xor
"""
CUDA_KERNELS = frozenset(CUDA_OPERATORS.split())
"""Operators that onnxruntime's CUDA provider computes in 32-bit floats (its docs/OperatorKernels.md, and the kernels in
libonnxruntime_providers_cuda.so of 1.31.1)."""


class VerifyError(RuntimeError):
    """The exported graph does not compute what the model computes; no file is written."""


@dataclass(frozen=True)
class Verification:
    """Largest difference in full scale over ``hops`` hops with the state carried, for each number of hops per step.

    ``without_cuda_kernel``: operators that a GPU leaves to the CPU, with two copies at every hop and no CUDA graph.
    """

    hops: int
    largest_difference: float
    by_hops_per_step: dict[int, float]
    without_cuda_kernel: tuple[str, ...]


def run_torch(model: nn.Module, audio: Tensor, style: Tensor, step_samples: int) -> Tensor:
    """The model over audio [channels, time] in steps, style [steps, channels, style_dim] -> [channels, time]."""
    state: Any = model.init_state(audio.shape[0])  # pyright: ignore[reportCallIssue]
    outs = []
    with torch.no_grad():
        for i, chunk in enumerate(audio.split(step_samples, dim=1)):
            out, state = model(chunk, style[i], state)
            outs.append(out)
    return torch.cat(outs, dim=1)


def verify(model: nn.Module, path: Path, audio: NDArray[np.float32], hops: int = MINIMUM_HOPS) -> Verification:
    """Compare the file at ``path`` with the model on real audio [samples], two channels, styles changing on the way.

    Raises VerifyError when the largest difference reaches TOLERANCE or a sample is not finite.
    """
    bundle = read_bundle(path)
    manifest = bundle.manifest
    hop = manifest.spectral.hop_samples
    vectors = np.array([style.vector for style in manifest.styles], dtype=np.float32)
    worst: dict[int, float] = {}
    for hops_per_step in (1, 3, 16):
        steps = -(-hops // hops_per_step)
        step_samples = hops_per_step * hop
        stereo = two_channels(audio, steps * step_samples)
        # A new pair of styles about every half second of audio.
        turn = np.arange(steps) * hops_per_step // 190
        styles = np.stack([vectors[turn % len(vectors)], vectors[(turn + 1) % len(vectors)]], axis=1)
        expected = run_torch(model, torch.from_numpy(stereo), torch.from_numpy(styles), step_samples).numpy()
        stream = Stream(bundle, channels=2, hops_per_step=hops_per_step)
        difference = 0.0
        for i in range(steps):
            at = slice(i * step_samples, (i + 1) * step_samples)
            stream.audio[:] = stereo[:, at]
            stream.style[:] = styles[i]
            difference = max(difference, float(np.abs(stream.step() - expected[:, at]).max()))
            if not np.isfinite(difference):
                raise VerifyError(f"output is not finite at hop {i * hops_per_step}; no file was written")
        worst[hops_per_step] = difference
    return accepted(bundle, hops, worst, "of full scale ")


def two_channels(audio: NDArray[np.float32], samples: int) -> NDArray[np.float32]:
    """audio [any] round and round -> [2, samples], two channels that differ, silent at their end."""
    mono = np.resize(audio, samples)
    mono[-len(mono) // 8 :] = 0.0  # what a graph makes of silence after playing is where it first breaks
    return np.stack([mono, 0.5 * np.roll(mono, 12_345)]).astype(np.float32)


def without_cuda_kernel(bundle: Bundle) -> tuple[str, ...]:
    """Operators in the graph of a model file that are not among CUDA_KERNELS."""
    return tuple(sorted({node.op_type for node in onnx.load_from_string(bundle.graph).graph.node} - CUDA_KERNELS))


def accepted(bundle: Bundle, hops: int, worst: dict[int, float], unit: str = "") -> Verification:
    """The result of differences by hops per step; VerifyError where the largest reaches TOLERANCE."""
    result = Verification(hops, max(worst.values()), worst, without_cuda_kernel(bundle))
    if result.largest_difference >= TOLERANCE:
        raise VerifyError(
            f"torch and onnxruntime differ by {result.largest_difference:.2e} {unit}over {hops} hops "
            f"(limit {TOLERANCE:.0e}); no file was written"
        )
    return result


def verify_encoder(encoder: nn.Module, path: Path, audio: NDArray[np.float32]) -> float:
    """Compare the style encoder in the file at ``path`` with ``encoder`` on real audio [samples]; the difference.

    Raises VerifyError when it reaches ENCODER_TOLERANCE.
    """
    windows, found = hear_windows(read_bundle(path), audio)
    with torch.no_grad():
        expected = encoder(torch.from_numpy(windows)).numpy()
    difference = float(np.abs(found - expected).max() / np.sqrt(np.square(expected).mean()))
    if not difference < ENCODER_TOLERANCE:
        raise VerifyError(
            f"the style encoder differs by {difference:.2e} between torch and onnxruntime "
            f"(limit {ENCODER_TOLERANCE:.0e}); no file was written"
        )
    return difference


def verify_critic(critic: nn.Module, path: Path, audio: NDArray[np.float32]) -> float:
    """Compare the critic in the file at ``path`` with ``critic`` on real audio [samples]; the largest difference.

    Raises VerifyError when it reaches CRITIC_TOLERANCE.
    """
    found = Critic(read_bundle(path))
    windows = cut_windows(audio, found.clip_samples)
    with torch.no_grad():
        expected = critic(torch.from_numpy(windows)).numpy()
    difference = float(np.abs(found.rate_clips(windows) - expected).max())
    if not difference < CRITIC_TOLERANCE:
        raise VerifyError(
            f"the critic differs by {difference:.2e} between torch and onnxruntime "
            f"(limit {CRITIC_TOLERANCE:.0e}); no file was written"
        )
    return difference
