"""`cpt logs RUN`: the steps of a stage and what its ranks wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpt.cli.cancel import Run

if TYPE_CHECKING:
    from collections.abc import Callable

Stage = Annotated[
    str | None,
    typer.Option("--stage", "-s", help="A stage; unless given the one that failed, else the one that trained last."),
]
Attempt = Annotated[int | None, typer.Option("--attempt", help="An attempt at the stage; the newest unless given.")]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank", "-r", help="What a rank printed, alone; unless given the steps and the rank that failed, or 0."
    ),
]
Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Wait for the stage's job, and go on until the attempt ends.")
]
Job = Annotated[bool, typer.Option("--job", help="What the script of the stage's newest job printed, not its ranks.")]
Lines = Annotated[int, typer.Option("--lines", "-n", help="Lines from the end; 0 = all.")]

_ASK_SECONDS = 20.0  # between two questions to the queue


def command(
    run: Run,
    stage: Stage = None,
    rank: Rank = None,
    attempt: Attempt = None,
    follow: Follow = False,
    lines: Lines = 200,
    job: Job = False,
) -> int:
    """Print the steps of a stage and what a rank printed; as long as there are none, what the queue's job printed."""
    from cpt.cli.flags import note
    from cpt.launch.outcome import log_path
    from cpt.report.runs import find_run

    folder = find_run(run)
    stage_dir = _stage_dir(folder, stage, job, follow)
    if follow and attempt is None and not job:
        _await_attempt(folder, stage_dir)
    is_new = attempt is None and follow and _runs(stage_dir)  # its ranks may have written nothing yet
    if job or (attempt is None and rank is None and not is_new and _has_no_log(stage_dir)):
        return _job_log(folder, stage_dir, follow, lines, is_asked=job)
    attempt_dir = _attempt_dir(stage_dir, attempt)
    path = _log(attempt_dir, rank)
    if is_new and path.name == "launch.log":
        path = log_path(attempt_dir, rank or 0)
    steps = _steps(folder, stage_dir.name, attempt_dir) if rank is None else None
    told = steps() if steps is not None else []
    _write("".join(told[-lines:] if lines else told))
    note(f"`{path}`")
    shown = _print(path, lines)
    if not shown and not told and not is_new:
        who = f"rank {int(path.stem.removeprefix('rank_'))}" if path.stem.startswith("rank_") else "the launcher"
        note(
            f"the log of {who} of `{stage_dir.name}` is empty: "
            f"its steps are in `cpt status {folder.name}` and `{attempt_dir / 'events.jsonl'}`"
        )
    if follow:
        _follow(path, shown, stage_dir, attempt_dir, steps)
    return 0


def _steps(folder: Path, stage: str, attempt_dir: Path) -> Callable[[], list[str]]:
    """Gives the lines of an attempt's events that are new, as `cpt run` shows them where nothing moves."""
    import io

    from cpt.report.terminal import Lines
    from cpt.stages.attempt import read_plan
    from cpt.stages.follow import Tail

    tail = Tail(attempt_dir / "events.jsonl")
    stream = io.StringIO()
    display = Lines(read_plan(folder), stream)

    def new() -> list[str]:
        for event in tail.new():
            display.event(stage, event)
        lines = stream.getvalue().splitlines(keepends=True)
        stream.seek(0)
        stream.truncate()
        return lines

    return new


def _runs(stage_dir: Path) -> bool:
    """Whether somebody works on an attempt at a stage."""
    from cpt.base.lock import live_holder
    from cpt.stages import state

    return state.read(stage_dir).status == state.RUNNING and live_holder(stage_dir) is not None


def _await_attempt(folder: Path, stage_dir: Path) -> None:
    """Wait while a stage's job is in the queue and nobody works on it."""
    import time

    from cpt.cli.flags import note
    from cpt.launch import batch, launcher_of
    from cpt.stages import state
    from cpt.stages.attempt import read_plan

    jobs = [job.id for job in batch.read_sent(folder).get(stage_dir.name, ()) if job.id]
    launcher = launcher_of(read_plan(folder).launcher)
    before = state.read(stage_dir)
    if not jobs or not isinstance(launcher, batch.Batch) or before.status == state.DONE:
        return
    asked = None
    while not _runs(stage_dir) and state.read(stage_dir) == before:
        if asked is None or time.monotonic() - asked > _ASK_SECONDS:
            found = launcher.ask(jobs)
            waiting = [id for id in jobs if id in found and found[id].state in (*batch.ACTIVE, batch.UNKNOWN)]
            if not waiting:
                return
            if asked is None:
                note(f"waits until job {waiting[0]} of `{stage_dir.name}` starts")
            asked = time.monotonic()
        time.sleep(0.5)


