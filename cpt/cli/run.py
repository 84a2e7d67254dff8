"""`cpt run`: do what a recipe says, or go on with what is not done yet."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpt.cli.flags import Json, Overrides, Yes

if TYPE_CHECKING:
    from cpt.base.events import Event
    from cpt.plan.types import RunPlan
    from cpt.report.terminal import Display
    from cpt.report.wandb import WandbSink
    from cpt.stages.run import Rebuild, Result

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and start nothing, as `cpt plan` does.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start again in a new folder; the old one stays as it is.")]
Accept = Annotated[bool, typer.Option("--accept-changes", help="Go on with unfinished stages under a changed plan.")]
Wait = Annotated[bool, typer.Option("--wait", help="With a queue: return only when its jobs have ended.")]
Every = Annotated[int | None, typer.Option("--every", min=1, help="Steps between two lines when not in a terminal.")]


def command(
    overrides: Overrides = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    accept_changes: Accept = False,
    yes: Yes = False,
    every: Every = None,
    wait: Wait = False,
    json: Json = False,
) -> int:
    """Do what a recipe says, or go on with what is not done yet; the same command goes on after any stop."""
    from cpt.config import build
    from cpt.config.compose import compose

    if dry_run:
        from cpt.cli import plan

        plan.command(overrides=overrides, json=json)
        return 0
    composed = compose(list(overrides or []))  # once: a recipe that is edited meanwhile changes nothing
    return go(
        lambda laws: build.from_composed(composed, laws=laws),
        fresh=fresh,
        accept_changes=accept_changes,
        yes=yes,
        every=every,
        wait=wait,
        json=json,
    )


def go(
    make: Rebuild,
    *,
    fresh: bool = False,
    accept_changes: bool = False,
    yes: bool = False,
    every: int | None = None,
    wait: bool = False,
    json: bool = False,
    finish: Callable[[Result, Screen, bool], int] | None = None,
) -> int:
    """Do what a plan says, on the screen.

    Args:
        make: makes the plan.
        wait: return only when the jobs of a queue have ended.
        finish: says how it ended; None = with the table, the report and the next command.
    """
    import shlex

    from cpt.base.errors import Interrupted
    from cpt.cli.flags import talk
    from cpt.stages.run import Settings, run
    from cpt.stages.send import wait_for_jobs

    first = make(None)
    if not json and not talk.quiet:
        _show_plan(first)
    if not yes and not _agreed(first):
        return 0
    settings = Settings(
        command=["cpt", *sys.argv[1:]],
        cwd=Path.cwd(),
        environ=os.environ,
        fresh=fresh,
        accept_changes=accept_changes,
        wait=wait,
    )
    screen = Screen(quiet=talk.quiet, every=every)
    result: Result | None = None
    try:
        result = run(first, make, settings, screen.tell, screen.started)
        if result.sent and wait:
            result.error = wait_for_jobs(result.run_dir, result.plan, screen.line)
    except KeyboardInterrupt:
        if result is None:
            raise
        name = shlex.quote(os.path.relpath(result.run_dir))
        raise Interrupted(
            f"the jobs of `{result.run_dir.name}` go on in the queue",
            f"`cpt resume {name} --wait` waits for them again, `cpt status {name}` shows how far they are, "
            f"`cpt cancel {name}` saves and stops them",
        ) from None
    finally:
        screen.close()
    if result.sent and not wait and result.error is None:
        return _sent(result, json)
    return (finish or _finish)(result, screen, json)


class Screen:
    """Where the run's events become text on stderr."""

    def __init__(self, quiet: bool, every: int | None) -> None:
        self.quiet, self.every = quiet, every
        self.display: Display | None = None
        self.wandb: WandbSink | None = None
        self.ended: set[str] = set()  # stages whose end the display has shown

    def started(self, result: Result) -> None:
        """The plan is final and the run folder is ours."""
        from cpt.report import wandb
        from cpt.report.terminal import make_display

        self.wandb = wandb.start(result.plan, result.run_dir)
        self.display = make_display(result.plan, sys.stderr, sys.stderr.isatty(), every=self.every, quiet=self.quiet)
        if not self.quiet:
            self.line(f"run     {result.run_dir}")

    def tell(self, event: Event) -> None:
        """Show one event."""
        kind, stage = event.get("kind"), str(event.get("stage", ""))
        if kind == "note":
            self.line(f"note: {event.get('text')}")
        elif kind == "stage" and stage in self.ended and event.get("status") == "done":
            pass  # the display has just said so, with the step and the time
        elif kind == "job":
            after = f", after {', '.join(event['after'])}" if event.get("after") else ""
            self.line(f"{stage}  sent as job {event.get('id')}{after}")
        elif kind == "stage":
            self.line(f"{stage}  {_status(event)}")
        elif kind == "data":
            self._data(event)
        elif self.display is not None and "attempt" in event:
            self.display.event(stage, event)
            if kind == "stage_end":
                self.ended.add(stage)

    def line(self, text: str) -> None:
        """One line, unless `--quiet`."""
        if self.quiet:
            return
        if self.display is not None:
            self.display.note(text)
            return
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Leave the last state on the screen; wait a little for wandb to send the rest."""
        from cpt.report.wandb import LATER

        if self.display is not None:
            self.display.close()
        problem = self.wandb.close() if self.wandb is not None else None
        if problem:
            self.line(f"warning: {problem}; {LATER}")

    def _data(self, event: Event) -> None:
        """A long preparation says how far it is: in a terminal on one line that is rewritten."""
        from cpt.base.units import show_bytes, show_count

        if self.quiet:
            return
        name = event.get("source")
        if event.get("done") and event["seconds"] < 0.5 and self.display is None:
            return  # it was there already
        if event.get("done"):
            clear = "\r\x1b[K" if sys.stderr.isatty() else ""
            self.line(f"{clear}data    {name}  {show_count(event['tokens'])} tokens")
        elif sys.stderr.isatty():
            read, total = show_bytes(event["bytes"]), show_bytes(event["total_bytes"])
            sys.stderr.write(f"\r\x1b[Kdata    {name}  {read} of {total}, {show_count(event['tokens'])} tokens")
            sys.stderr.flush()


def _status(event: Event) -> str:
    status, reason = event.get("status"), event.get("reason")
    if status == "running":
        return f"runs: {reason}"
    if status == "pending":
        return f"goes to the queue: {reason}"
    return f"{status}: {reason}" if reason and not str(reason).startswith(str(status)) else str(reason or status)


def _show_plan(plan: RunPlan) -> None:
    from cpt.cli import plan as plan_command

    sys.stderr.write(plan_command.text(plan))


def _agreed(plan: RunPlan) -> bool:
    """Ask once about a run that is estimated to last longer than `ask_above`. Without a terminal nobody is asked."""
    from cpt.base.units import parse_duration, show_duration
    from cpt.cli import plan as plan_command
    from cpt.cli.flags import note

    limit = plan.config.get("ask_above")
    if limit is None:
        return True
    seconds = plan_command.cost(plan).seconds
    if seconds is None or seconds <= parse_duration(limit):
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        note(f"about {show_duration(seconds)}, more than `ask_above`; there is no terminal to ask in, so it starts")
        return True
    sys.stderr.write(f"about {show_duration(seconds)}: start? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _finish(result: Result, screen: Screen, json: bool) -> int:
    """The table, the report and the next command; then the error, if the run ended with one."""
    import shlex

    from cpt.base.errors import DONE, GUARD
    from cpt.cli.flags import result as say
    from cpt.cli.flags import result_json
    from cpt.report import wandb

    page, laws = _report(result.run_dir), _law_pages(result.run_dir)
    if json:
        result_json(_as_json(result, page))
    else:
        measured = result.exit_code in (DONE, GUARD)
        if measured and (table := _table(result.run_dir)) is not None:
            say(table)
        if page is not None:
            say(f"report  {page}")
        for law in laws:
            say(f"law     {law}")
        for line in _law_lines(result.run_dir):
            say(f"law     {line}")
        if wandb.is_only_here(result.run_dir):
            say(f"wandb   `cpt sync {shlex.quote(os.path.relpath(result.run_dir))}` sends what was written offline")
    if result.error is not None:
        raise result.error
    if not json:
        say(f"next    {_next(result)}")
    return 0


def _sent(result: Result, json: bool) -> int:
    """The jobs that do the work now, and how to look after them."""
    import shlex

    from cpt.cli.flags import result as say
    from cpt.cli.flags import result_json

    if json:
        result_json(_as_json(result, None))
        return 0
    jobs = [job for jobs in result.sent.values() for job in jobs]
    name = shlex.quote(os.path.relpath(result.run_dir))
    say(f"sent    {len(jobs):,} jobs: {', '.join(dict.fromkeys(job.id for job in jobs))}")
    say(f"next    cpt status {name}")
    return 0


def _as_json(result: Result, page: Path | None) -> dict[str, Any]:
    from cpt.stages import attempt, state

    stages = {}
    for name in result.plan.stages:
        found = state.read(attempt.stage_dir(result.run_dir, name))
        stages[name] = {"status": found.status, "step": found.step, "reason": found.reason}
    return {
        "run": str(result.run_dir),
        "plan_id": result.plan.id,
        "exit_code": result.exit_code,
        "error": result.error.message if result.error else None,
        "stages": stages,
        "report": str(page) if page else None,
        "jobs": {name: [job.id for job in jobs] for name, jobs in result.sent.items()},
    }


def _report(run_dir: Path) -> Path | None:
    """Write the report page. A page that cannot be made must not hide how the run ended."""
    from cpt.cli.flags import warning

    try:
        from cpt.report import page

        return page.write_page(run_dir)
    except Exception as error:
        warning(f"the report could not be written: {type(error).__name__}: {error}")
        return None


def _law_pages(run_dir: Path) -> list[Path]:
    """The page of each law; like the report, one that cannot be made must not hide how the run ended."""
    from cpt.cli.flags import warning

    try:
        from cpt.report import law_stage

        return law_stage.write_pages(run_dir)
    except Exception as error:
        warning(f"the page of a law could not be written: {type(error).__name__}: {error}")
        return []


def _law_lines(run_dir: Path) -> list[str]:
    """Predicted against measured losses of each law whose target stage has ended."""
    try:
        from cpt.report import law_outcome
        from cpt.report.history import read_run

        return [line for one in law_outcome.outcomes(read_run(run_dir)) if (line := law_outcome.line(one))]
    except Exception:  # the report has told what is wrong
        return []


def _table(run_dir: Path) -> str | None:
    from cpt.cli.flags import warning
    from cpt.report.table import final_table

    try:
        return final_table(run_dir)
    except Exception as error:
        warning(f"what was gained and forgotten could not be counted: {type(error).__name__}: {error}")
        return None


def _next(result: Result) -> str:
    """A command worth trying next: let the last model speak."""
    import shlex

    trained = [n for n, stage in result.plan.stages.items() if stage.kind == "train" and stage.group is None]
    if not trained:
        return f"cpt status {shlex.quote(os.path.relpath(result.run_dir))}"
    folder = os.path.relpath(result.run_dir / "stages" / trained[-1])
    return f'cpt sample {shlex.quote(folder)} "The"'
