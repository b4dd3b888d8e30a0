"""The sound check before doors: does this machine, with these devices, play this model in time and as it should?"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np

from realtime.bundle import DEMO_CLIP, DEMO_MIDI, Bundle, Golden, ProviderError, read_bundle
from realtime.ensemble import join
from realtime.live import LiveSettings, NoAudioDeviceError, Performance, PerformanceError, Summary
from realtime.midi import MidiError, MidiMap, read_midi_file
from realtime.midi_inputs import MidiInputs
from realtime.privileges import AUDIO_PRIORITY, may_lock_memory
from realtime.resample import plan_rates
from realtime.show import holds_recording
from realtime.stream import PROVIDERS, Stream, make_session

GOLDEN_TOLERANCE = 1e-4
"""Largest difference of a sample, of full scale: what 'export' allows between torch and onnxruntime."""
LATE_SHARE = 1e-3
"""Of all hops, how many may have no answer in time: what p99.9 leaves out."""
TIGHT_SHARE = 0.5
"""Share of the time for a hop from which on p99.9 is a warning."""
SHORT_RECORDING_MINUTES = 60.0
RECORDED_BYTES = 4
"""Of one sample of one channel of one file."""
LARGEST_WAV_BYTES = 2**32
LOCKED_BYTES = 256 * 2**20
"""About what the audio process has in memory."""
LIST_TIMEOUT_S = 20.0
QUIET_DB = -60.0
LIMITS = "put '@audio - rtprio 95' and '@audio - memlock unlimited' into /etc/security/limits.d/95-audio.conf"
JOIN = "join the group with 'sudo usermod -aG audio $USER', and log in again"

Verdict = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the sound check. ``figures`` are the numbers behind the text, plain values for JSON."""

    id: str
    verdict: Verdict
    text: str
    remedy: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def sound_check(settings: LiveSettings, seconds: float) -> Iterator[Finding]:
    """Findings one by one, as they are made; it takes ``seconds`` of playing and a few more.

    The playing is a performance as 'live' gives it, in processes of its own, at -60 dB and on the bundled MIDI file.
    Raises BundleError and MidiError for files that are wrong, before the first finding. What the machine lacks is a
    finding. For the main thread, like a performance.
    """
    bundle = join(read_bundle(settings.model), settings.parts)
    if _is_midi_file(settings.midi):
        read_midi_file(Path(settings.midi))
    yield check_model(bundle)
    runs = True
    for member in bundle.members:
        provided = check_provider(member, settings.provider)
        runs &= provided.verdict != "fail"
        findings = [provided] if provided.verdict == "fail" else [provided, check_golden(member, settings.provider)]
        for finding in findings:
            alone = len(bundle.members) == 1
            yield finding if alone else replace(finding, text=f"'{member.title}': {finding.text}")
    yield check_jack()
    if runs:
        yield from check_playing(settings, bundle, seconds)
    yield check_priority()
    yield check_memory()
    yield check_midi(settings)
    yield check_map(settings.midi_map)
    yield check_disk(settings.record, settings.channels, bundle.manifest.spectral.sample_rate)


def check_model(bundle: Bundle) -> Finding:
    """What will be played."""
    manifest = bundle.manifest
    milliseconds = 1e3 * manifest.latency_samples / manifest.spectral.sample_rate
    files = ", ".join(str(member.path) for member in bundle.members)
    return Finding(
        "model",
        "pass",
        f"'{bundle.title}' in {files}: {len(manifest.styles)} styles, "
        f"{manifest.spectral.sample_rate} Hz, {manifest.latency_samples} samples ({milliseconds:.2f} ms)",
        figures={"name": manifest.name, "path": str(bundle.path), "styles": [style.id for style in manifest.styles]},
    )