def _has_no_log(stage_dir: Path) -> bool:
    """Whether a stage that was sent to a queue has nothing of its ranks yet."""
    from cpt.launch.batch import read_sent
    from cpt.stages.attempt import attempts

    if stage_dir.name not in read_sent(stage_dir.parents[1]):
        return False
    found = attempts(stage_dir)
    return not found or not any((found[-1] / "logs").glob("*.log"))


def _job_log(folder: Path, stage_dir: Path, follow: bool, lines: int, *, is_asked: bool) -> int:
    """Print what the script of a stage's newest job printed.

    Args:
        is_asked: by `--job`; else it stands in for the log of a rank.
    """
    from cpt.base.errors import UsageError
    from cpt.cli.flags import note
    from cpt.launch.batch import read_sent

    jobs = [job for job in read_sent(folder).get(stage_dir.name, ()) if job.id]
    if not jobs:
        raise UsageError(f"stage `{stage_dir.name}` was not sent to a queue", "without `--job`: the log of its ranks")
    written = [job for job in jobs if Path(job.log).is_file()]
    newest = (written or jobs)[-1]
    path = Path(newest.log)
    why = "" if is_asked else f", as no rank of `{stage_dir.name}` has written anything yet"
    note(f"`{path}`: what the script of job {newest.id} printed{why}")
    shown = _print(path, lines)
    if not shown:
        note(f"job {newest.id} of `{stage_dir.name}` has printed nothing: `cpt status {folder.name}` says where it is")
    if follow and path.is_file():
        _follow(path, shown, stage_dir, None, None)
    return 0


def _stage_dir(folder: Path, stage: str | None, job: bool, follow: bool) -> Path:
    """The folder of the stage that a person means.

    Args:
        job: what jobs printed is wanted, also of stages that have not run.
        follow: of stages that were sent the one that comes next is wanted rather than the one that was last.
    """
    from cpt.base import lock
    from cpt.base.errors import UsageError
    from cpt.base.registry import unknown
    from cpt.launch.batch import read_sent
    from cpt.stages import state
    from cpt.stages.attempt import attempts, read_plan

    plan = read_plan(folder)
    names = list(plan.stages)
    if stage is not None and stage not in names:
        raise unknown("stage", stage, names)
    ran = [n for n in names if attempts(folder / "stages" / n)]
    sent = [n for n in names if n in read_sent(folder)]
    if stage in sent:
        return folder / "stages" / stage
    if sent and not ran:
        printed = [n for n in sent if any(Path(j.log).is_file() for j in read_sent(folder)[n])]
        return folder / "stages" / (printed[-1] if printed else sent[0])
    if job:
        ran = [n for n in ran if n in sent] or ran
    if not ran:
        raise UsageError(f"no stage of run `{folder.name}` has run yet")
    if stage is not None:
        return folder / "stages" / stage

    places = {n: folder / "stages" / n for n in ran}
    running = [n for n in ran if lock.live_holder(places[n]) is not None]
    failed = [n for n in ran if state.read(places[n]).status == state.FAILED]
    if follow and not running and not failed:
        coming = [n for n in sent if state.read(folder / "stages" / n).status != state.DONE]
        if coming:
            return folder / "stages" / coming[0]
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


def _print(path: Path, lines: int) -> int:
    """Print the last lines; how many bytes the file has."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return 0
    kept = data.decode(errors="replace").splitlines(keepends=True)
    _write("".join(kept[-lines:] if lines else kept))
    return len(data)


def _write(text: str) -> None:
    import sys

    sys.stdout.write(text)
    sys.stdout.flush()


def _follow(
    path: Path, position: int, stage_dir: Path, attempt_dir: Path | None, steps: Callable[[], list[str]] | None
) -> None:
    """Print what is new until nobody works on the attempt, or on the stage, any more.

    Args:
        path: of the log; it may come later.
        position: up to where it was shown [bytes].
        steps: gives new lines of the attempt's steps.
    """
    import time

    from cpt.base.lock import live_holder

    while True:
        failed = attempt_dir is not None and (attempt_dir / "failure.json").exists()
        working = live_holder(stage_dir) is not None and not failed
        data = b""
        if path.is_file():
            with open(path, "rb") as file:
                file.seek(position)
                data = file.read()
        position += len(data)
        if text := "".join(steps() if steps is not None else []) + data.decode(errors="replace"):
            _write(text)
        elif not working:
            return
        time.sleep(0.2)
