"""From the events of a run to its losses by stage and source.

    1. stage events -> measured losses (`Measurement`) of every stage
    2. the chain of train stages that ends in the last one -> rows: the start, then what each stage ended on
    3. rows -> what was gained and forgotten (`Change`), the loss matrix, stability gaps

A run from scratch is compared with the end of its first stage, which makes the base model; every other run with the
untouched start. A stage that is not finished gives its newest measurement, marked as provisional.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError
from cpt.base.events import Event, stage_events
from cpt.evaluate.gap import Gap, find_gap
from cpt.evaluate.matrix import Matrix
from cpt.plan.types import RunPlan, StagePlan


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Validation loss of one source."""

    loss: float  # [nats/token]
    bpb: float | None = None  # [bits/byte]
    stderr: float = 0.0  # [nats/token]
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One evaluation of all sources."""

    step: int
    tokens: int  # of the stage so far
    when: str  # start | during | end
    losses: Mapping[str, Loss]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Losses after a stage; `stage` is None for the untouched start."""

    stage: str | None
    losses: Mapping[str, Loss]
    provisional: bool = False  # the stage is not finished: its newest measurement so far
    at: int | str | None = None  # a step or `pre_anneal`: where the next stage of the chain left this one; None = end
    what: str = ""  # of a row beside the chain: what it measures

    @property
    def label(self) -> str:
        """For a table's head."""
        if self.stage is None:
            return "start"
        at = f"@{self.at}" if self.at is not None else ""
        return f"{self.stage}{at}{' so far' if self.provisional else ''}{f' ({self.what})' if self.what else ''}"


@dataclass(frozen=True, kw_only=True)
class Change:
    """What became of one source between the row that is compared with and the last one."""

    domain: str
    before: Loss
    after: Loss
    role: str  # new | replayed | not trained on

    @property
    def nats(self) -> float:
        """Rise of the loss [nats/token]; below 0 = gained."""
        return self.after.loss - self.before.loss

    @property
    def bits_per_byte(self) -> float | None:
        """Rise of the loss [bits/byte]."""
        if self.after.bpb is None or self.before.bpb is None:
            return None
        return self.after.bpb - self.before.bpb

    @property
    def noise(self) -> float:
        """Changes smaller than this say nothing: twice the larger standard error [nats/token]."""
        return 2 * max(self.before.stderr, self.after.stderr)

    @property
    def verdict(self) -> str:
        """gained | forgotten | unchanged."""
        if abs(self.nats) <= self.noise or self.nats == 0:
            return "unchanged"
        return "gained" if self.nats < 0 else "forgotten"


@dataclass(frozen=True, kw_only=True)
class Account:
    """What a run learned and forgot."""

    chain: tuple[str, ...]  # train stages, oldest first, that end in the last one
    rows: tuple[Row, ...]
    compared_with: int  # index of the row that changes count from
    changes: tuple[Change, ...]
    matrix: Matrix | None
    problem: str | None  # why there is no matrix, for people
    gaps: Mapping[str, Mapping[str, Gap]]  # by stage and source
    beside: tuple[Row, ...] = ()  # measured too, but no link of the chain: releases, other branches, evaluate stages

    @property
    def before(self) -> str:
        """What changes count from, for people."""
        row = self.rows[self.compared_with] if self.rows else None
        if row is None or row.stage is None:
            return "the untouched start"
        return f"the end of `{row.stage}`" if row.at is None else f"`{row.label}`"


def measurements(events: Iterable[Event]) -> list[Measurement]:
    """The evaluations among a stage's events, one for each step and kind; a repeated one counts once, the later."""
    found: dict[tuple[int, str], Measurement] = {}
    for event in events:
        if event.get("kind") != "eval" or not isinstance(event.get("losses"), dict):
            continue
        losses = {str(name): loss for name, value in event["losses"].items() if (loss := _loss(value)) is not None}
        step, tokens = int(event.get("step") or 0), int(event.get("tokens") or 0)
        when = str(event.get("when", "during"))
        found[step, when] = Measurement(step=step, tokens=tokens, when=when, losses=losses)
    order = {"start": 0, "during": 1, "end": 2}
    return sorted(found.values(), key=lambda m: (m.step, order.get(m.when, 1)))


