"""Convert stages that Megatron's ranks cannot hold: refused before a run trains what they would convert."""

from __future__ import annotations

from collections.abc import Iterator

from cpt.base.errors import CptError, PlanError
from cpt.plan.types import RunPlan


def impossible(plan: RunPlan) -> Iterator[CptError]:
    """What is wrong with the layouts of stages that write Megatron's per-rank files."""
    stages = [s for s in plan.stages.values() if s.kind == "convert" and s.options.get("to") == "megatron"]
    if not stages:
        return
    from cpt.checkpoint import layouts, megatron_args
    from cpt.checkpoint.content import Layout

    for stage in stages:
        model = plan.model_of(stage)
        if model is None:
            continue
        layout = Layout(tp=stage.options.get("tp") or 1, pp=stage.options.get("pp") or 1)
        padded = -(-model.vocab_size // layout.tp) * layout.tp  # no vocabulary is too odd
        try:
            layouts.check(model, layout, padded)
            megatron_args.to_args(model, layout=layout, padded_vocab_size=padded, dtype="float32")
        except CptError as error:
            yield PlanError(f"`stages.{stage.name}`: {error.message}", *error.hints, more=error.more)
