"""Conversions killed by `kill -9` at random moments: time and bytes against a conversion that nobody touched.

    python -m benchmarks.convert_kills [--gigabytes 3] [--kills 15] [--seed N] [--folder DIR]

A Llama of random bf16 weights goes from Hugging Face to `torch_dist` at tp 4 x pp 2 and back, with two workers. At each
kill the command is started, its whole process group gets SIGKILL at a moment of its running time, and the same command
is run again to the end. The time of both together counts, starts of Python included, against the undisturbed runs right
before and after it; so does, as it depends less on what else the machine does, the CPU time of all processes. At last
one conversion is killed several times: its ratios are only shown.

Target: the median is at most 1.1 times an undisturbed run, and the bytes are the very same. What a kill costs is the
start of the command, 0.2 s whatever the size, and what two workers have written since their marks. Needs about four
times the given size of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import filecmp
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.convert import ENV, llama, random_content
from benchmarks.kill_resume import ROOT
from cpt.checkpoint.formats import Writing
from cpt.plan.model import ModelConfig

TARGET = 1.1  # of an undisturbed run
DIRECTIONS = (
    ("hf", "torch_dist", ("--to", "torch_dist", "--tp", "4", "--pp", "2")),
    ("torch_dist", "hf", ("--to", "hf")),
)
SEVERAL = 4  # kills of one conversion
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


def model_of(parameters: float) -> ModelConfig:
    """A Llama of about so many parameters that tp 4 and pp 2 divide."""
    for more in range(1000):
        model = llama(parameters * (1 + more / 100))
        if model.num_query_groups % 4 == 0 and model.num_layers % 2 == 0:
            return model
    raise AssertionError("there is none")


@dataclass(frozen=True)
class Cost:
    """What runs took: wall time, and CPU time of all their processes [s]."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)


def run(command: list[str], seconds: float | None = None) -> tuple[Cost, bool]:
    """Run a command, for at most so long before its process group is killed; what it took, whether it ended."""
    start, before = time.perf_counter(), _cpu()
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        with contextlib.suppress(ChildProcessError):
            while True:  # its workers are ours now
                os.waitpid(-process.pid, 0)
        return Cost(time.perf_counter() - start, _cpu() - before), False
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{text}")
    return Cost(time.perf_counter() - start, _cpu() - before), True


def _cpu() -> float:
    """CPU time of all processes that have ended below this one [s]."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def is_same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()) for f in (one, other)]
    return names[0] == names[1] and all(filecmp.cmp(one / n, other / n, shallow=False) for n in names[0])


def clear(out: Path) -> None:
    """Remove what a run has made and let the disk come to rest."""
    for folder in (out, out.with_name(out.name + ".partial")):
        shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    time.sleep(0.2)


def killed(command: list[str], out: Path, moments: list[float]) -> Cost:
    """Kill a conversion after so many seconds of each run, then let it end; what all runs together took."""
    clear(out)
    total = Cost()
    for moment in moments:
        cost, is_done = run(command, moment)
        if is_done and len(moments) == 1:  # quicker than those before: nothing was killed
            return killed(command, out, [moment / 2])
        total += cost
        if is_done:
            return total
    return total + run(command)[0]


def measure(source: Path, out: Path, whole: Path, options: tuple[str, ...], kills: int, chance: random.Random) -> int:
    """One direction; 1 when the target is missed or a byte differs. `whole` stays: the undisturbed result."""
    options = (*options, "--workers", "2")
    command = [sys.executable, "-m", "cpt", "convert-ckpt", str(source), str(out), *options]
    clear(out)
    run([*command[:5], str(whole), *options])
    straight = [killed(command, out, []) for _ in range(3)]
    same = is_same(out, whole)
    ratios: list[float] = []
    of_cpu: list[float] = []
    print(f"{source.name} to {whole.name}: undisturbed {', '.join(f'{c.wall:.2f}' for c in straight)} s")
    for _ in range(kills):
        moment = chance.uniform(0, min(c.wall for c in straight))
        cost = killed(command, out, [moment])
        same &= is_same(out, whole)
        straight.append(killed(command, out, []))
        same &= is_same(out, whole)  # also for what it leaves in memory: before each run the very same happens
        one, other = straight[-2:]
        ratios.append(2 * cost.wall / (one.wall + other.wall))
        of_cpu.append(2 * cost.cpu / (one.cpu + other.cpu))
        print(
            f"  killed after {moment:5.2f} s: {cost.wall:5.2f} s in all, undisturbed {one.wall:.2f}, {other.wall:.2f}"
            f" s: {ratios[-1]:.2f}, of CPU time {of_cpu[-1]:.2f}",
            flush=True,
        )
    usual = statistics.median(c.wall for c in straight)
    usual_cpu = statistics.median(c.cpu for c in straight)
    moments = [chance.uniform(0.2, 1) * usual / SEVERAL * 1.5 for _ in range(SEVERAL)]
    several = killed(command, out, moments)
    same &= is_same(out, whole)
    clear(out)
    is_met = statistics.median(ratios) <= TARGET
    print(
        f"  median {statistics.median(ratios):.2f}, largest {max(ratios):.2f}, wanted {TARGET} "
        f"{'met' if is_met else 'missed'}; of CPU time {statistics.median(of_cpu):.2f} and {max(of_cpu):.2f}; "
        f"{SEVERAL} kills of one: {several.wall / usual:.2f} and {several.cpu / usual_cpu:.2f}; "
        f"bytes {'identical' if same else 'DIFFER'}",
        flush=True,
    )
    return int(not (is_met and same))


def main(arguments: list[str] | None = None) -> int:
    """Measure; 1 when the target is missed or a byte differs."""
    from tests import checkpoints

    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert_kills", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the source")
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--folder", type=Path, help="where to work (a temporary one)")
    given = parser.parse_args(arguments)
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    chance = random.Random(seed)
    missed = 0
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)  # workers whose parent is killed end as children of this process
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary)
        with tempfile.TemporaryDirectory(dir=folder) as values:
            content = random_content(model_of(given.gigabytes * 1e9 / 2), Path(values), optimizer=False)
            checkpoints.write(content, "hf", folder / "hf", Writing(file_bytes=1 << 30))
        for source, to, options in DIRECTIONS:
            whole = folder / (to if to != "hf" else "hf-again")
            missed |= measure(folder / source, folder / "out", whole, options, given.kills, chance)
            shutil.rmtree(folder / source)
    return missed


if __name__ == "__main__":
    sys.exit(main())