def _loss(value: Any) -> Loss | None:
    """A source's entry of an `eval` event; None when it was not a finite number."""
    if not isinstance(value, dict) or not isinstance(value.get("loss"), int | float):
        return None
    return Loss(
        loss=float(value["loss"]),
        bpb=float(value["bpb"]) if isinstance(value.get("bpb"), int | float) else None,
        stderr=float(value.get("stderr") or 0.0),
        tokens=int(value.get("tokens") or 0),
    )


def chain_of(plan: RunPlan, stage: str) -> tuple[str, ...]:
    """The train stages that a stage's weights went through in this run, oldest first, itself included."""
    chain: list[str] = []
    name: str | None = stage
    while name is not None and name in plan.stages and name not in chain:
        chain.append(name)
        name = plan.stages[name].parent
    return tuple(s for s in reversed(chain) if plan.stages[s].kind == "train")


def account(plan: RunPlan, homes: Mapping[str, Path], stage: str | None = None) -> Account:
    """What a run learned and forgot up to a stage. Proxies of laws take no part in it.

    Args:
        plan: the run.
        homes: by stage, the folder that holds its attempts (that of another run when its result is re-used).
        stage: the end of the chain; without it the last train stage that has been measured.
    """
    measured = {
        name: measurements(stage_events(homes[name]))
        for name, part in plan.stages.items()
        if part.kind in ("train", "evaluate") and name in homes and (part.group is None or name == stage)
    }
    if stage is None:
        done = [name for name, found in measured.items() if found and plan.stages[name].kind == "train"]
        if not done:
            return _nothing("nothing has been measured yet", _beside(plan, (), measured))
        stage = done[-1]
    chain = chain_of(plan, stage)
    rows = _rows(plan, chain, measured)
    beside = _beside(plan, chain, measured)
    if not rows:
        return _nothing("nothing has been measured yet", beside)
    from_scratch = plan.base.kind == "scratch" and plan.stages[chain[0]].parent in (None, "base")
    made_base = [i for i, row in enumerate(rows[:-1]) if row.stage == chain[0]]
    compared = made_base[0] if from_scratch and made_base else 0
    matrix: Matrix | None = None
    problem: str | None
    if from_scratch and rows[compared].stage is None:  # what random weights "knew" cannot be forgotten
        problem = "with one training stage there is nothing yet that could be forgotten"
    else:
        matrix, problem = _matrix(plan, rows[compared:])
    return Account(
        chain=chain,
        rows=tuple(rows),
        compared_with=compared,
        changes=tuple(_changes(plan, chain, rows, compared)),
        matrix=matrix,
        problem=problem,
        gaps=_gaps(chain, rows, measured, compared),
        beside=beside,
    )


def _nothing(problem: str, beside: tuple[Row, ...]) -> Account:
    return Account(chain=(), rows=(), compared_with=0, changes=(), matrix=None, problem=problem, gaps={}, beside=beside)


def _beside(plan: RunPlan, chain: Sequence[str], measured: Mapping[str, list[Measurement]]) -> tuple[Row, ...]:
    """What was measured at an end that is no link of the chain, in the order of the plan."""
    rows = []
    for name, found in measured.items():
        ends = [m for m in found if m.when == "end"]
        in_chain = name in chain and _left_at(plan, chain, chain.index(name)) is None
        if not ends or in_chain:
            continue
        part = plan.stages[name]
        if part.kind == "evaluate":
            at = f"@{part.parent_at}" if part.parent_at is not None else ""
            what = f"measures {part.parent or 'base'}{at}"
        else:
            what = "its end, a release" if name in chain else "its end, another branch"
        rows.append(Row(stage=name, losses=ends[-1].losses, what=what))
    return tuple(rows)


def _rows(plan: RunPlan, chain: Sequence[str], measured: Mapping[str, list[Measurement]]) -> list[Row]:
    """The start, and what each stage of a chain ended on, as far as it was measured."""
    first = [m for m in measured.get(chain[0], []) if m.when == "start"]
    rows = [Row(stage=None, losses=first[0].losses)] if first else []
    for i, name in enumerate(chain):
        leaves_at = _left_at(plan, chain, i)
        found = [m for m in measured.get(name, []) if leaves_at is None or m.step <= leaves_at]
        later = [m for m in found if m.when != "start"]
        wanted = leaves_at is not None and bool(later) and later[-1].step == leaves_at
        if leaves_at is not None and not wanted:
            forked = [m for m in measured.get(chain[i + 1], []) if m.when == "start"]
            later, wanted = forked or later, bool(forked)
        if not later:
            break
        provisional = later[-1].when != "end" and not wanted
        at = plan.stages[chain[i + 1]].parent_at if leaves_at is not None else None
        rows.append(Row(stage=name, losses=later[-1].losses, provisional=provisional, at=at))
    return rows


