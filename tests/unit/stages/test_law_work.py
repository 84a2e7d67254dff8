"""A law stage from the events of its proxies to `law.json`: the ratio, what stands in the file, what makes it unfit."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from cpt.base.errors import UsageError
from cpt.base.files import read_lines
from cpt.laws.saved import SavedLaw
from cpt.laws.table import read
from cpt.stages import law_work
from tests.unit.stages import proxy_grid as grid


def worked(made) -> SavedLaw:
    """Do the stage's work, without other laws beside, which cost most of the time."""
    plan, run = made
    with pytest.MonkeyPatch.context() as patch:
        asked = law_work.settings_of
        patch.setattr(law_work, "settings_of", lambda *given: dataclasses.replace(asked(*given), compare=False))
        assert law_work.work(plan, grid.job(run)) == 0
    return SavedLaw.load(run / "stages" / "mix" / "law.json")


def event(run, kind):
    return next(e for e in read_lines(run / "stages" / "mix" / "attempt_1" / "events.jsonl") if e["kind"] == kind)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    plan, run = grid.make(tmp_path_factory.mktemp("runs"))
    return run, worked((plan, run))


def test_the_ratio_is_that_of_the_law_that_the_events_were_made_from(made):
    _, saved = made
    values = saved.values()
    assert saved.verdict == "fit"
    assert values["ratio"] == pytest.approx(grid.best_ratio(0.02), abs=0.01)
    assert values["replay"] == pytest.approx(1 - values["ratio"])
    assert values["loss_general"] <= grid.BASE["general"] * 1.0201


def test_the_mixture_holds_the_sources_in_the_target_stages_shares(made):
    _, saved = made
    values = saved.values()
    ratio = values["ratio"]
    assert values["mixture"] == pytest.approx({"pubmed": ratio, "web": (1 - ratio) / 2, "wiki": (1 - ratio) / 2})


def test_the_table_is_left_beside_and_reads_back(made):
    run, saved = made
    table = read(run / "stages" / "mix" / "table.csv")
    assert table.fingerprint == saved.table.fingerprint
    assert table.num_runs == len(grid.RATIOS)


def test_an_event_says_what_was_found(made):
    run, saved = made
    found = event(run, "law")
    assert (found["law"], found["verdict"], found["runs"], found["rows"]) == ("dcpt", "fit", 5, 30)
    assert found["values"]["ratio"] == saved.values()["ratio"]


def test_a_second_attempt_gives_the_same_law(made, tmp_path):
    _, saved = made
    again = worked(grid.make(tmp_path))
    assert again.to_json()["targets"] == saved.to_json()["targets"]
    assert again.values() == saved.values()


def test_a_target_whose_lr_decays_is_flagged(tmp_path):
    saved = worked(grid.make(tmp_path, options={"target_decays": True, "draws": 0}))
    assert [w["kind"] for w in saved.warnings].count("decaying_target") == 1


def test_a_table_of_finished_runs_takes_the_place_of_proxies(made, tmp_path):
    run, saved = made
    data = str(run / "stages" / "mix" / "table.csv")
    assert worked(grid.make(tmp_path, options={"data": data})).values() == saved.values()


def test_a_saved_law_is_used_as_it_is(made, tmp_path):
    run, saved = made
    again = worked(grid.make(tmp_path, options={"file": str(run / "stages" / "mix" / "law.json")}))
    assert again.to_json() == saved.to_json()


def test_a_warning_about_both_losses_is_told_once(made, tmp_path, monkeypatch):
    run, saved = made
    warn = {"kind": "mixed", "text": "the losses cannot be compared", "target": "", "strong": True}
    twice = dataclasses.replace(saved, warnings=({**warn, "target": "domain"}, {**warn, "target": "general"}))
    monkeypatch.setattr(law_work, "of_file", lambda options: twice)
    where = grid.make(tmp_path, options={"file": str(run / "stages" / "mix" / "law.json")})
    worked(where)
    events = read_lines(where[1] / "stages" / "mix" / "attempt_1" / "events.jsonl")
    assert [e["text"] for e in events if e["kind"] == "warning"] == ["the losses cannot be compared"]


def test_a_table_of_other_corpora_is_refused(tmp_path):
    table = tmp_path / "runs.csv"
    rows = "".join(f"{i},{a},{b},{1 - a - b:g},{3 - a:g},{4 - b:g},{2 + a:g}\n" for i, (a, b) in enumerate(_simplex()))
    table.write_text("run,w_a,w_b,w_c,loss_a,loss_b,loss_c\n" + rows)
    options = {"data": str(table), "law": "mixing", "draws": 0, "tolerance": None}
    with pytest.raises(UsageError, match="is about `a`, and the sources of this law are `pubmed`, `web`, `wiki`"):
        worked(grid.make(tmp_path / "runs", options=options))


def _simplex() -> list[tuple[float, float]]:
    return [(a / 4, b / 4) for a in range(5) for b in range(5 - a)]


def test_averages_say_that_their_losses_are_not_those_of_runs(tmp_path):
    saved = worked(grid.make(tmp_path, how="merge", options={"law": "mixing", "draws": 0}))
    assert "merged" in [w["kind"] for w in saved.warnings]
    assert 0 <= saved.values()["ratio"] <= 1


def test_averages_that_lie_within_a_tenth_of_a_nat_are_not_ranked(tmp_path):
    def flat(events):
        for number, one in enumerate(e for e in events if e["kind"] == "eval"):
            one["losses"]["pubmed"]["loss"] = 3.0 + 0.02 * number
        return events

    plan, run = grid.make(tmp_path, how="merge", options={"law": "mixing", "draws": 0})
    grid.rewrite(run, "mix-merged", flat)
    saved = worked((plan, run))
    assert saved.verdict == "unfit"
    text = "the domain losses of all averages lie within 0.080 nats (3.000 to 3.080): too close to rank, below 0.1"
    assert saved.unfit[-1] == text
    assert event(run, "law")["verdict"] == "unfit"


def test_the_work_imports_neither_torch_nor_hydra(tmp_path):
    # Few rows and a law with few parameters: the other laws beside are quickly told to be impossible.
    _, run = grid.make(tmp_path, how="merge", options={"law": "mixing", "draws": 0})
    code = (
        "import sys, json; from pathlib import Path; from cpt.plan.types import Job, RunPlan\n"
        "from cpt.base.records import from_json\n"
        "from cpt.stages import law_work; from cpt.stages.attempt import read_plan\n"
        f"job = from_json(Job, json.loads({json.dumps(json.dumps(_json(grid.job(run))))}))\n"
        "law_work.work(read_plan(Path(job.run_dir)), job)\n"
        "sys.exit(int('torch' in sys.modules or 'hydra' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def _json(value):
    from cpt.base.records import to_json

    return to_json(value)
