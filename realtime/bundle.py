"""The model file: one ``.onnx`` whose metadata carries a JSON manifest. Reading it trusts nothing.

Before onnxruntime sees a byte, the file's protocol-buffer structure is walked here: sizes, operator domains, external
data, subgraphs, and the inputs and outputs against the manifest. Field numbers follow ``onnx/onnx.proto``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path

import dacite
import numpy as np
from numpy.typing import NDArray

from realtime.notes import Vocabulary
from realtime.spectral import SpectralSpec

SCHEMA_VERSION = 1
MANIFEST_KEY = "restyle.manifest"
ENCODER_KEY = "restyle.encoder"
"""Metadata: the style encoder's own ONNX file in base64, if the model has one."""
CRITIC_KEY = "restyle.critic"
"""Metadata: the same of the critic that rates what the model made by noise."""
WEIGHTS_KEY = "restyle.weights"
"""Metadata: what a training run can begin with, in base64."""
KINDS = ("transfer", "generate", "recognise", "notes")
MAX_FILE_BYTES = 512 * 2**20
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_STYLES = 4096
MAX_NAME = 200
MAX_STATE_NUMBERS = 2**24
"""Of all states of one channel together."""
MAX_RANK = 32
MAX_CODE = 1024
"""Numbers in the code of one hop."""
PARAMETER_LIMITS = {"dB": (-120.0, 60.0), "ratio": (0.0, 1.0)}
"""The widest range that a manifest may give to a parameter, by unit."""
MODELS_DIR = Path(__file__).parent / "models"
DEFAULT_MODEL = MODELS_DIR / "bank.onnx"
LONG_MODEL = MODELS_DIR / "bank256.onnx"
"""The second preset: zero-phase filters, twice the latency."""
FIRST_MODEL = MODELS_DIR / "first.onnx"
"""What later models are compared with."""
COMPOSER_MODEL = MODELS_DIR / "composer.onnx"
DEFAULT_RECOGNISER = MODELS_DIR / "recogniser.onnx"
DEMO_CLIP = Path(__file__).parent / "demo" / "guitar.flac"
BOWED_CLIP = Path(__file__).parent / "demo" / "violin.flac"
DEMO_MIDI = Path(__file__).parent / "demo" / "switches.mid"


class BundleError(ValueError):
    """A model file that cannot be used; the text names the file, the field and the remedy."""

    def __init__(self, path: Path | str, field_name: str, problem: str, remedy: str = "") -> None:
        self.path, self.field_name = Path(path), field_name
        super().__init__(f"{path}: {field_name}: {problem}" + (f" ({remedy})" if remedy else ""))


class ProviderError(RuntimeError):
    """A provider that was asked for and does not run; the text says why and what to do."""


def named_model(path: Path | None) -> Path:
    """A model file as a command names it: its path, or the bare name of a shipped one; None is the default model."""
    if path is None:
        return DEFAULT_MODEL
    shipped = MODELS_DIR / f"{path}.onnx"
    return shipped if path == Path(path.name) and not path.exists() and shipped.exists() else path


class StyleError(ValueError):
    """A style that is not in the model file; the text names the near matches."""