def check_provider(bundle: Bundle, provider: str) -> Finding:
    """Which provider runs each node, from onnxruntime's own record of the kernels that ran."""
    try:
        nodes = nodes_by_provider(bundle, provider)
    except ProviderError as error:
        return Finding("provider", "fail", str(error))
    except Exception as error:
        return Finding(
            "provider", "fail", f"the graph cannot be run: {' '.join(str(error).split())}", "export it again"
        )
    wanted = PROVIDERS[provider]
    counts = {name: len(kinds) for name, kinds in nodes.items()}
    copies = sum(kind.startswith("Memcpy") for kinds in nodes.values() for kind in kinds)
    figures = {"nodes": counts, "copies": copies}
    total = sum(counts.values())
    if set(counts) == {wanted} and not copies:
        return Finding("provider", "pass", f"all {total} nodes on {wanted}", figures=figures)
    spread = ", ".join(f"{count} on {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
    elsewhere = Counter(kind for name, kinds in nodes.items() if name != wanted for kind in kinds)
    kinds = ", ".join(f"{kind} x{count}" for kind, count in elsewhere.most_common(5)) or "none elsewhere"
    return Finding(
        "provider",
        "warn" if counts.get(wanted) else "fail",
        f"of {total} nodes {spread} ({kinds}); {copies} copies between devices",
        "compare with --provider cpu: crossing to the device and back inside a hop costs time",
        figures,
    )


def nodes_by_provider(bundle: Bundle, provider: str) -> dict[str, list[str]]:
    """Provider -> kind of each node that it ran in a hop, after optimisation.

    Raises ProviderError and onnxruntime's own errors.
    """
    manifest = bundle.manifest
    sizes = {"channels": 1, "samples": manifest.spectral.hop_samples}
    with tempfile.TemporaryDirectory() as folder:
        session = make_session(bundle.graph, provider, sizes, Path(folder) / "nodes")
        feeds = {f"state.{state.name}": np.zeros((1, *state.shape), np.float32) for state in manifest.states}
        feeds["audio"] = np.zeros((1, manifest.spectral.hop_samples), np.float32)
        feeds["style"] = np.zeros((1, manifest.style_dim), np.float32)
        for _ in range(2):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    ran = {
        event["name"]: (event["args"]["provider"], event["args"]["op_name"])
        for event in events
        if event.get("cat") == "Node" and event.get("args", {}).get("provider")
    }
    nodes: dict[str, list[str]] = {}
    for name, kind in ran.values():
        nodes.setdefault(name, []).append(kind)
    return nodes


def check_golden(bundle: Bundle, provider: str) -> Finding:
    """The sound that the model's maker heard, computed here, hop by hop as on stage."""
    golden, manifest = bundle.manifest.golden, bundle.manifest
    audio, expected = Golden.unpack(golden.audio), Golden.unpack(golden.audio_out)
    try:
        stream = Stream(bundle, provider=provider)
        stream.warm_up()  # which decides, as before a performance, whether hops are CUDA graphs
        stream.style[:] = np.array(manifest.style(golden.style).vector, np.float32)
        out = stream.play(audio[None])[0]
        difference = float(np.abs(out - expected).max()) if len(out) == len(expected) else float("inf")
    except Exception as error:
        return Finding(
            "golden", "fail", f"cannot be computed: {' '.join(str(error).split())}", "export the model again"
        )
    figures = {
        "largest_difference": difference,
        "tolerance": GOLDEN_TOLERANCE,
        "samples": len(audio),
        "cuda_graphs": stream.captured,
    }
    text = f"golden vector: largest difference {difference:.1e} of full scale, at most {GOLDEN_TOLERANCE:g} is allowed"
    text += "; hops are CUDA graphs" * stream.captured
    if difference <= GOLDEN_TOLERANCE:  # false for NaN too
        return Finding("golden", "pass", text, figures=figures)
    return Finding(
        "golden",
        "fail",
        text,
        "this machine computes another sound: try --provider cpu, or another onnxruntime",
        figures,
    )


def check_jack() -> Finding:
    """Is a JACK server running? PortAudio is asked in a process of its own: it hangs for ever if a server dies."""
    command = [sys.executable, "-m", "realtime.cli", "devices", "--json"]
    try:
        listing = json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIST_TIMEOUT_S).stdout
        )
    except subprocess.TimeoutExpired:
        text = f"the audio devices could not be listed within {LIST_TIMEOUT_S:g} s"
        return Finding("jack", "fail", text, "does a JACK server hang? end it and start it again")
    except (subprocess.CalledProcessError, ValueError) as error:
        return Finding("jack", "fail", f"the audio devices cannot be listed ({error})", "see 'restyle devices'")
    jack = [device for device in listing["audio"] if "JACK" in device["host_api"]]
    figures = {"running": bool(jack), "devices": len(listing["audio"])}
    if jack:
        rate = jack[0]["sample_rate"]
        return Finding("jack", "pass", f"a JACK server runs at {rate:g} Hz", figures=figures | {"sample_rate": rate})
    return Finding("jack", "pass", "no JACK server runs; other devices need none", figures=figures)


def check_playing(settings: LiveSettings, bundle: Bundle, seconds: float) -> Iterator[Finding]:
    """Audio devices, rates and the time per hop, from a performance of so many seconds."""
    try:
        ready, summary, hops = _play(settings, seconds)
        devices = f"input '{ready['input']['name']}', output '{ready['output']['name']}' ({ready['input']['host_api']})"
        yield Finding("audio", "pass", devices, figures={"input": ready["input"], "output": ready["output"]})
    except NoAudioDeviceError as error:
        yield Finding(
            "audio",
            "warn",
            f"{error}: 'live' performs the bundled clip, and so does this check",
            "plug in an interface or start a JACK server; 'restyle devices' lists what there is",
            {"input": None, "output": None},
        )
        ready, summary, hops = _play(replace(settings, clip=DEMO_CLIP, loop=True), seconds)
    except PerformanceError as error:
        yield Finding("audio", "fail", str(error), "'restyle devices' lists what there is")
        return
    own = bundle.manifest.spectral.sample_rate
    rate = int(ready.get("sample_rate", own))
    yield check_rates(bundle, None if "clip" in ready else rate)
    yield judge_hops(summary, hops, rate, seconds, settings.inference == "deferred")


