"""Two plans side by side."""

from __future__ import annotations

import dataclasses

from cpt.plan.diff import ABSENT, diff, same_result
from cpt.plan.fingerprint import with_fingerprints
from cpt.plan.types import Parallel, RunPlan
from tests.unit.plan.made import plan, stage


def test_equal_plans_do_not_differ() -> None:
    assert diff(plan(), plan()) == []


def test_values_that_change_the_result_come_first() -> None:
    found = diff(plan(), plan(stage(parallel=Parallel(tp=2), seed=9, mixture={"law": 0.75, "news": 0.2, "x": 0.05})))
    assert [(d.key, d.a, d.b, d.changes_result) for d in found] == [
        ("stages.domain.train.seed", 1, 9, True),
        ("stages.domain.train.mixture.news", 0.25, 0.2, True),
        ("stages.domain.train.mixture.x", ABSENT, 0.05, True),
        ("stages.domain.train.parallel.tp", 1, 2, False),
    ]


def test_names_and_folders_are_no_difference() -> None:
    assert diff(plan(), dataclasses.replace(plan(), name="x", runs="/y", cache="/z", id="1")) == []


def test_stages_with_the_same_result_are_named() -> None:
    def done(seed: int) -> RunPlan:
        return with_fingerprints(plan(stage(), stage("b", "domain", seed=seed)), {}, {})

    assert same_result(done(1), done(2)) == ["domain"]
