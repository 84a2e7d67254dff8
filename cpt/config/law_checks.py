"""Laws that a plan must not begin: too dear against the real run, or not to be fitted to what their proxies measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cpt.base.errors import CptError, PlanError, UsageError
from cpt.base.units import show_count
from cpt.config.law_grid import ONE_LENGTH
from cpt.plan.budget import proxy_cost
from cpt.plan.types import RunPlan, StagePlan

# Laws whose rows need nothing but size, tokens and shares; what others need is known when there are losses.
CHECKED = ("chinchilla", "dcpt", "l1", "mixing", "additive")


def too_costly(plan: RunPlan) -> Iterator[PlanError]:
    """Laws whose proxies cost more than they may."""
    for name, stage in plan.stages.items():
        if stage.kind != "law":
            continue
        cost, most = proxy_cost(plan, name), float(stage.options["max_cost"])
        if cost.share is None or cost.share <= most * (1 + 1e-9):
            continue
        proxy = next(s.train for s in plan.stages.values() if s.group == name and s.train is not None)
        per_step = proxy.global_batch_size * proxy.seq_length
        yield over_cost(name, cost.share, most, int(proxy.steps * most / cost.share) * per_step)


def over_cost(name: str, share: float, most: float, tokens: int) -> PlanError:
    """The error for proxies that cost more than they may.

    Args:
        share: what they cost, as a part of the target stage's compute [fraction].
        most: what they may cost [fraction].
        tokens: of one proxy, so that all of them cost that; 0 when a step is too long [tokens].
    """
    digits = 10 ** max(0, len(str(tokens)) - 3)
    less = tokens // digits * digits  # whole numbers to type
    hints = [f"`stages.{name}.tokens={show_count(less).replace(',', '')}`"] if less else []
    return PlanError(
        f"the proxies of `{name}` cost {share:.0%} of the real run's compute (6·N·D), "
        f"more than `stages.{name}.max_cost` of {most:.0%}",
        " or ".join([*hints, "fewer `ratios`", "`how=merge`"]) + " costs less",
        f"`stages.{name}.max_cost={_ceil_percent(share)}%` allows it",
    )


def _ceil_percent(share: float) -> int:
    return -int(-100 * share // 1)


def unfittable(plan: RunPlan) -> Iterator[PlanError]:
    """Laws that could not be fitted to what their proxies will measure, by the laws' own rules."""
    if not any(stage.kind == "law" for stage in plan.stages.values()):
        return  # what fits laws takes a while to import
    from cpt.laws import LAWS

    for name, stage in plan.stages.items():
        law = str(stage.options.get("law"))
        records = list(_measured(plan, stage)) if stage.kind == "law" and law in CHECKED else []
        if not records:
            continue
        try:
            LAWS.get(law).for_rows(_rows(records))
        except UsageError as error:
            many = law in ONE_LENGTH and len({r["tokens"] for r in records}) > 1
            hint = f"a smaller `stages.{name}.every` measures more often, more `ratios` are more proxies"
            yield PlanError(
                f"`stages.{name}.law` cannot be fitted to what the proxies will measure: {error.message}",
                f"`~stages.{name}.every` measures at the end only" if many else hint,
                f"`stages.{name}.law=auto` takes a law that can",
            )


def wrong_table(plan: RunPlan) -> Iterator[CptError]:
    """Tables of finished runs that a law could not be fitted to, or that do not answer what is asked of it."""
    given = [n for n, s in plan.stages.items() if s.kind == "law" and s.options.get("data") is not None]
    if not given:
        return
    from cpt.stages.law import options_of
    from cpt.stages.law_work import given_table

    for name in given:
        try:
            given_table(options_of(plan, name))
        except CptError as error:
            yield type(error)(f"`stages.{name}.data`: {error.message}", *error.hints)


def _measured(plan: RunPlan, law: StagePlan) -> Iterator[dict[str, Any]]:
    """Size, tokens and mixture of every measurement behind the warmup."""
    merged = [s for s in plan.stages.values() if s.group == law.name and s.kind == "merged"]
    for stage in plan.stages.values():
        train, model = stage.train, plan.model_of(stage)
        if stage.group != law.name or train is None or model is None:
            continue
        mixtures = merged[0].options["mixtures"] if merged else [train.mixture]
        every = None if merged else train.evaluate.every_steps
        steps = {train.steps, *(range(every, train.steps, every) if every else ())}
        tokens = [n * train.global_batch_size * train.seq_length for n in steps]
        for mixture in mixtures:
            yield from (
                {"n_params": model.num_parameters, "tokens": t, **_shares(mixture, law)}
                for t in tokens
                if t > law.options["warmup"]
            )
        if merged:
            return


def _shares(mixture: Mapping[str, float], law: StagePlan) -> dict[str, Any]:
    domain, general = law.options["domain"], law.options["general"]
    if law.options["mixtures"]:
        return {"shares": [mixture.get(source, 0.0) for source in [*domain, *general]], "corpora": (*domain, *general)}
    return {"share": sum(mixture.get(source, 0.0) for source in domain)}


def _rows(records: list[dict[str, Any]]) -> Any:
    """Rows as a law wants them; the losses are made up, since no rule of a law is about them."""
    from cpt.laws.rows import rows

    columns = {k: [r[k] for r in records] for k in records[0] if k != "corpora"}
    losses = [2.0 + 1.0 / (2 + i) for i in range(len(records))]
    return rows(losses, **columns, corpora=records[0].get("corpora", ()))
