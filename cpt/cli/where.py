"""What a person's word for a checkpoint leads to: a path, or the name of a run under `runs`."""

from __future__ import annotations

from pathlib import Path

from cpt.base.errors import UsageError
from cpt.base.registry import nearest

RUNS = Path("runs")


def place(name: str) -> Path:
    """The folder that is meant; a path that is nowhere or an unfinished conversion comes back as it is, to be refused.

    Args:
        name: a path, or a run's name under `runs`, also with more behind it (`demo-761654/stages/domain`).

    Raises:
        UsageError: it is empty, or no folder or run of this name is there; names the nearest.
    """
    if not name:
        raise UsageError("the path of a checkpoint is empty", "give a folder, or the name of a run")
    path = Path(name)
    if path.exists():
        return path
    if (RUNS / path).exists():
        return RUNS / path
    from cpt.checkpoint.job.place import unfinished

    if unfinished(path) is not None:
        return path
    there = next(p for p in path.parents if p.is_dir())
    wrong, *rest = path.relative_to(there).parts
    near = nearest(wrong, [p.name for p in there.iterdir() if p.is_dir()])
    hints = [f"did you mean `{there.joinpath(near, *rest)}`?"] if near else []
    if len(path.parts) == 1:
        from cpt.report import runs

        raise UsageError(f"there is no folder `{name}`, and no run of this name", *(hints or runs.hints(name, RUNS)))
    if near and rest:
        raise UsageError(f"there is no folder `{there / wrong}`", *hints)
    return path