def _play(settings: LiveSettings, seconds: float) -> tuple[dict[str, Any], Summary, int]:
    """A performance: what the audio process said of its devices, how it ended, and how many hops were timed."""
    quiet = replace(settings, midi=str(DEMO_MIDI), midi_map=MidiMap(), record=None)
    performance = Performance(quiet)
    performance.performer.set("output_gain_db", QUIET_DB)  # a check must neither howl nor be heard
    with performance:
        started = time.monotonic()
        while time.monotonic() - started < seconds and not performance.poll():
            time.sleep(0.1)
        ready, summary = performance.ready, performance.stop()
    return ready, summary, sum(len(times) for times in performance.history.hop_ms)


def check_rates(bundle: Bundle, rate: int | None) -> Finding:
    """The model's rate against that of the devices, in Hz; None without a device."""
    manifest = bundle.manifest
    own = manifest.spectral.sample_rate
    figures: dict[str, Any] = {"model": own, "device": rate}
    if rate is None:
        return Finding("rate", "pass", f"the model runs at {own} Hz; there is no device to compare", figures=figures)
    if rate == own:
        return Finding("rate", "pass", f"model and devices at {own} Hz", figures=figures)
    plan = plan_rates(rate, own, manifest.latency_samples)
    figures["added_samples"] = plan.added_samples
    return Finding(
        "rate",
        "warn",
        f"the model runs at {own} Hz, the devices at {rate} Hz: resampled, {plan.added_samples:.1f} samples "
        f"({1e3 * plan.added_samples / rate:.2f} ms) later",
        f"set the devices to {own} Hz",
        figures,
    )


def judge_hops(summary: Summary, hops: int, rate: int, seconds: float, deferred: bool = False) -> Finding:
    """The time per hop against the time that there is: that of a hop, or of a block where that is shorter.

    A hop that was given up is one that did not fit, however long it would have taken.
    """
    status, meters = summary.status, summary.status.meters
    block, hop_ms = int(meters.block), status.hop_budget_ms
    hop_samples = round(1e-3 * hop_ms * rate)
    budget_ms = min(hop_ms, 1e3 * block / rate) if block else hop_ms
    p999 = status.hop_ms["p999"]
    share, dry = p999 / budget_ms, int(meters.late_hops)
    figures = {
        "seconds": seconds,
        "hops": hops,
        "block_samples": block,
        "budget_ms": round(budget_ms, 4),
        "hop_ms": status.hop_ms,
        "late_hops": int(meters.misses),
        "dry_hops": dry,
        "xruns": int(meters.xruns),
    }
    text = (
        f"{hops} hops in blocks of {block}: p99.9 {p999:.2f} ms is {share:.0%} of {budget_ms:.2f} ms "
        f"(p50 {status.hop_ms['p50']:.2f}, max {status.hop_ms['max']:.2f}); {figures['late_hops']} late, "
        f"{dry} dry for want of time, {figures['xruns']} drop-outs of the device"
    )
    remedy = "end other programs, grant real-time priority, use a larger --block or a machine that is not shared"
    fits = share <= 1.0 and dry <= LATE_SHARE * hops
    if not fits and not deferred and block <= hop_samples:  # a longer block asks for the next hop at once
        remedy = (
            f"--inference deferred gives the graph the time of a whole hop, at one hop more of latency "
            f"({hop_samples} samples, {hop_ms:.2f} ms); or {remedy}"
        )
    if not hops:
        return Finding("hops", "fail", f"not one hop in {seconds:g} s: no audio came", "is the device in use?", figures)
    if not fits:
        return Finding("hops", "fail", text, remedy, figures)
    if share > TIGHT_SHARE or dry or figures["late_hops"] or figures["xruns"]:
        return Finding("hops", "warn", text, remedy, figures)
    return Finding("hops", "pass", text, figures=figures)


