"""Which rows of a table to use: comparisons joined by `and`, read here and never evaluated as code.

    top5_loss == 0 and step >= 3000
    domain == "code" and n_params < 1.8B

A name with other characters than letters, digits, `_`, `.` and `-` is written in backticks. An empty cell meets no
comparison.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt.base.errors import UsageError
from cpt.base.registry import unknown
from cpt.base.units import parse_amount

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_TOKEN = re.compile(
    r"""\s*(?: (?P<operator>==|!=|<=|>=|<|>)
             | (?P<text>"[^"]*"|'[^']*')
             | `(?P<quoted>[^`]+)`
             | (?P<word>[+\w.%-]+) )""",
    re.VERBOSE,
)
_FORM = "`where='top5_loss == 0 and step >= 3000'`"


@dataclass(frozen=True)
class Comparison:
    """One `column operator value`."""

    column: str
    operator: str
    value: float | str

    def holds(self, cell: object) -> bool:
        """Whether a cell meets it; an empty one does not.

        Raises:
            UsageError: text against a number, or an order asked of text.
        """
        if cell is None or cell != cell:
            return False
        if isinstance(self.value, str):
            if self.operator not in ("==", "!="):
                raise UsageError(f"`{self.value}` is text, and text is compared by `==` or `!=` only", _FORM)
            return _COMPARE[self.operator](_text(cell), self.value)
        number = number_of(cell)
        if number is None:
            raise UsageError(f"column `{self.column}` holds `{cell}`, which is no number to compare with `{self}`")
        return _COMPARE[self.operator](number, self.value)

    def __str__(self) -> str:
        value = f'"{self.value}"' if isinstance(self.value, str) else f"{self.value:.12g}"
        return f"{self.column} {self.operator} {value}"


@dataclass(frozen=True)
class Where:
    """Comparisons that a row must all meet."""

    comparisons: tuple[Comparison, ...]

    def mask(
        self, columns: Mapping[str, Sequence[object]], count: int, exempt: Mapping[str, NDArray[np.bool_]] | None = None
    ) -> NDArray[np.bool_]:
        """Which of the rows meet all comparisons; a later one is asked only of rows that met those before it.

        Args:
            columns: cells by the names that a person may use.
            count: rows.
            exempt: columns whose comparisons do not bind these rows.

        Raises:
            UsageError: no such column, or a comparison that makes no sense for its cells.
        """
        met = np.ones(count, bool)
        for one in self.comparisons:
            if one.column not in columns:
                raise unknown("column", one.column, columns)
            cells = columns[one.column]
            free = (exempt or {}).get(one.column, np.zeros(count, bool))
            met &= np.array([bool(met[i]) and (bool(free[i]) or one.holds(cells[i])) for i in range(count)], bool)
        return met

    def __str__(self) -> str:
        return " and ".join(map(str, self.comparisons))


def parse(text: str) -> Where:
    """Read comparisons.

    Raises:
        UsageError: anything else; says what was expected where.
    """
    tokens = _tokens(text)
    found = []
    while True:
        found.append(_comparison(text, tokens))
        if not tokens:
            return Where(tuple(found))
        kind, word = tokens.pop(0)
        if kind != "word" or word.lower() != "and":
            hint = (
                "call the command once for each"
                if word.lower() == "or"
                else f"comparisons are joined by `and`: {_FORM}"
            )
            raise UsageError(f"`where`: `and` is expected before `{word}`", hint)


def number_of(cell: object) -> float | None:
    """The finite number that a cell holds (`3000`, `1.8B`, `25%`, true as 1), else None."""
    if isinstance(cell, bool):
        return float(cell)
    try:
        number = float(cell) if not isinstance(cell, str) else parse_amount(cell)  # type: ignore[arg-type]
    except (UsageError, TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _text(cell: object) -> str:
    return str(cell).lower() if isinstance(cell, bool) else str(cell)


def _tokens(text: str) -> list[tuple[str, str]]:
    found = []
    at = 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            rest = text[at:].strip()
            hint = "equality is written `==`" if rest[0] == "=" else _FORM
            raise UsageError(f"`where` cannot be read from `{rest[:40]}` on", hint)
        kind = str(match.lastgroup)
        found.append((kind, match[kind]))
        at = match.end()
    if not found:
        raise UsageError("`where` is empty", _FORM)
    return found


def _comparison(text: str, tokens: list[tuple[str, str]]) -> Comparison:
    if len(tokens) < 3:
        raise UsageError(f"`where` ends before a comparison is whole: `{text.strip()}`", _FORM)
    (name_kind, name), (sign_kind, sign), (value_kind, value) = tokens[:3]
    if name_kind not in ("word", "quoted"):
        raise UsageError(f"`where`: a column is expected instead of `{name}`", _FORM)
    if sign_kind != "operator":
        raise UsageError(f"`where`: a comparison is expected after `{name}` instead of `{sign}`", _FORM)
    if value_kind == "operator":
        raise UsageError(f"`where`: a value is expected after `{name} {sign}` instead of `{value}`", _FORM)
    del tokens[:3]
    if value_kind == "text":
        return Comparison(name, sign, value[1:-1])
    number = number_of(value)
    return Comparison(name, sign, value if number is None else number)
