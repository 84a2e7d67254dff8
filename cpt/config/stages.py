"""Typed values of a train stage to its `Train`, in the plan's units: steps for tokens, shares that sum to one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpt.base.errors import CptError, PlanError, UsageError
from cpt.base.units import show_count
from cpt.config.kinds import AUTO
from cpt.config.order import From
from cpt.config.read import complete, make
from cpt.config.schema import PARALLEL, REPLAY, REQUIRED, STAGE_KEYS, TRAIN_KEYS, Key, Section
from cpt.plan.model import Parallel
from cpt.plan.types import Anomalies, Evaluate, Lr, Optimizer, Replay, Retain, Saving, StagePlan, StopIf, Train

STAGE = Section("a train stage", {**STAGE_KEYS, **TRAIN_KEYS})
_NO_LR = Lr(schedule="", options={})


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a stage's values are read against."""

    name: str
    parent: From
    from_scratch: bool
    before: tuple[str, ...]  # names of the stages before it
    built: Mapping[str, StagePlan]  # those of them that nothing is wrong with
    sources: tuple[str, ...]  # of the run
    measured: tuple[str, ...]  # those of which something is held out
    num_devices: int | None  # of the launcher


def build_train(values: Mapping[str, Any], around: Surroundings) -> Train:
    """The `Train` of a stage, but for its lr, which is joined over all stages later.

    Args:
        values: of the stage laid over those in `train`, typed, without defaults.

    Raises:
        CptError: everything that is missing or cannot be, together.
    """
    errors: list[CptError] = list(_missing(values, around))
    if errors:
        raise _together(errors)
    full = complete(STAGE, values)
    mixture = _mixture(full, around, errors)
    replay = _replay(values.get("replay"), around, errors)
    methods = _methods(full["methods"], errors, around.name)
    if errors:
        raise _together(errors)
    per_step = full["global_batch_size"] * full["seq_length"]
    wanted = full["tokens"] / (1 - replay.share) if replay and replay.account == "additive" else full["tokens"]
    steps = max(1, round(wanted / per_step))
    evaluate = full["evaluate"]
    return Train(
        tokens=steps * per_step,
        steps=steps,
        seq_length=full["seq_length"],
        global_batch_size=full["global_batch_size"],
        micro_batch_size=full["micro_batch_size"],
        seed=full["seed"],
        precision=full["precision"],
        mixture=mixture,
        replay=replay,
        lr=_NO_LR,
        optimizer=Optimizer(**full["optimizer"]),
        parallel=parallel(full["parallel"], around.num_devices),
        recompute=full["recompute"],
        methods=methods,
        evaluate=Evaluate(
            sources=evaluate["sources"] if evaluate["sources"] is not None else around.measured,
            every_steps=_steps(evaluate["every"], per_step),
            tokens=evaluate["tokens"],
            at_start=_at_start(evaluate["at_start"], around),
        ),
        stop_if=StopIf(**full["stop_if"]) if full.get("stop_if") else None,
        anomalies=Anomalies(**full["anomalies"]),
        saving=Saving(
            every_steps=_steps(full["checkpoint"]["every"], per_step),
            retain=Retain(**full["checkpoint"]["retain"]),
            asynchronous=full["checkpoint"]["asynchronous"],
        ),
        broken_import_guard=full["broken_import_guard"],
        log_every=full["log_every"],
    )


def _at_start(given: bool | str, around: Surroundings) -> bool:
    """Whether a stage is measured before its first step; `auto` leaves out what its parent has just measured."""
    if isinstance(given, bool):
        return given
    parent = around.built.get(around.parent.stage or "")
    return parent is None or parent.train is None or around.parent.at is not None


def _together(errors: list[CptError]) -> CptError:
    return type(errors[0])(errors[0].message, *errors[0].hints, more=(*errors[0].more, *errors[1:]))


