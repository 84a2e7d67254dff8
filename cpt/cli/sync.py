"""`cpt sync RUN`: send a run to wandb later, also from another machine."""

from __future__ import annotations

from typing import Annotated

import typer

from cpt.cli.flags import Json, note, result, result_json

Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, or its name under `runs`.")]


def command(run: Run, json: Json = False) -> None:
    """Send what was not sent yet of a run to wandb: made from its event files, also of a run that never used wandb."""
    from cpt.base.errors import EnvironmentProblem
    from cpt.report import wandb
    from cpt.report.runs import find_run
    from cpt.stages.attempt import read_plan

    folder = find_run(run)
    plan = read_plan(folder)
    problem = wandb.sync(folder, note)
    if problem:
        raise EnvironmentProblem(
            problem, f"the log is `{folder / wandb.FOLDER / wandb.LOG}`", "`wandb login` sets the key"
        )
    said = wandb.read_state(folder / wandb.FOLDER)
    if json:
        result_json({"run": plan.name, "wandb_id": said.get("id")})
    else:
        result(f"`{plan.name}` is sent; its wandb id is {said.get('id')}")