def _left_at(plan: RunPlan, chain: Sequence[str], i: int) -> int | None:
    """The step at which the next stage of the chain left stage i; None = its end."""
    from cpt.schedules import pre_anneal_step

    if i + 1 >= len(chain):
        return None
    train = plan.stages[chain[i]].train
    at = plan.stages[chain[i + 1]].parent_at
    if at == "pre_anneal":
        return pre_anneal_step(train.lr, train.steps) if train else None
    return int(at) if at is not None else None


def _trained(stage: StagePlan) -> tuple[set[str], set[str]]:
    """Sources that a stage reads as new text, and those that it replays."""
    if stage.train is None:
        return set(), set()
    replay = stage.train.replay
    new = {name for name, share in stage.train.mixture.items() if share > 0}
    again = {name for name, share in replay.sources.items() if share > 0} if replay and replay.share > 0 else set()
    return new, again


def _changes(plan: RunPlan, chain: Sequence[str], rows: Sequence[Row], compared: int) -> list[Change]:
    first, last = rows[compared], rows[-1]
    if compared == len(rows) - 1:
        return []
    after = [name for name in chain if name in {row.stage for row in rows[compared + 1 :]}]
    new = set().union(*(_trained(plan.stages[name])[0] for name in after))
    again = set().union(*(_trained(plan.stages[name])[1] for name in after))
    if rows[compared].stage is not None:  # what the first stage was trained on is not new to the base model
        known = _trained(plan.stages[chain[0]])[0]
        again |= new & known
        new -= known
    return [
        Change(
            domain=domain,
            before=first.losses[domain],
            after=loss,
            role="new" if domain in new else "replayed" if domain in again else "not trained on",
        )
        for domain, loss in last.losses.items()
        if domain in first.losses
    ]


def _matrix(plan: RunPlan, rows: Sequence[Row]) -> tuple[Matrix | None, str | None]:
    """The matrix over the sources that every row has, or why there is none."""
    stages = [row.stage for row in rows if row.stage is not None]
    if rows[0].stage is not None and len(stages) == len(rows):
        # From scratch the first stage is the start; otherwise row 0 was never measured.
        if plan.base.kind != "scratch":
            return None, "the start was not measured, and without it nothing can be called forgotten"
        stages = stages[1:]
    domains = [d for d in rows[0].losses if all(d in row.losses for row in rows)]
    if not stages or not domains:
        return None, "no stage has been measured against its start yet"
    learned = {d: next((k for k, s in enumerate(stages, 1) if d in _trained(plan.stages[s])[0]), 0) for d in domains}
    if rows[0].stage is not None:
        known = _trained(plan.stages[rows[0].stage])[0]
        learned = {d: 0 if d in known else k for d, k in learned.items()}
    losses = [[row.losses[d].loss for d in domains] for row in rows]
    try:
        return Matrix.of_losses(stages, domains, losses, learned), None
    except UsageError as error:
        return None, error.message


def _gaps(
    chain: Sequence[str], rows: Sequence[Row], measured: Mapping[str, list[Measurement]], compared: int
) -> dict[str, dict[str, Gap]]:
    """Stability gaps of the stages that were measured on the way, for all sources known at their start."""
    at_end = {row.stage: row for row in rows}
    gaps: dict[str, dict[str, Gap]] = {}
    for i, name in enumerate(chain):
        if i < compared:
            continue
        found = measured.get(name, [])
        own = [m for m in found if m.when == "start"]
        before = own[0].losses if own else at_end[chain[i - 1]].losses if i and chain[i - 1] in at_end else None
        if before is None:
            continue
        curves: dict[str, Gap] = {}
        for domain, start in before.items():
            curve = {0: -start.loss} | {
                m.tokens: -m.losses[domain].loss for m in found if domain in m.losses and m.tokens
            }
            if len(curve) > 2:
                curves[domain] = find_gap(list(curve), list(curve.values()), start.stderr)
        if curves:
            gaps[name] = curves
    return gaps
