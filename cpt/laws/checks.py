"""Values of a sheet as numbers, with every fault collected: file, row, column, what was found, what was wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from cpt.base.errors import UsageError
from cpt.base.units import parse_amount
from cpt.laws.rows import Floats
from cpt.laws.sheet import Sheet

SHOWN = 5  # faults that are named
SUM_TOLERANCE = 0.005  # shares that miss 1 by more are wrong, by less are rounded [fraction]
SAME = 1e-12  # of shares that sum to 1 as well as numbers can
LARGEST = 1e30  # more of anything, or less than its inverse, is a slip
ROUNDING = 1e-6  # of shares written with six digits: not worth a word


class Problems:
    """Faults of a table, found in one reading and reported together."""

    def __init__(self) -> None:
        self._errors: list[UsageError] = []
        self._rows: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._errors)

    def add(self, message: str, *hints: str, row: int | None = None) -> None:
        """Keep a fault."""
        self._errors.append(UsageError(message, *hints))
        if row is not None:
            self._rows.add(row)

    def at(self, row: int) -> bool:
        """Whether a row has one already."""
        return row in self._rows

    def throw(self) -> None:
        """Raise what was found, if anything.

        Raises:
            UsageError: the first fault, with the next ones beside it.
        """
        if not self._errors:
            return
        first, *others = self._errors[:SHOWN]
        if len(self._errors) > SHOWN:
            others.append(UsageError(f"{len(self._errors) - SHOWN} more values are wrong"))
        raise UsageError(first.message, *first.hints, more=tuple(others))


def numbers(
    sheet: Sheet,
    column: str,
    used: Sequence[int],
    problems: Problems,
    *,
    what: str,
    above: float | None = None,
    least: float | None = None,
    most: float = LARGEST,
    may_lack: bool = False,
    plain: bool = False,
) -> Floats:
    """A column as numbers; NaN where a value is wrong or lacking.

    Args:
        used: rows of the sheet.
        what: a value is, for messages.
        above, least, most: a value must be larger than this, at least this, at most this.
        may_lack: an empty cell is no fault.
        plain: no suffixes (`1.8B`, `25%`).
    """
    cells = sheet.columns[column]
    found = np.full(len(used), math.nan)
    for i, row in enumerate(used):
        cell = cells[row]
        if cell is None:
            if not may_lack:
                problems.add(f"{sheet.place(row, column)} is empty, and {what} is wanted", row=row)
            continue
        number = _number(cell, plain)
        place = sheet.place(row, column)
        if number is None:
            problems.add(f"{place} is `{cell}`, and {what} is a finite number", row=row)
        elif above is not None and number <= above:
            problems.add(f"{place} is {number:g}, and {what} is above {above:g}", row=row)
        elif least is not None and number < least:
            problems.add(f"{place} is {number:g}, and {what} is {least:g} or more", row=row)
        elif abs(number) > most or 0 < abs(number) < 1 / LARGEST:
            problems.add(f"{place} is {number:g}, which cannot be {what}", row=row)
        else:
            found[i] = number
    return found


def _number(cell: object, plain: bool) -> float | None:
    if isinstance(cell, bool):
        return None
    try:
        number = float(cell) if plain or not isinstance(cell, str) else parse_amount(cell)  # type: ignore[arg-type]
    except (UsageError, TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def texts(sheet: Sheet, column: str, used: Sequence[int]) -> tuple[str, ...]:
    """A column as labels; an empty cell is an empty label."""
    cells = sheet.columns[column]
    return tuple("" if cells[row] is None else str(cells[row]) for row in used)


def refuse_unlike_sums(
    shares: Mapping[str, Floats],
    sheet: Sheet,
    columns: Sequence[str],
    used: Sequence[int],
    problems: Problems,
    warnings: list[str],
) -> dict[str, Floats]:
    """Shares that sum to 1 in every row: rounded ones are scaled, with a word; others are a fault."""
    total = np.sum(list(shares.values()), axis=0)
    named = " + ".join(f"`{c}`" for c in columns[:4]) + (" + ..." if len(columns) > 4 else "")
    for i in np.flatnonzero(np.abs(total - 1) > SUM_TOLERANCE).tolist():
        problems.add(f"{sheet.place(used[i])}: {named} is {total[i]:g}, and shares sum to 1", row=used[i])
    off = int(np.sum(np.abs(total - 1) > ROUNDING))
    if off and not problems:
        lowest, highest = float(total.min()), float(total.max())
        warnings.append(
            f"shares of {off} rows sum to {lowest:.4g} to {highest:.4g} instead of 1; they were scaled to 1"
        )
    scale = np.where(np.abs(total - 1) > SAME, total, 1.0)
    with np.errstate(all="ignore"):
        return {corpus: values / scale for corpus, values in shares.items()}
