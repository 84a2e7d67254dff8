"""`cpt cancel RUN`: ask whoever works on a run to save and stop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cpt.base.lock import Holder

Run = Annotated[
    str, typer.Argument(metavar="RUN", help="Folder of a run, or its name under `runs`.", show_default=False)
]
Wait = Annotated[bool, typer.Option("--wait", help="Return only when it has stopped.")]


def command(run: Run, wait: Wait = False) -> int:
    """Ask a run to save and stop. The command that started it ends with exit code 75 and goes on from there."""
    import time

    from cpt.base.files import write_atomic
    from cpt.cli.flags import note, result
    from cpt.report.runs import find_run
    from cpt.stages.attempt import STOP_FILE

    folder = find_run(run)
    holders = holders_of(folder)
    if not holders:
        note(f"run `{folder.name}` is not running; nothing to stop")
        return 0
    write_atomic(folder / STOP_FILE, "asked by `cpt cancel`\n")
    result(f"asked {holders[0].text()} to save and stop")
    while wait and holders_of(folder):
        time.sleep(0.5)
    return 0


def holders_of(folder: Path) -> list[Holder]:
    """Who works on a run just now: on the whole, and on single stages."""
    from cpt.base.lock import live_holder

    places = [folder, *sorted((folder / "stages").glob("*"))]
    return [held for place in places if (held := live_holder(place)) is not None]