@dataclass(frozen=True)
class StateSpec:
    """One named pair ``state.<name>`` -> ``next.<name>``; ``shape`` is without the leading channels axis."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Style:
    """One style: a stable id, its vector, its loudness on the reference playing, and the MIDI program for it."""

    id: str
    label: str
    vector: tuple[float, ...]
    loudness_lufs: float
    program: int

    @property
    def names(self) -> tuple[str, str]:
        """What a performer may call it, in small letters and underscores."""
        return self.id.casefold(), self.label.casefold().replace(" ", "_").replace("-", "_")


@dataclass(frozen=True)
class Parameter:
    """A control of the engine with its range, default and unit."""

    id: str
    label: str
    minimum: float
    maximum: float
    default: float
    unit: str


@dataclass(frozen=True)
class Source:
    """Where training recordings of one style came from, as their licence asks it to be said."""

    style: str
    licence: str
    attribution: str
    recordings: int
    minutes: float


@dataclass(frozen=True)
class Card:
    """The model card: what it was made of, how, and how good it is. ``recordings_sha256`` are those of training."""

    description: str
    objective: str
    commit: str
    date: str
    steps: int
    training_minutes: float
    sources: tuple[Source, ...]
    metrics: dict[str, float]
    recordings_sha256: tuple[str, ...]


@dataclass(frozen=True)
class Golden:
    """A short input and the output that every machine must compute from it, with the style at rest; mono.

    A recogniser's output are its probabilities [hops, styles], one after the other.
    """

    style: str
    audio: str
    audio_out: str

    @staticmethod
    def pack(samples: NDArray[np.float32]) -> str:
        return base64.b64encode(zlib.compress(samples.astype("<f4").tobytes(), 9)).decode()

    @staticmethod
    def unpack(text: str, limit_samples: int = 2**20) -> NDArray[np.float32]:
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(text, validate=True), 4 * limit_samples)
        if inflate.unconsumed_tail or not inflate.eof or len(data) % 4:
            raise ValueError("damaged or too long")
        return np.frombuffer(data, dtype="<f4").astype(np.float32)


@dataclass(frozen=True)
class Manifest:
    """All that the engine, the CLI and a listener need to know about a model, apart from its graph."""

    schema: int
    kind: str
    name: str
    spectral: SpectralSpec
    latency_samples: int
    stream_delay_samples: int
    style_dim: int
    states: tuple[StateSpec, ...]
    styles: tuple[Style, ...]
    parameters: tuple[Parameter, ...]
    card: Card
    golden: Golden
    weight_count: int = field(default=0)
    blend_losses_lu: tuple[tuple[float, ...], ...] = ()
    """By how much the even blend of two styles is quieter than both in the mean [styles, styles]; may be missing."""
    vocabulary: Vocabulary | None = None
    """The events of a model of kind ``notes``, which has no styles; its golden vector holds tokens and logits."""
    code_levels: tuple[int, ...] = ()
    """Of an autoencoder: how many levels each number of its code has, which passes once per hop; else missing."""
    noise_dims: int = 0
    """So many numbers at the end of a style vector are noise, zero in the styles as they stand in the file."""

    @property
    def code_numbers_per_second(self) -> float:
        """Numbers of the code in a second of sound; zero without a code."""
        return len(self.code_levels) * self.spectral.sample_rate / self.spectral.hop_samples

    @property
    def code_bits_per_second(self) -> float:
        """Bits of the code in a second of sound, each number in as many as its levels need; zero without a code."""
        bits = sum(math.log2(levels) for levels in self.code_levels)
        return bits * self.spectral.sample_rate / self.spectral.hop_samples

    def style(self, style_id: str) -> Style:
        """The style with this id (or label, ignoring case); StyleError with near matches if there is none."""
        wanted = style_id.strip().casefold().replace(" ", "_").replace("-", "_")
        for style in self.styles:
            if wanted in style.names:
                return style
        ids = [style.id for style in self.styles]
        near = get_close_matches(wanted, ids, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise StyleError(f"style '{style_id}' is not in model '{self.name}': {hint}it has {', '.join(ids)}")

    @property
    def fingerprint(self) -> str:
        """The same for copies of one export; style vectors of another fingerprint mean nothing here."""
        return hashlib.sha256((self.golden.audio + self.golden.audio_out).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class Bundle:
    """A checked model file: its manifest and the very bytes that were checked."""

    path: Path
    manifest: Manifest
    graph: bytes
    encoder: bytes = b""
    """As it stands in the file, unchecked; ``read_encoder`` reads it."""
    critic: bytes = b""
    """Likewise; ``read_critic`` reads it."""
    weights: bytes = b""
    """Likewise, for training alone."""

    @property
    def title(self) -> str:
        """What plays, for people."""
        return self.manifest.name

    @property
    def members(self) -> tuple[Bundle, ...]:
        """The model files in it, each on its own."""
        return (self,)

    @property
    def level_in_style(self) -> bool:
        """Whether the last number of a style vector is the amplitude factor of that style, applied by the stream."""
        return False


def read_bundle(path: Path | str) -> Bundle:
    """Read and check a model file, from disk, in any thread; BundleError names what is wrong and what to do."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise BundleError(path, "file", "is not a regular file", "give the path of a .onnx model file")
        if size > MAX_FILE_BYTES:
            raise BundleError(path, "file", f"{size} bytes are above the limit of {MAX_FILE_BYTES}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise BundleError(
            path, "file", "there is no such file", "check the path; 'restyle info' shows the shipped model"
        ) from None
    except OSError as error:
        raise BundleError(path, "file", f"cannot be read: {error.strerror}") from None
    try:
        outline = _read_outline(memoryview(data))
    except _WireError as error:
        raise BundleError(path, "file", f"is not a whole ONNX file: {error}", "copy or export it again") from None
    _check_outline(path, outline)
    text = outline.metadata.get(MANIFEST_KEY)
    if text is None:
        raise BundleError(path, "manifest", "is missing: an ONNX file, but not made by 'restyle export'")
    manifest = _read_manifest(path, text)
    _check_manifest(path, manifest)
    _check_tensors(path, outline, manifest)
    beside = (outline.metadata.get(key, b"") for key in (ENCODER_KEY, CRITIC_KEY, WEIGHTS_KEY))
    return Bundle(path, manifest, data, *beside)


