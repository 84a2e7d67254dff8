"""Which corpora a run needs before it can start."""

from __future__ import annotations

from cpt.plan.types import Evaluate, Replay, StopIf
from cpt.stages.prepare import used_sources
from tests.unit.stages.plans import changed, plan, stage


def test_only_sources_that_a_stage_reads_are_prepared() -> None:
    one = changed(stage(), "f", mixture={"pubmed": 1.0})
    assert used_sources(plan(one)) == ["pubmed"]


def test_replay_evaluation_and_guards_read_sources_too() -> None:
    one = changed(stage(), "f", mixture={"pubmed": 1.0})
    for extra in (
        {"replay": Replay(share=0.1, sources={"web": 1.0})},
        {"evaluate": Evaluate(sources=("web",))},
        {"stop_if": StopIf(source="web", loss_rises=0.1)},
    ):
        assert used_sources(plan(changed(one, "f", **extra))) == ["web", "pubmed"]


def test_an_evaluation_without_sources_measures_all() -> None:
    assert used_sources(plan(stage("measure", kind="evaluate"))) == ["web", "pubmed"]
    chosen = stage("measure", kind="evaluate", options={"sources": ["web"]})
    assert used_sources(plan(chosen)) == ["web"]
