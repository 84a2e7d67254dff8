"""Rules across fields and stages."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cpt.base.errors import PlanError
from cpt.plan.check import Outside, check, passes, warnings
from cpt.plan.model import Parallel
from cpt.plan.types import Anomalies, Evaluate, Lr, Replay, Retain, RunPlan, Saving, StopIf, Tokenizer
from tests.unit.plan.made import MODEL, plan, source, stage

HF = {"base": Outside(kind="hf", identity="x")}


def broken(made: RunPlan, outside: dict[str, Outside] | None = None, devices: int | None = None) -> list[str]:
    try:
        check(made, HF if outside is None else outside, devices)
    except PlanError as error:
        return [error.message, *(e.message for e in error.more)]
    return []


def test_a_plain_plan_breaks_no_rule() -> None:
    assert broken(plan(stage(), stage("anneal", "domain", ("weights", "optimizer", "cursor", "lr", "rng")))) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mixture": {"lwa": 1.0}}, "unknown source `lwa`"),
        ({"replay": Replay(share=0.1, sources={"nwes": 1.0})}, "unknown source `nwes`"),
        ({"evaluate": Evaluate(sources=("lawn",))}, "unknown source `lawn`"),
        ({"stop_if": StopIf(source="nws", loss_rises=0.1)}, "unknown source `nws`"),
        (
            {"stop_if": StopIf(source="news", loss_rises=0.1), "evaluate": Evaluate(sources=("law",))},
            "which `evaluate.sources` does not measure",
        ),
        ({"parallel": Parallel(tp=3)}, "tp` 3 does not divide the model's 8 attention heads"),
        ({"parallel": Parallel(tp=8)}, "tp` 8 does not divide the model's 4 key and value heads"),
        ({"parallel": Parallel(pp=7)}, "7 pipeline parts (pp · vp), but the model has 6 layers"),
        ({"parallel": Parallel(pp=2, vp=2)}, "6 layers do not divide evenly into 4 parts"),
        ({"parallel": Parallel(pp=2, layers=(1, 2, 3))}, "`stages.domain.parallel.layers` has 3 parts, pp · vp is 2"),
        ({"parallel": Parallel(pp=2, layers=(3, 4))}, "adds up to 7, wanted 6"),
        ({"parallel": Parallel(vp=2)}, "vp` 2 would have no effect"),
        ({"parallel": Parallel(sequence_parallel=True)}, "would have no effect: `tp` is 1"),
        ({"parallel": Parallel(dp=3)}, "`global_batch_size` 16 is not a multiple of"),
        ({"micro_batch_size": 5}, "`global_batch_size` 16 is not a multiple of"),
        ({"saving": Saving(retain=Retain(every=10**6))}, "`checkpoint.retain.every` would have no effect"),
        ({"anomalies": Anomalies(spike="rollback")}, "needs `checkpoint.every`"),
        ({"keep": ("weights", "optimizer")}, "`keep` has `optimizer`, but a Hugging Face folder holds `weights` only"),
        ({"keep": ()}, "has no `weights`"),
    ],
)
def test_a_stage_that_breaks_a_rule_is_refused(changes: dict[str, Any], said: str) -> None:
    found = broken(plan(stage(**changes)))
    assert any(said.replace("`keep` has", "keep` has") in message for message in found), found
    assert len(found) == 1


def test_the_widest_tp_that_fits_is_suggested() -> None:
    with pytest.raises(PlanError) as caught:
        check(plan(stage(parallel=Parallel(tp=8))), HF)
    assert caught.value.hints == ("a `tp` of 1 or 2 or 4 does",)


def test_an_uneven_split_that_adds_up_is_allowed() -> None:
    assert broken(plan(stage(parallel=Parallel(pp=2, layers=(4, 2))))) == []


def test_nothing_can_be_kept_from_scratch() -> None:
    assert "starts from scratch" in broken(plan(stage(parent=None)))[0]
    assert broken(plan(stage(parent=None, keep=()))) == []


def test_a_converted_checkpoint_holds_weights_only() -> None:
    out = stage("out", "domain", kind="convert", options={"to": "hf"})
    assert "holds `weights` only" in broken(plan(stage(), out, stage("more", "out", ("weights", "cursor"))))[0]


def test_a_stage_that_measures_hands_on_what_its_parent_holds() -> None:
    look = stage("look", "domain", kind="evaluate", options={"sources": ("law",)})
    assert broken(plan(stage(), look, stage("more", "look", ("weights", "optimizer")))) == []


def test_there_is_nothing_to_convert_or_measure_in_scratch() -> None:
    for kind in ("convert", "evaluate"):
        assert f"nothing to {kind}" in broken(plan(stage("x", None, kind=kind)))[0]


def test_a_tokenizer_larger_than_the_vocabulary_is_refused() -> None:
    made = plan(tokenizer=Tokenizer(path="t", hash="x", vocab_size=1001))
    assert "1,001 tokens, but the model's vocabulary has 1,000 rows" in broken(made)[0]


def test_another_tokenizer_than_the_base_was_trained_with_is_refused() -> None:
    base = {"base": Outside(kind="native", identity="x", holds=("weights",), tokenizer_hash="another")}
    assert "was trained with another tokenizer" in broken(plan(), base)[0]


def test_a_stage_from_elsewhere_must_hold_the_same_model() -> None:
    other = dataclasses.replace(MODEL, num_layers=7)
    outside = {**HF, "domain": Outside(kind="hf", identity="y", model=other)}
    assert "another shape" in broken(plan(stage(parent="/elsewhere")), outside)[0]


def test_a_source_without_held_out_text_cannot_be_measured() -> None:
    made = plan(sources={"law": source("law", valid=0.0), "news": source("news")})
    assert "nothing is held out" in broken(made)[0]


def test_a_layout_larger_than_the_launcher_is_refused() -> None:
    assert (
        "needs 8 devices (tp 2, pp 2, dp 2), the launcher has 4"
        in broken(plan(stage(parallel=Parallel(tp=2, pp=2, dp=2))), devices=4)[0].split("parallel` ")[1]
    )


def test_every_broken_rule_is_in_one_error() -> None:
    found = broken(
        plan(stage(mixture={"x": 1.0}, parallel=Parallel(tp=3)), stage("b", "domain", (), micro_batch_size=3))
    )
    assert len(found) == 4, found


def warned(made: RunPlan, before: dict[str, float] | None = None, devices: int | None = None) -> list[str]:
    return warnings(made, before or {}, devices)


def test_a_plain_plan_has_no_warnings() -> None:
    assert warned(plan()) == []


def test_text_that_is_read_often_is_a_warning_with_its_source() -> None:
    made = plan(
        stage(steps=400, tokens=400 * 16 * 128), sources={"law": source("law", 100_000), "news": source("news")}
    )
    (found,) = warned(made)
    assert "`law` (100K tokens) is read 6.1 times" in found and "arXiv:2305.16264" in found


def test_passes_add_up_over_the_stages_that_the_weights_went_through() -> None:
    first, second = (
        stage(),
        stage("b", "domain", ("weights", "cursor"), replay=Replay(share=0.5, sources={"news": 1.0})),
    )
    tokens = 100 * 16 * 128
    found = passes(plan(first, second), second)
    assert found["law"] == pytest.approx((0.75 + 0.375) * tokens / 1e6)
    assert found["news"] == pytest.approx((0.25 + 0.125 + 0.5) * tokens / 1e6)


def test_a_fork_counts_its_parent_only_up_to_where_it_leaves_it() -> None:
    made = plan(
        stage(keep_steps=(50,)), stage("b", "domain", ("weights",), parent_at="pre_anneal", mixture={"news": 1.0})
    )
    assert passes(made, made.stages["b"])["law"] == pytest.approx(0.5 * 0.75 * 100 * 16 * 128 / 1e6)


def test_reading_a_source_again_without_its_cursor_is_a_warning() -> None:
    again = plan(stage(), stage("b", "domain", ("weights",), mixture={"law": 1.0}))
    assert any("reads `law` from its beginning again, which `domain` has read" in w for w in warned(again))
    on = plan(stage(), stage("b", "domain", ("weights", "cursor"), mixture={"law": 1.0}))
    assert warned(on) == []


def curve(first: float, peak: float, last: float) -> Lr:
    return Lr(schedule="linear", options={}, span=100, points=(first, peak, last))


def test_an_lr_that_jumps_at_a_join_is_a_warning() -> None:
    kept = ("weights", "optimizer", "cursor", "lr")
    jump = plan(stage(), stage("b", "domain", kept, lr=curve(1e-3, 1e-3, 0.0)))
    assert any("jumps at its start, 1.0e-04 → 1.0e-03" in w for w in warned(jump, {"b": 1e-4}))
    smooth = plan(stage(), stage("b", "domain", kept, lr=curve(1e-4, 1e-4, 0.0)))
    assert warned(smooth, {"b": 1e-4}) == []


def test_a_new_optimizer_without_a_warmup_is_a_warning() -> None:
    assert any("new optimizer at its highest lr" in w for w in warned(plan(stage(lr=curve(1e-3, 1e-3, 0.0)))))


def test_a_source_that_no_stage_reads_and_idle_devices_are_warnings() -> None:
    made = plan(sources={"law": source("law"), "news": source("news"), "extra": source("extra")})
    assert warned(made, devices=4) == ["no stage trains on `extra`", "`domain` uses 1 of 4 devices"]


def test_sequences_longer_than_the_model_knows_are_a_warning() -> None:
    assert any("more than the 256 positions" in w for w in warned(plan(stage(seq_length=512))))
