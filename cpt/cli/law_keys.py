"""`key=value` texts of the law commands, each with its own kind of value; Hydra is not needed for these.

data=runs.csv law=dcpt where='step >= 3000' columns={r_domain: mix} tolerance=3% n_params=1.8B tokens=10B
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cpt.base.errors import UsageError
from cpt.base.registry import unknown
from cpt.base.units import parse_amount, parse_count

Kind = Callable[[str, str], Any]  # key and text to value


def text(key: str, value: str) -> str:
    """As written, without quotes around it."""
    return _unquoted(value)


def path(key: str, value: str) -> str:
    """A path; the shell leaves a `~` behind `=` as it is."""
    return os.path.expanduser(_unquoted(value))


def amount(key: str, value: str) -> float:
    """`1.8B`, `1e10`."""
    return _by(parse_amount, key, value)


def count(key: str, value: str) -> int:
    """A whole number, 0 or more."""
    return _by(parse_count, key, value)


def share(key: str, value: str) -> float:
    """`0.25`, `25%`."""
    found = amount(key, value)
    if not 0 <= found <= 1:
        hint = (f"did you mean `{key}={found:g}%`?",) if 1 < found <= 100 and "%" not in value else ()
        raise UsageError(f"`{key}` is {value}, wanted 0 to 1", *hint)
    return found


def rise(key: str, value: str) -> float:
    """A relative rise: `3%`, `0.03`."""
    found = amount(key, value)
    if found > 1 and "%" not in value:
        raise UsageError(f"`{key}` is {value}, a rise by {100 * found:g} %", f"did you mean `{key}={value}%`?")
    return found


def nats(key: str, value: str) -> float:
    """A loss or a difference of losses [nats/token]."""
    if "%" in value:
        raise UsageError(f"`{key}` is `{value}`, wanted nats per token", "`tolerance=3%` is relative")
    return amount(key, value)


def yes_or_no(key: str, value: str) -> bool:
    """`true`, `false`."""
    if value.lower() not in ("true", "false"):
        raise UsageError(f"`{key}` is `{value}`, wanted `true` or `false`")
    return value.lower() == "true"


def plain(key: str, value: str) -> Any:
    """A boolean, a number or a text."""
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return _unquoted(value)


def names(key: str, value: str) -> dict[str, str]:
    """`{a: x, b: "y z"}`."""
    return _mapping(key, value)


def amounts(key: str, value: str) -> dict[str, float]:
    """`{web: 10B, code: 2B}`."""
    return {name: amount(f"{key}.{name}", part) for name, part in _mapping(key, value).items()}


def parse(
    texts: Sequence[str], kinds: Mapping[str, Kind], families: Mapping[str, Kind], command: str
) -> dict[str, Any]:
    """Values by key.

    Args:
        kinds: by key.
        families: by the beginning of keys that end in a name, such as `base_`.
        command: for hints, `cpt fit-law`.

    Raises:
        UsageError: no such key, one twice, or a value of another kind; all that is wrong at once.
    """
    found: dict[str, Any] = {}
    seen: set[str] = set()
    errors: list[UsageError] = []
    for one in texts:
        try:
            _take(one, kinds, families, command, found, seen)
        except UsageError as error:
            errors.append(error)
    if errors:
        first, *others = errors
        raise UsageError(first.message, *first.hints, more=tuple(others))
    return found


def _take(
    one: str,
    kinds: Mapping[str, Kind],
    families: Mapping[str, Kind],
    command: str,
    found: dict[str, Any],
    seen: set[str],
) -> None:
    """Read one text into `found`; `seen` also has the keys whose value is wrong."""
    if any("\ud800" <= c <= "\udfff" for c in one):
        raise UsageError(f"`{one}` is not UTF-8 text")
    key, equals, value = one.partition("=")
    key, value = key.strip().lstrip("+"), value.strip()
    if not equals:
        raise UsageError(f"`{one}` is not `key=value`", *_no_equals(one, kinds))
    begin = next((b for b in families if key.startswith(b) and len(key) > len(b)), None)
    kind = kinds.get(key) or (families[begin] if begin else None)
    if kind is None:
        error = unknown("key", key, [*kinds, *(f"{b}NAME" for b in families)])
        raise UsageError(error.message, *error.hints, f"`{command} --help` lists the keys")
    if key in seen:
        raise UsageError(f"`{key}` is given twice")
    seen.add(key)
    if not value or "\x00" in value:
        raise UsageError(f"`{key}` has no value" if not value else f"`{key}` has a value with a null byte")
    found[key] = kind(key, value)


def family(values: Mapping[str, Any], begin: str) -> dict[str, Any]:
    """The values of keys that begin so, by the rest of the key."""
    return {key.removeprefix(begin): value for key, value in values.items() if key.startswith(begin)}


def _no_equals(one: str, kinds: Iterable[str]) -> tuple[str, ...]:
    from pathlib import Path

    if "data" in kinds and (Path(one).suffix or "x") in (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".gz", ".zst"):
        return (f"did you mean `data={one}`?",)
    return ()


def _by(parse_text: Callable[[object], Any], key: str, value: str) -> Any:
    try:
        return parse_text(value)
    except UsageError as error:
        raise UsageError(f"`{key}`: {error.message}", *error.hints) from None


_PAIR = re.compile(r"""\s*("[^"]*"|'[^']*'|[^:,{}"']+?)\s*:\s*("[^"]*"|'[^']*'|[^,{}"']+?)\s*(,|$)""")


def _mapping(key: str, value: str) -> dict[str, str]:
    inside = value[1:-1] if value[0] == "{" and value[-1] == "}" else None
    form = f"mappings are written `'{key}={{a: x, b: y}}'`, with the quotes for the shell"
    if inside is None:
        raise UsageError(f"the value of `{key}` is no mapping: `{value}`", form)
    found: dict[str, str] = {}
    at = 0
    while inside[at:].strip():
        match = _PAIR.match(inside, at)
        if match is None:
            raise UsageError(f"the value of `{key}` cannot be read from `{inside[at:].strip()[:40]}` on", form)
        name = _unquoted(match[1])
        if name in found:
            raise UsageError(f"`{key}` names `{name}` twice")
        found[name] = _unquoted(match[2])
        at = match.end()
    if not found:
        raise UsageError(f"the value of `{key}` is empty", form)
    return found


def _unquoted(value: str) -> str:
    value = value.strip()
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
