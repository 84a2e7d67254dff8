"""What makes two stages the same: a hash over everything that changes a stage's result, and nothing else.

Not in it: names, paths, launcher, layout, micro batches, recomputation, logging, evaluation, saving.
A corpus counts by the hash of its prepared tokens; until it is prepared, by the names, sizes and times of its files.

A value that a law gives counts as the fingerprint of the law's stage and the key, so that a stage's fingerprint is the
same before and after the law is there. The caller hands over stages with the values that stand in for them, which
depend on nothing but the recipe. Of a proxy the measurements count too: they are what its law is fitted on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cpt.base.files import canonical_json, hash_text
from cpt.base.records import to_json
from cpt.plan.types import RunPlan, StagePlan, Train

FORMAT = 1
LAYOUT = ("tp", "pp", "dp", "micro_batch_size")  # options of a stage that change its speed only
# Of a law stage: names, places and prices; a file counts by its content.
_LAW_IGNORED = ("target", "real_flops", "file", "data", "max_cost", "answer", "doubts")
_BY_SOURCE = ("domain", "general", "goal", "limits", "caps")  # options that are numbers by source


def with_fingerprints(plan: RunPlan, outside: Mapping[str, str], curves: Mapping[str, Sequence[float]]) -> RunPlan:
    """The plan with the fingerprint of each stage and its id.

    Args:
        plan: stages in order, parents first.
        outside: by stage, the identity of a checkpoint outside of the run that it starts from.
        curves: by train stage, its lr at fixed fractions of its length: what the options and the place in the chain
            come to, so that a chain that grows at its end changes nothing for the stages before.
    """
    stages: dict[str, StagePlan] = {}
    for name, stage in plan.stages.items():
        content = stage_content(plan, stage, stages, outside, curves.get(name, ()))
        stages[name] = dataclasses.replace(stage, fingerprint=hash_text(canonical_json(content)))
    return dataclasses.replace(plan, stages=stages, id=plan_id(stages))


def plan_id(stages: Mapping[str, StagePlan]) -> str:
    """The id of a plan: of its stages' fingerprints, whatever they are called."""
    return hash_text(canonical_json(["plan", FORMAT, sorted(s.fingerprint for s in stages.values())]))


def stage_content(
    plan: RunPlan,
    stage: StagePlan,
    before: Mapping[str, StagePlan],
    outside: Mapping[str, str],
    curve: Sequence[float],
) -> dict[str, Any]:
    """What a stage's fingerprint is taken of."""
    model = to_json(plan.model_of(stage))
    if model is not None:
        del model["hf_config"]
    content = {
        "format": FORMAT,
        "kind": stage.kind,
        "parent": _parent(plan, stage, before, outside),
        "keep": sorted(stage.keep),
        "model": model,
        "tokenizer": _tokenizer(plan),
        "data": to_json(plan.data),
        "train": _train(plan, stage.train, curve) if stage.train is not None else None,
        "options": _options(plan, stage),
    }
    # Only where there are any: stages without them keep the fingerprints that they have always had.
    if stage.after:
        content["after"] = [before[name].fingerprint for name in stage.after]
    if stage.group is not None and stage.train is not None:
        evaluate = stage.train.evaluate
        names = sorted(content_of(plan, name) for name in evaluate.sources)
        content["evaluate"] = [names, evaluate.every_steps, evaluate.tokens]
    if stage.law:
        content["law"] = [[key, *_value_of(value, before)] for key, value in sorted(stage.law.items())]
    return content


def _value_of(value: str, before: Mapping[str, StagePlan]) -> tuple[str, str]:
    """What stands for a law's value: the fingerprint of the law's stage, and the key."""
    law, _, key = value.partition(".")
    return before[law].fingerprint, key


def _parent(plan: RunPlan, stage: StagePlan, before: Mapping[str, StagePlan], outside: Mapping[str, str]) -> Any:
    if stage.parent is None:
        return "scratch"
    if stage.parent == "base":
        return plan.base.identity
    if stage.parent in before:
        return [before[stage.parent].fingerprint, stage.parent_at]
    return outside.get(stage.name, stage.parent)


def _tokenizer(plan: RunPlan) -> Any:
    tokenizer = plan.tokenizer
    if tokenizer.hash is not None:
        return tokenizer.hash
    return [[plan.sources[n].identity for n in tokenizer.train_on], tokenizer.vocab_size]


def content_of(plan: RunPlan, source: str) -> str:
    """What a source holds: the hash of its prepared tokens, else the identity of its files."""
    found = plan.sources[source]
    return (found.facts.content_hash if found.facts else None) or found.identity


def _shares(plan: RunPlan, shares: Mapping[str, float]) -> list[list[Any]]:
    """Contents with their shares. Ordered by name: the sample order breaks ties so, although names do not count."""
    return [[content_of(plan, name), shares[name]] for name in sorted(shares)]


def _train(plan: RunPlan, train: Train, curve: Sequence[float]) -> dict[str, Any]:
    replay = train.replay
    return {
        "steps": train.steps,
        "seq_length": train.seq_length,
        "global_batch_size": train.global_batch_size,
        "seed": train.seed,
        "precision": train.precision,
        "mixture": _shares(plan, train.mixture),
        "replay": [replay.share, _shares(plan, replay.sources)] if replay else None,
        "lr": [float(f"{value:.12e}") for value in curve],
        "optimizer": to_json(train.optimizer),
        "methods": to_json(train.methods),
        "anomalies": to_json(train.anomalies),
    }


def _options(plan: RunPlan, stage: StagePlan) -> dict[str, Any]:
    """Options of a stage that is no train stage; sources by content, without how it is laid out."""
    options = {k: v for k, v in to_json(stage.options).items() if k not in LAYOUT}
    if stage.kind == "convert":  # what it leaves is laid out like that
        options = {k: v for k, v in to_json(stage.options).items() if v not in (None, False)}
    if "sources" in options:
        options["sources"] = [content_of(plan, name) for name in sorted(options["sources"])]
    if stage.kind == "law":
        options = {k: v for k, v in options.items() if k not in _LAW_IGNORED}
        options |= {k: _shares(plan, options[k]) for k in _BY_SOURCE if k in options}
    if "mixtures" in options:
        options["mixtures"] = [_shares(plan, mixture) for mixture in options["mixtures"]]
    return options
