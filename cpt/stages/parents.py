"""Which checkpoint a stage starts from, and whether a stage has left what its children need."""

from __future__ import annotations

import shlex
from pathlib import Path

from cpt.base.errors import UsageError
from cpt.checkpoint import manifest, store
from cpt.plan.types import RunPlan, StagePlan
from cpt.stages import state
from cpt.stages.law import RESULT


def resolve(plan: RunPlan, stage: StagePlan, run_dir: Path) -> tuple[str, Path | None]:
    """What a stage starts from: (`scratch` | `hf` | `native`, folder).

    Raises:
        UsageError: the parent stage is not done, or what it left is gone; or another stage that it reads from is not.
    """
    for name in stage.after:
        found = state.read(run_dir / "stages" / name)
        if found.status != state.DONE:
            raise UsageError(f"stage `{stage.name}` reads the result of `{name}`, which is {found.status}, not done")
    if stage.assumed:
        laws = ", ".join(f"`{value.partition('.')[0]}`" for value in stage.law.values())
        raise UsageError(f"stage `{stage.name}` takes a value from the law {laws}, which is not there yet")
    parent = stage.parent
    if parent is None:
        return "scratch", None
    if parent == "base":
        if plan.base.kind == "scratch" or plan.base.path is None:
            return "scratch", None
        return _folder(Path(plan.base.path), stage.parent_at)
    if parent in plan.stages:
        return _of_stage(plan, stage, plan.stages[parent], run_dir)
    return _folder(Path(parent), stage.parent_at)


def _of_stage(plan: RunPlan, stage: StagePlan, parent: StagePlan, run_dir: Path) -> tuple[str, Path | None]:
    own = run_dir / "stages" / parent.name
    found = state.read(own)
    if found.status != state.DONE:
        raise UsageError(f"stage `{stage.name}` starts from `{parent.name}`, which is {found.status}, not done")
    folder = state.home(own)
    if parent.kind == "evaluate":  # it measures what it was given and gives that on
        return resolve(plan, parent, run_dir)
    if missing := missing_result(parent, folder):
        raise UsageError(f"stage `{stage.name}` starts from `{parent.name}`, but {missing}")
    if parent.kind == "convert" and parent.options.get("to", "hf") == "hf":
        return "hf", folder / "hf"
    step = fork_step(parent, stage.parent_at)
    if step is None:
        newest, _ = store.newest_whole(folder / "checkpoints")
        return "native", newest
    fork = folder / "checkpoints" / store.folder_name(step)
    if why := manifest.why_not_whole(fork):
        raise UsageError(
            f"stage `{stage.name}` starts from `{parent.name}@{stage.parent_at}`, but `{fork}` cannot be used: {why}",
            _other_steps(stage, fork),
        )
    return "native", fork


def refuse_damaged(plan: RunPlan, stage: StagePlan, folder: Path, run_dir: Path) -> None:
    """Refuse to start a stage from one of our checkpoints whose bytes are not those that were written. Reads them all.

    Raises:
        UsageError: naming the file, and the command that mends it.
    """
    if not (folder / manifest.NAME).is_file() or not (why := store.why_damaged(folder)):
        return
    resume = f"`cpt resume {run_dir}`"
    if stage.parent not in plan.stages:
        hints = [f"`cpt ckpt verify {folder}` names every damaged file; copy it again, or take another `from`"]
    elif stage.parent_at is None:
        hints = [f"{resume} makes it again from the checkpoint before it, and goes on"]
    else:
        newer = [path for _, path in store.steps(folder.parent) if path.name >= folder.name]
        hints = [
            f"`rm -r {shlex.join(map(str, newer))}`, then {resume}, makes it again from the checkpoint before it",
            _other_steps(stage, folder),
        ]
    raise UsageError(f"stage `{stage.name}` starts from `{folder}`, which is damaged: {why}", *hints)


def _other_steps(stage: StagePlan, fork: Path) -> str:
    """Which other steps of its parent a stage could start from."""
    steps = [n for n, path in store.steps(fork.parent) if path != fork and store.is_whole(path)]
    if not steps:
        return f"`{stage.parent}` has no other whole checkpoint"
    shown = ", ".join(f"{n:,}" for n in steps)
    near = min(steps, key=lambda n: abs(n - int(fork.name.removeprefix("iter_"))))
    return (
        f"whole checkpoints of `{stage.parent}` are at steps {shown}: "
        f"`stages.{stage.name}.from={stage.parent}@{near}` takes another one"
    )


def fork_step(parent: StagePlan, at: int | str | None) -> int | None:
    """The step of a parent at which a child starts; None = its end."""
    if at == "pre_anneal":
        from cpt.schedules.join import pre_anneal_step

        step = pre_anneal_step(parent.train.lr, parent.train.steps) if parent.train else None
        if step is None:
            raise UsageError(f"stage `{parent.name}` has no anneal that a stage could start before")
        return step
    return int(at) if at is not None else None


def _folder(path: Path, at: int | str | None) -> tuple[str, Path]:
    """A checkpoint folder that the person named."""
    if (path / "config.json").is_file() and not (path / manifest.NAME).is_file():
        return "hf", path
    if isinstance(at, int):
        for folder in store.checkpoint_folders(path):
            if store.is_whole(folder / store.folder_name(at)):
                return "native", folder / store.folder_name(at)
        raise UsageError(f"`{path}` has no whole checkpoint of step {at:,}")
    return "native", store.resolve(path)


def missing_result(stage: StagePlan, stage_dir: Path, *, deep: bool = False) -> str | None:
    """What a stage should have left in its folder and has not; None when all is there.

    Args:
        deep: read all bytes of its last checkpoint too.
    """
    if stage.train is not None:
        newest, _ = store.newest_whole(stage_dir / "checkpoints")
        if newest is None:
            return f"there is no whole checkpoint in `{stage_dir / 'checkpoints'}`"
        found = manifest.read(newest)
        if found.phase != "end":
            return f"its newest whole checkpoint `{newest}` is of step {found.step:,}, not of its end"
        if deep and (why := store.why_damaged(newest)):
            return f"its last checkpoint `{newest}` is damaged: {why}"
    elif stage.kind == "law" and not (stage_dir / RESULT).is_file():
        return f"`{stage_dir / RESULT}` is missing"
    elif stage.kind == "convert":
        to = stage.options.get("to", "hf")
        name = {"hf": "hf/config.json", "native": "checkpoints"}.get(to, to)
        if not (stage_dir / name).exists():
            return f"`{stage_dir / name}` is missing"
    return None
