"""Whether rows determine a law with all its terms: the question behind resamples and folds."""

from __future__ import annotations

from collections.abc import Mapping

from cpt.base.errors import UsageError
from cpt.laws.law import Law
from cpt.laws.rows import Rows


def determined(law: Law, rows: Rows, options: Mapping[str, object]) -> bool:
    """The rows determine every parameter of the law: enough sizes, token counts, ratios and rows."""
    try:
        found, _ = type(law).for_rows(rows, **options)
    except UsageError:
        return False
    return [p.name for p in found.parameters] == [p.name for p in law.parameters]
