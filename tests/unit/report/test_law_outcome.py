"""The report tells what a law said, what it warns of, and whether it was right at the end of its target stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cpt.base.files import read_json, write_json
from cpt.base.records import from_json, to_json
from cpt.laws.analyse import analyse
from cpt.laws.saved import SavedLaw
from cpt.laws.settings import Settings
from cpt.laws.table import Table
from cpt.plan.types import RunPlan
from cpt.report import law_outcome
from cpt.report.facts import report_json
from cpt.report.history import read_run
from cpt.report.page import content, write_page
from tests import made_run
from tests.unit.laws import tables

GROUPS = {"domain": {"medical": 1.0}, "general": {"general": 1.0}}


@pytest.fixture(scope="module")
def saved() -> SavedLaw:
    given = tables.columns(noise=0.0, sizes=(5e5, 1e6, 4e6), tokens=(1e5, 3e5, 1e6))
    settings = Settings(tolerance=0.1, base_losses={"general": 12.0}, bootstrap=0, compare=False)
    return SavedLaw.of(analyse(Table.of(given, name="runs.csv"), "dcpt", settings), GROUPS)


@pytest.fixture
def run(tmp_path: Path, saved: SavedLaw) -> Path:
    """The made run with a law for its stage `domain`, which reads 70 % medical text."""
    folder = made_run.make(tmp_path)
    plan = from_json(RunPlan, read_json(folder / "plan.json"))
    law = dataclasses.replace(
        plan.stages["export"], name="mix", kind="law", parent="base", options={"target": "domain", "law": "dcpt"}
    )
    write_json(folder / "plan.json", to_json(dataclasses.replace(plan, stages={**plan.stages, "mix": law})))
    home = folder / "stages" / "mix"
    home.mkdir()
    state = {"status": "done", "attempt": 1, "step": None, "reason": "", "updated": made_run.START}
    write_json(home / "state.json", {"fingerprint": "mix", "reference": None, "guard": None, **state})
    saved.save(home / "law.json")
    return folder


def test_a_law_is_compared_with_its_target_at_the_mixture_and_length_that_it_really_had(run: Path) -> None:
    history = read_run(run)
    (outcome,) = law_outcome.outcomes(history)
    assert history.plan.model is not None
    size, tokens = history.plan.model.num_parameters, 120 * made_run.TOKENS_PER_STEP
    found = {c.name: c for c in outcome.compared}
    planted = {"domain": (tables.DOMAIN, 0.7), "general": (tables.GENERAL, 0.3)}
    for name, (constants, share) in planted.items():
        right = float(tables.loss_of(constants, size, tokens, share)[0])
        assert found[name].predicted.value == pytest.approx(right, rel=0.01)
    assert found["domain"].measured == pytest.approx(made_run.loss_of("domain", 1, 1.0), abs=0.05)
    line = law_outcome.line(outcome)
    assert line.startswith("mix at the end of domain: domain ") and "predicted" in line and "measured" in line


def test_the_page_has_the_law_its_link_and_its_warnings(run: Path) -> None:
    text = write_page(run).read_text(encoding="utf-8")
    assert "<h2>Laws</h2>" in text and 'href="stages/mix/law.html"' in text and "Was it right?" in text
    assert {row["text"] for row in content(read_run(run))["matters"] if row["stage"] == "mix"}
    assert report_json(run)["law_stages"][0]["measured_against_predicted"][0]["name"] == "domain"


def test_a_link_leads_from_where_the_page_lies(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere" / "page.html"
    out.parent.mkdir()
    text = write_page(run, out).read_text(encoding="utf-8")
    assert f'href="../{run.name}/stages/mix/law.html"' in text


def test_a_damaged_law_is_told_and_hides_no_page(run: Path) -> None:
    (run / "stages" / "mix" / "law.json").write_text("{", encoding="utf-8")
    (outcome,) = law_outcome.outcomes(read_run(run))
    assert outcome.saved is None and "law.json" in outcome.problem
    assert law_outcome.line(outcome) == ""
    assert "law.json" in write_page(run).read_text(encoding="utf-8")


def test_a_run_without_a_law_has_no_such_section(tmp_path: Path) -> None:
    assert "<h2>Laws</h2>" not in write_page(made_run.make(tmp_path)).read_text(encoding="utf-8")
