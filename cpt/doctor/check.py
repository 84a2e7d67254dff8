"""What a check says, and running a list of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from cpt.base.errors import CptError

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Args:
        status: ok, warn (works, but a person should know) or fail.
        name: what was checked.
        found: what was found.
        hint: what to do about it; empty when nothing is.
    """

    status: Status
    name: str
    found: str
    hint: str = ""


def run(checks: Iterable[tuple[str, Callable[[], Check]]]) -> list[Check]:
    """The results in order; a check that itself breaks has failed."""
    results = []
    for name, check in checks:
        try:
            results.append(check())
        except CptError as error:
            results.append(Check("fail", name, error.message, *error.hints[:1]))
        except Exception as error:  # a check must never take the others down
            results.append(Check("fail", name, f"{type(error).__name__}: {error}".splitlines()[0]))
    return results
