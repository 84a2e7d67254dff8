"""Finding what a person means by a run: a folder, or a name under `./runs`."""

from __future__ import annotations

from pathlib import Path

from cpt.base.errors import UsageError
from cpt.base.registry import nearest


def find_run(name: str, runs: Path = Path("runs")) -> Path:
    """The folder of a run.

    Args:
        name: a path to the run's folder (or something inside of it), or its name under `runs`.
        runs: the folder that holds the runs.

    Raises:
        UsageError: there is none; names the nearest.
    """
    for path in (Path(name), runs / name):
        if path.exists():
            found = run_of(path)
            if found is not None:
                return found
            raise UsageError(f"`{path}` is not a run folder: it has no `plan.json`", *hints("", runs))
    raise UsageError(f"there is no run `{name}`", *hints(Path(name).name, runs))


def run_of(path: Path) -> Path | None:
    """The run folder that a path is or lies in."""
    path = path.resolve()
    return next((p for p in (path, *path.parents) if (p / "plan.json").is_file()), None)


def names(runs: Path) -> list[str]:
    """Names of the runs in a folder, newest first."""
    try:
        found = [(p.stat().st_mtime_ns, p.name) for p in runs.iterdir() if (p / "plan.json").is_file()]
    except OSError:
        return []
    return [name for _, name in sorted(found, reverse=True)]


def hints(name: str, runs: Path) -> tuple[str, ...]:
    """What to say to somebody who named no run, or none that is there: the nearest name, else the newest runs."""
    known = names(runs)
    if not known:
        return (f"there are no runs in `{runs}`; `cpt run recipe=demo` starts one",)
    near = nearest(name, known)
    if near:
        return (f"did you mean `{near}`?",)
    more = f" and {len(known) - 10} more" if len(known) > 10 else ""
    return (f"runs in `{runs}`: " + ", ".join(f"`{n}`" for n in known[:10]) + more,)
