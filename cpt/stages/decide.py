"""What is done about each stage of a run, and why: pure rules over what was found on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.base.records import to_json
from cpt.plan.diff import diff, shown
from cpt.plan.types import RunPlan, StagePlan
from cpt.stages import state
from cpt.stages.state import State

KEEP, REUSE, RUN, REFUSE = "keep", "reuse", "run", "refuse"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What lies in a stage's folder.

    Args:
        missing: what a finished stage should have left and has not; None when all is there.
        step: step of the newest whole checkpoint; None when there is none.
        alike: stage folder of another run that is finished with an equal fingerprint.
        changed: how the stage differs from its last run, e.g. "`mixture.web` 0.3 → 0.4".
        than: the run that `changed` compares with, when it is not this one.
        parent_changed: the stage is the same as there, but what it starts from is not.
    """

    state: State
    missing: str | None = None
    step: int | None = None
    alike: Path | None = None
    changed: Sequence[str] = ()
    than: str | None = None
    parent_changed: bool = False


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is done about one stage. `why` completes the sentence "stage `x`: ..."."""

    stage: str
    action: str  # keep | reuse | run | refuse
    why: str
    reference: Path | None = None


def decide(stage: StagePlan, found: Found) -> Decision:
    """The decision for one stage."""

    def give(action: str, why: str, reference: Path | None = None) -> Decision:
        return Decision(stage=stage.name, action=action, why=why, reference=reference)

    old = found.state
    same = old.fingerprint == stage.fingerprint
    if old.status == state.DONE and same and found.missing is None:
        return give(KEEP, f"done, taken from `{old.reference}`" if old.reference else "done")
    if found.alike is not None and found.step is None:
        return give(REUSE, f"done with the same plan in `{_run_of(found.alike)}`", found.alike)
    if old.status == state.DONE and not same:
        return give(REFUSE, f"is done under another plan: {_list(found.changed) or 'its fingerprint differs'}")
    if old.status == state.DONE:
        return give(RUN, f"its result is gone: {found.missing}")
    if old.guard is not None and same and stage.train is not None and _guard(stage) == dict(old.guard):
        return give(REFUSE, "was ended by its guard `stop_if`, and neither the guard nor the stage has changed")
    return give(RUN, _why_unfinished(stage, found))


def _guard(stage: StagePlan) -> dict[str, Any]:
    value = to_json(stage.train.stop_if) if stage.train and stage.train.stop_if else {}
    return dict(value)


def _why_unfinished(stage: StagePlan, found: Found) -> str:
    old = found.state
    of = f" of {stage.train.steps:,}" if stage.train else ""
    goes_on = f", goes on from step {found.step:,}{of}" if found.step else ", starts again: nothing was saved yet"
    if old.status == state.PENDING and found.step is None:
        if found.than and found.changed:
            return f"never ran; differs from run `{found.than}`: {_list(found.changed)}"
        if found.than and found.parent_changed:
            return f"never ran; its parent `{stage.parent}` differs from run `{found.than}`"
        return "never ran"
    changed = f"; changed since: {_list(found.changed)}" if found.changed else ""
    if old.status == state.SAVED:
        return f"was stopped{goes_on}{changed}"
    if old.status == state.FAILED:
        return f"failed ({old.reason}){goes_on}{changed}"
    return f"was cut off{goes_on}{changed}"


def _list(changes: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(changes[:most])
    return shown + (f" and {len(changes) - most} more" if len(changes) > most else "")


def _run_of(stage_dir: Path) -> str:
    return stage_dir.parent.parent.name


def changes(old: RunPlan, new: RunPlan, stage: str | None = None) -> list[str]:
    """How two plans differ in what changes a result, value by value: of the whole run, or of what one stage reads."""
    found = []
    for name in dict.fromkeys([*old.stages, *new.stages]):
        if stage is None and (name in old.stages) != (name in new.stages):
            found.append(f"stage `{name}` is {'new' if name in new.stages else 'no longer there'}")
    # What a law gave since is no change: both plans ask for it.
    same = {n for n, s in new.stages.items() if n in old.stages and old.stages[n].fingerprint == s.fingerprint != ""}
    for one in diff(old, new):
        parts = one.key.split(".")
        if parts[0] == "stages" and parts[1] in same:
            continue
        if parts[0] == "stages" and not (parts[1] in old.stages and parts[1] in new.stages):
            continue  # said above in one line
        if one.changes_result and (stage is None or _concerns(one.key, stage, new)):
            key = one.key.removeprefix(f"stages.{stage}.") if stage else one.key
            a, b = (_short(text) for text in shown(one))
            found.append(f"`{key}` {a} → {b}")
    return found


def _concerns(key: str, stage: str, plan: RunPlan) -> bool:
    """Whether a value of a plan is a stage's own, or one that it shares with others."""
    parts = key.split(".")
    if parts[0] == "stages":
        return parts[1] == stage
    train = plan.stages[stage].train
    if parts[0] == "sources" and train is not None:
        return parts[1] in train.mixture or (train.replay is not None and parts[1] in train.replay.sources)
    return True


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:12]}…"
