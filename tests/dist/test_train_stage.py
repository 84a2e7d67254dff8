"""A train stage on real ranks: what the loop does when something goes wrong, and that a stop changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cpt.base.errors import DONE, GUARD, SAVED
from cpt.checkpoint import store
from cpt.engine.anomalies import judge, judge_grad_norm, roll_back
from cpt.plan.types import Anomalies, Evaluate, Saving, StopIf
from cpt.plan.model import Parallel
from tests.dist.ranks import RankFailed, run_ranks
from tests.dist.small_run import BATCH, MODEL, SEQ, STEPS, SmallRun, weights, work


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun.prepare(tmp_path_factory.mktemp("small") / "data")


@pytest.fixture(scope="module")
def straight(prepared: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """The run that nothing happened to."""
    run = prepared.copy(tmp_path_factory.mktemp("straight"))
    job = run.job(run.train())
    assert run_ranks(2, work, job) == [DONE, DONE]
    return run


def checkpoint(run: SmallRun, step: int = STEPS) -> Path:
    return run.folder / "stages" / "only" / "checkpoints" / store.folder_name(step)


def assert_same_weights(one: SmallRun, other: SmallRun) -> None:
    left, right = weights(checkpoint(one)), weights(checkpoint(other))
    assert left.keys() == right.keys() and len(left) > 15
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different


def test_a_stage_learns_and_reports_every_step(straight: SmallRun) -> None:
    job = straight.job(straight.train())  # only to find the first attempt's events
    first = type(job)(**{**vars(job), "attempt": 1})
    steps = straight.events(first, "step")
    assert [e["step"] for e in steps] == list(range(1, STEPS + 1))
    assert steps[0]["loss"] == pytest.approx(math.log(320), abs=0.2)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert steps[-1]["tokens"] == STEPS * BATCH * SEQ
    given = steps[-1]["given"]
    assert sum(given.values()) == STEPS * BATCH * SEQ
    assert abs(given["odd"] - 0.7 * STEPS * BATCH * SEQ) < SEQ
    evals = straight.events(first, "eval")
    assert [(e["step"], e["when"]) for e in evals] == [(0, "start"), (4, "during"), (8, "during"), (12, "end")]
    assert set(evals[-1]["losses"]) == {"odd", "even"}


def test_a_signal_on_one_rank_stops_all_and_going_on_gives_the_same_weights(
    prepared: SmallRun, straight: SmallRun, tmp_path: Path
) -> None:
    run = prepared.copy(tmp_path / "run")
    train = run.train(methods={"test_sabotage": {"what": "signal", "step": 4}})
    job = run.job(train)
    assert run_ranks(2, work, job) == [SAVED, SAVED]
    assert run.events(job, "stop")[0]["step"] == 5
    again = run.job(run.train())
    assert again.resume and again.resume.endswith(store.folder_name(5))
    assert run_ranks(2, work, again) == [DONE, DONE]
    assert_same_weights(run, straight)


def test_a_nan_gradient_skips_the_update_and_names_the_step(prepared: SmallRun, tmp_path: Path) -> None:
    run = prepared.copy(tmp_path / "run")
    job = run.job(run.train(methods={"test_sabotage": {"what": "nan", "step": 2}}))
    assert run_ranks(2, work, job) == [DONE, DONE]
    assert [e["step"] for e in run.events(job, "step") if "skipped" in e] == [3]
    assert "step 3: the gradient norm is nan; the update was skipped" in [e["text"] for e in run.events(job, "warning")]
    assert math.isfinite(run.events(job, "step")[-1]["loss"])


def test_a_nan_stops_the_run_where_the_rule_says_so(prepared: SmallRun, tmp_path: Path) -> None:
    run = prepared.copy(tmp_path / "run")
    train = run.train(methods={"test_sabotage": {"what": "nan", "step": 2}}, anomalies=Anomalies(nan="stop"))
    with pytest.raises(RankFailed, match="step 3: the gradient norm is nan"):
        run_ranks(2, work, run.job(train))


@pytest.mark.parametrize(
    ("bad_update", "back"),
    [(10, 9), pytest.param(8, 6, id="the newest checkpoint has the bad update too")],
)
def test_a_spike_rolls_back_behind_the_updates_that_led_there(
    prepared: SmallRun, straight: SmallRun, tmp_path: Path, bad_update: int, back: int
) -> None:
    """The weights are blown up by an update, each time it is made: the loss of the step behind it is the spike."""
    run = prepared.copy(tmp_path / "run")
    train = run.train(
        steps=15,
        tokens=15 * BATCH * SEQ,
        methods={"test_sabotage": {"what": "blow_up", "step": bad_update}},
        anomalies=Anomalies(spike="rollback", spike_factor=1.5, window=5),
    )
    job = run.job(train)
    assert run_ranks(2, work, job) == [DONE, DONE]
    spike = bad_update + 2
    steps = run.events(job, "step")
    assert [e["step"] for e in steps] == [*range(1, spike), *range(back + 1, 16)]
    left_out = [e["step"] for e in steps if "skipped" in e]
    assert left_out == [*range(back + 1, spike + 1)]
    (warning,) = run.events(job, "warning")
    assert f"; back to step {back}, without the samples of steps {back + 1} to {spike}" in warning["text"]
    assert all(e["loss"] < 1.5 * steps[0]["loss"] for e in steps[-(15 - spike) :])
    # From the checkpoint on nothing was changed until step `back`: the first losses are those of a run without a fault.
    plain = [e["loss"] for e in straight.events(replace(job, attempt=1), "step")]
    assert [e["loss"] for e in steps[:back]] == plain[:back]
    found, _ = store.newest_whole(checkpoint(run).parent)
    assert found is not None and found.name == store.folder_name(15)


def test_where_a_rollback_goes() -> None:
    saved = (10, 20, 30)
    assert roll_back(35, saved, (), window=50) == (30, 30)
    assert roll_back(35, saved, (), window=3) == (30, 32), "what came before is made again"
    assert roll_back(30, saved, (), window=50) == (20, 20), "the checkpoint has every update that came before"
    assert roll_back(36, saved, range(30, 36), window=50) == (20, 20), "nothing was changed since"
    assert roll_back(12, (), (), window=5) == (0, 7)
    assert roll_back(5, (), range(5), window=5) == (0, 5), "there is nothing to undo"


def test_a_guard_ends_the_stage_and_the_same_command_ends_there_again(prepared: SmallRun, tmp_path: Path) -> None:
    run = prepared.copy(tmp_path / "run")
    # Everything falls here, so the guard is set off by weights that are blown up on purpose.
    train = run.train(
        methods={"test_sabotage": {"what": "blow_up", "step": 3, "once": str(tmp_path / "marker")}},
        stop_if=StopIf(source="even", loss_rises=0.03),
    )
    job = run.job(train)
    assert run_ranks(2, work, job) == [GUARD, GUARD]
    (guard,) = run.events(job, "guard")
    assert guard["step"] == 4 and guard["now"] > guard["limit"] == pytest.approx(1.03 * guard["before"])
    assert run_ranks(2, work, run.job(train)) == [GUARD, GUARD]


def test_hooks_are_called_in_the_order_of_a_step(prepared: SmallRun, tmp_path: Path) -> None:
    run = prepared.copy(tmp_path / "run")
    notes = tmp_path / "notes"
    train = run.train(steps=2, methods={"test_order": {"path": str(notes)}}, evaluate=Evaluate())
    assert run_ranks(2, work, run.job(train)) == [DONE, DONE]
    step = [["loss (2, 32)"] * 2, ["grad {}", "update {}"]]
    wanted = ["start"]
    for n in (0, 1):
        wanted += [f"weights {n}", *step[0], *(word.format(n) for word in step[1])]
    assert notes.read_text().split("\n")[:-1] == wanted


def test_another_layout_gives_the_same_losses(prepared: SmallRun, straight: SmallRun, tmp_path: Path) -> None:
    run = prepared.copy(tmp_path / "run")
    job = run.job(run.train(parallel=Parallel(tp=2, pp=2), saving=Saving()))
    assert set(run_ranks(4, work, job)) == {DONE}
    first = type(job)(**{**vars(job), "run_dir": str(straight.folder), "attempt": 1})
    for kind, value in (("step", lambda e: e["loss"]), ("eval", lambda e: e["losses"]["even"]["loss"])):
        here, there = ([value(e) for e in r.events(j, kind)] for r, j in ((run, job), (straight, first)))
        assert here == pytest.approx(there, abs=1e-5)


def test_a_spike_is_a_loss_far_above_the_running_mean() -> None:
    rules = Anomalies(spike="stop", spike_factor=2.0, window=20)
    assert judge(3.0, [2.0] * 20, rules) == ("update", "")
    assert judge(4.1, [2.0] * 20, rules)[0] == "stop"
    assert judge(4.1, [2.0] * 3, rules) == ("update", "")  # too few steps to say
    assert judge(math.inf, [], rules)[0] == "skip"
    assert judge_grad_norm(math.nan, rules)[0] == "skip"
    assert judge_grad_norm(1e9, rules) == ("update", "")


def test_a_base_that_predicts_like_a_guess_is_refused_before_it_is_trained(prepared: SmallRun, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.hidden_size,
        intermediate_size=MODEL.ffn_hidden_size,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_attention_heads,
        num_key_value_heads=MODEL.num_query_groups,
        max_position_embeddings=SEQ,
        rms_norm_eps=MODEL.norm_eps,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")  # random weights
    run = prepared.copy(tmp_path / "run")
    train = run.train(steps=2)
    base = str(tmp_path / "base")
    with pytest.raises(RankFailed, match=r"above 4\.61 \(0\.8 of the 5\.77 of a uniform guess\)"):
        run_ranks(2, work, run.job(train, start="hf", parent=base))
    trusted = replace(train, broken_import_guard=False)
    assert run_ranks(2, work, run.job(trusted, start="hf", parent=base)) == [DONE, DONE]
