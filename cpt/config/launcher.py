"""A launcher without a recipe: `launcher=NAME launcher.key=value` to the checked object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpt.base.errors import CptError, UsageError
from cpt.config.compose import compose_part
from cpt.config.read import Reading, make, read

if TYPE_CHECKING:
    from cpt.launch import Launcher


def launcher(texts: Sequence[str], cwd: Path | None = None) -> tuple[str, Launcher]:
    """The name and the options of a launcher, read and checked as those of a recipe.

    Args:
        texts: overrides of `launcher` alone; without any it is the default one.
        cwd: folder that `./conf` is found in; None = the current one.

    Raises:
        UsageError: a key, a name or a value is wrong.
    """
    from cpt.launch import LAUNCHERS

    composed = compose_part("launcher", texts, cwd)
    reading = Reading("")
    given = read(composed.config, reading).get("launcher") or {}
    wrong = [
        *reading.errors,
        *(UsageError(f"`{'.'.join(path)}` is left to you to fill in") for path in reading.unfilled),
    ]
    name = str(given.get("name", "local"))
    try:  # also beside unknown keys, so that everything wrong is told at once
        made: Launcher = make(LAUNCHERS.get(name), {k: v for k, v in given.items() if k != "name" and v is not None})
    except CptError as error:
        wrong.append(error)
    if wrong:
        raise type(wrong[0])(wrong[0].message, *wrong[0].hints, more=(*wrong[0].more, *wrong[1:]))
    return name, made
