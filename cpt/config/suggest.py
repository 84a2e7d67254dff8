"""Near keys and near names: the text of errors about what a person wrote."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from cpt.base.errors import UsageError
from cpt.base.registry import nearest

YAML_BOOLEANS = ("on", "off", "yes", "no", "y", "n", "true", "false")


def dotted(path: Sequence[object]) -> str:
    """`("stages", "anneal", "tokens")` as `stages.anneal.tokens`."""
    return ".".join(str(p) for p in path)


def unknown_key(
    path: Sequence[str], here: Iterable[str], everywhere: Iterable[tuple[str, ...]], recipe: str
) -> UsageError:
    """The error for a key that is not known.

    Args:
        path: the key.
        here: the keys that are known beside it.
        everywhere: every known key, with `<name>` for names that a person chooses.
        recipe: for the command that lists them all.
    """
    *parent, key = path
    siblings = sorted(here)
    hints = []
    if not parent:
        siblings = sorted({*siblings, "recipe"})  # not a key of a recipe, but one may be meant
    near = nearest(key, siblings)
    exact = _elsewhere(path, everywhere, exact=True)
    alike = near is not None and difflib.SequenceMatcher(None, key, near).ratio() >= 0.8
    if exact and not alike:
        hints.append(_where(exact))
    elif near:
        hints.append(f"did you mean `{dotted([*parent, near])}`?")
    else:
        loose = _elsewhere(path, everywhere, exact=False)
        if loose:
            hints.append(f"did you mean `{dotted(loose[0])}`?")
        elif siblings:
            where = f"in `{dotted(parent)}`" if parent else "at the top"
            hints.append(f"known {where}: " + ", ".join(f"`{k}`" for k in siblings))
    hints.append(f"`cpt recipes show {recipe or 'NAME'}` lists every key")
    return UsageError(f"unknown key `{dotted(path)}`", *hints)


def _elsewhere(path: Sequence[str], everywhere: Iterable[tuple[str, ...]], exact: bool) -> list[tuple[str, ...]]:
    """Known keys elsewhere whose last part is (like) that of `path`, those nearest to `path` first."""
    key = path[-1]
    known = sorted(set(everywhere))
    if exact:
        found = [p for p in known if p[-1] == key and p != tuple(path)]
    else:
        near = nearest(key, {p[-1] for p in known})
        found = [p for p in known if near and p[-1] == near]
    return sorted(found, key=lambda p: (p[0] != path[0], "train" in p, len(p), p))


def _where(found: list[tuple[str, ...]]) -> str:
    key = found[0][-1]
    places = " or ".join(f"`{dotted(p)}`" for p in found[:2])
    return f"`{key}` is set as {places}"


def quote_hint(value: object) -> str:
    """What to do about a YAML 1.1 boolean where a name is wanted."""
    word = "no" if value is False else "yes" if value is True else str(value)
    return f'YAML reads `on`, `off`, `yes` and `no` as true and false; a name is written in quotes, such as `"{word}"`'