def check_kind(bundle: Bundle, kind: str, why_not: str, remedy: str = "") -> None:
    """BundleError where a model is not of the kind that is needed; ``why_not``: what one of its kind does not do."""
    found = bundle.manifest.kind
    if found != kind:
        remedy = remedy or f"give a model of kind '{kind}'; 'restyle info FILE' says which kind a file is"
        raise BundleError(bundle.path, "manifest.kind", f"'{found}' {why_not}", remedy)


def read_encoder(bundle: Bundle) -> bytes:
    """The checked ONNX file of the style encoder: ``audio [clips, samples]`` -> ``vector [clips, style_dim]``.

    Raises BundleError, also for a model without one.
    """
    if not bundle.encoder:
        raise BundleError(
            bundle.path,
            "encoder",
            "is missing: this model cannot learn styles",
            "train it with [encoder] in the recipe",
        )
    return _read_clip_graph(bundle.path, "encoder", bundle.encoder, "vector", bundle.manifest.style_dim)


def read_critic(bundle: Bundle) -> bytes:
    """The checked ONNX file of the critic: ``audio [clips, samples]`` -> ``ratings [clips, styles]``.

    Raises BundleError, also for a model without one.
    """
    if not bundle.critic:
        raise BundleError(
            bundle.path,
            "critic",
            "is missing: this model cannot rate what it makes",
            'train one with objective = "cycle" and cycle.noise_dims above 0 in the recipe',
        )
    return _read_clip_graph(bundle.path, "critic", bundle.critic, "ratings", len(bundle.manifest.styles))


def _read_clip_graph(path: Path, part: str, encoded: bytes, output: str, output_dim: int) -> bytes:
    """A checked graph that travels in the metadata: ``audio [clips, samples]`` -> ``output [clips, output_dim]``."""
    try:
        graph = base64.b64decode(encoded, validate=True)
        outline = _read_outline(memoryview(graph))
    except (ValueError, _WireError) as error:
        raise BundleError(path, part, f"is damaged: {error}", "copy or export the file again") from None
    _check_outline(path, outline)
    for side, found, wanted in (
        ("input", outline.inputs, ("audio", None)),
        ("output", outline.outputs, (output, output_dim)),
    ):
        name, size = wanted
        _, dims = found.get(name, (0, ()))
        sized = len(dims) == 2 and (dims[1] == size if size else 1_000 <= (dims[1] or 0) <= 2**20)
        if len(found) != 1 or not sized or found[name][0] != 1:
            raise BundleError(path, f"{part} {side} '{name}'", "is not as it should be", "export the model again")
    return graph


def _read_manifest(path: Path, text: bytes) -> Manifest:
    if len(text) > MAX_MANIFEST_BYTES:
        raise BundleError(path, "manifest", f"{len(text)} bytes are above the limit of {MAX_MANIFEST_BYTES}")
    try:
        data = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise BundleError(path, "manifest", "is not JSON", "copy or export the file again") from None
    if not isinstance(data, dict):
        raise BundleError(path, "manifest", "is not a JSON object", "export the file again")
    schema = data.get("schema")
    if schema != SCHEMA_VERSION:
        raise BundleError(
            path,
            "manifest.schema",
            f"is {schema!r}, this version reads {SCHEMA_VERSION}",
            "update restyle" if isinstance(schema, int) and schema > SCHEMA_VERSION else "export the model again",
        )
    try:
        return dacite.from_dict(Manifest, data, dacite.Config(strict=True, cast=[tuple]))
    except dacite.DaciteError as error:
        raise BundleError(path, "manifest", str(error), "export the model again") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise BundleError(path, "manifest", f"is malformed: {error}", "export the model again") from None


