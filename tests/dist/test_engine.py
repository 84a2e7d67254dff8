"""One model under every layout: the same losses, gradients and weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from cpt.plan.model import ModelConfig, Parallel
from cpt.plan.types import Optimizer
from tests.dist.ranks import run_ranks

LLAMA = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=88,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=301,
    max_position_embeddings=64,
    norm_eps=1e-5,
)
SEQ, GLOBAL_BATCH = 32, 12


def batch(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, LLAMA.vocab_size, (GLOBAL_BATCH, SEQ + 1))


def train(model: ModelConfig, parallel: Parallel, steps: int = 3, **options: Any) -> dict[str, Any]:
    """Losses, norms and evaluation losses of a few steps, as every rank sees them."""
    from cpt.engine import distributed, megatron

    micro = options.pop("micro_batch_size", 2)
    packed = options.pop("packed", False)
    engine = megatron.build(
        model, parallel, precision=options.pop("precision", "fp32"), optimizer=Optimizer(clip=0.5), seed=7, **options
    )
    share = GLOBAL_BATCH // parallel.dp
    rows = slice(distributed.dp_rank() * share, (distributed.dp_rank() + 1) * share)
    out: dict[str, Any] = {"loss": [], "norm": [], "sources": []}

    def batches(step: int) -> Any:
        extra = documents(step)[:, rows] if packed else (None, None, None)
        return megatron.microbatches(batch(step)[rows], *extra, micro_batch_size=micro, device=engine.device)

    for step in range(steps):
        losses = megatron.forward_backward(engine, batches(step))
        assert (losses is not None) == distributed.is_last_stage()
        sums, tokens = megatron.reduce_by_source(engine, losses, np.arange(GLOBAL_BATCH)[rows] % 3, 3)
        out["sources"].append((sums, tokens))
        out["loss"].append(sum(sums) / sum(tokens))
        norm = megatron.grad_norm(engine)
        megatron.update(engine, 1e-2, norm)
        out["norm"].append(norm)
    losses = megatron.evaluate(engine, batches(99))
    sums, tokens = megatron.reduce_by_source(engine, losses, np.zeros(share, dtype=int), 1)
    out["valid"] = sums[0] / tokens[0]
    return out


def documents(step: int) -> np.ndarray:
    """Loss mask, position ids that restart and segment ids of three documents a sample."""
    borders = np.sort(np.random.default_rng(100 + step).integers(1, SEQ, (GLOBAL_BATCH, 2)), axis=1)
    place = np.arange(SEQ)[None]
    segments = (place >= borders[:, :1]).astype(int) + (place >= borders[:, 1:])
    starts = np.where(segments == 0, 0, np.where(segments == 1, borders[:, :1], borders[:, 1:]))
    mask = np.ones((GLOBAL_BATCH, SEQ), dtype=int)
    mask[np.arange(GLOBAL_BATCH), borders[:, 0] - 1] = 0
    mask[: GLOBAL_BATCH // 2, :7] = 0  # so that model copies have different numbers of tokens
    return np.stack((mask, place - starts, segments))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_ranks(Parallel(), train, LLAMA, Parallel())[0]


LAYOUTS = {
    "tp2": Parallel(tp=2),
    "tp4 with 2 groups": Parallel(tp=4),
    "dp2": Parallel(dp=2),
    "dp3": Parallel(dp=3),
    "dp2 without distributed optimizer": Parallel(dp=2, distributed_optimizer=False),
    "dp2 overlapping": Parallel(dp=2, overlap_grad_reduce=True),
    "pp2": Parallel(pp=2),
    "pp2 uneven": Parallel(pp=2, layers=(1, 3)),
    "pp3": Parallel(pp=3),
    "pp2 vp2": Parallel(pp=2, vp=2),
    "tp2 sp": Parallel(tp=2, sequence_parallel=True),
    "tp2 pp2": Parallel(tp=2, pp=2),
    "tp2 dp2": Parallel(tp=2, dp=2),
    "pp2 dp2": Parallel(pp=2, dp=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_losses_of_one_rank(name: str, alone: dict[str, Any]) -> None:
    parallel = LAYOUTS[name]
    results = run_ranks(parallel, train, LLAMA, parallel)
    assert all(r == results[0] for r in results), "ranks disagree"
    same(results[0], alone)


def same(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 2e-6) -> None:
    for key in ("loss", "valid"):
        np.testing.assert_allclose(found[key], wanted[key], rtol=tolerance, err_msg=key)
    # Rounding differences of a gradient near zero become whole Adam steps.
    np.testing.assert_allclose(found["norm"], wanted["norm"], rtol=1e-4)
    for (sums, tokens), (sums_, tokens_) in zip(found["sources"], wanted["sources"], strict=True):
        assert tokens == tokens_
        np.testing.assert_allclose(sums, sums_, rtol=tolerance)


def test_tied_embeddings_stay_tied_over_pipeline_stages() -> None:
    tied = dataclasses.replace(LLAMA, tie_embeddings=True, num_layers=5)
    wanted = run_ranks(Parallel(), train, tied, Parallel())[0]
    for parallel in (Parallel(pp=2), Parallel(tp=2, pp=2), Parallel(pp=2, vp=2), Parallel(pp=2, dp=2)):
        same(run_ranks(parallel, train, tied, parallel)[0], wanted)


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=2), Parallel(pp=2), Parallel(dp=2)])
def test_packed_documents_with_masks_are_the_same_everywhere(parallel: Parallel) -> None:
    found = run_ranks(parallel, _packed, parallel)[0]
    wanted = run_ranks(Parallel(), _packed, Parallel())[0]
    same(found, wanted)
    assert sum(wanted["sources"][0][1]) < GLOBAL_BATCH * SEQ


def _packed(parallel: Parallel) -> dict[str, Any]:
    return train(LLAMA, parallel, packed=True)


def _with_options(parallel: Parallel, options: dict[str, Any]) -> dict[str, Any]:
    return train(LLAMA, parallel, **options)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=2, sequence_parallel=True), Parallel(pp=2)])
def test_recomputed_activations_change_nothing(recompute: str, parallel: Parallel, alone: dict[str, Any]) -> None:
    found = run_ranks(parallel, _with_options, parallel, {"recompute": recompute})[0]
    same(found, alone)


def test_micro_batch_size_changes_nothing(alone: dict[str, Any]) -> None:
    for micro in (1, 3, 12):
        same(run_ranks(Parallel(), _with_options, Parallel(), {"micro_batch_size": micro})[0], alone)


def test_bf16_with_fp32_main_weights_follows_fp32(alone: dict[str, Any]) -> None:
    for parallel in (Parallel(), Parallel(tp=2, dp=2)):
        found = run_ranks(parallel, _with_options, parallel, {"precision": "bf16"})[0]
        np.testing.assert_allclose(found["loss"], alone["loss"], rtol=5e-3)


def _documents_apart() -> tuple[float, float]:
    """Losses of two documents packed in one sample and of the same documents on their own."""
    import torch

    from cpt.engine import megatron

    engine = megatron.build(LLAMA, Parallel(), precision="fp32", optimizer=None, seed=7)
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 301, 11), rng.integers(0, 301, 21)
    packed = np.concatenate((one, two))[None]
    segments = np.array([0] * 11 + [1] * 20)[None]
    positions = np.concatenate((np.arange(11), np.arange(20)))[None]
    mask = np.ones((1, 31))
    mask[0, 10] = 0
    both = megatron.microbatches(packed, mask, positions, segments, micro_batch_size=1, device=engine.device)
    together = megatron.evaluate(engine, both)
    apart = [
        megatron.evaluate(engine, megatron.microbatches(d[None], micro_batch_size=1, device=torch.device("cpu")))
        for d in (one, two)
    ]
    assert together is not None
    return together.sum_B.item(), sum(a.sum_B.item() for a in apart if a is not None)


def test_packed_documents_do_not_see_each_other() -> None:
    together, apart = run_ranks(Parallel(), _documents_apart)[0]
    assert together == pytest.approx(apart, rel=1e-6)


def _nan_step(parallel: Parallel) -> tuple[float, float, float]:
    """Gradient norm when one rank's loss is NaN, and losses before and after skipping that update."""
    from cpt.engine import distributed, megatron

    engine = megatron.build(LLAMA, parallel, precision="fp32", optimizer=Optimizer(), seed=7)
    rows = batch(0)[distributed.dp_rank() :: parallel.dp]
    batches = megatron.microbatches(rows, micro_batch_size=2, device=engine.device)

    def loss() -> float:
        sums, tokens = megatron.reduce_by_source(engine, megatron.evaluate(engine, batches), [0] * len(rows), 1)
        return sums[0] / tokens[0]

    before = loss()
    spoil = distributed.dp_rank() == parallel.dp - 1
    megatron.forward_backward(engine, batches, loss_hook=lambda x, b: x * float("nan") if spoil else x)
    norm = megatron.grad_norm(engine)
    return norm, before, loss()


@pytest.mark.parametrize("parallel", [Parallel(dp=2), Parallel(pp=2), Parallel(tp=2, dp=2)])
def test_a_nan_on_one_rank_is_seen_by_all_and_can_be_skipped(parallel: Parallel) -> None:
    for norm, before, after in run_ranks(parallel, _nan_step, parallel):
        assert not np.isfinite(norm)
        assert before == after
