"""A name-to-class table that suggests near names. New schedule, method or format = one class, one registration."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from cpt.base.errors import UsageError

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing is close."""
    names = sorted(known)
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not found:
        lowered = {n.lower(): n for n in names}
        found = [lowered[n] for n in difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)]
    return found[0] if found else None


def unknown(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """The error for a name that is not among the known ones: nearest name first, else the whole list."""
    names = sorted(known)
    near = nearest(str(name), names)
    hint = f"did you mean `{near}`?" if near else "known: " + (", ".join(f"`{n}`" for n in names) or "none")
    return UsageError(f"unknown {kind} `{name}`", hint)


class Registry(Generic[T]):
    """Parts by name.

    Args:
        kind: what the parts are, for messages (`schedule`, `method`).
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, T] = {}

    def add(self, name: str) -> Callable[[T], T]:
        """Class decorator that registers a part under `name`."""

        def register(part: T) -> T:
            assert name not in self._parts, f"{self.kind} {name} is registered twice"
            self._parts[name] = part
            return part

        return register

    def get(self, name: str) -> T:
        """The part called `name`.

        Raises:
            UsageError: no such part; names the nearest one.
        """
        if name not in self._parts:
            raise unknown(self.kind, name, self._parts)
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._parts))

    def __contains__(self, name: object) -> bool:
        return name in self._parts
