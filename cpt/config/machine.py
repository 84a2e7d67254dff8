"""What this machine offers, and how fast like stages of earlier runs were: facts for estimates. No torch."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cpt.base.files import read_json
from cpt.base.processes import num_cores
from cpt.base.records import to_json
from cpt.launch import Launcher
from cpt.launch.batch import Batch
from cpt.plan.budget import Devices, Measured
from cpt.plan.types import RunPlan, Train

CORE_FLOPS_PER_S = 20e9  # of one processor core in fp32 training; seen here: 16 to 25 on a 1M-parameter Llama
SHARE_OF_PEAK = 0.4
# Dense bf16 peak by a word in the device's name [FLOP/s]; from the makers' data sheets.
_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "L40S": 362e12,
    "A100": 312e12,
    "A800": 312e12,
    "4090": 165e12,
    "A40": 150e12,
    "V100": 125e12,
    "A10": 125e12,
    "L4": 121e12,
}
_RUNS = 8  # earlier runs that are looked at, newest first
_TAIL = 1 << 16  # bytes of an event file that are looked at


def why_unwritable(folder: Path) -> str | None:
    """Why a folder cannot be made or written to, as the end of a sentence; None when it probably can. Writes nothing.

    Args:
        folder: absolute; may not exist yet, then the nearest folder above it counts.
    """
    there = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    if not there.is_dir():
        return f"`{there}` is a file"
    if there.parts[1:2] in (("proc",), ("sys",)):
        return f"`/{there.parts[1]}` belongs to the kernel"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"`{there}` is not writable"
    return None


def devices(launcher: Launcher | None = None) -> Devices:
    """The devices that ranks compute on: of this machine, or with a queue what is said of its nodes."""
    if isinstance(launcher, Batch):
        return _of_nodes(launcher)
    names = _gpu_names()
    if not names:
        return Devices(
            kind="cpu",
            flops_per_s=CORE_FLOPS_PER_S,
            memory=_memory(),
            basis=f"{CORE_FLOPS_PER_S / 1e9:.0f} GFLOP/s a core assumed",
            cores=num_cores(),
        )
    name = names[0]
    peak = _peak(name)
    size = re.search(r"(\d+) ?GB", name)
    return Devices(
        kind="gpu",
        flops_per_s=peak * SHARE_OF_PEAK if peak else None,
        memory=int(size[1]) * 10**9 if size else None,
        basis=f"{SHARE_OF_PEAK:.0%} of the peak of {name} assumed",
    )


def _of_nodes(launcher: Batch) -> Devices:
    """Devices that are not here: their memory is not known, their speed only by the kind that jobs ask for."""
    if getattr(launcher, "gpus", "none") == "none":
        cores = getattr(launcher, "cpus_per_rank", None) or 1
        basis = f"{CORE_FLOPS_PER_S / 1e9:.0f} GFLOP/s a core assumed"
        return Devices(kind="cpu", flops_per_s=CORE_FLOPS_PER_S * cores, basis=basis, cores=None)
    name = getattr(launcher, "gres_type", None) or ""
    if (peak := _peak(name.upper())) is None:
        return Devices(kind="gpu")
    return Devices(
        kind="gpu", flops_per_s=peak * SHARE_OF_PEAK, basis=f"{SHARE_OF_PEAK:.0%} of the peak of `{name}` assumed"
    )


def _peak(name: str) -> float | None:
    """Of a GPU by its name [FLOP/s]; None when it is not known."""
    return next((peak for word, peak in _PEAKS.items() if word in name), None)


def _gpu_names() -> list[str]:
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            match = re.search(r"^Model:\s*(.+)$", path.read_text(errors="replace"), re.MULTILINE)
        except OSError:
            continue
        if match:
            found.append(match[1].strip())
    return found


def _memory() -> int | None:
    """Memory of this machine, or of the control group that we are in when that is less [bytes]."""
    found = []
    try:
        total = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        found += [int(total[1]) * 1024] if total else []
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        found += [int(limit)] if limit.isdigit() else []
    except OSError:
        pass
    return min(found) if found else None


def measured(plan: RunPlan) -> dict[str, Measured]:
    """By stage, the speed of a like stage (model, layout, lengths, precision) in the newest run that has one."""
    wanted = {
        n: _likeness(to_json(plan.model_of(s)), to_json(s.train)) for n, s in plan.stages.items() if s.train is not None
    }
    found: dict[str, Measured] = {}
    for run, stages, model in _earlier(Path(plan.runs)):
        for name, value in stages.items():
            train = value.get("train") if isinstance(value, Mapping) else None
            if not isinstance(train, Mapping):
                continue
            shape = value.get("model") or model
            like = [n for n, w in wanted.items() if n not in found and w == _likeness(shape, train)]
            speed = _speed(run / "stages" / name) if like else None
            if speed:
                found |= {n: Measured(tokens_per_s=speed, run=run.name) for n in like}
    return found


def _earlier(runs: Path) -> Iterator[tuple[Path, Mapping[str, Any], Any]]:
    """Folder, stages and model of the newest runs."""
    try:
        folders = sorted(
            (p for p in runs.iterdir() if (p / "plan.json").is_file()), key=lambda p: -p.stat().st_mtime_ns
        )
    except OSError:
        return
    for run in folders[:_RUNS]:
        try:
            value = read_json(run / "plan.json")
            yield run, value["stages"], value["model"]
        except (OSError, ValueError, KeyError, TypeError):
            continue


def _likeness(model: Any, train: Any) -> Any:
    """What the speed of a stage depends on."""
    keys = ("seq_length", "global_batch_size", "micro_batch_size", "precision", "recompute", "parallel")
    shape = {k: v for k, v in (model or {}).items() if k not in ("hf_config", "init_std", "rope_theta", "norm_eps")}
    assert not isinstance(train, Train)
    return [shape, {k: train.get(k) for k in keys}]


def _speed(stage: Path) -> float | None:
    """Median tokens a second of the last steps of a stage."""
    import json

    speeds: list[float] = []
    for path in sorted(stage.glob("attempt_*/events.jsonl")):
        try:
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - _TAIL))
                lines = file.read().split(b"\n")
        except OSError:
            continue
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and event.get("kind") == "step" and event.get("tokens_per_s"):
                speeds.append(float(event["tokens_per_s"]))
    return statistics.median(speeds) if len(speeds) >= 3 else None
