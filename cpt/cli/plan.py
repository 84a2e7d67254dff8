"""`cpt plan`: what a run would do, checked, with its cost. Starts and writes nothing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpt.cli.flags import Json, Overrides, result, result_json, talk

if TYPE_CHECKING:
    from cpt.plan.budget import Budget
    from cpt.plan.types import RunPlan

Plot = Annotated[bool, typer.Option("--plot", help="Draw the lr over all stages.")]


def command(overrides: Overrides = None, plot: Plot = False, json: Json = False) -> None:
    """Show what a run would do, checked, with its cost; start nothing and write nothing."""
    from cpt.config import build

    plan = build.plan(None, list(overrides or []))
    if json:
        result_json(as_json(plan))
        return
    result(text(plan, ["cpt", "run", *(overrides or [])]))
    if plot:
        result("\n" + drawing(plan))


def text(plan: RunPlan, next_command: Sequence[str] | None = None) -> str:
    """The plan for a person, with warnings unless `--quiet`."""
    from cpt.config import build
    from cpt.report.plan_text import plan_text, time_warnings

    budget = cost(plan)
    warnings = [] if talk.quiet else [*build.warnings(plan), *time_warnings(plan, budget)]
    return plan_text(plan, budget, warnings, shlex.join(next_command) if next_command else None)


def cost(plan: RunPlan) -> Budget:
    """What the plan costs on this machine, or on the nodes of its cluster."""
    from cpt.config import machine
    from cpt.launch import launcher_of
    from cpt.plan.budget import budget

    return budget(plan, machine.devices(launcher_of(plan.launcher)), machine.measured(plan))


def drawing(plan: RunPlan) -> str:
    """The lr over all stages as characters."""
    import shutil

    from cpt.report.plan_plot import lr_plot
    from cpt.schedules import curve

    curves = {n: curve(s.train.lr) for n, s in plan.stages.items() if s.train is not None and s.group is None}
    return lr_plot(plan, curves, shutil.get_terminal_size().columns)


def as_json(plan: RunPlan) -> dict[str, Any]:
    """The plan as data: the plan itself, its warnings and its estimates."""
    import dataclasses

    from cpt.base.records import to_json
    from cpt.config import build
    from cpt.report.plan_text import time_warnings

    estimates = cost(plan)
    return {
        "plan": to_json(plan),
        "warnings": [*build.warnings(plan), *time_warnings(plan, estimates)],
        "estimates": {
            **dataclasses.asdict(estimates),
            "seconds": estimates.seconds,
            "flops": estimates.flops,
        },
    }
