"""One ONNX graph, its states on the device, one step at a time."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from realtime.bundle import Bundle, BundleError, ProviderError

logger = logging.getLogger(__name__)

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


def gpu_remedy(provider: str) -> str:
    """What to install where a GPU provider is missing: the packages that fit the onnxruntime that is here."""
    packages = "'onnxruntime-gpu[cuda,cudnn]'"
    if provider == "tensorrt":
        # onnxruntime is linked with TensorRT 10; its packages are named by the CUDA that they are for.
        cuda = str(getattr(ort, "cuda_version", "") or "13").partition(".")[0]
        packages += f" 'tensorrt-cu{cuda}<11'"
    try:
        distribution("onnxruntime")
        first = "pip uninstall --yes onnxruntime && "  # installed beside each other, each breaks the other
    except PackageNotFoundError:
        first = ""
    return f"install it with: {first}pip install {packages}; check the driver with nvidia-smi; or use --provider cpu"


DEVICE_MEMORY = {"cuda": "cuda", "tensorrt": "cuda"}
"""Where states and sound lie during a step, if not where numpy has them."""


def device_memory(provider: str) -> str:
    """The device, as onnxruntime calls it, in whose memory ``provider`` works."""
    return DEVICE_MEMORY.get(provider, "cpu")


CAPTURE_CHECK_STEPS = 8
CAPTURE_TOLERANCE = 1e-5


def make_session(
    graph: bytes,
    provider: str = "cpu",
    sizes: dict[str, int] | None = None,
    profile: Path | None = None,
    captured: bool = False,
) -> ort.InferenceSession:
    """A session that really runs on ``provider``, or ProviderError; one intra-op thread on the CPU.

    ``sizes`` fixes named dimensions, so that onnxruntime works out shapes once and not at every step. With ``profile``,
    the start of a file's name, it notes every kernel that runs; ``end_profiling`` writes it down. ``captured``, of CUDA
    alone: all kernels of a step become one CUDA graph, which the GPU starts at once; every address that is bound has to
    stay. A ProviderError, too, where a node has no kernel there.
    onnxruntime falls back to the CPU without an exception, so the session's own list is compared afterwards.
    """
    if provider not in PROVIDERS:
        raise ProviderError(f"provider '{provider}' is none of {', '.join(PROVIDERS)}")
    wanted = PROVIDERS[provider]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if provider == "cpu":
        return ort.InferenceSession(graph, options, providers=[wanted])
    remedy = gpu_remedy(provider)
    if wanted not in ort.get_available_providers():
        raise ProviderError(f"provider '{provider}' is not in this onnxruntime; {remedy}")
    chain: list[str | tuple[str, dict[str, str]]] = [wanted] if provider == "cuda" else [wanted, PROVIDERS["cuda"]]
    if captured:
        chain = [(wanted, {"enable_cuda_graph": "1"})]
    ort.set_default_logger_severity(4)  # what it logs of a missing library, the error below says with the remedy
    try:
        session = ort.InferenceSession(graph, options, providers=chain, enable_fallback=False)
    except Exception as error:
        why = " ".join(str(error).split())
        raise ProviderError(f"provider '{provider}' cannot run this model: {why}; {remedy}") from None
    if session.get_providers()[0] != wanted:
        raise ProviderError(f"provider '{provider}' was asked for, but onnxruntime fell back to the CPU; {remedy}")
    return session


class Stream:
    """A model in motion: ``step`` a fixed number of hops, ``reset`` to silence. Not for two threads at a time.

    ``channels`` rows run side by side, independent of each other. Audio crosses to the device once and comes back
    once; states stay there, in two sets of buffers that take turns. With CUDA, each turn is a CUDA graph where the
    model allows it and ``warm_up`` found that it makes the same sound.
    """

    def __init__(self, bundle: Bundle, channels: int = 1, hops_per_step: int = 1, provider: str = "cpu") -> None:
        if channels < 1 or hops_per_step < 1:
            raise ValueError(f"channels and hops_per_step: must be at least 1, got {channels} and {hops_per_step}")
        manifest = bundle.manifest
        if manifest.kind not in ("transfer", "generate"):
            raise BundleError(bundle.path, "manifest.kind", f"'{manifest.kind}' makes no sound")
        self.manifest, self.channels, self.provider = manifest, channels, provider
        self._path = bundle.path
        self.step_samples = hops_per_step * manifest.spectral.hop_samples
        self.delay_samples = manifest.stream_delay_samples
        self.session, self.captured = self._load(bundle.graph)
        self.audio: NDArray[np.float32] = np.zeros((channels, self.step_samples), np.float32)
        """Input of the next step [channels, step_samples]; write here."""
        self.style: NDArray[np.float32] = np.zeros((channels, manifest.style_dim), np.float32)
        """Style of the next step [channels, style_dim]; write here."""
        self.audio_out: NDArray[np.float32] = np.zeros((channels, self.step_samples), np.float32)
        """Output of the last step [channels, step_samples]."""
        self._on_device = provider in DEVICE_MEMORY
        device = device_memory(provider)
        shapes = {state.name: (channels, *state.shape) for state in manifest.states}
        self._zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        self._buffers = [
            {name: ort.OrtValue.ortvalue_from_numpy(zeros.copy(), device, 0) for name, zeros in self._zeros.items()}
            for _ in range(2)
        ]
        self._sound = {}
        if self._on_device:
            self._sound = {
                name: ort.OrtValue.ortvalue_from_numpy(array.copy(), device, 0)
                for name, array in (("audio", self.audio), ("style", self.style), ("audio_out", self.audio_out))
            }
            self._audio_out = ort.OrtValue.ortvalue_from_numpy(self.audio_out)
        # States are read from one set of buffers and written to the other, in turns.
        self._bindings = [self._bind(self._buffers[i], self._buffers[1 - i]) for i in range(2)]
        self._turn = 0
        # Each turn has a graph of its own; number 0 is onnxruntime's own.
        self._options = [_graph_options(turn + 1) for turn in range(2)] if self.captured else [None, None]

    def _load(self, graph: bytes) -> tuple[ort.InferenceSession, bool]:
        """The session, and whether its steps become CUDA graphs."""
        sizes = {"channels": self.channels, "samples": self.step_samples}
        if self.provider == "cuda":
            try:
                return make_session(graph, self.provider, sizes, captured=True), True
            except ProviderError as error:
                logger.info("without CUDA graphs: %s", error)
        try:
            return make_session(graph, self.provider, sizes), False
        except ProviderError:
            raise
        except Exception as error:
            raise BundleError(self._path, "graph", f"onnxruntime refuses it: {error}") from None

    def _bind(self, source: dict[str, ort.OrtValue], target: dict[str, ort.OrtValue]) -> ort.IOBinding:
        binding = self.session.io_binding()
        if self._on_device:
            binding.bind_ortvalue_input("audio", self._sound["audio"])
            binding.bind_ortvalue_input("style", self._sound["style"])
            binding.bind_ortvalue_output("audio_out", self._sound["audio_out"])
        else:
            for name, array in (("audio", self.audio), ("style", self.style)):
                binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
            out = self.audio_out
            binding.bind_output("audio_out", "cpu", 0, np.float32, out.shape, out.ctypes.data)
        for name in source:
            binding.bind_ortvalue_input(f"state.{name}", source[name])
            binding.bind_ortvalue_output(f"next.{name}", target[name])
        return binding

    def step(self) -> NDArray[np.float32]:
        """Run ``self.audio`` under ``self.style``; returns ``self.audio_out``, valid until the next step."""
        turn = self._turn
        self._turn = 1 - turn
        if not self._on_device:
            # Without run options: onnxruntime 1.31 looks for an entry in them, which costs 60 microseconds.
            self.session.run_with_iobinding(self._bindings[turn])
            return self.audio_out
        self._sound["audio"].update_inplace(self.audio)
        self._sound["style"].update_inplace(self.style)
        self.session.run_with_iobinding(self._bindings[turn], self._options[turn])
        self._audio_out.update_inplace(self._sound["audio_out"])
        return self.audio_out

    def play(self, audio: NDArray[np.float32]) -> NDArray[np.float32]:
        """All whole steps of audio [channels, samples], one after the other -> [channels, steps * step_samples]."""
        samples = self.step_samples
        out = np.empty((self.channels, audio.shape[1] // samples * samples), np.float32)
        for start in range(0, out.shape[1], samples):
            self.audio[:] = audio[:, start : start + samples]
            out[:, start : start + samples] = self.step()
        return out

    def reset(self) -> None:
        """Back to silence: every state to zeros."""
        for name, zeros in self._zeros.items():
            self._buffers[self._turn][name].update_inplace(zeros)
        self.audio_out[:] = 0.0

    def warm_up(self, steps: int = 20) -> None:
        """Run silence so that first-call work is done before the first note, then reset. Raises BundleError."""
        if self.captured:
            self._try_capture()
        self.audio[:] = 0.0
        try:
            for _ in range(steps):
                self.step()
        except Exception as error:
            raise BundleError(self._path, "graph", f"cannot be run: {error}", "export the model again") from None
        self.reset()

    def _try_capture(self) -> None:
        """Compare what the CUDA graphs make with what single kernels make; do without graphs where it differs."""
        shape = self.channels, CAPTURE_CHECK_STEPS * self.step_samples
        noise = 0.1 * np.random.default_rng(0).standard_normal(shape, np.float32)
        graphs, single = self._options, [_graph_options(-1)] * 2  # -1: this run is no graph
        try:
            replayed = self.play(noise)
            self.reset()
            self._options = single
            self.captured = np.allclose(replayed, self.play(noise), rtol=0.0, atol=CAPTURE_TOLERANCE)
            why = "make another sound here"
        except Exception as error:
            self.captured, why = False, f"cannot be made here ({error})"
        if self.captured:
            self._options = graphs
        else:
            self._options = single
            logger.warning("%s: CUDA graphs %s; its kernels run one by one", self._path, why)
        self.reset()


def _graph_options(number: int) -> ort.RunOptions:
    """Options of a run that is, or is to become, the CUDA graph of that number."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options
