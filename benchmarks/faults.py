"""Random faults against local runs of three stages on two ranks; each goes on by `cpt resume` until it is done.

Killed ranks, parents and commands, a stopped rank, a full disk, damaged checkpoints, corpora that are away for a while.
At the end weights, optimizer, random states and the losses of all steps must be those of a run that nobody touched,
and no process may be left.

    python -m benchmarks.faults [--faults 50] [--per-run 6] [--seed N] [--kinds rank,disk]

Every second run has `launcher.retries=2`, so that faults of the machine are repeated without a person. The full disk
needs root (a small tmpfs) and is left out otherwise. A disk that gives EIO is not among them: it cannot be made here.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import random
import sys
import tempfile
import time
from pathlib import Path

STEPS = (40, 30, 20)
LAYOUTS = ("{tp: 2}", "{dp: 2}")


def main(arguments: list[str] | None = None) -> int:
    """Let it happen; 1 when anything was not as it should be."""
    from tests.dist import faulting, killing

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--per-run", type=int, default=6)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--kinds", default=",".join(faulting.KINDS))
    parser.add_argument("--minutes", type=float, default=None, help="no new fault after so long")
    parser.add_argument("--keep", type=Path, default=None, help="a new folder that is kept")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    print(f"seed {seed}", flush=True)
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "recipes").mkdir(parents=True)
        killing.write_topics(folder)
        (folder / "recipes" / "three.yaml").write_text(faulting.recipe(chance.choice(LAYOUTS), STEPS))
        runs = killing.Runs(folder)
        begin = time.monotonic()
        straight = runs.finish("straight")
        if straight.process.returncode:
            print(straight.text()[-3000:])
            return 1
        print(f"without a fault: {time.monotonic() - begin:.0f} s", flush=True)
        return _many(runs, options, chance)


def _many(runs, options: argparse.Namespace, chance: random.Random) -> int:  # type: ignore[no-untyped-def]
    from tests.dist import faulting

    begin = time.monotonic()
    faults: list[faulting.Fault] = []
    number = bad_runs = 0
    deck: list[str] = []
    over = lambda: options.minutes is not None and time.monotonic() - begin > 60 * options.minutes  # noqa: E731
    while len(faults) < options.faults and not over():
        number += 1
        name = f"run{number}"
        retries = (f"launcher.hang_after={faulting.HANG_AFTER}", *(["launcher.retries=2"] if number % 2 else []))
        with faulting.small_disk(runs.folder / name) as has_disk:
            run = faulting.Faulted(runs, name, chance, retries)
            try:
                for _ in range(min(options.per_run, options.faults - len(faults))):
                    if over():
                        break
                    if not deck:  # every kind in turn, in a random order
                        deck = [k for k in options.kinds.split(",") if has_disk or k != "disk"]
                        chance.shuffle(deck)
                    fault = run.fault(deck[-1])
                    if fault is None:
                        break
                    deck.pop()
                    faults.append(fault)
                    print(f"{len(faults):3} {name:6} {fault.text()}", flush=True)
                run.finish()
                wrong = run.problems + ([] if run.done else ["it was never done"])
                wrong += faulting.differences(runs, name) if run.done else []
            finally:
                run.end()
        bad_runs += bool(wrong)
        same = "weights, optimizer, random states, losses and lr equal; no process left"
        print(f"    {name:6} {'; '.join(wrong) if wrong else f'done: {same}'}", flush=True)
    return _summary(faults, number, bad_runs, time.monotonic() - begin)


def _summary(faults, runs: int, bad_runs: int, seconds: float) -> int:  # type: ignore[no-untyped-def]
    count = collections.Counter(f.kind for f in faults)
    for kind, times in sorted(count.items()):
        mine = [f for f in faults if f.kind == kind]
        ends = ", ".join(f"{n} {how}" for how, n in collections.Counter(f.ended for f in mine).most_common())
        print(f"{kind:8} {times:3}  at most {max(f.seconds for f in mine):5.1f} s until all was gone  {ends}")
    wrong = sum(bool(f.wrong) for f in faults)
    print(f"{len(faults)} faults in {runs} runs, {seconds:.0f} s: {wrong} faults not as wanted, {bad_runs} runs wrong")
    return int(wrong + bad_runs > 0)


if __name__ == "__main__":
    sys.exit(main())
