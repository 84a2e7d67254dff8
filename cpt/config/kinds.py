"""What a value of a key may look like: each kind turns what YAML or the command line gave into the plan's type.

A kind raises `UsageError` with what was found and what was wanted; the caller puts the key in front.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cpt.base import units
from cpt.base.errors import UsageError
from cpt.base.registry import nearest
from cpt.config.suggest import quote_hint

NAME = re.compile(r"\w[\w-]{0,63}")
LAW = re.compile(r"\$\{\s*law\s*:(.*)\}", re.DOTALL)
AUTO = "auto"
MOST = 10**18  # of any count: above it numbers no longer fit into a float exactly enough


@dataclass(frozen=True)
class Kind:
    """A type of value.

    Args:
        what: for people, with the unit: `count [tokens]`.
        read: value as composed -> value of the plan.
        optional: `null` is a value; else it stands for the default.
    """

    what: str
    read: Callable[[Any], Any]
    optional: bool = False


@dataclass(frozen=True)
class LawValue:
    """`${law:mix.mixture}`: a value that the law stage `mix` gives once it is fitted."""

    stage: str
    key: str

    @property
    def text(self) -> str:
        """As it is written."""
        return f"${{law:{self.stage}.{self.key}}}"


def law_value(value: object) -> LawValue | None:
    """What a text refers to when it is a `${law:...}`; None for everything else.

    Raises:
        UsageError: it is one, but names no stage and key.
    """
    found = LAW.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        return None
    stage, _, key = found[1].strip().partition(".")
    if not NAME.fullmatch(stage) or not key:
        raise UsageError(f"`{value}` names no law", "written as `${law:STAGE.mixture}` or `${law:STAGE.replay}`")
    return LawValue(stage, key)


def _wanted(value: object, what: str, *hints: str) -> UsageError:
    shown = "true" if value is True else "false" if value is False else "null" if value is None else value
    text = str(shown)
    return UsageError(f"`{text if len(text) <= 60 else text[:59] + '…'}` is not {what}", *hints)


def _plain(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _read_text(value: Any) -> str:
    if isinstance(value, bool):
        raise _wanted(value, "a text", quote_hint(value))
    if not _plain(value) or not str(value).strip():
        raise _wanted(value, "a text")
    text = str(value)
    if "\x00" in text or any(ord(c) < 32 for c in text):
        raise _wanted(value, "a text without control characters")
    return text


def read_name(value: Any) -> str:
    """A name that can be a folder and a part of a key.

    Raises:
        UsageError: anything else.
    """
    if isinstance(value, bool):
        raise _wanted(value, "a name", quote_hint(value))
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise _wanted(value, "a name; accepted: letters, digits, `_` and `-`, at most 64")
    return value


def _read_folder_name(value: Any) -> str:
    if isinstance(value, bool):
        raise _wanted(value, "a name", quote_hint(value))
    text = str(value) if _plain(value) else ""
    if not re.fullmatch(r"\w[\w.-]{0,99}", text):
        raise _wanted(value, "a name of a run; accepted: letters, digits, `_`, `-` and `.`, at most 100")
    return text


def _read_flag(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise _wanted(value, "`true` or `false`")


def _read_number(value: Any) -> float:
    try:
        number = float(str(value).replace("_", "")) if _plain(value) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _wanted(value, "a number")
    return number


def _list(value: Any, what: str) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        return [value]
    raise _wanted(value, f"a list of {what}", *([quote_hint(value)] if isinstance(value, bool) else []))


def number(low: float = -math.inf, high: float = math.inf, *, above: float | None = None, unit: str = "") -> Kind:
    """A number in a closed range, or above a bound."""
    bounds = [f"from {low:g}" if low > -math.inf else "", f"up to {high:g}" if high < math.inf else ""]
    if above is not None:
        bounds.insert(0, f"above {above:g}")
    what = " ".join(["a number", *filter(None, bounds)])

    def read(value: Any) -> float:
        found = _read_number(value)
        if not low <= found <= high or (above is not None and found <= above):
            raise _wanted(value, what)
        return found

    return Kind(f"number{f' [{unit}]' if unit else ''}", read)


def integer(low: int = 0, high: int | None = None, unit: str = "") -> Kind:
    """A whole number in a closed range, also written as a count (`4k`)."""
    what = f"a whole number from {low}" + (f" up to {high}" if high is not None else "")

    def read(value: Any) -> int:
        try:
            found = units.parse_count(value)
        except UsageError:
            raise _wanted(value, what) from None
        if found < low or found > (MOST if high is None else high):
            raise _wanted(value, what)
        return found

    return Kind(f"whole number{f' [{unit}]' if unit else ''}", read)


def count(unit: str = "tokens") -> Kind:
    """A positive count as people write it."""

    def read(value: Any) -> int:
        found = units.parse_count(value)
        if not 1 <= found <= MOST:
            raise UsageError(f"`{value}` is {'0' if found == 0 else 'too much'}, wanted from 1 to {MOST:.0e}")
        return found

    return Kind(f"count [{unit}]", read)


def choice(*options: str) -> Kind:
    """One of a few words. `on`, `off`, `yes`, `no` are accepted as YAML reads them."""

    def read(value: Any) -> str:
        if isinstance(value, bool):
            value = next((w for w in (("on", "yes") if value else ("off", "no")) if w in options), value)
        if not isinstance(value, str) or value not in options:
            near = nearest(str(value), options)
            hints = [f"did you mean `{near}`?"] if near else []
            raise _wanted(value, "one of " + ", ".join(f"`{o}`" for o in options), *hints)
        return value

    return Kind(" | ".join(options), read)


def names(*options: str) -> Kind:
    """A list of names, of a closed set if one is given."""
    one = choice(*options).read if options else read_name

    def read(value: Any) -> tuple[str, ...]:
        found = tuple(one(v) for v in _list(value, "names"))
        if len(set(found)) != len(found):
            raise _wanted(value, "a list of different names")
        return found

    return Kind("list of " + (" | ".join(options) if options else "names"), read)


def _read_texts(value: Any) -> tuple[str, ...]:
    found = tuple(_read_text(v) for v in _list(value, "texts"))
    if not found:
        raise UsageError("the list is empty")
    return found


def _read_weights(value: Any) -> dict[str, float]:
    """Shares by name; a list of names stands for equal shares."""
    if isinstance(value, str | list):
        value = dict.fromkeys(names().read(value), 1.0)
    if not isinstance(value, Mapping):
        raise _wanted(value, "a mapping from sources to shares, such as `{pubmed: 0.7, web: 0.3}`")
    found: dict[str, float] = {}
    for name, weight in value.items():
        text = str(weight).strip()
        found[read_name(name)] = units.parse_share(text) if text.endswith("%") else number(low=0).read(weight)
    if not found or sum(found.values()) <= 0:
        raise UsageError("no source has a share above 0")
    return found


def _read_shares(value: Any) -> tuple[float, ...]:
    return tuple(units.parse_share(v) for v in _list(value, "shares"))


def _read_mixtures(value: Any) -> tuple[dict[str, float], ...]:
    found = tuple(_read_weights(v) for v in (value if isinstance(value, list) else [value]))
    return tuple({n: w / sum(one.values()) for n, w in one.items() if w > 0} for one in found)


def _read_part(value: Any) -> float:
    """A part of something, also above 1: `35%`, `1.5`, `150%`."""
    text = str(value).strip()
    if text.endswith("%") and not isinstance(value, bool):
        return number(low=0).read(text[:-1]) / 100
    return number(low=0).read(value)


def _read_free(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _wanted(value, "a mapping")
    return dict(value)


def numbers(length: int, low: float, high: float) -> Kind:
    """A list of so many numbers, each from `low` to below `high`."""

    def read(value: Any) -> tuple[float, ...]:
        if not isinstance(value, list) or len(value) != length:
            raise _wanted(value, f"a list of {length} numbers")
        found = tuple(_read_number(v) for v in value)
        if not all(low <= v < high for v in found):
            raise _wanted(value, f"a list of {length} numbers from {low:g} to below {high:g}")
        return found

    return Kind(f"list of {length} numbers", read)


def _read_integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise _wanted(value, "a list of whole numbers")
    return tuple(integer(0).read(v) for v in value)


def optional(kind: Kind) -> Kind:
    """The same, or nothing (`null`)."""
    return Kind(kind.what, lambda value: None if value is None else kind.read(value), optional=True)


def auto(kind: Kind) -> Kind:
    """The same, or `auto`."""
    return Kind(f"auto | {kind.what}", lambda value: AUTO if value == AUTO else kind.read(value))


text = Kind("text", _read_text)
texts = Kind("text or list of texts", _read_texts)
name = Kind("name", read_name)
folder_name = Kind("name of a run folder", _read_folder_name)
flag = Kind("true | false", _read_flag)
share = Kind("share", units.parse_share)
size = Kind("amount [bytes]", units.parse_bytes)
duration = Kind("length of time [s]", units.parse_duration)
weights = Kind("shares by source", _read_weights)
shares = Kind("list of shares", _read_shares)
mixtures = Kind("list of shares by source", _read_mixtures)
part = Kind("part", _read_part)
free = Kind("mapping", _read_free)
integers = Kind("list of whole numbers", _read_integers)
