"""Curves laid end to end over the stages of a run.

A stage counts its own steps (`counter: stage`) or those of its chain (`counter: run`). Two train stages belong to one
chain when the later one keeps the lr (`keep: [lr]`):

1. a stage without `lr` in `keep` starts a chain: offset 0, no lr of a parent;
2. a stage with it goes on behind its parent: its offset is the parent's position in the chain plus the steps that the
   parent has made where this stage starts from it, and its start lr is the parent's lr at that step;
3. stages of a chain with `counter: run` and equal options that follow each other end to start share one curve, whose
   span reaches to the end of the longest of them; a fork (`from: stage@pre_anneal`, `stage@12000`) opens a span of its
   own, with the warmup and cooldown, in steps, of the curve it leaves, so that the lr does not jump there;
4. a stage that keeps the lr and says nothing else goes on with its parent's curve (`counter: run`) or holds its last
   lr.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpt.base.errors import CptError, PlanError, UsageError
from cpt.plan.types import Lr
from cpt.schedules.length import in_steps, num_steps, parse_length
from cpt.schedules.schedule import SCHEDULES, make

COUNTERS = ("stage", "run")
LEVELS = ("peak", "constant", "end")  # options that are lrs


@dataclass(frozen=True, kw_only=True)
class ParentLr:
    """What a checkpoint of another run says about its lr.

    Args:
        last: lr of its last step.
        run_step: its position in its chain [steps].
        lr: its curve, if its manifest has one.
    """

    last: float
    run_step: int = 0
    lr: Lr | None = None


@dataclass(frozen=True, kw_only=True)
class StageLr:
    """What a recipe says about the lr of one train stage.

    Args:
        name: the stage.
        steps: its length [steps].
        tokens_per_step: global_batch_size · seq_length [tokens].
        lr: the recipe's `lr`: `schedule`, `counter` and the schedule's options as written; None when there is none.
        keep_lr: True when `keep` has `lr`.
        parent: the train stage of this run that its weights come from, or None (base, scratch, another run).
        parent_at: where in the parent it starts: None = the end, a number of steps, or `pre_anneal`.
        outside: lr facts of a parent that is a checkpoint of another run.
    """

    name: str
    steps: int
    tokens_per_step: int
    lr: Mapping[str, Any] | None
    keep_lr: bool = False
    parent: str | None = None
    parent_at: int | str | None = None
    outside: ParentLr | None = None


@dataclass(frozen=True)
class _Link:
    """A stage in its chain, before any lr is known."""

    stage: StageLr
    schedule: str
    options: Mapping[str, Any]
    counter: str
    root: str  # stage that its curve began in
    behind: int  # steps of that curve before this stage


@dataclass(frozen=True)
class _Before:
    """What a stage goes on from: the parent's curve, lr and position where the stage starts."""

    lr: Lr | None
    last: float
    position: int  # steps of the chain that are done


def curve(lr: Lr) -> Callable[[int], float]:
    """The lr of stage step n, counted from 0: a pure function, so that a resume needs nothing but the step."""
    schedule = make(lr.schedule, lr.options)
    return lambda n: schedule.lr(lr.offset + n, lr.span, lr.start_lr)


def pre_anneal_step(lr: Lr, steps: int | None = None) -> int | None:
    """Steps of the stage after which its last decay begins: where a checkpoint for a fork must lie.

    Args:
        lr: the resolved lr of the stage.
        steps: length of the stage [steps]; then a decay that does not begin inside of it gives None.
    """
    start = make(lr.schedule, lr.options).anneal_start(lr.span)
    if start is None:
        return None
    step = start - lr.offset
    return step if step > 0 and (steps is None or step < steps) else None


def points(lr: Lr, steps: int) -> tuple[float, float, float]:
    """First, highest and last lr of a stage of so many steps."""
    at = curve(lr)
    corners = (corner - lr.offset for corner in make(lr.schedule, lr.options).corners(lr.span))
    inside = {0, steps - 1} | {step for step in corners if 0 <= step < steps}
    return at(0), max(at(step) for step in inside), at(steps - 1)


