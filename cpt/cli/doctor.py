"""`cpt doctor`: what is missing before anything fails."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from cpt.cli.flags import Json, result, result_json

Launcher = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[launcher=NAME launcher.key=value ...]",
        help="A launcher to check as well: whether the queue would take its jobs. Submits nothing.",
        show_default=False,
    ),
]


def command(launcher: Launcher = None, json: Json = False) -> int:
    """Check Python, packages, process groups, memory, disk, wandb and a launcher; exit code 3 when a check fails."""
    from cpt.base.errors import DONE, ENVIRONMENT
    from cpt.config.launcher import launcher as read_launcher
    from cpt.doctor import check, engine, machine, packages, scheduler, tracking

    runs = Path("runs").absolute()
    cache = Path(os.environ.get("CPT_CACHE") or ".cpt/cache").absolute()
    queue = scheduler.checks(*read_launcher(launcher), runs, cache) if launcher else ()
    groups = (packages.checks(), engine.checks(), queue, machine.checks(runs, cache), tracking.checks(os.environ))
    with ThreadPoolExecutor(len(groups)) as pool:  # most of the time a process beside this one loads torch
        found = [*chain.from_iterable(pool.map(check.run, groups))]
    if json:
        result_json([asdict(c) for c in found])
    else:
        width = max(len(c.name) for c in found)
        for c in found:
            result(f"{c.status:<4}  {c.name:<{width}}  {c.found}")
            if c.hint:
                result(f"{'':<{width + 6}}  → {c.hint}")
    return ENVIRONMENT if any(c.status == "fail" for c in found) else DONE
