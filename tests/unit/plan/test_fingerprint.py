"""What changes a stage's fingerprint, and what does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from cpt.plan.fingerprint import with_fingerprints
from cpt.plan.model import Parallel
from cpt.plan.types import (
    Anomalies,
    Base,
    DataOptions,
    Evaluate,
    Optimizer,
    Replay,
    RunPlan,
    Saving,
    SourceFacts,
    StopIf,
    Tokenizer,
)
from tests.unit.plan.made import MODEL, plan, source, stage

CURVE = (1e-5, 1e-3, 1e-4)


def done(made: RunPlan, curves: dict[str, tuple[float, ...]] | None = None) -> RunPlan:
    return with_fingerprints(made, {}, curves or {name: CURVE for name in made.stages})


def fingerprint(made: RunPlan, name: str = "domain", **kwargs: Any) -> str:
    return done(made, **kwargs).stages[name].fingerprint


PLAIN = plan()


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": Parallel(tp=2, pp=2, dp=2)},
        {"micro_batch_size": 1},
        {"recompute": "full"},
        {"log_every": 10},
        {"evaluate": Evaluate(sources=("law",), every_steps=5)},
        {"saving": Saving(every_steps=10)},
        {"stop_if": StopIf(source="law", loss_rises=0.1)},
        {"broken_import_guard": False},
    ],
)
def test_layout_logging_and_saving_do_not_count(changes: dict[str, Any]) -> None:
    assert fingerprint(plan(stage(**changes))) == fingerprint(PLAIN)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 101},
        {"seq_length": 64},
        {"global_batch_size": 32},
        {"seed": 2},
        {"precision": "fp32"},
        {"mixture": {"law": 0.7, "news": 0.3}},
        {"mixture": {"law": 1.0}},
        {"replay": Replay(share=0.1, sources={"news": 1.0})},
        {"optimizer": Optimizer(clip=0.5)},
        {"methods": {"ewc": {"weight": 1.0}}},
        {"anomalies": Anomalies(spike="skip")},
        {"keep": ("weights", "cursor")},
    ],
)
def test_what_changes_the_weights_counts(changes: dict[str, Any]) -> None:
    assert fingerprint(plan(stage(**changes))) != fingerprint(PLAIN)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: dataclasses.replace(p, name="x", recipe="y", runs="/a", cache="/b", config={"a": 1}),
        lambda p: dataclasses.replace(p, launcher={"name": "slurm"}, tracking={"wandb": "online"}),
        lambda p: dataclasses.replace(p, base=dataclasses.replace(p.base, path="/elsewhere")),
        lambda p: dataclasses.replace(p, tokenizer=dataclasses.replace(p.tokenizer, path="/elsewhere")),
        lambda p: dataclasses.replace(p, model=dataclasses.replace(MODEL, hf_config={"torch_dtype": "bfloat16"})),
        lambda p: dataclasses.replace(
            p, sources={"law": source("law", paths=("/a",), licence="CC0", identity="touched"), "news": source("news")}
        ),
    ],
)
def test_names_paths_and_the_launcher_do_not_count(change: Callable[[RunPlan], RunPlan]) -> None:
    assert done(change(PLAIN)).id == done(PLAIN).id


@pytest.mark.parametrize(
    "change",
    [
        {"base": Base(kind="hf", path="/models/base", identity="other weights")},
        {"tokenizer": Tokenizer(path="/models/base/tokenizer.json", hash="other", vocab_size=1000)},
        {"model": dataclasses.replace(MODEL, rope_theta=5e5)},
        {"data": DataOptions(mask_documents=True)},
    ],
)
def test_base_tokenizer_model_and_packing_count(change: dict[str, Any]) -> None:
    assert done(plan(**change)).id != done(PLAIN).id


def test_a_source_counts_by_content_once_it_is_prepared() -> None:
    facts = SourceFacts(tokens=1, documents=1, bytes=1)
    raw = {"law": source("law", facts=facts), "news": source("news", facts=facts)}
    touched = {**raw, "law": source("law", facts=facts, identity="touched")}
    assert done(plan(sources=raw)).id != done(plan(sources=touched)).id
    prepared = {**raw, "law": source("law")}
    assert (
        done(plan(sources=prepared)).id == done(plan(sources={**prepared, "law": source("law", identity="touched")})).id
    )


def test_names_of_stages_and_sources_do_not_count() -> None:
    renamed = plan(
        stage("other", mixture={"law2": 0.75, "news": 0.25}),
        sources={"law2": dataclasses.replace(source("law"), name="law2"), "news": source("news")},
    )
    assert fingerprint(renamed, "other") == fingerprint(PLAIN)
    assert done(renamed).id == done(PLAIN).id


def test_a_parent_that_changes_changes_its_children_and_no_one_else() -> None:
    def three(seed: int) -> RunPlan:
        return done(plan(stage(seed=seed), stage("child", "domain"), stage("other")))

    a, b = three(1), three(2)
    assert a.stages["child"].fingerprint != b.stages["child"].fingerprint
    assert a.stages["other"].fingerprint == b.stages["other"].fingerprint


def test_where_a_stage_leaves_its_parent_counts() -> None:
    ends = done(plan(stage(), stage("child", "domain")))
    forks = done(plan(stage(), stage("child", "domain", parent_at="pre_anneal")))
    assert ends.stages["child"].fingerprint != forks.stages["child"].fingerprint
    assert ends.stages["domain"].fingerprint == forks.stages["domain"].fingerprint


def test_the_lr_counts_by_its_values() -> None:
    assert fingerprint(PLAIN, curves={"domain": (1e-5, 1e-3, 2e-4)}) != fingerprint(PLAIN)


def test_another_checkpoint_outside_of_the_run_counts_by_identity() -> None:
    made = plan(stage(parent="/a"))
    one = with_fingerprints(made, {"domain": "x"}, {}).id
    moved = with_fingerprints(plan(stage(parent="/b")), {"domain": "x"}, {}).id
    other = with_fingerprints(made, {"domain": "y"}, {}).id
    assert one == moved != other


def test_the_layout_of_a_stage_that_measures_does_not_count() -> None:
    def look(**options: Any) -> str:
        return done(plan(stage(), stage("look", "domain", kind="evaluate", options={"sources": ["law"], **options}))).id

    assert look(tp=2, micro_batch_size=8) == look()
    assert look(tokens=5) != look()