def _check_manifest(path: Path, manifest: Manifest) -> None:
    def need(condition: bool, field_name: str, problem: str) -> None:
        if not condition:
            raise BundleError(path, f"manifest.{field_name}", problem, "export the model again")

    spec = manifest.spectral
    need(manifest.kind in KINDS, "kind", f"'{manifest.kind}' is none of {', '.join(KINDS)}")
    need(8_000 <= spec.sample_rate <= 192_000, "spectral.sample_rate", f"{spec.sample_rate} is outside 8000..192000 Hz")
    need(spec.analysis_window_samples <= 65_536, "spectral.analysis_window_samples", "is above 65536")
    need(
        manifest.latency_samples == spec.latency_samples,
        "latency_samples",
        f"is {manifest.latency_samples}, hop and windows give {spec.latency_samples}",
    )
    need(
        manifest.stream_delay_samples == spec.stream_delay_samples,
        "stream_delay_samples",
        f"is {manifest.stream_delay_samples}, hop and windows give {spec.stream_delay_samples}",
    )
    notes = manifest.kind == "notes"
    need(
        notes == (manifest.vocabulary is not None), "vocabulary", "belongs to models of kind 'notes', and to them only"
    )
    low = 0 if notes else 1
    need(low <= manifest.style_dim <= 4096, "style_dim", f"{manifest.style_dim} is outside {low}..4096")
    need(
        low <= len(manifest.styles) <= MAX_STYLES,
        "styles",
        f"{len(manifest.styles)} styles are outside {low}..{MAX_STYLES}",
    )
    for names, field_name in (
        ([s.id for s in manifest.styles], "styles.id"),
        ([s.name for s in manifest.states], "states.name"),
        ([p.id for p in manifest.parameters], "parameters.id"),
    ):
        need(len(set(names)) == len(names), field_name, "appears twice")
        need(all(0 < len(name) <= MAX_NAME for name in names), field_name, f"is empty or above {MAX_NAME} characters")
    for i, style in enumerate(manifest.styles):
        wrong = style_problem(style, manifest.style_dim)
        if wrong:
            need(False, f"styles[{i}] ({style.id}).{wrong[0]}", wrong[1])
    need(
        0 <= manifest.noise_dims < max(1, manifest.style_dim),
        "noise_dims",
        f"{manifest.noise_dims} is outside 0..{manifest.style_dim - 1}, below style_dim",
    )
    need(manifest.noise_dims == 0 or manifest.kind == "transfer", "noise_dims", "belongs to models of kind 'transfer'")
    losses = manifest.blend_losses_lu
    need(
        not losses or (len(losses) == len(manifest.styles) and all(len(row) == len(losses) for row in losses)),
        "blend_losses_lu",
        f"has not one row and column for each of the {len(manifest.styles)} styles",
    )
    need(all(abs(v) < 100.0 for row in losses for v in row), "blend_losses_lu", "has a number that is no sane one")
    need(not manifest.code_levels or manifest.kind == "transfer", "code_levels", "belongs to models of kind 'transfer'")
    need(len(manifest.code_levels) <= MAX_CODE, "code_levels", f"has more than {MAX_CODE} numbers")
    need(
        all(2 <= levels <= 2**16 for levels in manifest.code_levels), "code_levels", f"has a number outside 2..{2**16}"
    )
    for parameter in manifest.parameters:
        here, (low, high) = f"parameters.{parameter.id}", PARAMETER_LIMITS.get(parameter.unit, (-1e6, 1e6))
        need(
            low <= parameter.minimum <= parameter.maximum <= high,
            here,
            f"has a range {parameter.minimum:g}..{parameter.maximum:g} outside {low:g}..{high:g} {parameter.unit}",
        )
        need(parameter.minimum <= parameter.default <= parameter.maximum, here, "has a default outside its range")
    numbers = 0
    for state in manifest.states:
        numbers += math.prod(state.shape)
        need(
            all(size > 0 for size in state.shape) and numbers <= MAX_STATE_NUMBERS,
            f"states.{state.name}.shape",
            f"{list(state.shape)} is empty or too large",
        )
    recognises = manifest.kind == "recognise"
    for name, unit in (
        ("audio", spec.hop_samples),
        ("audio_out", len(manifest.styles) if recognises else spec.hop_samples),
    ):
        try:
            samples = Golden.unpack(getattr(manifest.golden, name))
        except (ValueError, zlib.error):
            raise BundleError(path, f"manifest.golden.{name}", "cannot be decoded", "export the model again") from None
        need(
            len(samples) > 0 and (notes or len(samples) % unit == 0) and bool(np.isfinite(samples).all()),
            f"golden.{name}",
            "is not a whole number of hops of finite samples",
        )


