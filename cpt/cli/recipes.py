"""`cpt recipes`: list them, show every key of one, start your own from one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpt.base.errors import CptError, UsageError
from cpt.cli.flags import Json, Overrides, note, result, result_json

if TYPE_CHECKING:
    from cpt.config.show import Row

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name or file of a recipe.")]
NewName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the new recipe.")]
From = Annotated[str, typer.Option("--from", help="Recipe that the new one inherits from.")]
Only = Annotated[str, typer.Option("--only", metavar="KEY", help="Show the keys below this one.")]


def list_recipes(json: Json = False) -> None:
    """List recipes, one line each; your own in `./recipes` come first."""
    from cpt.config.compose import recipe_files
    from cpt.report.table import aligned

    files = {name: (path, _about(path)) for name, path in recipe_files().items()}
    if json:
        result_json({name: {"file": str(path), "about": about} for name, (path, about) in files.items()})
        return
    result("\n".join(line.rstrip() for line in aligned([[name, about] for name, (_, about) in files.items()])))


def show(name: Name, overrides: Overrides = None, only: Only = "", json: Json = False) -> None:
    """Show every key of a recipe: value, unit, where the value came from, and help."""
    from cpt.config.compose import compose
    from cpt.config.read import Reading, read
    from cpt.config.show import rows

    composed = compose([f"recipe={name}", *(overrides or [])])
    reading = Reading(composed.recipe)
    read(composed.config, reading)  # what is unfilled is shown; what is wrong is an error here too
    if reading.errors:
        first, *rest = reading.errors
        raise type(first)(first.message, *first.hints, more=(*first.more, *rest))
    wanted = tuple(filter(None, only.split(".")))
    found = [r for r in rows(composed) if r.path[: len(wanted)] == wanted]
    if not found:
        raise _no_such_key(only, [".".join(r.path[:i]) for r in rows(composed) for i in range(1, len(r.path) + 1)])
    if json:
        result_json([{"key": ".".join(r.path), **r.as_json()} for r in found])
        return
    result(_text(found))


def new(name: NewName, from_: From = "demo", json: Json = False) -> None:
    """Write `./recipes/NAME.yaml`, short and commented, that inherits from another recipe."""
    from cpt.base.files import write_atomic
    from cpt.config.compose import find_recipe
    from cpt.config.kinds import read_name
    from cpt.config.template import new_recipe

    try:
        read_name(name)
    except CptError as error:
        raise UsageError(f"the name of a recipe: {error.message}") from None
    parent = find_recipe(from_)
    path = Path("recipes") / f"{name}.yaml"
    if path.exists():
        raise UsageError(f"`{path}` is there already", "choose another name, or edit that file")
    if parent.stem == name:
        raise UsageError(f"a recipe cannot inherit from itself: both are called `{name}`")
    write_atomic(path, new_recipe(name, from_, parent))
    if json:
        result_json({"file": str(path)})
        return
    result(f"{path}")
    note(f"`cpt plan recipe={name}` shows what it would do")


def _about(path: Path) -> str:
    """The first comment line of a recipe file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            first = file.readline().strip()
    except OSError:
        return ""
    return first.lstrip("# ").rstrip(".") if first.startswith("#") else ""


def _text(rows: list[Row]) -> str:
    """The keys by section: name, value with unit, origin, help."""
    from cpt.report.table import aligned

    lines: list[str] = []
    section: tuple[str, ...] | None = None
    block: list[list[str]] = []

    def flush() -> None:
        if block:
            lines.extend(f"  {line}".rstrip() for line in aligned(block))
            block.clear()

    for row in rows:
        if row.path[:-1] != section:
            flush()
            section = row.path[:-1]
            if section:
                lines.extend(["", f"{'.'.join(section)}:"] if lines else [f"{'.'.join(section)}:"])
        block.append([row.path[-1], row.value, row.origin, row.help + (f"  [{row.unit}]" if row.unit else "")])
    flush()
    return "\n".join(lines)


def _no_such_key(key: str, known: list[str]) -> CptError:
    from cpt.base.registry import unknown

    return unknown("key", key, set(known))


commands: dict[str, Any] = {"": list_recipes, "list": list_recipes, "show": show, "new": new}
