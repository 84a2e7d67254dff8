"""What is done about a stage, and the reason that a person reads."""

from __future__ import annotations

from pathlib import Path

from cpt.plan.types import StopIf
from cpt.stages import decide, state
from cpt.stages.decide import Found, changes
from cpt.stages.decide import decide as decided
from cpt.stages.state import State
from tests.unit.stages.plans import changed, plan, stage

DONE = State(status=state.DONE, attempt=1, step=100, fingerprint="f1")


def test_a_finished_stage_with_an_equal_fingerprint_is_kept() -> None:
    assert decided(stage(), Found(state=DONE)).action == decide.KEEP


def test_a_stage_that_only_saved_is_never_taken_for_done() -> None:
    saved = State(status=state.SAVED, attempt=1, step=100, fingerprint="f1")
    decision = decided(stage(), Found(state=saved, step=100))
    assert decision.action == decide.RUN
    assert decision.why == "was stopped, goes on from step 100 of 100"


def test_a_stage_whose_process_died_goes_on_from_its_newest_checkpoint() -> None:
    running = State(status=state.RUNNING, attempt=1, fingerprint="f1")
    assert decided(stage(), Found(state=running, step=40)).why == "was cut off, goes on from step 40 of 100"
    assert decided(stage(), Found(state=running)).why == "was cut off, starts again: nothing was saved yet"


def test_a_failed_stage_says_why_it_runs_again() -> None:
    failed = State(status=state.FAILED, attempt=1, reason="ValueError: x", fingerprint="f1")
    assert "failed (ValueError: x), goes on from step 60" in decided(stage(), Found(state=failed, step=60)).why


def test_a_finished_stage_of_another_run_is_used_by_reference() -> None:
    other = Path("/runs/older/stages/domain")
    decision = decided(stage(), Found(state=State(), alike=other))
    assert decision.action == decide.REUSE and decision.reference == other
    assert "`older`" in decision.why


def test_own_progress_is_not_thrown_away_for_another_runs_result() -> None:
    saved = State(status=state.SAVED, attempt=1, step=50, fingerprint="f1")
    assert decided(stage(), Found(state=saved, step=50, alike=Path("/runs/o/stages/domain"))).action == decide.RUN


def test_a_stage_done_under_another_plan_is_never_overwritten() -> None:
    other = changed(stage(), "f2", mixture={"web": 0.5, "pubmed": 0.5})
    decision = decided(other, Found(state=DONE, changed=changes(plan(stage()), plan(other), "domain")))
    assert decision.action == decide.REFUSE
    assert "`mixture.web` 0.3 → 0.5" in decision.why


def test_a_result_that_was_deleted_is_made_again() -> None:
    decision = decided(stage(), Found(state=DONE, missing="there is no whole checkpoint"))
    assert decision.action == decide.RUN and "no whole checkpoint" in decision.why


def test_an_ended_guard_holds_until_the_guard_or_the_stage_changes() -> None:
    guarded = changed(stage(), "f1", stop_if=StopIf(source="web", loss_rises=0.03))
    ended = State(status=state.FAILED, fingerprint="f1", guard={"source": "web", "loss_rises": 0.03}, step=40)
    assert decided(guarded, Found(state=ended, step=40)).action == decide.REFUSE
    looser = changed(stage(), "f1", stop_if=StopIf(source="web", loss_rises=0.1))
    assert decided(looser, Found(state=ended, step=40)).action == decide.RUN
    assert decided(stage(), Found(state=ended, step=40)).action == decide.RUN


def test_a_stage_that_never_ran_names_what_differs_from_the_run_before() -> None:
    new = changed(stage(), "f2", mixture={"web": 0.4, "pubmed": 0.6})
    found = Found(state=State(), than="medical-aaaaaa", changed=changes(plan(stage()), plan(new), "domain"))
    assert (
        "differs from run `medical-aaaaaa`: `mixture.web` 0.3 → 0.4, `mixture.pubmed` 0.7 → 0.6"
        in decided(new, found).why
    )


def test_a_stage_behind_a_changed_one_says_that_its_parent_changed() -> None:
    found = Found(state=State(), than="medical-aaaaaa", parent_changed=True)
    why = decided(stage("anneal", "domain"), found).why
    assert why == "never ran; its parent `domain` differs from run `medical-aaaaaa`"


def test_a_first_run_just_says_that_it_never_ran() -> None:
    assert decided(stage(), Found(state=State())).why == "never ran"


def test_changes_that_keep_the_result_are_not_named() -> None:
    from cpt.plan.model import Parallel

    other = changed(stage(), "f1", parallel=Parallel(tp=2), log_every=10)
    assert changes(plan(stage()), plan(other), "domain") == []


def test_a_change_of_one_stage_is_not_told_of_another() -> None:
    anneal = stage("anneal", "domain", fingerprint="f3")
    other = changed(anneal, "f4", seed=2)
    assert changes(plan(stage(), anneal), plan(stage(), other), "domain") == []
    assert changes(plan(stage(), anneal), plan(stage(), other), "anneal") == ["`seed` 1 → 2"]
    assert changes(plan(stage(), anneal), plan(stage(), other)) == ["`stages.anneal.seed` 1 → 2"]