def _missing(values: Mapping[str, Any], around: Surroundings) -> list[CptError]:
    """Required keys that neither the stage nor `train` gives."""
    found: list[CptError] = []
    for name, node in STAGE.keys.items():
        wanted = isinstance(node, Key) and (node.default is REQUIRED or (name == "keep" and not around.from_scratch))
        if not wanted or name in values or name == "from":
            continue
        if name == "mixture" and len(around.sources) == 1:
            continue
        where = f"stages.{around.name}.{name}"
        example = {
            "keep": f"`{where}=[weights]` starts a new optimizer, `[weights,optimizer,cursor,lr]` goes on",
            "tokens": f"`{where}=1B`",
            "mixture": f"`{where}={{{', '.join(f'{s}: 1' for s in around.sources[:2]) or 'source: 1'}}}`",
            "seq_length": "`train.seq_length=4096`",
            "global_batch_size": "`train.global_batch_size=512`",
        }.get(name, f"it is {node.help}")
        also = " (nor is `train." + name + "`)" if name in TRAIN_KEYS else ""
        found.append(UsageError(f"`{where}` is not given{also}: {node.help.split(';')[0]}", f"such as {example}"))
    stop_if = values.get("stop_if") or {}
    for key in ("source", "loss_rises"):
        if stop_if and key not in stop_if:
            found.append(UsageError(f"`stages.{around.name}.stop_if.{key}` is missing"))
    return found


def _mixture(full: Mapping[str, Any], around: Surroundings, errors: list[CptError]) -> dict[str, float]:
    given = full.get("mixture") or dict.fromkeys(around.sources, 1.0)
    return normalised(given)


def normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """Shares above 0 that sum to 1."""
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items() if weight > 0}


def _replay(given: Mapping[str, Any] | None, around: Surroundings, errors: list[CptError]) -> Replay | None:
    if not given:
        return None
    where = f"stages.{around.name}.replay"
    if "share" not in given:
        errors.append(UsageError(f"`{where}.share` is missing", f"such as `{where}.share=5%`"))
        return None
    full = complete(REPLAY, given)
    if full["share"] == 0:
        return None
    if full["share"] >= 1:
        errors.append(PlanError(f"`{where}.share` is 1: nothing of the stage's tokens would be new"))
        return None
    of = full["from"]
    if of == "parent":
        of = around.parent.stage or "base"
    if of in around.before and of not in around.built:
        return None  # what is wrong with that stage has been said
    if of != "base" and of not in around.built:
        errors.append(_no_replay_stage(where, of, around))
        return None
    sources = full["sources"]
    if sources is None:
        train = around.built[of].train if of != "base" else None
        if train is None:
            errors.append(
                PlanError(
                    f"`{where}.sources` is missing: what `{of}` was trained on is not known",
                    f"name sources that stand for it: `{where}.sources=[{', '.join(around.sources[:1]) or 'web'}]`",
                )
            )
            return None
        sources = train.mixture
    return Replay(share=full["share"], sources=normalised(sources), account=full["account"], of=of)


def _no_replay_stage(where: str, of: str, around: Surroundings) -> PlanError:
    from cpt.base.registry import unknown

    known = ["base", "parent", *around.built]
    error = unknown("stage to replay from:", of, known)
    return PlanError(f"`{where}.from` is `{of}`, which is not a stage before `{around.name}`", *error.hints)


def _methods(given: Mapping[str, Any], errors: list[CptError], stage: str) -> dict[str, dict[str, Any]]:
    from cpt.methods import METHODS

    found = {}
    for name, options in given.items():
        try:
            cls = METHODS.get(name)
            if options is not None and not isinstance(options, Mapping):
                raise UsageError(f"`{options}` is not a mapping of options")
            made = make(cls, options or {})
            found[name] = dataclasses.asdict(made) if dataclasses.is_dataclass(made) else dict(options or {})  # type: ignore[arg-type]
        except CptError as error:
            errors.append(UsageError(f"`stages.{stage}.methods.{name}`: {error.message}", *error.hints))
    return found


def parallel(values: Mapping[str, Any], num_devices: int | None) -> Parallel:
    """The layout; `dp: auto` takes all devices of the launcher, or one copy when only the layout decides."""
    full = complete(PARALLEL, values)
    if full["dp"] == AUTO:
        full["dp"] = max(1, (num_devices or 0) // (full["tp"] * full["pp"]))
    return Parallel(**full)


def _steps(tokens: int | None, per_step: int) -> int | None:
    """Tokens between two events as whole steps, at least one."""
    return max(1, round(tokens / per_step)) if tokens else None


def too_short(name: str, tokens: int, per_step: int) -> PlanError:
    """The error for a stage of less than half a step."""
    return PlanError(
        f"`stages.{name}.tokens` is {show_count(tokens)}, less than one step of {show_count(per_step)} tokens",
        f"give at least {show_count(per_step)}, or a smaller `global_batch_size`",
    )
