"""Curves over the stages of a run: counters, kept lrs, forks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.base.errors import CptError, PlanError, UsageError
from cpt.base.records import from_json, to_json
from cpt.plan.types import Lr
from cpt.schedules import curve, pre_anneal_step, resolve
from cpt.schedules.join import ParentLr, StageLr


def stage(name, steps, lr=None, keep=False, parent=None, at=None, outside=None, tokens_per_step=1024):
    return StageLr(
        name=name,
        steps=steps,
        tokens_per_step=tokens_per_step,
        lr=lr,
        keep_lr=keep,
        parent=parent,
        parent_at=at,
        outside=outside,
    )


def lrs(lr, steps):
    at = curve(lr)
    return [at(n) for n in range(steps)]


INFINITE = {"schedule": "infinite", "peak": 1e-3, "warmup": "5%", "cooldown": "30%", "counter": "run"}


def test_anneal_starts_at_the_lr_domain_ended_on():
    resolved = resolve(
        [
            stage("domain", 100, {"schedule": "infinite", "peak": 3e-5, "counter": "run"}),
            stage("anneal", 20, {"schedule": "linear", "end": 0}, keep=True, parent="domain"),
        ]
    )
    assert resolved["anneal"].start_lr == lrs(resolved["domain"], 100)[-1] == 1.5e-5
    assert resolved["anneal"].points == (1.5e-5, 1.5e-5, 0.0)
    assert resolved["anneal"].offset == 0
    assert resolved["domain"].points == (3e-5, 3e-5, 1.5e-5)


def test_stages_that_count_the_run_share_one_curve():
    parts = [stage("a", 70, INFINITE), stage("b", 50, INFINITE, keep=True, parent="a")]
    parts.append(stage("c", 80, INFINITE, keep=True, parent="b"))
    resolved = resolve(parts)
    whole = resolve([stage("all", 200, INFINITE)])["all"]
    joined = [x for name, n in (("a", 70), ("b", 50), ("c", 80)) for x in lrs(resolved[name], n)]
    assert joined == lrs(whole, 200)
    assert [resolved[n].offset for n in "abc"] == [0, 70, 120]
    assert {resolved[n].span for n in "abc"} == {200}


def test_a_stage_that_only_keeps_the_lr_goes_on_with_its_parents_curve():
    told = resolve([stage("a", 70, INFINITE), stage("b", 50, INFINITE, keep=True, parent="a")])
    kept = resolve([stage("a", 70, INFINITE), stage("b", 50, None, keep=True, parent="a")])
    assert kept == told


def test_a_stage_that_only_keeps_the_lr_of_a_stage_counter_holds_it():
    parts = [stage("a", 70, {"schedule": "cosine", "peak": 1e-3}), stage("b", 50, None, keep=True, parent="a")]
    resolved = resolve(parts)
    assert set(lrs(resolved["b"], 50)) == {lrs(resolved["a"], 70)[-1]}


def test_without_lr_in_keep_a_stage_starts_a_chain_of_its_own():
    resolved = resolve([stage("a", 70, INFINITE), stage("b", 50, INFINITE, keep=False, parent="a")])
    assert (resolved["b"].offset, resolved["b"].span, resolved["b"].start_lr) == (0, 50, 0.0)


def test_a_fork_before_the_anneal_goes_on_as_if_nobody_had_annealed():
    lr = {**INFINITE, "anneal": "20%"}
    resolved = resolve(
        [stage("a", 100, lr), stage("b", 100, lr, keep=True, parent="a", at="pre_anneal")],
    )
    assert pre_anneal_step(resolved["a"], 100) == 80
    before, after = lrs(resolved["a"], 100), lrs(resolved["b"], 100)
    # The cooldown, a share of 100 steps, is over at step 35; the fork at 80 stays on the constant lr.
    assert before[79] == after[0] == 5e-4
    assert resolved["b"].offset == 80 and resolved["b"].span == 180
    assert pre_anneal_step(resolved["b"], 100) == 180 - 36 - 80
    assert after[-1] < 5e-4


def test_a_fork_at_a_step_takes_the_lr_of_that_step():
    parts = [stage("a", 1000, INFINITE)]
    parts.append(stage("release", 50, {"schedule": "linear"}, keep=True, parent="a", at=200))
    resolved = resolve(parts)
    assert resolved["release"].start_lr == lrs(resolved["a"], 1000)[199]


def test_a_fork_does_not_lengthen_the_curve_it_leaves():
    alone = resolve([stage("a", 100, INFINITE)])["a"]
    forked = resolve([stage("a", 100, INFINITE), stage("b", 300, INFINITE, keep=True, parent="a", at=60)])
    assert forked["a"] == alone
    assert lrs(forked["b"], 40) == lrs(alone, 100)[60:]


def test_two_children_of_one_stage_reach_as_far_as_the_longer():
    parts = [stage("a", 100, INFINITE)]
    parts += [stage(name, n, INFINITE, keep=True, parent="a") for name, n in (("short", 50), ("long", 300))]
    resolved = resolve(parts)
    assert {lr.span for lr in resolved.values()} == {400}
    assert lrs(resolved["short"], 50) == lrs(resolved["long"], 300)[:50]


def test_lengths_in_tokens_become_steps():
    lr = {"schedule": "wsd", "peak": 1e-3, "warmup": "10K", "decay": "100 steps"}
    options = resolve([stage("a", 1000, lr)])["a"].options
    assert options["warmup"] == "10 steps" and options["decay"] == "100 steps"
    assert options["end"] == 1e-4 and options["shape"] == "minus_sqrt"


def test_a_checkpoint_of_another_run_hands_over_its_curve():
    first = resolve([stage("a", 100, INFINITE)])["a"]
    outside = ParentLr(last=curve(first)(99), run_step=100, lr=first)
    for lr in (None, INFINITE):
        resolved = resolve([stage("b", 60, lr, keep=True, outside=outside)])["b"]
        assert (resolved.offset, resolved.span) == (100, 160)
        assert lrs(resolved, 60) == [5e-4] * 60


def test_a_resolved_lr_survives_json():
    lr = resolve([stage("a", 100, {**INFINITE, "anneal": "10%"})])["a"]
    again = from_json(Lr, to_json(lr))
    assert again == lr
    assert lrs(again, 100) == lrs(lr, 100)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 119))
def test_a_stop_anywhere_changes_no_lr(first, second, stop):
    lr = {**INFINITE, "anneal": "25%"}
    resolved = resolve([stage("a", first, lr), stage("b", second, lr, keep=True, parent="a")])
    for name, steps in (("a", first), ("b", second)):
        straight = lrs(resolved[name], steps)
        at = min(stop, steps)
        assert [curve(resolved[name])(n) for n in range(at, steps)] == straight[at:]


@given(st.integers(2, 300), st.integers(2, 300), st.sampled_from(["linear", "cosine", "wsd", "rewarm", "constant"]))
def test_a_kept_lr_is_continuous_at_the_join(first, second, schedule):
    lr = {"schedule": schedule, **({"start": "parent"} if schedule == "rewarm" else {})}
    if schedule == "wsd":
        lr["decay"] = "50 steps" if second > 100 else "0%"
    parts = [stage("a", first, INFINITE), stage("b", second, lr, keep=True, parent="a")]
    resolved = resolve(parts)
    last, begins = lrs(resolved["a"], first)[-1], resolved["b"].points[0]
    assert begins == pytest.approx(last, rel=1e-12)
    assert resolved["b"].points[1] == pytest.approx(last, rel=1e-12)


@given(st.integers(1, 500), st.sampled_from(["linear", "cosine", "wsd", "rewarm", "infinite", "inverse_sqrt"]))
def test_points_are_the_first_highest_and_last_lr(steps, schedule):
    lr = resolve([stage("a", steps, {"schedule": schedule, "peak": 1e-3})])["a"]
    every = lrs(lr, steps)
    assert lr.points == (every[0], max(every), every[-1])


def fails(stages):
    with pytest.raises(CptError) as error:
        resolve(stages)
    return error.value


def test_every_wrong_stage_is_named_at_once():
    error = fails(
        [
            stage("a", 100, {"schedule": "cosin", "peak": 1e-3}),
            stage("b", 100, {"schedule": "cosine", "peek": 1e-3}),
            stage("c", 100, {"schedule": "cosine"}),
            stage("d", 100, {"schedule": "linear"}, keep=True, parent="a"),
        ]
    )
    told = [error.message, *(e.message for e in error.more)]
    assert [t.split(":")[0] for t in told] == ["`stages.a.lr`", "`stages.b.lr`", "`stages.c.lr`"]
    assert isinstance(error, UsageError) and error.hints == ("did you mean `cosine`?",)
    assert "`peek`" in told[1] and error.more[0].hints == ("did you mean `peak`?",)
    assert "`peak` is missing" in told[2]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (stage("b", 9, {"schedule": "linear"}, keep=True, parent="a", at="pre_anneal"), "holds nothing before"),
        (stage("b", 9, {"schedule": "linear"}, keep=True, parent="a", at=101), "`a@101`, but `a` has 100 steps"),
        (stage("b", 9, {"schedule": "linear"}, keep=True, parent="a", at=0), "`a@0`"),
        (stage("b", 9, {"schedule": "linear", "counter": "global"}), "`counter` is `global`"),
        (stage("b", 9, {"peak": 1e-3}), "`schedule` is missing"),
        (stage("b", 9, {"schedule": "rewarm", "peak": 1e-3, "start": "parent"}), "`keep` has no `lr`"),
        (stage("b", 9, {"schedule": "linear"}, keep=True), "says nothing about an lr"),
        (stage("b", 9), "there is none"),
        (stage("b", 9, {"schedule": "cosine", "peak": 1e-3, "warmup": "10 steps"}), "longer than the 9 steps"),
    ],
)
def test_what_cannot_be_joined_is_refused(second, message):
    error = fails([stage("a", 100, INFINITE), second])
    assert isinstance(error, PlanError | UsageError)
    assert message in error.message and error.message.startswith("`stages.b.lr`: ")


def test_parts_longer_than_their_stage_are_named_with_the_overrides_that_shorten_them():
    lr = {"schedule": "infinite", "peak": 1e-4, "counter": "run", "warmup": "100M", "cooldown": "5B", "anneal": "10%"}
    fork = stage(
        "b", 29, {"schedule": "infinite", "counter": "run", "anneal": "1B"}, True, "a", "pre_anneal", None, 2**21
    )
    error = fails([stage("a", 29, lr, tokens_per_step=2**21), fork])
    named = "`warmup` 48 + `cooldown` 2,385 + `anneal` 3 steps are more than the 29 steps of the curve"
    assert error.message == f"`stages.a.lr`: {named}" and not error.more
    shorter = "`stages.a.lr.warmup=1%` `stages.a.lr.cooldown=60%`"
    assert error.hints == (f"{shorter} fits, or a longer `stages.a.tokens`",)
    error = fails([stage("a", 29, {**lr, "warmup": "1%", "cooldown": "60%"}, tokens_per_step=2**21), fork])
    assert "`anneal` 477 steps are more than the 55 steps" in error.message
    assert error.hints == ("`stages.b.lr.anneal=10%` fits, or a longer `stages.b.tokens`",)


def test_a_fork_without_the_lr_is_still_checked():
    lr = {"schedule": "linear", "peak": 1e-3}
    assert "holds nothing" in fails([stage("a", 100, INFINITE), stage("b", 9, lr, parent="a", at="pre_anneal")]).message


def test_a_stage_that_ended_at_zero_hands_over_no_peak():
    parts = [stage("a", 100, {"schedule": "linear", "peak": 1e-3})]
    error = fails([*parts, stage("b", 9, {"schedule": "cosine"}, keep=True, parent="a")])
    assert "`peak` is missing" in error.message


def test_a_chain_of_forks_stays_on_the_constant_lr_with_only_an_anneal_given():
    first = {**INFINITE, "constant": 4e-4, "end": 1e-5, "warmup": "10K", "cooldown": "100K", "anneal": "10%"}
    again = {"schedule": "infinite", "counter": "run", "anneal": "20K"}
    parts = [stage("first", 400, first)]
    parts.append(stage("second", 150, again, keep=True, parent="first", at="pre_anneal"))
    parts.append(stage("third", 150, again, keep=True, parent="second", at="pre_anneal"))
    resolved = resolve(parts)
    for name in ("second", "third"):
        every = lrs(resolved[name], 150)
        assert every[:130] == [4e-4] * 130
        assert every[-1] == pytest.approx(4e-4 * (1e-5 / 4e-4) ** (19 / 20), rel=1e-12)
    assert resolved["third"].offset == 360 + 130