def style_problem(style: Style, style_dim: int) -> tuple[str, str] | None:
    """(field, what is wrong with it) of a style that a model of this ``style_dim`` cannot use, None if it can."""
    for name in ("id", "label"):
        text = getattr(style, name)
        if not (0 < len(text) <= MAX_NAME and text.isprintable()):
            return name, f"is empty, above {MAX_NAME} characters or not printable"
    if len(style.vector) != style_dim:
        return "vector", f"has {len(style.vector)} numbers, style_dim is {style_dim}"
    if not all(abs(v) < 1e4 for v in style.vector):  # false for NaN and infinity too
        return "vector", "has a number that is no sane one"
    if not -100.0 <= style.loudness_lufs <= 20.0:
        return "loudness_lufs", f"{style.loudness_lufs} is outside -100..20"
    if not 0 <= style.program <= 127:
        return "program", f"{style.program} is outside 0..127"
    return None


def _check_outline(path: Path, outline: _Outline) -> None:
    if outline.external_data:
        raise BundleError(
            path,
            f"graph {outline.external_data[0]}",
            "keeps data in other files",
            "a model is one file; export it again",
        )
    if outline.short_tensors:
        where, numbers, size = outline.short_tensors[0]
        raise BundleError(
            path, f"graph {where}", f"declares {numbers} numbers in {size} bytes", "copy or export the file again"
        )
    for domain, node in outline.domains.items():
        if domain not in ("", "ai.onnx"):
            raise BundleError(path, node, f"uses custom operators of {domain!r}", "only standard ONNX is run")
    if outline.subgraphs:
        raise BundleError(
            path,
            f"graph {outline.subgraphs[0]}",
            "has subgraphs or functions, which a streaming model does not need",
            "a loop could run for ever; export the model again",
        )


def _check_tensors(path: Path, outline: _Outline, manifest: Manifest) -> None:
    """Every graph input and output against the manifest, before a buffer is made from either."""
    hop = manifest.spectral.hop_samples
    inputs: dict[str, tuple[int, ...]] = {"audio": ()}
    outputs: dict[str, tuple[int, ...]] = {}
    if manifest.vocabulary is not None:
        inputs, outputs = {"token": ()}, {"logits": (len(manifest.vocabulary.tokens),)}
    elif manifest.kind == "recognise":
        outputs |= {"probabilities": (len(manifest.styles),), "embedding": (manifest.style_dim,)}
    else:
        inputs["style"], outputs["audio_out"] = (manifest.style_dim,), ()
    for state in manifest.states:
        inputs[f"state.{state.name}"] = outputs[f"next.{state.name}"] = state.shape
    for side, expected, found in (("input", inputs, outline.inputs), ("output", outputs, outline.outputs)):
        for name in expected.keys() - found.keys():
            raise BundleError(path, f"graph {side} '{name}'", "is missing", "export the model again")
        for name in found.keys() - expected.keys():
            raise BundleError(path, f"graph {side} '{name}'", "is not in the manifest", "export the model again")
        for name, shape in expected.items():
            elem_type, dims = found[name]
            if elem_type != (7 if name == "token" else 1):
                raise BundleError(path, f"graph {side} '{name}'", f"is not {'int64' if name == 'token' else 'float32'}")
            rank = 2 if name in ("audio", "audio_out") else 1 + len(shape)
            if len(dims) != rank or dims[0] is not None:
                raise BundleError(
                    path, f"graph {side} '{name}'", f"has shape {list(dims)}, needs [channels, ...] of rank {rank}"
                )
            if shape and dims[1:] != shape:
                raise BundleError(
                    path, f"graph {side} '{name}'", f"has shape {list(dims[1:])}, the manifest says {list(shape)}"
                )
            if name == "audio" and dims[1] not in (None, hop):
                raise BundleError(
                    path, f"graph input '{name}'", f"takes {dims[1]} samples, not multiples of the hop of {hop}"
                )


@dataclass
class _Outline:
    """What the checks need of an ONNX file; what is amiss is listed by where it was found."""

    metadata: dict[str, bytes] = field(default_factory=dict)
    domains: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, tuple[int, tuple[int | None, ...]]] = field(default_factory=dict)
    outputs: dict[str, tuple[int, tuple[int | None, ...]]] = field(default_factory=dict)
    external_data: list[str] = field(default_factory=list)
    short_tensors: list[tuple[str, int, int]] = field(default_factory=list)
    """With the numbers that its shape declares, and the bytes that it has."""
    subgraphs: list[str] = field(default_factory=list)


_TENSOR_DATA = (4, 5, 6, 7, 9, 10, 11)
"""Fields of a tensor that hold its numbers."""


