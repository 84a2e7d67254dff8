"""How long the command takes to answer: user CPU time above a bare interpreter, in the same run.

    python -m benchmarks.cli [--rounds 11] [--json]

Interpreter and commands run in turns, so that other load meets all alike; the median over the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

CONVERT = "convert-ckpt --dry-run"  # all that comes before the first byte
STATUS = "status of a long run"
EVENTS = 1_000_000  # steps that its second stage has logged
TARGETS = {"--help": 0.3, "plan recipe=medical": 1.0, CONVERT: 0.5, STATUS: 0.5}  # [s] above a bare interpreter


def seconds(arguments: list[str], cwd: Path) -> float:
    """User and system CPU time of a process [s]."""
    pid = os.fork()
    if pid == 0:
        os.chdir(cwd)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.execv(arguments[0], arguments)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime


def write_long_run(runs: Path) -> Path:
    """A run that was left in its second stage after so many logged steps, in its second attempt."""
    from tests import made_run

    return made_run.make(runs, until=("domain", EVENTS), scale=EVENTS // 100)


def contestants(folder: Path) -> dict[str, list[str]]:
    """Name -> command; the recipe gets a base checkpoint and corpora of real size in files, but small ones."""
    from cpt.checkpoint import hf_config
    from tests.checkpoints import write_hf
    from tests.command import write_base, write_corpus

    write_base(folder / "base")
    write_hf(folder / "model", hf_config.read_config(folder / "base"))
    write_corpus(folder / "medical.jsonl", documents=5000)
    write_corpus(folder / "general.jsonl", documents=5000)
    given = ["base=base", "sources.medical=medical.jsonl", "sources.general=general.jsonl"]
    return {
        "bare interpreter": [sys.executable, "-c", "pass"],
        "--help": [sys.executable, "-m", "cpt", "--help"],
        "plan recipe=medical": [sys.executable, "-m", "cpt", "plan", "recipe=medical", *given],
        CONVERT: [sys.executable, "-m", "cpt", "convert-ckpt", "model", "atom", "--to", "atom", "--dry-run"],
        STATUS: [sys.executable, "-m", "cpt", "status", str(write_long_run(folder / "runs"))],
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and compare with the targets; 1 when one is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        commands = contestants(Path(folder))
        for command in commands.values():  # byte code and file caches
            seconds(command, Path(folder))
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                times[name].append(seconds(command, Path(folder)))
    bare = statistics.median(times["bare interpreter"])
    above = {name: statistics.median(values) - bare for name, values in times.items() if name in TARGETS}
    missed = [name for name, value in above.items() if value > TARGETS[name]]
    if options.json:
        print(json.dumps({"above_bare_interpreter_s": above, "targets_s": TARGETS, "missed": missed}))
    else:
        print(f"bare interpreter: {bare:.3f} s CPU, median of {options.rounds}")
        for name, value in above.items():
            print(
                f"cpt {name:<22} + {value:.3f} s (at most {TARGETS[name]:.1f}) {'MISSED' if name in missed else 'ok'}"
            )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
