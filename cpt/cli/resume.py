"""`cpt resume RUN`: go on with a run by the command that began it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpt.cli.cancel import Run
from cpt.cli.flags import Json, Yes

if TYPE_CHECKING:
    from cpt.base.errors import CptError
    from cpt.stages.run import Rebuild

Accept = Annotated[bool, typer.Option("--accept-changes", help="Go on with unfinished stages under a changed plan.")]
Wait = Annotated[bool, typer.Option("--wait", help="With a queue: return only when its jobs have ended.")]
PlanOnly = Annotated[bool, typer.Option("--plan-only", hidden=True)]


def command(
    run: Run,
    accept_changes: Accept = False,
    yes: Yes = False,
    wait: Wait = False,
    json: Json = False,
    plan_only: PlanOnly = False,
) -> int:
    """Go on with what is not done of a run: the command that began it, again, where it was typed."""
    import os

    from cpt.base.errors import CptError
    from cpt.cli import run as run_command
    from cpt.report.runs import find_run

    folder = find_run(run)
    words, cwd = began_by(folder)
    os.chdir(cwd)
    make = _rebuild(words, folder)
    if plan_only:
        return _take_laws(folder, make)
    try:
        return run_command.go(make, accept_changes=accept_changes, yes=yes, wait=wait, json=json)
    except CptError as error:
        _name_fresh(error, words)
        raise


def _name_fresh(error: CptError, words: list[str]) -> None:
    """`--fresh` is an option of the run's own command, and not of this one."""
    import shlex

    command = shlex.join(["cpt", *words, *([] if "--fresh" in words else ["--fresh"])])
    for one in (error, *error.more):
        one.hints = tuple(hint.replace("`--fresh`", f"`{command}`") for hint in one.hints)


def began_by(folder: Path) -> tuple[list[str], Path]:
    """The words of the command that began a run, after `cpt`, and the folder where it was typed.

    Raises:
        UsageError: the run's records do not say.
    """
    import shlex

    from cpt.base.errors import UsageError
    from cpt.base.files import read_json

    try:
        lines = (folder / "command.txt").read_text(encoding="utf-8").splitlines()
        typed = [shlex.split(line) for line in lines if line and not line.startswith("#")]
        cwd = Path(read_json(folder / "environment.json")["cwd"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"`{folder}` does not say how it was begun: {error}", "type its command again") from None
    found = [words[1:] for words in typed if words[:1] == ["cpt"] and words[1:2] not in ([], ["resume"])]
    if not found:
        raise UsageError(f"`{folder / 'command.txt'}` holds no command", "type the run's command again")
    if found[-1][0] != "run":
        raise UsageError(f"`{folder.name}` was begun by `cpt {shlex.join(found[-1])}`", "type that again")
    if not cwd.is_dir():
        raise UsageError(f"`{cwd}`, where run `{folder.name}` was begun, is gone")
    return found[-1], cwd


def _rebuild(words: list[str], folder: Path) -> Rebuild:
    from cpt.config import build
    from cpt.config.compose import compose

    keys = [w for before, w in pairwise(words) if not w.startswith("-") and before != "--every"]
    keys = [k for k in keys if k.partition("=")[0] not in ("name", "runs")]
    composed = compose([*keys, f"name={_text(folder.name)}", f"runs={_text(str(folder.parent))}"])
    return lambda laws: build.from_composed(composed, laws=laws)


def _text(value: str) -> str:
    """A text as a value of an override."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _take_laws(folder: Path, make: Rebuild) -> int:
    """Write the plan anew with what the run's laws give: in the batch job of a law, for the jobs behind it."""
    from cpt.stages import state
    from cpt.stages.attempt import read_plan, stage_dir
    from cpt.stages.run import plan_with_laws

    plan = read_plan(folder)
    laws = {
        n: state.home(stage_dir(folder, n))
        for n, s in plan.stages.items()
        if s.kind == "law" and state.read(stage_dir(folder, n)).status == state.DONE
    }
    plan_with_laws(plan, folder, make, laws, f"cpt resume {folder.name}")
    return 0
