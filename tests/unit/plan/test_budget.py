"""Estimates against counts by hand."""

from __future__ import annotations

import dataclasses

import pytest

from cpt.base.errors import PlanError
from cpt.plan.budget import (
    START,
    Devices,
    Measured,
    budget,
    check_memory,
    checkpoint_bytes,
    flops_per_token,
    matrix_parameters,
    memory,
)
from cpt.plan.model import Parallel
from cpt.plan.types import Evaluate, Retain, Saving
from tests.unit.plan.made import MODEL, plan, stage, train


def test_parameters_in_matrix_products_count_the_output_layer_once() -> None:
    body = MODEL.num_parameters - 2 * 1000 * 64
    assert matrix_parameters(MODEL) == body + 1000 * 64
    tied = dataclasses.replace(MODEL, tie_embeddings=True)
    assert matrix_parameters(tied) == matrix_parameters(MODEL)


def test_flops_of_a_token() -> None:
    assert flops_per_token(MODEL, 128) == 6 * matrix_parameters(MODEL) + 6 * 6 * 128 * 64
    assert flops_per_token(MODEL, 128, "full") == pytest.approx(4 / 3 * flops_per_token(MODEL, 128))


def test_time_follows_the_devices_or_what_was_measured() -> None:
    gpu = Devices(kind="gpu", flops_per_s=1e12, basis="assumed")
    alone = budget(plan(), gpu).stages["domain"]
    both = budget(plan(stage(parallel=Parallel(dp=2))), gpu).stages["domain"]
    assert alone.seconds is not None and both.seconds == pytest.approx(alone.seconds / 2)
    seen = budget(plan(), gpu, {"domain": Measured(tokens_per_s=1000, run="before")}).stages["domain"]
    assert seen.seconds == pytest.approx(204.8) and seen.basis == "measured in run before"


def test_ranks_on_a_processor_share_its_cores() -> None:
    cpu = Devices(kind="cpu", flops_per_s=1e9, cores=2)
    two = budget(plan(stage(parallel=Parallel(dp=2))), cpu).seconds
    four = budget(plan(stage(parallel=Parallel(dp=2, tp=2))), cpu).seconds
    assert two == four


def test_evaluations_and_starts_take_time_too() -> None:
    gpu = Devices(kind="gpu", flops_per_s=1e9, basis="assumed")
    # Two sources with 9 held-out tokens each, before the first step, after 30, 60 and 90 steps and at the end.
    made = stage(evaluate=Evaluate(sources=("law", "news"), every_steps=30))
    whole = budget(plan(made), gpu)
    forward = flops_per_token(MODEL, 128) / 3
    domain = whole.stages["domain"]
    assert domain.evaluating == pytest.approx(5 * 18 * forward / 1e9)
    assert domain.seconds is not None and whole.seconds == pytest.approx(
        domain.seconds + domain.evaluating + START["gpu"]
    )
    options = {"sources": ("law",), "tokens": 5, "seq_length": 128, "dp": 2}
    look = dataclasses.replace(stage("look", "domain"), kind="evaluate", train=None, options=options)
    more = budget(plan(made, look), gpu)
    assert more.measuring == pytest.approx(5 * forward / 2e9) and more.starting == 2 * START["gpu"]
    seen = budget(plan(made), gpu, {"domain": Measured(tokens_per_s=1000, run="before")}).stages["domain"]
    assert seen.evaluating == pytest.approx(5 * 18 / 3 / 1000)


def test_unknown_devices_give_no_time() -> None:
    assert budget(plan(), Devices(kind="gpu")).seconds is None


def test_a_checkpoint_holds_main_weights_and_two_moments() -> None:
    assert checkpoint_bytes(MODEL, "fp32") == 12 * MODEL.num_parameters
    assert checkpoint_bytes(MODEL, "bf16") == 14 * MODEL.num_parameters


@pytest.mark.parametrize(
    ("saving", "stay"),
    [
        (Saving(), 1),
        (Saving(every_steps=10, retain=Retain(last=3)), 3),
        (Saving(every_steps=60, retain=Retain(last=3)), 2),
        (Saving(every_steps=10, retain=Retain(last=1, every=50 * 16 * 128)), 3),
    ],
)
def test_checkpoints_that_stay(saving: Saving, stay: int) -> None:
    assert budget(plan(stage(saving=saving)), Devices()).stages["domain"].checkpoints == stay


def test_memory_falls_with_tp_pp_dp_recomputation_and_smaller_micro_batches() -> None:
    plain = memory(MODEL, train(micro_batch_size=4))
    for changes in (
        {"parallel": Parallel(tp=2)},
        {"parallel": Parallel(pp=2)},
        {"parallel": Parallel(dp=2)},
        {"recompute": "full"},
        {"recompute": "selective"},
        {"micro_batch_size": 2},
    ):
        assert memory(MODEL, train(**{"micro_batch_size": 4, **changes})) < plain, changes


def test_a_stage_that_cannot_fit_is_refused_with_the_two_cheapest_ways() -> None:
    made = plan(stage(micro_batch_size=16, seq_length=4096))
    needed = memory(MODEL, made.stages["domain"].train)  # type: ignore[arg-type]
    with pytest.raises(PlanError) as caught:
        check_memory(made, Devices(kind="gpu", memory=int(0.7 * needed)))
    assert "stage `domain` needs about" in caught.value.message
    assert caught.value.hints == ("`stages.domain.micro_batch_size=8`", "`stages.domain.micro_batch_size=4`")
    check_memory(made, Devices(kind="gpu", memory=int(1.1 * needed)))
    check_memory(made, Devices(kind="gpu", memory=None))
