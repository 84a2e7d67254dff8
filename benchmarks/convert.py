"""Conversion of checkpoints against a plain copy: bytes a second and memory, by direction and number of workers.

    python -m benchmarks.convert [--gigabytes 3] [--repeats 3] [--only hf-atom,atom-torch_dist] [--folder DIR]

The model is a Llama of random weights whose files take about the given size in all: bf16 weights alone, and with Adam
state. Each conversion is the command `cpt convert-ckpt` in a process of its own, its start included. The reference
copies the same files by reads and writes of 8 MiB and one fsync a file; it runs in turn with the conversions, on the
same disk, with the source in the page cache like theirs. As a copy reads and writes each byte once, the bytes of a
conversion are the mean of those it reads and those it writes. Figures are medians.

Targets: of the copy's rate, with one worker, 0.7 from and to `hf`, 0.6 between `atom` and `torch_dist` with Adam state,
0.5 from `dp_reshardable` and `megatron`; two workers 1.5 times one worker or two copies at once; 80 MB of anonymous
memory and four blocks for each worker without torch.

Rows `verify-…` are the command `cpt ckpt verify` against plain reading of the same files by 8 MiB, in turn, each with
the files put out of the page cache and a rest before it (cold) and again with them in it (warm). Target: 0.8 of the
rate of reading, cold. Warm is only shown: nobody waits for what is in the cache.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kill_resume import ROOT
from cpt.checkpoint.arrays import Array, Place, as_matrix, itemsize
from cpt.checkpoint.content import MODEL, OPTIMIZER, Atom, Content, Optimizer
from cpt.checkpoint.formats import Writing
from cpt.checkpoint.mapping import atom_shapes
from cpt.checkpoint.writing import BLOCK
from cpt.plan.model import ModelConfig

MEMORY = 80e6  # of a worker beside four blocks [bytes]
CHUNK = 8 << 20  # of the plain copy and of plain reading [bytes]
VERIFY = 0.8  # of plain reading, cold
REST = 4.0  # before each cold reading [s]: after one a disk is faster, and memory freed a moment ago is not at hand
ENV = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as installed


@dataclass(frozen=True)
class Direction:
    """A conversion that is measured.

    Args:
        source: one of `SOURCES`.
        options: of `cpt convert-ckpt`.
        target: wanted share of the copy's rate; None = only shown.
    """

    name: str
    source: str
    options: tuple[str, ...]
    target: float | None


# How each source is made: from which other one, and with what options; "" = of random values.
SOURCES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "hf": ("", ("--to", "hf")),
    "atom": ("", ("--to", "atom")),
    "weights.atom": ("hf", ("--to", "atom")),
    "weights.torch_dist": ("hf", ("--to", "torch_dist")),
    "torch_dist": ("atom", ("--to", "torch_dist")),
    "dp_reshardable": ("atom", ("--to", "torch_dist", "--optimizer", "dp_reshardable")),
    "megatron": ("atom", ("--to", "megatron", "--tp", "2")),
    "converted.hf": ("hf", ("--to", "hf")),  # with checksums
}
VERIFIED = {f"verify-{source}": source for source in ("weights.torch_dist", "torch_dist", "atom", "converted.hf")}
DIRECTIONS = (
    Direction("hf-atom", "hf", ("--to", "atom"), 0.7),
    Direction("hf-torch_dist", "hf", ("--to", "torch_dist"), 0.7),
    Direction("hf-megatron", "hf", ("--to", "megatron", "--tp", "2"), None),
    Direction("atom-hf", "weights.atom", ("--to", "hf"), 0.7),
    Direction("torch_dist-hf", "weights.torch_dist", ("--to", "hf"), 0.7),
    Direction("atom-torch_dist", "atom", ("--to", "torch_dist"), 0.6),
    Direction("torch_dist-atom", "torch_dist", ("--to", "atom"), 0.6),
    Direction("dp_reshardable-atom", "dp_reshardable", ("--to", "atom"), 0.5),
    Direction("megatron-atom", "megatron", ("--to", "atom"), 0.5),
    Direction("atom-megatron", "atom", ("--to", "megatron", "--tp", "2"), None),
    Direction("atom-dp_reshardable", "atom", ("--to", "torch_dist", "--optimizer", "dp_reshardable"), None),
)


def llama(parameters: float) -> ModelConfig:
    """A Llama of about so many parameters with group query attention and sizes that are no powers of two."""
    hidden = next(h for h in range(128, 1 << 15, 128) if _numel(_llama(h, 8)) > parameters)
    layers = min(range(1, 65), key=lambda n: abs(_numel(_llama(hidden, n)) - parameters))
    return _llama(hidden, layers)


def _llama(hidden: int, layers: int) -> ModelConfig:
    heads = hidden // 64
    return ModelConfig(
        family="llama",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=hidden * 11 // 4 // 16 * 16,
        num_attention_heads=heads,
        num_query_groups=next(g for g in (8, 4, 2, 1) if heads % g == 0),
        head_dim=64,
        vocab_size=hidden * 15 + 2,
        max_position_embeddings=4096,
        norm_eps=1e-5,
    )


def _numel(model: ModelConfig) -> int:
    return model.num_parameters


def random_content(model: ModelConfig, folder: Path, *, optimizer: bool) -> Content:
    """A checkpoint of random values between 2^-7 and 2 in size. All lie in one file, in which tensors overlap."""
    states = OPTIMIZER if optimizer else (MODEL,)
    dtype = "float32" if optimizer else "bfloat16"
    shapes = atom_shapes(model)
    largest = max(int(np.prod(shape)) for shape in shapes.values()) * itemsize(dtype)
    file, generator = folder / f"values.{dtype}", np.random.default_rng(0)
    size = largest + (16 << 20)
    with open(file, "wb") as f:
        for at in range(0, size, 16 << 20):
            bits = generator.integers(0, 1 << 32, 4 << 20, dtype=np.uint32)
            bits = bits & 0x83FF83FF | 0x3C003C00 if dtype == "bfloat16" else bits & 0x83FFFFFF | 0x3C000000
            f.write(bits.tobytes()[: size - at])
    atoms = {}
    for i, (name, shape) in enumerate(shapes.items()):
        rows, columns = as_matrix(shape)
        arrays = {}
        for j, state in enumerate(states):
            start = (i * len(states) + j) * 8 * 10007 % (16 << 20)
            place = Place(str(file), start, columns * itemsize(dtype), 0, rows, 0, columns)
            arrays[state] = Array(dtype, shape, (place,))
        atoms[name] = Atom(name=name, shape=shape, dtype="bfloat16", states=arrays)
    return Content(
        format="random",
        path=folder,
        model=model,
        atoms=atoms,
        optimizer=Optimizer(step=7, groups=GROUPS) if optimizer else None,
        iteration=7 if optimizer else None,
    )


GROUPS: tuple[Mapping[str, Any], ...] = (
    {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "lr": 1e-4, "weight_decay": 0.1},
    {"wd_mult": 0.0, "lr_mult": 1.0, "is_expert_parallel": False, "lr": 1e-4, "weight_decay": 0.0},
)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def copy(source: Path, out: Path) -> None:
    """The reference: every file by plain reads and writes, and an fsync."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        to = out / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "rb", buffering=0) as reading, open(to, "wb", buffering=0) as writing:
            while data := reading.read(CHUNK):
                writing.write(data)
            os.fsync(writing.fileno())