def check_priority() -> Finding:
    """Real-time priority, tried on a thread that ends at once."""
    if not hasattr(os, "sched_setscheduler"):
        return Finding("priority", "pass", "this system gives audio threads their priority itself")
    problem: list[str] = []

    def ask() -> None:
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(AUDIO_PRIORITY))
        except OSError as error:
            problem.append(error.strerror or str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    figures = {"granted": not problem, "priority": AUDIO_PRIORITY}
    if problem:
        text = f"no real-time priority ({problem[0]}): any other program may interrupt the sound"
        return Finding("priority", "warn", text, f"{LIMITS}, {JOIN}", figures)
    return Finding("priority", "pass", f"real-time priority {AUDIO_PRIORITY} is granted", figures=figures)


def check_memory(size_bytes: int = LOCKED_BYTES) -> Finding:
    """Memory locking, tried: memory that is not locked may be on the disk when the sound needs it."""
    if sys.platform != "linux":
        return Finding("memory", "pass", "this system itself decides which memory stays off the disk")
    import resource

    libc, why = ctypes.CDLL(None, use_errno=True), ""
    if not may_lock_memory():
        why = f"the limit is {resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] / 2**20:g} MiB"
    else:
        with mmap.mmap(-1, size_bytes) as memory:
            # Held only to learn its address, and let go before the memory is.
            held = ctypes.c_char.from_buffer(memory)
            if libc.mlock(ctypes.c_void_p(ctypes.addressof(held)), ctypes.c_size_t(size_bytes)):
                why = os.strerror(ctypes.get_errno())
            del held
    figures = {"granted": not why, "bytes": size_bytes}
    if why:
        text = f"'live' cannot lock its processes into memory ({why}): the sound may have to wait for the disk"
        return Finding("memory", "warn", text, f"{LIMITS}, {JOIN}", figures)
    text = f"'live' locks its processes into memory; {size_bytes / 2**20:.0f} MiB can be locked"
    return Finding("memory", "pass", text, figures=figures)


def _is_midi_file(midi: str | None) -> TypeGuard[str]:
    """Whether --midi names a file and not a port."""
    return midi is not None and Path(midi).suffix.lower() in (".mid", ".midi")


def check_midi(settings: LiveSettings) -> Finding:
    """Which ports 'live' would listen to."""
    if _is_midi_file(settings.midi):
        events = read_midi_file(Path(settings.midi))
        return Finding(
            "midi", "pass", f"file {settings.midi}: {len(events)} messages", figures={"messages": len(events)}
        )
    try:
        inputs = MidiInputs(settings.midi, lambda _: None)
    except MidiError as error:
        return Finding("midi", "fail", str(error), "plug it in, or choose another with --midi")
    names = inputs.names
    inputs.close()
    if not names:
        remedy = "plug in a controller, or start a JACK server for --midi virtual; --style sets the style without MIDI"
        return Finding("midi", "warn", "no MIDI port: nothing can switch the styles", remedy, {"ports": []})
    return Finding("midi", "pass", f"listening to {', '.join(names)}", figures={"ports": names})


def check_map(midi_map: MidiMap) -> Finding:
    """What moves what."""
    channel = "all channels" if midi_map.channel < 0 else f"channel {midi_map.channel}"
    controllers = {"second style": midi_map.second_style_controller, **midi_map.controllers}
    moves = ", ".join(f"CC {number} {name}" for name, number in controllers.items() if number >= 0)
    figures = {
        "channel": midi_map.channel,
        "first_note": midi_map.first_note,
        "second_style_controller": midi_map.second_style_controller,
        "controllers": midi_map.controllers,
    }
    text = f"{channel}, first style on note {midi_map.first_note}, {moves or 'no controllers'}"
    return Finding("map", "pass", text, figures=figures)


def check_disk(folder: Path | None, channels: int, rate: int) -> Finding:
    """How many minutes of recording fit into --record's folder; nothing is written.

    Without --record, None, it is the current folder, and nothing fails: nobody has asked for a recording.
    """
    bad: Verdict = "warn" if folder is None else "fail"
    if folder is not None and holds_recording(folder):
        text = f"{folder} holds a recording already"
        return Finding("disk", bad, text, "choose another folder for --record", {"minutes": 0.0})
    wanted = folder or Path()
    existing = next(place for place in (wanted, *wanted.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        text = f"{folder or 'a recording'} cannot be made: {existing.absolute()} is not writable"
        return Finding("disk", bad, text, "choose another --record")
    free = shutil.disk_usage(existing).free
    per_minute = 60 * rate * channels * RECORDED_BYTES
    minutes = min(free / (2 * per_minute), LARGEST_WAV_BYTES / per_minute)
    figures = {"free_bytes": free, "minutes": round(minutes, 1)}
    text = f"{minutes:.0f} minutes of recording fit into {folder or 'the current folder'} ({free / 2**30:.1f} GiB free)"
    remedy = "free some space, or choose another disk with --record"
    if minutes < 1.0:
        return Finding("disk", bad, text, remedy, figures)
    if minutes < SHORT_RECORDING_MINUTES:
        return Finding("disk", "warn", text, remedy, figures)
    return Finding("disk", "pass", text, figures=figures)
