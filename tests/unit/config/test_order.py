"""`from`, and the order of the stages."""

from __future__ import annotations

import pytest

from cpt.base.errors import PlanError, UsageError
from cpt.config.order import From, order, parse_from

STAGES = ["domain", "anneal"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("base", From(base=True)),
        ("domain", From(stage="domain")),
        ("domain@12000", From(stage="domain", at=12000)),
        ("domain@12k", From(stage="domain", at=12000)),
        ("domain@pre_anneal", From(stage="domain", at="pre_anneal")),
        ("runs/medical-7c1e92", From(folder="runs/medical-7c1e92")),
        ("/models/base@500", From(folder="/models/base", at=500)),
        ("~/base", From(folder="~/base")),
        ("/odd@home/base", From(folder="/odd@home/base")),
        ("medical-7c1e92", From(folder="medical-7c1e92")),
    ],
)
def test_every_form_of_from(text: str, found: From) -> None:
    assert parse_from(text, STAGES, ["medical-7c1e92"]) == found


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("domian", "did you mean `domain`?"),
        ("bse", "did you mean `base`?"),
        ("domain@pre_aneal", "did you mean `domain@pre_anneal`?"),
        ("domain@end", "accepted: `domain@12000` (a step), `domain@pre_anneal`"),
        ("runs/x@pre_anneal", "a folder takes a step: `folder@12000`"),
    ],
)
def test_what_names_no_start_is_refused_with_the_nearest(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_from(text, STAGES)
    assert hint in caught.value.hints


def after(**parents: str) -> dict[str, From]:
    return {name: From(base=True) if p == "base" else From(stage=p) for name, p in parents.items()}


def test_parents_come_before_their_children_and_else_the_recipe_decides() -> None:
    assert order(after(c="b", a="base", b="a", d="base")) == ["a", "b", "c", "d"]


def test_a_circle_is_named_stage_by_stage() -> None:
    with pytest.raises(PlanError, match="`a` → `c` → `b` → `a`"):
        order(after(a="c", b="a", c="b", d="base"))


def test_every_circle_is_reported() -> None:
    with pytest.raises(PlanError) as caught:
        order(after(a="a", b="c", c="b", d="c"))
    assert caught.value.message == "stage `a` starts from itself"
    assert [e.message for e in caught.value.more] == ["stages start from each other in a circle: `b` → `c` → `b`"]
