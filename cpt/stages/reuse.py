"""What other runs, and this run's earlier plan, have to say about a stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpt.base.errors import CptError
from cpt.plan.types import RunPlan, StagePlan
from cpt.stages import attempt as attempts
from cpt.stages import decide, parents, state


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


def nearest_run(plan: RunPlan, stage: StagePlan, run_dir: Path) -> tuple[str | None, list[str]]:
    """The newest other run of the same recipe that has this stage, and how its stage differs from ours."""
    newest: tuple[float, str, StagePlan] | None = None
    for folder in Path(plan.runs).glob("*"):
        file = folder / "plan.json"
        if folder == run_dir or not file.is_file():
            continue
        try:
            other = attempts.read_plan(folder)
        except CptError:
            continue
        if other.recipe == plan.recipe and stage.name in other.stages:
            when = file.stat().st_mtime
            if newest is None or when > newest[0]:
                newest = (when, folder.name, other.stages[stage.name])
    if newest is None:
        return None, []
    return newest[1], decide.stage_changes(newest[2], stage)


def changes_by_stage(plan: RunPlan, run_dir: Path) -> dict[str, list[str]]:
    """How each stage of this folder's earlier plan differs from the new one; empty when there is no earlier plan."""
    if not (run_dir / "plan.json").exists():
        return {}
    old = attempts.read_plan(run_dir)
    pairs = ((name, old.stages.get(name), stage) for name, stage in plan.stages.items())
    return {name: decide.stage_changes(before, after) for name, before, after in pairs if before is not None}


def plan_changes(old: RunPlan, new: RunPlan) -> Sequence[str]:
    """How two plans differ, one line each."""
    lines = []
    for name in dict.fromkeys([*old.stages, *new.stages]):
        before, after = old.stages.get(name), new.stages.get(name)
        if before is None or after is None:
            lines.append(f"stage `{name}` is {'new' if before is None else 'no longer there'}")
        elif before.fingerprint != after.fingerprint:
            changes = decide.stage_changes(before, after)
            lines.append(f"stage `{name}`: {'; '.join(changes) or 'what it is made from changed'}")
    for name in dict.fromkeys([*old.sources, *new.sources]):
        one, two = old.sources.get(name), new.sources.get(name)
        if one and two and one.facts and two.facts and one.facts.content_hash != two.facts.content_hash:
            lines.append(f"source `{name}` has other content")
    if old.base.identity != new.base.identity:
        lines.append("the base is another checkpoint")
    return lines
