"""`cpt cancel RUN`: ask whoever works on a run to save and stop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or its folder.", show_default=False)]
Wait = Annotated[bool, typer.Option("--wait", help="Return only when it has stopped.")]
Runs = Annotated[str, typer.Option("--runs", help="Folder that holds the runs.")]


def command(run: Run, wait: Wait = False, runs: Runs = "runs") -> int:
    """Ask a run to save and stop. The command that started it ends with exit code 75 and goes on from there."""
    import time

    from cpt.base.files import write_atomic
    from cpt.cli.flags import note, result
    from cpt.stages.attempt import STOP_FILE

    folder = find_run(run, runs)
    holders = holders_of(folder)
    if not holders:
        note(f"run `{folder.name}` is not running; nothing to stop")
        return 0
    write_atomic(folder / STOP_FILE, "asked by `cpt cancel`\n")
    result(f"asked {holders[0].text()} to save and stop")
    while wait and holders_of(folder):
        time.sleep(0.5)
    return 0


def find_run(run: str, runs: str) -> Path:
    """The folder of a run that a person named, by name or by path.

    Raises:
        UsageError: there is none; names the nearest one.
    """
    from cpt.base.errors import UsageError
    from cpt.base.registry import unknown

    for folder in (Path(run), Path(runs) / run):
        if (folder / "plan.json").is_file():
            return folder.resolve()
    known = [p.parent.name for p in Path(runs).glob("*/plan.json")]
    if not known:
        raise UsageError(f"there is no run `{run}`, and none at all in `{runs}`", "give the folder of a run")
    raise unknown("run", run, known)


def holders_of(folder: Path) -> list:  # type: ignore[type-arg]
    """Who works on a run just now: on the whole, and on single stages."""
    from cpt.stages.lock import live_holder

    places = [folder, *sorted((folder / "stages").glob("*"))]
    return [held for place in places if (held := live_holder(place)) is not None]