def fork_step(at: int | str | None, parent: str, steps: int, lr: Lr) -> int:
    """Steps of the parent that are done where a stage starts from it.

    Args:
        at: None = the end, a number of steps, or `pre_anneal`.
        parent: name of the parent.
        steps: length of the parent [steps].
        lr: the parent's.

    Raises:
        PlanError: the parent has no anneal, or fewer steps.
    """
    if at is None:
        return steps
    if at == "pre_anneal":
        step = pre_anneal_step(lr, steps)
        if step is None:
            raise PlanError(
                f"`from` is `{parent}@pre_anneal`, but the lr of `{parent}` holds nothing before a last decay",
                f"`from: {parent}` starts from its end",
            )
        return step
    step = int(at)
    if not 0 < step <= steps:
        raise PlanError(f"`from` is `{parent}@{step}`, but `{parent}` has {steps:,} steps")
    return step


def resolve(stages: Sequence[StageLr]) -> dict[str, Lr]:
    """The complete `Lr` of every train stage of a run.

    Args:
        stages: the train stages, parents before their children.

    Returns:
        By stage name. `options` are complete: every level is a number, every length is in steps.

    Raises:
        CptError: everything that is wrong, the first with the others in `more`: unknown schedules and options, values
            that a schedule refuses, a peak that is missing, parts that do not fit, forks to where there is no anneal.
            A stage behind a wrong one is passed over.
    """
    errors: list[CptError] = []
    links: dict[str, _Link] = {}
    for stage in stages:
        try:
            links[stage.name] = _link(stage, links)
        except CptError as error:
            errors.append(_named(error, stage.name))
    reach: dict[str, int] = {}
    for link in links.values():
        reach[link.root] = max(reach.get(link.root, 0), link.behind + link.stage.steps)

    lrs: dict[str, Lr] = {}
    positions: dict[str, int] = {}
    names = {stage.name for stage in stages}
    for name, link in links.items():
        if link.stage.parent in names and link.stage.parent not in lrs:
            continue
        try:
            before = _before(link.stage, links, lrs, positions)
            positions[name] = before.position
            if link.root != name:
                assert before.lr is not None
                lr = dataclasses.replace(before.lr, offset=before.position)
            else:
                span = before.position + reach[name] if link.counter == "run" else link.stage.steps
                lr = _start(link, before, span)
            lrs[name] = dataclasses.replace(lr, points=points(lr, link.stage.steps))
        except CptError as error:
            errors.append(_named(error, name))
    if errors:
        first, *rest = errors
        raise type(first)(first.message, *first.hints, more=(*first.more, *rest))
    return lrs


def _link(stage: StageLr, links: Mapping[str, _Link]) -> _Link:
    """A stage with the curve that it shares, or begins."""
    parent = links.get(stage.parent or "") if stage.keep_lr else None
    if stage.keep_lr and stage.parent is None and stage.outside is None:
        raise PlanError("`keep` has `lr`, but what the stage starts from says nothing about an lr")
    schedule, options, counter = _written(stage, parent)
    goes_on = (
        parent is not None
        and stage.parent_at is None
        and counter == parent.counter == "run"
        and (schedule, dict(options)) == (parent.schedule, dict(parent.options))
    )
    if parent is None or not goes_on:
        return _Link(stage, schedule, options, counter, stage.name, 0)
    return _Link(stage, schedule, options, counter, parent.root, parent.behind + parent.stage.steps)


def _written(stage: StageLr, parent: _Link | None) -> tuple[str, Mapping[str, Any], str]:
    """Schedule, options and counter of a stage; those of the parent where the recipe has none."""
    if stage.lr is None:
        if not stage.keep_lr:
            raise PlanError("there is none", "give one, such as `lr: {schedule: cosine, peak: 3e-5}`")
        if parent is not None and parent.counter == "run":
            return parent.schedule, parent.options, "run"
        outside = stage.outside.lr if stage.outside else None
        if outside is not None and outside.counter == "run":
            return outside.schedule, outside.options, "run"
        return "constant", {}, "stage"
    options = dict(stage.lr)
    schedule = options.pop("schedule", None)
    counter = options.pop("counter", "stage")
    if schedule is None:
        raise UsageError("`schedule` is missing", "known: " + ", ".join(f"`{name}`" for name in SCHEDULES))
    if counter not in COUNTERS:
        raise UsageError(f"`counter` is `{counter}`, wanted `stage` or `run`")
    make(schedule, options)
    return str(schedule), options, str(counter)


