"""`cpt report RUN`: one page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cpt.cli.flags import Json, note, result, result_json

Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, or its name under `runs`.")]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Where to write the page; else `report.html` in the run's folder.")
]


def command(run: Run, out: Out = None, json: Json = False) -> None:
    """Write one self-contained HTML page about a run, finished or not, from its plan and events."""
    from cpt.report import law_outcome, law_stage
    from cpt.report.history import read_run
    from cpt.report.page import write_page
    from cpt.report.runs import find_run
    from cpt.report.table import final_table

    folder = find_run(run)
    path = write_page(folder, out)
    laws = law_stage.write_pages(folder)
    if json:
        from cpt.report.facts import report_json

        result_json({"page": str(path), "laws": [str(page) for page in laws], **report_json(folder)})
        return
    result(final_table(folder))
    for one in law_outcome.outcomes(read_run(folder)):
        if line := law_outcome.line(one):
            result(f"law {line}")
    note(f"the page is `{path}`")
    for page in laws:
        note(f"the page of a law is `{page}`")
