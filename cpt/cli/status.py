"""`cpt status RUN`: how far a run is."""

from __future__ import annotations

from typing import Annotated

import typer

from cpt.cli.flags import Json, result, result_json

Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, or its name under `runs`.")]


def command(run: Run, json: Json = False) -> None:
    """How far a run is: each stage with its state, step, tokens, loss, lr, speed, time left, and who works on it."""
    import time

    from cpt.report.runs import find_run
    from cpt.report.status import read_status, status_json, status_text

    status = read_status(find_run(run))
    if json:
        result_json(status_json(status))
    else:
        result(status_text(status, time.time()))
