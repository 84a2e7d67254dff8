"""The machine: memory, disk, limits."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cpt.base.units import show_bytes
from cpt.doctor.check import Check


def checks(runs: Path, cache: Path) -> Iterator[tuple[str, Callable[[], Check]]]:
    """Every check of this file, with its name.

    Args:
        runs: where run folders go.
        cache: where prepared corpora go.
    """
    yield "cores and memory", _memory
    yield "/dev/shm", _shared_memory
    yield "open files", _open_files
    yield "run folder", lambda: _disk("run folder", runs)
    yield "cache", lambda: _disk("cache", cache)


def _memory() -> Check:
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    found = f"{cores} cores, {show_bytes(memory.available)} of {show_bytes(memory.total)} free"
    if memory.available < 2e9:
        return Check("warn", "cores and memory", found, "the demo needs about 2 GB")
    return Check("ok", "cores and memory", found)


def _shared_memory() -> Check:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Check("warn", "/dev/shm", "not there", "NCCL needs it; in a container: `--ipc=host` or `--shm-size`")
    if free < 1e9:
        return Check("warn", "/dev/shm", f"{show_bytes(free)} free", "NCCL may need more; in a container: `--shm-size`")
    return Check("ok", "/dev/shm", f"{show_bytes(free)} free")


def _open_files() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        return Check("warn", "open files", f"limit {soft:,}", "`ulimit -n 65536` before large runs")
    return Check("ok", "open files", f"limit {soft:,}")


def _disk(name: str, folder: Path) -> Check:
    """Free space and write speed where the folder is or would be."""
    there = folder
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK):
        return Check("fail", name, f"`{there}` cannot be written to", "work in a folder of yours")
    usage = shutil.disk_usage(there)
    block = os.urandom(1 << 20)
    start = time.monotonic()
    with tempfile.TemporaryFile(dir=there) as file:
        for _ in range(32):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    speed = 32 * (1 << 20) / max(time.monotonic() - start, 1e-6)
    found = f"`{there}`: {show_bytes(usage.free)} free, writes {show_bytes(speed)} a second"
    if usage.free < 2e9:
        return Check("warn", name, found, "the demo needs about 200 MB, a billion parameters about 18 GB a checkpoint")
    return Check("ok", name, found)
