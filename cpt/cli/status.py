"""`cpt status [RUN]`: how far a run is, or which runs there are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cpt.cli.flags import Json, result, result_json

Run = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]", help="Folder of a run, or its name under `runs`; without it all runs.", show_default=False
    ),
]


def command(run: Run = None, json: Json = False) -> None:
    """How far a run is: each stage with its state, step, tokens, loss, lr, speed, time left, and who works on it.

    Without RUN: the runs under `runs`, newest first.
    """
    import time

    from cpt.report.runs import find_run
    from cpt.report.status import read_status, status_json, status_text

    if run is None:
        _all(json)
        return
    status = read_status(find_run(run))
    if json:
        result_json(status_json(status))
    else:
        result(status_text(status, time.time()))


def _all(json: bool) -> None:
    import time
    from dataclasses import asdict

    from cpt.cli.flags import note
    from cpt.report.runs import hints
    from cpt.report.status import overview, overview_text

    runs = Path("runs")
    lines = overview(runs)
    if json:
        result_json([asdict(line) for line in lines])
    elif lines:
        result(overview_text(lines, time.time()))
    else:
        note(hints("", runs)[0])
