"""Which corpora a run needs before it can start."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cpt.base.errors import UsageError
from cpt.checkpoint import manifest, store
from cpt.plan.types import Base, Conversion, Evaluate, Replay, RunPlan, StagePlan, StopIf
from cpt.stages.prepare import prepare, used_sources
from tests.shared import shared_data
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


def with_bad_optimizer(cache: Path, *stages: StagePlan) -> RunPlan:
    """A run whose base has main weights that are not its weights."""
    folder, source = str(cache / "made"), shared_data("ckpt", "mcore-goldens") / "bad_fully_reshardable_multibucket"
    made = Conversion(source=str(source), format="torch_dist", shown="", bytes=0, identity="b")
    of = plan(*(dataclasses.replace(s, train=None) for s in stages))
    return dataclasses.replace(of, base=Base(kind="native", path=folder), conversions={folder: made}, sources={})


def test_an_optimizer_that_is_not_its_models_is_left_out_where_no_stage_keeps_it(tmp_path: Path) -> None:
    said: list[str] = []

    def report(kind: str, **fields: Any) -> None:
        said.append(fields["text"])

    weights, both = stage("a", keep=("weights",)), stage("b", keep=("weights", "optimizer"))
    atoms = stage("c", parent="m", kind="convert", options={"to": "atom"})
    measured = stage("m", kind="evaluate")
    for wanting, hint in (
        ((both,), "take `optimizer` out of `stages.b.keep`: its weights alone can be used"),
        ((measured, atoms), "`stages.c.weights_only=true`: its weights alone can be used"),
    ):
        with pytest.raises(UsageError, match="main weights are not the model's weights in 30 of") as error:
            prepare(with_bad_optimizer(tmp_path, *wanting), report, workers=1)
        assert error.value.hints[1:] == (hint,) and not (tmp_path / "made").exists()
    prepare(with_bad_optimizer(tmp_path, weights), report, workers=1)
    assert "no stage keeps its optimizer's state, so the weights alone are converted" in said[-2]
    assert manifest.read(store.resolve(tmp_path / "made")).optimizer is None
    prepare(with_bad_optimizer(tmp_path, weights), report, workers=1)
    with pytest.raises(UsageError, match="main weights are not the model's weights") as error:
        prepare(with_bad_optimizer(tmp_path, weights, both), report, workers=1)
    assert error.value.hints == ("take `optimizer` out of `stages.b.keep`: its weights alone can be used",)
