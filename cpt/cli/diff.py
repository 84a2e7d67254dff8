"""`cpt diff A B`: how two plans or runs differ, value by value."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpt.base.errors import CptError, UsageError
from cpt.cli.flags import Json, result, result_json

if TYPE_CHECKING:
    from cpt.plan.types import RunPlan

One = Annotated[str, typer.Argument(metavar="A", help="A run, a plan.json, or a recipe.", show_default=False)]
Other = Annotated[str, typer.Argument(metavar="B", help="Another one.", show_default=False)]
Keys = Annotated[list[str] | None, typer.Argument(metavar="key=value ...", help="Overrides of those that are recipes.")]


def command(a: One, b: Other, overrides: Keys = None, json: Json = False) -> None:
    """Show how two plans or runs differ, value by value; what changes a result comes first.

    A and B are run folders or names, `plan.json` files, or recipes with overrides in quotes: `"medical train.seed=2"`.
    """
    from cpt.plan.diff import diff, same_result, shown
    from cpt.report.table import aligned

    first, second = (_plan(text, list(overrides or [])) for text in (a, b))
    found = diff(first, second)
    same = same_result(first, second)
    if json:
        result_json(
            {
                "same_stages": same,
                "differences": [{"key": d.key, "a": d.a, "b": d.b, "changes_result": d.changes_result} for d in found],
            }
        )
        return
    if not found:
        result(f"no difference: both are plan {first.short_id}")
        return
    rows = [["key", *_labels((a, b), (first, second)), ""]]
    rows += [[d.key, *map(_short, shown(d)), "" if d.changes_result else "same result"] for d in found]
    result("\n".join(line.rstrip() for line in aligned(rows)))
    if same:
        result("\nstages with the same result in both: " + ", ".join(same))


def _labels(texts: tuple[str, str], plans: tuple[RunPlan, RunPlan]) -> list[str]:
    """Heads of the two columns: the plans' names, and what was typed where those are the same."""
    names = [p.name for p in plans]
    if names[0] == names[1] and texts[0] != texts[1]:
        names = [_short(text) for text in texts]
    return [f"{name} ({plan.short_id})" for name, plan in zip(names, plans, strict=True)]


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def _plan(text: str, overrides: list[str]) -> RunPlan:
    """The plan that a word stands for: a file, a run, or a recipe with overrides."""
    from cpt.base.files import read_json
    from cpt.base.records import from_json
    from cpt.plan.types import RunPlan
    from cpt.report.runs import find_run

    try:
        words = shlex.split(text)
    except ValueError:
        raise UsageError(f"`{text}` has quotes that do not close") from None
    if not words:
        raise UsageError("an empty text names no plan")
    path = Path(words[0])
    if len(words) == 1 and "=" not in words[0]:
        file = path if path.is_file() and path.suffix == ".json" else None
        if file is None and path.suffix != ".yaml":
            try:
                file = find_run(words[0]) / "plan.json"
            except CptError:
                file = None
        if file is not None:
            try:
                return from_json(RunPlan, read_json(file))
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise UsageError(f"`{file}` is not a plan: {error}") from None
    from cpt.config import build

    recipe = words[0].removeprefix("recipe=")
    return build.plan(recipe, [*words[1:], *overrides])
