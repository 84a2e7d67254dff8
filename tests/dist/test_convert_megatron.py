"""Folders that stock megatron-core saves, read; and folders of ours, loaded by stock megatron-core: every bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt.checkpoint import find, layouts
from cpt.checkpoint.arrays import Files, payload
from cpt.checkpoint.content import Content, Layout
from cpt.checkpoint.formats import Reading, Writing
from cpt.checkpoint.writing import blocks
from cpt.plan.model import ModelConfig
from tests.dist import legacy_ranks
from tests.dist.legacy_ranks import Case
from tests.dist.ranks import run_ranks
from tests.made_checkpoints import write

LLAMA = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=20,
    ffn_hidden_size=34,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=6,
    vocab_size=45,
    max_position_embeddings=24,
    norm_eps=1e-5,
)
TIED = dataclasses.replace(LLAMA, tie_embeddings=True)
MOE = dataclasses.replace(
    LLAMA, family="mixtral", num_experts=4, moe_ffn_hidden_size=10, moe_topk=2, moe_norm_topk=True
)
CASES = {
    "buckets": Case(TIED, tp=2, pp=2, dp=2, bucket=1500),
    "ordinary": Case(dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True), tp=2, pp=2, vp=2, distributed=False),
    "virtual": Case(dataclasses.replace(TIED, hidden_size=64), pp=2, vp=2, dp=2, fp32_gradients=False),
    "expert ranks": Case(MOE, tp=1, ep=2, dp=2, bucket=700),
    "fp32": Case(TIED, tp=2, distributed=False, bf16=False),
    "fp32, distributed": Case(LLAMA, tp=2, dp=2, bf16=False, bucket=600),
}
STATES = {"model": "model", "fp32": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def layout(case: Case) -> Layout:
    return Layout(tp=case.tp, pp=case.pp, vp=case.vp, ep=case.ep, dp=case.dp, bucket_numel=case.bucket)


def assert_holds(source: Content, case: Case, found: list[tuple[dict[str, int], dict[str, Any]]]) -> None:
    """What megatron-core holds on its ranks is what the content holds."""
    files, buffer = Files(), np.empty(1 << 20, np.uint8)
    dtype = "bfloat16" if case.bf16 else "float32"
    compared = 0
    for where, truth in found:
        held = layouts.held(source.model, layout(case), case.padded, tp=where["tp"], pp=where["pp"], ep=where["ep"])
        assert {f"{h.chunk}:{h.name}" for h in held} == set(truth)
        for h in held:
            of = truth[f"{h.chunk}:{h.name}"]
            for state, theirs in STATES.items():
                kind = dtype if state == "model" else "float32"
                values = blocks(payload(h.tensor, state, kind), source, files, buffer)
                whole = b"".join(block.tobytes() for block in values)
                if state == "model":
                    assert whole == of["model"], (h.name, where)
                    continue
                for start, end, parts in of["pieces"]:
                    assert whole[4 * start : 4 * end] == parts[theirs], (h.name, state, where)
                    compared += end - start
    assert compared > 0


@pytest.mark.parametrize("name", CASES)
def test_what_megatron_core_saves_and_loads(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = tmp_path / "legacy" / "iter_0000003"
    sharded = tmp_path / "sharded" / "iter_0000003" if case.has_buckets else None
    saved = run_ranks(case.ranks, legacy_ranks.save, case, str(folder), sharded and str(sharded))
    form = "dp_reshardable" if case.distributed else "plain"
    writing = Writing(layout=layout(case), optimizer=form)
    ours = []
    for kind, theirs in (("megatron", folder), ("torch_dist", sharded)):
        if theirs is None:
            continue
        source = find.known()[kind].open(theirs, Reading())
        assert source.optimizer is not None and source.optimizer.step == legacy_ranks.STEPS
        assert_holds(source, case, saved)
        ours.append(str(write(source, kind, tmp_path / f"our_{kind}", writing)))
    loaded = run_ranks(case.ranks, legacy_ranks.load, case, ours[0], ours[1] if sharded else None)
    for (where, before), (_, each) in zip(saved, loaded, strict=True):
        for after in each:
            assert before.keys() == after.keys()
            assert [k for k in before if before[k] != after[k]] == [], where