class _WireError(ValueError):
    pass


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _WireError("it ends in the middle of a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _WireError("a number is too long")


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of one protocol-buffer message; values are numbers or slices, never copies."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _WireError(f"unknown wire type {wire}")
        if number == 0 or at + size > len(data):
            raise _WireError("it is cut short")
        yield number, data[at : at + size]
        at += size


def _messages(data: memoryview, number: int) -> Iterator[memoryview]:
    for found, value in _fields(data):
        if found == number:
            if not isinstance(value, memoryview):
                raise _WireError(f"field {number} has the wrong type")
            yield value


def _text(data: memoryview, number: int) -> str:
    return next((bytes(v).decode("utf-8", "replace") for v in _messages(data, number)), "")


def _read_outline(data: memoryview) -> _Outline:
    outline = _Outline()
    graphs: list[memoryview] = []
    for number, value in _fields(data):
        if number in (7, 8, 14, 25) and not isinstance(value, memoryview):
            raise _WireError(f"field {number} has the wrong type")
        if number == 7:
            graphs.append(value)  # pyright: ignore[reportArgumentType]
        elif number == 8:
            outline.domains.setdefault(_text(value, 1), "opset_import")  # pyright: ignore[reportArgumentType]
        elif number == 14:
            outline.metadata[_text(value, 1)] = next((bytes(v) for v in _messages(value, 2)), b"")  # pyright: ignore[reportArgumentType]
        elif number in (20, 25):  # training graphs, functions
            outline.subgraphs.append("of the model itself")
    if len(graphs) != 1:
        raise _WireError("it has no graph" if not graphs else "it has several graphs")
    for number, value in _fields(graphs[0]):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            _read_node(value, outline)
        elif number == 5:
            _read_tensor(value, f"initializer '{_text(value, 8)}'", outline)
        elif number == 15:
            raise _WireError("it has sparse tensors")
        elif number in (11, 12):
            name, elem_type, dims = _read_value_info(value)
            (outline.inputs if number == 11 else outline.outputs)[name] = (elem_type, dims)
    return outline


def _read_node(node: memoryview, outline: _Outline) -> None:
    kind = _text(node, 4)
    outline.domains[_text(node, 7)] = f"graph node '{kind}'"
    for attribute in _messages(node, 5):
        for number, value in _fields(attribute):
            if number in (5, 10) and isinstance(value, memoryview):
                _read_tensor(value, f"node '{kind}', attribute '{_text(attribute, 1)}'", outline)
            elif number in (6, 11):
                outline.subgraphs.append(f"node '{kind}'")
            elif number in (22, 23):
                raise _WireError("it has sparse tensors")


def _read_tensor(tensor: memoryview, where: str, outline: _Outline) -> None:
    numbers, size, rank = 1, 0, 0
    for number, value in _fields(tensor):
        if number == 13 or (number == 14 and value != 0):
            outline.external_data.append(where)
        elif number == 1:  # one dimension, or a list of them
            for dim in _varints(value) if isinstance(value, memoryview) else (value,):
                numbers *= dim
                rank += 1
                if rank > MAX_RANK:
                    raise _WireError(f"{where} has more than {MAX_RANK} dimensions")
        elif number in _TENSOR_DATA:
            size += len(value) if isinstance(value, memoryview) else 1
    # Two to a byte is the densest that there is.
    if numbers > 2 * size:
        outline.short_tensors.append((where, numbers, size))


def _read_value_info(info: memoryview) -> tuple[str, int, tuple[int | None, ...]]:
    elem_type, dims = 0, []
    for kind in _messages(info, 2):
        for tensor in _messages(kind, 1):
            for number, value in _fields(tensor):
                if number == 1 and isinstance(value, int):
                    elem_type = value
                elif number == 2 and isinstance(value, memoryview):
                    for dim in _messages(value, 1):
                        sizes = [v for n, v in _fields(dim) if n == 1 and isinstance(v, int)]
                        dims.append(sizes[0] if sizes else None)
    return _text(info, 1), elem_type, tuple(dims)


def blend_vectors(styles: Sequence[Style], weights: Sequence[float]) -> NDArray[np.float32]:
    """Weighted mean [style_dim] of style vectors; weights need not add up to one."""
    total = float(sum(weights)) or 1.0
    vectors = np.array([style.vector for style in styles], dtype=np.float64)
    return (np.asarray(weights, dtype=np.float64) / total @ vectors).astype(np.float32)
