"""Small plans for tests of stages."""

from __future__ import annotations

import dataclasses
from typing import Any

from cpt.plan.model import Parallel
from cpt.plan.types import Base, DataOptions, Lr, Optimizer, RunPlan, Source, StagePlan, Tokenizer, Train


def train(steps: int = 100, **changes: Any) -> Train:
    whole: dict[str, Any] = {
        "tokens": steps * 1024,
        "steps": steps,
        "seq_length": 128,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "seed": 1,
        "precision": "fp32",
        "mixture": {"web": 0.3, "pubmed": 0.7},
        "replay": None,
        "lr": Lr(schedule="constant", options={"peak": 1e-3}, span=steps),
        "optimizer": Optimizer(),
        "parallel": Parallel(),
    }
    return Train(**(whole | changes))


def stage(name: str = "domain", parent: str | None = "base", fingerprint: str = "f1", **changes: Any) -> StagePlan:
    whole: dict[str, Any] = {"name": name, "kind": "train", "parent": parent, "fingerprint": fingerprint}
    if changes.get("kind", "train") == "train":
        whole["train"] = train()
    return StagePlan(**(whole | changes))


def plan(*stages: StagePlan, runs: str = "/runs", name: str = "medical-111111", id: str = "1" * 64) -> RunPlan:
    return RunPlan(
        id=id,
        name=name,
        recipe="medical",
        base=Base(kind="hf", path="/models/base", identity="b"),
        model=None,
        tokenizer=Tokenizer(path="/models/base/tokenizer.json", hash="t"),
        sources={n: Source(name=n, paths=(f"/data/{n}.jsonl",)) for n in ("web", "pubmed")},
        data=DataOptions(),
        stages={s.name: s for s in stages},
        runs=runs,
    )


def changed(one: StagePlan, fingerprint: str, **changes: Any) -> StagePlan:
    """The stage with other training values and so another fingerprint."""
    assert one.train is not None
    return dataclasses.replace(one, fingerprint=fingerprint, train=dataclasses.replace(one.train, **changes))
