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


Now = Annotated[bool, typer.Option("--now", help="With a queue: do not wait for a step to end and be saved.")]


def command(run: Run, wait: Wait = False, now: Now = False) -> int:
    """Ask a run to save and stop; the jobs of a queue that wait are removed. `cpt resume` goes on from there."""
    import time

    from cpt.base.errors import UsageError
    from cpt.base.files import write_atomic
    from cpt.cli.flags import note, result
    from cpt.report.runs import find_run
    from cpt.stages import send
    from cpt.stages.attempt import STOP_FILE

    try:
        folder = find_run(run)
    except UsageError:
        jobs_left = [id for path in (Path(run), Path("runs", run)) for id in send.cancel_deleted(path.absolute())]
        if not jobs_left:
            raise
        note(f"the folder of run `{run}` is gone")
        result(f"removed from the queue: {', '.join(jobs_left)}")
        return 0
    holders = holders_of(folder)
    write_atomic(folder / STOP_FILE, "asked by `cpt cancel`\n")  # before the queue: no job may start after this
    jobs = send.cancel(folder, now=now)
    if not holders and not jobs:
        (folder / STOP_FILE).unlink(missing_ok=True)
        note(f"run `{folder.name}` is not running; nothing to stop")
        return 0
    waiting = [id for id, state in jobs.items() if state == "pending"]
    if waiting:
        result(f"removed from the queue: {', '.join(waiting)}")
    if working := [id for id, state in jobs.items() if state != "pending"]:
        result(f"asked job {', '.join(working)} to {'stop' if now else 'save and stop'}")
    elif holders:
        result(f"asked {holders[0].text()} to save and stop")
    while wait and (holders_of(folder) or send.is_in_queue(folder)):
        time.sleep(0.5)
    return 0


def holders_of(folder: Path) -> list[Holder]:
    """Who works on a run just now: on the whole, and on single stages."""
    from cpt.base.lock import live_holder

    places = [folder, *sorted((folder / "stages").glob("*"))]
    return [held for place in places if (held := live_holder(place)) is not None]
