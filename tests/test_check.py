"""The sound check: what is right passes, what is wrong is named with its remedy, and the exit code says which."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from realtime.bundle import DEFAULT_MODEL, Golden, read_bundle
from realtime.check import (
    GOLDEN_TOLERANCE,
    check_disk,
    check_golden,
    check_memory,
    check_rates,
    judge_hops,
    nodes_by_provider,
)
from realtime.engine import EngineMeters
from realtime.jack_server import JackServer
from realtime.live import Status, Summary
from realtime.stream import gpu_remedy
from tests.test_bundle import with_manifest

BUNDLE = read_bundle(DEFAULT_MODEL)
HOP = BUNDLE.manifest.spectral.hop_samples
HOP_MS = 1e3 * BUNDLE.manifest.spectral.hop_seconds


def check(*arguments: str, cwd: Path, code: int | None) -> subprocess.CompletedProcess[str]:
    """``code`` None: 0, or 1 if this machine, busy as it is, does not play in time."""
    command = [sys.executable, "-m", "realtime.cli", "check", "--seconds", "1", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=cwd)
    if code is None:
        failed = re.findall(r"^fail +(\w+)|\"id\": \"(\w+)\", \"verdict\": \"fail\"", result.stdout, re.MULTILINE)
        assert {"".join(found) for found in failed} <= {"hops"}, result.stdout
        code = int(bool(failed))
    assert result.returncode == code and "Traceback" not in result.stderr, (result.stdout, result.stderr)
    return result


def findings(result: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """By id, from --json."""
    assert result.stderr == ""
    return {finding["id"]: finding for finding in json.loads(result.stdout)["findings"]}


def test_help_has_an_example(tmp_path: Path) -> None:
    assert "Example: restyle check " in check("--help", cwd=tmp_path, code=0).stdout


def test_each_check_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "pads.toml").write_text("channel = 9\nfirst_note = 60\n[controllers]\ndry_wet = 20\n")
    result = check("--record", "take", "--map", "pads.toml", cwd=tmp_path, code=None)
    lines = result.stdout.splitlines()
    said = {line.split()[1]: line for line in lines}
    expected = ["model", "provider", "golden", "jack", "audio", "rate", "hops", "priority", "memory", "midi", "map"]
    assert list(said) == [*expected, "disk"] and len(lines) == len(said)
    assert result.stderr == "" and all(line.split()[0] in ("pass", "warn", "fail") for line in lines)
    assert said["audio"].startswith("warn") == ("'live' performs the bundled clip" in said["audio"])
    assert "nodes on CPUExecutionProvider" in said["provider"] and said["provider"].startswith("pass")
    assert "at most 0.0001 is allowed" in said["golden"]
    assert "channel 9, first style on note 60" in said["map"] and "CC 20 dry_wet" in said["map"]
    assert "minutes of recording fit into take" in said["disk"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pads.toml"]


def test_without_record_the_disk_is_that_of_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "output.wav").write_bytes(b"no recording goes over this")
    disk = findings(check("--json", cwd=tmp_path, code=None))["disk"]
    assert disk["verdict"] in ("pass", "warn") and disk["figures"]["minutes"] > 0.0
    assert "minutes of recording fit into the current folder" in disk["text"]


def test_what_the_machine_lacks_fails_with_the_remedy(tmp_path: Path) -> None:
    found = findings(check("--provider", "cuda", "--midi", "no such pad", "--json", cwd=tmp_path, code=1))
    assert found["provider"]["verdict"] == found["midi"]["verdict"] == "fail"
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in found["provider"]["text"]
    assert "no such pad" in found["midi"]["text"] and "--midi" in found["midi"]["remedy"]
    assert "hops" not in found and found["model"]["verdict"] == "pass"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "none.onnx"], "none.onnx: file: there is no such file"),
        (["--map", "wrong.toml"], "wrong.toml: chanel: is no key of a map; did you mean channel?"),
        (["--midi", "none.mid"], "none.mid: there is no such file"),
        (["--inference", "late"], "inference 'late' is none of worker, deferred, callback"),
    ],
)
def test_wrong_input_is_one_clear_error(tmp_path: Path, arguments: list[str], text: str) -> None:
    (tmp_path / "wrong.toml").write_text("chanel = 1\n")
    result = check(*arguments, cwd=tmp_path, code=1)
    assert result.stdout == "" and result.stderr.startswith("cannot check: ") and result.stderr.count("\n") == 1
    assert text in result.stderr


@pytest.mark.jack
def test_on_a_jack_server_it_plays_through_the_real_device(jack_server: JackServer, tmp_path: Path) -> None:
    found = findings(check("--json", cwd=tmp_path, code=None))
    assert found["jack"]["figures"] == {"running": True, "devices": 1, "sample_rate": 48_000.0}
    assert found["audio"]["verdict"] == found["rate"]["verdict"] == "pass"
    assert found["audio"]["figures"]["input"]["name"] == "system"
    hops = found["hops"]["figures"]
    assert hops["block_samples"] == jack_server.period_samples and hops["budget_ms"] == round(HOP_MS, 4)
    assert hops["hops"] >= 100 and 0.0 < hops["hop_ms"]["p50"] <= hops["hop_ms"]["p999"]
    assert found["midi"]["figures"]["ports"] == ["virtual port 'restyle-midi' (Jack)"]
    found = findings(check("--json", "--input", "no such box", cwd=tmp_path, code=1))
    assert found["audio"]["verdict"] == "fail" and "no such box" in found["audio"]["text"]
    assert "system (JACK" in found["audio"]["text"] and "hops" not in found


def test_every_node_that_runs_is_counted_by_provider() -> None:
    nodes = nodes_by_provider(BUNDLE, "cpu")
    assert list(nodes) == ["CPUExecutionProvider"] and len(nodes["CPUExecutionProvider"]) > 50
    assert {"GRU", "LSTM", "MatMul", "Gemm", "FusedMatMul", "FusedGemm"} & set(nodes["CPUExecutionProvider"])


def test_a_machine_that_computes_another_sound_fails(tmp_path: Path) -> None:
    assert check_golden(BUNDLE, "cpu").verdict == "pass"
    other = Golden.unpack(BUNDLE.manifest.golden.audio_out)
    other[1000] += 3 * GOLDEN_TOLERANCE
    path = tmp_path / "model.onnx"
    path.write_bytes(with_manifest(lambda m: m["golden"].update(audio_out=Golden.pack(other))))
    found = check_golden(read_bundle(path), "cpu")
    assert found.verdict == "fail" and "--provider cpu" in found.remedy
    assert found.figures["largest_difference"] == pytest.approx(3 * GOLDEN_TOLERANCE, rel=0.02)


def test_another_rate_says_what_resampling_adds() -> None:
    assert check_rates(BUNDLE, 48_000).verdict == "pass"
    found = check_rates(BUNDLE, 44_100)
    assert found.verdict == "warn" and "set the devices to 48000 Hz" in found.remedy
    assert found.figures["added_samples"] == pytest.approx(27.8, abs=0.5)


@pytest.mark.parametrize(
    ("p999", "block", "late", "dry", "verdict", "share"),
    [
        (1.0, 128, 0, 0, "pass", "38% of 2.67 ms"),
        (1.0, 64, 0, 0, "warn", "75% of 1.33 ms"),  # a hop must be ready within the block that fills it
        (1.0, 32, 0, 0, "fail", "150% of 0.67 ms"),
        (1.0, 4096, 0, 0, "pass", "38% of 2.67 ms"),
        (1.5, 128, 0, 0, "warn", "56% of 2.67 ms"),
        (1.0, 128, 1, 0, "warn", "1 late"),
        (0.28, 16, 0, 11_250, "fail", "11250 dry for want of time"),  # given up before they could be late
        (0.5, 128, 0, 11, "warn", "11 dry"),
        (2.8, 128, 9, 0, "fail", "105% of 2.67 ms"),
        (2.8, 4096, 9, 0, "fail", "105% of 2.67 ms"),
    ],
)
def test_the_time_for_a_hop_is_the_yardstick(
    p999: float, block: int, late: int, dry: int, verdict: str, share: str
) -> None:
    times = {"p50": 0.4, "p99": 0.9, "p999": p999, "max": p999}
    status = Status(
        seconds=30.0,
        mix={},
        values={},
        meters=EngineMeters(block=block, misses=late, late_hops=dry),
        hop_ms=times,
        hop_budget_ms=HOP_MS,
        recorded_seconds=None,
        recorder_problem="",
        dropped_frames=0,
    )
    found = judge_hops(Summary(status, ()), 11_250, 48_000, 30.0)
    assert found.verdict == verdict and share in found.text
    assert bool(found.remedy) == (verdict != "pass")
    # More time for a hop costs a hop; it helps where a block ends before the next hop is asked for.
    price = f"--inference deferred gives the graph the time of a whole hop, at one hop more of latency ({HOP} samples, "
    assert (price in found.remedy) == (verdict == "fail" and block <= HOP)
    assert "deferred" not in judge_hops(Summary(status, ()), 11_250, 48_000, 30.0, deferred=True).remedy
    assert judge_hops(Summary(status, ()), 0, 48_000, 30.0).verdict == "fail"


def test_free_disk_is_given_in_minutes_and_nothing_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "take"
    found = check_disk(folder, 2, 48_000)
    free = shutil.disk_usage(tmp_path).free
    per_minute = 60 * 48_000 * 2 * 4
    assert found.figures["minutes"] == pytest.approx(min(free / per_minute / 2, 2**32 / per_minute), rel=0.1)
    assert not folder.parent.exists()
    enough_for = free // (2 * 60 * 48_000 * 4)
    assert check_disk(folder, enough_for // 30, 48_000).verdict == "warn"
    assert check_disk(folder, enough_for * 2, 48_000).verdict == "fail"
    assert check_disk(None, enough_for * 2, 48_000).verdict == "warn"  # nobody has asked for a recording


def test_a_folder_that_cannot_be_recorded_into_fails(tmp_path: Path) -> None:
    (tmp_path / "output.wav").write_bytes(b"the best solo ever")
    found = check_disk(tmp_path, 1, 48_000)
    assert found.verdict == "fail" and "holds a recording already" in found.text
    found = check_disk(tmp_path / "output.wav" / "take", 1, 48_000)
    assert found.verdict == "fail" and "output.wav is not writable" in found.text


@pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
def test_a_user_without_rights_is_told_how_to_get_them() -> None:
    """As the user nobody where the tests run as root, in a process of its own.

    What is tried fits the limit; but memory is locked as a whole or not at all, so that any limit is too low.
    """
    code = (
        "import os, resource\n"
        "from realtime.check import check_memory, check_priority\n"
        "resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (2**20, 2**20))\n"
        "if os.geteuid() == 0: os.setresuid(65534, 65534, 65534)\n"
        "for f in (check_priority(), check_memory(2**16)): print(f.verdict, f.text, f.remedy, sep='|')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    priority, memory = result.stdout.splitlines()
    for line, problem in (
        (priority, "no real-time priority"),
        (memory, "'live' cannot lock its processes into memory (the limit is 1 MiB)"),
    ):
        assert line.startswith(f"warn|{problem}")
        assert "'@audio - rtprio 95' and '@audio - memlock unlimited'" in line and "/etc/security/limits.d/" in line


def test_memory_passes_where_a_performance_would_lock_it() -> None:
    """Locked in a process of its own; systems without such a lock have nothing to warn of."""
    code = "from realtime.privileges import lock_memory; print(lock_memory())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    locks = result.stdout.strip() == "True"
    assert check_memory().verdict == ("pass" if locks or sys.platform != "linux" else "warn")


def test_a_missing_provider_names_the_exact_packages() -> None:
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]';" in gpu_remedy("cuda")
    assert "'tensorrt-cu1" in gpu_remedy("tensorrt") and "--provider cpu" in gpu_remedy("tensorrt")
