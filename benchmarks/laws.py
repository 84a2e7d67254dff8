"""Every figure that the laws must reproduce: target, ours, time: published tables, and worked examples of each law.

    python -m benchmarks.laws [ID ...] [--json]

Data: `data/laws` of `$CPT_SHARED` (or `../shared`); rows that need it are skipped where it is missing. Everything runs
on one core with one thread; the time is CPU time, so that other load on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.laws")
    parser.add_argument("ids", nargs="*", metavar="ID", help="rows to run, by the beginning of their id; all without")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    threads = {name: os.environ.get(name) for name in THREADS}
    cores = os.sched_getaffinity(0)
    os.environ.update(dict.fromkeys(THREADS, "1"))
    os.sched_setaffinity(0, sorted(cores)[:1])
    try:
        found = measure(chosen.ids, chosen.json)
    finally:  # other benchmarks may follow in this process
        os.sched_setaffinity(0, cores)
        for name, value in threads.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    missed = [row["id"] for row in found if row["verdict"] == "MISSED"]
    if chosen.json:
        print(json.dumps({"figures": found, "missed": missed}, indent=1))
    else:
        skipped = sum(row["verdict"] == "skipped" for row in found)
        print(f"{len(found) - len(missed) - skipped} met, {len(missed)} missed, {skipped} skipped")
    return 1 if missed or not found else 0


def measure(ids: Sequence[str], quiet: bool) -> list[dict[str, Any]]:
    """All rows whose id begins with one of `ids`, or all; printed one by one unless quiet."""
    from benchmarks._law_figures import FIGURES, NoData  # after the number of threads is set

    found: list[dict[str, Any]] = []
    for figure in FIGURES:
        if ids and not figure.id.lower().startswith(tuple(name.lower() for name in ids)):
            continue
        start = time.process_time()
        try:
            ours, ok = figure.measure()
            verdict = "ok" if ok else "MISSED"
        except NoData as reason:
            ours, verdict = str(reason), "skipped"
        seconds = time.process_time() - start
        if verdict == "ok" and seconds > figure.most_seconds:
            ours, verdict = f"{ours}, but more than {figure.most_seconds:g} s", "MISSED"
        found.append({"id": figure.id, "target": figure.target, "ours": ours, "verdict": verdict, "seconds": seconds})
        if not quiet:
            print(f"{figure.id:<12} {verdict:<8} {seconds:5.1f} s   target {figure.target}")
            print(f"{'':<32}ours   {ours}", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