@dataclass(frozen=True)
class Run:
    """One conversion: its time, and the most anonymous memory of one of its processes [s, bytes]."""

    seconds: float
    anonymous: int


def convert(source: Path, out: Path, options: tuple[str, ...], workers: int) -> Run:
    """Run the command; raises when it fails."""
    return _run(["convert-ckpt", str(source), str(out), *options, "--workers", str(workers)])


def _run(arguments: list[str]) -> Run:
    """Run `cpt`; raises when it fails."""
    command = [sys.executable, "-m", "cpt", *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    most = [0]
    watching = threading.Thread(target=_watch, args=(process, most))
    watching.start()
    text, _ = process.communicate()
    seconds = time.perf_counter() - start
    watching.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{text}")
    return Run(seconds, most[0])


def _watch(process: subprocess.Popen[str], most: list[int]) -> None:
    while process.poll() is None:
        for pid in (process.pid, *_children(process.pid)):
            most[0] = max(most[0], _anonymous(pid))
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _anonymous(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon:")), 0)


def _quiet(*folders: Path) -> None:
    """Remove what earlier runs left and let the disk come to rest, so that no run pays for another."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    time.sleep(0.2)


def measure(direction: Direction, source: Path, scratch: Path, repeats: int) -> dict[str, float]:
    """Medians of one direction: rates of one and two workers and of one and two copies [bytes/s], memory [bytes]."""
    out, second = scratch / "out", scratch / "second"
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for _ in range(repeats):
        for workers in (1, 2):
            _quiet(out, second)
            run = convert(source, out, direction.options, workers)
            moved = (size_of(source) + size_of(out)) / 2
            note(f"{workers}", moved / run.seconds)
            note("anonymous", run.anonymous)
        _quiet(second)
        note("copy", _timed(size_of(out), lambda: copy(out, second)))
        _quiet(second)
        note("copies", _timed(2 * size_of(out), lambda: _twice(out, second)))
    _quiet(out, second)
    made = {name: statistics.median(values) for name, values in found.items()}
    return made | {"anonymous": max(found["anonymous"])}


def read(source: Path) -> None:
    """The reference of verification: every file by plain reads."""
    buffer = bytearray(CHUNK)
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _forget(source: Path) -> None:
    """Put files out of the page cache."""
    os.sync()
    for path in (p for p in source.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_verify(source: Path, repeats: int) -> dict[str, float]:
    """Medians of the rates of verification and of plain reading, each cold and warm [bytes/s]."""
    found: dict[str, list[float]] = {}
    works = {"verify": lambda: _run(["ckpt", "verify", str(source)]), "read": lambda: read(source)}
    for _ in range(repeats):
        for name, work in works.items():
            _forget(source)
            time.sleep(REST)
            found.setdefault(f"{name} cold", []).append(_timed(size_of(source), work))
            read(source)  # verification leaves nothing in the page cache
            found.setdefault(f"{name} warm", []).append(_timed(size_of(source), work))
    return {name: statistics.median(rates) for name, rates in found.items()}


def _timed(size: int, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return size / (time.perf_counter() - start)


def _twice(source: Path, out: Path) -> None:
    copies = [multiprocessing.Process(target=copy, args=(source, out / str(i))) for i in range(2)]
    for process in copies:
        process.start()
    for process in copies:
        process.join()


def sources(wanted: set[str], folder: Path, gigabytes: float) -> Iterator[tuple[str, Path]]:
    """Each wanted source by name, made one after another; those that others are made from come first."""
    from tests import checkpoints

    needed = wanted | {SOURCES[name][0] for name in wanted} - {""}
    for name in [n for n in SOURCES if n in needed]:
        before, options = SOURCES[name]
        if before:
            convert(folder / before, folder / name, options, 2)
        else:
            is_hf = name == "hf"
            model = llama(gigabytes * 1e9 / (2 if is_hf else 14))
            with tempfile.TemporaryDirectory(dir=folder) as values:
                content = random_content(model, Path(values), optimizer=not is_hf)
                checkpoints.write(content, options[1], folder / name, Writing(file_bytes=1 << 30))
        if name in wanted:
            yield name, folder / name


def main(arguments: list[str] | None = None) -> int:
    """Measure; 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of each source")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="directions and `verify-…` rows, by commas")
    parser.add_argument("--folder", type=Path, help="where to work (a temporary one)")
    given = parser.parse_args(arguments)
    only = given.only.split(",") if given.only else [*(d.name for d in DIRECTIONS), *VERIFIED]
    chosen = [d for d in DIRECTIONS if d.name in only]
    verified = {source: name for name, source in VERIFIED.items() if name in only}
    missed = 0
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary)
        print(
            f"{'direction':24}{'GB':>6}{'1 worker':>10}{'copy':>8}{'ratio':>7}  wanted   2 workers  2 copies   memory"
        )
        for name, source in sources({d.source for d in chosen} | set(verified), folder, given.gigabytes):
            for direction in [d for d in chosen if d.source == name]:
                figures = measure(direction, source, folder / "scratch", given.repeats)
                missed |= _show(direction, size_of(source), figures)
            if name in verified:
                missed |= _show_verify(verified[name], size_of(source), measure_verify(source, given.repeats))
    return missed


def _show_verify(name: str, size: int, rates: Mapping[str, float]) -> int:
    """Print one line; 1 when the target is missed."""
    said = []
    for state in ("cold", "warm"):
        ours, plain = rates[f"verify {state}"], rates[f"read {state}"]
        said.append(f"{state} {ours / 1e9:5.2f} of {plain / 1e9:5.2f} {ours / plain:5.2f}")
    is_fast = rates["verify cold"] >= VERIFY * rates["read cold"]
    print(f"{name:24}{size / 1e9:6.2f}  {said[0]}  {VERIFY} {_said(is_fast)}  {said[1]}", flush=True)
    return int(not is_fast)


def _show(direction: Direction, size: int, figures: Mapping[str, float]) -> int:
    """Print one line; 1 when a target is missed."""
    one, two, plain, both = (figures[n] for n in ("1", "2", "copy", "copies"))
    ratio = one / plain
    is_fast = direction.target is None or ratio >= direction.target
    is_shared = two >= min(1.5 * one, both)
    is_small = figures["anonymous"] <= MEMORY + 4 * BLOCK
    wanted = f"{direction.target or 0:.1f} {_said(is_fast)}" if direction.target else "-"
    print(
        f"{direction.name:24}{size / 1e9:6.2f}{one / 1e9:10.2f}{plain / 1e9:8.2f}{ratio:7.2f}  {wanted:8}"
        f"{two / 1e9:6.2f} {_said(is_shared):8}{both / 1e9:5.2f}"
        f"{figures['anonymous'] / 1e6:7.0f} MB {_said(is_small)}",
        flush=True,
    )
    return int(not (is_fast and is_shared and is_small))


def _said(is_met: bool) -> str:
    return "met" if is_met else "missed"


if __name__ == "__main__":
    sys.exit(main())
