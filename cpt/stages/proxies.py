"""From the events of a law's proxies to the table that the law is fitted on: one row for each measurement.

    mix-r25 ─┐
    mix-r50 ─┼─ eval events ─▶ losses by source ─▶ loss_domain, loss_general (means over each group's sources) ─▶ Table
    mix-r75 ─┘

With more than two groups the columns are `w_<source>` and `loss_<source>`. Measurements before a proxy's first step are
the base model's; those inside the warmup are left out, because they are not of a finished run. With `how: merge` the
rows are the weight averages that a stage of kind `merged` has measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError
from cpt.base.events import stage_events
from cpt.evaluate.collect import Measurement, measurements
from cpt.laws.table import Table
from cpt.plan.types import RunPlan, StagePlan
from cpt.stages import state
from cpt.stages.law import LawStage, proxies_of


@dataclass(frozen=True)
class Collected:
    """What the proxies of a law measured.

    Args:
        table: one row for each measurement.
        notes: what was left out and why, one sentence each.
    """

    table: Table
    notes: tuple[str, ...] = field(default=())


def collect(plan: RunPlan, law: str, options: LawStage, run_dir: Path) -> Collected:
    """The table of a law stage.

    Raises:
        UsageError: a proxy is missing, only partly done, or was never measured; each is named.
    """
    proxies = proxies_of(plan, law)
    merged = {n: s for n, s in plan.stages.items() if s.group == law and s.kind == "merged"}
    _refuse_unfinished(law, {**proxies, **merged}, run_dir)
    if not proxies:
        raise UsageError(f"law stage `{law}` has no proxies in this plan, and neither `file` nor `data`")
    records: list[dict[str, Any]] = []
    notes: list[str] = []
    before: set[int] = set()
    for name, stage in proxies.items():
        found = measurements(stage_events(state.home(run_dir / "stages" / name)))
        size = _size(plan, stage)
        start = next((m for m in found if m.when == "start"), None)
        if start is not None and size not in before:
            before.add(size)
            row = {"run": "base", "n_params": size, "tokens": 0}
            records.append(row | _losses(start.losses, options, plan, name, notes))
        if not merged:
            records += _rows(plan, name, stage, found, options, notes)
    for name, stage in merged.items():
        records += _averages(plan, name, run_dir, options, _size(plan, stage), notes)
    keys = dict.fromkeys(key for record in reversed(records) for key in record)
    table = Table.of({key: [record.get(key) for record in records] for key in keys}, f"proxies of {law}")
    return Collected(table, tuple(dict.fromkeys(notes)))


def _refuse_unfinished(law: str, stages: Mapping[str, StagePlan], run_dir: Path) -> None:
    """All members of a law's grid must be done: with some missing it would be another grid than the plan says."""
    unfinished = []
    for name, stage in stages.items():
        found = state.read(run_dir / "stages" / name)
        if found.status == state.DONE:
            continue
        of = f" at step {found.step:,} of {stage.train.steps:,}" if found.step and stage.train else ""
        unfinished.append(f"`{name}` ({found.status}{of})")
    if unfinished:
        count = len(unfinished)
        raise UsageError(
            f"law `{law}` waits for {', '.join(unfinished[:5])}" + (f" and {count - 5} more" if count > 5 else ""),
            "the command that began the run goes on with them",
        )


def _rows(
    plan: RunPlan,
    name: str,
    stage: StagePlan,
    found: Sequence[Measurement],
    options: LawStage,
    notes: list[str],
) -> Iterator[dict[str, Any]]:
    """A row for each measurement of a proxy after its warmup.

    Raises:
        UsageError: there is none.
    """
    train = stage.train
    assert train is not None
    by_step = {m.step: m for m in found if m.when != "start" and m.tokens > options.warmup}
    if not by_step:
        raise UsageError(
            f"proxy `{name}` left no measurement after its warmup of {options.warmup:,} tokens",
            "a smaller `every` of the law stage measures more often",
        )
    if max(by_step) != train.steps:
        notes.append(f"proxy `{name}` was last measured at step {max(by_step):,} of {train.steps:,}")
    for step, one in by_step.items():
        losses = _losses(one.losses, options, plan, name, notes)
        if not losses:
            continue
        row: dict[str, Any] = {"run": name, "n_params": _size(plan, stage), "tokens": one.tokens, "step": step}
        row |= {"lr": train.lr.points[1], "schedule": train.lr.schedule}
        yield row | _shares(train.mixture, options) | losses


def _averages(
    plan: RunPlan, name: str, run_dir: Path, options: LawStage, size: int, notes: list[str]
) -> Iterator[dict[str, Any]]:
    """A row for each weight average that was measured; each is a run of its own.

    Raises:
        UsageError: there is none.
    """
    events = [e for e in stage_events(state.home(run_dir / "stages" / name)) if isinstance(e.get("mixture"), dict)]
    newest = {e["step"]: e for e in events if e.get("kind") == "eval"}
    if not newest:
        raise UsageError(f"stage `{name}` left no measurement of an average")
    for number, event in sorted(newest.items()):
        losses = _losses(measurements([event])[0].losses, options, plan, name, notes)
        if losses:
            row = {"run": f"average {number}", "n_params": size, "tokens": int(event["tokens"])}
            yield row | _shares(event["mixture"], options) | losses


def is_several(options: LawStage) -> bool:
    """Whether the law is about the shares of more than two groups of sources."""
    return bool(options.mixtures)


def _shares(mixture: Mapping[str, float], options: LawStage) -> dict[str, float]:
    if is_several(options):
        return {f"w_{source}": float(mixture.get(source, 0.0)) for source in [*options.domain, *options.general]}
    return {"r_domain": sum(float(share) for source, share in mixture.items() if source in options.domain)}


def _losses(
    measured: Mapping[str, Any], options: LawStage, plan: RunPlan, name: str, notes: list[str]
) -> dict[str, float]:
    """The losses of one measurement by column; a group of which a source is missing has none.

    A group's loss is the mean over its sources, weighted by their shares inside the group: the loss per token of text
    that is mixed so.
    """
    if is_several(options):
        groups = {f"loss_{source}": {source: 1.0} for source in [*options.domain, *options.general]}
    else:
        groups = {"loss_domain": dict(options.domain), "loss_general": dict(options.general)}
    found = {}
    for column, shares in groups.items():
        if missing := [source for source in shares if source not in measured]:
            notes.append(f"`{name}` has measurements without a loss on `{missing[0]}`, which are left out")
            continue
        found[column] = sum(measured[s].loss * w for s, w in shares.items()) / sum(shares.values())
    return found


def _size(plan: RunPlan, stage: StagePlan) -> int:
    model = plan.model_of(stage)
    assert model is not None
    return model.num_parameters
