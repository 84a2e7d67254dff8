"""What a finished law stage shows a person: the analysis as text and as a page, made again from its `law.json`.

A stage cannot write its page itself: `report` is to the right of `stages`. The analysis of a table is the same every
time, so it is made again here; the page only when there is none that is newer than the law.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from cpt.laws.analyse import analyse
from cpt.laws.result import Analysis, Warn
from cpt.laws.saved import SavedLaw
from cpt.stages import state
from cpt.stages.attempt import read_plan
from cpt.stages.law import RESULT

PAGE = "law.html"


def read(folder: Path) -> Analysis:
    """The analysis behind a law stage's `law.json`, with what the stage itself found.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    saved = SavedLaw.load(folder / RESULT)
    found = analyse(saved.table, saved.law, saved.settings)
    told = tuple(Warn(**dict(w)) for w in saved.warnings)
    return dataclasses.replace(found, warnings=told, unfit=saved.unfit)


def text(analysis: Analysis, files: Mapping[str, str]) -> str:
    """The analysis for a terminal."""
    from cpt.report import law_text

    return law_text.text(analysis, files)


def files(folder: Path) -> dict[str, str]:
    """What lies in the folder, by what it is; the page is written when it is missing or older than the law."""
    page = _page(folder)
    found = {"law": folder / RESULT, "table": folder / "table.csv", "page": page}
    return {name: str(path) for name, path in found.items() if path is not None and path.is_file()}


def write_pages(run_dir: Path) -> list[Path]:
    """The pages of the law stages of a run that are done."""
    found = []
    for name, stage in read_plan(run_dir).stages.items():
        folder = run_dir / "stages" / name
        if stage.kind == "law" and state.read(folder).status == state.DONE:
            page = _page(state.home(folder))
            found += [page] if page is not None else []
    return found


def _page(folder: Path) -> Path | None:
    from cpt.report import law_page

    page = folder / PAGE
    if page.is_file() and page.stat().st_mtime_ns >= (folder / RESULT).stat().st_mtime_ns:
        return page
    return law_page.write(read(folder), folder)
