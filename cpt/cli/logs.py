"""`cpt logs RUN`: what the ranks wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cpt.cli.cancel import Run

Stage = Annotated[
    str | None,
    typer.Option("--stage", "-s", help="A stage; unless given the one that failed, else the one that trained last."),
]
Attempt = Annotated[int | None, typer.Option("--attempt", help="An attempt at the stage; the newest unless given.")]
Rank = Annotated[int | None, typer.Option("--rank", "-r", help="A rank; unless given the one that failed first, or 0.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written until the attempt ends.")]
Lines = Annotated[int, typer.Option("--lines", "-n", help="Lines from the end; 0 = all.")]


def command(
    run: Run,
    stage: Stage = None,
    rank: Rank = None,
    attempt: Attempt = None,
    follow: Follow = False,
    lines: Lines = 200,
) -> int:
    """Print the log of a rank."""
    from cpt.cli.flags import note
    from cpt.report.runs import find_run

    folder = find_run(run)
    stage_dir = _stage_dir(folder, stage)
    attempt_dir = _attempt_dir(stage_dir, attempt)
    path = _log(attempt_dir, rank)
    note(f"`{path}`")
    if not _print(path, lines):
        who = f"rank {int(path.stem.removeprefix('rank_'))}" if path.stem.startswith("rank_") else "the launcher"
        note(
            f"the log of {who} of `{stage_dir.name}` is empty: "
            f"its steps are in `cpt status {folder.name}` and `{attempt_dir / 'events.jsonl'}`"
        )
    if follow:
        _follow(path, stage_dir, attempt_dir)
    return 0


def _stage_dir(folder: Path, stage: str | None) -> Path:
    from cpt.base import lock
    from cpt.base.errors import UsageError
    from cpt.base.registry import unknown
    from cpt.stages import state
    from cpt.stages.attempt import attempts, read_plan

    plan = read_plan(folder)
    names = list(plan.stages)
    if stage is not None and stage not in names:
        raise unknown("stage", stage, names)
    ran = [n for n in names if attempts(folder / "stages" / n)]
    if not ran:
        raise UsageError(f"no stage of run `{folder.name}` has run yet")
    if stage is not None:
        return folder / "stages" / stage

    places = {n: folder / "stages" / n for n in ran}
    running = [n for n in ran if lock.live_holder(places[n]) is not None]
    failed = [n for n in ran if state.read(places[n]).status == state.FAILED]
    trained = [n for n in ran if plan.stages[n].train is not None]
    return places[(running or failed or trained or ran)[-1]]


def _attempt_dir(stage_dir: Path, number: int | None) -> Path:
    from cpt.base.errors import UsageError
    from cpt.stages.attempt import attempts

    found = attempts(stage_dir)
    if not found:
        raise UsageError(f"stage `{stage_dir.name}` has not run yet")
    if number is None:
        return found[-1]
    wanted = stage_dir / f"attempt_{number}"
    if wanted not in found:
        raise UsageError(f"stage `{stage_dir.name}` has no attempt {number}, the newest is {found[-1].name[8:]}")
    return wanted


def _log(attempt_dir: Path, rank: int | None) -> Path:
    from cpt.base.errors import UsageError
    from cpt.base.files import read_json
    from cpt.launch.outcome import log_path

    if rank is None:
        failure = attempt_dir / "failure.json"
        rank = (read_json(failure).get("rank") if failure.is_file() else None) or 0
    path = log_path(attempt_dir, rank)
    if path.is_file():
        return path
    ranks = sorted(int(p.stem[5:]) for p in path.parent.glob("rank_*.log"))
    if ranks:
        raise UsageError(f"there is no log of rank {rank}; ranks are {ranks[0]} to {ranks[-1]}")
    return path.parent / "launch.log"


def _print(path: Path, lines: int) -> bool:
    """Print the last lines; whether there were any."""
    import sys

    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return False
    kept = text.splitlines(keepends=True)
    sys.stdout.write("".join(kept[-lines:] if lines else kept))
    sys.stdout.flush()
    return bool(kept)


def _follow(path: Path, stage_dir: Path, attempt_dir: Path) -> None:
    """Copy new bytes until nobody works on the attempt any more."""
    import sys
    import time

    from cpt.base.lock import live_holder

    with open(path, "rb") as file:
        file.seek(0, 2)
        while True:
            working = live_holder(stage_dir) is not None and not (attempt_dir / "failure.json").exists()
            data = file.read()
            if data:
                sys.stdout.write(data.decode(errors="replace"))
                sys.stdout.flush()
            elif not working:
                return
            time.sleep(0.2)
