"""What other runs, and this run's earlier plan, have to say about a stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpt.base.errors import CptError
from cpt.plan.types import RunPlan, StagePlan
from cpt.stages import attempt as attempts
from cpt.stages import decide, parents, state

MOST = 5  # values; a run that differs in more has nothing to do with this one


def find(plan: RunPlan, stage: StagePlan, run_dir: Path) -> Path | None:
    """The folder of a finished stage of another run with an equal fingerprint and everything that it should leave."""
    if not stage.fingerprint:
        return None
    for folder in sorted(Path(plan.runs).glob("*/stages/*")):
        if folder.parent.parent == run_dir or not (folder / "state.json").is_file():
            continue
        try:
            found = state.read(folder)
        except CptError:
            continue  # another run's damage is not this run's problem
        is_own_work = found.status == state.DONE and found.reference is None
        if is_own_work and found.fingerprint == stage.fingerprint and parents.missing_result(stage, folder) is None:
            return folder
    return None


@dataclass(frozen=True)
class Nearest:
    """The newest other run of the same recipe that has begun a stage, and how its stage differs from ours."""

    run: str | None = None
    changed: tuple[str, ...] = ()
    parent_changed: bool = False


def nearest_run(plan: RunPlan, stage: StagePlan, run_dir: Path) -> Nearest:
    """What to compare a stage with that never ran here: a run of the same recipe that differs in few values."""
    newest: tuple[float, str, RunPlan] | None = None
    for folder in Path(plan.runs).glob("*"):
        file = folder / "plan.json"
        if folder == run_dir or not file.is_file():
            continue
        try:
            other = attempts.read_plan(folder)
            began = state.read(attempts.stage_dir(folder, stage.name)).status != state.PENDING
        except CptError:
            continue
        if began and plan.recipe and other.recipe == plan.recipe and stage.name in other.stages:
            when = file.stat().st_mtime
            if newest is None or when > newest[0]:
                newest = (when, folder.name, other)
    if newest is None:
        return Nearest()
    _, name, other = newest
    changed = tuple(decide.changes(other, plan, stage.name))
    if len(changed) > MOST:
        return Nearest()
    before, now = other.stages.get(stage.parent or ""), plan.stages.get(stage.parent or "")
    parent_changed = before is not None and now is not None and before.fingerprint != now.fingerprint
    return Nearest(name, changed, parent_changed)


def changes_by_stage(plan: RunPlan, run_dir: Path) -> dict[str, list[str]]:
    """How each stage of this folder's earlier plan differs from the new one; empty when there is no earlier plan."""
    if not (run_dir / "plan.json").exists():
        return {}
    old = attempts.read_plan(run_dir)
    return {name: decide.changes(old, plan, name) for name in plan.stages if name in old.stages}
