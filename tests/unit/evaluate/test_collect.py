"""From a run folder's events to what was gained and forgotten."""

import pytest

from cpt.base.files import read_json
from cpt.base.records import from_json
from cpt.evaluate import account, measurements
from cpt.evaluate.collect import chain_of
from cpt.plan.types import RunPlan
from cpt.report.table import table
from tests import made_run
from tests.made_run import loss_of


def read(run):
    plan = from_json(RunPlan, read_json(run / "plan.json"))
    return plan, {name: run / "stages" / name for name in plan.stages}


def test_a_run_from_scratch_is_compared_with_the_end_of_its_first_stage(tmp_path):
    result = account(*read(made_run.make(tmp_path)))
    assert result.chain == ("base", "domain", "anneal")
    assert [row.label for row in result.rows] == ["start", "base", "domain", "anneal"]
    assert result.before == "the end of `base`"
    general, medical = result.changes
    assert general.role == "replayed" and medical.role == "new"
    assert medical.nats == pytest.approx(loss_of("anneal", 1, 1) - loss_of("base", 1, 1))
    assert medical.verdict == "gained" and general.verdict == "unchanged"
    assert result.matrix is not None and result.matrix.stages == ("domain", "anneal")
    assert dict(result.matrix.learned) == {"general": 0, "medical": 1}


def test_the_medical_loss_after_domain_is_in_the_matrix(tmp_path):
    matrix = account(*read(made_run.make(tmp_path))).matrix
    assert matrix.column("medical")[1] == -loss_of("domain", 1, 1)
    assert matrix.backward_transfer().value == pytest.approx(loss_of("domain", 1, 1) - loss_of("anneal", 1, 1))


def test_a_stability_gap_is_found_in_the_stage_that_has_one(tmp_path):
    gaps = account(*read(made_run.make(tmp_path))).gaps
    assert gaps["domain"]["general"].is_gap
    assert not gaps["domain"]["medical"].is_gap
    assert gaps["domain"]["general"].depth == pytest.approx(loss_of("domain", 0, 20 / 120) - loss_of("domain", 0, 0))


def test_an_unfinished_run_gives_what_it_has(tmp_path):
    result = account(*read(made_run.make(tmp_path, until=("domain", 45))))
    assert [row.label for row in result.rows] == ["start", "base", "domain so far"]
    assert len(result.changes) == 2 and result.matrix is not None
    early = account(*read(made_run.make(tmp_path / "early", until=("base", 5))))
    assert early.changes == () and early.matrix is None and early.problem


def test_a_run_that_never_measured_says_so(tmp_path):
    plan, homes = read(made_run.make(tmp_path))
    result = account(plan, {name: tmp_path / "nowhere" for name in homes})
    assert result.problem == "nothing has been measured yet" and not result.rows


def test_one_stage_from_scratch_has_forgotten_nothing_and_has_no_measures_of_it(tmp_path):
    folder = made_run.make(tmp_path, until=("domain", 0))
    plan = from_json(RunPlan, read_json(folder / "plan.json"))
    found = account(plan, {"base": folder / "stages" / "base"})
    assert found.changes and found.matrix is None
    assert "nothing yet that could be forgotten" in found.problem
    assert "forgetting" not in table(found) and "FUAR" not in table(found)


def test_a_start_that_was_not_measured_leaves_no_matrix(tmp_path):
    run = made_run.make(tmp_path)
    events = run / "stages" / "base" / "attempt_1" / "events.jsonl"
    events.write_text("".join(x for x in events.read_text().splitlines(True) if '"when": "start"' not in x))
    plan, homes = read(run)
    made_base = account(plan, homes)
    assert made_base.before == "the end of `base`" and made_base.matrix is not None
    from dataclasses import replace

    given = replace(plan, base=replace(plan.base, kind="hf", path="/models/base"))
    result = account(given, homes)
    assert result.matrix is None and "start was not measured" in result.problem


def test_a_fork_before_the_parents_anneal_is_compared_with_that_step(tmp_path):
    from dataclasses import replace

    plan, homes = read(made_run.make(tmp_path))
    forked = replace(plan.stages["domain"], parent_at=100)
    result = account(replace(plan, stages={**plan.stages, "domain": forked}), homes)
    assert result.rows[1].losses["general"].loss == loss_of("base", 0, 100 / 150)
    assert not result.rows[1].provisional
    assert [row.label for row in result.rows] == ["start", "base@100", "domain", "anneal"]
    assert result.before == "`base@100`"
    # The parent's own end is shown too, but the maths goes over the chain.
    (release,) = result.beside
    assert release.label == "base (its end, a release)"
    assert release.losses["general"].loss == loss_of("base", 0, 1)
    assert result.matrix.stages == ("domain", "anneal")


def evaluated(tmp_path):
    """The made run with an evaluate stage that measured the end of `domain`."""
    from cpt.base.files import write_json
    from cpt.base.records import to_json
    from cpt.plan.types import StagePlan

    run = made_run.make(tmp_path)
    plan, _ = read(run)
    from dataclasses import replace

    stage = StagePlan(name="ev", kind="evaluate", parent="domain")
    write_json(run / "plan.json", to_json(replace(plan, stages={**plan.stages, "ev": stage})))
    folder = run / "stages" / "ev" / "attempt_1"
    folder.mkdir(parents=True)
    made_run._append(folder / "events.jsonl", [made_run._eval("domain", made_run.NAMES, 0, "end", 0.9, made_run.START)])
    write_json(folder.parent / "state.json", {"status": "done", "attempt": 1, "updated": made_run.START})
    return run


def test_what_an_evaluate_stage_measured_is_shown_and_changes_no_account(tmp_path):
    run = evaluated(tmp_path)
    result = account(*read(run))
    assert result.chain == ("base", "domain", "anneal") and len(result.rows) == 4
    assert [row.label for row in result.beside] == ["ev (measures domain)"]

    from cpt.report.facts import report_json
    from cpt.report.page import write_page
    from cpt.report.status import read_status, status_text
    from cpt.report.table import final_table

    loss = f"{loss_of('domain', 1, 0.9):.3f}"
    line = next(line for line in final_table(run).splitlines() if line.startswith("ev (measures domain)"))
    assert line.split()[-1] == loss
    page = write_page(run).read_text()
    assert "ev (measures domain)" in page and loss in page
    assert report_json(run)["also_measured"][0]["after"] == "ev"
    assert f"medical {loss} nats/token" in status_text(read_status(run), made_run.START)


def test_a_run_that_only_evaluates_still_shows_what_it_measured(tmp_path):
    import shutil

    from cpt.report.page import write_page
    from cpt.report.table import final_table

    run = evaluated(tmp_path)
    for name in ("base", "domain", "anneal"):
        shutil.rmtree(run / "stages" / name)
    assert "ev (measures domain)" in final_table(run) and "ev (measures domain)" in write_page(run).read_text()


def test_a_damaged_measurement_is_passed_over():
    good = {"kind": "eval", "step": 2, "tokens": 9, "when": "during", "losses": {"a": {"loss": 1.0}}}
    bad = [
        {"kind": "eval", "step": 1},
        {"kind": "eval", "step": 1, "losses": []},
        {"kind": "eval", "step": 3, "losses": {"a": {"loss": None}, "b": 3}},
    ]
    found = measurements([*bad, good, good])
    assert [(m.step, set(m.losses)) for m in found] == [(2, {"a"}), (3, set())]


def test_the_chain_leaves_out_what_only_measures_or_converts(tmp_path):
    plan, _ = read(made_run.make(tmp_path))
    assert chain_of(plan, "export") == ("base", "domain", "anneal")
