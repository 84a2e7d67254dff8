"""Two plans side by side."""

from __future__ import annotations

import dataclasses

from cpt.plan.diff import ABSENT, Difference, diff, same_result, shown
from cpt.plan.fingerprint import with_fingerprints
from cpt.plan.model import Parallel
from cpt.plan.types import Replay, RunPlan
from tests.unit.plan.made import plan, stage


def test_equal_plans_do_not_differ() -> None:
    assert diff(plan(), plan()) == []


def test_values_that_change_the_result_come_first() -> None:
    found = diff(plan(), plan(stage(parallel=Parallel(tp=2), seed=9, mixture={"law": 0.75, "news": 0.2, "x": 0.05})))
    assert [(d.key, d.a, d.b, d.changes_result) for d in found] == [
        ("stages.domain.seed", 1, 9, True),
        ("stages.domain.mixture.news", 0.25, 0.2, True),
        ("stages.domain.mixture.x", ABSENT, 0.05, True),
        ("stages.domain.parallel.tp", 1, 2, False),
    ]


def test_names_and_folders_are_no_difference() -> None:
    assert diff(plan(), dataclasses.replace(plan(), name="x", runs="/y", cache="/z", id="1")) == []


def test_stages_with_the_same_result_are_named() -> None:
    def done(seed: int) -> RunPlan:
        return with_fingerprints(plan(stage(), stage("b", "domain", seed=seed)), {}, {})

    assert same_result(done(1), done(2)) == ["domain"]


def test_a_group_that_is_new_is_told_once_and_by_keys_that_can_be_typed() -> None:
    found = diff(plan(), plan(stage(replay=Replay(share=0.3, sources={"news": 1.0}))))
    keys = [d.key for d in found]
    assert "stages.domain.replay.share" in keys and "stages.domain.replay" not in keys
    assert not any(".train." in key for key in keys)
    assert {d.a for d in found} == {ABSENT}


def test_a_parent_is_told_by_its_key() -> None:
    first, second = (plan(stage(), stage("b", parent)) for parent in ("base", "domain"))
    assert [d.key for d in diff(first, second)] == ["stages.b.from"]


def test_steps_are_not_told_beside_the_tokens_they_come_from() -> None:
    found = diff(plan(stage(tokens=29_696, steps=29)), plan(stage(tokens=59_392, steps=58)))
    assert [d.key for d in found] == ["stages.domain.tokens"]
    assert shown(found[0]) == ("29.7K", "59.4K")


def test_values_that_would_look_alike_are_shown_in_full() -> None:
    assert shown(Difference("stages.a.tokens", 29_696, 29_697, True)) == ("29696", "29697")
    assert shown(Difference("stages.a.seed", 12_345, None, True)) == ("12345", "none")