def _before(stage: StageLr, links: Mapping[str, _Link], lrs: Mapping[str, Lr], positions: Mapping[str, int]) -> _Before:
    """Where a stage goes on from; nothing when it does not keep the lr."""
    step = None
    if stage.parent is not None and stage.parent in lrs:
        step = fork_step(stage.parent_at, stage.parent, links[stage.parent].stage.steps, lrs[stage.parent])
    if not stage.keep_lr:
        return _Before(None, 0.0, 0)
    if stage.parent is not None and step is not None:
        lr = lrs[stage.parent]
        return _Before(lr, curve(lr)(step - 1), positions[stage.parent] + step)
    assert stage.outside is not None
    return _Before(stage.outside.lr, stage.outside.last, stage.outside.run_step)


def _start(link: _Link, before: _Before, span: int) -> Lr:
    """The lr of a stage that begins a curve."""
    options, start_lr = dict(link.options), before.last
    old = before.lr
    goes_on = old is not None and link.counter == old.counter == "run" and old.schedule == link.schedule
    if old is not None and goes_on:
        # The same curve with another end: levels and start are those it began with, not what it has come down to.
        start_lr = old.start_lr
        if options.get("peak") is None:
            options = {**{k: v for k, v in old.options.items() if k in LEVELS}, **options, "peak": old.options["peak"]}
    made = make(link.schedule, options)
    if getattr(made, "from_parent", False) and not link.stage.keep_lr:
        raise PlanError("`start` is `parent`, but `keep` has no `lr`", "add `lr` to `keep`, or set `start: 0`")
    made = made.complete(before.last)
    in_tokens = [name for name in made.lengths if parse_length(name, getattr(made, name))[0] == "tokens"]
    per_step = link.stage.tokens_per_step
    lengths = {name: in_steps(num_steps(getattr(made, name), span, per_step)) for name in in_tokens}
    if old is not None and goes_on:
        lengths |= {
            name: old.options[name] for name in made.early if parse_length(name, getattr(made, name))[0] != "steps"
        }
    made = dataclasses.replace(made, **dict[str, Any](lengths))
    try:
        made.fits(span)
    except PlanError as error:
        # Lengths that the parent's curve brought along are not this stage's to change.
        own = [name for name in made.lengths if not (goes_on and name in lengths and name in made.early)]
        raise PlanError(error.message, *_shorter(link, {n: getattr(made, n) for n in own}, span)) from None
    values = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    return Lr(
        schedule=link.schedule,
        options={**values, **{name: in_steps(steps) for name, steps in made.placed(span).items()}},
        counter=link.counter,
        offset=before.position if link.counter == "run" else 0,
        span=span,
        start_lr=start_lr,
    )


def _shorter(link: _Link, lengths: Mapping[str, Any], span: int) -> list[str]:
    """Overrides that make parts fit which are long whatever the stage's length: shares in place of steps."""
    fields: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(SCHEDULES.get(link.schedule))}
    texts = []
    for name, value in lengths.items():
        share = fields[name] if parse_length(name, fields[name])[1] else "10%"
        if parse_length(name, value)[0] != "share" and num_steps(value, span) > num_steps(share, span):
            texts.append(f"`stages.{link.stage.name}.lr.{name}={share}`")
    return [" ".join(texts) + f" fits, or a longer `stages.{link.stage.name}.tokens`"] if texts else []


def _named(error: CptError, stage: str) -> CptError:
    """The error with the key in front."""
    return type(error)(f"`stages.{stage}.lr`: {error.message}", *error.hints, more=error.more)
