"""Plans to try rules on, made in memory."""

from __future__ import annotations

from typing import Any

from cpt.plan.model import ModelConfig, Parallel
from cpt.plan.types import (
    Base,
    DataOptions,
    Evaluate,
    Lr,
    Optimizer,
    RunPlan,
    Source,
    SourceFacts,
    StagePlan,
    Tokenizer,
    Train,
)

MODEL = ModelConfig(
    family="llama",
    num_layers=6,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=8,
    vocab_size=1000,
    max_position_embeddings=256,
    norm_eps=1e-5,
)


def source(name: str, tokens: int = 1_000_000, **changes: Any) -> Source:
    facts = SourceFacts(
        tokens=tokens, documents=100, bytes=4 * tokens, estimated=False, content_hash=f"of {name}", valid_tokens=9
    )
    return Source(**{"name": name, "identity": f"files of {name}", "facts": facts, **changes})


def train(**changes: Any) -> Train:
    fields: dict[str, Any] = {
        "tokens": 100 * 16 * 128,
        "steps": 100,
        "seq_length": 128,
        "global_batch_size": 16,
        "micro_batch_size": 2,
        "seed": 1,
        "precision": "bf16",
        "mixture": {"law": 0.75, "news": 0.25},
        "replay": None,
        "lr": Lr(schedule="cosine", options={"peak": 1e-3}, span=100, points=(1e-5, 1e-3, 1e-4)),
        "optimizer": Optimizer(),
        "parallel": Parallel(),
        "evaluate": Evaluate(sources=("law", "news")),
    }
    return Train(**{**fields, **changes})


def stage(
    name: str = "domain", parent: str | None = "base", keep: tuple[str, ...] = ("weights",), **changes: Any
) -> StagePlan:
    kind = changes.pop("kind", "train")
    rest: dict[str, Any] = {k: changes.pop(k) for k in ("parent_at", "options", "keep_steps") if k in changes}
    made = train(**changes) if kind == "train" else None
    return StagePlan(name=name, kind=kind, parent=parent, keep=keep if made else (), train=made, **rest)


def plan(*stages: StagePlan, **changes: Any) -> RunPlan:
    fields: dict[str, Any] = {
        "id": "",
        "name": "",
        "recipe": "made",
        "base": Base(kind="hf", path="/models/base", identity="weights"),
        "model": MODEL,
        "tokenizer": Tokenizer(path="/models/base/tokenizer.json", hash="tokens", vocab_size=1000),
        "sources": {"law": source("law"), "news": source("news")},
        "data": DataOptions(),
        "stages": {s.name: s for s in stages or (stage(),)},
    }
    return RunPlan(**{**fields, **changes})
