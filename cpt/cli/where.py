"""What a person's word for a checkpoint leads to: a path, or the name of a run under `runs`."""

from __future__ import annotations

from pathlib import Path

from cpt.base.errors import UsageError

RUNS = Path("runs")


def place(name: str) -> Path:
    """The folder that is meant; a path that is nowhere comes back as it is, for the caller to refuse.

    Args:
        name: a path, or a run's name under `runs`, also with more behind it (`demo-761654/stages/domain`).

    Raises:
        UsageError: it is empty, or it is no path and there is no run of this name; names the nearest.
    """
    if not name:
        raise UsageError("the path of a checkpoint is empty", "give a folder, or the name of a run")
    path = Path(name)
    if path.exists():
        return path
    if (RUNS / path).exists():
        return RUNS / path
    if len(path.parts) == 1:
        from cpt.report.runs import find_run

        return find_run(name)
    return path
