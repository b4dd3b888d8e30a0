"""A model file is trusted in nothing: whatever is wrong with it, one error names the file and the field."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realtime.bench import _field, _varint, matmul_model
from realtime.bundle import (
    DEFAULT_MODEL,
    LONG_MODEL,
    MANIFEST_KEY,
    MAX_FILE_BYTES,
    Bundle,
    BundleError,
    Golden,
    StyleError,
    _fields,
    named_model,
    read_bundle,
)
from realtime.stream import Stream

SHIPPED = DEFAULT_MODEL.read_bytes()


@pytest.fixture(scope="module")
def shipped() -> Bundle:
    return read_bundle(DEFAULT_MODEL)


def with_manifest(change: Callable[[dict[str, Any]], object], data: bytes = SHIPPED) -> bytes:
    """The shipped file, or ``data``, with its manifest changed."""
    out = b""
    for number, value in _fields(memoryview(data)):
        if number == 14 and isinstance(value, memoryview) and MANIFEST_KEY.encode() in bytes(value[:40]):
            text = next(bytes(v) for n, v in _fields(value) if n == 2 and isinstance(v, memoryview))
            manifest = json.loads(text)
            change(manifest)
            value = _field(1, MANIFEST_KEY.encode()) + _field(2, json.dumps(manifest).encode())
        out += _field(number, value if isinstance(value, int) else bytes(value))
    return out


def with_graph(
    *parts: bytes, change: Callable[[int, bytes], bytes] = lambda _, value: value, model: bytes = b""
) -> bytes:
    """The shipped file with fields added to its graph, those that are there changed, and fields added to the model."""
    out = b""
    for number, value in _fields(memoryview(SHIPPED)):
        if number == 7 and isinstance(value, memoryview):
            inside = [(n, v if isinstance(v, int) else change(n, bytes(v))) for n, v in _fields(value)]
            value = memoryview(b"".join([*(_field(n, v) for n, v in inside), *parts]))
        out += _field(number, value if isinstance(value, int) else bytes(value))
    return out + model


def refuse(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(BundleError) as error:
        read_bundle(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_the_shipped_model_is_what_it_says(shipped: Bundle) -> None:
    manifest = shipped.manifest
    assert manifest.kind == "transfer" and manifest.latency_samples == 128
    assert manifest.spectral.sample_rate == 48_000 and manifest.spectral.hop_samples == 128
    assert len(manifest.styles) >= 4 and len(shipped.graph) <= 8e6
    assert len({style.program for style in manifest.styles}) == len(manifest.styles)
    # What only the judges heard is named too.
    assert {source.style for source in manifest.card.sources} >= {*(style.id for style in manifest.styles), "tunes"}
    assert all(source.licence and source.attribution for source in manifest.card.sources)
    assert len(manifest.card.recordings_sha256) >= 100
    assert all(-45 < style.loudness_lufs < -5 for style in manifest.styles)


def test_the_shipped_model_tells_nothing_of_the_machine_that_made_it() -> None:
    for word in (b"site-packages", b"/home/", b"/root", b"/work", b'.py"'):
        assert word not in SHIPPED


def test_missing_and_odd_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"none\.onnx: file: there is no such file"):
        read_bundle(tmp_path / "none.onnx")
    with pytest.raises(BundleError, match="is not a regular file"):
        read_bundle(tmp_path)
    assert "is not a whole ONNX file: it has no graph" in refuse(tmp_path, b"")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(SHIPPED) - 1))
def test_a_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    refuse(tmp_path_factory.mktemp("cut"), SHIPPED[:size])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SHIPPED) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_file_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(SHIPPED)
    for place, value in changes:
        data[place] = value
    path = tmp_path_factory.mktemp("damaged") / "model.onnx"
    path.write_bytes(data)
    try:
        read_bundle(path)
    except BundleError as error:
        assert str(path) in str(error)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    refuse(tmp_path_factory.mktemp("random"), data)


def test_a_plain_onnx_file_is_refused_by_name(tmp_path: Path) -> None:
    assert "manifest: is missing: an ONNX file, but not made by 'restyle export'" in refuse(
        tmp_path, matmul_model(8, 8)
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(schema=2), "manifest.schema: is 2, this version reads 1 (update restyle)"),
        (lambda m: m.update(schema="1"), "manifest.schema: is '1'"),
        (lambda m: m.pop("schema"), "manifest.schema: is None"),
        (lambda m: m.update(kind="magic"), "manifest.kind: 'magic' is none of transfer"),
        (lambda m: m.update(extra=1), 'can not match "extra"'),
        (lambda m: m.pop("styles"), 'missing value for field "styles"'),
        (lambda m: m.update(styles=[]), "manifest.styles: 0 styles are outside"),
        (lambda m: m["styles"][2]["vector"].pop(), "manifest.styles[2]"),
        (lambda m: m["styles"][1].update(vector=[1e9] * 16), "manifest.styles[1] (strings).vector"),
        (lambda m: m["styles"][1].update(program=128), "program: 128 is outside 0..127"),
        (lambda m: m["styles"][1].update(id="violin"), "manifest.styles.id: appears twice"),
        (lambda m: m["styles"][0].update(loudness_lufs=99.0), "loudness_lufs: 99.0 is outside"),
        (lambda m: m.update(latency_samples=256), "manifest.latency_samples: is 256, hop and windows give 128"),
        (lambda m: m["spectral"].update(sample_rate=1), "manifest.spectral.sample_rate: 1 is outside"),
        (lambda m: m["spectral"].update(hop_samples=-1), "hop_samples: must be above zero"),
        (lambda m: m["states"].pop(), "is not in the manifest"),
        (lambda m: m["states"][0].update(shape=[15]), "the manifest says [15]"),
        (lambda m: m["states"][0].update(shape=[2**20, 2**20]), "is empty or too large"),
        (lambda m: m["parameters"][0].update(default=7.0), "parameters.dry_wet: has a default outside its range"),
        (lambda m: m["parameters"][0].update(default=math.nan), "parameters.dry_wet: has a default outside its range"),
        (lambda m: m["parameters"][0].update(maximum=1.5), "parameters.dry_wet: has a range 0..1.5 outside 0..1 ratio"),
        (lambda m: m["parameters"][0].update(minimum=2.0), "parameters.dry_wet: has a range 2..1"),
        (
            lambda m: m["parameters"][1].update(maximum=1e5),
            "input_gain_db: has a range -24..100000 outside -120..60 dB",
        ),
        (lambda m: m["parameters"][2].update(minimum=-math.inf), "output_gain_db: has a range -inf..12 outside"),
        (lambda m: m["golden"].update(audio="!!"), "manifest.golden.audio: cannot be decoded"),
        (lambda m: m["card"].update(steps="many"), 'wrong value type for field "card.steps"'),
    ],
)
def test_a_wrong_manifest_names_the_field(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], text: str
) -> None:
    assert text in refuse(tmp_path, with_manifest(change))


def test_a_manifest_that_is_not_json_is_refused(tmp_path: Path) -> None:
    model = matmul_model(8, 8)
    for text in (b"{", b"[" * 100_000, b"\xff\xfe", b"3", b'{"schema": 1, "schema": NaN}'):
        entry = _field(1, MANIFEST_KEY.encode()) + _field(2, text)
        refuse(tmp_path, model + _field(14, entry))


def _graph(*parts: bytes) -> bytes:
    return _field(1, 9) + _field(7, b"".join(parts)) + _field(8, _field(2, 18))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (_graph(_field(1, _field(4, b"Evil") + _field(7, b"com.evil"))), "custom operators of 'com.evil'"),
        (_graph(_field(5, _field(8, b"w") + _field(14, 1))), "keeps data in other files"),
        (
            _graph(_field(5, _field(13, _field(1, b"location") + _field(2, b"/etc/passwd")))),
            "keeps data in other files",
        ),
        (_graph(_field(1, _field(4, b"If") + _field(5, _field(6, b"")))), "subgraphs or functions"),
        (_graph() + _field(25, b""), "subgraphs or functions"),
        (_graph() + _field(7, b""), "several graphs"),
        (_graph(_field(15, b"")), "sparse tensors"),
        (_varint(7 << 3 | 2) + _varint(2**62), "cut short"),
        (b"\xff" * 12, "a number is too long"),
    ],
)
def test_hostile_graphs_are_refused_before_onnxruntime_sees_them(tmp_path: Path, data: bytes, text: str) -> None:
    assert text in refuse(tmp_path, data)


def _tensor(*dims: int, data: bytes = bytes(8)) -> bytes:
    return b"".join(_field(1, dim) for dim in dims) + _field(2, 1) + _field(8, b"evil") + _field(9, data)


def _node(kind: bytes, attribute: bytes, domain: bytes = b"") -> bytes:
    return _field(1, _field(4, kind) + _field(5, _field(1, b"value") + attribute) + _field(7, domain))


AWAY = _field(13, _field(1, b"location") + _field(2, b"/etc/passwd"))
BODY = _field(6, _field(1, _field(4, b"Identity")) + _field(2, b"body"))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (with_graph(_field(5, _tensor(2) + AWAY)), "graph initializer 'evil': keeps data in other files"),
        (
            with_graph(_node(b"Constant", _field(5, _tensor(2) + AWAY))),
            "graph node 'Constant', attribute 'value': keeps data in other files",
        ),
        (with_graph(_node(b"Constant", _field(22, _field(1, _tensor(2) + AWAY)))), "it has sparse tensors"),
        (with_graph(_field(5, _tensor(2**40))), "graph initializer 'evil': declares 1099511627776 numbers in 8 bytes"),
        (with_graph(_field(5, _tensor(2**20, 2**20, 2**20))), f"declares {2**60} numbers in 8 bytes"),
        (
            with_graph(_field(5, _field(1, _varint(2**20) + _varint(2**20)) + _tensor())),
            f"initializer 'evil': declares {2**40} numbers in 8 bytes",
        ),
        (with_graph(_field(5, _tensor(2**64 - 1))), f"declares {2**64 - 1} numbers"),  # minus one
        (with_graph(_field(5, _tensor(*[1] * 1000))), "initializer 'evil' has more than 32 dimensions"),
        (with_graph(_node(b"Loop", BODY)), "graph node 'Loop': has subgraphs or functions"),
        (with_graph(_node(b"Scan", BODY)), "graph node 'Scan': has subgraphs or functions"),
        (with_graph(model=_field(20, b"")), "graph of the model itself: has subgraphs or functions"),
        (
            with_graph(_node(b"Shell", b"", b"com.evil"), model=_field(8, _field(1, b"com.evil") + _field(2, 1))),
            "graph node 'Shell': uses custom operators of 'com.evil'",
        ),
    ],
)
def test_one_hostile_part_in_a_good_file_is_named(tmp_path: Path, data: bytes, text: str) -> None:
    assert text in refuse(tmp_path, data)


def test_a_file_above_the_limit_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "giant.onnx"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(BundleError, match=rf"giant\.onnx: file: {MAX_FILE_BYTES + 1} bytes are above the limit"):
        read_bundle(path)


def test_states_that_fill_the_memory_together_are_refused(tmp_path: Path) -> None:
    greedy = [{"name": f"s{i}", "shape": [2**12, 2**11]} for i in range(3)]
    text = refuse(tmp_path, with_manifest(lambda m: m.update(states=greedy)))
    assert "manifest.states.s2.shape: [4096, 2048] is empty or too large" in text


def test_states_that_the_graph_does_not_compute_are_refused_when_it_is_loaded(tmp_path: Path, shipped: Bundle) -> None:
    """Manifest, inputs and outputs agree on a shape, and the nodes between them do not."""
    state = shipped.manifest.states[0]
    right, wrong = state.shape[-1], state.shape[-1] + 2

    def widen(number: int, value: bytes) -> bytes:
        if number in (11, 12) and f".{state.name}".encode() in value:
            assert value.count(_field(1, right)) == 1
            # One byte for another: no length around it changes.
            return value.replace(_field(1, right), _field(1, wrong))
        return value

    changed = with_graph(change=widen)
    path = tmp_path / "wide.onnx"
    path.write_bytes(changed)
    with pytest.raises(BundleError, match=rf"has shape .*{wrong}.*, the manifest says .*{right}"):
        read_bundle(path)
    path.write_bytes(with_manifest(lambda m: m["states"][0].update(shape=[*state.shape[:-1], wrong]), changed))
    with pytest.raises(BundleError, match=r"wide\.onnx: graph: (onnxruntime refuses it|cannot be run): ") as error:
        Stream(read_bundle(path)).warm_up()
    assert state.name in str(error.value) or "dimension" in str(error.value).lower()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "secret.onnx"
    path.write_bytes(SHIPPED)
    path.chmod(0)
    with pytest.raises(BundleError, match="cannot be read"):
        read_bundle(path)


def test_a_style_that_is_not_there_names_the_near_ones(shipped: Bundle) -> None:
    assert shipped.manifest.style("Alto Saxophone").id == shipped.manifest.style("alto-sax").id == "alto_sax"
    with pytest.raises(StyleError, match="'violen' is not in model 'bank': did you mean violin"):
        shipped.manifest.style("violen")


@given(st.lists(st.floats(-1, 1, width=32, allow_subnormal=False), max_size=500))
def test_golden_samples_survive_packing(values: list[float]) -> None:
    samples = np.array(values, np.float32)
    np.testing.assert_array_equal(Golden.unpack(Golden.pack(samples)), samples)


def test_a_golden_vector_cannot_blow_up() -> None:
    bomb = Golden.pack(np.zeros(2**22, np.float32))
    assert len(bomb) < 50_000
    with pytest.raises(ValueError, match="too long"):
        Golden.unpack(bomb)


def test_shipped_models_go_by_name_and_files_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_model(None) == DEFAULT_MODEL == named_model(Path("bank"))
    assert named_model(Path("bank256")) == LONG_MODEL
    assert named_model(Path("mine.onnx")) == Path("mine.onnx")
    Path("bank256").touch()
    assert named_model(Path("bank256")) == Path("bank256")


def test_the_second_preset_has_the_styles_of_the_first_at_twice_the_latency() -> None:
    first, second = (read_bundle(path).manifest for path in (DEFAULT_MODEL, LONG_MODEL))
    assert [style.id for style in second.styles] == [style.id for style in first.styles]
    assert (first.latency_samples, second.latency_samples) == (128, 256)
