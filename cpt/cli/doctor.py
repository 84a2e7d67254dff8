"""`cpt doctor`: what is missing before anything fails."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpt.cli.flags import Json, result, result_json

if TYPE_CHECKING:
    from cpt.launch import Work

Launcher = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[recipe=NAME] [launcher=NAME key=value ...]",
        help="A launcher to check as well: whether the queue would take its jobs; with a recipe, the largest of its "
        "jobs. Submits nothing.",
        show_default=False,
    ),
]


def _read(texts: list[str]) -> tuple[tuple[str, Any], Work | None]:
    """The launcher with its name, and the stage of a recipe that has most ranks; None without a recipe."""
    from cpt.config import build
    from cpt.config.launcher import launcher
    from cpt.launch import launcher_of
    from cpt.stages.attempt import work_of

    if not any(text.startswith("recipe=") for text in texts):
        return launcher(texts), None
    plan = build.plan(None, texts)
    works = [work_of(stage, Path(plan.runs) / plan.name, Path.cwd()) for stage in plan.stages.values()]
    return (plan.launcher["name"], launcher_of(plan.launcher)), max(works, key=lambda w: w.world_size)


def command(launcher: Launcher = None, json: Json = False) -> int:
    """Check Python, packages, process groups, memory, disk, wandb and a launcher; exit code 3 when a check fails."""
    from cpt.base.errors import DONE, ENVIRONMENT
    from cpt.doctor import check, engine, machine, packages, scheduler, tracking

    runs = Path("runs").absolute()
    cache = Path(os.environ.get("CPT_CACHE") or ".cpt/cache").absolute()
    asked, work = _read(launcher) if launcher else (None, None)
    queue = scheduler.checks(*asked, runs, cache, work=work) if asked else ()
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
