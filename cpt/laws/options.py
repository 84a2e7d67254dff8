"""Options of a law as a person writes them (`options.joint=true`), read and refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from cpt.base.errors import UsageError
from cpt.base.registry import unknown

if TYPE_CHECKING:
    from cpt.laws.law import Law

_SAID = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def read_options(kind: type[Law], given: Mapping[str, object]) -> dict[str, object]:
    """Values of a law's options.

    Raises:
        UsageError: an option that the law does not have, or a value that it cannot take.
    """
    found: dict[str, object] = {}
    for name, value in given.items():
        if name not in kind.settable:
            if not kind.settable:
                raise UsageError(f"law `{kind.name}` has no options, found `{name}`")
            raise unknown(f"option of law `{kind.name}`", name, kind.settable)
        try:
            found[name] = kind.settable[name](value)
        except UsageError as error:
            raise UsageError(f"option `{name}` of law `{kind.name}`: {error.message}", *error.hints) from None
    return found


def yes_or_no(value: object) -> bool:
    """True or false, also in words.

    Raises:
        UsageError: anything else.
    """
    said = _SAID.get(str(value).lower())
    if said is None:
        raise UsageError(f"`{value}` is neither true nor false")
    return said


def one_of(*names: str) -> Callable[[object], str]:
    """One of some words."""

    def read(value: object) -> str:
        if value not in names:
            raise UsageError(f"`{value}` is not known, wanted " + " or ".join(f"`{name}`" for name in names))
        return str(value)

    return read
